"""Starts align.py in the environment of a framework, where it computes its side."""

import os
import subprocess
import sys

from tools.align.compare import fail
from tools.frameworks import ROOT

# What a worker says to the user follows this on stderr, after warnings of the framework.
SAYS = "align.py says: "


def say(message):
    """End a worker with what is wrong, in one line or several."""
    sys.exit(f"{SAYS}{message}")


def launcher(framework, python, count):
    """The words before a program that start `count` processes of it on this machine."""
    if count == 1:
        return [python]
    if framework == "jittor":
        rights = ["--allow-run-as-root"] if os.getuid() == 0 else []
        return ["mpirun", *rights, "--oversubscribe", "-np", str(count), python]
    return [python, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]


def run_worker(args, framework, *options, processes=1):
    """Run align.py with these options in the environment of `framework`, "jittor" or "torch...".

    If it fails the program ends with one line.
    """
    python = args.jittor_python if framework == "jittor" else args.torch_python
    command = [*launcher(framework, python, processes), ROOT / "align.py", *options]
    try:
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    except OSError as error:
        if error.filename == "mpirun":
            fail("no mpirun; install it (Debian: apt install openmpi-bin libopenmpi-dev)")
        remedy = "run `make environments`, or give --jittor-python and --torch-python"
        fail(f"no Python at {python}; {remedy}")
    if result.returncode:
        _, said, message = result.stderr.rpartition(SAYS)
        message = message.strip() or "no message"
        fail(f"{framework} failed: {message if said else message.splitlines()[-1]}")
