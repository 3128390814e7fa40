"""On a real GPU, and nowhere else: what runs there must be what runs on the processor, to the rounding."""

import copy
import math
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from rn50 import recipe
from rn50.augment import color_jitter, normalize
from rn50.data import loaders
from rn50.ema import EMA
from rn50.evaluate import evaluate
from rn50.files import read_rows
from rn50.learner import Learner
from rn50.model import build_model
from tests.commands import SMALL
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
FLAGSHIP = "rn50_configs/rn50_78.yaml"


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Without TF32, and with kernels that give the same twice."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


def learner(*settings, device=GPU, arch="resnet18"):
    argv = [f"--config-file={FLAGSHIP}", "--data.dir=none", f"--model.arch={arch}", *settings]
    made = Learner(recipe.load("", argv), classes=10, device=device)
    made.train()
    return made


def micro_batches(device, count=1, px=64, images=16):
    """Batches as the loader gives them, of noise."""
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(0, 256, (images, px, px, 3), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, 10, (images,), generator=generator)
        yield pixels.permute(0, 3, 1, 2).to(device), labels.to(device), np.arange(images)


def steps(made, count, px=64):
    batches = micro_batches(made.device, count, px)
    return [made.step(batches, accumulation=1, learning_rate=0.02, epoch=0, step=k).item() for k in range(count)]


def same(first, second):
    """Whether two trees of tensors and values are equal, to the last bit."""
    flat = [torch.utils._pytree.tree_leaves(tree) for tree in (first, second)]
    return len(flat[0]) == len(flat[1]) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(*flat, strict=True)
    )


def test_batches_on_a_busy_gpu_are_those_on_the_processor(betons):
    """The host decodes ahead of the GPU: a buffer that were filled again too early would show."""
    info = loaders.find_rungs(betons, "train")[96]
    order = loaders.epoch_order(info, "random", seed=0, epoch=0)
    order = np.concatenate([order] * 10)[: 100 * 20]
    kept = {}
    work = torch.randn(4096, 4096, device=GPU)
    for device in (CPU, GPU):
        loader = loaders.training_loader(
            info, batch_size=20, crop_scale=(0.08, 1), seed=0, device=device, workers=2, timeout=60
        )
        with loader.batches(order, 64, epoch=3) as batches:
            kept[device] = []
            for images, labels in batches:
                if device is GPU:
                    work = (work @ work).clamp(-1, 1)  # queued before the copy that is kept
                kept[device].append((images.clone(), labels.clone()))
    assert len(kept[GPU]) == 100
    for (images, labels), (expected, classes) in zip(kept[GPU], kept[CPU], strict=True):
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images.cpu(), expected)
        assert torch.equal(labels.cpu(), classes)


def test_pixels_are_normalised_and_jittered_as_on_the_processor():
    images, _, _ = next(micro_batches(CPU))
    factors = torch.rand(16, 3) * 2
    expected = normalize(color_jitter(images, factors))
    got = normalize(color_jitter(images.to(GPU), factors))
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", [22, 23, 56])
def test_both_blurs_and_their_gradients_are_those_of_the_processor(side):
    torch.manual_seed(0)
    network = build_model(arch="resnet50", num_classes=10, blurpool=True, blur_maxpool=True)
    stage = network.layer2[0]
    for blur, channels in ((stage.conv2, 128), (stage.downsample[0], 256), (network.maxpool, 64)):
        x = torch.randn(4, channels, side, side)
        found = []
        for device in (CPU, GPU):
            module = copy.deepcopy(blur).to(device, memory_format=torch.channels_last)
            pixels = x.to(device, memory_format=torch.channels_last).requires_grad_()
            y = module(pixels)
            y.square().sum().backward()
            found.append([y, pixels.grad, *(parameter.grad for parameter in module.parameters())])
        for ours, expected in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(ours.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_steps_in_fp32_are_those_of_the_processor():
    ours, theirs = (learner("--training.precision=fp32", device=device) for device in (GPU, CPU))
    assert steps(ours, 3) == pytest.approx(steps(theirs, 3), rel=1e-3)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_steps_in_half_precision_are_near_those_in_fp32(precision):
    ours, exactly = (learner(f"--training.precision={kind}") for kind in (precision, "fp32"))
    assert steps(ours, 3) == pytest.approx(steps(exactly, 3), rel=0.02)


def test_a_loss_that_is_not_finite_leaves_the_weights_alone():
    made = learner("--training.precision=bf16")
    before = copy.deepcopy([parameter.detach() for parameter in made.network.parameters()])
    bias = made.network.fc.bias.detach()
    kept = bias.clone()
    bias.fill_(float("inf"))
    steps(made, 1)
    bias.copy_(kept)
    assert made.finite.skipped.item() == 1
    assert same(before, [parameter.detach() for parameter in made.network.parameters()])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_going_on_from_a_checkpoint_is_exact(tmp_path, precision):
    made = learner(f"--training.precision={precision}")
    steps(made, 3)
    torch.save(made.state(), tmp_path / "state.pt")
    expected = [*steps(made, 4), made.state()]
    other = learner(f"--training.precision={precision}", "--training.seed=1")
    other.restore(torch.load(tmp_path / "state.pt", map_location="cpu"))
    other.train()
    assert same([*steps(other, 4), other.state()], expected)


def test_the_average_is_that_of_the_processor():
    torch.manual_seed(0)
    network = build_model(arch="resnet18", num_classes=10, blurpool=True)
    averages = {device: EMA(copy.deepcopy(network).to(device), half_life=5) for device in (CPU, GPU)}
    for _ in range(10):
        with torch.no_grad():
            for tensor in [*network.parameters(), *network.buffers()]:
                if tensor.is_floating_point():
                    tensor.add_(torch.randn_like(tensor), alpha=0.01)
        for device, average in averages.items():
            average.update(copy.deepcopy(network).to(device))
    for name, expected in averages[CPU].model.state_dict().items():
        torch.testing.assert_close(averages[GPU].model.state_dict()[name].cpu(), expected, rtol=1e-5, atol=1e-6)


def test_an_evaluation_gives_the_figures_of_the_processor():
    network = build_model(arch="resnet18", num_classes=10, blurpool=True)
    figures = []
    for device in (CPU, GPU):
        made = learner("--training.precision=fp32", device=device)
        batches = ((images, labels) for images, labels, _ in micro_batches(device, 4))
        model = copy.deepcopy(network).to(device)
        figures.append(evaluate(model, batches, classes=10, device=device, autocast=made.autocast, flip=True))
    for view in ("single", "flip"):
        assert figures[1][view] == pytest.approx(figures[0][view], rel=1e-4)


def test_a_compiled_step_is_the_eager_one_at_every_size():
    ours, eager = (learner("--training.precision=fp32", f"--training.compile={on}") for on in ("true", "false"))
    for px in (64, 96):
        assert steps(ours, 2, px) == pytest.approx(steps(eager, 2, px), rel=1e-3)
        assert ours.seen() == eager.seen() == ours.planned(px)
    torch._dynamo.reset()


def train(betons, folder, **flags):
    """The command of a small run on the GPU."""
    settings = SMALL | {"data.dir": betons, "logging.folder": folder, "training.device": "cuda"}
    settings |= {name.replace("__", "."): value for name, value in flags.items()}
    return [sys.executable, "train_imagenet.py", *(f"--{name}={value}" for name, value in settings.items())]


def test_too_large_a_batch_is_refused_before_the_first_step(betons, tmp_path):
    large = 1 << 20
    size = {"training__micro_batch": large, "training__batch_size": large}
    command = train(betons, tmp_path, resolution__start=256, resolution__end=256, **size)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert f"out of memory on cuda:0 at 256 px with training.micro_batch={large}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_killed_in_the_middle_of_an_epoch_goes_on(betons, tmp_path):
    resizing = {"resolution__end": 64, "resolution__start_ramp": 3, "resolution__end_ramp": 20}
    command = train(
        betons, tmp_path, training__epochs=24, training__precision="fp16", logging__checkpoint_steps=7, **resizing
    )
    folder = tmp_path / SMALL["logging.run_name"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (folder / "last.pt").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"resuming .* at step \d+", done.stdout)
    rows = read_rows(folder / "log.jsonl")
    assert [row["step"] for row in rows] == [10 * (epoch + 1) for epoch in range(24)]
    assert all(math.isfinite(row["train_loss"]) for row in rows)
