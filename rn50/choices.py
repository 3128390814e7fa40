"""Settings that compute the same at another speed: precision, torch.compile. Which is fastest depends on the GPU."""

import copy
import gc
import itertools
import statistics
import time

import numpy as np
import torch

from rn50 import recipe
from rn50.errors import RunError
from rn50.learner import COMPILE_ERRORS, Learner
from rn50.precision import DTYPES, autocast_dtype, precisions

# How often the speed of a choice is taken; how much faster than the recipe's own settings another must be.
LAPS, WORTH_IT = 5, 0.02
# Every size is compiled for itself, so the ramp takes steps of so many px where that leaves its two ends as they are.
COMPILED_MULTIPLE = 8
RATE = 1e-4  # what is learned does not count


def settings(cfg, device):
    """Dicts {section.key: value} to measure against each other, the recipe's own first."""
    training, resolution = cfg.training, cfg.resolution
    own = next(name for name, dtype in DTYPES.items() if dtype == autocast_dtype(training.precision, device))
    found = [_settings(own, training.compile, resolution.multiple)]
    ends_stay = not (resolution.start % COMPILED_MULTIPLE or resolution.end % COMPILED_MULTIPLE)
    coarser = max(resolution.multiple, COMPILED_MULTIPLE) if ends_stay and not training.compile else resolution.multiple
    for precision in precisions(device):
        found += [_settings(precision, False, resolution.multiple), _settings(precision, True, coarser)]
    return [one for number, one in enumerate(found) if one not in found[:number]]


def with_settings(cfg, chosen):
    """A copy of `cfg` with the settings {section.key: value}."""
    cfg = copy.deepcopy(cfg)
    for name, value in chosen.items():
        section, key = name.split(".")
        setattr(getattr(cfg, section), key, value)
    return cfg


def heaviest(cfg):
    """The resolution, in px, at which the recipe has most of its work."""
    sides = recipe.resolutions(cfg)
    return max(sorted(set(sides)), key=lambda px: sides.count(px) * px**2)


def measure(cfg, chosen, *, classes, images, device, px, micro_batch, seconds):
    """What a run with the settings `chosen` would take, by its step alone, on noise: a dict.

    classes: of the network. images: of an epoch. seconds: that the measurement takes, after as many as the first step.

    settings, resolution (px); images_per_second at it, the median of LAPS laps; sizes of the whole recipe;
    compile_seconds of one (the first step's; 0 without torch.compile); hours of all epochs and sizes where the loader
    keeps up, the work growing with the number of pixels; failed: why there are no such figures, or None.
    """
    row = {"settings": chosen, "resolution": px, "failed": None}
    cfg = with_settings(cfg, chosen)
    try:
        learner = Learner(cfg, classes=classes, device=device)
        rate, first = _step_rate(learner, max(1, cfg.training.batch_size // micro_batch), px, micro_batch, seconds)
    except torch.OutOfMemoryError:
        row["failed"] = "does not fit the GPU's memory"
    except COMPILE_ERRORS as error:
        row["failed"] = str(error).strip().splitlines()[0][:200]
    else:
        compiling = first if cfg.training.compile else 0.0
        sides = recipe.resolutions(cfg)
        work = images * sum((side / px) ** 2 for side in sides)
        hours = (work / rate + compiling * len(set(sides))) / 3600
        row |= {"images_per_second": round(rate, 1), "sizes": len(set(sides))}
        row |= {"compile_seconds": round(compiling, 1), "hours": hours}
    learner = None
    gc.collect()
    torch.cuda.empty_cache()  # the next one needs it
    return row


def fastest(measured):
    """Of the rows of `measure`, the one with the fewest hours; the first, unless another is WORTH_IT faster.

    RunError where no row has figures.
    """
    own, able = measured[0], [row for row in measured if not row["failed"]]
    if not able:
        raise RunError(f"no training step can be made here: {own['failed']}")
    best = min(able, key=lambda row: row["hours"])
    return best if own["failed"] or best["hours"] < (1 - WORTH_IT) * own["hours"] else own


def _settings(precision, compiled, multiple):
    return {"training.precision": precision, "training.compile": compiled, "resolution.multiple": multiple}


def _step_rate(learner, accumulation, px, micro_batch, seconds):
    """(images/s, seconds of the first step)."""
    pixels = torch.randint(0, 256, (micro_batch, px, px, 3), dtype=torch.uint8)
    labels = torch.zeros(micro_batch, dtype=torch.int64, device=learner.device)
    batches = itertools.repeat((pixels.permute(0, 3, 1, 2).to(learner.device), labels, np.arange(micro_batch)))
    learner.train()

    def lap(at_least, step=0):
        """Seconds of optimizer step `step`, made again and again."""
        started, steps = time.perf_counter(), 0
        while not steps or time.perf_counter() - started < at_least:
            loss = learner.step(batches, accumulation=accumulation, learning_rate=RATE, epoch=0, step=step)
            steps += 1
        loss.item()  # waits for the GPU
        return (time.perf_counter() - started) / steps

    first = lap(0)
    lap(seconds / LAPS)
    mean, interval = statistics.median(lap(seconds / LAPS) for _ in range(LAPS)), learner.cfg.training.sam_interval
    if learner.climbs(interval - 1) and interval > 1:
        lap(0, interval - 1)
        mean += (lap(seconds / LAPS, interval - 1) - mean) / interval
    return accumulation * micro_batch / mean, first
