"""The framework under test: OVERLOCK_TESTS (jittor or torch), else the one that is installed.

tests/run.py sets OVERLOCK_TESTS.
"""

import os
from importlib import import_module
from importlib.util import find_spec

NAME = os.environ.get("OVERLOCK_TESTS") or ("jittor" if find_spec("jittor") else "torch")


def module(name):
    """A module of the implementation under test, such as train or aligned.nn."""
    return import_module(f"{NAME}_impl.{name}")
