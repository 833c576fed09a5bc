"""The errors that a user can mend, and how a program ends with one."""

import sys

from .progress import say


class InputError(Exception):
    """Something that the user gave is wrong. The message, one line, says what, and what to do."""


def stop(program, status, message):
    """Exit with one line on the terminal's error stream."""
    say(f"{program}: " + " ".join(message.splitlines()), sys.stderr)
    sys.exit(status)
