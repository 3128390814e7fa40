"""Images per second of training loaders, side by side on the same images: ours and every peer (peers.py has them).

    python studies/loader/benchmark_loader.py --images DIR --resolution 160 --threads 1 --repeats 5 --json OUT
        --python slipstream=PYTHON --python erow=PYTHON

Writes its own betons and JPEG files from the images (longer side at most 500 px, quality 90, as training has them),
runs one pass of each loader after the other, `--repeats` times round, and prints medians. Each loader is a process of
its own on the first `--threads` cores, run by the interpreter that holds it (README.md says how to install those that
need their own). Every peer reads the same stored JPEGs, or a raw store made of them, takes a random resized crop, flips
and gives uint8 batches in memory. --profile says where our time goes. --schedule weighs resolutions by the epochs that
a recipe trains at them.
Instead of the comparison: --scaling, what more threads gain; --memory, the peak of one loader at batch 512; --cold,
the speed of files that are not in the page cache, in page-aware order (--copies makes the file larger than memory).
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
from torchvision import io
from torchvision.transforms.functional import center_crop, resize

from rn50 import recipe, schedules
from rn50.command import run
from rn50.data import beton, decode, encode, loaders, native, writer
from rn50.data.listing import EXTENSIONS
from rn50.data.pictures import decode_image
from rn50.errors import RunError, UsageError
from rn50.machine import cores

sys.path.insert(0, str(Path(__file__).resolve().parent))
import peers

MAX_SIDE, QUALITY, MEMORY_BATCH = peers.MAX_SIDE, 90, 512
LADDER = (256, 400, MAX_SIDE)  # the rungs that write_dataset.py is told to write for training
CLASSES = [{"wnid": "n0", "name": "all"}]
FAMILIES = {name.split("_")[0] for name in peers.LOADERS} - {"rn50"}
PATIENCE = 900  # seconds that one pass may take, compiling included


def main():
    args = arguments()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = Path(folder)
        count = write_files(args.images, folder, args.copies, LADDER if args.schedule else (MAX_SIDE,))
        for other in (cold, scaling, memory):
            if getattr(args, other.__name__):
                return other(folder, args)
        if args.schedule:
            compare_along_schedule(folder, args, count)
        else:
            measured = compare(folder, args, args.resolution)
            content = report(args, count, measured)
            write_json(args.json, content[0] if len(content) == 1 else {"measurements": content})
        if args.profile:
            profile(folder, args)


def write_files(images, folder, copies, rungs):
    """train_SIDE.beton of each rung, and of the largest rung's pictures untiled.beton and tree/all/*.jpg.

    Those three have the same JPEG bytes. short256/all/*.jpg: slipstream's recipe for its YUV420 store.
    """
    if not Path(images).is_dir():
        raise RunError(f"{images} is no folder")
    paths = sorted(path for path in Path(images).iterdir() if path.suffix.lower() in EXTENSIONS)
    if not paths:
        raise RunError(f"{images} holds no images")
    (folder / "tree" / "all").mkdir(parents=True)
    (folder / "short256" / "all").mkdir(parents=True)
    samples = {rung: [] for rung in (*rungs, "untiled")}
    for k, path in enumerate(paths):
        original = decode_image(path.read_bytes())
        for rung in rungs:
            picture = encode.shrink_image(original, rung)
            jpeg = encode.encode_jpeg(picture, QUALITY)
            height, width = picture.shape[:2]
            samples[rung].append((beton.JPG, width, height, jpeg + native.index_jpeg(jpeg)))
        samples["untiled"].append((beton.JPG, width, height, jpeg))
        (folder / "tree" / "all" / f"{k:05}.jpg").write_bytes(jpeg)
        (folder / "short256" / "all" / f"{k:05}.jpg").write_bytes(short256(original))
    for rung, stored in samples.items():
        write_beton(folder / (f"{rung}.beton" if rung == "untiled" else f"train_{rung}.beton"), rung, stored, copies)
    size, tiled = (sum(len(sample[3]) for sample in samples[name]) for name in ("untiled", MAX_SIDE))
    print(f"{len(paths)} images, {size / len(paths) / 1000:.1f} kB each; with their tables {tiled / size - 1:+.2%}")
    return len(paths) * copies


def short256(rgb):
    """The JPEG that slipstream/prep/imagenet.py stores: short side 256 px, at most 512 px of the other, quality 100."""
    image = resize(torch.from_numpy(rgb).permute(2, 0, 1), 256, antialias=True)
    height, width = image.shape[1:]
    return io.encode_jpeg(center_crop(image, [min(height, 512), min(width, 512)]), quality=100).numpy().tobytes()


def write_beton(path, rung, samples, copies):
    total = len(samples) * copies
    ladder = writer.LadderWriter(
        paths={rung: path}, journal=path.with_suffix(".journal"), capacity=total, fingerprint=path.stem
    )
    for k in range(total):
        ladder.add(label=0, pictures={rung: samples[k % len(samples)]})
    ladder.finish({rung: {"classes": CLASSES, "settings": {"max_side": rung}}})


def compare(folder, args, resolutions):
    """{resolution: {loader: {"speeds": images/s of each pass, "bytes": stored, an image}}}, passes interleaved.

    A loader whose interpreter cannot import it is left out, with a line on stderr.
    """
    chosen = chosen_loaders(args)
    running, missing, measured = {}, set(), {resolution: {} for resolution in resolutions}
    try:
        for repeat in range(args.repeats + 1):
            for resolution in resolutions:
                for name in chosen:
                    family = name.split("_")[0]
                    if family in missing:
                        continue
                    if name not in running:
                        running[name] = LoaderProcess(name, args.python.get(family, sys.executable), folder, args)
                    answer = running[name].run_pass(resolution)
                    if "missing" in answer:
                        missing.add(family)
                        print(running[name].missing(family, answer["missing"]), file=sys.stderr)
                    elif repeat:  # the first warms up
                        result = measured[resolution].setdefault(name, {"speeds": [], "bytes": answer["bytes"]})
                        result["speeds"].append(answer["images"] / answer["seconds"])
    finally:
        for process in running.values():
            process.stop()
    if not any(measured.values()):
        raise RunError("none of the loaders is installed")
    return measured


def chosen_loaders(args):
    known = [name for name in peers.LOADERS if args.schedule or name != "rn50_500"]
    chosen = args.only.split(",") if args.only else known
    if unknown := set(chosen) - set(known):
        raise RunError(f"--only names {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return chosen


class LoaderProcess:
    """peers.py with one loader. RunError where it ends, fails or gives no answer."""

    def __init__(self, name, python, folder, args):
        self.name, self.python, self.log = name, python, folder / f"{name}.log"
        command = [python, peers.__file__, name, folder, str(args.threads), str(args.copies)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        try:
            with open(self.log, "w") as log:
                # a session of its own, so that its worker processes end with it
                self.process = subprocess.Popen(command, stderr=log, start_new_session=True, **pipes)
        except OSError as error:
            raise RunError(f"{python}, the interpreter of {name}, cannot be run: {error.strerror}") from None

    def run_pass(self, resolution):
        with contextlib.suppress(BrokenPipeError):  # it has ended, and reading says so
            print(resolution, file=self.process.stdin, flush=True)
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            raise RunError(f"{self.name} gave no answer for {PATIENCE} s")
        line = self.process.stdout.readline()
        if not line:
            said = self.log.read_text(errors="replace").split("\n")
            raise RunError(f"the process of {self.name} ended: {next(filter(None, reversed(said)), 'without a word')}")
        answer = json.loads(line)
        if "error" in answer:
            raise RunError(f"{self.name} failed at {resolution} px: {answer['error']}")
        return answer

    def missing(self, family, reason):
        return (
            f"{family} is skipped, {self.python} cannot import it ({reason}): studies/loader/README.md says how to "
            f"install it; then --python {family}=PYTHON"
        )

    def stop(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def report(args, count, measured):
    """Print a table of each resolution; what --json has of each, a list."""
    names = {name for results in measured.values() for name in results}
    content = []
    for resolution, results in measured.items():
        medians = {name: statistics.median(result["speeds"]) for name, result in results.items()}
        reference = medians.get("rn50") or max(medians.values())
        print(
            f"\n{resolution} px, {threads_text(args)}, {count} images a pass, "
            f"median of {args.repeats} interleaved passes"
        )
        print(
            f"{'loader':<22}{'images/s':>8}{'min':>7}{'max':>7}{'per core':>9}{'rn50 is':>8}{'faster in':>10}"
            f"{'bytes':>8}"
        )
        for name, median in sorted(medians.items(), key=lambda item: -item[1]):
            speeds, stored = results[name]["speeds"], results[name]["bytes"]
            print(
                f"{name:<22}{median:>8.0f}{min(speeds):>7.0f}{max(speeds):>7.0f}{median / used_cores(args):>9.0f}"
                f"{reference / median:>7.2f}x{rounds_won(results, name):>10}{stored:>8.0f}"
            )
        rows = [
            {
                "name": name,
                "images_per_second": medians[name],
                "min": min(result["speeds"]),
                "max": max(result["speeds"]),
                "passes": result["speeds"],
                "bytes_per_image": result["bytes"],
            }
            for name, result in results.items()
        ]
        content.append({"resolution": resolution, "threads": args.threads, "images": count, "results": rows})
    if any(name.startswith("slipstream") for name in names):
        print("\nslipstream leaves the flip to the GPU, so it has none; _256: short side 256 px")
    return content


def rounds_won(results, name):
    """In how many rounds ours was faster than the loader `name`, as `9 of 9`; empty for ours and without it."""
    if name == "rn50" or "rn50" not in results:
        return ""
    rounds = list(zip(results["rn50"]["speeds"], results[name]["speeds"], strict=True))
    return f"{sum(ours > theirs for ours, theirs in rounds)} of {len(rounds)}"


def threads_text(args):
    return f"{args.threads} thread{'s' if args.threads > 1 else ''}"


def used_cores(args):
    return min(args.threads, cores())


def compare_along_schedule(folder, args, count):
    """Images/s over the epochs of a recipe: rn50 from the rungs that training reads, others from the largest."""
    epochs = Counter(recipe.resolutions(recipe.load("", [f"--config-file={args.schedule}"])))
    short_sides = loaders.short_sides(loaders.find_rungs(folder, "train"))
    rungs = {resolution: schedules.rung(resolution, short_sides) for resolution in sorted(epochs)}
    measured = compare(folder, args, nodes(rungs))
    content = report(args, count, measured)
    names = next(iter(measured.values()))
    weighted = {
        name: 1
        / mean_seconds(epochs, rungs, {at: 1 / statistics.median(measured[at][name]["speeds"]) for at in measured})
        for name in names
    }
    ranges = ", ".join(f"{' to '.join(map(str, ends))} px from {rung}" for rung, ends in rung_ends(rungs).items())
    print(
        f"\n{args.schedule}, {threads_text(args)}: {sum(epochs.values())} epochs; rn50 {ranges}, others from {MAX_SIDE}"
    )
    print(f"{'loader':<23}{'images/s':>9}{'per core':>10}{'rn50 is':>9}")
    reference = weighted.get("rn50") or max(weighted.values())
    for name, speed in sorted(weighted.items(), key=lambda item: -item[1]):
        print(f"{name:<23}{speed:>9.0f}{speed / used_cores(args):>10.0f}{reference / speed:>8.2f}x")
    rows = [
        {"name": name, "images_per_second": speed, "per_core": speed / used_cores(args), "rn50_is": reference / speed}
        for name, speed in weighted.items()
    ]
    heads = {"schedule": str(args.schedule), "threads": args.threads, "images": count}
    write_json(args.json, {**heads, "epochs": epochs, "rungs": rungs, "measurements": content, "weighted": rows})


def rung_ends(rungs):
    """{rung: its smallest and largest resolution}; one where they are the same. rungs: {resolution: rung}, in px."""
    ends = {}
    for resolution in sorted(rungs):
        ends.setdefault(rungs[resolution], []).append(resolution)
    return {rung: sorted({min(those), max(those)}) for rung, those in ends.items()}


def nodes(rungs):
    """The resolutions to measure at: both ends of what is read from each rung."""
    return [resolution for ends in rung_ends(rungs).values() for resolution in ends]


def mean_seconds(epochs, rungs, seconds):
    """Seconds for an image, over a schedule: linear between the nodes of a rung, weighted by epochs.

    epochs: {resolution: how many}; rungs: {resolution: rung}; seconds: {node: seconds for an image}.
    """
    ends = rung_ends(rungs)
    total = 0.0
    for resolution, number in epochs.items():
        at = ends[rungs[resolution]]
        total += number * np.interp(resolution, at, [seconds[node] for node in at])
    return float(total / sum(epochs.values()))


def write_json(path, content):
    if path:
        with writer.disk_errors(path):
            Path(path).write_text(json.dumps(content, indent=1) + "\n")


def profile(folder, args):
    """Where our time goes, in microseconds of one core per image."""
    info = beton.read_info(folder / f"train_{MAX_SIDE}.beton")
    decoder = decode.RandomCropDecoder(info, scale=(0.08, 1), seed=0, threads=1)
    decoder.size = resolution = args.resolution[0]
    batch = peers.BATCH
    spent, crops, read = np.zeros(len(native.PHASES), np.int64), 0.0, 0.0
    out = np.empty((batch, resolution, resolution, 3), np.uint8)
    data = np.memmap(info.path, np.uint8, mode="r")
    batches = [np.arange(at, min(at + batch, info.num_samples)) for at in range(0, info.num_samples, batch)]
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


def setting(folder, args, **others):
    return peers.Setting(folder, **{"threads": args.threads, "copies": args.copies, **others})


def cold(folder, args):
    """One pass over a file that is not in memory, in page-aware order."""
    info = beton.read_info(folder / f"train_{MAX_SIDE}.beton")
    loader = peers.rn50_loader(info, setting(folder, args))
    rates = []
    for epoch in range(args.repeats):
        with open(info.path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        order = loaders.epoch_order(info, "page", seed=0, epoch=epoch)
        started = time.perf_counter()
        with loader.batches(order, args.resolution[0], epoch=epoch, read_ahead=True) as batches:
            peers.consume(batches)
        rates.append(time.perf_counter() - started)
    seconds = statistics.median(rates)
    print(
        f"cold, page-aware order: {info.bytes / 1e6:.0f} MB, {info.bytes / 1e6 / seconds:.0f} MB/s, "
        f"{info.num_samples / seconds:.0f} images/s at {args.resolution[0]} px with {args.threads} threads "
        f"(median of {args.repeats})"
    )


def scaling(folder, args):
    """What two threads gain over one, beside what hashing, which touches nothing shared, gains in the same run."""
    threads = max(args.threads, 2)
    passes = {
        (name, n): run
        for n in (1, threads)
        for name, run in (
            ("rn50", peers.rn50(setting(folder, args, threads=n), args.resolution[0])[0]),
            ("hashing", hashing_pass(n)),
        )
    }
    speeds = {key: [] for key in passes}
    for _ in range(args.repeats):
        for key, one_pass in passes.items():
            one_pass()  # the first after another's finds its threads and caches cold, which no training does
            started = time.perf_counter()
            done = one_pass()
            speeds[key].append(done / (time.perf_counter() - started))
    medians = {key: statistics.median(values) for key, values in speeds.items()}
    gains = {name: medians[name, threads] / medians[name, 1] for name in ("rn50", "hashing")}
    print(
        f"{args.resolution[0]} px, {threads} threads over one, median of {args.repeats}: rn50 {gains['rn50']:.3g}x "
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
    for name, make in (("rn50", peers.rn50), ("ffcv", peers.ffcv)):
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=_peak, args=(make, folder, args, theirs))
        process.start()
        theirs.close()
        try:
            before, peak = ours.recv()
        except EOFError:
            raise RunError(f"the loader {name} died; it may have run out of memory") from None
        process.join()
        where = f"at batch {MEMORY_BATCH}, {args.resolution[0]} px, {args.threads} threads"
        print(f"{name:<6}{peak - before:>7.0f} MB {where}")


def _peak(make, folder, args, connection):
    before = peak = anonymous_megabytes()
    finished = threading.Event()

    def watch():
        nonlocal peak
        while not finished.wait(0.005):
            peak = max(peak, anonymous_megabytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    make(setting(folder, args, batch=MEMORY_BATCH), args.resolution[0])[0]()
    finished.set()
    watcher.join()
    connection.send((before, peak))


def anonymous_megabytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1000


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--images", required=True, help="folder of images")
    at = parser.add_mutually_exclusive_group()
    at.add_argument("--resolution", type=resolutions, default=[160], help="px of the crops; several, comma-separated")
    at.add_argument("--schedule", metavar="YAML", help="a recipe: images/s over its epochs, each at its resolution")
    parser.add_argument("--threads", type=int, default=1, help="decoding threads, or worker processes")
    parser.add_argument("--repeats", type=int, default=5, help="passes of each loader (%(default)s)")
    parser.add_argument("--copies", type=int, default=1, help="so many times the images")
    parser.add_argument("--only", help="these loaders, comma-separated")
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="PACKAGE=PATH",
        help=f"the interpreter that holds {', '.join(sorted(FAMILIES))} (default: this one); may be given for each",
    )
    parser.add_argument("--json", help="where to write the figures")
    parser.add_argument("--folder", help="where the files of the benchmark go (default: the system's temporary folder)")
    parser.add_argument("--profile", action="store_true", help="also say where our time goes")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--cold", action="store_true", help="read from disk instead of the page cache")
    instead.add_argument("--scaling", action="store_true", help="threads against one, and a pure-compute loop likewise")
    instead.add_argument("--memory", action="store_true", help="peak memory at batch 512, beside stock FFCV's")
    args = parser.parse_args()
    args.python = interpreters(args.python)
    for name in ("profile", "cold", "scaling", "memory"):
        if getattr(args, name) and (args.schedule or len(args.resolution) > 1):
            raise UsageError(f"--{name} takes one --resolution")
    return args


def resolutions(text):
    return [int(word) for word in text.split(",")]


def interpreters(given):
    """{package: path} of the values of --python."""
    for text in given:
        if text.partition("=")[0] not in FAMILIES or not text.partition("=")[2]:
            raise UsageError(f"--python takes PACKAGE=PATH with a package of {', '.join(sorted(FAMILIES))}, not {text}")
    return dict(text.split("=", 1) for text in given)


if __name__ == "__main__":
    run(main)
