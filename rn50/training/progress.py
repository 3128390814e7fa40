"""How far a run has come, and how that is shown."""

import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

# How often the bar moves, and how often a line is printed where there is no terminal for a bar.
PROGRESS_SECONDS = 1.0
LINE_SECONDS = 60.0


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


class Bar:
    """A bar on a terminal, and elsewhere a line a minute through `say`. `shown`: whether there is anyone to see it."""

    def __init__(self, *, title, done, total, say, shown):
        self._title, self._total, self._say = title, total, say
        self._tqdm = tqdm(
            total=total,
            initial=done,
            desc=title,
            unit="step",
            disable=None if shown else True,  # None: where there is no terminal
            leave=False,
            mininterval=PROGRESS_SECONDS,
        )
        self._stated = self._printed = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._tqdm.close()

    def due(self):
        """Whether it is time for another status, which costs a GPU a pause."""
        return time.monotonic() - self._stated > PROGRESS_SECONDS

    def state(self, done, status):
        now = self._stated = time.monotonic()
        self._tqdm.set_postfix_str(status)
        if self._tqdm.disable and now - self._printed > LINE_SECONDS:
            self._printed = now
            self._say(f"{self._title}  step {done}/{self._total}  {status}")

    def advance(self):
        self._tqdm.update()
