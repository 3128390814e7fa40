"""ImageNet-1k as it comes: the two tars of its site, Kaggle's folders, Hugging Face's parquet shards.

All give the samples of an ImageFolder tree of the same images, with the same ids, labels and bytes. What each form is
taken at its word for:
- Tars: inner `<wnid>.tar` of the training tar name the classes. The validation images are numbered, and the devkit's
  ground truth has an ILSVRC id for each number, which is not a position among sorted wnids: meta.mat has its wnid.
- Kaggle: LOC_val_solution.csv has the wnid of each validation image.
- Parquet: image.path has the wnid (`..._n01440764.JPEG`, as ILSVRC/imagenet-1k has it); the column `label` must order
  the classes as their wnids do, and is not used otherwise.
"""

import contextlib
import csv
import io
import json
import os
import re
import tarfile
import time

import numpy as np

from rn50.data.sources import ImageFolderSource, Listing, decode_jpeg, has_class_folders, is_image_name, is_imagenet
from rn50.errors import RunError

CLASSES, COUNTS = 1000, {"train": 1_281_167, "val": 50_000}
# From this many wnids on, a set is meant to be all of ImageNet-1k.
NEARLY_ALL = 900
DEVKIT, META, TRUTH = "ILSVRC2012_devkit_t12", "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
KAGGLE = os.path.join("ILSVRC", "Data", "CLS-LOC")
SAY_SECONDS = 10
MAX_PADDING = 1 << 20  # bytes behind a tar's last member; tar itself rounds up to 10 KiB
WNID = re.compile(r"n\d{8}")
# Not what their extension says, or not RGB: github.com/cytsai/ilsvrc-cmyk-image-list, the notes of
# tensorflow_datasets' imagenet2012, and a validation image that their authors overlooked (imread_benchmark's
# "four_component_rgb"). `odd_images` looks into each of them.
ODD_VALIDATION_IMAGE = ("n13133613", "ILSVRC2012_val_00019877")
# fmt: off
ODD_IMAGES = (
    "n02105855_2933", "n01739381_1309", "n02077923_14822", "n02447366_23489", "n02492035_15739", "n02747177_10752",
    "n03018349_4028", "n03062245_4620", "n03347037_9675", "n03467068_12171", "n03529860_11437", "n03544143_17228",
    "n03633091_5218", "n03710637_5125", "n03961711_5286", "n04033995_2932", "n04258138_17003", "n04264628_27969",
    "n04336792_7448", "n04371774_5854", "n04596742_4225", "n07583066_647", "n13037406_4650",
)
# fmt: on


def find(directory, split, cache):
    """What makes the source of the form found in `directory`, or None for an ImageFolder tree."""
    folder = os.path.join(str(directory), split)
    if split not in COUNTS:
        return None
    try:
        if os.path.isdir(folder) and has_class_folders(folder):
            return None
    except OSError:
        return None  # the tree's own reader says why
    if os.path.exists(_tar_path(directory, split)):
        return _Form(lambda root, split: TarSource(root, split, cache), tar_classes)
    if os.path.isdir(os.path.join(str(directory), KAGGLE)):
        flat = split == "val" and not _kaggle_val_by_class(directory)
        return _Form(KaggleVal if flat else KaggleTrain, kaggle_classes)
    if _shards(directory, split):
        return _Form(ParquetSource, lambda root, split: {c["wnid"] for c in ParquetSource(root, split).classes})
    return None


def forms(split):
    """What `find` looks for in a folder, for people."""
    if split not in COUNTS:
        return []
    tar, kaggle = os.path.basename(_tar_path("", split)), os.path.join(KAGGLE, split)
    if split == "val":
        return [f"{tar} with {DEVKIT}.tar.gz", f"{kaggle} with LOC_val_solution.csv", "data/validation-*.parquet"]
    return [tar, kaggle, f"data/{split}-*.parquet"]


class _Form:
    def __init__(self, make, split_classes):
        self._make, self.split_classes = make, split_classes

    def __call__(self, directory, split):
        return self._make(directory, split)


def check_counts(source, split, rule):
    """RunError where `source` should be all of ImageNet-1k and is not. rule: auto (by its classes), imagenet or any."""
    wnids = sum(bool(WNID.fullmatch(c["wnid"])) for c in source.classes)
    if rule == "any" or split not in COUNTS or (rule == "auto" and wnids < NEARLY_ALL):
        return
    problem = source.missing()
    if not problem and (len(source.classes), len(source)) != (CLASSES, COUNTS[split]):
        problem = (
            f"{len(source)} images of {len(source.classes)} classes, and ImageNet-1k has {COUNTS[split]} of {CLASSES}"
        )
    if not problem and not is_imagenet([c["wnid"] for c in source.classes]):
        problem = f"its {CLASSES} classes are not those of ImageNet-1k"
    if problem:
        raise RunError(
            f"{split} in {source.folder} is not all of ImageNet-1k: {problem}; get the rest, or convert what is there "
            "with source.counts=any"
        )


def odd_images(source):
    """[(id, "PNG" or "CMYK")] of ImageNet's known oddities that `source` has and that are odd."""
    labels = {c["wnid"]: label for label, c in enumerate(source.classes)}
    found = []
    for wnid, stem in [(stem.partition("_")[0], stem) for stem in ODD_IMAGES] + [ODD_VALIDATION_IMAGE]:
        label = labels.get(wnid)
        i = None if label is None else source.find(label, f"{stem}.JPEG")
        if i is not None:
            kind = _odd_kind(source.read(i))
            if kind:
                found.append((source.item(i)[0], kind))
    return found


def _odd_kind(data):
    if data.startswith(b"\x89PNG"):
        return "PNG"
    try:
        return "CMYK" if data.startswith(b"\xff\xd8") and decode_jpeg(data) is None else None
    except ValueError:
        return None


# --- The tars of image-net.org ---------------------------------------------------------------------------------------


class TarSource(Listing):
    """ILSVRC2012_img_train.tar, a tar of one tar a class, or ILSVRC2012_img_val.tar, read in place.

    cache: a folder that keeps the index of the members, which takes a pass over the tar's headers (minutes).
    """

    kind = "ilsvrc-tar"

    def __init__(self, root, split, cache=None):
        self.folder = _tar_path(root, split)
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
    return {os.path.basename(name).removesuffix(".tar") for name in _inner_tars(_tar_path(root, split))}


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


def _tar_path(root, split):
    return os.path.join(str(root), f"ILSVRC2012_img_{split}.tar")


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


class _reading:
    """Damage of a tar file as RunError."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, OSError | tarfile.TarError | EOFError):
            raise RunError(
                f"{self.path} is damaged or incomplete ({error}); finish its download or repeat it"
            ) from None


# --- Kaggle ----------------------------------------------------------------------------------------------------------


class KaggleTrain(ImageFolderSource):
    """ILSVRC/Data/CLS-LOC/train/<wnid>/<image>, and val where someone has put its images into such folders."""

    kind = "kaggle"

    def __init__(self, root, split):
        self._list_file = os.path.join(str(root), "ILSVRC", "ImageSets", "CLS-LOC", f"{split}_cls.txt")
        self._scan(os.path.join(str(root), KAGGLE, split), _kaggle_names(root))

    def missing(self):
        if not os.path.exists(self._list_file):
            return None
        with open(self._list_file, encoding="utf-8") as lines:
            listed = {f"{line.split()[0]}.JPEG" for line in lines if line.strip()}
        absent = sorted(listed - {self.item(i)[0] for i in range(len(self))})
        return (
            f"{len(absent)} of {len(listed)} images in {self._list_file} are missing, {absent[0]} first"
            if absent
            else None
        )


class KaggleVal(Listing):
    """ILSVRC/Data/CLS-LOC/val/<image>, with the classes of LOC_val_solution.csv."""

    kind = "kaggle"

    def __init__(self, root, split):
        self.folder = os.path.join(str(root), KAGGLE, split)
        wnid_of = _kaggle_solution(root)
        try:
            entries = sorted(os.listdir(self.folder))
        except OSError as error:
            raise RunError(f"cannot read {self.folder}: {error.strerror}") from None
        images = [name for name in entries if is_image_name(name)]
        self.ignored = len(entries) - len(images)
        files = {}
        for name in images:
            wnid = wnid_of.pop(os.path.splitext(name)[0], None)
            if wnid is None:
                raise RunError(f"{os.path.join(self.folder, name)} has no class in LOC_val_solution.csv")
            files.setdefault(wnid, []).append(name)
        if not files:
            raise RunError(f"{self.folder} holds no images")
        self._absent = sorted(wnid_of)
        self._list(dict(sorted(files.items())), _kaggle_names(root))

    def missing(self):
        absent = self._absent
        return f"{len(absent)} images of LOC_val_solution.csv are missing, {absent[0]} first" if absent else None

    def read(self, i):
        """The file's bytes; OSError where it cannot be read."""
        with open(os.path.join(self.folder, self.item(i)[0].partition("/")[2]), "rb") as handle:
            return handle.read()


def kaggle_classes(root, split):
    if split == "val" and not _kaggle_val_by_class(root):
        return set(_kaggle_solution(root).values())
    folder = os.path.join(str(root), KAGGLE, split)
    return {name for name in os.listdir(folder) if WNID.fullmatch(name)} if os.path.isdir(folder) else None


def _kaggle_val_by_class(root):
    folder = os.path.join(str(root), KAGGLE, "val")
    return os.path.isdir(folder) and has_class_folders(folder)


def _kaggle_solution(root):
    path = os.path.join(str(root), "LOC_val_solution.csv")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
    except OSError as error:
        raise RunError(f"the labels of Kaggle's validation images are in {path}: {error.strerror}") from None
    except (KeyError, IndexError, TypeError, AttributeError):
        raise RunError(f"{path} has no columns ImageId and PredictionString (`n01440764 103 20 422 433`)") from None


def _kaggle_names(root):
    path = os.path.join(str(root), "LOC_synset_mapping.txt")
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as lines:
        return dict(line.strip().split(" ", 1) for line in lines if " " in line)


# --- Hugging Face ----------------------------------------------------------------------------------------------------


class ParquetSource(Listing):
    """Shards with the columns image {bytes, path} and label, in `root`, `root/data` or `root/<split>`.

    A row cannot be read without its row group (100 rows, 11 MB): `stage` copies the images to plain files first.
    """

    kind = "parquet"

    def __init__(self, root, split):
        self._paths = _shards(root, split)
        self.folder = os.path.dirname(self._paths[0])
        self._staged, self._group = None, (None, None)
        found, self.staging_bytes, self.rows_per_read, label_of, words = {}, 0, 1, {}, []
        for shard, path in enumerate(self._paths):
            with _parquet(path) as file:
                sizes = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
                self.rows_per_read = max([self.rows_per_read, *(group.num_rows for group in sizes)])
                self.staging_bytes += sum(group.total_byte_size for group in sizes)
                words = words or _class_words(file.schema_arrow)
                table = file.read(columns=["image.path", "label"])
                paths = table.column("image").combine_chunks().field("path").to_pylist()
                labels = table.column("label").to_pylist()
            for row, (image, label) in enumerate(zip(paths, labels, strict=True)):
                wnid, name = _wnid_and_name(image, f"{path}, row {row}")
                if label_of.setdefault(wnid, label) != label:
                    raise RunError(f"{path}: {wnid} has the labels {label_of[wnid]} and {label}")
                if found.setdefault(wnid, {}).setdefault(name, (shard, row)) != (shard, row):
                    raise RunError(f"{path}: {image} is there twice")
        wnids = sorted(found)
        if sorted(wnids, key=label_of.get) != wnids or len(set(label_of.values())) < len(wnids):
            raise RunError(f"{self.folder}: the column label does not order the classes as their wnids do")
        names = {wnid: words[label_of[wnid]] for wnid in wnids if label_of[wnid] < len(words)}
        self._list({wnid: sorted(found[wnid]) for wnid in wnids}, names)
        self._rows = np.array([found[wnid][name] for wnid in wnids for name in sorted(found[wnid])], np.int32)

    def read(self, i):
        """The image's bytes; OSError where they cannot be read."""
        shard, row = map(int, self._rows[i])
        if self._staged:
            return self._read_staged(shard, row)
        with _parquet(self._paths[shard]) as file:
            group, first = 0, 0
            while row >= first + file.metadata.row_group(group).num_rows:
                first += file.metadata.row_group(group).num_rows
                group += 1
            if self._group[0] != (shard, group):
                column = file.read_row_group(group, columns=["image.bytes"]).column("image")
                self._group = (shard, group), column.combine_chunks().field("bytes")
        return self._group[1][row - first].as_py()

    def stage(self, folder, say):
        """Copy the images to `folder`, a file and its offsets for each shard; continues where it was interrupted."""
        folder = os.path.join(folder, self.digest()[:12])
        os.makedirs(folder, exist_ok=True)
        said = time.monotonic()
        for shard, path in enumerate(self._paths):
            target, offsets = os.path.join(folder, f"{shard}.images"), os.path.join(folder, f"{shard}.npy")
            if not os.path.exists(target):
                ends = [0]
                with _parquet(path) as file, open(f"{target}.partial", "wb") as images:
                    for group in range(file.num_row_groups):
                        column = file.read_row_group(group, columns=["image.bytes"]).column("image").combine_chunks()
                        for value in column.field("bytes"):
                            ends.append(ends[-1] + images.write(value.as_buffer() or b""))
                    images.flush()
                    os.fsync(images.fileno())
                np.save(offsets, np.array(ends, np.int64))
                os.replace(f"{target}.partial", target)  # last: it says that the offsets are there too
            if time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                say(f"copied the images of {shard + 1} of {len(self._paths)} parquet files")
        self._staged, self._group, self._open = folder, (None, None), {}

    def __getstate__(self):
        return {**self.__dict__, "_group": (None, None), "_open": {}}

    def _read_staged(self, shard, row):
        if shard not in self._open:
            offsets = np.load(os.path.join(self._staged, f"{shard}.npy"), mmap_mode="r")
            self._open[shard] = os.open(os.path.join(self._staged, f"{shard}.images"), os.O_RDONLY), offsets
        file, offsets = self._open[shard]
        return os.pread(file, int(offsets[row + 1] - offsets[row]), int(offsets[row]))


def _shards(root, split):
    """Paths of a split's parquet files; RunError where one of a numbered set is missing."""
    words = {"val": "validation|val", "train": "train"}.get(split, re.escape(split))
    for folder, pattern in (
        (os.path.join(str(root), "data"), rf"({words})-(\d+)-of-(\d+).*\.parquet|({words})\.parquet"),
        (str(root), rf"({words})-(\d+)-of-(\d+).*\.parquet|({words})\.parquet"),
        (os.path.join(str(root), split), r".*\.parquet"),
        (os.path.join(str(root), "validation" if split == "val" else split), r".*\.parquet"),
    ):
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        found = [match for name in names if (match := re.fullmatch(pattern, name))]
        if found:
            numbered = [match for match in found if match.re.groups and match[3]]
            if numbered and len(numbered) != int(numbered[0][3]):
                raise RunError(f"{folder} has {len(numbered)} of the {numbered[0][3]} parquet files of {split}")
            return [os.path.join(folder, match[0]) for match in found]
    return []


class _parquet:
    """A parquet file, opened; pyarrow's errors as RunError."""

    def __init__(self, path):
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise RunError("reading parquet files needs pyarrow; install it with: pip install pyarrow") from None
        self._errors, self.path, self._open = (pyarrow.ArrowException, KeyError, OSError), path, parquet.ParquetFile

    def __enter__(self):
        try:
            self._file = self._open(self.path)
        except self._errors as error:
            self.__exit__(type(error), error, None)
        return self._file

    def __exit__(self, kind, error, trace):
        if hasattr(self, "_file"):
            self._file.close()
        # with an errno it is the operating system's, such as a full disk while images are copied
        if isinstance(error, self._errors) and not (getattr(error, "errno", None) and hasattr(self, "_file")):
            reason = str(error).splitlines()[0]
            raise RunError(
                f"{self.path} cannot be read as images with image.bytes, image.path and label: {reason}"
            ) from None


def _wnid_and_name(path, where):
    """`n01440764_10026_n01440764.JPEG` -> (n01440764, n01440764_10026.JPEG), and two forms that others write."""
    name = os.path.basename(path or "")
    if match := re.fullmatch(r"(.+)_(n\d{8})(\.\w+)", name):
        return match[2], match[1] + match[3]
    if match := WNID.fullmatch(os.path.basename(os.path.dirname(path or ""))):
        return match[0], name
    if match := re.fullmatch(r"(n\d{8})_\d+\.\w+", name):
        return match[1], name
    raise RunError(f"{where}: the image's path {path!r} does not name its wnid, as ILSVRC/imagenet-1k's paths do")


def _class_words(schema):
    """Names of the labels, from what the library `datasets` leaves in a file's schema; empty where it did not."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return list(features["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return []
