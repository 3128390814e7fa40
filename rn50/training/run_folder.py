"""A run's folder: config.yaml, environment.json, log.jsonl (one row an epoch), TensorBoard events, status.json."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import socket
import sys
import time
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from rn50.errors import RunError, Stopped
from rn50.files import read_json, write_atomically
from rn50.machine import commit, cores, processor
from rn50.training import interruption
from rn50.training.distributed import LostContact

PROGRESS_SECONDS = 30.0  # between two progress.json
LOCK = "lock"
LOCK_SECONDS = 2.0  # a process that was killed a moment ago may still be ending
PACKAGES = ("rn50", "torch", "torchvision", "ffcv", "numpy", "numba", "opencv-python", "fastargs")


def make_folder(folder):
    """Make the run's folder; RunError where that or writing into it is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the run folder {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise RunError(f"the run folder {folder} cannot be written to; change its permissions or logging.folder")


class Claim:
    """The right to write into a run's folder, which one process on all machines has at a time; made for every rank.

    held: whether this command has it. refusal: why it cannot have it, or None. `take` is for rank 0; the others are
    told. warn: is told where the file system has no locks: the command then goes on without.

    It is a lock of the file folder/lock, which ends with its process, however that ends. A POSIX record lock (lockf),
    because that belongs to the process: flock's would live on in a child that was forked and outlived a kill -9. Linux
    sends both to NFS servers, for which the file must be open for writing. No one else may open the file in this
    process: closing any descriptor of it gives the lock away.
    """

    def __init__(self, folder, *, warn):
        self.folder, self.held, self.refusal = Path(folder), False, None
        self._warn, self._file = warn, None

    def take(self):
        """Have the folder, or know who has it. Nothing is raised; a second call changes nothing."""
        if self.held or self.refusal:
            return
        try:
            self._file = open(self.folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
            if self._locked():
                self._file.truncate(0)
                self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                self._file.flush()
                self.held = True
            else:
                self._file.seek(0)
                holder = self._file.readline().strip() or "another process"
                self.refusal = (
                    f"{self.folder} is in use: {holder} trains into it; wait until it has ended, stop it, or choose "
                    "another logging.run_name"
                )
        except (OSError, UnicodeDecodeError) as error:
            self.held = True
            self._warn(f"cannot lock {self.folder} ({error}): start no second command with this logging.run_name")

    def _locked(self):
        give_up = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                if time.monotonic() > give_up:
                    return False
                time.sleep(0.1)


def write_status(folder, *, status, reason, step, epoch):
    """How the last command in this folder ended: folder/status.json, written as a whole.

    status: `finished`, `interrupted`, `budget` or `failed`. step, epoch: optimizer steps and whole epochs that were
    done. Nothing is written, and nothing raised, where there is no such folder or it cannot be written.
    """
    content = {"status": status, "reason": reason, "step": step, "epoch": epoch, "time": time.time()}
    if Path(folder).is_dir():
        with contextlib.suppress(OSError):
            write_atomically(Path(folder) / "status.json", json.dumps(content) + "\n")


@contextmanager
def recorded(folder, progress, *, rank, claim=None):
    """How the block ends is in folder/status.json; while it runs there is none.

    progress: an object with `step` and `epoch`, read at the end. Rank 0 writes for all, except that any rank may be the
    first to say why the run failed: the others then only say that it is gone. While a `claim` is not held, the folder
    is left as it is.
    """
    path = Path(folder) / "status.json"

    def write(status, reason):
        if claim and not claim.held:
            return
        if rank == 0 or (status == "failed" and not path.exists()):
            write_status(folder, status=status, reason=reason, step=progress.step, epoch=progress.epoch)

    if rank == 0 and (claim is None or claim.held):
        with contextlib.suppress(OSError):
            path.unlink()
    interruption.at_forced_exit(partial(write, "interrupted"))
    try:
        yield
        write("finished", "all epochs are done")
    except Stopped as stop:
        write(stop.status, str(stop))
        raise
    except LostContact as error:
        if not path.exists():
            write("failed", str(error))
        raise
    except Exception as error:
        write("failed", " ".join(str(error).split()) or type(error).__name__)
        raise
    finally:
        interruption.at_forced_exit(None)


class RunLog:
    """Opens (or reopens) a run folder; only rank 0 makes one.

    rows: the log so far, a list that is added to. A checkpoint holds it, so that the log is whole on another machine
    too, and rows of epochs whose checkpoint never came to be are dropped. A disk that does not take a
    file is said once through `warn`; every row writes all of them again.
    """

    def __init__(self, folder, *, config, environment, rows, warn):
        self.folder, self.rows, self._warn, self._failing = Path(folder), rows, warn, False
        self._noted = time.monotonic()
        self._write("config.yaml", yaml.safe_dump(config, sort_keys=False))
        # a resumed run may be on another machine: keep what each session ran on
        sessions = read_json(self.folder / "environment.json", default=[])
        sessions = [*sessions, {"from_epoch": len(self.rows), **environment}]
        self._write("environment.json", json.dumps(sessions, indent=1))
        self._write_rows()
        events = self.folder / "tensorboard"
        seen = len(self.rows) if events.exists() else 0
        self._open_events(events, purge_step=len(self.rows))
        for row in self.rows[seen:]:
            self._add_events(row)

    def add_epoch(self, row):
        """Append one row (plain values, `epoch` from 0) to log.jsonl and its numbers to TensorBoard."""
        self.rows.append(row)
        self._write_rows()
        self._add_events(row)

    def note_progress(self, progress, *, resolution):
        """Have progress.json say how far the epoch is and at how many px, for whoever watches from outside."""
        if time.monotonic() - self._noted < PROGRESS_SECONDS:
            return
        self._noted = time.monotonic()
        names = ("epoch", "epoch_step", "epoch_steps", "images_seen", "seconds")
        content = {name: getattr(progress, name) for name in names} | {"resolution": resolution}
        with contextlib.suppress(OSError):  # the log says what the disk refuses
            write_atomically(self.folder / "progress.json", json.dumps(content) + "\n")

    def close(self):
        """Write the rows once more: no later one will make up for one that was refused. RunError if this is, too."""
        if not self._write_rows():
            raise RunError(
                f"the last rows of {self.folder}/log.jsonl cannot be written; make room and repeat the command"
            )
        self._try(lambda: self.events and self.events.close())

    def _open_events(self, folder, purge_step):
        self.events = None
        self._try(lambda: setattr(self, "events", SummaryWriter(str(folder), purge_step=purge_step)))

    def _add_events(self, row):
        def add():
            for key, value in row.items():
                if isinstance(value, int | float) and key != "epoch":
                    self.events.add_scalar(key, value, row["epoch"])
            self.events.flush()

        if self.events and not self._try(add):
            self.events = None  # its thread has ended; the log has it all

    def _write_rows(self):
        return self._write("log.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))

    def _write(self, name, content):
        return self._try(lambda: write_atomically(self.folder / name, content))

    def _try(self, action):
        try:
            action()
        except OSError as error:
            if not self._failing:
                self._failing = True
                self._warn(f"cannot write to {self.folder}: {error.strerror or error}; training goes on")
            return False
        self._failing = False
        return True


def describe_environment(*, device, world_size, betons):
    """What a result depends on beside its config: commit, versions, devices, the betons' checksums."""
    return {
        "command": sys.argv,
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cuda": torch.version.cuda,
        "world_size": world_size,
        "torch_threads": torch.get_num_threads(),
        "cpus": cores(),
        "betons": {Path(info.path).name: info.manifest and info.manifest["beton"]["sha256"] for info in betons},
    }


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
