"""What happens to a batch of pixels on the device: colour jitter and normalisation."""

import torch

# Mean and standard deviation of ImageNet's training pixels in 0..255, as torchvision's reference code has them.
IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)
# ITU-R BT.601 luma, which torchvision's adjust_contrast and adjust_saturation use.
LUMA = (0.2989, 0.587, 0.114)


def normalize(images, *, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """uint8 or float images [N, 3, H, W] in 0..255 -> float32 of the same shape and memory format."""
    mean = torch.tensor(mean, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(std, device=images.device).view(1, 3, 1, 1)
    return (images.float() - mean) / std


def color_jitter(images, *, brightness, contrast, saturation):
    """torchvision's ColorJitter for a batch, each image with factors of its own.

    images: uint8 or float [N, 3, H, W] in 0..255; gives float32 in the same range and memory format.
    Every factor is uniform in [max(0, 1 - strength), 1 + strength]. The order is fixed (brightness, contrast,
    saturation), where torchvision shuffles it per image.
    """
    images = images.float()
    if brightness:
        images = (images * _factors(images, brightness)).clamp_(0, 255)
    if contrast:
        images = _blend(images, _gray(images).mean(dim=(2, 3), keepdim=True), contrast)
    if saturation:
        images = _blend(images, _gray(images), saturation)
    return images


def _blend(images, towards, strength):
    return torch.lerp(towards, images, _factors(images, strength)).clamp_(0, 255)


def _gray(images):
    luma = torch.tensor(LUMA, device=images.device).view(1, 3, 1, 1)
    return (images * luma).sum(dim=1, keepdim=True)


def _factors(images, strength):
    low = max(0.0, 1 - strength)
    return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(low, 1 + strength)
