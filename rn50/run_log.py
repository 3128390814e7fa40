"""A run's folder: config.yaml, environment.json, log.jsonl (one row an epoch) and TensorBoard events."""

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from rn50.distributed import cores

PACKAGES = ("rn50", "torch", "torchvision", "ffcv", "numpy", "numba", "opencv-python", "fastargs")


def write_atomically(path, content):
    """Put the text `content` at `path` whole or not at all."""
    partial = Path(f"{path}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


class RunLog:
    """Opens (or reopens) a run folder; only rank 0 makes one.

    `epochs_done` is where the run resumes: rows of later epochs, whose checkpoint never came to be, are dropped.
    """

    def __init__(self, folder, *, config, environment, epochs_done):
        self.folder = Path(folder)
        self.rows = [row for row in read_rows(self.folder / "log.jsonl") if row["epoch"] < epochs_done]
        write_atomically(self.folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        # a resumed run may be on another machine: keep what each session ran on
        sessions = _read_json(self.folder / "environment.json", default=[])
        sessions = [*sessions, {"from_epoch": epochs_done, **environment}]
        write_atomically(self.folder / "environment.json", json.dumps(sessions, indent=1))
        self._write_rows()
        self.events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=epochs_done)

    def add_epoch(self, row):
        """Append one row (plain values, `epoch` from 0) to log.jsonl and its numbers to TensorBoard."""
        self.rows.append(row)
        self._write_rows()
        for key, value in row.items():
            if isinstance(value, int | float) and key != "epoch":
                self.events.add_scalar(key, value, row["epoch"])
        self.events.flush()

    def close(self):
        self.events.close()

    def _write_rows(self):
        write_atomically(self.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))


def read_rows(path):
    """The rows of a log.jsonl; a missing file has none, and a torn last line is not a row."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def describe_environment(*, device, world_size, betons):
    """What a result depends on beside its config: commit, versions, devices, the betons' checksums."""
    return {
        "command": sys.argv,
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cuda": torch.version.cuda,
        "world_size": world_size,
        "torch_threads": torch.get_num_threads(),
        "cpus": cores(),
        "betons": {Path(info.path).name: info.manifest and info.manifest["beton"]["sha256"] for info in betons},
    }


def commit():
    """The checkout's commit, with `-dirty` where tracked files differ from it; None outside a git checkout."""
    root = Path(__file__).resolve().parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return described.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _read_json(path, default):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return default


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
