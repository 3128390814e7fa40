"""The compiled part of the fast path (csrc/decode.c) as functions of numpy arrays. Imports neither torch nor ffcv."""

import ctypes
import functools
import glob
import platform
from pathlib import Path

import numpy as np

from rn50.errors import RunError

# One record an image, laid out as struct crop is: output pixel i of a row covers the stored image from
# x + i * scale_x to x + (i + 1) * scale_x, and only pixels of [x0, x1) x [y0, y1) are looked at.
CROP = np.dtype(
    [(name, "<f8") for name in ("x", "y", "scale_x", "scale_y")]
    + [(name, "<i4") for name in ("x0", "y0", "x1", "y1", "flip", "unused")]
)
OK, CORRUPT, UNSUPPORTED, NO_MEMORY = range(4)
PHASES = ("header", "decode", "rows", "columns")  # what decode_batch times: the resize is two passes
# MCUs (16 pixels wide) between two entries of a JPEG's table: fewer waste less decoding, more make smaller files.
TILE = 6
_V3_FLAGS = {"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}


class _Batch(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("data", "bytes", "widths", "heights", "raw", "crops")],
        *[(name, ctypes.c_int32) for name in ("count", "size")],
        *[(name, ctypes.c_void_p) for name in ("out", "status", "nanoseconds")],
    ]


LAYOUT = (
    CROP.itemsize,
    CROP.fields["flip"][1],
    ctypes.sizeof(_Batch),
    _Batch.count.offset,
    _Batch.nanoseconds.offset,
    len(PHASES),
)


@functools.cache
def library():
    """The compiled library; RunError where it was not built, or from another version of its source."""
    name = "_decode_v3" if platform.machine() == "x86_64" and _cpu_flags() >= _V3_FLAGS else "_decode"
    found = glob.glob(str(Path(__file__).with_name(f"{name}.*.so")))
    if not found:
        raise RunError("rn50's C part is not built; run tools/setup.sh, or: pip install --no-deps -e .")
    loaded = ctypes.CDLL(found[0])
    try:
        layout = tuple((ctypes.c_int32 * len(LAYOUT)).in_dll(loaded, "rn50_layout"))
    except ValueError:
        layout = None
    if layout != LAYOUT:
        raise RunError(f"{found[0]} was built from another version of rn50; build it again: pip install --no-deps -e .")
    loaded.rn50_decode.argtypes = [ctypes.POINTER(_Batch), ctypes.c_int]
    loaded.rn50_index.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    loaded.rn50_index.restype = ctypes.c_int64
    return loaded


def _cpu_flags():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))


def index_jpeg(jpeg, tile=TILE):
    """The bytes to put behind a JPEG so that crops of it decode fast; none for a kind of JPEG that has no table.

    `tile`: MCUs between two entries, 1 to 255. The picture and its size for other decoders stay the same, because
    they stop at the end-of-image marker.
    """
    table = np.empty(len(jpeg) * 8 + 1024, np.uint8)
    size = library().rn50_index(jpeg, len(jpeg), tile, table.ctypes.data, table.size)
    return table[:size].tobytes() if size > 0 else b""


def decode_batch(addresses, sizes, widths, heights, raw, crops, out, *, threads, nanoseconds=None):
    """Crop, resize and mirror stored images into `out`; returns the status of each, int32 [n], OK where it went well.

    addresses, sizes: uint64 [n], where the bytes of each image lie in memory. widths, heights: uint16 [n], pixels.
    raw: uint8 [n], whether the bytes are RGB pixels instead of a JPEG. crops: CROP [n].
    out: uint8 [n, size, size, 3], contiguous. nanoseconds: int64 [len(PHASES)], which the time of each is added to
    (all threads together).
    """
    count, size = len(out), out.shape[1]
    arrays = [
        np.ascontiguousarray(array, dtype)
        for array, dtype in zip(
            (addresses, sizes, widths, heights, raw, crops), ("u8", "u8", "u2", "u2", "u1", CROP), strict=True
        )
    ]
    if any(len(array) != count for array in arrays) or out.shape != (count, size, size, 3):
        raise ValueError("the arrays of a batch must be of one length")
    if not out.flags.c_contiguous or out.dtype != np.uint8:
        raise ValueError("out must be contiguous uint8")
    status = np.zeros(count, np.int32)
    batch = _Batch(
        *[array.ctypes.data for array in arrays],
        count,
        size,
        out.ctypes.data,
        status.ctypes.data,
        nanoseconds.ctypes.data if nanoseconds is not None else None,
    )
    library().rn50_decode(ctypes.byref(batch), threads)
    return status
