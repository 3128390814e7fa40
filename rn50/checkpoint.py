"""Checkpoints that are whole or not there: tensors and plain values, written aside, synced, renamed."""

import os
from pathlib import Path

import torch

from rn50.errors import RunError

FORMAT = 1
LAST, PREVIOUS = "last.pt", "previous.pt"


def save(folder, state):
    """Write `state` as folder/last.pt; what was last.pt becomes previous.pt once the new file reads back.

    A crash at any moment leaves at least one complete file under those two names. Raises RunError when the
    disk does not take it; the files that were there stay.
    """
    folder = Path(folder)
    partial = folder / "last.pt.partial"
    try:
        with open(partial, "wb") as file:
            torch.save({**state, "format": FORMAT}, file)
            file.flush()
            os.fsync(file.fileno())
        load(partial)
        if (folder / LAST).exists():
            os.replace(folder / LAST, folder / PREVIOUS)
        os.replace(partial, folder / LAST)
        _sync(folder)
    # torch.save turns a full disk into a RuntimeError of its zip writer
    except (OSError, RuntimeError, RunError) as error:
        partial.unlink(missing_ok=True)
        raise RunError(f"cannot write a checkpoint to {folder}: {error}; make room and repeat the command") from error


def load(path):
    """The state in one checkpoint file, on the CPU. Raises RunError if it is missing, damaged or of another format."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"no checkpoint at {path}") from None
    except Exception as error:  # a damaged zip raises almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"checkpoint {path} cannot be read ({reason})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise RunError(f"{path} is not a checkpoint of format {FORMAT}; it is from another version or program")
    return state


def newest(folder, *, warn):
    """The state to resume from: last.pt, else previous.pt with a `warn`ing, else None when there is neither."""
    candidates = [path for path in (Path(folder) / LAST, Path(folder) / PREVIOUS) if path.exists()]
    for path in candidates:
        try:
            return load(path)
        except RunError as error:
            warn(f"{error}; trying the one before it")
    if candidates:
        raise RunError(f"no checkpoint in {folder} can be read; move the folder away to start anew")
    return None


def _sync(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
