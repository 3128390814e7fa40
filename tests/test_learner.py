"""One training step on whatever device there is: what it does with an overflow, and its account of itself."""

import copy

import numpy as np
import pytest
import torch

from rn50 import recipe
from rn50.learner import Learner
from tests.conftest import ROOT

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda", 0), marks=needs_gpu)]
pytestmark = pytest.mark.usefixtures("small_network")


def make(device, *settings):
    argv = [f"--config-file={ROOT}/rn50_configs/demo.yaml", "--data.dir=none", *settings]
    made = Learner(recipe.load("", argv), classes=10, device=device)
    made.train()
    return made


def step(made, px=32):
    """One step on a batch of noise, channels_last as the loader's are; its loss."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8, px, px, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (8,), generator=generator)
    batch = pixels.permute(0, 3, 1, 2).to(made.device), labels.to(made.device), np.arange(8)
    return made.step(iter([batch]), accumulation=1, learning_rate=0.02, epoch=0).item()


def everything(made):
    """Weights, statistics and momentum, in one list of tensors of their own."""
    counts = ".num_batches_tracked"  # of forward passes, those that are left out included
    kept = [value for name, value in made.network.state_dict().items() if not name.endswith(counts)]
    return copy.deepcopy(kept + [state["momentum_buffer"] for state in made.optimizer.state.values()])


def same(first, second):
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_an_overflow_in_fp16_leaves_everything_as_it_was_and_the_scale_halved(device):
    made = make(device, "--training.precision=fp16")
    made.scaler.scale(torch.zeros((), device=device))  # makes its scale
    made.scaler._scale.fill_(2.0**10)
    assert step(made) > 0
    made.scaler._scale.fill_(2.0**40)  # every gradient overflows
    before = everything(made)
    assert step(made) == 0
    assert made.finite.skipped.item() == made.finite.in_a_row.item() == 1
    assert made.scaler.get_scale() == 2.0**39
    assert same(before, everything(made))
    made.scaler._scale.fill_(2.0**10)
    assert step(made) > 0
    assert made.finite.in_a_row.item() == 0
    assert not same(before, everything(made))


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("channels_last", ["true", "false"])
def test_a_step_is_what_the_plan_says(device, precision, channels_last):
    made = make(device, f"--training.precision={precision}", f"--training.channels_last={channels_last}")
    step(made, px=40)
    layout = "channels_last" if channels_last == "true" else "contiguous"
    dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[precision]
    assert made.seen() == {"resolution": 40, "layout": layout, "dtype": dtype} == made.planned(40)


def test_the_account_is_of_what_the_network_computes_not_of_the_settings():
    made = make(torch.device("cpu"), "--training.precision=bf16")
    step(made, px=40)
    assert made.seen() != made.planned(32)
    made.autocast = lambda: torch.autocast("cpu", enabled=False)
    step(made)
    assert made.seen()["dtype"] == "float32"
    made.autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    made.layout = torch.contiguous_format
    made.network.to(memory_format=torch.contiguous_format)
    step(made)
    assert made.seen() == {"resolution": 32, "layout": "contiguous", "dtype": "bfloat16"}
