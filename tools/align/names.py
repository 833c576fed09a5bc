"""Which array of a Jittor model is which of the PyTorch model: by name, then by order and shape."""

import re
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path


class UserError(Exception):
    """What is wrong with what the user gave, and what to do."""


def read_map(path):
    """[(pattern, replacement)] of a file with lines `pattern -> replacement`; [] without a file.

    A pattern is a regular expression on PyTorch's keys, the replacement makes it Jittor's.
    """
    if not path:
        return []
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    patterns = []
    for line in (line.strip() for line in lines):
        if not line or line.startswith("#"):
            continue
        pattern, arrow, replacement = (part.strip() for part in line.partition("->"))
        try:
            if not arrow:
                raise re.error("no -> in it")
            patterns.append((re.compile(pattern), replacement))
            re.sub(pattern, replacement, "")
        except (re.error, IndexError) as error:
            raise UserError(f"{path}: {line!r} is no `pattern -> replacement`: {error}") from error
    return patterns


def rename(key, patterns):
    """A key of PyTorch as Jittor's: every pattern is replaced, in the order of the file."""
    for pattern, replacement in patterns:
        key = pattern.sub(replacement, key)
    return key


def rename_module(name, patterns):
    """The same for the name of a module, to which keys add a dot and more."""
    return rename(f"{name}.", patterns).removesuffix(".") if name else name


def nearest(key, keys):
    found = get_close_matches(key, keys, 1, 0)
    return f"; the nearest left is {found[0]}" if found else ""


def unmatched(jittor, torch):
    """Lines on the keys that one side lacks or has in another shape, {key: shape} of both.

    num_batches_tracked, which Jittor does not have, may be missing.
    """
    missing = [key for key in torch if key not in jittor]
    extra = [key for key in jittor if key not in torch]
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    lines = [f"Jittor lacks {key} {torch[key]}{nearest(key, extra)}" for key in missing]
    lines += [f"PyTorch lacks {key} {jittor[key]}{nearest(key, missing)}" for key in extra]
    for key in jittor.keys() & torch.keys():
        # Jittor has no scalars: () is (1,).
        if (jittor[key] or (1,)) != (torch[key] or (1,)):
            lines.append(f"{key} is {jittor[key]} in Jittor, {torch[key]} in PyTorch")
    return lines


def kind(name):
    """What a class is, by its name, in the words of both: conv, batchnorm, pool, relu, ..."""
    name = re.sub(r"\d+d$", "", name).lower()
    return "pool" if "pool" in name else name


def pairs(jittor, torch):
    """{name in PyTorch: name in Jittor} of the outputs of modules.

    jittor and torch: {name: (kind, shape)} in order of execution. Names that one side lacks are
    matched by order, kind and shape.
    """
    same = {name: name for name in torch if name in jittor}
    ours = [name for name in jittor if name not in torch]
    theirs = [name for name in torch if name not in jittor]
    matcher = SequenceMatcher(
        None, [torch[name] for name in theirs], [jittor[name] for name in ours], autojunk=False
    )
    for block in matcher.get_matching_blocks():
        for i in range(block.size):
            same[theirs[block.a + i]] = ours[block.b + i]
    return same
