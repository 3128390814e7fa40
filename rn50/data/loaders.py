"""Batches of a ladder of .beton files: TrainingLoader and EvaluationLoader, and what they are made of.

docs/loader.md shows how another training script uses them; train_imagenet.py uses the same.
"""

import warnings
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from rn50 import schedules
from rn50.data.beton import check_other_split, fingerprint, read_info, refuse_mixed
from rn50.data.beton_loader import BetonLoader
from rn50.data.decode import CenterCropDecoder, RandomCropDecoder
from rn50.data.order import (
    PAGES_IN_WINDOW,
    evaluation_share,
    page_aware_order,
    random_order,
    rank_positions,
    steps_per_epoch,
)
from rn50.errors import RunError, UsageError
from rn50.machine import cores, memory_bytes

# A rung's short side over the evaluation's resolution from which a smaller stored image is taken to lose nothing.
# Networks lost 0.8 to 1.5 points when evaluated from images of the evaluation's size, -0.1 to 0.5 from images 1.6 times
# as large (studies/decode_accuracy).
EVALUATION_MARGIN = 1.6
# Above this share of memory the page cache cannot hold the file beside what training needs.
RANDOM_ORDER_MEMORY_SHARE = 0.6
# What a state of TrainingLoader holds beside the settings and files that the next loader must share.
POSITION = ("epoch", "step", "reading")


def find_rungs(folder, split):
    """{max side length in pixels: BetonInfo} of the files folder/{split}_{side}.beton, smallest side first.

    Raises RunError when there is none, one is damaged, or they are not of one set of images and the classes of the
    other split.
    """
    paths = {
        int(path.stem.removeprefix(f"{split}_")): path
        for path in Path(folder).glob(f"{split}_*.beton")
        if path.stem.removeprefix(f"{split}_").isdigit()
    }
    if not paths:
        raise RunError(f"no {split}_SIZE.beton in {folder}: {_advice(Path(folder), split)}")
    rungs = {side: read_info(paths[side]) for side in sorted(paths)}
    refuse_mixed(list(rungs.values()))
    check_other_split(rungs[max(rungs)])
    return rungs


def _advice(folder, split):
    """What to do where `folder` has no .beton file of `split` under a name that training knows, as text."""
    if folder.is_file():
        return f"that is a file; give its folder: {folder.parent}"
    if not folder.is_dir():
        return "there is no such folder; data.dir is the one that write_dataset.py wrote to"
    here = sorted(path for path in folder.iterdir() if path.suffix in (".beton", ".ffcv"))
    near = [*folder.glob(f"*/{split}_*.beton"), *folder.absolute().parent.glob(f"{split}_*.beton")]
    if mine := [path.name for path in here if path.name.startswith(split)]:
        return f"rename {mine[0]} to {split}_SIZE.beton, where SIZE is the longest side of its images in pixels"
    if near:
        return f"they are in {min(near).parent}; give that folder"
    if here:
        return f"there is {here[0].name}; write_dataset.py converts {split}, too"
    if (folder / split).is_dir():
        return (
            f"it has images; convert them with write_dataset.py --source.dir={folder} --out.dir=BETONS, and give BETONS"
        )
    return "write_dataset.py makes them; data.dir is the folder that it wrote to"


def training_rung(rungs, resolution, rung):
    """The side to train from: `rung` itself, or on `auto` what schedules.rung says. RunError where it is not there."""
    if rung == "auto":
        return schedules.rung(resolution, short_sides(rungs))
    if rung not in rungs:
        folder = Path(next(iter(rungs.values())).path).parent
        raise RunError(
            f"no train_{rung}.beton in {folder} (there: {', '.join(map(str, rungs))}): make it with write_dataset.py "
            f"--out.resolutions={rung} from the same images, or train from what there is with --data.rung=auto"
        )
    return rung


def short_sides(rungs):
    """{max side length: median short side} of the files `rungs`, both in pixels."""
    return {side: info.median_short_side for side, info in rungs.items()}


def validation_rung(rungs, resolution, crop_ratio, *, warn):
    """The smallest rung with EVALUATION_MARGIN over resolution / crop_ratio, else the largest.

    `warn` is told where even that one's median image is enlarged.
    """
    enough = EVALUATION_MARGIN * resolution / crop_ratio
    side = next((side for side, info in rungs.items() if info.median_short_side >= enough), max(rungs))
    if rungs[side].median_short_side < resolution / crop_ratio:
        warn(
            f"evaluation at {resolution} px enlarges the stored images "
            f"(largest rung {side}, median short side {rungs[side].median_short_side:.0f} px)"
        )
    return side


def choose_order(info, order):
    """`random` or `page`: as given, or on `auto` by whether the file fits in 60 % of the memory there is.

    RunError where it is `page` and the file holds its images class by class.
    """
    if order == "auto":
        order = "random" if info.bytes <= RANDOM_ORDER_MEMORY_SHARE * memory_bytes() else "page"
    if order == "page" and stored_by_class(info):
        raise RunError(
            f"{info.path} holds its images class by class, as stock FFCV writes them: read page by page, a batch would "
            "see few classes. Write it with write_dataset.py, which shuffles; or, where the memory holds "
            f"{info.bytes / 1e9:.0f} GB, data.order=random"
        )
    return order


def stored_by_class(info):
    """Whether a window of pages sees few classes, or most images lie beside one of their own class.

    A window may have half as many pairs of one class more than a window of random images has.
    """
    if len(info.labels) < 2:
        return False
    labels = info.labels[np.argsort(info.data_ptrs, kind="stable")]
    by_chance = np.square(np.bincount(labels) / len(labels)).sum()
    beside = (labels[1:] == labels[:-1]).mean() > (1 + by_chance) / 2
    return bool(by_chance < 1 and (beside or _pairs_in_a_page(info) - by_chance > PAGES_IN_WINDOW * by_chance / 2))


def _pairs_in_a_page(info):
    """The share, among all pairs of images of one page, of those that are of one class."""
    pages = (info.data_ptrs // info.page_size).astype(np.int64)
    _, alike = np.unique(pages * (info.labels.max() + 1) + info.labels, return_counts=True)
    _, held = np.unique(pages, return_counts=True)
    return (alike * (alike - 1)).sum() / max(1, (held * (held - 1)).sum())


def epoch_order(info, order, *, seed, epoch):
    """The global order of an epoch: int64 permutation of range(num_samples)."""
    if order == "random":
        return random_order(info.num_samples, seed=seed, epoch=epoch)
    pages = (info.data_ptrs // info.page_size).astype(np.int64)
    return page_aware_order(pages, seed=seed, epoch=epoch, pages_in_window=PAGES_IN_WINDOW)


def training_loader(info, *, batch_size, crop_scale, seed, device, workers, timeout):
    """Random resized crop (area within `crop_scale`, ratio 3/4 to 4/3) and flip, by (seed, epoch, sample)."""
    decoder = RandomCropDecoder(info, scale=crop_scale, seed=seed, threads=workers)
    return BetonLoader(info, decoder, batch_size=batch_size, device=device, timeout=timeout)


def evaluation_loader(info, *, batch_size, crop_ratio, device, workers, timeout):
    """torchvision's Resize(round(resolution / crop_ratio)), antialiased, and CenterCrop(resolution)."""
    decoder = CenterCropDecoder(info, ratio=crop_ratio, threads=workers)
    return BetonLoader(info, decoder, batch_size=batch_size, device=device, timeout=timeout)


class Ladder:
    """The rungs of one split, {max side: BetonInfo}, and one BetonLoader for each that is ever read.

    make_loader: training_loader or evaluation_loader with what only that one takes.
    """

    def __init__(self, folder, split, make_loader, *, device, workers, timeout):
        self.rungs, self._loaders = find_rungs(folder, split), {}
        self._make_loader = partial(
            make_loader, device=torch.device(device), workers=workers or cores(), timeout=timeout
        )

    @property
    def info(self):
        """The largest rung's; classes and number of images are the same in all."""
        return self.rungs[max(self.rungs)]

    @cached_property
    def fingerprints(self):
        """{name of a rung's file: what changes with its images}."""
        return {Path(info.path).name: fingerprint(info) for info in self.rungs.values()}

    def _loader(self, side):
        if side not in self._loaders:
            self._loaders[side] = self._make_loader(self.rungs[side])
        return self._loaders[side]


class TrainingLoader(Ladder):
    """One rank's training images from folder/train_SIZE.beton, epoch by epoch; resumes at any step.

    batch_size: images of an optimizer step, over all ranks. micro_batch: images of one batch, by default this rank's
    part of a step; a smaller one gives `accumulation` batches a step. crop_scale: range of a random crop's share of the
    area. rung: the SIZE to read, or `auto` (schedules.rung). order: `random`, `page` for files beyond memory, or `auto`
    (choose_order). workers: decoding threads, 0 for as many as cores. timeout: seconds after which a batch that has not
    come is an error. UsageError where one of these is impossible, RunError where a file cannot be used.

    `epoch` and `step`, whole numbers from 0, are where reading goes on: they count steps that were handed out whole.
    `reading`, {"rung": SIZE, "order": "random" or "page"}, is what the epoch was begun with; None before the first.
    """

    def __init__(
        self,
        folder,
        *,
        batch_size,
        device,
        micro_batch=None,
        rank=0,
        world_size=1,
        seed=0,
        crop_scale=(0.08, 1.0),
        rung="auto",
        order="auto",
        workers=0,
        timeout=300.0,
    ):
        _check_rank(rank, world_size)
        micro_batch = batch_size // world_size if micro_batch is None else micro_batch
        if min(batch_size, micro_batch) < 1 or batch_size % (micro_batch * world_size):
            raise UsageError(
                f"batch_size={batch_size} is not a multiple of micro_batch={micro_batch} x world_size={world_size}"
            )
        if order not in ("auto", "random", "page"):
            raise UsageError(f"order={order} is none of auto, random and page")
        crop_scale = [float(share) for share in crop_scale]
        make_loader = partial(training_loader, batch_size=micro_batch, crop_scale=crop_scale, seed=seed)
        super().__init__(folder, "train", make_loader, device=device, workers=workers, timeout=timeout)
        self.batch_size, self.micro_batch, self.rank, self.world_size = batch_size, micro_batch, rank, world_size
        self.accumulation = batch_size // (micro_batch * world_size)
        self._settings = {"seed": seed, "batch_size": batch_size, "micro_batch": micro_batch}
        self._settings |= {"crop_scale": crop_scale, "rung": rung, "order": order}
        if rung != "auto":
            training_rung(self.rungs, None, rung)
        self.seek(0)

    @property
    def steps_per_epoch(self):
        """At least 1; images that fill no whole step are left out. RunError where there are fewer than batch_size."""
        images = self.info.num_samples
        if images < self.batch_size:
            raise RunError(
                f"batch_size={self.batch_size} is more than the {images} images there are: choose a smaller one, and a "
                "micro_batch that divides it"
            )
        return steps_per_epoch(images, self.batch_size)

    def side(self, resolution):
        """Which rung an epoch at `resolution` px reads: the max side of its images, in pixels."""
        return training_rung(self.rungs, resolution, self._settings["rung"])

    @contextmanager
    def batches(self, resolution):
        """`with loader.batches(128) as batches:` iterates over what is left of this epoch for this rank.

        Yields (images uint8 [micro_batch, 3, resolution, resolution] channels_last, labels int64 [micro_batch], samples
        int64 [micro_batch]): images and labels on the device, valid until the next batch is asked for; samples, in
        numpy, the images' numbers in the file, from which rn50.seeded draws augmentation that resuming does not change.
        With the epoch's last batch `epoch` counts up. The block may be left at any time and in any way: its thread is
        joined, and the next block goes on at the first step that was not handed out whole, from the file and in the
        order that the epoch was begun with. RunError where reading fails.
        """
        steps = self.steps_per_epoch
        if not self.step or self.reading is None:
            side = self.side(resolution)
            self.reading = {"rung": side, "order": choose_order(self.rungs[side], self._settings["order"])}
        side, order = self.reading["rung"], self.reading["order"]
        mine = rank_positions(
            epoch_order(self.rungs[side], order, seed=self._settings["seed"], epoch=self.epoch),
            batch_size=self.batch_size,
            micro_batch=self.micro_batch,
            rank=self.rank,
            world_size=self.world_size,
            first_step=self.step,
        )
        with self._loader(side).batches(mine, resolution, epoch=self.epoch, read_ahead=order == "page") as batches:
            yield self._counted(batches, mine.reshape(-1, self.micro_batch), steps)

    def _counted(self, batches, samples, steps):
        epoch, first = self.epoch, self.step
        for number, ((images, labels), those) in enumerate(zip(batches, samples, strict=True), start=1):
            # before handing the batch out: a state that is asked for after a step's last batch is to count the step
            epochs, self.step = divmod(first + number // self.accumulation, steps)
            self.epoch = epoch + epochs
            yield images, labels, those

    def seek(self, epoch, step=0, reading=None):
        """Go on at `step`, below steps_per_epoch, of `epoch`, as `reading` says; None: as for a new epoch."""
        self.epoch, self.step, self.reading = epoch, step, reading

    def state_dict(self):
        """Where reading goes on, and what the loader that goes on must share, in values that JSON has.

        The same on every rank, for any number of them. Batches count that were handed out, not those read ahead;
        between two batches of one step it is that step's begin.
        """
        reading = self.reading if self.step else None
        return {"epoch": self.epoch, "step": self.step, "reading": reading, **self._settings, **self.fingerprints}

    def load_state_dict(self, state):
        """Go on where `state` was taken. RunError names what does not fit: a setting that changes batches, or a file.

        device, rank, world_size, workers and timeout may be others, and so may the folder's path.
        """
        fixed = self._settings | self.fingerprints
        for key in fixed | state:
            theirs, mine = state.get(key, "missing"), fixed.get(key, "missing")
            if key not in POSITION and theirs != mine:
                raise RunError(f"the state is another loader's: {key} is {theirs} in it, and {mine} here")
        self.seek(state["epoch"], state["step"], state["reading"])


class EvaluationLoader(Ladder):
    """One rank's images of folder/val_SIZE.beton: every image once over all ranks, for any number of them.

    batch_size: images at a time. crop_ratio: side of the centre crop over the resized short side. workers, timeout: as
    TrainingLoader's. warn: is told where images are enlarged. UsageError or RunError as there.
    """

    def __init__(
        self,
        folder,
        *,
        batch_size,
        device,
        crop_ratio=0.875,
        rank=0,
        world_size=1,
        workers=0,
        timeout=300.0,
        warn=warnings.warn,
    ):
        _check_rank(rank, world_size)
        make_loader = partial(evaluation_loader, batch_size=batch_size, crop_ratio=crop_ratio)
        super().__init__(folder, "val", make_loader, device=device, workers=workers, timeout=timeout)
        self.batch_size, self.crop_ratio, self.rank, self.world_size = batch_size, crop_ratio, rank, world_size
        self._warn = warn

    @property
    def rounds(self):
        """Batches of rank 0, whose share is the largest: ranks that agree on something before each do so as often."""
        return -(-len(self._share(0)) // self.batch_size)

    def batches(self, resolution):
        """`with loader.batches(224) as batches:` iterates over this rank's share, in the file's order.

        Yields (images uint8 [n, 3, resolution, resolution] channels_last, labels int64 [n]) on the device, valid until
        the next batch is asked for; n is batch_size, and in the last batch what is left. Ends as TrainingLoader's.
        """
        side = validation_rung(self.rungs, resolution, self.crop_ratio, warn=self._warn)
        return self._loader(side).batches(self._share(self.rank), resolution)

    def _share(self, rank):
        return evaluation_share(self.info.num_samples, rank=rank, world_size=self.world_size)


def _check_rank(rank, world_size):
    if not 0 <= rank < world_size:
        raise UsageError(f"rank={rank} is not one of those that world_size={world_size} has, which count from 0")
