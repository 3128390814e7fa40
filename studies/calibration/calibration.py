"""What a figure on the page is worth: as sigmoids, as a softmax, and as a softmax at a fitted temperature.

    python write_dataset.py --source.dir=IMAGENETTE --out.dir=BETONS --out.resolutions=128
    OMP_NUM_THREADS=1 python studies/calibration/calibration.py --data BETONS [--runs DIR] [--others DIR] [--json FILE]

Trains the two runs below, by the commands that it prints, unless DIR has them. Temperature and threshold are fitted on
every second validation image, as tools/export_model.py does it; all figures are of the others. --others: pictures of
things that the networks do not know, DIR/<wnid>_<name>.JPEG; those of their classes are left out.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rn50.command import run
from rn50.data.pictures import decode_image
from rn50.errors import RunError
from rn50.files import expanded, expanded_path, write_result
from rn50.machine import commit, processor
from rn50.publishing import calibration, export
from rn50.training import checkpoint

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tools.export_model import Data, evaluation_transform  # noqa: E402

RECIPE = ["--config-file", "rn50_configs/imagenette_cpu.yaml", "--resolution.end=64"]
RECIPE += ["--validation.headline_resolution=80"]
# bce: with what the flagship's loss has beside it.
RUNS = {
    "r50": ["--training.epochs=12", "--validation.resolutions=64,80,96"],
    "r18_bce": [
        "--training.epochs=10",
        "--validation.resolutions=80",
        "--model.arch=resnet18",
        "--model.log_prior_bias=true",
        "--training.loss=bce",
        "--training.mixup=0.2",
    ],
}
DRAWN = 200


def main():
    args = arguments()
    data = Data(args.data)
    figures = {"machine": {"processor": processor(), "commit": commit()}, "runs": {}}
    for name in RUNS:
        state = trained(name, args.data, args.runs)
        figures["runs"][name] = measured(state, data, args.others)
    if args.json:
        write_result(args.json, json.dumps(figures, indent=1) + "\n")
    report(figures)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=expanded, metavar="BETONS", help="Imagenette's .beton files")
    parser.add_argument("--runs", default="runs", type=expanded_path, metavar="DIR", help="where the runs are (runs)")
    parser.add_argument("--others", type=expanded_path, metavar="DIR", help="pictures of what the networks do not know")
    parser.add_argument("--json", type=expanded_path, metavar="FILE", help="write the figures there")
    return parser.parse_args()


def trained(name, betons, runs):
    """The last checkpoint of a run, which is trained where it is not there."""
    if not (runs / name / checkpoint.LAST).exists():
        command = ["train_imagenet.py", *RECIPE, *RUNS[name], f"--data.dir={Path(betons).resolve()}"]
        command += [f"--logging.folder={runs.resolve()}", f"--logging.run_name={name}"]
        print("python", *command, flush=True)
        if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
            raise RunError(f"{name} did not come to its end")
    return checkpoint.load(str(runs / name / checkpoint.LAST))


def measured(state, data, others):
    """What the forms of a network's figures are worth on the validation images that nothing was fitted on."""
    validation, loss = state["config"]["validation"], state["config"]["training"]["loss"]
    network = export.load_network(export.architecture(state), state["ema"]["model"])
    prepared = {"resolution": validation["headline_resolution"], "crop_ratio": validation["crop_ratio"]}

    @torch.inference_mode()
    def logits_of(pictures):
        return network(torch.stack([evaluation_transform(picture, prepared) for picture in pictures])).numpy()

    pairs = list(data.images("val", sys.maxsize))
    labels = np.array([label for _, label in pairs])
    logits = np.concatenate([logits_of([p for p, _ in pairs[k : k + 64]]) for k in range(0, len(pairs), 64)])
    found = calibration.calibrate(logits, labels)
    held_out, truth = logits[1::2].astype(np.float64), labels[1::2]
    at_temperature = calibration.softmax(held_out, found["temperature"])
    forms = {"softmax": calibration.softmax(held_out), "softmax at the temperature": at_temperature}
    if loss == "bce":
        sigmoids = 1 / (1 + np.exp(-held_out))
        forms = {"sigmoids": sigmoids, "sigmoids by their sum": sigmoids / sigmoids.sum(1, keepdims=True)} | forms
    if others:
        known = {label["wnid"] for label in data.classes}
        paths = [path for path in sorted(others.glob("n*_*.JPEG")) if path.name.split("_")[0] not in known]
        pictures = (Image.fromarray(decode_image(path.read_bytes())) for path in paths)
        unknown = np.concatenate([logits_of([picture]) for picture in pictures])
        unsure = calibration.softmax(unknown, found["temperature"]).max(1) < found["unsure_below"]
        found |= {"others": len(paths), "others_unsure": 100 * float(unsure.mean())}
    return {
        "arch": state["config"]["model"]["arch"],
        "loss": loss,
        "top1": 100 * float((held_out.argmax(1) == truth).mean()),
        **found,
        "forms": {name: judged(shown, truth) for name, shown in forms.items()},
    }


def judged(shown, truth):
    """Of figures [N, classes]: their sum, calibration error and negative log-likelihood (of figures that add up to 1).

    chance: the calibration error that figures which are right about themselves would have with as many images.
    """
    sums, rng = shown.sum(1), np.random.default_rng(0)
    sure, right = calibration.answers(shown, truth)
    by_chance = [calibration.calibration_error(sure, rng.random(len(sure)) < sure) for _ in range(DRAWN)]
    nll = -np.log(shown[np.arange(len(truth)), truth]).mean() if np.allclose(sums, 1) else None
    return {
        "sum": [float(value) for value in np.percentile(sums, (2.5, 50, 97.5))],
        "ece": calibration.calibration_error(sure, right),
        "chance": float(np.mean(by_chance)),
        "nll": nll and float(nll),
    }


def report(figures):
    for name, found in figures["runs"].items():
        print(f"\n{name}: {found['arch']}, {found['loss']}, top-1 {found['top1']:.2f} % of {found['images']} images")
        print("\n| figures | sum (95 % of images) | calibration error, points | by chance alone | NLL, nats |")
        print("|---|---|---|---|---|")
        for form, row in found["forms"].items():
            low, middle, high = row["sum"]
            total = "1" if row["nll"] else f"{middle:.2f} ({low:.2f} to {high:.2f})"
            nll = f"{row['nll']:.3f}" if row["nll"] else ""
            print(f"| {form} | {total} | {row['ece']:.1f} | {row['chance']:.1f} | {nll} |")
        said = f"\nT = {found['temperature']:.3f}; unsure below {100 * found['unsure_below']:.1f} %: "
        said += f"{found['right_unsure']:.1f} % of the right answers, {found['wrong_unsure']:.1f} % of the wrong ones"
        if "others" in found:
            said += f", {found['others_unsure']:.1f} % of {found['others']} pictures of other things"
        print(said)


if __name__ == "__main__":
    run(main)
