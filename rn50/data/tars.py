"""ImageNet-1k as its site has it: a tar of tars for training, one tar for validation, and the devkit with its labels.

The inner `<wnid>.tar` of the training tar name the classes. The validation images are numbered, and the devkit's
ground truth has an ILSVRC id for each number, which is not a position among sorted wnids: meta.mat has its wnid.
"""

import contextlib
import io
import os
import re
import tarfile
import time

import numpy as np

from rn50.data.imagenet import DEVKIT, tar_path
from rn50.data.listing import Listing, is_image_name
from rn50.errors import RunError

META, TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
SAY_SECONDS = 10

MAX_PADDING = 1 << 20  # bytes behind a tar's last member; tar itself rounds up to 10 KiB


class TarSource(Listing):
    """ILSVRC2012_img_train.tar, a tar of one tar a class, or ILSVRC2012_img_val.tar, read in place.

    cache: a folder that keeps the index of the members, which takes a pass over the tar's headers (minutes).
    """

    kind = "ilsvrc-tar"

    def __init__(self, root, split, cache=None):
        self.folder = tar_path(root, split)
        wnids, names, offsets, sizes, self.ignored = self._index(split, cache)
        meta = read_meta(root, required=split == "val")
        if split == "val":
            wnids = self._val_wnids(root, names, meta)
        if not names:
            raise RunError(f"{self.folder} holds no images")
        order = sorted(range(len(names)), key=lambda i: (wnids[i], names[i]))
        files = {}
        for i in order:
            files.setdefault(wnids[i], []).append(names[i])
        self._list(files, {wnid: words for wnid, words in meta.values()})
        self._offsets, self._sizes = offsets[order], sizes[order]

    def read(self, i):
        """The member's bytes; OSError where the tar cannot be read."""
        if getattr(self, "_file", None) is None:
            self._file = os.open(self.folder, os.O_RDONLY)
        data = os.pread(self._file, int(self._sizes[i]), int(self._offsets[i]))
        if len(data) < self._sizes[i]:
            raise OSError(f"{self.folder} is shorter than it was")
        return data

    def __getstate__(self):
        return {**self.__dict__, "_file": None}

    def _index(self, split, cache):
        found = os.stat(self.folder)
        key = np.array([found.st_size, found.st_mtime_ns])
        kept = os.path.join(cache, f"{split}.tar-index.npz") if cache else None
        if kept and os.path.exists(kept):
            try:
                with np.load(kept) as index:
                    if (index["key"] == key).all():
                        wnids, names = (bytes(index[part]).decode().split("\0") for part in ("wnids", "names"))
                        return wnids, names, index["offsets"], index["sizes"], int(index["ignored"])
            except (OSError, ValueError, KeyError, EOFError):
                pass  # damaged: made again
        wnids, names, places, ignored = _members(self.folder, nested=split == "train")
        offsets, sizes = np.array(places, np.int64).reshape(-1, 2).T.copy()
        if kept:
            texts = {k: np.frombuffer("\0".join(v).encode(), np.uint8) for k, v in (("wnids", wnids), ("names", names))}
            with contextlib.suppress(OSError):  # without it the next command takes longer
                os.makedirs(cache, exist_ok=True)
                with open(f"{kept}.partial", "wb") as file:
                    np.savez(file, key=key, offsets=offsets, sizes=sizes, ignored=ignored, **texts)
                os.replace(f"{kept}.partial", kept)
        return wnids, names, offsets, sizes, ignored

    def _val_wnids(self, root, names, meta):
        truth = [int(line) for line in _devkit(root, TRUTH).decode().split()]
        wnids = []
        for name in names:
            number = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", name)
            if not number or not 1 <= int(number[1]) <= len(truth) or truth[int(number[1]) - 1] not in meta:
                raise RunError(f"{self.folder}: {name} has no class in the ground truth of {DEVKIT}")
            wnids.append(meta[truth[int(number[1]) - 1]][0])
        return wnids


def tar_classes(root, split):
    if split == "val":
        meta = read_meta(root, required=True)
        return {meta[int(number)][0] for number in _devkit(root, TRUTH).split()}
    return {os.path.basename(name).removesuffix(".tar") for name in _inner_tars(tar_path(root, split))}


def read_meta(root, required):
    """{ILSVRC id: (wnid, its synonyms)} of the devkit's meta.mat; empty where there is no devkit and it is optional."""
    data = _devkit(root, META, required)
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


def _devkit(root, name, required=True):
    """The bytes of one of the devkit's files, from its folder or its archive."""
    folder, archive = os.path.join(str(root), DEVKIT), os.path.join(str(root), f"{DEVKIT}.tar.gz")
    try:
        if os.path.exists(path := os.path.join(folder, "data", name)):
            with open(path, "rb") as file:
                return file.read()
        if os.path.exists(archive):
            with tarfile.open(archive) as members:
                return members.extractfile(f"{DEVKIT}/data/{name}").read()
    except (OSError, tarfile.TarError, KeyError, EOFError) as error:
        raise RunError(f"cannot read data/{name} of {DEVKIT}: {error}") from None
    if required:
        raise RunError(f"the labels of the validation images are in {archive}, which is not there; put it beside them")
    return None


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
    wnids, names, places, ignored = [], [], [], 0
    said, size = time.monotonic(), os.path.getsize(path)
    with _reading(path), open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as outer:
        parts = [(m, True) for m in outer] if nested else [(None, False)]
        if nested:
            _check_end(outer, size)
        for part, is_tar in parts:
            if is_tar and not _is_inner_tar(part):
                ignored += part.isfile()
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
                    wnids.append(os.path.basename(part.name).removesuffix(".tar") if is_tar else "")
                    names.append(name)
                    places.append((member.offset_data, member.size))
                else:
                    ignored += member.isfile()
            _check_end(members, end)
            if time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                print(f"{path}: {len(names)} members found, {file.tell() / size:.0%}", flush=True)
    return wnids, names, places, ignored


@contextlib.contextmanager
def _reading(path):
    """Damage of the tar file at `path` as RunError."""
    try:
        yield
    except (OSError, tarfile.TarError, EOFError) as error:
        raise RunError(f"{path} is damaged or incomplete ({error}); finish its download or repeat it") from None
