"""The .beton format: its layout, and reading what a loader needs of a file after checking all that can be checked.

Layout (FFCV 1.0.2, version 2): header, two field descriptors, one metadata record a sample, padding to a page,
pages of image data, allocation table. A sample never crosses a page. writer.py writes it, verify.py reads the images.
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass

import numpy as np

from rn50.errors import RunError

VERSION = 2
PAGE_SIZE = 8 << 20
JPG, RAW = 0, 1
MANIFEST_FORMAT = 1
# Written out here, not imported: importing ffcv takes seconds and brings torch into every worker.
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
SAMPLE = np.dtype([("", IMAGE), ("", "<i8")], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
FIELD_TYPES = {"image": 2, "label": 1}  # FFCV's ids of RGBImageField and IntField
TYPE_NAMES = ("FloatField", "IntField", "RGBImageField", "BytesField", "NDArrayField", "JSONField", "TorchTensorField")
METADATA_START = HEADER.itemsize + len(FIELD_TYPES) * FIELD.itemsize
# Training finds its files by these names.
FILE_NAME = re.compile(r"(train|val)_(\d+)\.beton")


class NotThere(RunError):
    """There is no file of this name."""


class NotABeton(RunError):
    """The file is none of FFCV's."""


@dataclass
class BetonInfo:
    """What the loaders need of a .beton file; arrays have one entry a sample, in the file's order."""

    path: str
    bytes: int
    num_samples: int
    page_size: int
    modes: np.ndarray  # uint8, JPG or RAW
    widths: np.ndarray  # uint16, pixels
    heights: np.ndarray  # uint16, pixels
    labels: np.ndarray  # int64
    data_ptrs: np.ndarray  # uint64, position in the file
    sizes: np.ndarray  # uint64, stored bytes
    manifest: dict | None

    @property
    def median_short_side(self):
        return float(np.median(np.minimum(self.widths, self.heights)))

    @property
    def classes(self):
        """[{wnid, name}] in label order, or None for a file without a manifest."""
        return self.manifest["classes"] if self.manifest else None

    @property
    def num_classes(self):
        return len(self.classes) if self.manifest else int(self.labels.max()) + 1


def read_info(path):
    """Check all that can be checked without reading images, and return BetonInfo.

    FFCV hangs or eats memory on a damaged file, so nothing may be opened before this. Accepts files of stock FFCV.
    RunError names the file, what is wrong and what to do: NotThere or NotABeton where it is not damaged.
    """
    path = str(path)
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as handle:
            start = handle.read(METADATA_START)
            header, fields = _read_header(path, size, start)
            count, table_ptr = int(header["num_samples"]), int(header["alloc_table_ptr"])
            kinds = {"image": IMAGE, "label": "<i8"}
            samples = np.fromfile(handle, np.dtype([(name, kinds[name]) for name in fields], align=True), count)
            handle.seek(table_ptr)
            table = np.fromfile(handle, ALLOCATION, count)
    except FileNotFoundError:
        raise NotThere(f"{path} does not exist; make it with write_dataset.py") from None
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None
    image, labels = samples["image"], samples["label"]
    ptrs = image["data_ptr"].copy()
    table = table[np.argsort(table["ptr"], kind="stable")]  # stock FFCV's workers add to it in any order
    found = np.searchsorted(table["ptr"], ptrs).clip(max=count - 1)
    _require(path, (table["ptr"][found] == ptrs).all(), "the allocation table does not match the samples")
    sizes = table["size"][found].copy()
    begin = METADATA_START + count * SAMPLE.itemsize
    inside = (ptrs >= begin) & (ptrs < table_ptr) & (sizes > 0) & (sizes <= table_ptr - ptrs.clip(max=table_ptr))
    _require(path, inside.all(), f"sample {int(np.argmin(inside))} points outside the file")
    info = BetonInfo(
        path=path,
        bytes=size,
        num_samples=count,
        page_size=int(header["page_size"]),
        modes=image["mode"].copy(),
        widths=image["width"].copy(),
        heights=image["height"].copy(),
        labels=labels.copy(),
        data_ptrs=ptrs,
        sizes=sizes,
        manifest=read_manifest(path),
    )
    _check_samples(info)
    return info


def _read_header(path, size, start):
    """(header, names of the fields in the file's order)."""
    if start and start[:2] != VERSION.to_bytes(2, "little"):
        raise NotABeton(f"{path} is not a .beton file of FFCV's version {VERSION}; write_dataset.py makes such files")
    _require(path, size >= METADATA_START, f"it is {size} bytes long, too short for a .beton file")
    header = np.frombuffer(start, HEADER, 1)[0]
    count, table_ptr = int(header["num_samples"]), int(header["alloc_table_ptr"])
    _require(path, table_ptr > 0, "its writer never finished")
    _require(path, count > 0, "it holds no samples")
    page = int(header["page_size"])
    _require(path, page >= 1 << 21 and page & (page - 1) == 0, f"its page size of {page} bytes is impossible")
    fields = _read_fields(path, header["num_fields"], start)
    expected = table_ptr + count * ALLOCATION.itemsize
    _require(path, size >= expected, f"it is truncated: {size} bytes of {expected}")
    _require(path, size == expected, f"it is {size} bytes long, {size - expected} more than its header says")
    _require(path, METADATA_START + count * SAMPLE.itemsize <= table_ptr, "its metadata and allocation table overlap")
    return header, fields


def _read_fields(path, count, start):
    """Names of the fields in the file's order; RunError where they are not image and label, in any order."""
    described = np.frombuffer(start, FIELD, min(int(count), len(FIELD_TYPES)), offset=HEADER.itemsize)
    fields = {}
    for field in described:
        fields[field["name"].tobytes().split(b"\0")[0].decode("ascii", "replace")] = int(field["type_id"])
    if fields != FIELD_TYPES or count != len(FIELD_TYPES):
        more = f" and {count - len(described)} more" if count > len(described) else ""
        raise RunError(
            f"{path} cannot be used: its fields are {_spell(fields)}{more}, and should be {_spell(FIELD_TYPES)} alone; "
            "write it with these fields, or copy it again where it has them"
        )
    return list(fields)


def _spell(fields):
    """`{name: FFCV's id of its type}` for a person."""
    types = dict(enumerate(TYPE_NAMES))
    return ", ".join(f"{name} ({types.get(number, f'type {number}')})" for name, number in fields.items()) or "none"


def _check_samples(info):
    def every(good, what):
        _require(info.path, good.all(), f"sample {int(np.argmin(good))} {what}")

    every((info.widths > 0) & (info.heights > 0), "has no size")
    every((info.modes == JPG) | (info.modes == RAW), "is stored neither as JPEG nor as pixels")
    pixels = info.widths.astype("<u8") * info.heights * 3
    every((info.modes != RAW) | (info.sizes == pixels), "has not as many pixels as its width and height say")
    every(info.labels >= 0, "has a negative label")
    if info.manifest is None:
        return
    try:
        classes, count = len(info.manifest["classes"]), info.manifest["num_samples"]
        size, settings = info.manifest["beton"]["bytes"], info.manifest["settings"]
        info.manifest["beton"]["sha256"], settings["max_side"]
    except (KeyError, TypeError):
        _require(info.path, False, f"{manifest_path(info.path)} is not its manifest")
    _require(info.path, size == info.bytes, f"it has {info.bytes} bytes, its manifest says {size}")
    _require(info.path, count == info.num_samples, f"it has {info.num_samples} samples, its manifest says {count}")
    every(info.labels < classes, f"has a label beyond the manifest's {classes} classes")
    _check_name(info.path, info.manifest)


def _check_name(path, manifest):
    """RunError where a file has the name of another split or rung than its manifest says."""
    named = FILE_NAME.fullmatch(os.path.basename(path))
    split, side = manifest.get("split"), manifest["settings"]["max_side"]
    if named and split is not None and (named[1], int(named[2])) != (split, side):
        raise RunError(
            f"{path} holds images of {split} of at most {side} pixels, as its manifest says, not what its name "
            f"says: put the right file there, or name it {split}_{side}.beton and its manifest {split}_{side}.json"
        )


def refuse_mixed(infos):
    """RunError where files of one split, its rungs, hold other classes or numbers of images than the first of them."""
    first, *others = infos
    for info in others:
        if info.num_samples != first.num_samples:
            problem = f"{info.num_samples} images and the other {first.num_samples}"
        elif info.classes and first.classes and _wnids(info.classes) != _wnids(first.classes):
            problem = "other classes"
        elif not np.array_equal(np.sort(info.labels), np.sort(first.labels)):
            problem = "other numbers of images in its classes"
        else:
            continue
        raise RunError(
            f"{info.path} and {first.path} are not of the same images: the first has {problem}; write all sizes of a "
            "split with one command, from one source"
        )


def check_other_split(info):
    """RunError where a file of the other split beside `info` is misnamed or has other classes, by its manifest."""
    folder, name = os.path.split(info.path)
    mine = FILE_NAME.fullmatch(name)
    for other in sorted(os.listdir(folder or ".")) if mine else ():
        theirs, path = FILE_NAME.fullmatch(other), os.path.join(folder, other)
        manifest = read_manifest(path) if theirs and theirs[1] != mine[1] else None
        if manifest is None:
            continue
        try:
            classes = _wnids(manifest["classes"])
            _check_name(path, manifest)
        except (KeyError, TypeError):
            raise RunError(f"{manifest_path(path)} is not the manifest of a .beton file; write it again") from None
        if info.classes and classes != _wnids(info.classes):
            raise RunError(
                f"{info.path} and {path} have different classes, as their manifests say; convert train and val from "
                "one source"
            )


def _wnids(classes):
    return [names["wnid"] for names in classes]


def _require(path, ok, problem):
    if not ok:
        raise RunError(f"{path} cannot be used: {problem}; copy it again, or remove it and run write_dataset.py")


def manifest_path(beton_path):
    """`train_400.beton` -> `train_400.json`."""
    return os.path.splitext(str(beton_path))[0] + ".json"


def read_manifest(beton_path):
    """The manifest beside a .beton file, or None; RunError when it is there and cannot be read."""
    path = manifest_path(beton_path)
    try:
        with open(path, encoding="utf-8") as handle:
            manifest = json.load(handle)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}; remove it or write the dataset again") from None
    if not isinstance(manifest, dict):
        raise RunError(f"{path} is not the manifest of a .beton file; remove it or write the dataset again")
    return manifest


def summarise(widths, heights, labels, num_classes):
    """The manifest's statistics: images per class, and min/median/max of the stored sizes in pixels."""

    def spread(values):
        return {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}

    return {
        "class_counts": np.bincount(labels, minlength=num_classes).tolist(),
        "width": spread(widths),
        "height": spread(heights),
        "median_short_side": float(np.median(np.minimum(widths, heights))),
    }


def fingerprint(info):
    """A sha256 that changes with the images: of all samples' metadata, and of the manifest's checksum if there is one.

    It costs no reading of images; a JPEG that is another one has another size.
    """
    digest = hashlib.sha256(info.manifest["beton"]["sha256"].encode() if info.manifest else b"")
    for array in (info.modes, info.widths, info.heights, info.labels, info.data_ptrs, info.sizes):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def refuse_others(theirs, mine, whose):
    """RunError that names the first file that differs between two {file name: fingerprint}; `whose` are `theirs`."""
    for name in sorted({**theirs, **mine}):
        if theirs.get(name) != mine.get(name):
            what = "is missing here" if name not in mine else "is new" if name not in theirs else "has other content"
            raise RunError(
                f"the data is not that {whose}: {name} {what}; restore data.dir, or choose another logging.run_name"
            )
