"""Colour jitter and normalisation against torchvision's functions."""

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


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_jitter_equals_torchvisions_adjustment_by_the_same_factor(images, name, monkeypatch):
    factors = torch.tensor([0.6, 0.9, 1.1, 1.4])
    monkeypatch.setattr(augment, "_factors", lambda images, strength: factors.view(-1, 1, 1, 1))
    strengths = {"brightness": 0, "contrast": 0, "saturation": 0, name: 0.4}
    got = augment.color_jitter(images, **strengths)
    adjust = getattr(reference, f"adjust_{name}")
    for image, factor, result in zip(images, factors, got, strict=True):
        torch.testing.assert_close(result, adjust(image.float() / 255, factor.item()) * 255, rtol=1e-3, atol=0.05)


def test_every_image_has_its_own_factor_within_the_strength():
    torch.manual_seed(0)
    gray = torch.full((2000, 3, 1, 1), 100, dtype=torch.uint8)
    values = augment.color_jitter(gray, brightness=0.4, contrast=0, saturation=0)[:, 0, 0, 0]
    assert 60 <= values.min() < 61
    assert 139 < values.max() <= 140
    assert values.mean() == pytest.approx(100, abs=2)


def test_no_strength_changes_nothing(images):
    torch.testing.assert_close(augment.color_jitter(images, brightness=0, contrast=0, saturation=0), images.float())
