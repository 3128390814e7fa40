"""Which parts of the ImageNet recipes pay on a small scale? ResNet-18 on Imagenette, seed by seed against a baseline.

    python studies/proxy_study/proxy_study.py --data data/imagenette --seeds 0,1,2 --out studies/proxy_study
    python studies/proxy_study/proxy_study.py --arms ideas --data data/imagenette --out studies/proxy_study/ideas

Trains proxy_study.yaml by train_imagenet.py, then the same with one change at a time, for each seed.
Compute is equal in the pixels that go through the network in training: progressive resizing gets more epochs for them.
What an arm costs beyond that is in its processor time. Stop it at will: a finished run is a line of runs.jsonl in --out
and is not made again, on any machine; a stopped run goes on. After every run results.json and results.md are written
from what there is.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

from rn50 import schedules
from rn50.command import run
from rn50.errors import RunError, UsageError
from rn50.files import read_rows, write_atomically
from rn50.metrics import T_975, paired_difference

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path(__file__).with_name("proxy_study.yaml")
VARIANTS = Path(__file__).with_name("variants.py")
# Keys of the config, and `variant`: a function of variants.py.
PARTS = {
    "baseline": {},
    "blurpool": {"model.blurpool": "true", "model.blur_maxpool": "true"},
    "ema": {"model.ema_half_life": 20},
    # 4 epochs at 40 px and 1 at 56: 1.01 times the pixels of 3 at 56
    "progressive": {
        "training.epochs": 5,
        "resolution.start": 40,
        "resolution.start_ramp": 3,
        "resolution.end_ramp": 4,
    },
    "label_smoothing": {"training.label_smoothing": 0.1},
    "bce": {"training.loss": "bce", "model.log_prior_bias": "true"},
}
# 2 epochs at 40 px and 2 at 56: 1.01 times the pixels of 3 at 56
RAMP = {"training.epochs": 4, "resolution.start": 40, "resolution.start_ramp": 1, "resolution.end_ramp": 2}
IDEAS = {
    "baseline": {},
    "sam": {"training.sam_rho": 0.5, "training.sam_interval": 10},
    "mixup": {"training.mixup": 0.2},
    "label_smoothing_0.2": {"training.label_smoothing": 0.2},
    "alternating_flip": {"variant": "alternating_flip"},
    "ramped": RAMP,
    "interleaved": RAMP | {"variant": "interleaved"},
}
ARMS = {"parts": PARTS, "ideas": IDEAS}
AGAINST = {"interleaved": "ramped"}  # the others: the baseline


def main():
    args = arguments()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    if len(set(seeds)) != len(seeds) or len(seeds) not in T_975:
        raise UsageError(f"--seeds needs 2 to {max(T_975)} different seeds for an interval, not {args.seeds}")
    out, arms = Path(args.out), ARMS[args.arms]
    done = read_rows(out / "runs.jsonl")
    for row in done:
        if row["settings"] != settings_of(arms[row["arm"]], args.settings):
            raise RunError(f"{out / 'runs.jsonl'} has runs of {row['arm']} with other settings; choose another --out")
    # seeds outermost, so that what is there when it is stopped is balanced
    for seed in seeds:
        for arm in arms:
            if not args.report and not any((row["arm"], row["seed"]) == (arm, seed) for row in done):
                done.append(train(arm, arms[arm], seed, args))
                out.mkdir(parents=True, exist_ok=True)
                write_atomically(out / "runs.jsonl", "".join(json.dumps(row) + "\n" for row in done))
                print(json.dumps(done[-1]), flush=True)
                write(done, seeds, out, arms)
    if not done:
        raise RunError(f"{out / 'runs.jsonl'} has no runs to report")
    print(write(done, seeds, out, arms))


def settings_of(changes, further):
    """What an arm's `changes` and the command line change of the config: {key: text}."""
    given = dict(setting.removeprefix("--").split("=", 1) for setting in further)
    kept = {key: value for key, value in given.items() if key.split(".")[0] not in ("data", "logging")}
    return kept | {key: str(value) for key, value in changes.items()}


def train(arm, changes, seed, args):
    """The run's line of runs.jsonl."""
    name = f"{arm}_{seed}"
    script = [VARIANTS, changes["variant"]] if "variant" in changes else [ROOT / "train_imagenet.py"]
    flags = args.settings + [f"--{key}={value}" for key, value in changes.items() if key != "variant"]
    settings = [f"--config-file={CONFIG}", f"--data.dir={args.data}", f"--training.seed={seed}", *flags]
    settings += [f"--logging.folder={args.runs}", f"--logging.run_name={name}"]
    log = Path(args.runs) / name / "log.jsonl"
    if not any("evaluation" in row for row in read_rows(log)):
        status = subprocess.run([sys.executable, *script, *settings], cwd=ROOT).returncode
        if status:
            raise RunError(f"training {name} ended with status {status}; repeat the command to continue")
    rows = read_rows(log)
    used = yaml.safe_load((log.parent / "config.yaml").read_text(encoding="utf-8"))
    environment = json.loads((log.parent / "environment.json").read_text(encoding="utf-8"))[-1]
    return {
        "arm": arm,
        "seed": seed,
        "top1": rows[-1]["top1"],
        "top1_flip": rows[-1]["evaluation"][str(used["validation"]["headline_resolution"])]["flip"]["top1"],
        "images": rows[-1]["images"],
        "train_loss": rows[-1]["train_loss"],
        "epochs": len(rows),
        "megapixels": round(megapixels(used, rows[-1]["images_seen"]), 1),
        "cpu_seconds": round(sum(row["cpu_seconds"] for row in rows), 1),
        "device": environment["device"],
        "commit": environment["commit"],
        "settings": settings_of(changes, args.settings),
    }


def megapixels(config, images_seen):
    """What went through the network in training."""
    epochs = config["training"]["epochs"]
    sides = [schedules.resolution(epoch, **config["resolution"]) for epoch in range(epochs)]
    return images_seen / epochs * sum(side**2 for side in sides) / 1e6


def write(rows, seeds, out, arms):
    """results.json and results.md, from the runs there are; gives the text of the latter."""
    of = {(row["arm"], row["seed"]): row for row in rows if row["seed"] in seeds}
    missing = len(arms) * len(seeds) - len(of)
    lines = [f"# Proxy study: {len(of)} of {len(arms) * len(seeds)} runs", ""]
    if missing:
        lines += [
            f"**{missing} runs are missing**; repeating the command makes them.",
            "",
        ]
    px = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["validation"]["headline_resolution"]
    lines += [
        f"ResNet-18 on Imagenette (10 classes, 9,469 training and {rows[-1]['images']:,} validation images), one core, "
        f"studies/proxy_study/proxy_study.yaml with one change for each arm. Top-1 in % at {px} px, single view.",
        "",
        "| arm | " + " | ".join(f"seed {seed}" for seed in seeds) + " | minus baseline, points (95 %) | megapixels | "
        "processor time against baseline |",
        "|---" * (len(seeds) + 4) + "|",
    ]
    differences = {}
    for arm in arms:
        base = AGAINST.get(arm, "baseline")
        runs = [of.get((arm, seed)) for seed in seeds]
        top1 = " | ".join(f"{run['top1']:.2f}" if run else "-" for run in runs)
        pairs = [
            (of[arm, seed], of[base, seed])
            for seed in seeds
            if arm != base and (arm, seed) in of and (base, seed) in of
        ]
        difference, time = "", ""
        if pairs:
            differences[arm] = paired_difference([mine["top1"] - base["top1"] for mine, base in pairs])
            difference = describe(differences[arm]) + (f" against {base}" if base != "baseline" else "")
            time = f"{statistics.fmean(mine['cpu_seconds'] / base['cpu_seconds'] for mine, base in pairs):.2f}"
        size = next((f"{run['megapixels']:.0f}" for run in runs if run), "-")
        lines.append(f"| {arm} | {top1} | {difference} | {size} | {time} |")
    lines += ["", *conclusions(differences)]
    text = "\n".join(lines) + "\n"
    content = {"missing": missing, "runs": rows, "minus_baseline": differences}
    write_atomically(out / "results.json", json.dumps(content, indent=1) + "\n")
    write_atomically(out / "results.md", text)
    return text


def describe(difference):
    pairs = len(difference["paired"])
    if difference["low"] is None:
        return f"{difference['mean']:+.2f} (1 pair: no interval)"
    return f"{difference['mean']:+.2f} ({difference['low']:+.2f} to {difference['high']:+.2f}; {pairs} pairs)"


def conclusions(differences):
    sure = {arm: found for arm, found in differences.items() if found["low"] is not None}
    for verdict, held in (
        ("better than the baseline here", lambda found: found["low"] > 0),
        ("worse than the baseline here", lambda found: found["high"] < 0),
        ("not told apart from the baseline", lambda found: found["low"] <= 0 <= found["high"]),
    ):
        named = [arm for arm, found in sure.items() if held(found)]
        yield f"- {verdict}: {', '.join(named) or 'none'}"
    yield ""
    yield (
        "Intervals are paired t over the seeds, each for itself: of five or six comparisons without any effect, one in "
        "four studies would show at least one as if it had one. With so few seeds only effects of some points are seen."
    )
    yield ""
    yield (
        "What follows for ImageNet: that each of these parts trains, and what it costs in processor time on a CPU. "
        "What does not: its gain there. Ten classes and a few epochs far from convergence ask for speed of learning, "
        "where 1,000 classes and 16 to 135 epochs also ask for what regularises. The recipes rest on the published "
        "ImageNet runs in their headers, not on this table."
    )


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0],
        epilog="Further arguments go to train_imagenet.py, as --section.key=value.",
    )
    parser.add_argument("--arms", choices=ARMS, default="parts", help="what the recipes have, or what they might have")
    parser.add_argument("--data", required=True, help="folder of train_128.beton and val_128.beton of Imagenette")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--runs", default="runs/proxy_study", help="where the run folders go")
    parser.add_argument("--out", required=True, help="where runs.jsonl, results.json and results.md are")
    parser.add_argument("--report", action="store_true", help="train nothing, write the results of what there is")
    args, args.settings = parser.parse_known_args()
    for setting in args.settings:
        if not setting.startswith("--") or "=" not in setting:
            raise UsageError(f"cannot read {setting!r}; settings are given as --section.key=value")
    return args


if __name__ == "__main__":
    run(main)
