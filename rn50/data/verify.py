"""Checks a whole .beton file: structure, checksum, and that every stored JPEG decodes."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from rn50.data.beton import RAW, read_info, summarise
from rn50.data.pictures import decode_stored
from rn50.files import sha256


def verify(path, *, quick=False, progress=iter):
    """Check the whole file, or with `quick` the structure and 200 images spread over it, in all cores.

    Returns (BetonInfo, problems), each problem one line. RunError where the structure is already broken.
    `progress` wraps the list of blocks that are worked on.
    """
    info = read_info(path)
    problems = _structure_problems(info)
    chosen = np.arange(info.num_samples)
    if quick and info.num_samples > 200:
        chosen = np.linspace(0, info.num_samples - 1, 200).astype(int)
    blocks = np.array_split(chosen, max(1, len(chosen) // 50))
    file = os.open(info.path, os.O_RDONLY)
    try:
        # Threads are enough: the decoder works outside Python's lock.
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            checksum = None if quick or info.manifest is None else threads.submit(sha256, info.path)
            work = [threads.submit(_block_problems, info, file, block) for block in blocks]
            try:
                for block in progress(work):
                    problems += block.result()
                if checksum and checksum.result() != info.manifest["beton"]["sha256"]:
                    problems.insert(0, "the checksum is not the manifest's: bytes have changed since it was written")
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        os.close(file)
    return info, problems


def _structure_problems(info):
    problems = []
    first, last = info.data_ptrs // info.page_size, (info.data_ptrs + info.sizes - 1) // info.page_size
    if (first != last).any():
        problems.append(f"sample {int(np.argmax(first != last))} crosses a page")
    order = np.argsort(info.data_ptrs)
    overlap = (info.data_ptrs + info.sizes)[order][:-1] > info.data_ptrs[order][1:]
    if overlap.any():
        problems.append(f"sample {int(order[np.argmax(overlap)])} overlaps the next one")
    if info.manifest:
        for key, value in summarise(info.widths, info.heights, info.labels, info.num_classes).items():
            if info.manifest.get(key) != value:
                problems.append(f"{key} is not what the manifest says")
        side = info.manifest["settings"]["max_side"]
        if max(info.widths.max(), info.heights.max()) > side:
            problems.append(f"an image is larger than the manifest's {side} pixels")
    return problems


def _block_problems(info, file, block):
    problems = []
    for k in block:
        if info.modes[k] == RAW:
            continue  # any bytes are pixels; only the checksum can tell
        data = os.pread(file, int(info.sizes[k]), int(info.data_ptrs[k]))
        try:
            decode_stored(data, int(info.heights[k]), int(info.widths[k]))
        except ValueError as error:
            problems.append(f"sample {k} (label {info.labels[k]}) is corrupt: {error}")
    return problems
