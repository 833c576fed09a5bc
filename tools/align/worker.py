"""Starts align.py in the environment of a framework, where it computes its side."""

import subprocess

from tools.align.compare import fail
from tools.frameworks import ROOT

# The status of a worker that has said in its own words what is wrong.
SAID = 3


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
        message = result.stderr.strip() or "no message"
        message = message if result.returncode == SAID else message.splitlines()[-1]
        fail(f"{framework} failed: {message}")
