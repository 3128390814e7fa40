"""What final top-1 a run is heading for, and whether something looks wrong: from its log and config, early.

The reference: FFCV's six published runs of one recipe at six lengths (ffcv_curves.csv), one run each. Knowing the
length is all there is to know of a run that is on track: final top-1 as a parabola in ln(epochs) through the other
five lengths is off by 0.07 points on average, and no use of the curves made that smaller. So a run on track is forecast
from its length, and the curves only say whether it is. Causes that can be read from log and config are named for every
run; whether a curve is as it should be is said only where the recipe is the reference's.
"""

import csv
import math
from functools import cache
from pathlib import Path
from statistics import fmean, median

import numpy as np

from rn50 import schedules
from rn50.metrics import wilson_interval
from rn50.planning.top1 import curve

CURVES = Path(__file__).with_name("ffcv_curves.csv")
EVALUATION = "256 px, averaged with the mirror image"
# What a run must have in common with the reference to be compared with its curves. Keys of the config's sections.
REFERENCE = {
    "model": {"arch": "resnet50", "blurpool": True, "blur_maxpool": False, "ema_half_life": 0},
    "training": {"loss": "cross_entropy", "label_smoothing": 0.1, "momentum": 0.9, "nesterov": False},
    "lr": {"schedule": "linear"},
    "resolution": {"start": 160, "end": 192},
}
LENGTHS = (12, 120)
CLASSES = 1000
# Peak per 256 images and weight decay of published ImageNet recipes from scratch: FFCV 0.106, classic 0.1, Mild 0.256.
LR_PER_256, WEIGHT_DECAY = (0.05, 0.5), (2e-5, 3e-4)
# Of other data, wider, around CIFAR's 0.2 and 1e-4 to 5e-4 (He et al. 2016; Zagoruyko and Komodakis 2016).
OTHER_LR_PER_256, OTHER_WEIGHT_DECAY = (0.02, 1.0), (0.0, 2e-3)
# Evaluation over last training resolution: FFCV 256 / 192, Mild 224 / 176, classic 224 / 224.
EVALUATION_SCALE = (0.95, 1.5)
# The curves are compared from epoch 3, where the warm-up is over, up to where resolution begins to rise.
FIRST_EPOCH, LAST_PROGRESS = 3, 0.68
# By then a run that learns is better than guessing: one on Imagenette whose lr still rose had 99.5 % of the loss of
# guessing after 294 steps and 84 % after 441 (studies/imagenette_cpu).
LEARNING_STEPS, LEARNING_LOSS = 400, 0.99
# Chosen on the published runs and 36 simulated from them; studies/forecast says how many of these they flag.
LOSS_ALARM, TOP1_ALARM, TOP1_EPOCHS = 0.12, -4.0, 5
# The largest error of a forecast for one of the six runs from the other five, in points (studies/forecast).
SPREAD = 0.19


def read_curves(path=CURVES):
    """{epochs: [{epoch (from 0), top1 (%), train_loss, lr, elapsed_seconds}]} of the published runs."""
    curves = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            curves.setdefault(int(row["epochs"]), []).append(
                {
                    "epoch": int(row["epoch"]),
                    "top1": 100 * float(row["top1"]),
                    "train_loss": float(row["train_loss"]),
                    "lr": float(row["lr_at_epoch_end"]),
                    "elapsed_seconds": float(row["elapsed_seconds"]),
                }
            )
    return curves


class Reference:
    """What some of the published curves say of a run's final top-1 and of its loss and top-1 on the way."""

    def __init__(self, curves):
        # function of epochs: in %, of a run of this length that is on track
        self.final_top1 = curve({epochs: rows[-1]["top1"] for epochs, rows in curves.items()})
        points = [(epochs, row) for epochs, rows in curves.items() for row in rows if comparable(row["epoch"], epochs)]
        shapes = np.stack([_shape(epochs, row["epoch"] + 1) for epochs, row in points])
        self._fit = {
            key: np.linalg.lstsq(shapes, np.array([row[key] for _, row in points]), rcond=None)[0]
            for key in ("train_loss", "top1")
        }

    def residual(self, key, epochs, row):
        """`row`'s train_loss or top1 minus what a run of this length has after this epoch."""
        return row[key] - float(_shape(epochs, row["epoch"] + 1) @ self._fit[key])


def comparable(epoch, epochs):
    return epoch + 1 >= FIRST_EPOCH and (epoch + 1) / epochs <= LAST_PROGRESS


def _shape(epochs, done):
    left = 1 - done / epochs  # the learning rate, as a share of its peak
    return np.array([1, 1 / done, 1 / done**2, math.log(epochs), left, left / done])


@cache
def reference(without=None):
    return Reference({epochs: rows for epochs, rows in read_curves().items() if epochs != without})


def no_basis(config, *, classes):
    """Why a run of this config (nested dict) is not comparable with the published curves, or None."""
    for section, keys in REFERENCE.items():
        for key, value in keys.items():
            if config[section].get(key) != value:
                return f"{section}.{key} is {config[section].get(key)}, not {value} as in the published runs"
    epochs = config["training"]["epochs"]
    if not LENGTHS[0] <= epochs <= LENGTHS[1]:
        return f"training.epochs={epochs} is far from the 16 to 88 of the published runs"
    if classes != CLASSES:
        return f"the data has {classes} classes, not ImageNet's {CLASSES}"
    return None


def forecast(rows, config, *, classes, names=None, curves=None):
    """{top1, spread, evaluation, basis, warnings} after the epochs in `rows` of log.jsonl.

    config: the run's, a nested dict as in config.yaml, because most of it matters. top1: expected at the end, in %,
    under `evaluation`; None where there is no basis, a warning among the reasons, and `basis` says why. spread: see
    SPREAD; six runs cannot say how often it holds. warnings: [{cause, text}]. names: of the classes. curves: a
    Reference; None: of all published runs.
    """
    curves = curves or reference()
    warnings = learning_rate_warnings(rows, config) + config_warnings(config, imagenet=classes == CLASSES)
    warnings += label_warnings(rows, names) or learning_warnings(rows, config, classes=classes)
    reason = no_basis(config, classes=classes)
    if reason is None:
        warnings = warnings or curve_warnings(rows, config, curves)
        if warnings:
            reason = f"not as in the published runs: {warnings[0]['cause']}"
    if reason is not None:
        return {"top1": None, "spread": None, "evaluation": None, "basis": f"no basis: {reason}", "warnings": warnings}
    return {
        "top1": round(curves.final_top1(config["training"]["epochs"]), 2),
        "spread": SPREAD,
        "evaluation": EVALUATION,
        "basis": "FFCV's runs",
        "warnings": [],
    }


def levels(rows, epochs, curves):
    """(mean residual of the newest training losses, median residual of top-1 so far); None where too few are known."""
    usable = [row for row in rows if comparable(row["epoch"], epochs)]
    losses = [curves.residual("train_loss", epochs, row) for row in usable]
    # one epoch at a high learning rate may be off by 30 points, but not most of them
    top1 = [curves.residual("top1", epochs, row) for row in usable if row.get("top1") is not None]
    return (
        fmean(losses[-max(3, round(0.1 * epochs)) :]) if losses else None,
        median(top1) if len(top1) >= TOP1_EPOCHS else None,
    )


def curve_warnings(rows, config, curves):
    """What in the curves of loss and top-1 is unlike the published ones; for a config like theirs alone."""
    loss, top1 = levels(rows, config["training"]["epochs"], curves)
    validation = config["validation"]
    same_view = (validation["headline_resolution"], validation["headline_view"]) == (256, "flip")
    if loss is not None and loss > LOSS_ALARM:
        text = f"training loss is {loss:.2f} above the published runs': learning rate, weight decay or augmentation"
        return [{"cause": "training", "text": text}]
    if same_view and top1 is not None and top1 < TOP1_ALARM:
        text = (
            f"top-1 is {-top1:.0f} points below the published runs' while the training loss is as theirs: labels of "
            "training and validation differ, or the evaluation is not what it should be"
        )
        return [{"cause": "labels or evaluation", "text": text}]
    return []


def config_warnings(config, *, imagenet):
    """What in the config is unlike every published recipe from scratch, for ImageNet or for smaller sets."""
    found = []
    rates, decays = (LR_PER_256, WEIGHT_DECAY) if imagenet else (OTHER_LR_PER_256, OTHER_WEIGHT_DECAY)

    def outside(value, limits, cause, text):
        if not limits[0] <= value <= limits[1]:
            found.append({"cause": cause, "text": f"{text}; published recipes have {limits[0]:g} to {limits[1]:g}"})

    peak, decay, validation = config["lr"]["lr_per_256"], config["training"]["weight_decay"], config["validation"]
    outside(peak, rates, "learning rate", f"lr.lr_per_256={peak:g}: is it scaled to the batch already?")
    outside(decay, decays, "weight decay", f"training.weight_decay={decay:g}")
    scale = validation["headline_resolution"] / config["resolution"]["end"]
    text = f"evaluation at {validation['headline_resolution']} px is {scale:.2f} times the last training resolution"
    outside(scale, EVALUATION_SCALE, "evaluation resolution", text)
    return found


def label_warnings(rows, names):
    """Classes that the newest evaluation found under other names (rn50.metrics.renamed_classes)."""
    evaluated = [row for row in rows if row.get("top1") is not None]
    pairs = evaluated[-1].get("renamed", []) if evaluated else []
    if not pairs:
        return []
    said = [" as ".join(str(names[label] if names else label) for label in pair) for pair in pairs[:4]]
    text = (
        f"{len(pairs)} class{'es are' if pairs[1:] else ' is'} recognised under another name ({', '.join(said)}"
        f"{', ...' if pairs[4:] else ''}): the training images have other labels than the validation images"
    )
    return [{"cause": "labels", "text": text}]


def learning_warnings(rows, config, *, classes):
    """Loss or top-1 still those of guessing when any recipe's, on any data, are better."""
    warmup = config["lr"].get("warmup_epochs", 0)
    late = [row for row in rows if row["step"] >= LEARNING_STEPS and row["epoch"] + 1 >= max(FIRST_EPOCH, warmup + 1)]
    if not late or classes < 2:
        return []
    loss, guessing = late[-1]["train_loss"], guessing_loss(config["training"]["loss"], classes)
    if loss > LEARNING_LOSS * guessing:
        text = f"after {late[-1]['step']} steps the training loss, {loss:.3f}, is that of guessing ({guessing:.3f})"
        return [{"cause": "training", "text": f"{text}: labels without relation to the images, or lr far too high"}]
    evaluated = [row for row in late if row.get("top1") is not None and row.get("images")]
    if evaluated:
        top1, images = evaluated[-1]["top1"], evaluated[-1]["images"]
        if wilson_interval(top1 / 100 * images, images)[0] <= 1 / classes:
            text = f"top-1, {top1:.2f} %, is no better than guessing, while the training loss, {loss:.3f}, is"
            text += ": validation labels in another order, or an evaluation that is not what it should be"
            return [{"cause": "labels or evaluation", "text": text}]
    return []


def guessing_loss(loss, classes):
    """The smallest mean loss without a look at the images: that of giving each of `classes` its share, 1 / classes.

    Smoothed labels have the same mean, hence the same loss. loss: training.loss, bce being summed over the classes.
    """
    if loss == "cross_entropy":
        return math.log(classes)
    return math.log(classes) + (classes - 1) * math.log(classes / (classes - 1))


def learning_rate_warnings(rows, config):
    """What the log's learning rates say: a warm restart, another schedule than the config's, an end above zero."""
    epochs, lr = config["training"]["epochs"], config["lr"]
    peak = schedules.peak_learning_rate(lr_per_256=lr["lr_per_256"], batch_size=config["training"]["batch_size"])
    shape = {key: value for key, value in lr.items() if key != "lr_per_256"}

    def planned(epoch):
        return schedules.learning_rate(epoch, peak=peak, epochs=epochs, **shape)

    logged = [row for row in rows if row.get("lr") is not None and row["epoch"] + 1 > lr.get("warmup_epochs", 0)]
    for before, after in zip(logged, logged[1:], strict=False):
        if before["epoch"] >= lr.get("warmup_epochs", 0) and after["lr"] > 1.02 * before["lr"]:
            text = f"the learning rate rose from {before['lr']:.4g} to {after['lr']:.4g} in epoch {after['epoch'] + 1}"
            return [{"cause": "warm restart", "text": text}]
    for row in logged:
        steps = row["step"] / (row["epoch"] + 1)
        expected = planned(row["epoch"] + (steps - 1) / steps)
        if abs(row["lr"] - expected) > 0.02 * peak:
            factor = row["lr"] / expected if expected else math.inf
            text = f"the learning rate of epoch {row['epoch'] + 1} is {row['lr']:.4g}, the config's is {expected:.4g}"
            late = row["epoch"] + 1 > lr.get("warmup_epochs", 0) + 1
            cause = "learning rate schedule" if late and 0.5 < factor < 2 else "learning rate"
            return [{"cause": cause, "text": text}]
    if planned(epochs - 1e-3) > 0.05 * peak:
        text = f"the learning rate ends at {planned(epochs - 1e-3):.4g}, not at zero"
        return [{"cause": "schedule end", "text": text}]
    return []
