"""Keeps what write_dataset.py has not finished yet in S3, so that a new instance continues it.

s3://BUCKET/rn50/partial/asked               what the conversion was asked for; all else is of that one
s3://BUCKET/rn50/partial/SPLIT.journal       what of the data counts
s3://BUCKET/rn50/partial/SPLIT_SIZE.beton/0  its data: parts, of which the last grows

The writer appends data and then names it in its journal. A snapshot reads the journal, uploads the data that is there
by then, and puts the journal last: the data in the bucket always covers the journal. What lies behind it does no harm:
the writer cuts it off, and writes the same bytes again.
"""

import contextlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rn50.cloud import store as cloud
from rn50.cloud.fetch import delete_objects, disk_errors
from rn50.files import write_atomically

PARTIAL = f"{cloud.PREFIX}/partial"
PART = 64 << 20  # bytes; at a stop, up to one for each size is uploaded within seconds
AT_ONCE = 4


class Snapshots:
    """Of the .beton files in `folder`. asked: a text; what the bucket holds for another one is removed."""

    def __init__(self, s3, bucket, folder, *, asked, say):
        self.s3, self.bucket, self.folder, self.say = s3, bucket, Path(folder), say
        self._kept = cloud.Folder(s3, bucket, PARTIAL)
        self._headers, self._sent, self._lock = {}, {}, threading.Lock()
        if self._kept.read_bytes("asked") != asked.encode():
            self.forget()
            self._kept.write_bytes("asked", asked.encode())

    def restore(self, split):
        """Have in the folder what the bucket keeps of a split; returns whether it was used."""
        journal = self._kept.read_bytes(f"{split}.journal")
        if journal is None or (self.folder / f"{split}.journal").exists():
            return False
        names, parts = _files(journal), self._parts(split)
        if any((self.folder / name).exists() for name in names):
            return False  # finished here, after the last snapshot
        if any(not _whole(parts, name) for name in names):
            self.say(f"{split}: the bucket's unfinished files have holes; they are not used")
            return False
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for name in names:
                partial = self.folder / f"{name}.partial"
                list(pool.map(lambda number: self._fetch(name, number, partial), _numbers(parts, name)))  # noqa: B023
        with disk_errors(self.folder):
            write_atomically(self.folder / f"{split}.journal", journal.decode())
        self._headers[split], self._sent = _header(journal), self._sent | parts
        return True

    def take(self, split):
        """Bring the bucket up to date; returns whether it is. For any thread."""
        with self._lock:
            return self._take(split)

    def _take(self, split):
        journal = _read_journal(self.folder / f"{split}.journal")
        if journal is None:
            return False
        if self._headers.get(split) != _header(journal):
            self._begin(split, journal)
        work = []
        for name in _files(journal):
            path = self._data(name)
            size = path.stat().st_size if path else 0
            for number in range(-(-size // PART)):
                end = min(PART, size - number * PART)
                if self._sent.get((name, number)) != end:
                    work.append((name, path, number, end))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            if not all(pool.map(lambda part: self._send(*part), work)):
                return False  # the writer has moved on, or started over: the next one sees that
        self._kept.write_bytes(f"{split}.journal", journal)
        return True

    def forget(self, split=""):
        """Remove what is kept of a split, or of all: journals first."""
        found = self._kept.keys(split)
        for name in [name for name in found if name.endswith(".journal")]:
            self.s3.delete_object(Bucket=self.bucket, Key=f"{PARTIAL}/{name}")
        delete_objects(self.s3, self.bucket, [f"{PARTIAL}/{name}" for name in found])
        self._headers.pop(split, None)
        self._sent = {part: size for part, size in self._sent.items() if split and not part[0].startswith(f"{split}_")}

    def _begin(self, split, journal):
        """Know what the bucket has of this journal's files, or make it have nothing."""
        before = self._kept.read_bytes(f"{split}.journal")
        if before is not None and _header(before) == _header(journal):
            self._sent |= self._parts(split)
        else:
            self.forget(split)
        self._headers[split] = _header(journal)

    def _data(self, name):
        partial, final = self.folder / f"{name}.partial", self.folder / name
        return partial if partial.exists() else final if final.exists() else None

    def _send(self, name, path, number, size):
        data = b""
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            data = os.pread(file.fileno(), size, number * PART)
        if len(data) < size:
            return False
        self._kept.write_bytes(f"{name}/{number}", data)
        self._sent[name, number] = size
        return True

    def _fetch(self, name, number, partial):
        data = self._kept.read_bytes(f"{name}/{number}")
        with disk_errors(partial):
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                view, at = memoryview(data), number * PART
                while view:
                    written = os.pwrite(descriptor, view, at)
                    view, at = view[written:], at + written
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _parts(self, split):
        """{(file, number): bytes} of a split in the bucket."""
        found = self._kept.keys(f"{split}_")
        split_names = {key: key.rpartition("/") for key in found}
        return {(name, int(number)): found[key] for key, (name, _, number) in split_names.items() if number.isdigit()}


def _read_journal(path):
    """A journal's whole lines, or None where there is nothing yet."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    return data[: data.rfind(b"\n") + 1] or None


def _header(journal):
    return journal.partition(b"\n")[0]


def _files(journal):
    return json.loads(_header(journal))["files"]


def _numbers(parts, name):
    return sorted(number for file, number in parts if file == name)


def _whole(parts, name):
    numbers = _numbers(parts, name)
    return numbers == list(range(len(numbers))) and all(parts[name, number] == PART for number in numbers[:-1])
