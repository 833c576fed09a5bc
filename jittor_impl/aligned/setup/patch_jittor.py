"""Makes the installed Jittor 1.3.11 build with CUDA 13 and cuDNN 9.

The set-up calls it where the toolkit needs it; `python jittor_impl/aligned/setup/patch_jittor.py`
runs it by hand. `--revert` takes the changes back, `--check` only tells. Doing a thing twice does
no harm; another version of Jittor is refused.

jittor_cuda13.patch says what it changes in the installed package: each hunk is for a name or a
library that CUDA 13 or cuDNN 9 dropped, and is written for CUDA 11 and 12 and cuDNN 8 as well.
"""

import argparse
import os
import sys
from importlib import metadata
from pathlib import Path

# Run as a file: its folder becomes a package, without those above, which start Jittor.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    __package__ = Path(__file__).resolve().parent.name
    __import__(__package__)

from .atomic import replace_text

VERSION = "1.3.11.0"
PATCH = Path(__file__).resolve().parent / "jittor_cuda13.patch"


class PatchError(Exception):
    """One line that says what is wrong and what to do."""


def package_root():
    """The folder that holds the installed package `jittor`.

    Raises PatchError if there is none, or of another version.
    """
    try:
        distribution = metadata.distribution("jittor")
    except metadata.PackageNotFoundError:
        raise PatchError(
            f"jittor is not installed in {sys.prefix}; pip install -r requirements-jittor.txt"
        ) from None
    if distribution.version != VERSION:
        raise PatchError(
            f"the changes are for Jittor {VERSION}, installed is {distribution.version}; "
            f"pip install jittor=={VERSION}"
        )
    return Path(distribution.locate_file(""))


def read_patch(text):
    """{file: [(text before, text after), ...]} of a unified diff, context lines in both texts."""
    hunks = {}
    for line in text.splitlines(keepends=True):
        if line.startswith("+++ "):
            current = hunks.setdefault(line[4:].strip().partition("/")[2], [])
        elif line.startswith("@@"):
            current.append(("", ""))
        elif not line.startswith("--- "):
            before, after = current[-1]
            if line[0] in " -":
                before += line[1:]
            if line[0] in " +":
                after += line[1:]
            current[-1] = before, after
    return hunks


def changed_files(root, revert=False):
    """{path: its new text} of the files that the patch, or with `revert` its reverse, would change.

    Raises PatchError if a place looks neither as before nor as after: somebody else changed it.
    """
    new = {}
    for name, hunks in read_patch(PATCH.read_text(encoding="utf-8")).items():
        path = root / name
        text = old = path.read_text(encoding="utf-8")
        for before, after in hunks:
            if revert:
                before, after = after, before
            if text.count(after) == 1:
                continue
            if text.count(before) != 1:
                raise PatchError(
                    f"{path} is not as Jittor {VERSION} has it; "
                    f"pip install --force-reinstall --no-deps jittor=={VERSION}"
                )
            text = text.replace(before, after)
        if text != old:
            new[path] = text
    return new


def apply(revert=False):
    """Change the installed package, or change it back.

    Returns the paths of the files that were not yet so. Raises PatchError, before anything is
    written, if it cannot be done.
    """
    new = changed_files(package_root(), revert)
    for path in new:
        if not os.access(path.parent, os.W_OK):
            raise PatchError(
                f"{path.parent} cannot be written; use a virtual environment of your own"
            )
    for path, text in new.items():
        replace_text(path, text, path.stat().st_mode & 0o777)
    return list(new)


def main():
    parser = argparse.ArgumentParser(prog="patch_jittor.py", description=__doc__.partition("\n")[0])
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--revert", action="store_true", help="take the changes back")
    group.add_argument(
        "--check",
        action="store_true",
        help="only tell whether the package is changed; exit status 1 if not",
    )
    args = parser.parse_args()
    try:
        if args.check:
            missing = changed_files(package_root())
            if missing:
                print("not changed: " + ", ".join(map(str, missing)))
                return 1
            print("the changes for CUDA 13 are in place")
            return 0
        done = apply(args.revert)
    except (PatchError, OSError) as error:
        print(f"patch_jittor.py: error: {error}", file=sys.stderr)
        return 2
    for path in done:
        print(f"{'changed back' if args.revert else 'changed'}: {path}")
    if not done:
        print("nothing to do")
    return 0


if __name__ == "__main__":
    sys.exit(main())
