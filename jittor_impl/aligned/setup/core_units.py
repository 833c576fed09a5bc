"""Compile the core of Jittor 1.3.11 in units of several files, instead of its 150 one by one.

Each of them spends most of its time on the same headers and templates.
"""

import re
from pathlib import Path

# A unit of more files gains little, and leaves cores without one.
FILES = 12
# What a file declares at the top level for itself alone, which another file may call the same.
OWN_NAME = re.compile(
    r"^(?:static|constexpr|const)\b(?!.*::\w+\().*?\b(\w+)\s*[(=;\[{]", re.MULTILINE
)
MACRO = re.compile(r"^\s*#\s*define\b", re.MULTILINE)
# Files that clash with a header of other files.
ALONE = ("cuda_flags.cc", "expr.cc", "fp16_op_type.cc", "init.cc", "op_compiler.cc")
ALONE += ("pyjt_jit_flags.cc",)
NOTHING = "// Its code is in the unit of the file before it.\n"
COMMAND = re.compile(r'("[^"]*g\+\+[^"]*") "([^"]+\.cc)"(.*)')


def in_units(run_cmds):
    """jittor_utils.run_cmds, with the core's files in units; one by one where that fails."""

    def run(cmds, cache_path, jittor_path, msg="run_cmds"):
        failed = Path(cache_path) / "gen" / "units-failed"
        if msg == "Compiling jittor_core" and not failed.exists():
            try:
                return run_cmds(units(cmds, Path(cache_path) / "gen"), cache_path, jittor_path, msg)
            except RuntimeError:
                failed.touch()
        return run_cmds(cmds, cache_path, jittor_path, msg)

    return run


def units(cmds, folder):
    """The commands `cmds`, "g++" "source" options: the first of each unit compiles all its files.

    They stay in their order, in which the core's static objects are made when it is loaded.
    """
    unit, names, changed, nothing = [], set(), list(cmds), folder / "nothing.cc"
    write(nothing, NOTHING)

    def finish():
        if len(unit) > 1:
            source = folder / f"unit-{Path(unit[0][1][2]).name}"
            write(source, "".join(f'#include "{match[2]}"\n' for _, match in unit))
            for place, match in unit:
                changed[place] = f'{match[1]} "{nothing}"{match[3]}'
            place, match = unit[0]
            changed[place] = f'{match[1]} "{source}"{match[3]}'
        unit.clear()
        names.clear()

    for place, command in enumerate(cmds):
        match = COMMAND.fullmatch(command)
        text = Path(match[2]).read_text(errors="replace") if match else ""
        if not match or Path(match[2]).name in ALONE or MACRO.search(text):
            finish()
            continue
        own = set(OWN_NAME.findall(text))
        if len(unit) == FILES or names & own or unit and match[1] != unit[0][1][1]:
            finish()
        unit.append((place, match))
        names |= own
    finish()
    return changed


def write(path, text):
    """Write `text`, unless it is there: Jittor compiles again what is newer."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
