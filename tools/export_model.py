"""A checkpoint as a folder that can be published: safetensors, ONNX, config.json, a model card and example pictures.

    python tools/export_model.py --checkpoint runs/rn50_78 --out model/
    python tools/export_model.py --checkpoint ... --out model/ --images IMAGENET --examples a.jpg b.jpg \\
        --examples-licence "CC BY 4.0, by Jane Doe"

Takes the EMA's weights where there are some. Classes, checksums and the images for checking come from the run's .beton
files. On validation images it fits what the probabilities are divided by, and below which the pages say that they are
unsure. It re-loads what it wrote and compares logits before it reports success; an 8-bit network takes the place of the
float one when it is within 0.3 points of it on the validation images (paired) and faster here; where it does not, the
page in a browser gets a network of its own, with weights in 8 bits. --images also compares the app with torchvision's
transforms and PyTorch on image files.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from rn50.augment import IMAGENET_MEAN, IMAGENET_STD, normalize
from rn50.command import run
from rn50.data import beton, writer
from rn50.data.pictures import decode_image
from rn50.data.sources import open_source
from rn50.errors import RunError, UsageError
from rn50.files import expanded, expanded_path, file_of_run, read_json
from rn50.machine import commit
from rn50.model import not_finite
from rn50.publishing import calibration, card, export, links
from rn50.training import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "app"))
import inference

# Largest difference of any logit between a network and its export, for logits of at most 10.
TOLERANCE = 1e-4
CHECKED, CALIBRATED = 64, 256
INT8_POINTS = 0.3
# The app and a plain PIL evaluation of the same files.
FILE_POINTS, FILE_LOGITS = 0.1, 1e-3


def main():
    args = arguments()
    args.checkpoint = str(file_of_run(args.checkpoint, checkpoint.LAST))
    refuse_foreign(args.out)
    state = checkpoint.load(args.checkpoint)
    which = args.weights or ("ema" if state["ema"] else "last")
    if which == "ema" and not state["ema"]:
        raise UsageError("--weights ema, but the run had no EMA (model.ema_half_life)")
    description = export.architecture(state)
    weights = state["ema"]["model"] if which == "ema" else state["model"]
    network = export.load_network(description, weights)
    if spoiled := not_finite(weights):
        raise RunError(f"{args.checkpoint} holds weights that are not finite ({spoiled}): there is nothing to export")
    data = Data(args.data or state["config"]["data"]["dir"])
    if len(data.classes) != description["num_classes"]:
        raise RunError(f"{data.folder} has {len(data.classes)} classes, the checkpoint {description['num_classes']}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{args.out.name}.", suffix=".partial", dir=args.out.parent))
    try:
        with writer.disk_errors(folder):
            config = write(folder, args, state, which, description, network, data)
            replace(args.out, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report(args.out, config)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=expanded_path, help="a run folder, or its last.pt")
    parser.add_argument(
        "--out", required=True, type=expanded_path, help="the folder to write; an earlier export is replaced"
    )
    parser.add_argument("--data", type=expanded, help="folder of the .beton files (default: the run's data.dir)")
    parser.add_argument("--weights", choices=("ema", "last"), help="default: ema where the run had it")
    parser.add_argument("--name", help="what the model is called (default: the run's name)")
    parser.add_argument("--dataset", help="what the images are called (default: by the classes)")
    parser.add_argument("--licence", default="mit", help="of the weights, as the Hub calls it (default: mit)")
    parser.add_argument(
        "--images", type=expanded_path, help="folder with val/<class>/<image>: also compare the app on files"
    )
    parser.add_argument("--max-images", type=int, default=5000, help="how many to compare on, evenly spaced")
    parser.add_argument(
        "--examples", nargs="+", type=expanded_path, default=[], metavar="IMAGE", help="pictures to offer"
    )
    parser.add_argument("--examples-licence", metavar="TEXT", help="of the example pictures, stated in the card")
    parser.add_argument("--no-int8", action="store_true", help="do not try a network that computes in 8 bits")
    args = parser.parse_args()
    if args.examples and not args.examples_licence:
        raise UsageError("--examples are published: say under what licence with --examples-licence TEXT")
    if not re.fullmatch(r"[a-z0-9.+-]+", args.licence):
        raise UsageError(f"--licence {args.licence}: the Hub's name is asked for, such as mit, apache-2.0 or other")
    if args.max_images < 1:
        raise UsageError("--max-images must be at least 1")
    return args


def refuse_foreign(out):
    if out.exists() and not (out / "config.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not an exported model; choose another --out")


def replace(out, folder):
    folder.chmod(0o755)
    old = None
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f"{out.name}.", suffix=".partial", dir=out.parent))
        out.rename(old / "old")
    folder.rename(out)
    if old:
        shutil.rmtree(old)


class Data:
    """The run's .beton files: classes, checksums, stored images. Read without ffcv, whose import takes seconds."""

    def __init__(self, folder):
        self.folder = folder
        self.infos = {split: self._rungs(split) for split in ("train", "val")}
        self.classes = self.infos["val"][0].classes
        if self.classes is None:
            raise RunError(f"the .beton files in {folder} have no manifest, so that the classes have no names")

    def _rungs(self, split):
        infos = [beton.read_info(path) for path in sorted(Path(self.folder).glob(f"{split}_*.beton"))]
        if not infos:
            raise RunError(f"no {split}_SIZE.beton in {self.folder}; name the run's folder of them with --data")
        return sorted(infos, key=lambda info: info.median_short_side)

    def checksums(self):
        infos = [*self.infos["train"], *self.infos["val"]]
        return {Path(info.path).name: info.manifest and info.manifest["beton"]["sha256"] for info in infos}

    def images(self, split, count):
        """Up to `count` images, evenly spaced, of the largest file: (RGB picture, label) each."""
        info = self.infos[split][-1]
        stored = np.memmap(info.path, np.uint8, mode="r")
        for k in spread(info.num_samples, count):
            data = stored[int(info.data_ptrs[k]) :][: int(info.sizes[k])]
            if info.modes[k] == beton.RAW:
                picture = Image.fromarray(data.reshape(info.heights[k], info.widths[k], 3))
            else:
                picture = inference.decode_image(data.tobytes())
            yield picture, int(info.labels[k])

    def batches(self, split, count, prepare, size=32):
        """The same, prepared: (float32 [n, 3, resolution, resolution], int64 [n]) a time, as arrays."""
        images = self.images(split, count)
        while batch := list(islice(images, size)):
            yield np.stack([prepare(picture) for picture, _ in batch]), np.array([label for _, label in batch])


def spread(total, count):
    """Up to `count` of range(total), evenly spaced."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).astype(np.int64)).tolist()


def write(folder, args, state, which, description, network, data):
    """Every file of the export, checked; returns its config."""
    examples = write_examples(folder, args.examples, args.examples_licence)
    dataset, made = card.dataset_name(data.classes), training(args.checkpoint, state)
    config = {
        "format": inference.FORMAT,
        "name": args.name or state["config"]["logging"]["run_name"],
        "dataset": args.dataset or dataset,
        "licence": args.licence,
        "architecture": description,
        "weights": which,
        "network": export.NETWORK,
        "preprocessing": {
            "resolution": state["config"]["validation"]["headline_resolution"],
            "crop_ratio": state["config"]["validation"]["crop_ratio"],
            "interpolation": "bilinear",
            "antialias": True,
            "mean": [round(value, 6) for value in IMAGENET_MEAN],
            "std": [round(value, 6) for value in IMAGENET_STD],
        },
        "labels": data.classes,
        "results": results(state),
        "training": made,
        "curve": curve(state),
        "recipe": recipe(state["config"]),
        "data": data.checksums(),
        "links": links.links(dataset, made["commit"], args.licence),
        "examples": examples,
        "probabilities": {"temperature": 1.0, "unsure_below": 0.0},
        "agreement": None,
        "int8": None,
        "browser": None,
    }
    export.write_safetensors(network, folder / export.WEIGHTS)
    export.write_onnx(network, folder / export.NETWORK, resolution=config["preprocessing"]["resolution"])
    config["export"] = {"commit": commit(), "torch": torch.__version__}
    save_json(folder / "config.json", config)
    config["export"] |= check_files(folder, description, network, data)
    float32 = inference.Classifier(folder, file=export.NETWORK)
    logits, labels = answers(float32, data, args.max_images)
    config["probabilities"] = calibration.calibrate(logits, labels)
    right = logits.argmax(1) == labels
    if not args.no_int8:
        config["int8"] = try_int8(folder, data, float32, right)
        if config["int8"]["verdict"] == "taken":
            config["network"] = export.NETWORK_INT8
    config["browser"] = for_browser(folder, data, config["int8"], right)
    if args.images:
        config["agreement"] = compare_on_files(folder, network, args.images, args.max_images, config)
    save_json(folder / "config.json", config)
    (folder / "README.md").write_text(card.model_card(config), encoding="utf-8")
    return config


def save_json(path, content):
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_examples(folder, paths, licence):
    """Copies of the example pictures without their metadata, as JPEG of at most 640 px, named after the files."""
    written = []
    for number, path in enumerate(paths, start=1):
        try:
            picture = inference.decode_image(path.read_bytes())
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror}") from None
        except inference.UnreadableImage as error:
            raise RunError(f"{path}: {error}") from None
        picture.thumbnail((640, 640))
        (folder / "examples").mkdir(exist_ok=True)
        stem = "".join(character if character.isalnum() or character in "-_" else "_" for character in path.stem)
        name = f"examples/{number:02d}_{stem[:40]}.jpg"
        picture.save(folder / name, quality=92)
        written.append({"file": name, "licence": licence})
    return written


def results(state):
    """A row for each resolution and view of the run's final evaluation; none where it has not come to that."""
    rows, validation = state["progress"]["rows"], state["config"]["validation"]
    evaluation = rows[-1].get("evaluation") if rows else None
    headline = (validation["headline_resolution"], validation["headline_view"])
    return [
        {"resolution": int(resolution), "view": view, "crop_ratio": validation["crop_ratio"], **figures}
        | {"headline": (int(resolution), view) == headline}
        for resolution, views in (evaluation or {}).items()
        for view, figures in views.items()
    ]


def training(path, state):
    """Hours, dollars and machine: from the checkpoint's log, and from environment.json beside it if that is there."""
    rows = state["progress"]["rows"]
    sessions = read_json(Path(path).parent / "environment.json", default=[])
    last = sessions[-1] if sessions else {}
    dollars = rows[-1].get("dollars") if rows else None
    return {
        "epochs": state["progress"]["epoch"],
        "step": state["step"],
        "seconds": rows[-1]["elapsed_seconds"] if rows else 0.0,
        "dollars": dollars,
        "commit": last.get("commit"),
        "device": last.get("device"),
        "world_size": last.get("world_size"),
        "precision": last.get("precision"),
        "packages": last.get("packages"),
    }


def recipe(config):
    """What a checkpoint says about how it was trained, without where its files were."""
    here = {"data.dir", "data.workers", "data.timeout_minutes", "training.device", "training.checkpoint"}
    return {
        section: {key: value for key, value in keys.items() if f"{section}.{key}" not in here}
        for section, keys in config.items()
        if section in ("model", "training", "lr", "resolution", "data", "validation")
    }


def curve(state):
    """What a training curve needs of each epoch."""
    keys = ("epoch", "resolution", "train_loss", "val_loss", "top1", "top5")
    return [{key: row[key] for key in keys if key in row} for row in state["progress"]["rows"]]


def check_files(folder, description, network, data):
    """Compare what was written with `network`; RunError where any logit is further off than TOLERANCE."""
    reloaded = export.load_network(description, export.read_safetensors(folder / export.WEIGHTS))
    exported = inference.Classifier(folder, file=export.NETWORK)
    worst, images = {"onnx": 0.0, "safetensors": 0.0}, 0
    with torch.inference_mode():
        for batch, _ in data.batches("val", CHECKED, exported.prepare):
            logits = network(torch.from_numpy(batch))
            size = max(10.0, logits.abs().max().item()) / 10
            for name, other in (
                ("onnx", torch.from_numpy(exported.run(batch)[0])),
                ("safetensors", reloaded(torch.from_numpy(batch))),
            ):
                difference = (logits - other).abs().max().item()
                worst[name] = max(worst[name], difference)
                if not difference <= TOLERANCE * size:
                    raise RunError(f"the {name} file gives other logits than the checkpoint: {difference:.1e} apart")
            images += len(batch)
    return {"images": images, "kind": "validation images"} | worst


def answers(classifier, data, count):
    """(float32 logits [n, classes], true classes int64 [n]) of `classifier` for up to `count` validation images."""
    batches = data.batches("val", count, classifier.prepare)
    found = [(classifier.run(batch)[0], labels) for batch, labels in batches]
    return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))


def classified_right(classifier, data, count):
    """Which of the same images `classifier` gives the right class: bool [n]."""
    logits, labels = answers(classifier, data, count)
    return logits.argmax(1) == labels


def try_int8(folder, data, float32, right):
    """An 8-bit network beside `float32`, `right` on these validation images, and whether it may take its place.

    It is removed where it may not.
    """
    path = folder / export.NETWORK_INT8
    calibration = [batch for batch, _ in data.batches("train", CALIBRATED, float32.prepare)]
    export.write_int8(folder / export.NETWORK, path, calibration)
    small = inference.Classifier(folder, file=export.NETWORK_INT8)
    other = classified_right(small, data, len(right))
    points, low, high = export.paired_difference(right, other)
    slow, fast = time_alternately([float32, small], calibration[0][:1])
    taken = points >= -INT8_POINTS and fast < slow
    reason = "not faster" if fast >= slow else f"more than {INT8_POINTS} points worse"
    if not taken:
        path.unlink()
    return {
        "images": len(right),
        "fp32_top1": 100 * right.mean(),
        "int8_top1": 100 * other.mean(),
        "points": points,
        "low": low,
        "high": high,
        "fp32_milliseconds": slow,
        "milliseconds": fast,
        "verdict": "taken" if taken else f"left out, {reason}",
    }


def for_browser(folder, data, int8, right):
    """The network of the page in a browser beside the float one, `right` on these validation images.

    The 8-bit one where `int8` says that it was taken; else one with its weights in 8 bits, which is written.
    """
    if int8 and int8["verdict"] == "taken":
        name, top1 = export.NETWORK_INT8, int8["int8_top1"]
        points, low, high = int8["points"], int8["low"], int8["high"]
    else:
        name = export.NETWORK_W8
        export.write_w8(folder / export.NETWORK, folder / name)
        other = classified_right(inference.Classifier(folder, file=name), data, len(right))
        top1, (points, low, high) = 100 * other.mean(), export.paired_difference(right, other)
    return {
        "network": name,
        "bytes": (folder / name).stat().st_size,
        "images": len(right),
        "top1": top1,
        "points": points,
        "low": low,
        "high": high,
    }


def time_alternately(classifiers, image, rounds=30):
    """Median milliseconds for one image of each, in turns, so that a busy moment falls on all of them."""
    taken = [[] for _ in classifiers]
    for _ in range(rounds):
        for classifier, times in zip(classifiers, taken, strict=True):
            started = time.perf_counter()
            classifier.run(image)
            times.append(1000 * (time.perf_counter() - started))
    return [median(times) for times in taken]


def compare_on_files(folder, network, images, count, config):
    """The app's code and torchvision's transforms with PyTorch, on the same files; RunError where they disagree."""
    source = open_source(images, "val")
    wnids = [label["wnid"] for label in config["labels"]]
    if [c["wnid"] for c in source.classes] != wnids:
        raise RunError(f"{images}/val does not have the classes of the model")
    app, prepared = inference.Classifier(folder, file=export.NETWORK), config["preprocessing"]
    chosen = spread(len(source), count)
    right, worst, compared = {"app": 0, "pil": 0}, 0.0, 0
    for i in tqdm(chosen, disable=not sys.stderr.isatty(), unit="image", leave=False):
        label = source.item(i)[1]
        data = source.read(i)
        try:
            picture, ours = Image.fromarray(decode_image(data)), app.predict(data).logits
        except ValueError:  # a picture that the converter leaves out, or of a kind that the page does not take
            continue
        compared += 1
        with torch.inference_mode():
            theirs = network(evaluation_transform(picture, prepared)[None])[0].numpy()
        worst = max(worst, float(np.abs(ours - theirs).max()))
        right["app"] += int(ours.argmax() == label)
        right["pil"] += int(theirs.argmax() == label)
    if not compared:
        raise RunError(f"none of {len(chosen)} files tried from {images}/val can be decoded and is taken by the page")
    shares = {name: 100 * number / compared for name, number in right.items()}
    headline = card.headline_row(config)
    if abs(shares["app"] - shares["pil"]) > FILE_POINTS or worst > FILE_LOGITS:
        raise RunError(
            f"the app and a PIL evaluation of {compared} files disagree: {shares['app']:.2f} and "
            f"{shares['pil']:.2f} % top-1, logits up to {worst:.1e} apart"
        )
    return {
        "images": compared,
        "app_top1": shares["app"],
        "pil_top1": shares["pil"],
        "logits": worst,
        "beton_top1": headline and headline["top1"],
    }


def evaluation_transform(picture, prepared):
    """torchvision's evaluation of an RGB picture: float32 [3, resolution, resolution]."""
    resized = transforms.resize(picture, [round(prepared["resolution"] / prepared["crop_ratio"])], antialias=True)
    cropped = transforms.center_crop(resized, [prepared["resolution"]] * 2)
    return normalize(transforms.pil_to_tensor(cropped)[None])[0]


def report(out, config):
    headline = card.headline_row(config)
    print(f"{out}: {config['name']}, {config['architecture']['arch']}, {config['weights']} weights")
    if headline:
        print(
            f"  top-1 {headline['top1']:.2f} % (95 %: {headline['top1_low']:.2f} to {headline['top1_high']:.2f}), "
            f"{headline['resolution']} px, {headline['view']} view"
        )
    else:
        print("  not evaluated: the run is not finished")
    for line in [*card.probability_lines(config), *card.agreement_lines(config)]:
        print(f"  {line.replace('`', '')}")
    print(f"  links: {', '.join(filter(None, config['links'].values())) or 'none'}")
    if config["browser"]["points"] < -INT8_POINTS:
        print(f"  note: the page in a browser is more than {INT8_POINTS} points worse than the network")
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        print(f"  {path.stat().st_size / 1e6:8.2f} MB  {path.relative_to(out)}")
    print(f"open it with: bash tools/app.sh {out}")


if __name__ == "__main__":
    run(main)
