"""Where images come from: the samples of one split in a fixed order, and their bytes as upright RGB."""

import collections
import ctypes
import glob
import hashlib
import importlib.util
import io
import os
import threading
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from rn50.errors import RunError

EXTENSIONS = {".jpeg", ".jpg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}

# Pillow's limit for an error. A number of our own, because the app's code switches Pillow's off for its process.
MAX_PIXELS = 2 * 89_478_485

IMAGENETTE_NAMES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}

# Of ImageNet-1k's 1,000 wnids in label order, joined by zero bytes; they are in timm's imagenet_synsets.txt.
IMAGENET_WNIDS_SHA256 = "9be65c467f39ace6da5b8f775034751d1328f56d229db113bb5b30c39f054d19"


def open_source(directory, split, cache=None):
    """The source of `split` ("train", "val") under `directory`, whatever form the images have there.

    An ImageFolder tree, or ImageNet as it comes from its site, Kaggle or Hugging Face (rn50/data/imagenet.py). cache: a
    folder for the index of a tar file, which takes minutes to make. RunError where there is nothing of the kind.
    """
    from rn50.data import imagenet

    found = imagenet.find(directory, split, cache)
    folder = os.path.join(str(directory), split)
    if found is None and not os.path.exists(folder):
        raise RunError(f"no images of {split} in {directory}: {_expected(folder)}")
    return (found or ImageFolderSource)(directory, split)


def split_classes(directory, split):
    """Names of the class folders, or wnids, of a split; None where there is no such split."""
    from rn50.data import imagenet

    found = imagenet.find(directory, split, None)
    if found:
        return found.split_classes(directory, split)
    folder = os.path.join(directory, split)
    return set(_class_folders(folder)[0]) if os.path.isdir(folder) else None


class Listing:
    """The samples of one split by class and then by file name; labels are positions among the sorted classes.

    Every source has `kind`, `folder` (what to show a person), `classes` (a list of {wnid, name} in label order),
    `ignored` (files left out because they are no images), `len()`, `item(i) -> (id, label)`, `read(i) -> bytes` and
    `digest()`, and can be pickled. An id names the sample within the split on every machine and in every form.
    """

    ignored = 0
    staging_bytes = 0  # what `stage` writes

    def _list(self, files, names=None):
        """files: {wnid: sorted file names}, in label order. names: {wnid: name for people}, or part of it."""
        names = {**unique_names(names or {}), **(_imagenet_names(files) if is_imagenet(files) else IMAGENETTE_NAMES)}
        self.classes = [{"wnid": wnid, "name": names.get(wnid, wnid)} for wnid in files]
        self._first = np.concatenate([[0], np.cumsum([len(listed) for listed in files.values()])])
        # A million Python strings take 100 MB in every worker and seconds to unpickle; one byte string takes 25 MB.
        encoded = [os.fsencode(name) for listed in files.values() for name in listed]
        self._names = b"".join(encoded)
        self._ends = np.cumsum([0] + [len(name) for name in encoded])

    def __len__(self):
        return len(self._ends) - 1

    def item(self, i):
        """(id, label) of sample `i`; the id is `<class>/<file name>`."""
        label = int(np.searchsorted(self._first, i, side="right")) - 1
        name = os.fsdecode(self._names[self._ends[i] : self._ends[i + 1]])
        return f"{self.classes[label]['wnid']}/{name}", label

    def find(self, label, name):
        """Index of the sample with this label and file name, or None."""
        low, high = int(self._first[label]), int(self._first[label + 1])
        names = [self._names[self._ends[i] : self._ends[i + 1]] for i in range(low, high)]
        return low + names.index(os.fsencode(name)) if os.fsencode(name) in names else None

    def digest(self):
        """sha256 over names, not contents: replacing one bad file must not throw away a half-written conversion."""
        listing = hashlib.sha256("\0".join(c["wnid"] for c in self.classes).encode(errors="surrogateescape"))
        for part in (self._first.tobytes(), self._names, self._ends.tobytes()):
            listing.update(part)
        return listing.hexdigest()

    def missing(self):
        """What the source's own list of images has and the source has not, as text; None where nothing is known."""
        return None

    def stage(self, folder, say):
        """Make random access fast where it is not; `folder` is removed when the split is converted."""


class ImageFolderSource(Listing):
    """`root/split/<class>/<image>`, sorted by class and then by file name."""

    kind = "imagefolder"

    def __init__(self, root, split):
        self._scan(os.path.join(str(root), split))

    def _scan(self, folder, names=None):
        self.folder = folder
        class_names, self.ignored = _class_folders(folder)
        files = {}
        for class_name in class_names:
            files[class_name] = self._images(class_name)
            if not files[class_name]:
                raise RunError(f"{os.path.join(folder, class_name)} holds no images; fill or remove it")
        self._list(files, names)

    def _images(self, class_name):
        files = []
        try:
            with os.scandir(os.path.join(self.folder, class_name)) as entries:
                for entry in entries:
                    if is_image_name(entry.name) and entry.is_file():
                        files.append(entry.name)
                    else:
                        self.ignored += 1
        except OSError as error:
            raise RunError(f"cannot read {error.filename}: {error.strerror}") from None
        return sorted(files)

    def read(self, i):
        """The file's bytes; OSError where it cannot be read."""
        with open(self.path(i), "rb") as handle:
            return handle.read()

    def path(self, i):
        """Where sample `i` is."""
        return os.path.join(self.folder, self.item(i)[0])


def is_image_name(name):
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")


def unique_names(synonyms):
    """{wnid: first of its comma-separated synonyms}, with the wnid where another class has the same (`crane`)."""
    first = {wnid: words.split(",")[0].strip() for wnid, words in synonyms.items()}
    counts = collections.Counter(first.values())
    return {wnid: name if counts[name] == 1 else f"{name} ({wnid})" for wnid, name in first.items()}


def is_imagenet(wnids):
    """Whether `wnids`, in label order, are the 1,000 of ImageNet-1k."""
    return hashlib.sha256("\0".join(wnids).encode(errors="surrogateescape")).hexdigest() == IMAGENET_WNIDS_SHA256


def _imagenet_names(wnids):
    """{wnid: name} of ImageNet-1k's classes, given in label order: the same names whatever form the images have."""
    from torchvision.models import ResNet50_Weights  # brings torch, which the workers do without

    return dict(zip(wnids, ResNet50_Weights.IMAGENET1K_V1.meta["categories"], strict=True))


def has_class_folders(folder):
    """Whether `folder` is the top of an ImageFolder tree."""
    with os.scandir(folder) as entries:
        return any(entry.is_dir() and not entry.name.startswith(".") for entry in entries)


def _class_folders(folder):
    try:
        with os.scandir(folder) as entries:
            listed = [(entry.name, entry.is_dir()) for entry in entries]
    except OSError as error:
        raise RunError(f"cannot read {folder}: {error.strerror}; {_expected(folder)}") from None
    names = sorted(name for name, is_folder in listed if is_folder and not name.startswith("."))
    if not names:
        raise RunError(f"{folder} holds no class folders; {_expected(folder)}")
    return names, len(listed) - len(names)


def _expected(folder):
    from rn50.data import imagenet

    forms = "".join(f", or {form}" for form in imagenet.forms(os.path.basename(folder)))
    return f"expected {folder}/<class>/<image>{forms}"


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


_turbojpeg_lock = threading.Lock()
_turbojpeg_library = None
_per_thread = threading.local()
_CMYK_COLORSPACES = (3, 4)  # TJCS_CMYK, TJCS_YCCK
_PIXEL_FORMAT_RGB = 0
# libjpeg's warnings about what changes no pixel, or what every decoder guesses alike. Pillow and OpenCV ignore them.
_HARMLESS = ("extraneous bytes", "unknown JFIF revision", "Unknown Adobe color transform", "Invalid SOS parameters")


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
