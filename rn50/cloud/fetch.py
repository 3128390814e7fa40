"""An origin's files onto a local disk, in parts, each of which is also kept in S3 for the next instance.

s3://BUCKET/rn50/source/NAME/version    which version of the file the parts are of
s3://BUCKET/rn50/source/NAME/00000      its first part, and so on

On the disk NAME.partial is filled at many places at once; a record beside it says which parts are there.
"""

import contextlib
import errno
import json
import os
import random
import shutil
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from rn50.cloud import origins, ranges
from rn50.cloud import store as cloud
from rn50.errors import RunError
from rn50.files import sha256

SOURCE = f"{cloud.PREFIX}/source"
PART, CHUNK = 256 << 20, 1 << 20  # bytes
AT_ONCE, TRIES = 8, 8
PAUSE_SECONDS, LONGEST_PAUSE = 1.0, 60.0  # doubled at every try of a part; what a server asks for comes first
LONGEST_ASKED = 300.0


class Fetch:
    """Brings `files` (of origins.listing) to `folder`; goes on with what is there and what the bucket keeps.

    records: a folder for what is known of the files. progress: its `add(bytes)` is called from many threads. An origin
    in S3 is not copied to the bucket.
    """

    def __init__(self, files, *, origin, secret, s3, bucket, folder, records, progress, say):
        self.files, self.origin, self.s3, self.bucket = files, origin, s3, bucket
        self.folder, self.records, self.progress, self.say = Path(folder), Path(records), progress, say
        self._authorization = origins.authorization(origin, secret)
        self._keeps, self._ended = origin.kind != "s3", False

    def run(self):
        """RunError where trying again may help, UsageError where it does not."""
        self.records.mkdir(parents=True, exist_ok=True)
        waiting = [file for file in self.files if not self._is_here(file)]
        self.progress.start(sum(file.bytes for file in self.files))
        self.progress.add(sum(file.bytes for file in self.files) - sum(file.bytes for file in waiting))
        kept = cloud.objects(self.s3, self.bucket, f"{SOURCE}/", strip=f"{SOURCE}/") if self._keeps and waiting else {}
        self._check_room(waiting)
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            incoming = list(pool.map(lambda file: self._prepare(file, kept), waiting))
            work = [pool.submit(self._part, one, number) for one in incoming for number in range(one.count)]
            ended, _ = wait(work, return_when=FIRST_EXCEPTION)
            for part in ended:
                part.result()
        finally:
            self._ended = True
            pool.shutdown(wait=False, cancel_futures=True)

    def _is_here(self, file):
        record = self.records / record_name(file)
        return (self.folder / file.name).exists() and _lines(record)[:1] == [version(file)]

    def _check_room(self, waiting):
        started = [self.folder / f"{file.name}.partial" for file in waiting]
        needed = sum(file.bytes for file in waiting) - sum(p.stat().st_blocks * 512 for p in started if p.exists())
        free = shutil.disk_usage(self.records).free
        if needed > free:
            raise RunError(f"the images take {needed / 1e9:.1f} GB more and {self.folder} has {free / 1e9:.1f} GB; "
                           "launch with a larger disk")  # fmt: skip

    def _prepare(self, file, kept):
        parts = {}
        if self._keeps:
            parts = {int(name.rpartition("/")[2]): size for name, size in kept.items() if _is_part(name, file)}
            found = self._get(f"{SOURCE}/{file.name}/version") if f"{file.name}/version" in kept else None
            if found != version(file):
                self._forget(file, kept)
                self.s3.put_object(Bucket=self.bucket, Key=f"{SOURCE}/{file.name}/version", Body=version(file).encode())
                parts = {}
        return Incoming(file, self.folder, self.records, parts)

    def _get(self, key):
        return self.s3.get_object(Bucket=self.bucket, Key=key)["Body"].read().decode()

    def _forget(self, file, kept):
        keys = [f"{SOURCE}/{name}" for name in kept if name.rpartition("/")[0] == file.name]
        delete_objects(self.s3, self.bucket, sorted(keys, key=lambda key: not key.endswith("/version")))

    def _part(self, incoming, number):
        first, last = incoming.span(number)
        size = last - first + 1
        if number in incoming.done:
            self.progress.add(size)
        elif incoming.kept.get(number) == size:
            self._with_patience(incoming, number, self._from_bucket)
        else:
            self._with_patience(incoming, number, self._from_origin)
        incoming.add(number)
        if self._keeps and incoming.kept.get(number) != size:
            key = f"{SOURCE}/{incoming.file.name}/{number:05d}"
            with Slice(incoming.partial, first, size) as body:
                self.s3.put_object(Bucket=self.bucket, Key=key, Body=body)
            incoming.kept[number] = size
        if incoming.is_last():
            self._finish(incoming)

    def _with_patience(self, incoming, number, receive):
        first, last = incoming.span(number)
        file, attempt = incoming.file, 0
        while True:
            received = Received(incoming.descriptor, first, self.progress)
            try:
                with receive(incoming, number) as stream:
                    self._copy(stream, received, last - first + 1)
                with disk_errors(file.name):
                    return os.fdatasync(incoming.descriptor)
            except (ranges.Refused, ranges.Broken) as error:
                self.progress.add(-received.count)
                attempt += 1
                if self._ended or not error.repeatable or attempt == TRIES:
                    raise origins.explain(self.origin, file.name, error) from None
                pause = min(LONGEST_PAUSE, PAUSE_SECONDS * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
                pause = min(LONGEST_ASKED, error.retry_after or pause)
                self.say(f"{file.name}, part {number + 1} of {incoming.count}: {error}; again in {pause:.0f} s")
                time.sleep(pause)
            except Changed:
                if receive == self._from_bucket:
                    incoming.kept.pop(number)
                    receive = self._from_origin
                    continue
                self._start_over(incoming, "has changed where it comes from")

    def _copy(self, stream, received, size):
        while received.count < size and not self._ended:
            data = stream.read(min(CHUNK, size - received.count))
            if not data:
                raise ranges.Broken("the connection ended early")
            received.write(data)
        if self._ended:
            raise ranges.Broken("stopped")

    def _from_origin(self, incoming, number):
        file, (first, last) = incoming.file, incoming.span(number)
        if self.origin.kind == "s3":
            return S3Stream(self.s3, *origins.split_s3(file.place), first, last, file.mark)
        span = (first, last) if file.ranged else (None, None)
        stream = HttpStream(ranges.ask(file.place, self._authorization, *span))
        begins, total = ranges.span(stream.answer)
        # Where a checksum is known, it says more than an ETag, which may differ between the servers of a network.
        # What comes as a whole is of one version, and may be packed anew for each who asks.
        changed = not file.sha256 and file.ranged and ranges.mark(stream.answer) != file.mark
        if total != file.bytes or (begins or 0) != first or (file.ranged and begins is None) or changed:
            stream.close()
            raise Changed
        return stream

    def _from_bucket(self, incoming, number):
        first, last = incoming.span(number)
        return S3Stream(self.s3, self.bucket, f"{SOURCE}/{incoming.file.name}/{number:05d}", 0, last - first)

    def _finish(self, incoming):
        file = incoming.file
        if file.sha256 and sha256(incoming.partial) != file.sha256:
            self._start_over(incoming, "arrived damaged")
        incoming.close()
        os.replace(incoming.partial, self.folder / file.name)
        self.say(f"{file.name}: {file.bytes / 1e6:.0f} MB are here" + (", checksum right" if file.sha256 else ""))

    def _start_over(self, incoming, why):
        incoming.remove()
        if self._keeps:
            kept = cloud.objects(self.s3, self.bucket, f"{SOURCE}/{incoming.file.name}/", strip=f"{SOURCE}/")
            self._forget(incoming.file, kept)
        raise RunError(f"{incoming.file.name} {why}; the next try fetches it anew")


class Incoming:
    """A file that is being fetched. kept: {part: bytes} in the bucket."""

    def __init__(self, file, folder, records, kept):
        self.file, self.kept, self._lock = file, kept, threading.Lock()
        self.partial, self._record = folder / f"{file.name}.partial", records / record_name(file)
        self.count = -(-file.bytes // PART) if file.ranged else 1
        lines = _lines(self._record)
        if lines[:1] != [version(file)] or not self.partial.exists():
            self.remove()
            with disk_errors(self.partial):
                self._record.write_text(version(file) + "\n")
            lines = []
        self.done = {int(line) for line in lines[1:]}
        self.left = self.count
        with disk_errors(self.partial):
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self.descriptor = os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(self.descriptor, file.bytes)

    def span(self, number):
        """First and last byte of a part."""
        size = PART if self.file.ranged else self.file.bytes
        return number * size, min(self.file.bytes, (number + 1) * size) - 1

    def add(self, number):
        """A part is on the disk."""
        with self._lock, disk_errors(self._record):
            if number not in self.done:
                with open(self._record, "a") as file:
                    file.write(f"{number}\n")
                self.done.add(number)

    def is_last(self):
        """To be asked once by every part, when nothing of it is left to do."""
        with self._lock:
            self.left -= 1
            return self.left == 0

    def close(self):
        os.close(self.descriptor)

    def remove(self):
        self._record.unlink(missing_ok=True)
        self.partial.unlink(missing_ok=True)
        self.partial.with_name(self.partial.name.removesuffix(".partial")).unlink(missing_ok=True)


class Received:
    """Bytes written at their place in a file, from `first` on."""

    def __init__(self, descriptor, first, progress):
        self.descriptor, self.first, self.progress, self.count = descriptor, first, progress, 0

    def write(self, data):
        with disk_errors("the images"):
            view = memoryview(data)
            while view:
                written = os.pwrite(self.descriptor, view, self.first + self.count)
                self.count += written
                self.progress.add(written)
                view = view[written:]


class Changed(Exception):
    """The file is another one than the listing saw."""


class HttpStream:
    def __init__(self, answer):
        self.answer = answer

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        self.answer.close()

    def read(self, count):
        return ranges.read(self.answer, count)


class S3Stream:
    """A range of an object. Changed where it is not the version `mark`, Broken where S3 does not give it."""

    def __init__(self, s3, bucket, key, first, last, mark=None):
        from botocore.exceptions import BotoCoreError, ClientError

        self._errors = (BotoCoreError, ClientError, OSError)
        extra = {"IfMatch": mark} if mark else {}
        try:
            found = s3.get_object(Bucket=bucket, Key=key, Range=f"bytes={first}-{last}", **extra)
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code in ("PreconditionFailed", "412", "NoSuchKey", "InvalidRange"):
                raise Changed from None
            raise ranges.Refused(error.response["ResponseMetadata"].get("HTTPStatusCode", 500), code) from None
        except self._errors as error:
            raise ranges.Broken(type(error).__name__) from None
        self._body = found["Body"]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._body.close()

    def read(self, count):
        try:
            return self._body.read(count)
        except self._errors as error:
            raise ranges.Broken(type(error).__name__) from None
        except Exception as error:  # urllib3's own
            if type(error).__module__.partition(".")[0] not in ("urllib3", "http"):
                raise
            raise ranges.Broken(type(error).__name__) from None


class Slice:
    """A part of a file as a file, for put_object."""

    def __init__(self, path, first, size):
        self._file, self._first, self._size, self._at = open(path, "rb"), first, size, 0  # noqa: SIM115

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def __len__(self):
        return self._size

    def tell(self):
        return self._at

    def seekable(self):
        return True

    def seek(self, offset, whence=os.SEEK_SET):
        self._at = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence] + offset
        return self._at

    def read(self, count=-1):
        left = max(0, self._size - self._at)
        data = os.pread(self._file.fileno(), left if count is None or count < 0 else min(count, left),
                        self._first + self._at)  # fmt: skip
        self._at += len(data)
        return data


def version(file):
    """What a file's parts are of, as a line."""
    return json.dumps({"bytes": file.bytes, "sha256": file.sha256, "mark": file.mark, "part": PART}, sort_keys=True)


def record_name(file):
    return file.name.replace("/", "+") + ".parts"


def _is_part(name, file):
    folder, _, number = name.rpartition("/")
    return folder == file.name and number.isdigit()


def _lines(path):
    """The whole lines of a record; a torn last one is left out."""
    try:
        return path.read_text().split("\n")[:-1]
    except FileNotFoundError:
        return []


def delete_objects(s3, bucket, keys):
    """Delete objects, in the order given."""
    for start in range(0, len(keys), 1000):
        chosen = [{"Key": key} for key in keys[start : start + 1000]]
        s3.delete_objects(Bucket=bucket, Delete={"Objects": chosen, "Quiet": True})


@contextlib.contextmanager
def disk_errors(what):
    """The operating system's refusal of a write, as one line."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        more = "; launch with a larger disk" if full else ""
        raise RunError(f"cannot write {what}: {error.strerror}{more}") from None
