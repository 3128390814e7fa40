"""FFCV loaders that cannot hang: errors reach the training loop, threads are always joined.

FFCV 1.0.2 loses an exception of its loader thread (`next` then blocks for ever), leaks the thread and its
buffers when an iterator is abandoned, and sets torch's thread count as it is imported and built.
"""

import os
import queue
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

_torch_threads = torch.get_num_threads()

from ffcv.fields.basics import IntDecoder  # noqa: E402 - importing ffcv sets torch to one thread
from ffcv.fields.rgb_image import CenterCropRGBImageDecoder, RandomResizedCropRGBImageDecoder  # noqa: E402
from ffcv.loader import Loader  # noqa: E402
from ffcv.loader.epoch_iterator import EpochIterator  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402
from ffcv.transforms import RandomHorizontalFlip, ToDevice, ToTensor, ToTorchImage  # noqa: E402
from ffcv.traversal_order.base import TraversalOrder  # noqa: E402

from rn50.beton import read_info  # noqa: E402
from rn50.errors import RunError  # noqa: E402
from rn50.order import page_aware_order, random_order  # noqa: E402

torch.set_num_threads(_torch_threads)

# A rung's short side over the training resolution from which a smaller stored image is taken to lose nothing:
# at 1.6 the mean random crop (72 % of a side) still has more pixels than the output.
TRAIN_MARGIN = 1.6
# Above this share of memory the page cache cannot hold the file beside what training needs.
RANDOM_ORDER_MEMORY_SHARE = 0.6
PAGES_IN_WINDOW = 64
# Seconds that a loader thread gets to finish the batch it is at.
STOP_PATIENCE = 10.0


def find_rungs(folder, split):
    """{max side length in pixels: BetonInfo} of the files folder/{split}_{side}.beton, smallest side first.

    Raises RunError when there is none or one is damaged.
    """
    paths = {
        int(path.stem.removeprefix(f"{split}_")): path
        for path in Path(folder).glob(f"{split}_*.beton")
        if path.stem.removeprefix(f"{split}_").isdigit()
    }
    if not paths:
        raise RunError(f"no {split}_SIZE.beton in {folder}; write_dataset.py makes them")
    return {side: read_info(paths[side]) for side in sorted(paths)}


def training_rung(rungs, resolution, rung):
    """The side to train from: `rung` itself, or on `auto` the smallest that is large enough for `resolution`."""
    if rung != "auto":
        if rung not in rungs:
            raise RunError(f"data.rung={rung} is not among the rungs there are: {', '.join(map(str, rungs))}")
        return rung
    return _smallest(rungs, TRAIN_MARGIN * resolution)


def validation_rung(rungs, resolution, crop_ratio, *, warn):
    """The smallest rung whose median short side covers resolution / crop_ratio, else the largest and a `warn`ing."""
    side = _smallest(rungs, resolution / crop_ratio)
    if rungs[side].median_short_side < resolution / crop_ratio:
        warn(
            f"evaluation at {resolution} px enlarges the stored images "
            f"(largest rung {side}, median short side {rungs[side].median_short_side:.0f} px)"
        )
    return side


def _smallest(rungs, short_side):
    return next((side for side, info in rungs.items() if info.median_short_side >= short_side), max(rungs))


def choose_order(info, order):
    """`random` or `page`: as given, or on `auto` by whether the file fits in 60 % of the memory there is."""
    if order != "auto":
        return order
    return "random" if info.bytes <= RANDOM_ORDER_MEMORY_SHARE * memory_bytes() else "page"


def epoch_order(info, order, *, seed, epoch):
    """The global order of an epoch: int64 permutation of range(num_samples)."""
    if order == "random":
        return random_order(info.num_samples, seed=seed, epoch=epoch)
    pages = (info.data_ptrs // info.page_size).astype(np.int64)
    return page_aware_order(pages, seed=seed, epoch=epoch, pages_in_window=PAGES_IN_WINDOW)


def memory_bytes():
    """Memory this process may use: the machine's, or its control group's if that is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):
            continue
    return total


def training_loader(info, *, batch_size, crop_scale, device, workers, timeout):
    """Random resized crop (area within `crop_scale`, ratio 3/4 to 4/3) and horizontal flip."""
    decoder = RandomResizedCropRGBImageDecoder((32, 32), scale=tuple(crop_scale))
    return BetonLoader(
        info, decoder, [RandomHorizontalFlip()], batch_size=batch_size, device=device, workers=workers, timeout=timeout
    )


def evaluation_loader(info, *, batch_size, crop_ratio, device, workers, timeout):
    """The centre square of `crop_ratio` x the short side, resized: torchvision's Resize(r / ratio), CenterCrop(r)."""
    decoder = CenterCropRGBImageDecoder((32, 32), ratio=crop_ratio)
    return BetonLoader(info, decoder, [], batch_size=batch_size, device=device, workers=workers, timeout=timeout)


class Ladder:
    """The rungs of one split, {max side: BetonInfo}, and one loader for each that is ever read.

    `make_loader(info)` builds a loader; its ten seconds of compilation are spent when a rung is first needed.
    """

    def __init__(self, folder, split, make_loader):
        self.rungs = find_rungs(folder, split)
        self._make_loader, self._loaders = make_loader, {}

    def loader(self, side):
        if side not in self._loaders:
            self._loaders[side] = self._make_loader(self.rungs[side])
        return self._loaders[side]


class BetonLoader:
    """One FFCV loader for one file, kept for the whole run: samples and resolution are given per epoch.

    `workers`: threads that decode. `timeout`: seconds after which a batch that has not come is an error.
    """

    def __init__(self, info, decoder, transforms, *, batch_size, device, workers, timeout):
        self.info, self.decoder, self.timeout = info, decoder, timeout
        self.order = _GivenOrder()
        torch_threads = torch.get_num_threads()
        self.loader = _Loader(
            str(info.path),
            batch_size=batch_size,
            num_workers=workers,
            order=self.order,
            drop_last=False,
            pipelines={
                "image": [decoder, *transforms, ToTensor(), ToDevice(device, non_blocking=True), ToTorchImage()],
                "label": [IntDecoder(), ToTensor(), ToDevice(device, non_blocking=True)],
            },
        )
        torch.set_num_threads(torch_threads)

    @contextmanager
    def batches(self, samples, resolution):
        """`with loader.batches(samples, resolution) as batches:` iterates over the sample indices in that order.

        Gives (images uint8 [n, 3, resolution, resolution] channels_last, labels int64 [n]) on the device, valid
        until the next batch is asked for. Whatever ends the block, the loader thread is joined. Raises RunError
        if the thread fails or no batch comes for `timeout` seconds.
        """
        self.decoder.output_size = (resolution, resolution)
        self.order.samples = samples
        torch_threads = torch.get_num_threads()
        # the thread could not write into buffers that a caller's inference mode had made
        with torch.inference_mode(False):
            iterator = iter(self.loader)
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


class _GivenOrder(TraversalOrder):
    """The samples that the epoch was given. FFCV calls an order that it was handed with the loader, hence __call__."""

    def __init__(self):
        self.samples = None

    def __call__(self, loader):
        self.samples = loader.indices
        return self

    def sample_order(self, epoch):
        return self.samples


class _Loader(Loader):
    def __iter__(self):
        Compiler.set_num_threads(self.num_workers)
        return _Iterator(self, self.next_traversal_order())


class _Iterator(EpochIterator):
    error = None

    def run(self):
        try:
            super().run()
        except BaseException as error:
            self.error = error

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
        self.memory_allocations = None
