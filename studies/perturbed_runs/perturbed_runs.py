"""Is trouble noticed in real runs? The first 30 % of a schedule on Imagenette, with one thing wrong in each run.

    python studies/perturbed_runs/perturbed_runs.py --images IMAGENETTE --data data/imagenette \
        --out studies/perturbed_runs

--images has train/ and val/, --data their train_64.beton and val_64.beton. Trains the proxy study's YAML at
32 px for three epochs of ten by train_imagenet.py, then ends it by SIGTERM, as it is and with each trouble, and notes
what rn50/planning/forecast.py said and after which epoch. What train_imagenet.py refuses to do is noted as such.
Repeating the command goes on: a finished run is a line of runs.jsonl.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rn50.command import run
from rn50.errors import RunError
from rn50.files import read_rows, write_atomically

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "studies/proxy_study/proxy_study.yaml"
EPOCHS, LOOKED_AT = 10, 3
SETTINGS = {
    "training.epochs": EPOCHS,
    "resolution.start": 32,
    "resolution.end": 32,
    "data.rung": 64,
    # a multiple of the network's stride: at 40 px the run with nothing wrong had 26 % after three epochs
    "validation.resolutions": 32,
    "validation.headline_resolution": 32,
    "validation.every": 1,
}
# see wrong_labels
EXCHANGED, RANDOM = "labels of two of the ten classes exchanged in training", "labels at random in training"
# The settings that each run changes.
TROUBLES = {
    "nothing": {},
    "learning rate 16 times too small": {"lr.lr_per_256": 0.2 / 16},
    "learning rate ends at a quarter of its peak": {
        "lr.schedule": "step",
        "lr.step_epochs": "5",
        "lr.step_gamma": 0.25,
    },
    "weight decay ten times too high": {"training.weight_decay": 5e-3},
    EXCHANGED: {},
    RANDOM: {},
    "evaluated at 96 px": {"validation.resolutions": 96, "validation.headline_resolution": 96},
}
# Continuing the run with nothing wrong.
RESUMED = {
    "the rest of the schedule left out, on a resume": {"training.epochs": 5},
    "a warm-up again, on a resume": {"lr.warmup_epochs": 4},
}


def main():
    args = arguments()
    done = read_rows(args.out / "runs.jsonl")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in [*TROUBLES, *RESUMED]:
        if any(row["trouble"] == name for row in done):
            continue
        done.append({"trouble": name} | (perturbed(name, args) if name in TROUBLES else resumed(name, args)))
        write_atomically(args.out / "runs.jsonl", "".join(json.dumps(row) + "\n" for row in done))
        print(json.dumps(done[-1]), flush=True)
    text = "\n".join(lines(done)) + "\n"
    write_atomically(args.out / "results.md", text)
    print(text, end="")


def command(args, name, changes, data):
    folder = args.runs / name.replace(" ", "_")
    settings = {**SETTINGS, **changes, "data.dir": data, "logging.folder": args.runs, "logging.run_name": folder.name}
    given = [f"--{key}={value}" for key, value in settings.items()]
    return folder, [sys.executable, ROOT / "train_imagenet.py", f"--config-file={CONFIG}", *given]


def perturbed(name, args):
    """Train until LOOKED_AT epochs are in the log; what they say."""
    data = wrong_labels(name, args) if name in (EXCHANGED, RANDOM) else args.data
    folder, line = command(args, name, TROUBLES[name], data)
    process = subprocess.Popen(line, cwd=ROOT)
    try:
        while len(read_rows(folder / "log.jsonl")) < LOOKED_AT:
            if process.poll() is not None:
                raise RunError(f"training with {name} ended with status {process.returncode}; repeat the command")
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        process.wait()
    finally:
        process.kill()
    rows = read_rows(folder / "log.jsonl")[:LOOKED_AT]
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))[-1]
    return {
        "top1": [row["top1"] for row in rows],
        "train_loss": [row["train_loss"] for row in rows],
        "warnings": [row["forecast"]["warnings"] for row in rows],
        "commit": environment["commit"],
    }


def resumed(name, args):
    folder, line = command(args, "nothing", RESUMED[name], args.data)
    if not (folder / "last.pt").exists():
        raise RunError(f"{folder} has no checkpoint to go on from; take the line of nothing out of runs.jsonl")
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    return {"status": done.returncode, "said": done.stderr.strip().splitlines()[-1:]}


def wrong_labels(name, args):
    """A folder with the validation file as it is and a training file in which labels are exchanged or shuffled."""
    made = args.runs / ("exchanged" if name == EXCHANGED else "random")
    tree, betons = made / "tree", made / "betons"
    if not (betons / "train_64.json").exists():
        shutil.rmtree(made, ignore_errors=True)
        for split in ("train", "val"):
            paths = sorted((args.images / split).glob("*/*"))
            labels = [path.parent.name for path in paths]
            if split == "train" and name == RANDOM:
                random.Random(0).shuffle(labels)
            elif split == "train":
                first, second = sorted(set(labels))[:2]
                labels = [{first: second, second: first}.get(label, label) for label in labels]
            for path, label in zip(paths, labels, strict=True):
                link = tree / split / label / f"{path.parent.name}_{path.name}"
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.resolve())
        line = [sys.executable, ROOT / "write_dataset.py", f"--source.dir={tree}", f"--out.dir={betons}"]
        subprocess.run([*line, "--out.resolutions=64"], check=True, cwd=ROOT)
        for path in args.data.glob("val_64.*"):
            shutil.copy(path, betons / path.name)
    return betons


def lines(rows):
    """results.md."""
    yield f"| wrong | top-1 after {LOOKED_AT} of {EPOCHS} epochs | warned after epoch | named |"
    yield "|---|---|---|---|"
    for row in rows:
        if row["trouble"] in RESUMED:
            said = row["said"][0].removeprefix("error: ") if row["status"] else "nothing"
            yield f"| {row['trouble']} | | {'refused' if row['status'] else 'not refused'} | {said} |"
            continue
        first = next((epoch for epoch, found in enumerate(row["warnings"], start=1) if found), None)
        causes = sorted({warning["cause"] for found in row["warnings"] for warning in found})
        yield f"| {row['trouble']} | {row['top1'][-1]:.1f} % | {first or 'none'} | {', '.join(causes)} |"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--images", required=True, type=Path, help="folder with train/ and val/, ImageFolder trees")
    parser.add_argument("--data", required=True, type=Path, help="folder with train_64.beton and val_64.beton of them")
    parser.add_argument("--out", required=True, type=Path, help="where runs.jsonl and results.md go")
    parser.add_argument("--runs", default=Path("runs/perturbed"), type=Path, help="run folders (default %(default)s)")
    args = parser.parse_args()
    for path in (args.images / "train", args.data / "train_64.beton", args.data / "val_64.beton"):
        if not path.exists():
            raise RunError(f"there is no {path}")
    return args


if __name__ == "__main__":
    run(main)
