"""FFCV's loader for one .beton file, which cannot hang: errors reach the caller, threads are always joined.

FFCV 1.0.2 loses an exception of its loader thread (`next` then blocks for ever), leaks the thread and its
buffers when an iterator is abandoned, and sets torch's thread count as it is imported and built.
"""

import os
import queue
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch

from rn50.data.decode import LabelDecoder
from rn50.data.order import PAGES_IN_WINDOW
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

# Seconds that a loader thread gets to finish the batch it is at.
STOP_PATIENCE = 10.0


class BetonLoader:
    """One FFCV loader for one file, kept for the whole run: samples, epoch and resolution are given per pass.

    `timeout`: seconds after which a batch that has not come is an error.
    """

    def __init__(self, info, decoder, *, batch_size, device, timeout):
        self.info, self.decoder, self.timeout = info, decoder, timeout
        # FFCV asks whether there is a GPU, not whether the batches go there; in a forked process CUDA cannot begin
        epoch_iterator.IS_CUDA = device.type == "cuda"

        def to_device():
            # to where it is already, it would copy each batch all the same
            return [] if device.type == "cpu" else [ToDevice(device, non_blocking=True)]

        self.loader = _Loader(
            {
                "image": [decoder, ToTensor(), *to_device(), ToTorchImage()],
                "label": [LabelDecoder(info), ToTensor(), *to_device()],
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
