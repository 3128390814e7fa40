"""The fast path: FFCV operations that decode only the part of each image that its crop needs.

docs/fast_path.md explains it. They are plain Python that makes one call of compiled code for a batch, so FFCV has
nothing to compile: no pause at the start or when the resolution changes.
"""

from dataclasses import replace

import numpy as np

from rn50.data import native
from rn50.data.beton import RAW
from rn50.data.pictures import decode_stored
from rn50.data.stock import AllocationQuery, IntDecoder, SimpleRGBImageDecoder
from rn50.errors import RunError
from rn50.seeded import CROPS, uniforms

ATTEMPTS = 10
RATIO = (3 / 4, 4 / 3)


def random_crops(widths, heights, samples, *, size, scale, ratio=RATIO, seed, epoch):
    """torchvision's RandomResizedCrop and RandomHorizontalFlip for a batch: native.CROP [n].

    widths, heights: pixels [n] of the stored images. `size`: pixels of the output's side. `scale`: range of the share
    of the area. `ratio`: range of width over height, uniform in its logarithm. Ten attempts, then the largest centre
    crop of an allowed ratio. The same (seed, epoch, sample) gives the same crop.
    """
    draws = uniforms(samples, 3 + 2 * ATTEMPTS, seed=seed, epoch=epoch, purpose=CROPS)
    wide, high = widths.astype(np.float64), heights.astype(np.float64)
    area = (wide * high)[:, None] * (scale[0] + draws[:, 3 : 3 + ATTEMPTS] * (scale[1] - scale[0]))
    low, spread = np.log(ratio[0]), np.log(ratio[1]) - np.log(ratio[0])
    aspect = np.exp(low + draws[:, 3 + ATTEMPTS :] * spread)
    tried_w, tried_h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (tried_w > 0) & (tried_w <= wide[:, None]) & (tried_h > 0) & (tried_h <= high[:, None])
    first = np.argmax(fits, axis=1)[:, None]
    found = fits.any(axis=1)
    w = np.where(found, np.take_along_axis(tried_w, first, 1)[:, 0], np.rint(np.minimum(wide, high * ratio[1])).clip(1))
    h = np.where(found, np.take_along_axis(tried_h, first, 1)[:, 0], np.rint(np.minimum(high, wide / ratio[0])).clip(1))
    x = np.where(found, np.floor(draws[:, 1] * (wide - w + 1)), (wide - w) // 2)
    y = np.where(found, np.floor(draws[:, 2] * (high - h + 1)), (high - h) // 2)
    crops = np.zeros(len(w), native.CROP)
    crops["x"], crops["y"], crops["scale_x"], crops["scale_y"] = x, y, w / size, h / size
    crops["x0"], crops["y0"], crops["x1"], crops["y1"] = x, y, x + w, y + h
    crops["flip"] = draws[:, 0] < 0.5
    return crops


def center_crops(widths, heights, *, size, ratio):
    """torchvision's Resize(round(size / ratio)) and CenterCrop(size) for a batch: native.CROP [n]."""
    wide, high = widths.astype(np.float64), heights.astype(np.float64)
    short, shorter = round(size / ratio), np.minimum(wide, high)
    resized_w, resized_h = np.floor(short * wide / shorter), np.floor(short * high / shorter)
    crops = np.zeros(len(wide), native.CROP)
    crops["scale_x"], crops["scale_y"] = wide / resized_w, high / resized_h
    crops["x"] = np.rint((resized_w - size) / 2) * crops["scale_x"]
    crops["y"] = np.rint((resized_h - size) / 2) * crops["scale_y"]
    crops["x1"], crops["y1"] = widths, heights
    return crops


class _CropDecoder(SimpleRGBImageDecoder):
    """Decoder of the images of one .beton file. `size` (pixels) may change from epoch to epoch.

    It derives from SimpleRGBImageDecoder because FFCV would put that one in front of any other operation.
    """

    def __init__(self, info, *, threads):
        super().__init__()
        self.info, self.threads, self.size = info, threads, 32
        self._file = np.memmap(info.path, np.uint8, mode="r")

    def crops(self, samples, widths, heights):
        raise NotImplementedError

    def declare_state_and_memory(self, previous_state):
        shape, dtype = (self.size, self.size, 3), np.dtype("u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self):
        def decode(samples, out, metadata, storage_state):
            self.decode(np.asarray(samples, np.int64), out)
            return out

        return decode

    def decode(self, samples, out, *, nanoseconds=None):
        """The images of `samples`, int64 [n], into out, uint8 [n, size, size, 3]. RunError names a corrupt one."""
        info, widths, heights = self.info, self.info.widths[samples], self.info.heights[samples]
        crops = self.crops(samples, widths, heights)
        addresses = self._file.ctypes.data + info.data_ptrs[samples]
        stored = (info.sizes[samples], widths, heights)
        raw = info.modes[samples] == RAW
        status = native.decode_batch(addresses, *stored, raw, crops, out, threads=self.threads, nanoseconds=nanoseconds)
        for k in np.flatnonzero(status):
            self._decode_otherwise(int(samples[k]), int(status[k]), crops[k : k + 1], out[k : k + 1])

    def _decode_otherwise(self, sample, status, crop, out):
        """What the compiled decoder left: libjpeg-turbo decodes it whole, or says what is wrong with it."""
        info = self.info
        if status == native.NO_MEMORY:
            raise RunError(f"no memory left to decode sample {sample}; lower training.micro_batch or data.workers")
        try:
            if status == native.CORRUPT:
                raise ValueError("its entropy-coded data does not fit its table")
            start = int(info.data_ptrs[sample])
            data = self._file[start : start + int(info.sizes[sample])].tobytes()
            rgb = decode_stored(data, int(info.heights[sample]), int(info.widths[sample]))
        except ValueError as error:
            raise RunError(
                f"sample {sample} (label {info.labels[sample]}) is corrupt: {error}; "
                f"tools/verify_beton.py {info.path} lists all such"
            ) from None
        one = np.uint64([rgb.ctypes.data]), np.uint64([rgb.nbytes]), info.widths[[sample]], info.heights[[sample]]
        if native.decode_batch(*one, np.uint8([1]), crop, out, threads=1).any():
            raise RunError(f"no memory left to resize sample {sample}")


class RandomCropDecoder(_CropDecoder):
    """Random resized crop and horizontal flip, by (seed, epoch, sample). Set `epoch` before each epoch."""

    def __init__(self, info, *, scale, seed, threads):
        super().__init__(info, threads=threads)
        self.scale, self.seed, self.epoch = tuple(scale), seed, 0

    def crops(self, samples, widths, heights):
        return random_crops(
            widths, heights, samples, size=self.size, scale=self.scale, seed=self.seed, epoch=self.epoch
        )


class CenterCropDecoder(_CropDecoder):
    """Antialiased resize and centre crop; `ratio` is the crop's side over the resized short side."""

    def __init__(self, info, *, ratio, threads):
        super().__init__(info, threads=threads)
        self.ratio = ratio

    def crops(self, samples, widths, heights):
        return center_crops(widths, heights, size=self.size, ratio=self.ratio)


class LabelDecoder(IntDecoder):
    """Labels, without code to compile."""

    def __init__(self, info):
        super().__init__()
        self.labels = info.labels

    def generate_code(self):
        def decode(samples, out, metadata, storage_state):
            out[:, 0] = self.labels[samples]
            return out

        return decode
