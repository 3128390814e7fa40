"""torchrun's environment, and what ranks tell each other. Without torchrun: one rank, nothing to set up."""

import os
import re
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from rn50.errors import RunError, UsageError
from rn50.machine import cores

DEVICE_FILES = Path("/dev")
WSL_DRIVER = Path("/usr/lib/wsl/lib/libcuda.so.1")  # Windows lends its GPU to WSL 2 without a file in /dev
# How much longer than the hosts GPUs wait for each other: NCCL ends the process, which could then not say why.
GPU_PATIENCE = timedelta(seconds=60)

_hosts = None  # the group of the hosts, where it is not the default one


class LostContact(RunError):
    """Another rank died, hangs or left; it says why itself, if it can."""


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
        ranks, there_are = ranks_on_this_node(), torch.cuda.device_count()
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
        store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
        patience = GPU_PATIENCE if device.type == "cuda" else timedelta(0)
        dist.init_process_group(backend, store=_own(store), rank=rank, world_size=world_size, timeout=limit + patience)
        _hosts = dist.new_group(backend="gloo", timeout=limit) if device.type == "cuda" else None
        return device, rank, world_size
    return device, 0, 1


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
    and wait for it. Agents of several nodes count their restarts each for itself: there the store stays as it is.
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
