"""The data proved before the money: does a published network recognise your pictures as often as it should?

    python tools/check_data.py --data /data/betons
    python tools/check_data.py --data /data/betons --images all --json check.json
    python tools/check_data.py --data /data/betons --weights resnet50-0676ba61.pth

Evaluates published weights on a sample of val with a run's own evaluation, and on one of train. Where they are not as
right as they are known to be, it names the likely cause: labels in another order, classes exchanged or mixed, channels
exchanged, another normalisation, turned, small, damaged or blank pictures. docs/check_data.md has more. Further
arguments are settings, as train_imagenet.py takes them. Exit status 0: as published, or nothing found where nothing is
known; 1: not.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torchvision import models
from tqdm import tqdm

from rn50 import recipe
from rn50.augment import IMAGENET_MEAN, IMAGENET_STD, normalize
from rn50.command import run
from rn50.config import whole
from rn50.data import diagnosis, loaders
from rn50.data.imagenet import CLASSES
from rn50.errors import RunError, UsageError
from rn50.evaluate import evaluate
from rn50.files import expanded, file_of_run, write_result
from rn50.help import HelpFormatter
from rn50.machine import commit, cores
from rn50.metrics import renamed_classes
from rn50.planning import budget
from rn50.precision import autocast_dtype
from rn50.publishing import pretrained
from rn50.training import distributed
from rn50.training.checkpoint import LAST
from rn50.training.session import check, prices

CONFIG = Path(__file__).resolve().parents[1] / "rn50_configs/rn50_78.yaml"
# Pictures that are also read in other ways, where the figure is not as published.
READ_AGAIN = 512
# Grey levels that JPEG leaves between pixels of one colour.
BLANK = 3
COLOURS, NORMALISATION, ORIENTATION = "channels", "normalisation", "orientation"


def main():
    args, settings = arguments()
    cfg = recipe.load("", [f"--config-file={args.config}", f"--data.dir={args.data}", *settings])
    check(cfg)
    rungs = {split: loaders.find_rungs(cfg.data.dir, split) for split in ("val", "train") if split in args.images}
    device, _, _ = distributed.setup(cfg.training.device)
    weights = load_weights(args, cfg.model.arch)
    classes = Classes(weights, rungs)
    if args.expect is None and classes.count < weights.outputs:
        weights.top1 = None  # among fewer classes, more pictures are right than was published
    print(introduction(weights, device), flush=True)
    splits = [Split(name, rungs[name], weights, classes, cfg, device) for name in rungs]
    causes = [found for ladder in rungs.values() for side, info in ladder.items()
              for found in diagnosis.file_causes(info, side)]  # fmt: skip
    try:
        for split in splits:
            split.evaluate(args.images[split.name])
            print(measured(split, price=budget.price(**prices(cfg))), flush=True)
        look_closer(splits)
        for split in splits:
            causes += examine(split, splits, weights)
    except RunError as error:
        if "is corrupt" not in str(error):
            raise
        causes.append(diagnosis.cause("damaged", str(error)))
    conclude(args, weights, splits, causes)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--data", required=True, type=expanded, help="folder of the .beton files")
    parser.add_argument("--config", type=expanded, default=CONFIG, help="the recipe's YAML (default: rn50_78.yaml)")
    parser.add_argument(
        "--weights",
        type=expanded,
        help="a file, the folder of an export or a run, or torchvision's name (default: torchvision's of the recipe's "
        "model.arch)",
    )
    parser.add_argument("--expect", type=float, metavar="TOP1", help="what is published of the weights, in %%")
    parser.add_argument(
        "--images", type=count, default=5000, metavar="N", help="how many of val, or all (default: 5000)"
    )
    parser.add_argument(
        "--train-images", type=count, default=5000, metavar="N", help="how many of train, 0, or all (default: 5000)"
    )
    parser.add_argument("--resolution", type=int, help="px to evaluate at (default: what the weights say, or 224)")
    parser.add_argument("--crop-ratio", type=float, help="crop over short side (default: as the weights say, or 0.875)")
    parser.add_argument("--json", type=expanded, metavar="FILE", help="also write the result as JSON")
    args, settings = parser.parse_known_args()
    if args.images < 1:
        raise UsageError("--images must be at least 1")
    args.images = {"val": args.images} | ({"train": args.train_images} if args.train_images else {})
    if args.expect is not None and not 1 < args.expect <= 100:
        raise UsageError(f"--expect {args.expect:g}: top-1 in % is asked for, such as 76.13")
    if args.resolution is not None and args.resolution < 16:
        raise UsageError("--resolution must be at least 16")
    if args.crop_ratio is not None and not 0.1 <= args.crop_ratio <= 1:
        raise UsageError("--crop-ratio must be 0.1 to 1")
    return args, settings


def count(text):
    try:
        return sys.maxsize if text == "all" else whole(0).check(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor all") from None


def load_weights(args, arch):
    given = args.weights or pretrained.default_name(arch)
    last = file_of_run(given, LAST)
    weights = pretrained.load(str(last) if last.is_file() else given)
    weights.resolution = args.resolution or weights.resolution
    weights.crop_ratio = args.crop_ratio or weights.crop_ratio
    if args.expect is not None:
        weights.top1, weights.top1_of = args.expect, "expected"
    elif args.resolution or args.crop_ratio:
        weights.top1 = None  # that figure is of another evaluation
    return weights


class Classes:
    """What label and output have to do with each other, and what a class is called by the data and by the network.

    columns: the network's output of each label, int64 [count]. names: what the network calls each of them.
    """

    def __init__(self, weights, rungs):
        info = largest(rungs["val"])
        for other in rungs.values():
            if largest(other).num_classes != info.num_classes:  # of files with manifests, find_rungs says it
                raise RunError(f"{info.path} has {info.num_classes} classes, {largest(other).path} others")
        known = weights.classes
        if known is None and weights.outputs == CLASSES:
            categories = models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
            known = [{"name": name} for name in categories]
        self.count, self._data = info.num_classes, info.classes
        self.columns, matched = diagnosis.columns(info.classes, self.count, outputs=weights.outputs, known=known)
        own = [c["name"] for c in info.classes] if info.classes else [str(k) for k in range(self.count)]
        self.names = [known[k]["name"] for k in self.columns] if known else own
        self._same_names = matched or not known

    def describe(self, label):
        """A class for a person, as the data calls it."""
        if self._data is None:
            return f"class {label}"
        wnid, name = self._data[label]["wnid"], self._data[label]["name"]
        return name if name == wnid else f"{wnid} {name}"

    def called(self, label):
        """The same, as the network calls it."""
        return self.describe(label) if self._same_names else self.names[label]


class Shown(nn.Module):
    """`network` for rn50.evaluate: takes what training shows, gives the labels' outputs, and keeps its answers."""

    def __init__(self, network, weights, columns):
        super().__init__()
        self.network, self.answers = network, []
        self.mean, self.std = weights.mean, weights.std
        self.register_buffer("columns", torch.from_numpy(columns))

    def forward(self, pixels):
        if (self.mean, self.std) != (IMAGENET_MEAN, IMAGENET_STD):
            device = pixels.device
            stored = pixels * torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)
            stored = stored + torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1)
            pixels = normalize(stored, mean=self.mean, std=self.std)
        outputs = self.network(pixels)[:, self.columns]
        self.answers.append(outputs.argmax(1))
        return outputs


class Split:
    """One split's file, how it is read, and what the network has answered so far.

    samples: numbers of the images that were looked at, int64 [n]; answers: labels, int64 [n]; constant, grey: bool [n];
    keys: a bytes object for each. figures: rn50.evaluate's of the first sample; verdict: diagnosis.verdict's.
    """

    def __init__(self, name, rungs, weights, classes, cfg, device):
        self.name, self.weights, self.classes, self.device = name, weights, classes, device
        px, crop_ratio = weights.resolution, weights.crop_ratio
        # where all are too small, size_causes says so
        self.info = rungs[loaders.validation_rung(rungs, px, crop_ratio, warn=lambda text: None)]
        self.loader = loaders.evaluation_loader(
            self.info,
            batch_size=cfg.validation.batch_size,
            crop_ratio=crop_ratio,
            device=device,
            workers=cfg.data.workers or cores(),
            timeout=60 * cfg.data.timeout_minutes,
        )
        # the recipes' fp16 is for GPUs
        precision = autocast_dtype(cfg.training.precision if device.type == "cuda" else "auto", device)
        enabled = precision != torch.float32
        self.autocast = partial(torch.autocast, device.type, dtype=precision, enabled=enabled)
        shown = Shown(weights.network, weights, classes.columns)
        self.shown = shown.to(device, memory_format=torch.channels_last).eval()
        self.samples = self.answers = np.empty(0, np.int64)
        self.constant = self.grey = np.empty(0, bool)
        self.keys, self.figures, self.verdict, self.seconds = [], None, None, 0.0

    def evaluate(self, images):
        """Look at a sample of up to `images`, of every class the same share."""
        started = time.monotonic()
        self.figures = self.look(diagnosis.sample(self.info.labels, images))
        self.seconds = time.monotonic() - started

    def look(self, samples):
        """rn50.evaluate's figures of `samples`; what was answered is kept."""
        self.shown.answers.clear()
        with self.loader.batches(samples, self.weights.resolution) as batches:
            figures = evaluate(
                self.shown,
                self._watched(batches, len(samples)),
                classes=self.classes.count,
                device=self.device,
                autocast=self.autocast,
            )
        self.samples = np.concatenate([self.samples, samples])
        self.answers = np.concatenate([self.answers, torch.cat(self.shown.answers).cpu().numpy()])
        return figures["single"]

    def counts(self):
        return diagnosis.confusion(self.info.labels[self.samples], self.answers, self.classes.count)

    def right(self, answers):
        """bool [n]: whether `answers` to the first n samples are their labels."""
        return answers == self.info.labels[self.samples[: len(answers)]]

    def _watched(self, batches, images):
        with tqdm(total=images, disable=not sys.stderr.isatty(), unit="img", desc=self.name, leave=False) as bar:
            for pixels, labels in batches:
                spread = pixels.amax((2, 3)).int() - pixels.amin((2, 3)).int()
                colours = (pixels[:, 1:].int() - pixels[:, :1].int()).abs().amax((1, 2, 3))
                small = functional.adaptive_avg_pool2d(pixels.float(), 4).round().byte().flatten(1)
                self.constant = np.concatenate([self.constant, (spread.amax(1) <= BLANK).cpu().numpy()])
                self.grey = np.concatenate([self.grey, (colours <= BLANK).cpu().numpy()])
                self.keys += [row.tobytes() for row in small.cpu().numpy()]
                yield pixels, labels
                bar.update(len(labels))


def largest(rungs):
    return rungs[max(rungs)]


def look_closer(splits):
    """More images of the classes that are suspect in any split, from all splits."""
    labels = np.unique(np.concatenate([diagnosis.suspects(split.counts()) for split in splits]))
    for split in splits:
        more = diagnosis.more_of(split.info.labels, labels, without=split.samples)
        if len(more):
            split.look(more)


def examine(split, splits, weights):
    """Judge `split`, and return what may be the cause: a list of diagnosis.cause."""
    # what it has learned from, a network recognises at least as often as what it has not
    learned = split.name == "train"
    published = splits[0].figures["top1_low"] if learned and weights.top1 is None else weights.top1
    split.verdict = diagnosis.verdict(split.figures, published, at_least=learned)
    counts, classes, name = split.counts(), split.classes, split.name
    words = {"split": name, "describe": classes.describe, "called": classes.called}
    causes = diagnosis.pixel_causes(split.samples, split.constant, split.grey, split.keys, name)
    causes += diagnosis.size_causes(split.info, weights.resolution, weights.crop_ratio)
    if split.verdict == "above":
        text = f"{name}: more pictures are right than may be: the weights may have been trained on them"
        causes.append(diagnosis.cause("training pictures", text))
    judged = split.verdict in ("below", "unknown")
    reading = read_again(split, weights) if judged else None
    permuted = diagnosis.order_cause(counts, classes.names, **words)
    # wrong pixels may look like other labels; right ones under other labels are no better for being read otherwise
    if reading and not (permuted and permuted["top1"] > reading["top1"] + diagnosis.TOLERANCE):
        return [reading, *causes]
    if permuted:
        return [permuted, *causes]
    other = next((other.counts() for other in splits if other is not split), None)
    renamed = renamed_classes(torch.from_numpy(counts))
    causes += diagnosis.class_causes(counts, renamed, other=other, learned=learned, **words)
    if judged and not any(found["certain"] for found in causes):
        causes = diagnosis.guessing_causes(split.figures, classes.count, split=name) + causes
    return causes


def read_again(split, weights):
    """diagnosis.reading_cause of the first pictures of the sample."""
    samples, readings = split.samples[:READ_AGAIN], other_readings(weights)
    answers = {reading: [] for reading in readings}
    network = split.shown.network
    with torch.inference_mode(), split.autocast(), split.loader.batches(samples, weights.resolution) as batches:
        for images, _ in batches:
            for reading, change in readings.items():
                outputs = network(change(images))[:, split.shown.columns]
                answers[reading].append(outputs.argmax(1).cpu())
    right = split.right(split.answers[: len(samples)])
    others = {reading: split.right(torch.cat(found).numpy()) for reading, found in answers.items()}
    return diagnosis.reading_cause(right, others, split=split.name)


def other_readings(weights):
    """{(cause, text): a function of uint8 images [n, 3, px, px] that returns what the network is shown}."""
    own = partial(normalize, mean=weights.mean, std=weights.std)
    other = {
        "pixels of 0 to 1": ((0.0,) * 3, (255.0,) * 3),
        "pixels of -1 to 1 (mean and standard deviation 0.5)": ((127.5,) * 3, (127.5,) * 3),
        "pixels of 0 to 255": ((0.0,) * 3, (1.0,) * 3),
        "pixels of 0 to 255 less the mean": (IMAGENET_MEAN, (1.0,) * 3),
        "ImageNet's mean and standard deviation": (IMAGENET_MEAN, IMAGENET_STD),
    }
    readings = {(COLOURS, "red and blue are exchanged, as by OpenCV's BGR"): lambda images: own(images.flip(1))}
    for text, (mean, std) in other.items():
        if (mean, std) != (weights.mean, weights.std):
            text = f"the weights were trained with another normalisation, {text}"
            readings[NORMALISATION, text] = partial(normalize, mean=mean, std=std)
    turns = {1: "lie on their right side", 2: "stand on their heads", 3: "lie on their left side"}
    for quarters, text in turns.items():
        readings[ORIENTATION, f"the pictures {text}"] = partial(_turned, own, quarters)
    return readings


def _turned(own, quarters, images):
    return own(torch.rot90(images, quarters, (2, 3)))


# --- What is said ----------------------------------------------------------------------------------------------------


def introduction(weights, device):
    known = "no figure is known of them" if weights.top1 is None else f"top-1 {weights.top1:.2f} % {weights.top1_of}"
    return (
        f"{weights.arch} on {device}: {weights.name} ({known}), at {weights.resolution} px of "
        f"{round(weights.resolution / weights.crop_ratio)}"
    )


def measured(split, *, price):
    """What the sample gave. price: dollars an hour, or None."""
    row, total, seen = split.figures, split.info.num_samples, len(split.samples)
    text = (
        f"{Path(split.info.path).name}: top-1 {row['top1']:.2f} % measured (95 %: {row['top1_low']:.2f} to "
        f"{row['top1_high']:.2f}), top-5 {row['top5']:.2f} %; {seen} of {total} images in {split.seconds:.1f} s"
    )
    if seen < total:
        seconds = split.seconds * total / seen
        cost = "" if price is None else f", {100 * price * seconds / 3600:.1f} cents"
        text += f" (all of them, projected: {seconds / 60:.1f} min{cost})"
    return text


def conclude(args, weights, splits, causes):
    """Say what was found, write it to --json, and raise RunError where the data is not as it should be."""
    wrong = any(split.verdict in ("below", "above") for split in splits)
    likely = [found for found in causes if found["certain"] or wrong]
    failed = wrong or bool(likely)
    for found in causes:
        print(f"{'likely cause' if found in likely else 'note'}: {found['text']}")
    if args.json:
        write_result(args.json, json.dumps(report(weights, splits, likely, failed), indent=1) + "\n")
    said = headline(weights, splits[0].figures)
    if failed:
        names = ", ".join(dict.fromkeys(found["cause"] for found in likely)) or "none was found"
        raise RunError(f"the data in {args.data} is not as it should be: top-1 {said}; likely cause: {names}")
    nothing = "nothing found, and no figure to compare with (--expect gives one)"
    print(f"{nothing if weights.top1 is None else 'ok'}: {said}")


def headline(weights, figures):
    if figures is None:
        return "not measured"
    known = "" if weights.top1 is None else f"{weights.top1:.2f} % {weights.top1_of}, "
    low, high = figures["top1_low"], figures["top1_high"]
    return f"{figures['top1']:.2f} % ({known}95 % interval {low:.2f} to {high:.2f})"


def report(weights, splits, likely, failed):
    return {
        "made_by": "tools/check_data.py",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "weights": weights.name,
        "arch": weights.arch,
        "top1": weights.top1,
        "top1_of": weights.top1_of,
        "resolution": weights.resolution,
        "crop_ratio": weights.crop_ratio,
        "splits": {
            split.name: {"file": split.info.path, "verdict": split.verdict, "seconds": round(split.seconds, 2)}
            | {"figures": split.figures}
            for split in splits
        },
        "causes": [{"cause": found["cause"], "text": found["text"]} for found in likely],
        "ok": not failed,
    }


if __name__ == "__main__":
    run(main)
