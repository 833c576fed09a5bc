"""What a run prints during an epoch: a tqdm bar on a terminal, a few lines in a file or a pipe."""

import sys
import time

from tqdm import tqdm


def say(line, stream=None):
    """Print a line without tearing a bar that is on the screen."""
    stream = stream or sys.stdout
    tqdm.write(line, file=stream)
    stream.flush()


class Progress:
    """`with Progress("epoch 1/20", 10000, True) as progress: progress.update(64, loss)`."""

    def __init__(self, title, images, shown):
        on_terminal = sys.stderr.isatty()
        self.title, self.images, self.seen = title, images, 0
        hidden = not (shown and on_terminal)
        self.bar = tqdm(total=images, desc=title, unit="image", leave=False, disable=hidden)
        self.plain = shown and not on_terminal
        self.start = time.perf_counter()
        self.next_line = images / 5

    def update(self, images, loss):
        """`images` more are done; `loss` is that of the step."""
        self.seen += images
        self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self.bar.update(images)
        if self.plain and self.seen >= self.next_line and self.seen < self.images:
            self.next_line += self.images / 5
            rate = self.seen / (time.perf_counter() - self.start)
            left = (self.images - self.seen) / rate
            done = f"{self.title}: {self.seen}/{self.images} images"
            say(f"{done}, loss {loss:.3f}, {rate:.0f} images/s, {left:.0f} s left")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
