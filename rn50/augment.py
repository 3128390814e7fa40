"""What happens to a batch of pixels on the device: colour jitter, normalisation and mixup."""

import functools

import numpy as np
import torch

from rn50.seeded import JITTER, uniforms

# Mean and standard deviation of ImageNet's training pixels in 0..255, as torchvision's reference code has them.
IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)
# ITU-R BT.601 luma, which torchvision's adjust_contrast and adjust_saturation use.
LUMA = (0.2989, 0.587, 0.114)


def normalize(images, *, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """uint8 or float images [N, 3, H, W] in 0..255 -> float32 of the same shape and memory format."""
    return (images.float() - _of_channels(mean, images.device)) / _of_channels(std, images.device)


def jitter_factors(samples, *, brightness, contrast, saturation, seed, epoch):
    """torchvision's ColorJitter: float32 [n, 3], the factors of brightness, contrast and saturation of each sample.

    Each is uniform in [max(0, 1 - strength), 1 + strength] and depends on (seed, epoch, sample) alone.
    """
    strengths = np.array([brightness, contrast, saturation])
    low = np.maximum(0, 1 - strengths)
    draws = uniforms(samples, 3, seed=seed, epoch=epoch, purpose=JITTER)
    return torch.from_numpy((low + draws * (1 + strengths - low)).astype(np.float32))


def color_jitter(images, factors):
    """Change brightness, contrast and saturation of each image by its own factors.

    images: uint8 or float [n, 3, H, W] in 0..255; returns float32 in the same range and memory format. factors: float
    [n, 3]; 1 changes nothing. The order is fixed, where torchvision's ColorJitter shuffles it per image.
    """
    factors = factors.to(images.device, non_blocking=True).view(len(images), 3, 1, 1, 1)
    brightness, contrast, saturation = factors.unbind(1)
    images = (images.float() * brightness).clamp_(0, 255)
    images = torch.lerp(_gray(images).mean(dim=(2, 3), keepdim=True), images, contrast).clamp_(0, 255)
    return torch.lerp(_gray(images), images, saturation).clamp_(0, 255)


def mixup_share(alpha, *, seed, step, number):
    """The share of the other image in micro-batch `number` (over all ranks) of optimizer step `step` of a run.

    min(z, 1 - z) of z ~ Beta(alpha, alpha), a float in [0, 0.5], which depends on (seed, step, number) alone: the
    greater part stays the image's own, as in Composer's MixUp.
    """
    share = np.random.default_rng([seed, step, number]).beta(alpha, alpha)
    return float(min(share, 1 - share))


def mixup(pixels, share):
    """`share` of each image's left neighbour in the micro-batch, 1 - share of its own (Zhang et al. 2018, 1710.09412).

    pixels: float [n, 3, H, W]; returns the same shape and memory format. The neighbour is as random as any other:
    the order of an epoch is shuffled.
    """
    return torch.lerp(pixels, torch.cat([pixels[-1:], pixels[:-1]]), share)


def _gray(images):
    return (images * _of_channels(LUMA, images.device)).sum(dim=1, keepdim=True)


@functools.cache
def _of_channels(values, device):
    # once: for each copy of such a tensor the host waits until the GPU has done all that it was asked for before
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(1, 3, 1, 1)
