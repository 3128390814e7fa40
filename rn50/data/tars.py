"""ImageNet-1k as its site has it: a tar of tars for training, one tar for validation, and the devkit with its labels.

The inner `<wnid>.tar` of the training tar name the classes. The validation images are numbered, and the devkit's
ground truth has an ILSVRC id for each number, which is not a position among sorted wnids: meta.mat has its wnid.
"""

import collections
import contextlib
import io
import json
import os
import tarfile
import time
import zlib

import numpy as np

from rn50.data.imagenet import DEVKIT, is_inner_tar_name
from rn50.data.listing import Listing, is_image_name, nearest, reading
from rn50.errors import RunError

META, TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
# Where in a folder the devkit's files may be: in its archive, in the folder that it unpacks to, or taken out of that.
DEVKIT_ARCHIVES = [f"{DEVKIT}.tar.gz", f"{DEVKIT}.tgz", f"{DEVKIT}.tar"]
DEVKIT_FOLDERS = [os.path.join(DEVKIT, "data"), os.path.join(DEVKIT, DEVKIT, "data"), "data", ""]
DEVKIT_FILES = [os.path.join(folder, TRUTH) for folder in DEVKIT_FOLDERS] + DEVKIT_ARCHIVES
SAY_SECONDS = 10

MAX_PADDING = 1 << 20  # bytes behind a tar's last member; tar itself rounds up to 10 KiB


class TarSource(Listing):
    """ILSVRC2012_img_train.tar, a tar of one tar a class, or ILSVRC2012_img_val.tar, read in place.

    path: the tar, or a folder of the inner tars. cache: a folder that keeps the index of the members, which takes a
    pass over the tar's headers (minutes).
    """

    kind = "ilsvrc-tar"
    _open = None  # (number of the tar that was read last, its descriptor)

    def __init__(self, path, split, cache=None):
        self.folder = path
        self._tars = inner_tars(path) if os.path.isdir(path) else [path]
        wnids, names, places, self.ignored = self._index(split, cache)
        if split == "val":
            wnids = self._val_wnids(names)
        if not names:
            raise RunError(f"{self.folder} holds no images")
        order = sorted(range(len(names)), key=lambda i: (wnids[i], names[i]))
        files = {}
        for i in order:
            files.setdefault(wnids[i], []).append(names[i])
        self._list(files, read_meta_names(os.path.dirname(path), required=split == "val"))
        self._places = places[order]

    def read(self, i):
        """The member's bytes; OSError where the tar cannot be read."""
        number, offset, size = self._places[i].tolist()
        if self._open is None or self._open[0] != number:
            if self._open is not None:
                os.close(self._open[1])
            self._open = None  # also where the next line fails
            self._open = number, os.open(self._tars[number], os.O_RDONLY)
        data = os.pread(self._open[1], size, offset)
        if len(data) < size:
            raise OSError(f"{self._tars[number]} is shorter than it was")
        return data

    def __getstate__(self):
        return {**self.__dict__, "_open": None}

    def _index(self, split, cache):
        """(wnids, names, int64 [n, 3] of the tar's number, offset and size, ignored) of the members."""
        found = [os.stat(path) for path in self._tars]
        numbers = [zlib.crc32(os.fsencode(os.path.basename(path))) for path in self._tars]
        key = np.array([[k, status.st_size, status.st_mtime_ns] for k, status in zip(numbers, found, strict=True)])
        kept = os.path.join(cache, f"{split}.tar-index.npz") if cache else None
        if kept and os.path.exists(kept):
            try:
                with np.load(kept) as index:
                    if np.array_equal(index["key"], key):
                        wnids, names = (bytes(index[part]).decode().split("\0") for part in ("wnids", "names"))
                        ignored = collections.Counter(json.loads(bytes(index["left_out"])))
                        return wnids, names, index["places"], ignored
            except (OSError, ValueError, KeyError, EOFError):
                pass  # damaged: made again
        wnids, names, places, ignored = [], [], [], collections.Counter()
        for number, path in enumerate(self._tars):
            nested = split == "train" and path == self.folder
            of, listed, where, left_out = _members(path, nested=nested)
            wnids += of if nested or split == "val" else [_stem(path)] * len(of)
            names += listed
            places += [(number, *place) for place in where]
            ignored += left_out
        places = np.array(places, np.int64).reshape(-1, 3)
        if kept:
            texts = {"wnids": "\0".join(wnids), "names": "\0".join(names), "left_out": json.dumps(ignored)}
            texts = {name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()}
            with contextlib.suppress(OSError):  # without it the next command takes longer
                os.makedirs(cache, exist_ok=True)
                with open(f"{kept}.partial", "wb") as file:
                    np.savez(file, key=key, places=places, **texts)
                os.replace(f"{kept}.partial", kept)
        return wnids, names, places, ignored

    def _val_wnids(self, names):
        wnid_of = val_wnids(os.path.dirname(self.folder))
        for name in names:
            if not name.endswith(".JPEG") or name.removesuffix(".JPEG") not in wnid_of:
                raise RunError(f"{self.folder}: {name} has no class in the ground truth of {DEVKIT}")
        return [wnid_of[name.removesuffix(".JPEG")] for name in names]


def tar_classes(path, split):
    if split == "val":
        return set(val_wnids(os.path.dirname(path)).values())
    return {_stem(name) for name in (inner_tars(path) if os.path.isdir(path) else _inner_tars(path))}


def inner_tars(folder):
    """Sorted paths of the tars of single classes in `folder`, which ILSVRC2012_img_train.tar unpacks to."""
    if not os.path.isdir(folder):
        return []
    with reading(folder):
        return [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if is_inner_tar_name(name)]


def _stem(path):
    return os.path.basename(path).removesuffix(".tar")


def val_wnids(folder):
    """{validation image without its extension: wnid} by the devkit that lies in `folder` or above it."""
    meta = _read_meta(folder)
    try:
        truth = [int(line) for line in _devkit(folder, TRUTH).split()]
    except ValueError as error:
        raise RunError(f"{TRUTH} of {DEVKIT} is damaged ({error}); get the devkit again") from None
    return {f"ILSVRC2012_val_{k:08d}": meta[number][0] for k, number in enumerate(truth, 1) if number in meta}


def read_meta_names(folder, required=True):
    """{wnid: its synonyms} of the devkit's meta.mat; empty where there is no devkit and it is optional."""
    return dict(_read_meta(folder, required).values())


def _read_meta(folder, required=True):
    """{ILSVRC id: (wnid, its synonyms)} of the devkit's meta.mat; empty where there is no devkit and it is optional."""
    data = _devkit(folder, META, required)
    if data is None:
        return {}
    try:
        from scipy.io import loadmat
    except ImportError:
        raise RunError("reading the devkit's meta.mat needs scipy; install it with: pip install scipy") from None
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(data), squeeze_me=True)["synsets"])
        return {int(s["ILSVRC2012_ID"]): (str(s["WNID"]), str(s["words"])) for s in synsets if not s["num_children"]}
    except Exception as error:  # scipy's reader raises whatever it runs into
        raise RunError(f"{META} of {DEVKIT} cannot be read: {error}") from None


def _devkit(folder, name, required=True):
    """The bytes of one of the devkit's files, from `folder` or the nearest above it that has it."""
    path = nearest(folder, [os.path.join(inner, name) for inner in DEVKIT_FOLDERS] + DEVKIT_ARCHIVES)
    if path is None:
        if not required:
            return None
        archive = os.path.join(folder, DEVKIT_ARCHIVES[0])
        raise RunError(f"the labels of the validation images are in {archive}, which is not there; put it beside them")
    try:
        if os.path.basename(path) == name:
            with open(path, "rb") as file:
                return file.read()
        with tarfile.open(path) as members:
            return members.extractfile(f"{DEVKIT}/data/{name}").read()
    except (OSError, tarfile.TarError, KeyError, EOFError) as error:
        raise RunError(f"cannot read data/{name} of {path}: {error}") from None


def _inner_tars(path):
    with _reading(path), tarfile.open(path, "r:") as outer:
        names = [member.name for member in outer if _is_inner_tar(member)]
        _check_end(outer, os.path.getsize(path))
    return names


def _check_end(tar, end):
    """ReadError where much follows the last member: downloads into a file of the final size leave zeros, and tarfile
    takes those, or anything else that is no header, for the end."""
    if end - tar.offset > MAX_PADDING:
        raise tarfile.ReadError(f"nothing readable after {tar.offset} of {end} bytes")


def _is_inner_tar(member):
    # macOS's tar adds ._n01440764.tar beside n01440764.tar.
    return member.isfile() and member.name.endswith(".tar") and not os.path.basename(member.name).startswith(".")


def _members(path, nested):
    """(wnids, names, [(offset, size)], ignored) of a tar's images; wnids are empty where it is not nested."""
    wnids, names, places, ignored = [], [], [], collections.Counter()
    said, size = time.monotonic(), os.path.getsize(path)
    with _reading(path), open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as outer:
        parts = [(m, True) for m in outer] if nested else [(None, False)]
        if nested:
            _check_end(outer, size)
        for part, is_tar in parts:
            if is_tar and not _is_inner_tar(part):
                ignored[_kind(part)] += part.isfile()
                continue
            if is_tar:
                file.seek(part.offset_data)
            members = tarfile.open(fileobj=file, mode="r:") if is_tar else outer  # noqa: SIM115
            end = part.offset_data + part.size if is_tar else size
            for member in members:
                if member.offset_data + member.size > end or end > size:
                    raise tarfile.ReadError(f"{member.name} is cut off")
                name = os.path.basename(member.name)
                if member.isfile() and is_image_name(name):
                    wnids.append(_stem(part.name) if is_tar else "")
                    names.append(name)
                    places.append((member.offset_data, member.size))
                else:
                    ignored[_kind(member)] += member.isfile()
            _check_end(members, end)
            if time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                print(f"{path}: {len(names)} members found, {file.tell() / size:.0%}", flush=True)
    return wnids, names, places, +ignored


def _kind(member):
    name = os.path.basename(member.name)
    return "hidden" if name.startswith(".") else os.path.splitext(name)[1].lower() or "without extension"


@contextlib.contextmanager
def _reading(path):
    """Damage of the tar file at `path` as RunError."""
    try:
        yield
    except (OSError, tarfile.TarError, EOFError) as error:
        raise RunError(f"{path} is damaged or incomplete ({error}); finish its download or repeat it") from None
