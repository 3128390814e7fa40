"""One training step on whatever device there is: SAM and mixup by their formulas, overflows, its account of itself."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from rn50 import recipe
from rn50.augment import IMAGENET_MEAN, IMAGENET_STD, mixup_share
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


def step(made, px=32, number=0):
    """Optimizer step `number` on a batch of noise, channels_last as the loader's are; its loss."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8, px, px, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (8,), generator=generator)
    batch = pixels.permute(0, 3, 1, 2).to(made.device), labels.to(made.device), np.arange(8)
    return made.step(iter([batch]), accumulation=1, learning_rate=0.02, epoch=0, step=number).item()


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


def noise(device, generator):
    pixels = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return pixels.permute(0, 3, 1, 2).to(device), torch.randint(0, 10, (8,), generator=generator).to(device)


def gradient_by_hand(network, images, labels, *, smoothing, share=0.0):
    """(loss, its gradient as one vector) of a micro-batch in plain torch: a softmax against mixed targets."""
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = (images.float() - mean) / std
    neighbour = [*range(-1, len(images) - 1)]
    targets = F.one_hot(labels, 10).float()
    mixed = (1 - share) * ((1 - smoothing) * targets + smoothing / 10) + share * targets[neighbour]
    logits = network((1 - share) * pixels + share * pixels[neighbour])
    loss = -(mixed * logits.log_softmax(1)).sum(1).mean()
    network.zero_grad()
    loss.backward()
    return loss.item(), torch.cat([parameter.grad.flatten() for parameter in network.parameters()])


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize(
    ("rho", "mixup", "number"), [(0.5, 0, 9), (0.5, 0.2, 9), (0.5, 0.2, 8), (0, 0.2, 9), (0.05, 0, 19)]
)
def test_a_step_is_that_of_the_formulas(device, rho, mixup, number):
    """SGD without momentum along the mean of each micro-batch's gradient, taken rho up that micro-batch's own."""
    given = [f"--training.sam_rho={rho}", f"--training.mixup={mixup}", "--training.momentum=0"]
    given += ["--training.nesterov=false", "--training.weight_decay=0", "--training.precision=fp32"]
    made = make(device, *given, "--training.channels_last=false")  # for parameters_to_vector
    by_hand = copy.deepcopy(made.network)
    by_hand[0]._forward_hooks.clear()
    generator, batches, gradients, losses = torch.Generator().manual_seed(1), [], [], []
    weights = parameters_to_vector(by_hand.parameters()).detach()
    for position in range(3):
        images, labels = noise(device, generator)
        batches.append((images, labels, np.arange(8)))
        share = mixup_share(mixup, seed=0, step=number, number=position) if mixup else 0.0
        common = {"smoothing": made.cfg.training.label_smoothing, "share": share}
        loss, gradient = gradient_by_hand(by_hand, images, labels, **common)
        if rho and number % 10 == 9:
            vector_to_parameters(weights + rho * gradient / gradient.square().sum().sqrt(), by_hand.parameters())
            _, gradient = gradient_by_hand(by_hand, images, labels, **common)
            vector_to_parameters(weights, by_hand.parameters())
        losses.append(loss)
        gradients.append(gradient)
    loss = made.step(iter(batches), accumulation=3, learning_rate=0.1, epoch=0, step=number).item()
    assert loss == pytest.approx(sum(losses) / 3, rel=1e-5)
    moved = weights - parameters_to_vector(made.network.parameters()).detach()
    torch.testing.assert_close(moved, 0.1 * sum(gradients) / 3, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_climb_that_overflows_in_fp16_leaves_everything_as_it_was(device):
    made = make(device, "--training.precision=fp16", "--training.sam_rho=0.5")
    made.scaler.scale(torch.zeros((), device=device))
    made.scaler._scale.fill_(2.0**10)
    assert step(made, number=9) > 0
    made.scaler._scale.fill_(2.0**40)
    before = everything(made)
    assert step(made, number=19) == 0
    assert made.finite.skipped.item() == 1
    assert made.scaler.get_scale() == 2.0**39
    assert same(before, everything(made))


def test_a_rank_mixes_by_its_place_in_the_whole_batch(monkeypatch):
    """As rn50.data.order cuts a step: [accumulation, ranks, micro-batch]."""
    made = make(torch.device("cpu"), "--training.mixup=0.2")
    made.rank, made.world_size, made._total = 1, 3, lambda loss: loss
    drawn = []
    monkeypatch.setattr("rn50.learner.mixup_share", lambda alpha, **of: drawn.append(of) or 0.1)
    batch = (*noise(made.device, torch.Generator()), np.arange(8))
    made.step(iter([batch] * 2), accumulation=2, learning_rate=0.1, epoch=4, step=77)
    assert drawn == [{"seed": 0, "step": 77, "number": number} for number in (1, 4)]
