"""Learning rate, resolution and stored size as pure functions of progress: nothing to save, nothing to restore."""

import math

# A stored image's short side over the resolution of the crops that are trained on. At 2.0 at most 16 % of the crops of
# 4:3 images have fewer pixels than what is made of them: 13 % at 176 px from 500, as in the published runs, where 400
# would leave 26 %, and 11 % at 88 px from 256 (measured: tests/data/test_loaders.py).
TRAINING_MARGIN = 2.0


def peak_learning_rate(*, lr_per_256, batch_size):
    """The linear scaling rule (Goyal et al. 2017, arXiv 1706.02677): `batch_size` is images per optimizer step."""
    return lr_per_256 * batch_size / 256


def learning_rate(
    epoch, *, peak, epochs, schedule, warmup_epochs=0.0, warmup_start=0.0, step_epochs=(), step_gamma=0.1
):
    """Learning rate at `epoch`, a float in [0, epochs]: 2.5 is half-way through the third epoch.

    The warm-up rises linearly from `warmup_start * peak` to `peak` in `warmup_epochs`. After it `linear` and
    `cosine` fall to zero at `epochs`, and `step` multiplies by `step_gamma` at each of `step_epochs`.
    """
    if epoch < warmup_epochs:
        return peak * (warmup_start + (1 - warmup_start) * epoch / warmup_epochs)
    if schedule == "step":
        return peak * step_gamma ** sum(epoch >= boundary for boundary in step_epochs)
    left = max(0.0, 1 - (epoch - warmup_epochs) / (epochs - warmup_epochs))
    return peak * (left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)


def resolution(epoch, *, start, end, start_ramp, end_ramp, multiple):
    """Side of the training crops in `epoch` (a whole number from 0), in pixels.

    `start` until `start_ramp`, `end` from `end_ramp` on, linear between and rounded to `multiple`
    (ffcv-imagenet's rule; the two ends are taken as they are).
    """
    if epoch <= start_ramp:
        return start
    if epoch >= end_ramp:
        return end
    exact = start + (end - start) * (epoch - start_ramp) / (end_ramp - start_ramp)
    return int(round(exact / multiple)) * multiple


def rung(resolution, short_sides):
    """The side to train `resolution`-px crops from: the smallest that leaves TRAINING_MARGIN, else the largest.

    short_sides: {max side of the stored images: their median short side}, both in pixels.
    """
    return next(
        (side for side in sorted(short_sides) if short_sides[side] >= TRAINING_MARGIN * resolution), max(short_sides)
    )
