"""Faults, and processes to put them into: forked with all imported, a small network, kill points, a full disk."""

import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PRELOAD = [
    "torch",
    "torchvision",
    "fastargs",
    "boto3",
    "rn50.data.loaders",
    "rn50.training.run_folder",
    "rn50.training.mirror",
    "rn50.evaluate",
]


def forking():
    """multiprocessing's context for processes that have imported everything already."""
    # with TBB, numba waits in the end of the process that forks for threads that are not there
    os.environ["NUMBA_THREADING_LAYER"] = "workqueue"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def victim(argv, environment, output, point, last_step):
    """One rank, in a process of its own: the training script as it is, with a small network and quick retries."""
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from rn50.training import checkpoint, interruption, mirror, progress

    use_small_network()
    checkpoint.RETRY_SECONDS = mirror.RETRY_SECONDS = 0.2
    interruption.POLL_SECONDS = interruption.SELDOM_SECONDS = 0.1
    if last_step:
        count = progress.Progress.count_step

        def count_step(self, **counts):
            count(self, **counts)
            last_step.value = self.step

        progress.Progress.count_step = count_step
    if point:
        kill_at(*point, ready=lambda: last_step.value)
    sys.argv = [str(ROOT / "train_imagenet.py"), *argv]
    runpy.run_path(sys.argv[0], run_name="__main__")


def use_small_network(arch="resnet18"):
    """In the place of `arch`, one that takes milliseconds: convolution, BatchNorm and two linear layers."""
    from torch import nn
    from torchvision import models

    def small(weights, num_classes, zero_init_residual):
        layers = [nn.Conv2d(3, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(8)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 256), nn.ReLU(), nn.Linear(256, num_classes))

    setattr(models, arch, small)


def kill_at(event, part, count, delay, ready):
    """kill -9 for this process `delay` seconds after the `count`th `event` on a path that ends with `part`.

    part: for http.client.send, the port that is sent to.
    """
    seen = Counter()

    def hook(name, arguments):
        if name != event or not ready():
            return
        on = arguments[0].port if name == "http.client.send" else arguments[0]
        if on != part and not (isinstance(on, str) and on.endswith(part)):
            return
        seen[name] += 1
        if seen[name] == count:
            kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
            if delay:
                threading.Timer(delay, kill).start()
            else:
                kill()

    sys.addaudithook(hook)


@contextmanager
def full_disk(folder):
    """Fills a small file system to the last byte."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            pass
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def limited_files(processes):
    """Where no file system can be mounted: the files of `processes` may not grow beyond 100 kB (RLIMIT_FSIZE)."""
    _limit(processes, 100_000)
    try:
        yield
    finally:
        _limit(processes, resource.RLIM_INFINITY)


def _limit(processes, size):
    for process in processes:
        if process.is_alive():
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
