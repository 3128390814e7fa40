"""Which device a rank takes, and what it refuses, tried without a GPU."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from rn50 import distributed
from rn50.errors import UsageError


@pytest.fixture
def gpus(monkeypatch):
    """gpus(count, capability=...): as if torch saw so many."""

    def pretend(count, capability=(8, 6)):
        for name, value in {
            "is_available": count > 0,
            "device_count": count,
            "set_device": None,
            "get_device_name": "Some GPU",
            "get_device_capability": capability,
            "get_arch_list": ["sm_75", "sm_80", "sm_86", "sm_90a", "compute_90"],
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    return pretend


def test_a_rank_takes_its_own_gpu(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.setup("auto") == (torch.device("cuda", 1), 0, 1)
    assert torch.backends.cudnn.benchmark


def test_more_ranks_than_gpus_are_refused(gpus, monkeypatch):
    gpus(1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="nproc_per_node=2 .* torch sees 1 here"):
        distributed.setup("auto")


def test_a_gpu_that_torch_cannot_use_is_not_passed_over_in_silence(gpus, monkeypatch, tmp_path):
    gpus(0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(distributed, "NVIDIA_DRIVER", tmp_path / "version")
    assert distributed.setup("auto")[0] == torch.device("cpu")
    (tmp_path / "version").touch()
    with pytest.raises(UsageError, match="driver.*training.device=cpu"):
        distributed.setup("auto")
    assert distributed.setup("cpu")[0] == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # whoever sets this means the CPU
    assert distributed.setup("auto")[0] == torch.device("cpu")


def test_a_gpu_that_torch_has_no_code_for_is_refused(gpus):
    gpus(1, capability=(7, 0))
    with pytest.raises(UsageError, match="Some GPU has compute capability 7.0, .* 7.5 and later"):
        distributed.setup("auto")
    gpus(1, capability=(7, 5))
    assert distributed.setup("auto")[0].type == "cuda"


def test_hosts_of_gpus_talk_beside_them_and_give_up_first(gpus, monkeypatch):
    gpus(1)
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
