"""Versions of decode.c side by side: processor time of an image, and how far their pixels are from the first one's.

    git show ba4291d:rn50/data/csrc/decode.c > before.c
    python studies/loader/compare_decoders.py --images DIR before.c rn50/data/csrc/decode.c

Each is compiled as setup.py does it for the newest processors that it knows (--any: for all). The images are stored as
training has them (at most --side px, quality 90, with tables) and stay in memory; one thread decodes random crops of
all, version after version, `--repeats` times round. Processor time, because others may use the machine.
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
from rn50.data import decode, encode, native
from rn50.data.listing import EXTENSIONS
from rn50.data.pictures import decode_image
from rn50.errors import RunError, UsageError

ROOT = Path(__file__).resolve().parents[2]
QUALITY = 90


def main():
    args = arguments()
    stored, widths, heights = stored_images(args.images, args.side)
    with tempfile.TemporaryDirectory() as folder:
        libraries = {source: compiled(source, Path(folder) / f"{k}.so", args) for k, source in enumerate(args.sources)}
        print(
            f"{len(stored)} images of at most {args.side} px, one thread, median of {args.repeats} interleaved passes"
        )
        print(f"{'px':>4} {'version':<40}{'us/image':>9}{'times as fast':>15}{'mean difference':>17}{'worst crop':>12}")
        for resolution in args.resolution:
            compare(libraries, stored, widths, heights, resolution, args.repeats)


def stored_images(folder, side):
    """(bytes of each JPEG and its table, widths, heights) of the images in `folder`."""
    paths = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in EXTENSIONS)
    if not paths:
        raise RunError(f"{folder} holds no images")
    pictures = [encode.shrink_image(decode_image(path.read_bytes()), side) for path in paths]
    stored = [np.frombuffer(encode.encode_image(picture, QUALITY), np.uint8) for picture in pictures]
    heights, widths = np.array([picture.shape[:2] for picture in pictures]).T
    return stored, widths, heights


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


def compare(libraries, stored, widths, heights, resolution, repeats):
    out = np.empty((len(stored), resolution, resolution, 3), np.uint8)
    seconds, pixels = {source: [] for source in libraries}, {}
    for repeat in range(repeats + 1):
        for source, library in libraries.items():
            native.library = lambda library=library: library
            crops = decode.random_crops(
                widths, heights, np.arange(len(stored)), size=resolution, scale=(0.08, 1), seed=0, epoch=repeat
            )
            addresses, sizes = [data.ctypes.data for data in stored], [data.size for data in stored]
            started = time.thread_time()
            status = native.decode_batch(
                addresses, sizes, widths, heights, np.zeros(len(stored)), crops, out, threads=1
            )
            if repeat:
                seconds[source].append(time.thread_time() - started)
            else:  # warms up
                pixels[source] = out.astype(int)
            if status.any():
                raise RunError(f"{source} fails on image {status.argmax()}")
    first = next(iter(libraries))
    for source, times in seconds.items():
        difference = np.abs(pixels[source] - pixels[first]).mean((1, 2, 3))
        microseconds = statistics.median(times) / len(stored) * 1e6
        faster = statistics.median(seconds[first]) / statistics.median(times)
        print(
            f"{resolution:>4} {source:<40}{microseconds:>9.1f}{faster:>14.2f}x{difference.mean():>17.3f}"
            f"{difference.max():>12.2f}"
        )


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", help="C files, the one to compare with first")
    parser.add_argument("--images", required=True, help="folder of images")
    parser.add_argument("--resolution", default="88,128,224", help="px of the crops, comma-separated")
    parser.add_argument("--side", type=int, default=500, help="px of the stored images' longer side")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--any", action="store_true", help="compile for any processor")
    args = parser.parse_args()
    try:
        args.resolution = [int(px) for px in args.resolution.split(",")]
    except ValueError:
        raise UsageError(f"--resolution {args.resolution} is no list of whole numbers") from None
    for source in args.sources:
        if not Path(source).is_file():
            raise UsageError(f"there is no file {source}")
    return args


if __name__ == "__main__":
    run(main)
