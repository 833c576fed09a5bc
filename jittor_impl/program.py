"""What the programs share: kinds of options, the choice of the device, how a program ends."""

import argparse
import errno
import os
import signal
import sys
from pathlib import Path

from .aligned.gpu import describe_gpu, has_tf32, prepare_gpu
from .aligned.start import jt
from .distributed import RANK, await_launcher, follow_rank_0, leave, stop
from .errors import InputError, is_out_of_memory


class Options(argparse.Namespace):
    """The values of options; `given`, which is not one of them, names those of the command line."""

    __slots__ = ("given",)


class ArgumentParser(argparse.ArgumentParser):
    def parse_args(self, words=None):
        args, unset = super().parse_args(words, Options()), object()
        again = argparse.Namespace(**dict.fromkeys(vars(args), unset))
        found = vars(super().parse_args(words, again))
        args.given = {name for name, value in found.items() if value is not unset}
        return args

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def number(kind, minimum, exclusive=False, maximum=None):
    """An argparse type: `kind` (int or float), at least `minimum`, or above it if exclusive.

    At most `maximum`, if there is one.
    """

    def parse(text):
        value = kind(text)
        if not minimum <= value < float("inf") or exclusive and value == minimum:
            bound = f"{'above' if exclusive else 'at least'} {minimum}"
            what = f"{'' if kind is int else 'finite '}number {bound}"
            raise argparse.ArgumentTypeError(f"must be a {what}, got {text}")
        if maximum is not None and value > maximum:
            raise argparse.ArgumentTypeError(f"must be at most {maximum}, got {text}")
        return value

    # argparse says "invalid whole number value"
    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def add_device_options(parser):
    devices, of_auto = ("auto", "cpu", "cuda"), "auto takes the GPU if there is one"
    parser.add_argument("--device", choices=devices, default="auto", help=of_auto)
    of_tf32 = "convolutions in TF32, on a GPU that has it; auto is off"
    parser.add_argument("--tf32", choices=("auto", "on", "off"), default="auto", help=of_tf32)


def choose_device(args):
    """Settle args.device. Returns its name for the log."""
    if args.device == "cuda" and not jt.has_cuda:
        missing = "Jittor sees no CUDA GPU, or no nvcc to compile for it"
        raise InputError(f"{missing}; give --device cpu")
    if args.device == "auto":
        args.device = "cuda" if jt.has_cuda else "cpu"
    jt.flags.use_cuda = int(args.device == "cuda")
    tf32 = args.tf32 == "on"
    if tf32 and (args.device == "cpu" or not has_tf32()):
        raise InputError("--tf32 on needs a GPU of compute capability 8.0 or newer; leave it out")
    if args.device == "cuda":
        prepare_gpu(tf32)
        return f"{describe_gpu()}, TF32 {'on' if tf32 else 'off'}"
    threads = os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))
    return f"CPU, {threads} threads"


def out_of_memory(args):
    """The line of a program that has no memory left: which options to lower."""
    options = [key for key in ("batch_size", "img_size") if vars(args).get(key)]
    lower = [f"--{key.replace('_', '-')} ({vars(args)[key]})" for key in options]
    return f"error: out of memory; lower {' or '.join(lower) or '--img-size'}"


def run_program(name, body, args, advice=lambda: "give the same command again"):
    """Call body(args). What ends it early becomes one line on the error stream and a status.

    2 for what the user can mend; for a signal 128 + its number, with the text that advice()
    returns. Other exceptions pass.
    """
    for stream in filter(
        None, (sys.stdout, sys.stderr)
    ):  # a class's name may have letters that it lacks
        stream.reconfigure(errors="backslashreplace")
    interrupted = None

    def on_interrupt(number, _):
        nonlocal interrupted
        interrupted = number
        raise KeyboardInterrupt

    # Ctrl-C; a scheduler or `docker stop`.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, follow_rank_0 if RANK else on_interrupt)
    if RANK:  # rank 0 speaks for all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        body(args)
    except InputError as error:
        stop(name, 2, f"error: {error}")
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's last flush
        leave(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            stop(name, 2, out_of_memory(args))
        output = vars(args).get("output")
        path = Path(str(error.filename or output or "standard output"))
        written = output in (path, *path.parents) or error.errno in (errno.ENOSPC, errno.EDQUOT)
        room, rights = "make room, or write elsewhere", "check the path and its permissions"
        remedy = f"{room} (--output)" if output and written else room if written else rights
        stop(name, 2, f"error: {path}: {error.strerror or error}; {remedy}")
    except BaseException as error:
        # Ctrl-C also reaches a compiler at work, whose failure may come first.
        if interrupted is None and is_out_of_memory(error):
            stop(name, 2, out_of_memory(args))
        if interrupted is None and await_launcher(error) and interrupted is None:
            stop(name, 1, f"error: another process of this run is gone; {advice()}")
        if interrupted is None:
            raise
        stop(name, 128 + interrupted, f"interrupted; {advice()}")
