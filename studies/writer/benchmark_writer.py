"""Converting images to several sizes: write_dataset.py in one pass, against FFCV's own DatasetWriter in one for each.

    python studies/writer/benchmark_writer.py --images DIR --copies 10 --workers 2 --repeats 3 --json OUT

Both store JPEGs of quality 90 with the longer side at most 400 and 500 px (--resolutions has others), with the same
number of processes, from the same ImageFolder tree, interleaved; prints medians of images per second. DatasetWriter is
set up as FFCV's ImageNet example does (write_mode jpg, PIL opens the images), plus the chunk size that makes it use all
workers.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rn50.command import run
from rn50.data import writer
from rn50.data.listing import EXTENSIONS
from rn50.errors import RunError

ROOT = Path(__file__).resolve().parents[2]

# At its end without the interpreter's: numba's threads, after the writer's fork, may hang it (always, on one core).
STOCK = """
import os
import sys
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter
from torchvision.datasets import ImageFolder
tree, out, side, workers = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
fields = {"image": RGBImageField(write_mode="jpg", max_resolution=side, jpeg_quality=90), "label": IntField()}
DatasetWriter(out, fields, num_workers=workers).from_indexed_dataset(ImageFolder(tree), chunksize=16)
os._exit(0)
"""


def main():
    args = arguments()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = Path(folder)
        count = make_tree(args, folder / "tree" / "train" / "all")
        candidates = {"write_dataset": ours, "ffcv": stock}
        speeds = {name: [] for name in candidates}
        for _ in range(args.repeats):
            for name, convert in candidates.items():
                shutil.rmtree(folder / "out", ignore_errors=True)
                (folder / "out").mkdir()
                started = time.perf_counter()
                convert(folder, args)
                speeds[name].append(count / (time.perf_counter() - started))
        report(args, count, speeds)


def make_tree(args, target):
    images = Path(args.images)
    paths = sorted(path for path in images.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not paths:
        raise RunError(f"{args.images} holds no images")
    target.mkdir(parents=True)
    for copy in range(args.copies):
        for k, path in enumerate(paths):
            os.link(path, target / f"{copy}_{k:05}{path.suffix}") if same_disk(path, target) else shutil.copy(
                path, target / f"{copy}_{k:05}{path.suffix}"
            )
    return len(paths) * args.copies


def same_disk(path, folder):
    return path.stat().st_dev == folder.stat().st_dev


def ours(folder, args):
    execute(
        ROOT / "write_dataset.py",
        f"--source.dir={folder / 'tree'}",
        "--source.splits=train",
        f"--out.dir={folder / 'out'}",
        f"--out.resolutions={','.join(map(str, args.resolutions))}",
        f"--out.workers={args.workers}",
    )


def stock(folder, args):
    for side in args.resolutions:
        execute("-c", STOCK, folder / "tree" / "train", folder / "out" / f"{side}.beton", side, args.workers)


def execute(*command):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"a conversion failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


def report(args, count, speeds):
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    print(f"{count} images to {' and '.join(map(str, args.resolutions))} px, {args.workers} workers, start-up included")
    for name, values in speeds.items():
        print(f"{name:<14}{medians[name]:>7.1f} images/s ({min(values):.1f} to {max(values):.1f})")
    print(f"write_dataset.py is {medians['write_dataset'] / medians['ffcv']:.2f}x as fast")
    if args.json:
        results = [
            {"name": name, "images_per_second": medians[name], "min": min(values), "max": max(values)}
            for name, values in speeds.items()
        ]
        content = {"resolutions": args.resolutions, "workers": args.workers, "images": count, "results": results}
        with writer.disk_errors(args.json):
            Path(args.json).write_text(json.dumps(content, indent=1) + "\n")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--images", required=True, help="folder of images, searched in depth")
    parser.add_argument("--copies", type=int, default=1, help="so many times the images")
    parser.add_argument("--workers", type=int, default=2, help="processes (%(default)s)")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[400, 500], help="longest sides, px")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each writer (%(default)s)")
    parser.add_argument("--json", help="where to write the figures")
    parser.add_argument("--folder", help="where the files of the benchmark go (default: the system's temporary folder)")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
