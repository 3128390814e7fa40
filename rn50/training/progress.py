"""How far a run has come, and how that is shown."""

import contextlib
import os
import sys
import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

# How often the terminal's last line changes, and how often a line is printed where there is no terminal.
PROGRESS_SECONDS = 1.0
LINE_SECONDS = 60.0
COLUMNS = 80  # of what is printed for good
SEPARATOR = " · "
# What the terminal's last line leaves out where it is too narrow, first to last. The money and the end stay.
LEFT_OUT = ("loss", "speed", "share", "waits", "what")
ERASE = "\r\x1b[J"  # what was written from the cursor's line on


@dataclass
class Progress:
    """What a checkpoint needs to go on exactly, beside weights, optimizer and scaler.

    There is no random state: what is random depends on (seed, epoch, sample) alone. Sums are over all ranks,
    seconds are those of rank 0.
    """

    epoch: int = 0  # whole epochs, evaluation included
    epoch_step: int = 0  # steps of the epoch after those
    epoch_steps: int = 1
    step: int = 0
    images_seen: int = 0
    seconds: float = 0.0
    dollars: float = 0.0
    rows: list = field(default_factory=list)  # of the log
    # of the epoch that is not done
    reading: dict | None = None  # TrainingLoader.reading: on a machine with other memory it might be chosen otherwise
    first_batch: dict | None = None  # what the network was given: resolution, layout, dtype
    loss_sum: torch.Tensor | float = 0.0
    epoch_seconds: float = 0.0
    waiting_seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def epochs(self):
        return self.epoch + self.epoch_step / self.epoch_steps

    def restore(self, saved, device):
        """Take over `saved`, the values of another; its sum of losses goes to `device`."""
        vars(self).update(saved)
        if isinstance(self.loss_sum, torch.Tensor):
            self.loss_sum = self.loss_sum.to(device)

    def count_step(self, *, images, seconds, cpu_seconds):
        self.epoch_step += 1
        self.step += 1
        self.images_seen += images
        self.count_time(seconds=seconds, cpu_seconds=cpu_seconds)

    def count_time(self, *, seconds, cpu_seconds):
        self.seconds += seconds
        self.epoch_seconds += seconds
        self.cpu_seconds += cpu_seconds

    def next_epoch(self):
        self.epoch, self.epoch_step = self.epoch + 1, 0
        self.loss_sum = self.epoch_seconds = self.waiting_seconds = self.cpu_seconds = 0.0


class Stopwatch:
    """Seconds, and seconds of processor time of all threads, since the lap before."""

    def __init__(self):
        self._marks = self._now()

    def lap(self):
        marks, self._marks = self._marks, self._now()
        return {name: self._marks[name] - marks[name] for name in marks}

    def _now(self):
        return {"seconds": time.perf_counter(), "cpu_seconds": time.process_time()}


class Waiting:
    """Seconds for which `device` stood idle because its next batch had not come.

    `with waiting.for_data(): batch = next(batches)`. What is done on a CPU is done when the call before has returned. A
    GPU may have work for a while longer, so there it is the time between two events of its own.
    """

    def __init__(self, device):
        self._on_gpu, self._events, self._seconds = device.type == "cuda", deque(), 0.0

    @contextmanager
    def for_data(self):
        if self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            asked = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - asked

    def lap(self):
        """Seconds since the lap before, without those that a GPU has not come to yet."""
        while self._events and self._events[0][1].query():
            begin, end = self._events.popleft()
            self._seconds += begin.elapsed_time(end) / 1000
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Console:
    """How a run speaks: lines for good and, below them on a terminal, one that renews itself.

    Where stderr is no terminal, that line is printed with the others, when nothing else was for a minute. write: prints
    a line. shown: whether there is anyone to hear it. Its methods are for any thread.
    """

    def __init__(self, *, write, shown):
        self.write, self._shown, self._lock, self._parts = write, shown, threading.RLock(), {}
        self._terminal = shown and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._stated = self._said = time.monotonic()

    def say(self, message):
        """Print a line, above the one that renews itself."""
        if not self._shown:
            return
        with self._lock:
            self._said = time.monotonic()
            self._draw({})
            try:
                self.write(message)
            finally:
                self._draw(self._parts)

    def due(self):
        """Whether it is time for another `show`, whose figures may cost a GPU a pause."""
        return time.monotonic() - self._stated > PROGRESS_SECONDS

    def show(self, parts):
        """Renew the last line: {name: text}, with the names of LEFT_OUT for what may be missing from it."""
        with self._lock:
            self._stated, self._parts = time.monotonic(), parts
            self._draw(parts)
            if not self._terminal and self._stated - self._said > LINE_SECONDS:
                self.say(SEPARATOR.join(parts.values()))

    def clear(self):
        """Take the last line away."""
        with self._lock:
            self._parts = {}
            self._draw({})

    def _draw(self, parts):
        """The cursor stays at the line's beginning: from there it is erased whole, also after the window was narrowed
        and the terminal has broken it in two, and the ^C of a key is written over."""
        if self._terminal:
            with contextlib.suppress(OSError):  # a terminal that is gone must not end a training
                columns = os.get_terminal_size(sys.stderr.fileno()).columns or COLUMNS
                sys.stderr.write(f"{ERASE}{fitted(parts, columns)}\r")
                sys.stderr.flush()


def fitted(parts, columns):
    """The texts of `parts`, {name: text}, on a line of less than `columns`: without those of LEFT_OUT that must go."""
    parts = dict(parts)
    for name in LEFT_OUT:
        if len(SEPARATOR.join(parts.values())) < columns:
            break
        parts.pop(name, None)
    return SEPARATOR.join(parts.values())[: columns - 1]


def folded(texts):
    """The texts on as few lines of COLUMNS as there can be, further ones indented."""
    first, *rest = texts
    lines = [first]
    for text in rest:
        longer = f"{lines[-1]}{SEPARATOR}{text}"
        if len(longer) <= COLUMNS:
            lines[-1] = longer
        else:
            lines.append(f"  {text}")
    return "\n".join(lines)
