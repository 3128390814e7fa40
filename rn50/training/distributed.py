"""torchrun's environment, and what ranks tell each other. Without torchrun: one rank, nothing to set up."""

import os
import re
import socket
import sys
import time
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from rn50.errors import RunError, Stopped, UsageError
from rn50.machine import cores
from rn50.training import interruption

DEVICE_FILES = Path("/dev")
WSL_DRIVER = Path("/usr/lib/wsl/lib/libcuda.so.1")  # Windows lends its GPU to WSL 2 without a file in /dev
# How much longer than the hosts GPUs wait for each other: NCCL ends the process, which could then not say why.
GPU_PATIENCE = timedelta(seconds=60)
# How long ranks wait for each other at the beginning: one may still be importing torch from a cold disk, or be on a
# machine that is started later. And after how long they say so.
JOIN_SECONDS, QUIET_SECONDS = 300.0, 5.0
# What torchrun sets, and the values with which they change nothing for a single process.
VARIABLES = {"RANK": None, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
VARIABLES |= {"MASTER_ADDR": None, "MASTER_PORT": None}

_hosts = None  # the group of the hosts, where it is not the default one


class LostContact(RunError):
    """Another rank died, hangs or left; it says why itself, if it can."""


def check_environment():
    """UsageError where torchrun's variables are there in part, or say what cannot be: leftovers, most likely.

    LOCAL_RANK and LOCAL_WORLD_SIZE may be missing, as where one process a machine is started without torchrun.
    """
    given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    numbers = {name: int(text) for name, text in given.items() if name != "MASTER_ADDR" and text.isdecimal()}
    problem = None
    if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not given.get(name)]:
        # an address alone, or the only rank there is, changes nothing
        if "RANK" in given or any(
            name in given and numbers.get(name) != alone for name, alone in VARIABLES.items() if alone is not None
        ):
            problem = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    elif wrong := [name for name in given if name != "MASTER_ADDR" and name not in numbers]:
        problem = f"{wrong[0]} must be a whole number"
    elif not numbers["RANK"] < numbers["WORLD_SIZE"]:
        problem = "RANK must be less than WORLD_SIZE"
    elif not numbers.get("LOCAL_RANK", 0) < numbers.get("LOCAL_WORLD_SIZE", numbers["WORLD_SIZE"]):
        problem = f"LOCAL_RANK must be less than {'LOCAL_' if 'LOCAL_WORLD_SIZE' in given else ''}WORLD_SIZE"
    elif not numbers["MASTER_PORT"] < 1 << 16:
        problem = "MASTER_PORT must be a port, less than 65536"
    if problem:
        raise UsageError(f"{_spelled(given)} set, but {problem}: {_remedy()}")


def _spelled(given):
    return f"{', '.join(f'{name}={text}' for name, text in given.items())} {'is' if len(given) == 1 else 'are'}"


def _remedy():
    return f"unset {' '.join(name for name in VARIABLES if name in os.environ)} to train alone, or start with torchrun"


def setup(device_name, *, timeout=600):
    """Join the process group that torchrun describes and choose this rank's device.

    device_name: `auto` (CUDA when there is one), `cuda` or `cpu`. timeout: seconds after which a rank that does not
    answer is given up. Returns (device, rank, world_size). Raises UsageError where torch cannot use the GPU there is,
    or there are fewer GPUs than ranks. The device is set before anything allocates on it, or every rank would open a
    context on GPU 0.
    """
    global _hosts
    device = choose_device(device_name)
    if device.type == "cuda":
        ranks, there_are = max(ranks_on_this_node(), local_rank() + 1), torch.cuda.device_count()
        if ranks > there_are:
            raise UsageError(f"torchrun --nproc_per_node={ranks} needs as many GPUs; torch sees {there_are} here")
        torch.cuda.set_device(device)
        check_architecture(device)
    # cuDNN measures once for each shape which of its kernels is fastest; an epoch has one
    torch.backends.cudnn.benchmark = True
    # ffcv sets torch to one thread as it is imported
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or max(1, cores() // ranks_on_this_node())))
    if "RANK" in os.environ:
        # gloo beside NCCL: what hosts tell each other does not make their GPUs wait, and a dead host is noticed at once
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        limit = timedelta(seconds=timeout)
        world_size = int(os.environ["WORLD_SIZE"])
        store = _meet(rank(), world_size)
        patience = GPU_PATIENCE if device.type == "cuda" else timedelta(0)
        dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size, timeout=limit + patience)
        _hosts = dist.new_group(backend="gloo", timeout=limit) if device.type == "cuda" else None
        return device, rank(), world_size
    return device, 0, 1


def _meet(rank, world_size):
    """The store at MASTER_ADDR, once all ranks are at it; says for whom it waits, and why.

    RunError where they do not come within JOIN_SECONDS, Stopped where a stop is asked for meanwhile.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    wait = _Wait(f"at {host}:{port}")
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    # torch itself would wait silently, or fill the screen, until its own limit
    while refusal := _unknown(host) if serves else _unreachable(host, port):
        wait.on(f"rank 0 ({refusal})", f"RANK={rank} is")
    try:
        # in a thread: a program that listens but does not answer keeps it for ever
        options = {"timeout": timedelta(seconds=JOIN_SECONDS), "wait_for_workers": False, "multi_tenant": serves}
        made = ThreadPoolExecutor(1).submit(dist.TCPStore, host, port, world_size, serves, **options)
        while not futures.wait([made], timeout=0.2).done:
            wait.on("an answer of rank 0", f"RANK={rank} is")
        store = made.result()
        store = _own(store)
        store.set(f"here {rank}", "")
        while missing := [other for other in range(world_size) if not store.check([f"here {other}"])]:
            names = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
            wait.on(f"{len(missing)} of {world_size} ranks (rank {names})", f"WORLD_SIZE={world_size} is")
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"rank {rank} cannot meet the others at {host}:{port} ({reason}); {_remedy()}") from error
    return store


class _Wait:
    """Waiting at the beginning, which says once for whom and why, and does not last for ever."""

    def __init__(self, where):
        self._where, self._began, self._said = where, time.monotonic(), False

    def on(self, whom, why):
        """Sleep a moment, or raise."""
        if interruption.reason():
            raise Stopped(interruption.reason())
        if self._waited() > JOIN_SECONDS:
            raise RunError(f"waited {JOIN_SECONDS:.0f} s in vain for {self._because(whom, why)}")
        if self._waited() > QUIET_SECONDS:
            self._say(whom, why)
        time.sleep(min(0.2, QUIET_SECONDS / 4))

    def _waited(self):
        return time.monotonic() - self._began

    def _say(self, whom, why):
        # one of each machine is enough
        if not self._said and (local_rank() == 0 or "rank 0" in whom):
            self._said = True
            text = f"waiting for {self._because(whom, why)} (for {JOIN_SECONDS:.0f} s in all)"
            print(text, file=sys.stderr, flush=True)

    def _because(self, whom, why):
        return f"{whom} {self._where}, because {why} set in the environment; if there is none to come, {_remedy()}"


def _unknown(host):
    """Why a host's name leads nowhere, or None."""
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        return error.strerror or str(error)


def _unreachable(host, port):
    """Why nobody is reached there, or None."""
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError as error:
        return error.strerror or str(error)


def choose_device(device_name):
    """This rank's torch.device for `auto`, `cuda` or `cpu`. Raises UsageError where there is no GPU that torch can use.

    For `auto`, only where there seems to be one: hours on the processor are no substitute.
    """
    if device_name == "cpu" or torch.cuda.is_available():
        return torch.device("cpu") if device_name == "cpu" else torch.device("cuda", local_rank())
    found = sorted(path.name for path in DEVICE_FILES.glob("nvidia[0-9]*"))
    if WSL_DRIVER.exists():
        found.append(str(WSL_DRIVER))
    if found and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        cause = "it was built without CUDA"
        if torch.version.cuda:
            cause = f"the driver (nvidia-smi) is older than its CUDA {torch.version.cuda} needs (13: 580), or fails"
        raise UsageError(
            f"there is an NVIDIA GPU ({', '.join(found)}), but torch {torch.__version__} cannot use it: {cause}; "
            "training.device=cpu trains on the processor"
        )
    if device_name == "cuda":
        raise UsageError("training.device=cuda, but torch sees no GPU here; use auto or cpu")
    return torch.device("cpu")


def check_architecture(device):
    """Raise UsageError where torch has no code for the GPU: its first kernel would say so in other words."""
    major, minor = torch.cuda.get_device_capability(device)
    built = [re.fullmatch(r"(sm|compute)_(\d+)(\d)", name) for name in torch.cuda.get_arch_list()]
    # a binary runs on later minor versions of its major one, PTX (compute) on everything later
    runs = any(
        (int(name[2]) == major and int(name[3]) <= minor) or (name[1] == "compute" and int(name[2]) < major)
        for name in built
        if name
    )
    if not runs:
        raise UsageError(
            f"torch {torch.__version__} has no code for {torch.cuda.get_device_name(device)} (sm_{major}{minor}), only "
            f"for {', '.join(torch.cuda.get_arch_list())}: take a newer GPU, or training.device=cpu"
        )


def _own(store):
    """The part of torchrun's `store` that belongs to this start of the workers.

    One store outlives them all (torch 2.14), so a restarted rank could take the address of a dead one for its peer's
    and wait for it. Agents of several nodes count their restarts each for itself: there the store stays as it is, and
    `_meet` takes a rank that was there before for one that is.
    """
    alone = os.environ.get("GROUP_WORLD_SIZE") == "1"
    return dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store) if alone else store


def rank():
    """This process's rank, also before `setup`."""
    return int(os.environ.get("RANK", 0))


def local_rank():
    return int(os.environ.get("LOCAL_RANK", 0))


def ranks_on_this_node():
    """How many of the ranks share this machine's cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def total(tensor):
    """The sum of `tensor` over all ranks, in place; unchanged where there is one rank."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def agree(*values):
    """The largest of each of the whole numbers `values` over all ranks, as a list. Between the hosts: no GPU waits."""
    if not dist.is_initialized():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_hosts)
    return tensor.tolist()


def from_rank_0(value):
    """Rank 0's `value`, tensors (on the CPU) and plain values, on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"), group=_hosts)
    return values[0]


def share_buffers(model):
    """Give every rank rank 0's buffers, which are those that checkpoints hold: BatchNorm's differ from rank to rank."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


@contextmanager
def contact():
    """Turns the loss of another rank during the block into LostContact, one line."""
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        # gloo's own words where a rank hangs name no gloo
        of_gloo = "gloo" in message.lower() or "pair closure" in message
        if not dist.is_initialized() or not (of_gloo or isinstance(error, dist.DistError)):
            raise
        raise LostContact(
            f"rank {dist.get_rank()} lost contact with another rank ({message.splitlines()[0]}), whose own message, "
            "if it has one, says why; repeat the command to go on from the last checkpoint"
        ) from error


def shutdown():
    if dist.is_initialized():
        dist.destroy_process_group()
