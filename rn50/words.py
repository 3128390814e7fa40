"""Quantities, moments and paths as people read them in a terminal."""

import math
import os
import time
from pathlib import Path


def duration(seconds):
    """`35 s`, `12 min` or `3.2 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def moment(seconds):
    """When `seconds` from now is: `in 12 min` within the hour, `Thu 08:40` within six days, else `12 Dec`."""
    minutes = math.ceil(seconds / 60)
    if minutes < 60:
        return f"in {max(1, minutes)} min"
    then = time.localtime(time.time() + seconds)
    return time.strftime("%a %H:%M" if seconds < 6 * 86400 else "%-d %b", then)


def counted(number, thing):
    """`1 epoch`, `1,000 classes`: `thing` is the singular."""
    plural = f"{thing}es" if thing.endswith("s") else f"{thing}s"
    return f"{number:,} {thing if number == 1 else plural}"


def from_here(path):
    """The Path `path` as it is typed in this folder, as text: relative where it is in it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
