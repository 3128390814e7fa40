"""Encoded pictures -> upright RGB: ordinary JPEG through libjpeg-turbo, everything else through PIL."""

import ctypes
import glob
import importlib.util
import io
import os
import threading
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from rn50.errors import RunError

# Pillow's limit for an error. A number of our own, because the app's code switches Pillow's off for its process.
MAX_PIXELS = 2 * 89_478_485
_turbojpeg_lock = threading.Lock()
_turbojpeg_library = None
_per_thread = threading.local()
_CMYK_COLORSPACES = (3, 4)  # TJCS_CMYK, TJCS_YCCK
_PIXEL_FORMAT_RGB = 0
# libjpeg's warnings about what changes no pixel, or what every decoder guesses alike. Pillow and OpenCV ignore them.
_HARMLESS = ("extraneous bytes", "unknown JFIF revision", "Unknown Adobe color transform", "Invalid SOS parameters")


def decode_image(data):
    """Encoded bytes -> upright RGB, uint8 (height, width, 3). ValueError says what is wrong with corrupt bytes.

    Ordinary JPEG goes through libjpeg-turbo (pixel-identical to OpenCV and PIL, and unlike them it reports damage);
    CMYK, other formats and pictures with EXIF data go through PIL. Transparency is dropped, as torchvision does.
    """
    if data[:2] == b"\xff\xd8" and b"Exif\0\0" not in data:
        rgb = decode_jpeg(data)
        if rgb is not None:
            return rgb
    return _decode_with_pil(data)


def decode_jpeg(data, *, strict=False):
    """JPEG bytes -> RGB, uint8 (height, width, 3); None for CMYK, which libjpeg-turbo cannot convert.

    ValueError for damaged data. Oddities that leave the picture whole are common in the wild, so only `strict` counts
    them as damage.
    """
    library, handle = _turbojpeg()
    width, height, subsampling, colorspace = (ctypes.c_int() for _ in range(4))
    fields = [ctypes.byref(field) for field in (width, height, subsampling, colorspace)]
    if library.tjDecompressHeader3(handle, data, len(data), *fields):
        problem = library.tjGetErrorStr2(handle).decode(errors="replace")
        if strict or not _is_harmless(problem):
            # It stays in the middle of this header, and would read every picture after it as the rest of this one.
            library.tjDestroy(handle)
            del _per_thread.handle
            raise ValueError(problem)
    if colorspace.value in _CMYK_COLORSPACES:
        return None
    if width.value * height.value > MAX_PIXELS:
        raise ValueError(f"{width.value}x{height.value} pixels are more than any picture has")
    rgb = np.empty((height.value, width.value, 3), np.uint8)
    if library.tjDecompress2(
        handle, data, len(data), rgb.ctypes.data, width.value, 0, height.value, _PIXEL_FORMAT_RGB, 0
    ):
        problem = library.tjGetErrorStr2(handle).decode(errors="replace")
        if strict or not _is_harmless(problem):
            raise ValueError(problem)
    return rgb


def _is_harmless(problem):
    return any(words in problem for words in _HARMLESS)


def _decode_with_pil(data):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(data))
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width}x{picture.height} pixels are more than any picture has")
            rgb = None
            if picture.format == "JPEG":
                rgb = decode_jpeg(data)  # PIL was asked for the orientation alone
            if rgb is None:
                picture.load()
                rgb = _to_rgb(picture)
            return np.ascontiguousarray(_upright(rgb, _orientation(picture)))
    except (ValueError, RunError):
        raise
    except UnidentifiedImageError:
        raise ValueError("not an image of any known format") from None  # PIL's text holds a memory address
    except Exception as error:  # PIL's plugins raise whatever their parsers run into
        raise ValueError(str(error) or type(error).__name__) from None


def _orientation(picture):
    try:
        return picture.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF data is common and says nothing about the pixels
        return 1


def _upright(rgb, orientation):
    """Undo EXIF's eight orientations: the first four keep width and height, the others swap them."""
    if orientation in (5, 6, 7, 8):
        rgb = rgb.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    return rgb


def _to_rgb(picture):
    if picture.mode.startswith("I"):
        # PIL clips 16 bits at 255, which turns most of a 16-bit picture white.
        gray = (np.asarray(picture).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no defined brightness; convert the picture to 8 bits")
    if picture.mode in ("P", "PA", "LA"):
        picture = picture.convert("RGBA")
    return np.asarray(picture.convert("RGB"))


def _turbojpeg():
    """The library that ffcv was built against, and this thread's decompressor.

    Loaded from ffcv's extension without importing ffcv, which would bring torch and numba (seconds, in every worker).
    """
    global _turbojpeg_library
    if not hasattr(_per_thread, "handle"):
        with _turbojpeg_lock:
            if _turbojpeg_library is None:
                _turbojpeg_library = _load_turbojpeg()
        _per_thread.handle = _turbojpeg_library.tjInitDecompress()
    return _turbojpeg_library, _per_thread.handle


def _load_turbojpeg():
    spec = importlib.util.find_spec("ffcv")
    found = glob.glob(os.path.join(spec.submodule_search_locations[0], "_libffcv*.so")) if spec else []
    if not found:
        raise RunError("ffcv is not installed; install it as the README says")
    library = ctypes.CDLL(found[0])
    integer, pointer, length = ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong
    library.tjInitDecompress.restype = pointer
    library.tjDestroy.argtypes = [pointer]
    library.tjGetErrorStr2.argtypes, library.tjGetErrorStr2.restype = [pointer], ctypes.c_char_p
    library.tjDecompressHeader3.argtypes = [pointer, ctypes.c_char_p, length] + [pointer] * 4
    library.tjDecompress2.argtypes = [pointer, ctypes.c_char_p, length, pointer] + [integer] * 5
    return library
