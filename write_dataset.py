"""Images -> one or more .beton files: python write_dataset.py --source.dir=TREE --out.dir=DIR

TREE holds folders (train/<class>/<image>), or ImageNet as it comes: the tars of its site, Kaggle's download, or Hugging
Face's parquet files (rn50/data/sources.py). Its splits train and val become DIR/train_400.beton, DIR/val_400.beton and
so on, one file for each maximum side length in out.resolutions, with a manifest (.json) beside each. Each image is read
and decoded once for the whole ladder. The files depend on the images and the settings alone, not on the form of the
source, the number of workers or interruptions: run the same command again to continue.
"""

import os
import shutil
import signal
import sys
import time
from contextlib import closing
from functools import partial
from types import SimpleNamespace

import cv2
import numpy as np
import simplejpeg
from fastargs import Config, Param, Section
from tqdm import tqdm

from rn50 import config
from rn50.command import run
from rn50.data import beton
from rn50.data.encode import encode_all, encode_sample
from rn50.data.imagenet import check_counts, odd_images
from rn50.data.listing import describe
from rn50.data.sources import open_source, split_classes, split_of
from rn50.data.writer import LadderWriter, disk_errors
from rn50.errors import RunError, UsageError
from rn50.words import duration

ABOUT = """
Usage:
  python write_dataset.py --source.dir=IMAGES --out.dir=BETONS \\
      [--section.key=VALUE ...]
  python write_dataset.py --config-file rn50_configs/write_imagenet.yaml \\
      --source.dir=IMAGENET --out.dir=BETONS

Convert images to .beton files, several sizes in one pass. IMAGES has the folders train/<class>/ and val/<class>/;
IMAGENET is ImageNet as it comes: the tars of its site, Kaggle's download, or Hugging Face's parquet files. The same
command again goes on with a conversion that was interrupted.
"""
ADVICE = (
    "give the images and a folder for the files: --source.dir=IMAGES --out.dir=BETONS, and for ImageNet also "
    f"--config-file {config.shown('write_imagenet')}"
)
SETTINGS = Config()
Section("source", "the images", SETTINGS).params(
    dir=Param(
        config.path(), "folder of train/ and val/, or of ImageNet's tars, Kaggle or parquet files", required=True
    ),
    splits=Param(config.text(), "splits to convert, comma-separated", default="train,val"),
    subset=Param(config.whole(0), "only the first so many of the shuffled images of each split; 0: all", default=0),
    counts=Param(
        config.choice("auto", "imagenet", "any"),
        "imagenet: refuse a set that has not as many images as ImageNet-1k; auto: from 900 of its classes on",
        default="auto",
    ),
    skip_corrupt=Param(config.switch(), "leave out and list images that cannot be decoded", default=False),
)
Section("out", "the .beton files", SETTINGS).params(
    dir=Param(config.path(), "folder to write to", required=True),
    resolutions=Param(
        config.numbers(config.whole(16, 4096)), "maximum side lengths in px, one file each", default=[256, 400, 500]
    ),
    quality=Param(config.whole(1, 100), "of the JPEGs", default=90),
    raw_share=Param(
        config.number(0, 1), "share of images stored as pixels: faster to load, 7-10 times larger", default=0
    ),
    workers=Param(config.whole(0), "processes; 0: one for each core", default=0),
    seed=Param(config.whole(0), "of the order in which images are written", default=0),
)

PREFLIGHT_IMAGES = 100
LISTED = 10  # pictures named one by one
COMMIT_SECONDS = 1.0


def main():
    cfg = config.load(ABOUT, SETTINGS, advice=ADVICE)
    signal.signal(signal.SIGTERM, _stop)
    jobs = [job for split in _splits(cfg) if (job := plan(cfg, split))]
    if not jobs:
        return
    workers = cfg.out.workers or len(os.sched_getaffinity(0))
    preflight(jobs, cfg.out.dir, workers)
    for number, job in enumerate(jobs, 1):
        later = {other.split: len(other.order) for other in jobs[number:]}
        convert(job, workers=workers, skip_corrupt=cfg.source.skip_corrupt, later=later)


def plan(cfg, split):
    """What must be written for one split, or None when all of it is there. RunError when it can't be."""
    source = open_source(cfg.source.dir, split, cache=cfg.out.dir)
    _same_classes(cfg.source.dir, split, source)
    check_counts(source, split, cfg.source.counts)
    order = np.random.default_rng(cfg.out.seed).permutation(len(source))
    order = order[: cfg.source.subset] if cfg.source.subset else order
    encoding = {"quality": cfg.out.quality, "raw_share": cfg.out.raw_share, "seed": cfg.out.seed}
    settings = {**encoding, "subset": cfg.source.subset, "page_size": beton.PAGE_SIZE}
    origin = {"kind": source.kind, "digest": source.digest(), "images": len(source)}
    common = {"split": split, "classes": source.classes, "source": origin}
    journal = os.path.join(cfg.out.dir, f"{split}.journal")
    manifests = {}
    for rung in _rungs(cfg):
        path = os.path.join(cfg.out.dir, f"{split}_{rung}.beton")
        manifest = {**common, "settings": {"max_side": rung, **settings}}
        if not _already_written(path, manifest, journal):
            manifests[rung] = manifest
    if not manifests:
        return None
    if source.ignored:
        count = sum(source.ignored.values())
        print(f"{split}: ignoring {count} entries that are no images of a class: {describe(source.ignored)}")
    odd = odd_images(source)
    if odd:
        listed = ", ".join(f"{sample_id} ({kind})" for sample_id, kind in odd)
        print(f"{split}: {len(odd)} known odd files are converted to RGB like the others: {listed}")
    paths = {rung: os.path.join(cfg.out.dir, f"{split}_{rung}.beton") for rung in manifests}
    return SimpleNamespace(
        split=split,
        source=source,
        order=order,
        encoding=encoding,
        manifests=manifests,
        paths=paths,
        journal=journal,
        staging=os.path.join(cfg.out.dir, f"{split}.staged"),
    )


def preflight(jobs, folder, workers):
    """Print what will be written and how long it takes; RunError when the disk has no room for it."""
    needed = seconds = 0
    for job in jobs:
        sizes, seconds_per_image, staging_seconds = measure(job)
        seconds += seconds_per_image * len(job.order) / workers + staging_seconds
        print(f"{job.split}: {len(job.order)} images of {len(job.source.classes)} classes")
        if job.source.staging_bytes:
            print(f"  {job.staging}  about {_bytes(job.source.staging_bytes)}, until the split is converted")
            needed += max(0, job.source.staging_bytes - _folder_bytes(job.staging))
        for rung, size in sizes.items():
            print(f"  {job.paths[rung]}  about {_bytes(size)}")
            written = job.paths[rung] + ".partial"
            needed += size - (os.path.getsize(written) if os.path.exists(written) else 0)
    existing = os.path.abspath(folder)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    free = shutil.disk_usage(existing).free
    print(f"about {_bytes(max(needed, 0))} still to write, {_bytes(free)} free; about {duration(seconds)} "
          f"with {workers} workers", flush=True)  # fmt: skip
    if needed * 1.05 > free:
        raise RunError(f"{folder} has {_bytes(free)} free and the files need about {_bytes(needed * 1.05)}; make room, "
                       "choose fewer out.resolutions or another out.dir")  # fmt: skip


def measure(job):
    """Expected bytes of each rung's file, seconds of one core per image, and seconds of staging: from a sample."""
    count = min(len(job.order), max(10, len(job.order) // 20), PREFLIGHT_IMAGES)
    sample = [job.order[k] for k in np.linspace(0, len(job.order) - 1, count).astype(int)]
    cv2.setNumThreads(1)
    started, encoded, staging_seconds = time.perf_counter(), [], 0
    for i in sample:
        if job.source.staging_bytes:
            reading = time.perf_counter()
            job.source.read(int(i))
            staging_seconds += time.perf_counter() - reading
        _, _, pictures, _ = encode_sample(job.source, int(i), list(job.paths), job.encoding)
        if not isinstance(pictures, str):
            encoded.append([len(data) for _, _, _, data in pictures])
    seconds = (time.perf_counter() - started - staging_seconds) / count
    if job.source.staging_bytes:  # what was read were whole row groups
        staging_seconds *= len(job.source) / job.source.rows_per_read / count
    if not encoded:
        raise RunError(f"none of {count} images tried from {job.source.folder} can be decoded")
    sizes = {}
    for rung, mean in zip(job.paths, np.mean(encoded, axis=0), strict=True):
        records = len(job.order) * (beton.SAMPLE.itemsize + beton.ALLOCATION.itemsize)
        pages = len(job.order) * mean * (1 + mean / 2 / beton.PAGE_SIZE)
        sizes[rung] = int(pages + records + 2 * beton.PAGE_SIZE)
    return sizes, seconds, staging_seconds


def convert(job, *, workers, skip_corrupt, later):
    """Write every rung of one split, from where an earlier run stopped. later: {split: images} that come after it."""
    folder = os.path.dirname(job.journal) or "."
    with disk_errors(folder):
        os.makedirs(folder, exist_ok=True)
        job.source.stage(job.staging, partial(print, f"{job.split}:", flush=True))
    fingerprint = [[m["settings"] | {"max_side": 0}, m["source"]] for m in job.manifests.values()][0]
    fingerprint.append(f"OpenCV {cv2.__version__}, simplejpeg {simplejpeg.__version__}")
    ladder = LadderWriter(paths=job.paths, journal=job.journal, capacity=len(job.order), fingerprint=fingerprint)
    try:
        if ladder.started_over:
            print(f"{job.split}: starting over: {ladder.started_over}", flush=True)
        elif ladder.done:
            print(f"{job.split}: continuing after {ladder.done} images", flush=True)
        if ladder.skipped and not skip_corrupt:
            _refuse_corrupt(job.source.place(ladder.skipped[0]["id"]), ladder.skipped[0]["reason"])
        committed = time.monotonic()
        rest = job.order[ladder.done :]
        with closing(encode_all(job, rest, workers)) as samples:
            shown = show_progress(samples, job.split, ladder.done, len(job.order), later)
            for sample_id, label, pictures, remark in shown:
                if not isinstance(pictures, str):
                    ladder.add(label=label, pictures=dict(zip(job.paths, pictures, strict=True)))
                    if remark:
                        ladder.note(sample_id=sample_id, remark=remark)
                elif skip_corrupt:
                    ladder.skip(sample_id=sample_id, reason=pictures)
                else:
                    ladder.commit()
                    _refuse_corrupt(job.source.place(sample_id), pictures)
                if time.monotonic() - committed > COMMIT_SECONDS:
                    ladder.commit()
                    committed = time.monotonic()
        ladder.commit()
        written = sum(os.path.getsize(f"{path}.partial") for path in job.paths.values())
        print(f"{job.split}: every image is written; reading {_bytes(written)} again for the checksums", flush=True)
        ladder.finish(job.manifests)
    finally:
        ladder.close()
    shutil.rmtree(job.staging, ignore_errors=True)
    for path in job.paths.values():
        print(f"wrote {path} ({_bytes(os.path.getsize(path))}, {len(ladder.labels)} images)", flush=True)
    for entry in ladder.skipped:
        print(f"skipped {entry['id']}: {entry['reason']}", flush=True)
    for entry in ladder.odd[:LISTED]:
        print(f"taken all the same: {entry['id']} {entry['remark']}", flush=True)
    if len(ladder.odd) > LISTED:
        print(f"and {len(ladder.odd) - LISTED} more, listed in the manifests", flush=True)


def show_progress(samples, split, done, total, later):
    """Pass `samples` on, with a bar on a terminal and a line now and then elsewhere.

    later: {split: images} of those to come, which the time that is left is told with, too.
    """
    started = said = time.monotonic()
    bar = tqdm(
        desc=split,
        initial=done,
        total=total,
        unit="img",
        unit_scale=True,
        smoothing=0.05,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        for k, sample in enumerate(samples, 1):
            yield sample
            bar.update()
            now = time.monotonic()
            if now - said < (1 if not bar.disable else 10) and done + k < total:
                continue
            said, rate, left = now, k / (now - started), total - done - k
            whole = f"{duration((left + sum(later.values())) / rate)} left with {', '.join(later)}" if later else ""
            bar.set_postfix_str(whole)
            if bar.disable:
                text = f"{split}: {done + k}/{total} images, {rate:.0f} images/s, {duration(left / rate)} left"
                print(f"{text} ({whole})" if later else text, file=sys.stderr, flush=True)


def _splits(cfg):
    splits = [split.strip() for split in cfg.source.splits.split(",")]
    if (
        not all(splits)
        or len(set(splits)) < len(splits)
        or any(os.sep in split or split in (".", "..") for split in splits)
    ):
        raise UsageError(f"source.splits must be different folder names, comma-separated, not {cfg.source.splits!r}")
    for split in splits:
        if split_of(split) not in (None, split):
            raise UsageError(f"source.splits={cfg.source.splits}: say {split_of(split)}, which finds {split}/ too; "
                             "training looks for that name")  # fmt: skip
    return splits


def _rungs(cfg):
    rungs = sorted(cfg.out.resolutions)
    if len(set(rungs)) < len(rungs):
        raise UsageError(f"out.resolutions names a size twice: {','.join(map(str, cfg.out.resolutions))}")
    return rungs


def _same_classes(root, split, source):
    """Labels are positions in a sorting, so one missing folder would shift the labels of all that follow."""
    for other in ("train", "val"):
        theirs = None if other == split else split_classes(root, other)
        if theirs is None:
            continue
        ours = {c["wnid"] for c in source.classes}
        if theirs != ours:
            name, *others = sorted(theirs ^ ours)
            here, there = (split, other) if name in ours else (other, split)
            more = f" ({len(others)} more classes differ)" if others else ""
            raise RunError(f"class {name} is in {here} but not in {there} of {root}{more}; the labels would not agree")


def _already_written(path, manifest, journal):
    if not os.path.exists(path):
        return False
    written = beton.read_manifest(path)
    if written is None:
        if os.path.exists(journal):
            return False  # ours: interrupted just before its manifest
        raise RunError(f"{path} exists without a manifest of ours; remove it or choose another out.dir")
    for key, value in manifest.items():
        before = written.get(key)
        if before != value:
            what = f"from another {key}" if key != "settings" else _changed(before or {}, value)
            raise RunError(f"{path} was written {what}; remove it and its .json, or choose another out.dir")
    print(f"{path} is already written")
    return True


def _changed(before, settings):
    """The first of `settings` that is not as `before`, as text."""
    key = next(key for key in settings if before.get(key) != settings[key])
    return f"with {key}={before.get(key)}, and is asked for with {key}={settings[key]}"


def _refuse_corrupt(path, reason):
    raise RunError(f"cannot decode {path}: {reason}; replace it and run the same command again, or leave such images "
                   "out with source.skip_corrupt=true")  # fmt: skip


def _stop(number, frame):
    raise RunError(f"stopped by {signal.Signals(number).name}; run the same command again to continue")


def _folder_bytes(folder):
    return sum(os.path.getsize(os.path.join(top, name)) for top, _, names in os.walk(folder) for name in names)


def _bytes(count):
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000


if __name__ == "__main__":
    run(main)
