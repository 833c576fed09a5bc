"""Finds the files of installed packages, and replaces links and texts in one step.

In one step, so that a process that starts meanwhile never sees one missing or half written.
"""

import os
from importlib import metadata
from pathlib import Path


def package_files(packages):
    """The files of these installed packages, None if one is not installed."""
    try:
        return [f for package in packages for f in metadata.files(package) or ()]
    except metadata.PackageNotFoundError:
        return None


def replace_link(link, target):
    """Point `link`, whose folder is made if need be, at the file or folder where `target` leads."""
    target = Path(target).resolve()
    if link.is_symlink() and os.readlink(link) == str(target):
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = link.with_name(f"{link.name}.{os.getpid()}")
    # One may be left of a process that was killed, in a container with the same process numbers.
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)


def replace_text(path, text, mode):
    """Write `text` to `path`, whose folder is made if need be; `mode` is as os.chmod takes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.chmod(mode)
    os.replace(temporary, path)
