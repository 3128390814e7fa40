"""Writes a ladder of .beton files: deterministic, resumable, and never half-finished under a final name."""

import contextlib
import errno
import fcntl
import json
import os

import numpy as np

from rn50.data.beton import (
    ALLOCATION,
    FIELD,
    FIELD_TYPES,
    HEADER,
    IMAGE,
    MANIFEST_FORMAT,
    METADATA_START,
    PAGE_SIZE,
    SAMPLE,
    VERSION,
    manifest_path,
    summarise,
)
from rn50.errors import RunError
from rn50.files import sha256


class LadderWriter:
    """Writes one split at several sizes side by side, continues after an interruption, and never half-finishes.

    `paths` maps a rung (anything) to the final path. Data goes to `<path>.partial`; `journal` (a path) holds the
    fingerprint and then, line by line, what of the data is safely on disk. The order in which samples are added is
    the order in the file, so equal input gives equal bytes. `done` counts the positions already taken (written or
    skipped); `started_over` is the reason why an earlier partial conversion could not be continued, or None.
    RunError for a full disk, for a sample larger than a page, and when another process is writing here.
    """

    def __init__(self, *, paths, journal, capacity, fingerprint):
        self.paths = {rung: str(path) for rung, path in paths.items()}
        self.capacity, self.journal_path = capacity, str(journal)
        self.labels, self.skipped, self.odd, self.done, self.started_over = [], [], [], 0, None
        self._uncommitted = []
        names = [os.path.basename(path) for path in self.paths.values()]
        self._header = {"fingerprint": fingerprint, "capacity": capacity, "files": names}
        with disk_errors(self.journal_path):
            self._journal = open(self.journal_path, "a+b", buffering=0)  # noqa: SIM115 - closed by close()
        self._files = {rung: _PartialBeton(path, capacity) for rung, path in self.paths.items()}
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with disk_errors(self.journal_path):
                self._resume()
        except BlockingIOError:
            self.close()
            raise RunError(f"another conversion is writing {self.journal_path}; wait for it or stop it") from None
        except BaseException:
            self.close()
            raise

    def add(self, *, label, pictures):
        """One sample: `pictures` maps each rung to (mode, width, height, bytes-like)."""
        record = [label]
        for rung, file in self._files.items():
            mode, width, height, data = pictures[rung]
            with disk_errors(file.path):
                file.append(mode, width, height, data)
            record += [mode, width, height, len(data)]
        self.labels.append(label)
        self._uncommitted.append(record)
        self.done += 1

    def skip(self, *, sample_id, reason):
        """Leave out the sample of this position; it will be listed in the manifest."""
        self.skipped.append({"id": sample_id, "reason": reason})
        self._uncommitted.append(self.skipped[-1])
        self.done += 1

    def note(self, *, sample_id, remark):
        """Something odd about the sample added last; it will be listed in the manifest."""
        self.odd.append({"id": sample_id, "remark": remark})
        self._uncommitted.append(self.odd[-1])

    def commit(self):
        """Everything added so far survives a crash. The data is synced before the journal names it."""
        if not self._uncommitted:
            return
        for file in self._files.values():
            with disk_errors(file.path):
                file.flush()
                os.fsync(file.handle.fileno())
        with disk_errors(self.journal_path):
            _write_all(self._journal, json.dumps(self._uncommitted, separators=(",", ":")).encode() + b"\n")
            os.fsync(self._journal.fileno())
        self._uncommitted = []

    def finish(self, manifests):
        """Complete the files, put each under its final name with its manifest, and drop the journal.

        `manifests` maps each rung to the manifest's own part; counts, sizes and checksum are added here.
        """
        self.commit()
        if not self.labels:
            raise RunError("no image could be read, so there is nothing to write")
        labels = np.array(self.labels, "<i8")
        for rung, file in self._files.items():
            with disk_errors(file.path):
                file.complete(labels)
                checksum = sha256(file.path)
            summary = file.summary(labels, len(manifests[rung]["classes"]))
            listed = {"skipped": self.skipped, "odd": self.odd}
            manifest = {"format": MANIFEST_FORMAT, **manifests[rung], **summary, **listed}
            manifest["beton"] = {"bytes": os.path.getsize(file.path), "sha256": checksum}
            self._publish(file, self.paths[rung], manifest)
        os.remove(self.journal_path)
        self.close()

    def close(self):
        for file in self._files.values():
            if file.handle:
                file.handle.close()
        self._journal.close()

    def _publish(self, file, path, manifest):
        """The manifest comes last: where it is, the beton is complete."""
        target = manifest_path(path)
        with disk_errors(target):
            with open(target + ".partial", "wb") as handle:
                handle.write(json.dumps(manifest, indent=1).encode() + b"\n")
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(file.path, path)
            os.replace(target + ".partial", target)
            _sync_folder(path)

    def _resume(self):
        self._journal.seek(0)
        lines = self._journal.read().split(b"\n")[:-1]  # what follows the last newline was cut off
        for rung, path in self.paths.items():
            if lines and os.path.exists(path) and not os.path.exists(manifest_path(path)):
                os.replace(path, self._files[rung].path)  # interrupted between the two renames of _publish
        try:
            earlier = json.loads(lines[0]) if lines else None
            self.started_over = earlier and self._replay(earlier, lines[1:])
        except (ValueError, TypeError, KeyError, IndexError):
            earlier, self.started_over = {}, "the journal of the interrupted conversion is damaged"
        if lines and not self.started_over:
            self._journal.truncate(sum(len(line) + 1 for line in lines))
        else:
            self._start_over(earlier or {})
        for file in self._files.values():
            file.open()

    def _replay(self, earlier, lines):
        """Take up what the journal says is written; returns the reason where that is impossible, else None."""
        names = self._header["files"]
        if any(earlier[key] != self._header[key] for key in ("fingerprint", "capacity")):
            return "the settings, the source or a library's version differ from the interrupted conversion"
        if not set(names) <= set(earlier["files"]):
            return "the interrupted conversion had other out.resolutions"
        columns = [1 + 4 * earlier["files"].index(name) for name in names]
        for record in (record for line in lines for record in json.loads(line)):
            if isinstance(record, dict):
                (self.odd if "remark" in record else self.skipped).append(record)
                self.done += "remark" not in record
                continue
            self.done += 1
            self.labels.append(record[0])
            for column, file in zip(columns, self._files.values(), strict=True):
                file.place(*record[column : column + 4])
        # With every sample written, some files may be under their final names already; before that, none are.
        if names != earlier["files"] and self.done < self.capacity:
            return "the interrupted conversion had other out.resolutions"
        if not all(file.is_there() for file in self._files.values()):
            return "the partial files are shorter than their journal says"
        return None

    def _start_over(self, earlier):
        folder = os.path.dirname(os.path.abspath(self.journal_path))
        for name in earlier.get("files", []):
            leftover = os.path.join(folder, name + ".partial")
            if os.path.exists(leftover):
                os.remove(leftover)
        self.labels, self.skipped, self.odd, self.done = [], [], [], 0
        self._files = {rung: _PartialBeton(path, self.capacity) for rung, path in self.paths.items()}
        self._journal.truncate(0)
        _write_all(self._journal, json.dumps(self._header).encode() + b"\n")
        _sync_folder(self.journal_path)


class _PartialBeton:
    """One file in the making: where the next sample goes, and the bytes that are not on disk yet."""

    def __init__(self, path, capacity):
        self.path = path + ".partial"
        # Pages start after room for `capacity` records, because skipped samples are known only at the end.
        self.start = self.end = _align(METADATA_START + capacity * SAMPLE.itemsize)
        self.images = np.zeros(capacity, IMAGE)
        self.sizes = np.zeros(capacity, "<u4")
        self.count = 0
        self._pending, self._pending_bytes = [], 0
        self.handle = None

    def open(self):
        """Continue after the last placed sample, or from nothing."""
        self.handle = open(self.path, "r+b" if self.count else "w+b", buffering=0)  # noqa: SIM115 - closed by close()
        self.handle.truncate(self.end)
        self.handle.seek(self.end)

    def is_there(self):
        return self.count == 0 or (os.path.exists(self.path) and os.path.getsize(self.path) >= self.end)

    def place(self, mode, width, height, size):
        """Book the next `size` bytes; returns how many bytes of padding come before them."""
        if size > PAGE_SIZE:
            raise RunError(f"a picture of {width}x{height} takes {size} bytes, more than a page of {PAGE_SIZE}; lower "
                           "out.resolutions or out.raw_share")  # fmt: skip
        room = _align(self.end) - self.end
        padding = room if size > room else 0
        self.images[self.count] = (mode, width, height, self.end + padding)
        self.sizes[self.count] = size
        self.count += 1
        self.end += padding + size
        return padding

    def append(self, mode, width, height, data):
        padding = self.place(mode, width, height, len(data))
        self._pending += [bytes(padding), data]
        self._pending_bytes += padding + len(data)
        if self._pending_bytes >= PAGE_SIZE:
            self.flush()

    def flush(self):
        _write_all(self.handle, b"".join(self._pending))
        # Makes Linux start writing now, beside the encoding; left to the next fsync, the workers wait while it writes.
        with contextlib.suppress(OSError):
            start = self.end - self._pending_bytes
            os.posix_fadvise(self.handle.fileno(), start, self._pending_bytes, os.POSIX_FADV_DONTNEED)
        self._pending, self._pending_bytes = [], 0

    def complete(self, labels):
        """Add everything around the data, and sync."""
        table = np.zeros(self.count, ALLOCATION)
        table["sample_id"] = np.arange(self.count)
        table["ptr"], table["size"] = self.images["data_ptr"][: self.count], self.sizes[: self.count]
        header = np.zeros(1, HEADER)
        header["version"], header["num_fields"], header["page_size"] = VERSION, len(FIELD_TYPES), PAGE_SIZE
        header["num_samples"], header["alloc_table_ptr"] = self.count, _align(self.end)
        fields = np.zeros(len(FIELD_TYPES), FIELD)
        for field, (name, type_id) in zip(fields, FIELD_TYPES.items(), strict=True):
            field["type_id"] = type_id
            field["name"][: len(name)] = np.frombuffer(name.encode(), "<u1")
        samples = np.zeros(self.count, SAMPLE)
        samples["f0"], samples["f1"] = self.images[: self.count], labels
        self.handle.truncate(_align(self.end))
        self.handle.seek(_align(self.end))
        _write_all(self.handle, table.tobytes())
        self.handle.seek(0)
        _write_all(self.handle, header.tobytes() + fields.tobytes() + samples.tobytes())
        os.fsync(self.handle.fileno())

    def summary(self, labels, num_classes):
        images = self.images[: self.count]
        return {"num_samples": self.count, **summarise(images["width"], images["height"], labels, num_classes)}


def _align(position):
    return -(-position // PAGE_SIZE) * PAGE_SIZE


def _write_all(handle, data):
    view = memoryview(data)
    while len(view):
        view = view[handle.write(view) :]


def _sync_folder(path):
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def disk_errors(path):
    """Turns the operating system's refusals around `path` into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RunError(
                f"no room left to write {path} ({error.strerror}); make room and run the same command again to continue"
            ) from None
        raise RunError(f"cannot write {path}: {error.strerror}") from None
