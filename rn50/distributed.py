"""torchrun's environment, and what ranks tell each other. Without torchrun: one rank, nothing to set up."""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from rn50.errors import RunError


class LostContact(RunError):
    """Another rank died, hangs or left; it says why itself, if it can."""


def setup(device_name, *, timeout=600):
    """Join the process group that torchrun describes and choose this rank's device.

    device_name: `auto` (CUDA when there is one), `cuda` or `cpu`. timeout: seconds after which a rank that does not
    answer is given up. Returns (device, rank, world_size). The device is set before anything allocates on it, or every
    rank would open a context on GPU 0.
    """
    if device_name == "auto":
        device_name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device_name, local_rank()) if device_name == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # ffcv sets torch to one thread as it is imported
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or max(1, cores() // ranks_on_this_node())))
    if "RANK" in os.environ:
        # gloo beside NCCL: what hosts tell each other does not make their GPUs wait, and a dead host is noticed at once
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        limit = timedelta(seconds=timeout)
        store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
        dist.init_process_group(backend, store=_own(store), rank=rank, world_size=world_size, timeout=limit)
        return device, rank, world_size
    return device, 0, 1


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


def cores():
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


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
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def from_rank_0(value):
    """Rank 0's `value`, tensors (on the CPU) and plain values, on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
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
        if not dist.is_initialized() or not ("gloo" in message.lower() or isinstance(error, dist.DistError)):
            raise
        raise LostContact(
            f"rank {dist.get_rank()} lost contact with another rank ({message.splitlines()[0]}), whose own message, "
            "if it has one, says why; repeat the command to go on from the last checkpoint"
        ) from error


def shutdown():
    if dist.is_initialized():
        dist.destroy_process_group()
