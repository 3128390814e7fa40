"""Does our training decoder leave accuracy where stock FFCV's has it? The same training with either, seed by seed.

    python studies/decode_accuracy/decode_accuracy.py --data data/imagenette --seeds 0,1,2 --out studies/decode_accuracy

Trains decode_accuracy.yaml by train_imagenet.py, once with stock FFCV's RandomResizedCropRGBImageDecoder
and RandomHorizontalFlip (antialiasing by area; crops drawn by numpy, not by the seed) and once with ours for each seed.
A pair has the same weights to begin with, the same order of samples and the same evaluation. Keep smaller rungs out of
--data: the evaluation would take them, and the writer shrinks as stock FFCV's decoder does, not as the evaluation.
Stop it at will: finished runs are kept, and a stopped one resumes. Writes results.json and results.md to --out.
"""

import argparse
import json
import runpy
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from rn50 import errors
from rn50.command import run
from rn50.data import loaders
from rn50.errors import RunError
from rn50.files import read_rows, write_atomically
from rn50.metrics import T_975, paired_difference

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path(__file__).with_name("decode_accuracy.yaml")
DECODERS = ("stock", "ours")


def main():
    if sys.argv[1:2] == ["--with-stock-decoder"]:
        return train_with_stock_decoder(sys.argv[2:])
    args = arguments()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    if len(seeds) not in T_975:
        raise errors.UsageError(f"--seeds needs 2 to {max(T_975)} seeds for an interval, not {len(seeds)}")
    rows = []
    for seed in seeds:
        for decoder in DECODERS:
            rows.append({"seed": seed, "decoder": decoder} | train(decoder, seed, args))
            print(json.dumps(rows[-1]), flush=True)
    write(rows, seeds, Path(args.out))


def train(decoder, seed, args):
    """The last row of one run's log, as top-1 by resolution and seconds."""
    name = f"{decoder}_{seed}"
    settings = [f"--config-file={CONFIG}", f"--data.dir={args.data}", f"--training.seed={seed}"]
    settings += [f"--logging.folder={args.runs}", f"--logging.run_name={name}", *args.settings]
    script = [ROOT / "train_imagenet.py"] if decoder == "ours" else [__file__, "--with-stock-decoder"]
    log = Path(args.runs) / name / "log.jsonl"
    if not any("evaluation" in row for row in read_rows(log)):
        status = subprocess.run([sys.executable, *script, *settings], cwd=ROOT).returncode
        if status:
            raise RunError(f"training {name} ended with status {status}; repeat the command to continue")
    rows = read_rows(log)
    environment = json.loads((log.parent / "environment.json").read_text())[-1]
    return {
        "top1": {resolution: views["single"]["top1"] for resolution, views in rows[-1]["evaluation"].items()},
        "train_loss": rows[-1]["train_loss"],
        "cpu_seconds": round(sum(row["cpu_seconds"] for row in rows), 1),
        "commit": environment["commit"],
    }


def write(rows, seeds, out):
    """results.json, and results.md with the sentence that the runs support."""
    settings = list(rows[0]["top1"])
    lines = ["| seed | " + " | ".join(f"{name} at {px} px" for px in settings for name in DECODERS) + " |"]
    lines += ["|---" * (1 + 2 * len(settings)) + "|"]
    of = {(row["decoder"], row["seed"]): row["top1"] for row in rows}
    for seed in seeds:
        lines.append(f"| {seed} | " + " | ".join(f"{of[d, seed][px]:.2f}" for px in settings for d in DECODERS) + " |")
    differences = {}
    for px in settings:
        found = paired_difference([of["ours", seed][px] - of["stock", seed][px] for seed in seeds])
        differences[px], low, high = found, found["low"], found["high"]
        verdict = (
            f"no difference larger than {max(-low, high):.1f} points was detected"
            if low <= 0 <= high
            else "the interval does not hold zero: a difference was detected"
        )
        lines.append(f"\nAt {px} px ours minus stock is {found['mean']:+.2f} points (95 %: {low:+.2f} to ")
        lines[-1] += f"{high:+.2f}, paired t over {len(seeds)} seeds): {verdict}."
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "results.json", json.dumps({"runs": rows, "ours_minus_stock": differences}, indent=1) + "\n")
    write_atomically(out / "results.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


def train_with_stock_decoder(settings):
    """train_imagenet.py with another loader of training images; all the rest is the script's own."""
    loaders.training_loader = StockLoader
    sys.argv = [str(ROOT / "train_imagenet.py"), *settings]
    runpy.run_path(sys.argv[0], run_name="__main__")


class StockLoader:
    """FFCV's loader as its ImageNet example sets it up, behind the interface of loaders.BetonLoader."""

    def __init__(self, info, *, batch_size, crop_scale, seed, device, workers, timeout):
        self.path, self.batch_size, self.scale = str(info.path), batch_size, tuple(crop_scale)
        self.device, self.workers, self.made = device, workers, {}

    @contextmanager
    def batches(self, samples, resolution, *, epoch=0, read_ahead=False):
        threads = torch.get_num_threads()
        loader = self.made.get(resolution) or self.made.setdefault(resolution, self.make(resolution))
        loader.traversal_order.indices = samples
        iterator = iter(loader)
        torch.set_num_threads(threads)
        try:
            yield ((images, labels.view(-1)) for images, labels in iterator)
        finally:
            iterator.close()

    def make(self, resolution):
        from ffcv.fields.basics import IntDecoder
        from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import RandomHorizontalFlip, ToDevice, ToTensor, ToTorchImage

        decoder = RandomResizedCropRGBImageDecoder((resolution, resolution), scale=self.scale)
        # FFCV's host would overwrite a batch whose copy is under way: rn50.data.loaders waits for it, this has to here
        to_device = {"device": self.device, "non_blocking": False}
        return Loader(
            self.path,
            batch_size=self.batch_size,
            num_workers=self.workers,
            order=OrderOption.SEQUENTIAL,
            os_cache=True,
            pipelines={
                "image": [decoder, RandomHorizontalFlip(), ToTensor(), ToDevice(**to_device), ToTorchImage()],
                "label": [IntDecoder(), ToTensor(), ToDevice(**to_device)],
            },
        )


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], epilog="Further arguments go to train_imagenet.py."
    )
    parser.add_argument("--data", required=True, help="folder of {train,val}_224.beton of Imagenette, no smaller")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--runs", default="runs/decode_accuracy", help="where the run folders go")
    parser.add_argument("--out", required=True, help="where results.json and results.md go")
    args, args.settings = parser.parse_known_args()
    return args


if __name__ == "__main__":
    run(main)
