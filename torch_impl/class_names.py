"""The names of a checkpoint's classes, for people, from the lists that go around.

words.txt of TinyImageNet and ImageNet (WordNet id, tab, names), LOC_synset_mapping.txt (the same
with a blank), one name or id a line in the order of the outputs, and JSON: imagenet_class_index
({"0": ["n01440764", "tench"]}), {"0": "tench"} or a list of names.
"""

import json
import re

from .errors import InputError


def read_class_names(path, classes, count):
    """The names of `count` classes, from the file at `path`.

    `classes` are their ids, the names of the class folders, None if the checkpoint does not know
    them. Returns ids and names, ids None if neither says them. Raises InputError.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # "-sig": Windows writes a BOM
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a text file in UTF-8; save it as one") from None
    rows = read_json(text, path) if text.lstrip()[:1] in ("{", "[") else read_lines(text)
    if not all(rows):
        raise InputError(f"{path} has a class without a name; mend it")
    by_id = {row[0]: row[1] for row in rows if len(row) == 2}
    if classes and by_id.keys() & set(classes):
        return classes, [by_id.get(name, name) for name in classes]
    if len(rows) != count:
        raise InputError(
            f"{path} names {len(rows)} classes and the checkpoint has {count}; give a list that "
            "has a line for each of its outputs, in their order, or that names its WordNet ids"
        )
    names = [row[-1] for row in rows]
    ids = [row[0] for row in rows] if all(len(row) == 2 for row in rows) else None
    if ids is None or ids == [str(i) for i in range(count)]:
        return classes, names
    if classes:
        raise InputError(
            f"{path} names none of the checkpoint's classes, such as {classes[0]}; "
            "give the list of the data that it was trained on"
        )
    return ids, names


def read_lines(text):
    """[(id, name)], or [(name,)] of lines that begin with no WordNet id."""
    rows = []
    for line in filter(None, (line.strip() for line in text.split("\n"))):
        found = re.fullmatch(r"(n\d{8})\s+(.+)|([^\t]+)\t(.+)", line)
        rows.append(tuple(filter(None, found.groups())) if found else (line,))
    return rows


def read_json(text, path):
    """As read_lines, in the order of the outputs."""
    try:
        content = json.loads(text)
        if isinstance(content, dict):
            content = [content[str(i)] for i in range(len(content))]
        return [tuple(map(str, row)) if isinstance(row, list) else (str(row),) for row in content]
    except (ValueError, KeyError, RecursionError) as error:
        what = f"no JSON that lists class names ({str(error)[:60]})"
        expected = '["name", ...] or {"0": "name", ...}'
        raise InputError(f"{path} is {what}; expected {expected}") from None
