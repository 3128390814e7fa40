"""Which device a rank gets, and what is said of a GPU that torch cannot use."""

import pytest
import torch

from rn50 import distributed
from rn50.errors import UsageError


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Gives a machine a GPU: gpu(seen by torch, file in /dev, compute capability)."""

    def give(seen, file=True, capability=(8, 6)):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(distributed, "DEVICE_FILES", tmp_path)
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
