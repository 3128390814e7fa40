"""Checkpoints that are whole or not there: tensors and plain values, written aside, synced, renamed."""

import contextlib
import os
import re
import threading
import time
import warnings
import zipfile
from pathlib import Path

import torch

from rn50.errors import RunError, Stopped
from rn50.training import foreign, interruption

FORMAT = 2
LAST, PREVIOUS, PARTIAL = "last.pt", "previous.pt", "last.pt.partial"
RETRY_SECONDS = 10.0
# A mirror that does not answer does not keep a run that is on disk from ending.
MIRROR_PATIENCE = 60.0
# Seconds of a stop that are for what comes after the checkpoint.
STOP_MARGIN = 2.0


def save(folder, state):
    """Write `state` as folder/last.pt; what was last.pt becomes previous.pt once the new file reads back.

    A crash at any moment leaves at least one complete file under those two names. Raises RunError when the
    disk does not take it; the files that were there stay.
    """
    folder = Path(folder)
    partial = folder / PARTIAL
    try:
        with open(partial, "wb") as file:
            torch.save({**state, "format": FORMAT}, file)
            file.flush()
            os.fsync(file.fileno())
        _check(partial)
        accept(folder)
    # torch.save turns a full disk into a RuntimeError of its zip writer
    except (OSError, RuntimeError, RunError) as error:
        partial.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise RunError(f"cannot write a checkpoint to {folder}: {reason}") from error


def accept(folder):
    """Let the complete folder/last.pt.partial take the place of last.pt, and that the place of previous.pt."""
    folder = Path(folder)
    if (folder / LAST).exists():
        os.replace(folder / LAST, folder / PREVIOUS)
    os.replace(folder / PARTIAL, folder / LAST)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path):
    """The state in one checkpoint file, on the CPU. RunError if it is missing, damaged, or what else it is."""
    try:
        _check(path)
        with warnings.catch_warnings(action="ignore"):  # of other kinds of archives, which are named below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"no checkpoint at {path}") from None
    except Exception as error:  # a damaged zip raises almost anything
        with contextlib.suppress(OSError):
            if what := foreign.kind(path):
                raise RunError(
                    f"checkpoint {path} cannot be read: it is {what[0]}, not a checkpoint of this project{what[1]}"
                ) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = re.sub(r"\x1b\[\w*", "", reason)  # torch's advice is in bold letters
        raise RunError(f"checkpoint {path} cannot be read ({reason})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        what, remedy = foreign.contents(state)
        raise RunError(f"{path} is {what}, not a checkpoint of format {FORMAT} of this project{remedy}")
    return state


def _check(path):
    # torch.load does not look at the checksums that torch.save writes
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except zipfile.BadZipFile as error:
        raise RunError(f"checkpoint {path} is damaged: {error}") from None
    if damaged:
        raise RunError(f"checkpoint {path} is damaged in {damaged}")


def newest(folder, *, warn, mirror=None):
    """The state to resume from: last.pt, else previous.pt with a `warn`ing, else None when there is neither.

    With a `mirror` (rn50/training/mirror.py), its checkpoint where that is of a later step or nothing here can be read.
    Raises RunError where going on would mean starting over although there is, or may be, something to resume from.
    """
    candidates = [path for path in (Path(folder) / LAST, Path(folder) / PREVIOUS) if path.exists()]
    here = _first_readable(candidates, warn)
    if mirror and mirror.fetch(into=Path(folder) / PARTIAL, later_than=here["step"] if here else None):
        try:
            here = load(Path(folder) / PARTIAL)
            accept(folder)
        except RunError as error:
            if not here:
                raise
            warn(f"the mirror's {error}; going on with the one here")
    if candidates and not here:
        raise RunError(f"no checkpoint in {folder} can be read; move the folder away to start anew")
    return here


def _first_readable(candidates, warn):
    for number, path in enumerate(candidates):
        try:
            state = load(path)
        except RunError as error:
            warn(f"{error}; trying the one before it")
            continue
        # in its place a damaged file would become the previous checkpoint at the next save
        for damaged in candidates[:number]:
            os.replace(damaged, f"{damaged}.damaged")
        return state
    return None


def snapshot(state):
    """A copy on the CPU that the steps to come do not change, of nested dicts and lists of tensors and plain values."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(snapshot(value) for value in state)
    return state


class Writer:
    """Saves snapshots in a thread, so that training never waits for the disk nor ends with it.

    One is in flight at a time; a newer one takes the place of one that has not been begun. What the disk refuses is
    tried again every RETRY_SECONDS, and said once through `warn`. A `mirror` gets every checkpoint that is on disk.
    step: that of the checkpoint there is.
    """

    def __init__(self, folder, *, step, warn, mirror=None):
        self.folder, self.step, self.error = Path(folder), step, None
        self._put_at, self._latest = time.monotonic(), None
        self._warn, self._mirror, self._changed = warn, mirror, threading.Condition()
        threading.Thread(target=self._work, name="checkpoints", daemon=True).start()

    def due(self, step, *, steps, minutes):
        """Whether `steps` (0: any number) or `minutes` have passed since the last, and another would be begun."""
        late = time.monotonic() - self._put_at > 60 * minutes or 0 < steps <= step - self.step
        return late and (self._latest is None or self.error is not None)

    def put(self, state):
        """Save a snapshot of `state`, which has a `step`, in the background."""
        state = snapshot(state)
        with self._changed:
            self._latest, self._put_at, self.step = state, time.monotonic(), state["step"]
            self._changed.notify_all()

    def finish(self, patience, *, required=False):
        """Wait for the disk and then the mirror: `patience` seconds each, or as long as a requested stop allows.

        What is not written by then is said. Where it is `required`, a run that lacks it has not finished: Stopped, or
        RunError if nobody asked to stop.
        """
        if not wait_until(self._changed, lambda: self._latest is None, patience):
            message = (
                f"the checkpoint of step {self.step} could not be written ({self.error or 'the disk is too slow'})"
            )
            if required and not interruption.reason():
                raise RunError(f"{message}; make room and repeat the command")
            self._warn(f"{message}; the steps since the one before it will be repeated")
            if required:
                raise Stopped(interruption.reason())
        elif self._mirror and not self._mirror.wait(min(patience, MIRROR_PATIENCE)):
            self._warn(f"{self._mirror.url} does not have the checkpoint of step {self.step}")

    def _work(self):
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._latest is not None)
                state = self._latest
            try:
                save(self.folder, state)
            except Exception as error:
                if self.error is None:
                    self._warn(f"{error}; training goes on, and this is tried again")
                self.error = error
                with self._changed:
                    self._changed.wait_for(lambda: self._latest is not state, RETRY_SECONDS)  # noqa: B023
                continue
            if self.error is not None:
                self._warn(f"checkpoints are written to {self.folder} again")
                self.error = None
            if self._mirror:
                self._mirror.offer(self.folder / LAST, state["step"])
            with self._changed:
                if self._latest is state:
                    self._latest = None
                    self._changed.notify_all()


def wait_until(condition, done, patience):
    """Wait for `done()` on a threading.Condition, `patience` seconds or as long as a requested stop allows."""
    give_up = time.monotonic() + patience
    with condition:
        while not done():
            left = min(give_up - time.monotonic(), interruption.seconds_left() - STOP_MARGIN)
            if left <= 0:
                return False
            condition.wait(min(0.2, left))
    return True
