"""Colour jitter and normalisation against torchvision's functions; mixup against its definition."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from rn50 import augment


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.randint(0, 256, (4, 3, 8, 6), dtype=torch.uint8).to(memory_format=torch.channels_last)


def test_normalize_equals_torchvision(images):
    expected = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(images.float() / 255)
    got = augment.normalize(images)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("position", range(3))
def test_jitter_equals_torchvisions_adjustment_by_the_same_factor(images, position):
    factors = torch.ones(4, 3)
    factors[:, position] = torch.tensor([0.6, 0.9, 1.1, 1.4])
    got = augment.color_jitter(images, factors)
    adjust = getattr(reference, "adjust_" + ["brightness", "contrast", "saturation"][position])
    for image, factor, result in zip(images, factors[:, position], got, strict=True):
        torch.testing.assert_close(result, adjust(image.float() / 255, factor.item()) * 255, rtol=1e-3, atol=0.05)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_factors_are_uniform_within_each_strength_and_independent():
    factors = augment.jitter_factors(np.arange(20_000), brightness=0.4, contrast=1.5, saturation=0, seed=0, epoch=0)
    assert factors.shape == (20_000, 3)
    assert factors.dtype == torch.float32
    for column, (low, high) in zip(factors.T, [(0.6, 1.4), (0, 2.5), (1, 1)], strict=True):
        expected = torch.linspace(low, high, 20_000)
        torch.testing.assert_close(column.sort().values, expected, rtol=0, atol=0.02 * (high - low) + 1e-6)
    assert abs(torch.corrcoef(factors[:, :2].T)[0, 1]) < 0.03


def test_factors_depend_on_seed_epoch_and_sample_alone():
    strengths = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}
    one = augment.jitter_factors(np.array([7, 3, 5]), **strengths, seed=1, epoch=2)
    two = augment.jitter_factors(np.array([5, 7]), **strengths, seed=1, epoch=2)
    assert torch.equal(one[[2, 0]], two)
    for other in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}):
        assert not torch.isclose(augment.jitter_factors(np.array([5, 7]), **strengths, **other), two).any()


def test_factors_of_one_change_nothing(images):
    torch.testing.assert_close(augment.color_jitter(images, torch.ones(4, 3)), images.float())


def test_mixup_shares_follow_the_folded_beta_distribution_and_each_position_has_its_own():
    drawn = np.array([augment.mixup_share(0.2, seed=0, step=k // 4, number=k % 4) for k in range(8000)])
    assert 0 <= drawn.min() < drawn.max() <= 0.5
    # Beta(0.2, 0.2) folded at a half: mean and quantiles of 10^7 draws of torch's Beta in the same way
    assert drawn.mean() == pytest.approx(0.1012, abs=0.004)
    assert np.quantile(drawn, [0.5, 0.75, 0.9]) == pytest.approx([0.0238, 0.1634, 0.3473], abs=0.02)
    assert len(np.unique(drawn)) > 7900
    first = augment.mixup_share(0.2, seed=0, step=7, number=3)
    assert first == augment.mixup_share(0.2, seed=0, step=7, number=3) == drawn[31]
    others = [
        {"seed": 1, "step": 7, "number": 3},
        {"seed": 0, "step": 8, "number": 3},
        {"seed": 0, "step": 7, "number": 4},
    ]
    assert first not in [augment.mixup_share(0.2, **other) for other in others]


def test_mixup_adds_the_left_neighbour_and_keeps_the_memory_format(images):
    pixels = augment.normalize(images)
    mixed = augment.mixup(pixels, 0.3)
    for position in range(4):
        torch.testing.assert_close(mixed[position], 0.7 * pixels[position] + 0.3 * pixels[(position - 1) % 4])
    assert mixed.is_contiguous(memory_format=torch.channels_last)
