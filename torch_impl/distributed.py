"""Many processes, one run: which images each of them computes, and how all of them end.

The numbers are those of one process, apart by rounding. Every process draws the same order of
images and everything else that is random, computes its part of each global batch, and weights its
loss by its share of the images; BatchNorm takes its statistics over all of them, and gradients are
added up (kernels/collectives.py). Rank 0 writes the files. One process is the whole batch, and
pays nothing.
"""

import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from .errors import InputError
from .kernels.collectives import (
    OTHER,
    RANK,
    WORLD_SIZE,
    SyncBatchNorm2d,
    all_reduce,
    connect,
    is_first_to_speak,
    is_lost_connection,
)
from .layers import BatchNorm2d, DropPath
from .progress import say

GRACE = 10  # seconds in which the launcher ends the processes that one of them left behind


class Part(NamedTuple):
    """What this process computes of one part of a batch, and it computes one after another."""

    rows: slice  # of the images that it was given
    places: np.ndarray  # of these in the batch
    share: float  # of the batch's images; 0: one that stands in where there is none for it


def start_processes(device):
    """Join the other processes; device: cpu or cuda. Raises InputError if that cannot be."""
    if WORLD_SIZE > 1:
        sys.excepthook = end_with_traceback
        return connect(device)
    other, command = OTHER
    if int(os.environ.get(other, 1)) > 1:
        raise InputError(f"the processes do not see each other; start them with {command}")


def own_places(count):
    """The places in `count` images that this process computes, in order, (n,) or none.

    Each takes a run of the first half and its mirror image in the second: mixup pairs the first
    image with the last, and a process then has both.
    """
    half = np.array_split(np.arange((count + 1) // 2), WORLD_SIZE)[RANK]
    return np.union1d(half, count - 1 - half)


def parts_of(count, number):
    """The Parts of a batch of `count` images that is computed in `number` parts.

    A process for which no image is left joins in with the first one, at a share of 0: it takes part
    in every sum, and adds nothing.
    """
    taken, start = [], 0
    for whole in np.array_split(np.arange(count), min(number, count)):
        own = own_places(len(whole))
        places = whole[own] if len(own) else whole[:1]
        taken.append(Part(slice(start, start + len(places)), places, len(own) / count))
        start += len(places)
    return taken


def places_in_batch(count, number):
    """Which of a batch's `count` images this process is given, in the order of its `parts_of`."""
    return np.concatenate([part.places for part in parts_of(count, number)])


def synchronise(model):
    """Let BatchNorm in training take its statistics over all processes; keys stay as they are."""
    if WORLD_SIZE > 1:
        for module in model.modules():
            if type(module) is BatchNorm2d:
                module.__class__ = SyncBatchNorm2d


def take(model, part):
    """Let `model` compute this Part next: DropPath and BatchNorm ask which images they see."""
    if WORLD_SIZE > 1 or part.share < 1:
        for module in model.modules():
            if isinstance(module, (DropPath, SyncBatchNorm2d)):
                module.part = part


def total(numbers):
    """Each of a few numbers, summed over the processes: float64."""
    numbers = np.array(numbers, np.float64)
    return numbers if WORLD_SIZE == 1 else all_reduce(numbers)


def wait_for_all():
    """Return when every process is here."""
    total([0])


def stop(program, status, message):
    """End this process with one line on the error stream, and by the launcher all others.

    What every process meets, such as a wrong option, rank 0 alone says. What one meets alone, such
    as memory that runs out, that one says, and no other.
    """
    if RANK > 0:
        # The launcher ends this process once rank 0 has left, or has begun to (follow_rank_0).
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: leave(status))
        if signal.alarm(0):
            leave(status)
        # Of several that fail the lowest speaks; mpirun takes a second to end the others.
        time.sleep(GRACE * (1 + RANK / WORLD_SIZE))
        message += f" (rank {RANK} of {WORLD_SIZE} processes)"
    if is_first_to_speak():
        say(f"{program}: " + " ".join(message.splitlines()), sys.stderr)
    leave(status)


def end_with_traceback(*error):
    """The sys.excepthook of many processes."""
    traceback.print_exception(*error)
    leave(1)


def leave(status):
    """Exit. One of many does not wait for the others, which may be waiting for this one."""
    if WORLD_SIZE == 1:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def await_launcher(error):
    """Whether `error` says that another process is gone. Waits for the launcher to end this one."""
    if WORLD_SIZE == 1 or not is_lost_connection(error):
        return False
    with suppress(KeyboardInterrupt):
        time.sleep(GRACE)
    if RANK > 0:
        leave(1)
    return True


def follow_rank_0(*_):
    """The handler of signals of all but rank 0: go on until that has said its line and left."""
    signal.alarm(GRACE)
