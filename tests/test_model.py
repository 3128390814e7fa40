"""The networks against torchvision's and against BlurPool's definition."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from rn50.model import build_model


def test_plain_network_is_torchvisions():
    torch.manual_seed(0)
    ours = build_model(arch="resnet50", num_classes=1000, zero_init_last_bn=False)
    torch.manual_seed(0)
    theirs = models.resnet50(weights=None)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert sum(p.numel() for p in ours.parameters()) == 25_557_032


@pytest.mark.parametrize(("arch", "last"), [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_zero_init_last_bn_makes_every_block_start_as_its_shortcut(arch, last):
    network = build_model(arch=arch, num_classes=10, zero_init_last_bn=True)
    gammas = [p for name, p in network.named_parameters() if name.endswith(f"{last}.weight")]
    assert len(gammas) == sum(len(getattr(network, f"layer{i}")) for i in (1, 2, 3, 4))
    assert all((gamma == 0).all() for gamma in gammas)


def test_blurpool_blurs_strided_convolutions_of_at_least_16_channels():
    network = build_model(arch="resnet50", num_classes=10, blurpool=True)
    blurred = [name for name in network.state_dict() if name.endswith("blur_filter")]
    # the 3x3 and the shortcut of the first block of stages 2 to 4; not the 3-channel stem
    assert blurred == [f"layer{i}.0.{where}.blur_filter" for i in (2, 3, 4) for where in ("conv2", "downsample.0")]
    assert "layer2.0.conv2.conv.weight" in network.state_dict()
    assert isinstance(network.conv1, nn.Conv2d)


def test_blurred_convolution_equals_its_definition():
    network = build_model(arch="resnet18", num_classes=10, blurpool=True)
    module = network.layer2[0].conv1
    x = torch.randn(2, 64, 9, 11)
    kernel = torch.tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    padded = F.pad(x, (1, 1, 1, 1))
    blurred = sum(kernel[i, j] * padded[:, :, i : i + 9, j : j + 11] for i in range(3) for j in range(3))
    torch.testing.assert_close(module(x), module.conv(blurred))


@pytest.mark.parametrize("side", [11, 12, 22, 23])
def test_a_pointwise_shortcut_blurs_only_what_it_reads(side):
    """Output and both gradients are those of a blur at every pixel and a strided convolution."""
    torch.manual_seed(0)
    module = build_model(arch="resnet50", num_classes=10, blurpool=True).double().layer2[0].downsample[0]
    weight, channels = module.conv.weight, module.conv.in_channels
    x = torch.randn(2, channels, side, side, dtype=torch.double, requires_grad=True)
    dense = F.conv2d(F.conv2d(x, module.blur_filter, padding=1, groups=channels), weight, stride=2)
    strided = module(x)
    assert strided.shape == dense.shape
    gradient = torch.randn_like(dense)
    ours, theirs = (torch.autograd.grad(y, (x, weight), gradient) for y in (strided, dense))
    for got, expected in zip((strided, *ours), (dense, *theirs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_blurred_maxpool_halves_like_the_plain_one_and_keeps_constants():
    network = build_model(arch="resnet18", num_classes=10, blur_maxpool=True)
    x = torch.randn(2, 64, 20, 24)
    assert network.maxpool(x).shape == nn.MaxPool2d(3, 2, 1)(x).shape
    inside = network.maxpool(torch.ones(1, 64, 20, 20))[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(inside, torch.ones_like(inside))


def test_channels_last_gives_the_same_logits():
    torch.manual_seed(0)
    network = build_model(arch="resnet18", num_classes=10, blurpool=True, blur_maxpool=True, zero_init_last_bn=False)
    network.eval()
    x = torch.randn(2, 3, 64, 64)
    expected = network(x)
    got = network.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
