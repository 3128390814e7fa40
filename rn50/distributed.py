"""torchrun's environment, and sums over all ranks. Without torchrun: one rank, nothing to set up."""

import os

import torch
import torch.distributed as dist


def setup(device_name):
    """Join the process group that torchrun describes and choose this rank's device.

    device_name: `auto` (CUDA when there is one), `cuda` or `cpu`. Returns (device, rank, world_size). The
    device is set before anything allocates on it, or every rank would open a context on GPU 0.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device_name == "auto":
        device_name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device_name, local_rank) if device_name == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # ffcv sets torch to one thread as it is imported
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or max(1, cores() // ranks_on_this_node())))
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return device, dist.get_rank(), dist.get_world_size()
    return device, 0, 1


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


def barrier():
    if dist.is_initialized():
        dist.barrier()


def shutdown():
    if dist.is_initialized():
        dist.destroy_process_group()
