"""Which device a rank gets, and what is said of a GPU that torch cannot use."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from rn50.errors import UsageError
from rn50.training import distributed


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Gives a machine a GPU: gpu(seen by torch, file in /dev, compute capability)."""

    def give(seen, file=True, capability=(8, 6)):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(distributed, "DEVICE_FILES", tmp_path)
        monkeypatch.setattr(distributed, "WSL_DRIVER", tmp_path / "libcuda.so.1")
        if file:
            (tmp_path / "nvidia0").touch()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")

    return give


def test_auto_takes_the_gpu_of_its_rank_or_the_processor(gpu, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    gpu(seen=True)
    assert distributed.choose_device("auto") == distributed.choose_device("cuda") == torch.device("cuda", 3)
    assert distributed.choose_device("cpu") == torch.device("cpu")


def test_a_machine_without_a_gpu_trains_on_the_processor_unless_told_otherwise(gpu):
    gpu(seen=False, file=False)
    assert distributed.choose_device("auto") == torch.device("cpu")
    with pytest.raises(UsageError, match="torch sees no GPU here"):
        distributed.choose_device("cuda")


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_whose_driver_is_too_old_is_not_passed_over(gpu, monkeypatch, name):
    gpu(seen=False)
    with pytest.raises(UsageError, match=r"nvidia0.*the driver .* is older than .*training.device=cpu"):
        distributed.choose_device(name)
    assert distributed.choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UsageError, match="built without CUDA"):
        distributed.choose_device(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert distributed.choose_device("auto") == torch.device("cpu")


def test_nor_is_one_that_windows_lends_to_wsl(gpu, tmp_path):
    gpu(seen=False, file=False)
    (tmp_path / "libcuda.so.1").touch()
    with pytest.raises(UsageError, match=r"libcuda.so.1\), but torch .* cannot use it: the driver"):
        distributed.choose_device("auto")


# T4, A100, A10G and 3090, L4 and 4090, H100, B200, B300, 5090: what the plan names, and newer
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
def test_the_pinned_torch_has_code_for_the_cards_of_the_plan(gpu, capability):
    gpu(seen=True, capability=capability)
    distributed.check_architecture(torch.device("cuda", 0))


@pytest.mark.parametrize("capability", [(7, 0), (6, 1), (3, 7)])
def test_a_card_that_torch_has_no_code_for_is_refused_by_name(gpu, capability):
    gpu(seen=True, capability=capability)
    refusal = rf"no code for a card \(sm_{capability[0]}{capability[1]}\), only for sm_75.*: take a newer GPU"
    with pytest.raises(UsageError, match=refusal):
        distributed.check_architecture(torch.device("cuda", 0))


def test_ptx_runs_on_what_came_later(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90a", "compute_90"])
    for capability, runs in (((8, 9), True), ((10, 0), True), ((7, 5), False)):
        gpu(seen=True, capability=capability)
        if runs:
            distributed.check_architecture(torch.device("cuda", 0))
        else:
            with pytest.raises(UsageError):
                distributed.check_architecture(torch.device("cuda", 0))


@pytest.fixture
def two_gpus(gpu, monkeypatch):
    """A machine with two, on which this process is the second of two."""
    gpu(seen=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")


def test_a_rank_takes_its_own_gpu_and_there_must_be_one_for_each(two_gpus, monkeypatch):
    assert distributed.setup("auto") == (torch.device("cuda", 1), 0, 1)
    assert torch.backends.cudnn.benchmark
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="nproc_per_node=2 .* torch sees 1 here"):
        distributed.setup("auto")


def test_hosts_of_gpus_talk_beside_them_and_give_up_first(two_gpus, monkeypatch):
    join, asked = dist.init_process_group, []

    def without_nccl(backend, **given):
        asked.append((backend, given["timeout"]))
        join("gloo", **given)

    monkeypatch.setattr(dist, "init_process_group", without_nccl)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    try:
        distributed.setup("auto", timeout=30)
        assert asked == [("cpu:gloo,cuda:nccl", timedelta(seconds=90))]
        assert distributed._hosts is not None
        assert distributed.agree(3, 4) == [3, 4]
        assert distributed.from_rank_0({"a": 1}) == {"a": 1}
    finally:
        distributed.shutdown()
        monkeypatch.setattr(distributed, "_hosts", None)


@pytest.mark.parametrize(
    "words", ["[gloo/transport/tcp/pair.cc:545] Read error", "Application timeout caused pair closure"]
)
def test_what_gloo_says_of_a_lost_rank_is_one_line(monkeypatch, words):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    with pytest.raises(distributed.LostContact, match="rank 0 lost contact"), distributed.contact():
        raise RuntimeError(words)
    with pytest.raises(RuntimeError, match="a bug"), distributed.contact():
        raise RuntimeError("a bug")
