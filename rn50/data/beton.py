"""The .beton format: our deterministic, resumable writer of a ladder of files, and the validator.

Layout (FFCV 1.0.2, version 2): header, two field descriptors, one metadata record a sample, padding to a page,
pages of image data, allocation table. A sample never crosses a page.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np

from rn50.data.native import index_jpeg
from rn50.data.sources import decode_jpeg
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
METADATA_START = HEADER.itemsize + len(FIELD_TYPES) * FIELD.itemsize


def encode_image(rgb, quality):
    """uint8 (height, width, 3) RGB -> a baseline JPEG at `quality` (1-100), and behind it the table of its tiles.

    Every decoder stops before the table; the fast path (decode.py) begins decoding next to its crop with it.
    """
    jpeg = encode_jpeg(rgb, quality)
    return jpeg + index_jpeg(jpeg)


def encode_jpeg(rgb, quality):
    """uint8 (height, width, 3) RGB -> the bytes of a baseline JPEG at `quality` (1-100)."""
    done, encoded = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise ValueError(f"OpenCV cannot encode a picture of {rgb.shape[1]}x{rgb.shape[0]} pixels")
    return encoded.tobytes()


def shrink_image(rgb, max_side):
    """`rgb` with its longer side at most `max_side`; smaller pictures are returned as they are.

    The short side is rounded down as FFCV does, so that the files are comparable, but in whole numbers: FFCV's
    floating-point product can fall just below the integer and lose a pixel of the long side too.
    """
    height, width = rgb.shape[:2]
    longer = max(height, width)
    if longer <= max_side:
        return rgb
    size = (max(1, width * max_side // longer), max(1, height * max_side // longer))
    return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)


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
        self.labels, self.skipped, self.done, self.started_over = [], [], 0, None
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
                checksum = _sha256(file.path)
            summary = file.summary(labels, len(manifests[rung]["classes"]))
            manifest = {"format": MANIFEST_FORMAT, **manifests[rung], **summary, "skipped": self.skipped}
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
            return "the settings, the source or the OpenCV version differ from the interrupted conversion"
        if not set(names) <= set(earlier["files"]):
            return "the interrupted conversion had other out.resolutions"
        columns = [1 + 4 * earlier["files"].index(name) for name in names]
        for record in (record for line in lines for record in json.loads(line)):
            self.done += 1
            if isinstance(record, dict):
                self.skipped.append(record)
                continue
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
        self.labels, self.skipped, self.done = [], [], 0
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
    RunError names the file, what is wrong and what to do.
    """
    path = str(path)
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as handle:
            start = handle.read(METADATA_START)
            header = _read_header(path, size, start)
            count, table_ptr = int(header["num_samples"]), int(header["alloc_table_ptr"])
            samples = np.fromfile(handle, SAMPLE, count)
            handle.seek(table_ptr)
            table = np.fromfile(handle, ALLOCATION, count)
    except FileNotFoundError:
        raise RunError(f"{path} does not exist; make it with write_dataset.py") from None
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None
    image, labels = samples["f0"], samples["f1"]
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
    _require(path, size >= METADATA_START, f"it is {size} bytes long, too short for a .beton file")
    header = np.frombuffer(start, HEADER, 1)[0]
    count, table_ptr = int(header["num_samples"]), int(header["alloc_table_ptr"])
    _require(path, header["version"] == VERSION, f"it is no .beton file of version {VERSION}")
    _require(path, table_ptr > 0, "its writer never finished")
    _require(path, count > 0, "it holds no samples")
    page = int(header["page_size"])
    _require(path, page >= 1 << 21 and page & (page - 1) == 0, f"its page size of {page} bytes is impossible")
    _require(path, header["num_fields"] == len(FIELD_TYPES), f"it has {header['num_fields']} fields, not two")
    fields = np.frombuffer(start, FIELD, len(FIELD_TYPES), offset=HEADER.itemsize)
    for field, (name, type_id) in zip(fields, FIELD_TYPES.items(), strict=True):
        actual = field["name"].tobytes().split(b"\0")[0].decode("ascii", "replace")
        ok = actual == name and field["type_id"] == type_id
        _require(path, ok, f"its field {actual!r} of type {field['type_id']} should be {name!r} of type {type_id}")
    expected = table_ptr + count * ALLOCATION.itemsize
    _require(path, size >= expected, f"it is truncated: {size} bytes of {expected}")
    _require(path, size == expected, f"it is {size} bytes long, {size - expected} more than its header says")
    _require(path, METADATA_START + count * SAMPLE.itemsize <= table_ptr, "its metadata and allocation table overlap")
    return header


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


def _require(path, ok, problem):
    if not ok:
        raise RunError(f"{path} cannot be used: {problem}; copy it again, or remove it and run write_dataset.py")


def verify(path, *, quick=False, progress=iter):
    """Check the whole file, or with `quick` the structure and 200 images spread over it, in all cores.

    Returns (BetonInfo, problems), each problem one line. RunError where the structure is already broken.
    `progress` wraps the list of blocks that are worked on.
    """
    info = read_info(path)
    problems = _structure_problems(info)
    chosen = np.arange(info.num_samples)
    if quick and info.num_samples > 200:
        chosen = np.linspace(0, info.num_samples - 1, 200).astype(int)
    blocks = np.array_split(chosen, max(1, len(chosen) // 50))
    file = os.open(info.path, os.O_RDONLY)
    try:
        # Threads are enough: the decoder works outside Python's lock.
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            checksum = None if quick or info.manifest is None else threads.submit(_sha256, info.path)
            work = [threads.submit(_block_problems, info, file, block) for block in blocks]
            try:
                for block in progress(work):
                    problems += block.result()
                if checksum and checksum.result() != info.manifest["beton"]["sha256"]:
                    problems.insert(0, "the checksum is not the manifest's: bytes have changed since it was written")
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        os.close(file)
    return info, problems


def _structure_problems(info):
    problems = []
    first, last = info.data_ptrs // info.page_size, (info.data_ptrs + info.sizes - 1) // info.page_size
    if (first != last).any():
        problems.append(f"sample {int(np.argmax(first != last))} crosses a page")
    order = np.argsort(info.data_ptrs)
    overlap = (info.data_ptrs + info.sizes)[order][:-1] > info.data_ptrs[order][1:]
    if overlap.any():
        problems.append(f"sample {int(order[np.argmax(overlap)])} overlaps the next one")
    if info.manifest:
        for key, value in summarise(info.widths, info.heights, info.labels, info.num_classes).items():
            if info.manifest.get(key) != value:
                problems.append(f"{key} is not what the manifest says")
        side = info.manifest["settings"]["max_side"]
        if max(info.widths.max(), info.heights.max()) > side:
            problems.append(f"an image is larger than the manifest's {side} pixels")
    return problems


def _block_problems(info, file, block):
    problems = []
    for k in block:
        if info.modes[k] == RAW:
            continue  # any bytes are pixels; only the checksum can tell
        data = os.pread(file, int(info.sizes[k]), int(info.data_ptrs[k]))
        expected = (int(info.heights[k]), int(info.widths[k]), 3)
        try:
            rgb = decode_jpeg(data, strict=True)
        except ValueError as error:
            problems.append(f"sample {k} (label {info.labels[k]}) is corrupt: {error}")
            continue
        if rgb is None or rgb.shape != expected:
            stored = "CMYK" if rgb is None else f"{rgb.shape[1]}x{rgb.shape[0]}"
            problems.append(f"sample {k} (label {info.labels[k]}) is {stored}, not RGB of {expected[1]}x{expected[0]}")
    return problems


def manifest_path(beton_path):
    """`train_400.beton` -> `train_400.json`."""
    return os.path.splitext(str(beton_path))[0] + ".json"


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


def _sha256(path):
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


class disk_errors:
    """Turns the operating system's refusals around `path` into one line."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if not isinstance(error, OSError):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RunError(f"no room left to write {self.path} ({error.strerror}); make room and run the same command "
                           "again to continue") from None  # fmt: skip
        raise RunError(f"cannot write {self.path}: {error.strerror}") from None
