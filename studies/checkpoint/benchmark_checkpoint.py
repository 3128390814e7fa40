"""What checkpoints cost a training run: the time that it stands still, against the interval between two.

    python studies/checkpoint/benchmark_checkpoint.py --json studies/checkpoint/result.json

The state is train_imagenet.py's for ResNet-50 with EMA: weights, buffers, momenta, averaged weights. A training step
(forward, backward, SGD, EMA) is timed with nothing else going on. Then a checkpoint is put and steps go on until it is
on disk and read back; what this takes more than as many undisturbed steps is lost. The writing thread takes time from
training's own cores here, so processor time is what a checkpoint costs, also on a machine that others use. Beside a GPU
only the copy makes training wait.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]

from rn50 import recipe  # noqa: E402
from rn50.learner import Learner  # noqa: E402
from rn50.machine import commit, processor  # noqa: E402
from rn50.training import checkpoint  # noqa: E402

# Assumed, and low: PCIe 3 x16 carries 16 GB/s in theory, into the host's pageable memory a fraction of that.
GPU_COPY_GB_PER_S = 3.0


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=10, help="as logging.checkpoint_minutes")
    parser.add_argument("--batch", type=int, default=16, help="images of a step")
    parser.add_argument("--size", type=int, default=128, help="px of an image")
    parser.add_argument("--rounds", type=int, default=6, help="checkpoints")
    parser.add_argument("--folder", help="where checkpoints are written (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(Path(folder), options)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(folder, options):
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    train, state = training(options.batch, options.size)
    train()  # the first step allocates
    writer = checkpoint.Writer(folder, step=0, warn=sys.exit)
    idle, standing, lost, writing = [], [], [], []
    for _ in range(options.rounds):
        idle += [timed(train) for _ in range(3)]
        step, steps = np.median(idle[-3:], axis=0), 0
        started = clocks()
        standing.append(timed(lambda: writer.put(state())))
        while not writer.due(0, steps=0, minutes=0):
            train()
            steps += 1
        writing.append(clocks() - started)
        lost.append(writing[-1] - steps * step)
    megabytes = (folder / checkpoint.LAST).stat().st_size / 1e6
    wall, processor_time = np.median(lost, axis=0)
    interval, cores = 60 * options.minutes, len(os.sched_getaffinity(0))
    copy = megabytes / 1e3 / GPU_COPY_GB_PER_S
    return {
        "measured": {
            "step_seconds": round(float(np.median(idle, axis=0)[0]), 3),
            "checkpoint_megabytes": round(megabytes, 1),
            "seconds_training_stands_still": round(float(np.median(standing, axis=0)[0]), 3),
            "seconds_until_it_is_on_disk": round(float(np.median(writing, axis=0)[0]), 2),
            "seconds_lost_per_checkpoint": round(float(wall), 2),
            "processor_seconds_per_checkpoint": round(float(processor_time), 2),
            "processor_seconds_of_each": [round(float(seconds), 2) for _, seconds in lost],
            "minutes_between_checkpoints": options.minutes,
            "percent_of_processor_time": round(100 * float(processor_time) / (interval * cores), 3),
        },
        "projected_for_a_gpu": {
            "seconds_training_stands_still": round(copy, 3),
            "percent_of_the_time": round(100 * copy / interval, 4),
            "because": f"the GPU waits while {megabytes:.0f} MB are copied, assumed at {GPU_COPY_GB_PER_S:g} GB/s; the "
            "thread that writes takes a core from the decoding threads meanwhile, which is not in this figure",
        },
        "machine": f"{processor()}, {torch.get_num_threads()} threads on {cores} cores",
        "setting": f"ResNet-50, {options.batch} images of {options.size} px a step, float32, EMA",
        "torch": torch.__version__,
        "commit": commit(),
    }


def training(batch, size):
    """A function that makes one step, and one that gives the state a checkpoint would have."""
    settings = {"training.epochs": 1, "training.batch_size": batch, "training.micro_batch": batch}
    settings |= {"training.precision": "fp32", "model.ema_half_life": 100, "lr.warmup_epochs": 0}
    settings |= {"data.dir": "none", "logging.run_name": "none"}
    cfg = recipe.load("", [f"--{key}={value}" for key, value in settings.items()])
    learner = Learner(cfg, classes=1000, device=torch.device("cpu"))
    learner.train()
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    micro_batch = images, torch.arange(batch), np.arange(batch)

    def train():
        learner.step(iter([micro_batch]), accumulation=1, learning_rate=0.1, epoch=0, step=0)

    return train, lambda: learner.state() | {"step": 0}


def clocks():
    """Seconds that have passed, and seconds of processor time of all threads."""
    return np.array([time.perf_counter(), time.process_time()])


def timed(action):
    started = clocks()
    action()
    return clocks() - started


if __name__ == "__main__":
    main()
