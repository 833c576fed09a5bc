"""Arrays made ahead of their use by other processes, in order: what a training step waits for.

Python's own pool of processes, forked: they inherit the data set and the memory that they write to,
and know nothing of a framework. What an array holds depends on what is asked for, not on who makes
it. (grain, which needs no framework either, starts its workers anew: each would import the whole
training program. torch's DataLoader would put PyTorch into Jittor's environment.)
"""

import ctypes
import mmap
import os
import signal
from collections import deque
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import active_children, get_context
from pathlib import Path

import numpy as np
from .errors import InputError

AHEAD = 2  # batches that are made while one is in use
CHUNK = 8  # images to a task
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Loader:
    """Batches of uint8 arrays of `shape`: read(*arguments) of each tuple in a list.

    workers: processes that do it; 0 reads where it is called.
    """

    def __init__(self, read, shape, workers):
        self.read, self.shape, self.workers = read, shape, workers
        self.pool = self.memory = None

    def batches(self, lists):
        """Yield (n, *shape) for each of `lists`, of n tuples; valid until the next is asked for.

        Raises what `read` raises. One such pass at a time.
        """
        if self.workers == 0 or not lists:
            for batch in lists:
                yield np.stack([self.read(*arguments) for arguments in batch])
            return
        self.start(max(map(len, lists)))
        pending = deque()
        try:
            for number, batch in enumerate(lists):
                pending.append(self.submit(number % (AHEAD + 1), batch))
                if len(pending) > AHEAD:
                    yield self.finished(*pending[0])
                    pending.popleft()
            while pending:
                yield self.finished(*pending[0])
                pending.popleft()
        finally:  # an error or Ctrl-C does not wait for the rest, but for what is being written
            wait([task for _, tasks in pending for task in tasks if not task.cancel()])

    def start(self, batch_size):
        """Fork the workers, with memory for batches of this size."""
        if self.pool and batch_size <= self.memory.shape[1]:
            return
        if self.pool:
            self.pool.shutdown()
        shape = (AHEAD + 1, batch_size, *self.shape)
        shared = mmap.mmap(-1, int(np.prod(shape)))
        self.memory = np.frombuffer(shared, np.uint8).reshape(shape)
        fork = dict(mp_context=get_context("fork"), initializer=become_worker, initargs=(self,))
        try:
            self.pool = ProcessPoolExecutor(self.workers, **fork)
            self.pool.submit(os.getpid)  # the first task forks them all
        except (OSError, RuntimeError) as error:  # no more processes, threads or open files
            for process in active_children():  # which would wait for tasks for ever
                process.kill()
            what = f"cannot start {self.workers} processes that read images ({error})"
            raise InputError(f"{what}; lower --workers") from None

    def submit(self, place, batch):
        parts = [(start, batch[start : start + CHUNK]) for start in range(0, len(batch), CHUNK)]
        with unless_killed():
            tasks = [self.pool.submit(fill, place, start, part) for start, part in parts]
        return self.memory[place, : len(batch)], tasks

    def finished(self, images, tasks):
        with unless_killed():
            for task in tasks:
                task.result()
        return images


@contextmanager
def unless_killed():
    """Raise InputError where the pool says, at whatever call, that one of its processes is gone."""
    try:
        yield
    except BrokenProcessPool:
        remedy = "perhaps memory ran out; lower --workers"
        raise InputError(f"a process that reads images was killed, {remedy}") from None


def become_worker(loader):
    """The first that a forked process does: `loader` is its own copy."""
    global LOADER
    LOADER = loader
    # Ctrl-C is for the program, which then lets its workers go; they also end when it is killed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))


def fill(place, start, part):
    """Read a part of a batch, from image `start` on, into the shared memory."""
    for i, arguments in enumerate(part, start):
        LOADER.memory[place, i] = LOADER.read(*arguments)


def default_workers():
    return min(8, len(os.sched_getaffinity(0)))


def default_cache():
    """Bytes: a quarter of the memory, shared among the processes that were started on this host."""
    here = [os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")]
    return memory_limit() // 4 // int(next(filter(None, here), 1))


def memory_limit(groups="/proc/self/cgroup", root="/sys/fs/cgroup"):
    """Bytes that this process may use: the machine's, or those of its container or job."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    # "0::/PATH" in version 2 of Linux's control groups, "7:memory:/PATH" in version 1
    files = {"": ("", "memory.max"), "memory": ("/memory", "memory.limit_in_bytes")}
    with suppress(OSError):
        for line in Path(groups).read_text().splitlines():
            _, kind, path = line.split(":", 2)
            mount, name = files.get(kind, ("", None))
            folder = Path(f"{root}{mount}{path}")
            for group in (folder, *folder.parents) if name else ():
                with suppress(OSError, ValueError):  # there is none, or it is "max"
                    limits.append(int((group / name).read_text()))
    return min(limits)
