"""Starts align.py in the environment of a framework, where it computes its side."""

import subprocess
import sys

from tools.align.compare import fail
from tools.frameworks import ROOT

# What a worker says to the user follows this on stderr, after warnings of the framework.
SAYS = "align.py says: "


def say(message):
    """End a worker with what is wrong, in one line or several."""
    sys.exit(f"{SAYS}{message}")


def run_worker(args, framework, *options):
    """Run align.py with these options in the environment of `framework`, "jittor" or "torch...".

    If it fails the program ends with one line.
    """
    python = args.jittor_python if framework == "jittor" else args.torch_python
    command = map(str, (python, ROOT / "align.py", *options))
    try:
        result = subprocess.run(list(command), capture_output=True, text=True)
    except OSError:
        remedy = "run `make environments`, or give --jittor-python and --torch-python"
        fail(f"no Python at {python}; {remedy}")
    if result.returncode:
        _, said, message = result.stderr.rpartition(SAYS)
        message = message.strip() or "no message"
        fail(f"{framework} failed: {message if said else message.splitlines()[-1]}")
