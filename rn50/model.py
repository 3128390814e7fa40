"""torchvision's ResNets with what the recipes ask for: BlurPool, and how the weights start."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101")
INITIALISATIONS = ("torchvision", "composer")


def build_model(
    *,
    arch,
    num_classes,
    blurpool=False,
    blur_maxpool=False,
    initialisation="torchvision",
    zero_init_last_bn=True,
    log_prior_bias=False,
):
    """A randomly initialised ResNet taking float images [N, 3, H, W] and giving logits [N, num_classes].

    `initialisation`: `torchvision` (convolutions He normal, fan out; BatchNorm's gammas one) or `composer`, see
    `composer_initialisation`. `blurpool` low-passes the input of every
    strided convolution with at least 16 input channels, as ffcv-imagenet does; `blur_maxpool` also the
    stem's max-pool, as MosaicML's recipes do. Parameter names follow ffcv-imagenet: a blurred
    convolution's weight is `….conv.weight`. `log_prior_bias` starts the classifier's bias at -ln(num_classes), so
    that every sigmoid starts near 1 / num_classes and a binary cross-entropy near 1 + ln(num_classes), not at
    num_classes x ln 2.
    """
    model = getattr(models, arch)(weights=None, num_classes=num_classes, zero_init_residual=zero_init_last_bn)
    if blurpool:
        _blur_strided_convolutions(model)
    if blur_maxpool:
        model.maxpool = BlurMaxPool2d(model.maxpool)
    if initialisation == "composer":
        model.apply(composer_initialisation)
    if log_prior_bias:
        nn.init.constant_(model.fc.bias, -math.log(num_classes))
    return model


def not_finite(weights):
    """Name of the first of `weights`, {name: tensor}, that has an infinity or NaN in it, or None. Waits for a GPU."""
    floating = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
    # the largest magnitude of all is one number to wait for
    if torch.isfinite(torch.nn.utils.get_total_norm(list(floating.values()), float("inf"))):
        return None
    return next(name for name, tensor in floating.items() if not torch.isfinite(tensor).all())


def composer_initialisation(module):
    """What MosaicML's recipes start from: KAIMING_NORMAL and BN_UNIFORM of composer 0.7.1, models/initializers.py.

    Convolution and linear weights He normal, fan in (standard deviation sqrt(2 / inputs)); BatchNorm's gammas uniform
    in [0, 1), betas zero. Its LINEAR_LOG_CONSTANT_BIAS is build_model's `log_prior_bias`.
    """
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.uniform_(module.weight)
        nn.init.zeros_(module.bias)


class BlurConv2d(nn.Module):
    """Depthwise 3x3 binomial blur, then the wrapped convolution (Zhang 2019, arXiv 1904.11486)."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        self.stride = 1
        if conv.kernel_size == (1, 1):
            # it reads one pixel in every stride x stride: to blur the others would be three quarters of the work
            self.stride, conv.stride = conv.stride, (1, 1)
        self.register_buffer("blur_filter", binomial_filter(conv.in_channels))

    def forward(self, x):
        channels = self.conv.in_channels
        return self.conv(F.conv2d(x, self.blur_filter, stride=self.stride, padding=1, groups=channels))


class BlurMaxPool2d(nn.Module):
    """Dense max-pool, then a strided depthwise blur (Zhang 2019): the stride moves from the max to the blur.

    The stem has 64 channels in every ResNet here.
    """

    CHANNELS = 64

    def __init__(self, pool):
        super().__init__()
        self.stride = pool.stride
        self.pool = nn.MaxPool2d(pool.kernel_size, stride=1, padding=pool.padding)
        self.register_buffer("blur_filter", binomial_filter(self.CHANNELS))

    def forward(self, x):
        return F.conv2d(self.pool(x), self.blur_filter, stride=self.stride, padding=1, groups=self.CHANNELS)


def binomial_filter(channels):
    """The outer product of [1, 2, 1] with itself over 16, once per channel: float32 [channels, 1, 3, 3]."""
    row = torch.tensor([1.0, 2.0, 1.0])
    return (torch.outer(row, row) / 16).expand(channels, 1, 3, 3).clone()


def _blur_strided_convolutions(module):
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            if max(child.stride) > 1 and child.in_channels >= 16:
                setattr(module, name, BlurConv2d(child))
        else:
            _blur_strided_convolutions(child)
