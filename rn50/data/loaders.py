"""FFCV loaders that cannot hang: errors reach the training loop, threads are always joined.

FFCV 1.0.2 loses an exception of its loader thread (`next` then blocks for ever), leaks the thread and its
buffers when an iterator is abandoned, and sets torch's thread count as it is imported and built.
"""

import os
import queue
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from rn50 import schedules
from rn50.data.beton import check_other_split, read_info, refuse_mixed
from rn50.data.decode import CenterCropDecoder, LabelDecoder, RandomCropDecoder
from rn50.data.order import page_aware_order, random_order
from rn50.data.stock import (
    Compiler,
    EpochIterator,
    Graph,
    IntField,
    Loader,
    PipelineSpec,
    RGBImageField,
    ToDevice,
    ToTensor,
    ToTorchImage,
    epoch_iterator,
)
from rn50.errors import RunError
from rn50.machine import memory_bytes

# A rung's short side over the evaluation's resolution from which a smaller stored image is taken to lose nothing.
# Networks lost 0.8 to 1.5 points when evaluated from images of the evaluation's size, -0.1 to 0.5 from images 1.6 times
# as large (studies/decode_accuracy).
EVALUATION_MARGIN = 1.6
# Above this share of memory the page cache cannot hold the file beside what training needs.
RANDOM_ORDER_MEMORY_SHARE = 0.6
PAGES_IN_WINDOW = 64
# Seconds that a loader thread gets to finish the batch it is at.
STOP_PATIENCE = 10.0


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
        raise RunError(f"no {split}_SIZE.beton in {folder}; write_dataset.py makes them")
    rungs = {side: read_info(paths[side]) for side in sorted(paths)}
    refuse_mixed(list(rungs.values()))
    check_other_split(rungs[max(rungs)])
    return rungs


def training_rung(rungs, resolution, rung):
    """The side to train from: `rung` itself, or on `auto` what schedules.rung says."""
    if rung != "auto":
        if rung not in rungs:
            raise RunError(f"data.rung={rung} is not among the rungs there are: {', '.join(map(str, rungs))}")
        return rung
    return schedules.rung(resolution, short_sides(rungs))


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
    """The rungs of one split, {max side: BetonInfo}, and one loader for each that is ever read."""

    def __init__(self, folder, split, make_loader):
        self.rungs = find_rungs(folder, split)
        self._make_loader, self._loaders = make_loader, {}

    @property
    def info(self):
        """The largest rung's; classes and number of images are the same in all."""
        return self.rungs[max(self.rungs)]

    def loader(self, side):
        if side not in self._loaders:
            self._loaders[side] = self._make_loader(self.rungs[side])
        return self._loaders[side]


class BetonLoader:
    """One FFCV loader for one file, kept for the whole run: samples, epoch and resolution are given per pass.

    `timeout`: seconds after which a batch that has not come is an error.
    """

    def __init__(self, info, decoder, *, batch_size, device, timeout):
        self.info, self.decoder, self.timeout = info, decoder, timeout
        # FFCV asks whether there is a GPU, not whether the batches go there; in a forked process CUDA cannot begin
        epoch_iterator.IS_CUDA = device.type == "cuda"
        to_device = ToDevice(device, non_blocking=True)
        self.loader = _Loader(
            {
                "image": [decoder, ToTensor(), to_device, ToTorchImage()],
                "label": [LabelDecoder(info), ToTensor(), ToDevice(device, non_blocking=True)],
            },
            batch_size=batch_size,
            read_ahead=_ReadAhead(info),
        )

    @contextmanager
    def batches(self, samples, resolution, *, epoch=0, read_ahead=False):
        """`with loader.batches(samples, resolution) as batches:` iterates over the sample indices in that order.

        Yields (images uint8 [n, 3, resolution, resolution] channels_last, labels int64 [n]) on the device, valid
        until the next batch is asked for. `epoch` chooses the crops of a training loader. `read_ahead`: `samples` go
        page by page, so the pages that come next are worth reading now. Whatever ends the block, the loader thread is
        joined. Raises RunError if the thread fails or no batch comes for `timeout` seconds.
        """
        self.decoder.size, self.decoder.epoch = resolution, epoch
        self.loader.memory_manager.enabled = read_ahead
        torch_threads = torch.get_num_threads()
        # the thread could not write into buffers that a caller's inference mode had made
        with torch.inference_mode(False):
            iterator = _Iterator(self.loader, samples)
        torch.set_num_threads(torch_threads)
        try:
            yield self._guarded(iterator)
        finally:
            iterator.stop()

    def _guarded(self, iterator):
        waiting_since = time.monotonic()
        while True:
            try:
                item = iterator.output_queue.get(timeout=0.2)
            except queue.Empty:
                if not iterator.is_alive() and iterator.output_queue.empty():
                    raise RunError(f"reading {self.info.path} failed: {iterator.describe_error()}") from iterator.error
                if time.monotonic() - waiting_since > self.timeout:
                    raise RunError(
                        f"no batch from {self.info.path} for {self.timeout:.0f} s: the disk is too slow or gone, "
                        "or data.timeout_minutes is too small"
                    ) from None
                continue
            if item is None:
                return
            images, labels = iterator.received(item)
            yield images, labels.view(-1)
            waiting_since = time.monotonic()


class _Loader(Loader):
    """FFCV's pipeline for decoders that need no compiling.

    Loader.__init__ is not called: it fills Python dictionaries with every sample (half a gigabyte for ImageNet) and
    compiles for ten seconds.
    """

    def __init__(self, pipelines, *, batch_size, read_ahead):
        self.batch_size, self.batches_ahead, self.num_workers = batch_size, 3, 1
        self.memory_manager = read_ahead
        self.reader = SimpleNamespace(metadata={"f0": None, "f1": None})
        specs = {name: PipelineSpec(name, transforms=operations) for name, operations in pipelines.items()}
        handlers, numbers = {"image": RGBImageField(), "label": IntField()}, {"image": 0, "label": 1}
        self.graph = Graph(specs, handlers, numbers, self.reader.metadata, None)
        compiling = Compiler.is_enabled
        Compiler.set_enabled(False)
        try:
            self.generate_code()
        finally:
            Compiler.set_enabled(compiling)


class _ReadAhead:
    """In FFCV's place for a memory manager: asks the system for the pages of the next window while this one is read.

    Pages come evenly over the epoch, a window (PAGES_IN_WINDOW) before they are needed.
    """

    state = None

    def __init__(self, info):
        self._file = os.open(info.path, os.O_RDONLY)
        self._page_size, self._page_of = info.page_size, info.data_ptrs // info.page_size
        self.enabled = False

    def schedule_epoch(self, batches):
        self._pages, self._asked, self._batches = [], 0, len(batches)
        if self.enabled:
            pages = self._page_of[np.concatenate(batches)]
            _, first = np.unique(pages, return_index=True)
            self._pages = pages[np.sort(first)].tolist()
        return self

    def start_batch(self, number):
        wanted = PAGES_IN_WINDOW + len(self._pages) * (number + 1) // self._batches
        for page in self._pages[self._asked : wanted]:
            os.posix_fadvise(self._file, page * self._page_size, self._page_size, os.POSIX_FADV_WILLNEED)
        self._asked = max(self._asked, wanted)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def __del__(self):
        os.close(self._file)


class _Iterator(EpochIterator):
    error = None

    def start(self):
        self._copied = [None] * len(self.cuda_streams)
        for stream in self._streams():
            # FFCV's buffers are of memory that work under way may still use
            stream.wait_stream(self.current_stream)
        super().start()

    def run(self):
        try:
            for stream in self._streams()[:1]:
                # a thread begins at GPU 0 and would open a context there
                torch.cuda.set_device(stream.device)
            super().run()
        except BaseException as error:
            self.error = error

    def run_pipeline(self, b_ix, batch_indices, batch_slot, cuda_event):
        # FFCV has the GPU wait before it overwrites a batch there. The pinned memory that the batch was copied from is
        # written by the host, which may be several batches ahead of the GPU.
        if self._copied[batch_slot] is not None:
            self._copied[batch_slot].synchronize()
        result = super().run_pipeline(b_ix, batch_indices, batch_slot, cuda_event)
        if self._streams():
            # blocking: sleep while waiting, where others decode
            self._copied[batch_slot] = torch.cuda.Event(blocking=True)
            self._copied[batch_slot].record(self.cuda_streams[batch_slot])
        return result

    def _streams(self):
        return [stream for stream in self.cuda_streams if stream is not None]

    def describe_error(self):
        return f"{type(self.error).__name__}: {self.error}" if self.error else "the loader thread ended early"

    def received(self, item):
        """What EpochIterator.__next__ does with an item of the queue: wait for its copy to the device."""
        slot, result = item
        if self.cuda_streams[slot] is not None:
            self.current_stream.wait_stream(self.cuda_streams[slot])
        return result

    def stop(self):
        """End the thread wherever it is and let its buffers go; one that is stuck in a read is left behind."""
        self.close()
        give_up = time.monotonic() + STOP_PATIENCE
        while self.is_alive() and time.monotonic() < give_up:
            # the thread's last put has no timeout: make room for it
            try:
                self.output_queue.get_nowait()
            except queue.Empty:
                self.join(timeout=0.05)
        self.closed = True
        # torch would give the buffers to others while a batch that nobody asked for is still copied
        while not all(stream.query() for stream in self._streams()) and time.monotonic() < give_up:
            time.sleep(0.01)
        self.memory_allocations = None
