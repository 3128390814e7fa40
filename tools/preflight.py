"""Ten minutes on the rented machine before the money goes: its real speed, what the run will then cost, go or no-go.

    python tools/preflight.py rn50_configs/rn50_78.yaml --data /data/betons \\
        --dollars-per-hour 0.48 --budget 25 --write tuned.yaml

Measures the micro-batch that fits, images/s of the training step in each precision, compiled and not, then, at up to
three resolutions of the recipe, images/s of the loader alone and of training with it and the share of time waiting for
data, and with --source the speed of staging from there. With --write, what is fastest goes into a YAML for a second
--config-file, and the rest is measured with it. Further arguments are settings, as train_imagenet.py takes them.
tools/plan_run.py --preflight reads the JSON. Exit status 0: go, 1: not.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import subprocess
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
import yaml

from rn50 import choices, config, recipe
from rn50.command import run
from rn50.data import loaders
from rn50.errors import RunError, UsageError
from rn50.files import expanded, write_result
from rn50.help import HelpFormatter
from rn50.learner import Learner
from rn50.machine import commit, cores, memory_bytes
from rn50.planning import costs, speeds
from rn50.training import distributed
from rn50.training.progress import Waiting
from rn50.training.session import check

WARM_UP_STEPS = 2
RATE = 1e-4  # what is learned does not count here
STAGING_SECONDS = 20.0
# Above this share of waiting, decoding and not the GPU sets the pace.
WAITING = 0.1


def main():
    args, settings = arguments()
    table = costs.read_table()
    price = dollars_per_hour(table, args)
    cfg = recipe.load("", [f"--config-file={args.config}", f"--data.dir={args.data}", *settings])
    check(cfg)
    device, _, _ = distributed.setup(cfg.training.device)
    rungs = loaders.find_rungs(cfg.data.dir, "train")
    wanted = {loaders.training_rung(rungs, px, cfg.data.rung) for px in recipe.resolutions(cfg)}
    # before the rest, which would be lost with a source that is not there
    staging = staging_speed(args.source, Path(args.data)) if args.source else None
    print(f"staging {staging:.0f} MB/s" if staging else "staging not measured (no --source): assumed", flush=True)
    largest = rungs[max(rungs)]
    learner = Learner(cfg, classes=largest.num_classes, device=device)
    micro = largest_micro_batch(learner, cfg.training.micro_batch, max(recipe.resolutions(cfg)))
    del learner
    print(f"micro-batch {micro} fits at {max(recipe.resolutions(cfg))} px", flush=True)
    # empty: what an earlier command has compiled would seem to take no time
    with tempfile.TemporaryDirectory(prefix="preflight-") as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        tried = try_choices(cfg, largest, device, micro, args.seconds / 3)
        chosen = choices.fastest(tried)
        print(advice(tried, chosen), flush=True)
        if args.write:
            write_settings(args.write, chosen, device)
            cfg = choices.with_settings(cfg, chosen["settings"])
        elif tried[0]["failed"]:
            raise RunError(f"no go: with the recipe's own settings, {tried[0]['failed']}")
        rows = measure_resolutions(cfg, rungs, device, micro, args.seconds)
    gpus = max(1, torch.cuda.device_count()) if device.type == "cuda" else 1
    report = {
        "made_by": "tools/preflight.py",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "config": Path(args.config).stem,
        "arch": cfg.model.arch,
        "instance": args.instance or "this machine",
        "device": name_of(device),
        "gpus": gpus,
        "vcpus": cores(),
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "dollars_per_hour": price,
        "micro_batch": micro,
        "choices": tried,
        "measured_with": chosen if args.write else tried[0],
        "staging_mb_per_s": staging,
        "resolutions": share_among(rows, gpus, speeds.fit(table)),
    }
    report |= revise(table, cfg, report, {side: rungs[side] for side in wanted}, args.budget)
    spelled = ", ".join(f"{name} {value:.2f}" for name, value in report["hours_by_part"].items())
    print(f"projected from these measurements: {report['hours']:.2f} h ({spelled}), ${report['dollars']:.2f}")
    for reason in report["reasons"]:
        print(f"note: {reason}")
    if args.json:
        write_result(args.json, json.dumps(report, indent=1) + "\n")
    if not report["go"]:
        raise RunError(f"no go: {report['reasons'][0]}")
    print(f"go: at most ${report['dollars_high']:.2f} of ${args.budget:g}")


def name_of(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def finish(device):
    """Wait for what the GPU still has to do: kernels are only queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- The choice between settings that compute the same ---------------------------------------------------------------


def try_choices(cfg, info, device, micro, seconds):
    """Rows of choices.measure, the recipe's own settings first; each is printed."""
    px = choices.heaviest(cfg)
    print(f"the step alone at {px} px, {micro} images a micro-batch:", flush=True)
    tried = []
    for settings in choices.settings(cfg, device):
        tried.append(
            choices.measure(
                cfg,
                settings,
                classes=info.num_classes,
                images=info.num_samples,
                device=device,
                px=px,
                micro_batch=micro,
                seconds=seconds,
            )
        )
        print(f"  {spelled(tried[-1], tried[0])}", flush=True)
    return tried


def spelled(row, own):
    """A line about a choice that was tried."""
    settings = row["settings"]
    name = f"{settings['training.precision']}{', compiled' if settings['training.compile'] else ''}"
    if row["failed"]:
        return f"{name:16} {row['failed']}"
    ratio = f" ({row['images_per_second'] / own['images_per_second']:.2f} x)" if not own["failed"] else ""
    compiling = (
        f", {row['compile_seconds']:.0f} s to compile each of {row['sizes']} sizes" if row["compile_seconds"] else ""
    )
    return f"{name:16} {row['images_per_second']:.0f} images/s{ratio}{compiling}: {row['hours']:.2f} h"


def advice(tried, chosen):
    """One line: the settings to add to the command."""
    own = tried[0]
    if chosen is own:
        return "the recipe's own settings are the fastest here, or as fast"
    changed = {key: value for key, value in chosen["settings"].items() if value != own["settings"][key]}
    flags = " ".join(f"--{key}={str(value).lower()}" for key, value in changed.items())
    instead = f"{chosen['hours']:.2f} h" + (f" instead of {own['hours']:.2f} h" if not own["failed"] else "")
    return f"faster here, for a new run: {flags} ({instead})"


def write_settings(path, chosen, device):
    """Write a YAML for a second --config-file."""
    sections = {}
    for name, value in chosen["settings"].items():
        section, key = name.split(".")
        sections.setdefault(section, {})[key] = value
    about = f"# The fastest of tools/preflight.py on {name_of(device)}, {time.strftime('%Y-%m-%d')}.\n"
    write_result(path, about + yaml.safe_dump(sections, sort_keys=False))


# --- What a run would do with its own data ---------------------------------------------------------------------------


def largest_micro_batch(learner, micro, px):
    """`micro`, halved until a step at `px` pixels fits the GPU's memory."""
    while micro:
        try:
            images = torch.zeros(micro, 3, px, px, dtype=torch.uint8, device=learner.device)
            labels = torch.zeros(micro, dtype=torch.int64, device=learner.device)
            learner.train()
            batch = images, labels, np.arange(micro)
            # the last before another interval of SAM begins, if there is SAM: the largest that a run has
            last = learner.cfg.training.sam_interval - 1
            learner.step(iter([batch]), accumulation=1, learning_rate=RATE, epoch=0, step=last)
            finish(learner.device)
            return micro
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            micro //= 2
    raise RunError(f"not even one image at {px} px fits this GPU's memory; is another process using it?")


def measure_resolutions(cfg, rungs, device, micro, seconds):
    """A row for each of up to three resolutions of the recipe."""
    learner = Learner(cfg, classes=rungs[max(rungs)].num_classes, device=device)
    rows = []
    for px in spread(set(recipe.resolutions(cfg)), 3):
        side = loaders.training_rung(rungs, px, cfg.data.rung)
        loader = loaders.training_loader(
            rungs[side],
            batch_size=micro,
            crop_scale=cfg.data.crop_scale,
            seed=cfg.training.seed,
            device=device,
            workers=cfg.data.workers or cores(),
            timeout=60 * cfg.data.timeout_minutes,
        )
        row = {"resolution": px, "rung": side, **measure(loader, learner, cfg, px, micro, seconds)}
        rows.append(row)
        print(
            f"{px} px from rung {side}: loader {row['loader_images_per_second']:.0f} images/s, training "
            f"{row['training_images_per_second']:.0f}, waiting for data {row['data_wait_fraction']:.0%}",
            flush=True,
        )
    return rows


def spread(values, count):
    """At most `count` of the sorted values: the ends, and evenly between."""
    values = sorted(values)
    if len(values) <= count:
        return values
    return [values[round(k * (len(values) - 1) / (count - 1))] for k in range(count)]


def measure(loader, learner, cfg, px, micro, seconds):
    """images/s of the loader alone, then of training from it, and the share of training time spent waiting."""
    accumulation = max(1, cfg.training.batch_size // micro)
    learner.train()

    steps = itertools.count()

    def train(micro_batches):
        learner.step(micro_batches, accumulation=accumulation, learning_rate=RATE, epoch=0, step=next(steps))

    alone, _ = timed(loader, cfg, learner.device, px, next, micro, seconds)
    whole = cfg.training.sam_interval if cfg.training.sam_rho else 1
    training, waiting = timed(loader, cfg, learner.device, px, train, micro, seconds, whole=whole)
    return {
        "loader_images_per_second": round(alone, 1),
        "training_images_per_second": round(training, 1),
        "data_wait_fraction": round(waiting, 4),
        "limited_by": "GPU" if waiting < WAITING and learner.device.type == "cuda" else "CPU",
    }


def timed(loader, cfg, device, px, step, micro, seconds, whole=1):
    """(images/s, share of waiting) of step(micro-batches), each time it returns, for `seconds` after a warm-up.

    whole: the number of steps is a multiple of it.
    """
    kind = loaders.choose_order(loader.info, cfg.data.order)
    if kind == "page":
        # what a run reads from disk must not come from memory here
        with open(loader.info.path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    waiting, images = Waiting(device), 0

    def micro_batches():
        nonlocal images
        for epoch in itertools.count():
            order = loaders.epoch_order(loader.info, kind, seed=cfg.training.seed, epoch=epoch)
            order = order[: len(order) // micro * micro]
            if not len(order):
                raise RunError(f"{loader.info.path} has fewer images than one micro-batch of {micro}")
            with loader.batches(order, px, epoch=epoch, read_ahead=kind == "page") as batches, closing(batches):
                for samples in order.reshape(-1, micro):
                    with waiting.for_data():
                        batch = next(batches)
                    images += micro
                    yield *batch, samples

    with closing(micro_batches()) as endless:
        for _ in range(WARM_UP_STEPS):
            step(endless)
        finish(device)
        waiting.lap()
        started, images = time.perf_counter(), 0
        while time.perf_counter() - started <= seconds:
            for _ in range(whole):
                step(endless)
        finish(device)
        spent = time.perf_counter() - started
        return images / spent, min(1.0, waiting.lap() / spent)


def share_among(rows, gpus, fitted):
    """The rows for all GPUs of the machine: measured on one, whose loader had all cores."""
    if gpus == 1:
        return rows
    total = []
    for row in rows:
        asked = row["training_images_per_second"] * gpus * fitted.efficiency(gpus)
        rate = min(asked, row["loader_images_per_second"])
        limit = row["limited_by"] if rate == asked else "CPU"
        total.append({**row, "training_images_per_second": round(rate, 1), "limited_by": limit})
    return total


def staging_speed(source, folder):
    """MB/s from `source` (s3://... by the aws command, or a file) to a file in `folder`, over at most 20 s."""
    partial_copy = folder / f"preflight.{os.getpid()}.partial"
    command = ["aws", "s3", "cp", source, "-"] if source.startswith("s3://") else ["cat", source]
    copied, started = 0, time.perf_counter()
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            with open(partial_copy, "wb") as out:
                while time.perf_counter() - started < STAGING_SECONDS:
                    block = process.stdout.read(8 << 20)
                    if not block:
                        break
                    copied += out.write(block)
                out.flush()
                os.fsync(out.fileno())
            seconds = time.perf_counter() - started
            process.terminate()
            message = process.stderr.read().decode(errors="replace").strip()
    except OSError as error:
        raise RunError(f"cannot stage from {source}: {error.strerror}") from None
    finally:
        partial_copy.unlink(missing_ok=True)
    if not copied:
        raise RunError(f"cannot stage from {source}: {message or 'it is empty'}")
    return round(copied / seconds / 1e6, 1)


def revise(table, cfg, report, rungs, budget):
    """Hours and dollars from what was measured, and go or no-go with the reasons. rungs: all that the recipe reads."""
    priced = costs.recipe_of(report["config"], config.to_dict(cfg), loaders.short_sides(rungs))
    machine = costs.measured_machine(report)
    images = {**table.constant["images_train"], "value": float(max(info.num_samples for info in rungs.values()))}
    table = dataclasses.replace(table, constant={**table.constant, "images_train": images})
    parts, _ = speeds.hours(table, speeds.fit(table), None, priced, machine)
    speed = report["staging_mb_per_s"] or table.value("staging_mb_per_s")
    parts["staging"] = sum(info.bytes for info in rungs.values()) / (speed * 1e6) / 3600
    if compiling := report["measured_with"]["compile_seconds"]:
        parts["compiling"] = compiling * len(set(priced.resolutions)) / 3600
    hours = sum(parts.values())
    dollars, high = (hours * factor * report["dollars_per_hour"] for factor in (1, 1 + speeds.MEASURED_SPREAD))
    reasons = []
    if report["micro_batch"] < cfg.training.micro_batch:
        reasons.append(
            f"training.micro_batch={cfg.training.micro_batch} does not fit this GPU; "
            f"--training.micro_batch={report['micro_batch']} does, and BatchNorm then sees fewer images"
        )
    if high > budget:
        reasons.insert(0, f"${high:.2f} (measured speed + {speeds.MEASURED_SPREAD:.0%}) is more than ${budget:g}")
    go = not reasons
    if any(row["data_wait_fraction"] >= WAITING for row in report["resolutions"]):
        reasons.append("training waits for data: more vCPU or a smaller data.rung would speed it up")
    return {
        "hours": round(hours, 3),
        "hours_by_part": {name: round(value, 3) for name, value in parts.items()},
        "dollars": round(dollars, 2),
        "dollars_high": round(high, 2),
        "budget": budget,
        "go": go,
        "reasons": reasons,
    }


def dollars_per_hour(table, args):
    if args.dollars_per_hour:
        return args.dollars_per_hour
    prices = {row["name"]: row["value"] for row in table.instance}
    if args.instance not in prices:
        raise UsageError(
            f"no price is known for {args.instance or 'this machine'}: give --dollars-per-hour, or --instance with one "
            f"of {', '.join(prices)}"
        )
    return prices[args.instance]


def positive(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("config", type=expanded, metavar="CONFIG", help="the recipe's YAML")
    parser.add_argument("--data", required=True, type=expanded, help="folder of train_SIZE.beton")
    parser.add_argument("--budget", type=positive, required=True, help="what the run may cost, in dollars")
    parser.add_argument("--instance", help="EC2 type, for its on-demand price")
    parser.add_argument(
        "--dollars-per-hour", type=positive, help="what an hour costs you, as on spot, in place of --instance"
    )
    parser.add_argument("--source", type=expanded, help="where betons are staged from: s3://BUCKET/FILE or a path")
    parser.add_argument(
        "--seconds", type=positive, default=60, help="how long to measure, twice for each resolution (default: 60)"
    )
    parser.add_argument(
        "--write", type=expanded, metavar="FILE", help="put the fastest settings into this YAML, and go on with them"
    )
    parser.add_argument(
        "--json", type=expanded, metavar="OUT", help="write the figures there, for tools/plan_run.py --preflight"
    )
    return parser.parse_known_args()


if __name__ == "__main__":
    run(main)
