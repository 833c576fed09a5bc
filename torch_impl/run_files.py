"""The files of a run, in --output: log.csv, log.txt, last.safetensors and best.safetensors."""

import fcntl
import os
import socket
from contextlib import contextmanager, nullcontext
from itertools import count

from .errors import InputError
from .progress import say

COLUMNS = (
    *("train_loss", "train_loss_aux", "epoch_time", "val_loss", "acc_top1", "acc_top5"),
    *("train_loss_main", "images_per_second", "epoch"),
)


def write_atomic(path, data):
    """Write bytes so that `path` holds the old or the new content, whatever happens meanwhile."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:  # a full disk, Ctrl-C
        temporary.unlink(missing_ok=True)
        raise


def check_new_file(path):
    """Raise InputError unless a file can be made at `path` without overwriting one."""
    if not path.absolute().parent.is_dir():
        raise InputError(f"there is no folder {path.parent}; make it first")
    if path.exists() or path.is_symlink():
        raise InputError(f"{path} exists; give another name, or remove it")


def epoch_line(row, epochs):
    """What the text log says of an epoch, a row of the history."""
    averaged = f"; EMA top-1 {row['acc_top1_ema']:.4f}" if "acc_top1_ema" in row else ""
    return (
        f"epoch {row['epoch']}/{epochs}: train loss {row['train_loss']:.4f} "
        f"(main {row['train_loss_main']:.4f}, aux {row['train_loss_aux']:.4f}), "
        f"val loss {row['val_loss']:.4f}, "
        f"top-1 {row['acc_top1']:.4f}, top-5 {row['acc_top5']:.4f}, "
        f"{row['epoch_time']:.2f} min, {row['images_per_second']:.0f} images/s{averaged}"
    )


class RunFiles:
    """The files of one run in `output`; `suffix` stands before the dot of each name."""

    def __init__(self, output, suffix):
        self.output = output
        self.probe, self.lock = output / f".write{suffix}", output / f".lock{suffix}"
        self.csv, self.text = output / f"log{suffix}.csv", output / f"log{suffix}.txt"
        self.last = output / f"last{suffix}.safetensors"
        self.best = output / f"best{suffix}.safetensors"
        self.started = False  # whether self.last, if it exists, is of the run under way

    def check_writable(self):
        """Raise InputError unless files can be written to `output`, which is made if need be."""
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            self.probe.touch()
            self.probe.unlink()
        except OSError as error:
            reason = f"cannot write to {self.output} ({error.strerror})"
            raise InputError(f"{reason}; give another --output") from None

    @contextmanager
    def locked(self):
        """Keep other runs of this framework out of `output`; raise InputError if one is under way.

        The lock is the system's, so a crash releases it; the file says who holds it.
        """
        while True:
            file = open(self.lock, "a+")  # noqa: SIM115
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                remedy = "wait for it to end, or give another --output"
                raise InputError(f"{self.output} is in use by {holder}; {remedy}") from None
            # The run before may have removed the file between the two lines above.
            if self.lock.exists() and os.path.samestat(os.fstat(file.fileno()), self.lock.stat()):
                break
            file.close()
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            self.lock.unlink(missing_ok=True)
            file.close()

    def set_aside(self):
        """Move an earlier run's files to previous-1/, previous-2/, ... so that none is overwritten.

        The other framework's run beside it goes to the same folder, so the pairs stay together.
        """
        files = (self.csv, self.text, self.last, self.best)
        earlier = [path for path in files if path.exists()]
        if earlier:
            folders = (self.output / f"previous-{i}" for i in count(1))
            folder = next(f for f in folders if not any((f / path.name).exists() for path in files))
            folder.mkdir(exist_ok=True)
            for path in earlier:
                path.rename(folder / path.name)
            say(f"the files of an earlier run were moved to {folder}")

    def log(self, line):
        """A line on the screen and in the text log."""
        say(line)
        with open(self.text, "a", encoding="utf-8") as f:
            f.write(line + "\n")

    def log_history(self, history, epochs):
        """Log the epochs that a killed run finished, but had no time to log."""
        text = self.text.read_text(encoding="utf-8") if self.text.exists() else ""
        for row in history:
            if f"epoch {row['epoch']}/" not in text:
                self.log(epoch_line(row, epochs))

    def write_csv(self, history):
        # Further ones, such as those of averaged weights, stand after these.
        columns = list(dict.fromkeys((*COLUMNS, *(key for row in history for key in row))))
        rows = [columns] + [[repr(row[column]) for column in columns] for row in history]
        write_atomic(self.csv, "".join(",".join(row) + "\n" for row in rows).encode())


class OthersRunFiles(RunFiles):
    """Those of the processes beside rank 0, which writes for all: nothing is written."""

    def locked(self):
        return nullcontext()

    def check_writable(self, *_):
        pass

    set_aside = log = log_history = write_csv = check_writable
