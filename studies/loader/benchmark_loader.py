"""Images per second of training loaders, side by side on the same images: ours, stock FFCV, torchvision, DALI.

    python studies/loader/benchmark_loader.py --images DIR --resolution 160 --threads 1 --repeats 5 --json OUT

Writes its own betons and JPEG files from the images (longer side at most 500 px, quality 90, as training has them),
runs one pass of each loader after the other, `--repeats` times round, and prints medians. Every peer decodes the same
stored JPEGs, takes a random resized crop, flips and gives uint8 batches in memory. --profile says where our time goes.
Instead of the comparison: --scaling, what more threads gain; --memory, the peak of one loader at batch 512; --cold,
the speed of files that are not in the page cache, in page-aware order (--copies makes the file larger than memory).
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch

from rn50.command import run
from rn50.data import beton, decode, encode, loaders, native, writer
from rn50.data.listing import EXTENSIONS
from rn50.data.pictures import decode_image
from rn50.errors import RunError
from rn50.machine import cores

MAX_SIDE, QUALITY, BATCH, MEMORY_BATCH = 500, 90, 64, 512
CLASSES = [{"wnid": "n0", "name": "all"}]


def main():
    args = arguments()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = Path(folder)
        count = write_files(args.images, folder, args.copies)
        for other in (cold, scaling, memory):
            if getattr(args, other.__name__):
                return other(folder, args)
        candidates = {"rn50": rn50_pass, "rn50_untiled": untiled_pass, "ffcv": ffcv_pass}
        candidates |= {"torchvision_pil": pil_pass, "torchvision_v2": v2_pass}
        if dali_is_there():
            candidates |= {"dali_triangular": dali_pass("triangular"), "dali_linear": dali_pass("linear")}
        else:
            print("DALI is not installed: .venv/bin/pip install -e '.[dev]' (it needs no GPU here)", file=sys.stderr)
        chosen = args.only.split(",") if args.only else list(candidates)
        if unknown := set(chosen) - set(candidates):
            raise RunError(f"--only names {', '.join(sorted(unknown))}; there are {', '.join(candidates)}")
        passes = {name: candidates[name](folder, args) for name in chosen}
        for run in passes.values():
            run()  # compiles, starts workers, fills the page cache
        speeds = {name: [] for name in passes}
        for _ in range(args.repeats):
            for name, run in passes.items():
                started = time.perf_counter()
                images = run()
                speeds[name].append(images / (time.perf_counter() - started))
        report(args, count, speeds)
        if args.profile:
            profile(folder, args)


def write_files(images, folder, copies):
    """tiled.beton, untiled.beton and tree/all/*.jpg with the same pictures in the same JPEG bytes."""
    if not Path(images).is_dir():
        raise RunError(f"{images} is no folder")
    paths = sorted(path for path in Path(images).iterdir() if path.suffix.lower() in EXTENSIONS)
    if not paths:
        raise RunError(f"{images} holds no images")
    pictures = [encode.shrink_image(decode_image(path.read_bytes()), MAX_SIDE) for path in paths]
    plain = [encode.encode_jpeg(picture, QUALITY) for picture in pictures]
    stored = [jpeg + native.index_jpeg(jpeg) for jpeg in plain]
    (folder / "tree" / "all").mkdir(parents=True)
    for k, jpeg in enumerate(plain):
        (folder / "tree" / "all" / f"{k:05}.jpg").write_bytes(jpeg)
    sizes = {}
    for name, data in (("tiled", stored), ("untiled", plain)):
        path = folder / f"{name}.beton"
        total = len(data) * copies
        ladder = writer.LadderWriter(
            paths={MAX_SIDE: path}, journal=folder / f"{name}.journal", capacity=total, fingerprint=name
        )
        for k in range(total):
            height, width = pictures[k % len(data)].shape[:2]
            ladder.add(label=0, pictures={MAX_SIDE: (beton.JPG, width, height, data[k % len(data)])})
        ladder.finish({MAX_SIDE: {"classes": CLASSES, "settings": {"max_side": MAX_SIDE}}})
        sizes[name] = sum(map(len, data))
    print(
        f"{len(paths)} images, {sizes['untiled'] / len(paths) / 1000:.1f} kB each; "
        f"with their tables {sizes['tiled'] / sizes['untiled'] - 1:+.2%}"
    )
    return len(paths) * copies


def our_loader(info, args, batch=BATCH, threads=None):
    return loaders.training_loader(
        info,
        batch_size=batch,
        crop_scale=(0.08, 1),
        seed=0,
        device=torch.device("cpu"),
        workers=threads or args.threads,
        timeout=600,
    )


def rn50_pass(folder, args, name="tiled", **settings):
    info = beton.read_info(folder / f"{name}.beton")
    loader, epochs = our_loader(info, args, **settings), itertools.count()

    def run():
        order = loaders.epoch_order(info, "random", seed=0, epoch=0)
        with loader.batches(order, args.resolution, epoch=next(epochs)) as batches:
            return consume(batches)

    return run


def untiled_pass(folder, args):
    return rn50_pass(folder, args, "untiled")


def ffcv_pass(folder, args, batch=BATCH):
    """As FFCV's ImageNet example sets it up (github.com/libffcv/ffcv-imagenet)."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    size = (args.resolution, args.resolution)
    loader = Loader(
        str(folder / "untiled.beton"),
        batch_size=batch,
        num_workers=args.threads,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=False,
        pipelines={
            "image": [RandomResizedCropRGBImageDecoder(size), RandomHorizontalFlip(), ToTensor(), ToTorchImage()],
            "label": [IntDecoder(), ToTensor()],
        },
    )

    return lambda: consume(loader)


def pil_pass(folder, args):
    """ImageFolder and PIL. One thread is this process; more are worker processes, as its documentation recommends."""
    from torchvision import datasets, transforms

    steps = [transforms.RandomResizedCrop(args.resolution), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    return torch_pass(datasets.ImageFolder(folder / "tree", transforms.Compose(steps)), args)


def v2_pass(folder, args):
    """decode_jpeg to a uint8 tensor and v2 transforms, the fastest of torchvision's CPU ways by its own account."""
    from torchvision import datasets, io
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(args.resolution, antialias=True)
    steps = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def load(path):
        return io.decode_jpeg(io.read_file(path), mode=io.ImageReadMode.RGB)

    return torch_pass(datasets.ImageFolder(folder / "tree", steps, loader=load), args)


def consume(batches):
    """How many images the batches held."""
    return sum(len(batch[0]) for batch in batches)


def torch_pass(dataset, args):
    workers = 0 if args.threads == 1 else args.threads
    dataset.samples *= args.copies
    loader = torch.utils.data.DataLoader(
        dataset, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )

    return lambda: consume(loader)


def dali_is_there():
    with contextlib.suppress(ImportError):
        import nvidia.dali  # noqa: F401

        return True
    return False


def dali_pass(filter_name):
    """decoders.image_random_crop, which decodes what it needs, then a resize with or without antialiasing."""

    def make(folder, args):
        from nvidia.dali import fn, pipeline_def, types

        interpolation = types.INTERP_TRIANGULAR if filter_name == "triangular" else types.INTERP_LINEAR

        # Without prefetching, which would go on during the next loader's pass.
        @pipeline_def(
            batch_size=BATCH, num_threads=args.threads, device_id=None, exec_async=False, exec_pipelined=False
        )
        def pipeline():
            jpegs, labels = fn.readers.file(file_root=str(folder / "tree"), random_shuffle=True, name="reader")
            images = fn.decoders.image_random_crop(
                jpegs, device="cpu", random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
            )
            images = fn.resize(
                images,
                size=[args.resolution, args.resolution],
                interp_type=interpolation,
                antialias=filter_name == "triangular",
            )
            return fn.flip(images, horizontal=fn.random.coin_flip()), labels

        made = pipeline()
        made.build()
        batches = -(-len(list((folder / "tree" / "all").iterdir())) * args.copies // BATCH)

        def run():
            return sum(len(made.run()[0]) for _ in range(batches))  # its last batch is a full one

        return run

    return make


def report(args, count, speeds):
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    reference = medians.get("rn50") or max(medians.values())
    rows = f"{args.resolution} px, {args.threads} thread{'s' if args.threads > 1 else ''}, {count} images a pass"
    print(f"\n{rows}, median of {args.repeats} interleaved passes")
    print(f"{'loader':<17}{'images/s':>9}{'min':>8}{'max':>8}{'per core':>10}{'rn50 is':>9}")
    for name, median in sorted(medians.items(), key=lambda item: -item[1]):
        values = speeds[name]
        print(
            f"{name:<17}{median:>9.0f}{min(values):>8.0f}{max(values):>8.0f}"
            f"{median / min(args.threads, cores()):>10.0f}{reference / median:>8.2f}x"
        )
    if args.json:
        results = [
            {"name": name, "images_per_second": medians[name], "min": min(values), "max": max(values)}
            for name, values in speeds.items()
        ]
        content = {"resolution": args.resolution, "threads": args.threads, "images": count, "results": results}
        with writer.disk_errors(args.json):
            Path(args.json).write_text(json.dumps(content, indent=1) + "\n")


def profile(folder, args):
    """Where our time goes, in microseconds of one core per image."""
    info = beton.read_info(folder / "tiled.beton")
    decoder = decode.RandomCropDecoder(info, scale=(0.08, 1), seed=0, threads=1)
    decoder.size = args.resolution
    spent, crops, read = np.zeros(len(native.PHASES), np.int64), 0.0, 0.0
    out = np.empty((BATCH, args.resolution, args.resolution, 3), np.uint8)
    data = np.memmap(info.path, np.uint8, mode="r")
    batches = [np.arange(at, min(at + BATCH, info.num_samples)) for at in range(0, info.num_samples, BATCH)]
    for epoch in range(args.repeats):
        decoder.epoch = epoch
        for samples in batches:
            started = time.perf_counter()
            decoder.crops(samples, info.widths[samples], info.heights[samples])
            crops += time.perf_counter() - started
            started = time.perf_counter()
            for k in samples:
                data[info.data_ptrs[k] : info.data_ptrs[k] + info.sizes[k]].max()
            read += time.perf_counter() - started
            decoder.decode(samples, out[: len(samples)], nanoseconds=spent)
    images = info.num_samples * args.repeats
    print("\nmicroseconds of one core for an image")
    print(f"  {'choose the crop (numpy)':<45}{crops / images * 1e6:>6.1f}")
    print(f"  {'(reading all its bytes once, for comparison)':<45}{read / images * 1e6:>6.1f}")
    names = ["find the header and the table", "assemble and decode", "resize: rows", "resize: columns, convert"]
    for name, nanoseconds in zip(names, spent, strict=True):
        print(f"  {name:<45}{nanoseconds / images / 1000:>6.1f}")


def cold(folder, args):
    """One pass over a file that is not in memory, in page-aware order."""
    info = beton.read_info(folder / "tiled.beton")
    loader = our_loader(info, args)
    rates = []
    for epoch in range(args.repeats):
        with open(info.path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        order = loaders.epoch_order(info, "page", seed=0, epoch=epoch)
        started = time.perf_counter()
        with loader.batches(order, args.resolution, epoch=epoch, read_ahead=True) as batches:
            consume(batches)
        rates.append(time.perf_counter() - started)
    seconds = statistics.median(rates)
    print(
        f"cold, page-aware order: {info.bytes / 1e6:.0f} MB, {info.bytes / 1e6 / seconds:.0f} MB/s, "
        f"{info.num_samples / seconds:.0f} images/s at {args.resolution} px with {args.threads} threads "
        f"(median of {args.repeats})"
    )


def scaling(folder, args):
    """What two threads gain over one, beside what hashing, which touches nothing shared, gains in the same run."""
    threads = max(args.threads, 2)
    passes = {
        (name, n): run
        for n in (1, threads)
        for name, run in (("rn50", rn50_pass(folder, args, threads=n)), ("hashing", hashing_pass(n)))
    }
    speeds = {key: [] for key in passes}
    for repeat in range(args.repeats + 1):
        for key, one_pass in passes.items():
            started = time.perf_counter()
            done = one_pass()
            if repeat:  # the first warms up
                speeds[key].append(done / (time.perf_counter() - started))
    medians = {key: statistics.median(values) for key, values in speeds.items()}
    gains = {name: medians[name, threads] / medians[name, 1] for name in ("rn50", "hashing")}
    print(
        f"{args.resolution} px, {threads} threads over one, median of {args.repeats}: rn50 {gains['rn50']:.3g}x "
        f"({medians['rn50', 1]:.0f} to {medians['rn50', threads]:.0f} images/s), hashing {gains['hashing']:.3g}x; "
        f"ratio {gains['rn50'] / gains['hashing']:.3g}"
    )


def hashing_pass(threads, rounds=24):
    data = bytes(8 << 20)

    def run():
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda _: hashlib.sha256(data).digest(), range(rounds)))
        return rounds

    return run


def memory(folder, args):
    """Peak anonymous memory (what is not page cache) that one loader adds, ours and stock FFCV's."""
    for name, make in (("rn50", rn50_pass), ("ffcv", ffcv_pass)):
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=_peak, args=(make, folder, args, theirs))
        process.start()
        theirs.close()
        try:
            before, peak = ours.recv()
        except EOFError:
            raise RunError(f"the loader {name} died; it may have run out of memory") from None
        process.join()
        print(
            f"{name:<6}{peak - before:>7.0f} MB at batch {MEMORY_BATCH}, {args.resolution} px, {args.threads} threads"
        )


def _peak(make, folder, args, connection):
    before = peak = anonymous_megabytes()
    finished = threading.Event()

    def watch():
        nonlocal peak
        while not finished.wait(0.005):
            peak = max(peak, anonymous_megabytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    make(folder, args, batch=MEMORY_BATCH)()
    finished.set()
    watcher.join()
    connection.send((before, peak))


def anonymous_megabytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1000


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="folder of images")
    parser.add_argument("--resolution", type=int, default=160, help="px of the crops")
    parser.add_argument("--threads", type=int, default=1, help="decoding threads, or worker processes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--copies", type=int, default=1, help="so many times the images")
    parser.add_argument("--only", help="these loaders, comma-separated")
    parser.add_argument("--json", help="where to write the figures")
    parser.add_argument("--folder", help="where the files of the benchmark go (default: the system's temporary folder)")
    parser.add_argument("--profile", action="store_true", help="also say where our time goes")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--cold", action="store_true", help="read from disk instead of the page cache")
    instead.add_argument("--scaling", action="store_true", help="threads against one, and a pure-compute loop likewise")
    instead.add_argument("--memory", action="store_true", help="peak memory at batch 512, beside stock FFCV's")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
