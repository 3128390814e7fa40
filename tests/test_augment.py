"""Colour jitter and normalisation against torchvision's functions."""

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
