"""ImageNet-1k as Hugging Face has it: parquet shards with the columns image {bytes, path} and label.

image.path has the wnid (`..._n01440764.JPEG`, as ILSVRC/imagenet-1k has it). The column `label` must order the classes
as their wnids do, and is not used otherwise.
"""

import contextlib
import json
import os
import re
import time

import numpy as np

from rn50.data.imagenet import WNID
from rn50.data.listing import Listing
from rn50.errors import RunError

SAY_SECONDS = 10


class ParquetSource(Listing):
    """Shards with the columns image {bytes, path} and label, in `root`, `root/data` or `root/<split>`.

    A row cannot be read without its row group (100 rows, 11 MB): `stage` copies the images to plain files first.
    """

    kind = "parquet"

    def __init__(self, root, split):
        self._paths = shards(root, split)
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


def parquet_classes(root, split):
    """The wnids of a split, as a set."""
    return {c["wnid"] for c in ParquetSource(root, split).classes}


def shards(root, split):
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


@contextlib.contextmanager
def _parquet(path):
    """The parquet file at `path`, opened; pyarrow's errors as RunError."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise RunError("reading parquet files needs pyarrow; install it with: pip install pyarrow") from None
    opened = False
    try:
        with parquet.ParquetFile(path) as file:
            opened = True
            yield file
    except (pyarrow.ArrowException, KeyError, OSError) as error:
        if opened and getattr(error, "errno", None):
            raise  # the operating system's, such as a full disk while images are copied
        reason = str(error).splitlines()[0]
        raise RunError(f"{path} cannot be read as images with image.bytes, image.path and label: {reason}") from None


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
