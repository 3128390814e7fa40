"""Versions of decode.c side by side: processor time of an image, and how far their pixels are from the first one's.

    git show ba4291d:rn50/data/csrc/decode.c > before.c
    python studies/loader/compare_decoders.py data/imagenet/train_500.beton before.c rn50/data/csrc/decode.c

Each is compiled as setup.py does it for the newest processors that it knows (--any: for all). One thread decodes random
crops of the same images, version after version, `--repeats` times round. Processor time, because others may use the
machine.
"""

import argparse
import ctypes
import runpy
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np

from rn50.command import run
from rn50.data import native
from rn50.data.beton import read_info
from rn50.data.decode import RandomCropDecoder
from rn50.errors import RunError

ROOT = Path(__file__).resolve().parents[2]


def main():
    args = arguments()
    info = read_info(args.file)
    samples = np.linspace(0, info.num_samples - 1, min(args.count, info.num_samples)).astype(np.int64)
    with tempfile.TemporaryDirectory() as folder:
        libraries = {source: compiled(source, Path(folder) / f"{k}.so", args) for k, source in enumerate(args.sources)}
        print(f"{len(samples)} images, one thread, median of {args.repeats} passes; differences in grey levels")
        print(f"{'px':>4} {'version':<34}{'us/image':>9}{'faster':>9}{'mean':>9}{'worst crop':>12}")
        for resolution in args.resolution:
            compare(libraries, info, samples, resolution, args.repeats)


def compiled(source, path, args):
    """The library of `source`, whose header is the tree's."""
    with mock.patch("setuptools.setup"):  # setup.py would build as it is read
        setup = runpy.run_path(str(ROOT / "setup.py"))
    flags = setup["FLAGS"] + ([] if args.any else setup["VARIANTS"].get("_decode_v3", []))
    command = ["gcc", "-shared", "-fPIC", *flags, "-w", "-I", ROOT / "rn50/data/csrc", source, "-o", path]
    done = subprocess.run([*command, "-lm", "-lpthread"], capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{source} does not compile: {done.stderr.strip().splitlines()[0]}")
    return ctypes.CDLL(str(path))


def compare(libraries, info, samples, resolution, repeats):
    decoder = RandomCropDecoder(info, scale=(0.08, 1), seed=0, threads=1)
    decoder.size = resolution
    out = np.empty((len(samples), resolution, resolution, 3), np.uint8)
    seconds, pixels = {source: [] for source in libraries}, {}
    for decoder.epoch in range(repeats + 1):
        for source, library in libraries.items():
            native.library = lambda library=library: library
            started = time.thread_time()
            decoder.decode(samples, out)
            if decoder.epoch:
                seconds[source].append(time.thread_time() - started)
            else:  # warms up
                pixels[source] = out.astype(int)
    first = next(iter(libraries))
    for source, times in seconds.items():
        difference = np.abs(pixels[source] - pixels[first]).mean((1, 2, 3))
        microseconds = statistics.median(times) / len(samples) * 1e6
        faster = statistics.median(seconds[first]) / statistics.median(times)
        print(
            f"{resolution:>4} {source:<34}{microseconds:>9.1f}{faster:>8.2f}x{difference.mean():>9.3f}"
            f"{difference.max():>12.2f}"
        )


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("file", help="a .beton file of JPEGs")
    parser.add_argument("sources", nargs="+", help="C files, the one to compare with first")
    parser.add_argument("--resolution", type=int, nargs="+", default=[88, 128, 224], help="px of the crops")
    parser.add_argument("--count", type=int, default=300, help="images, spread over the file")
    parser.add_argument("--repeats", type=int, default=9, help="passes of each version (%(default)s)")
    parser.add_argument("--any", action="store_true", help="compile for any processor")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
