"""SGD whose weight decay is decided by module type, never by parameter name."""

import torch
from torch import nn

DECAYED = (nn.modules.conv._ConvNd, nn.Linear)


def parameter_groups(model, *, weight_decay, decay):
    """Two groups, decayed first. `decay` is `weights` (convolution and linear weights) or `all`.

    By module type: matching 'bn' in a name, as ffcv-imagenet does, misses the eight BatchNorm parameters
    of ResNet's downsample branches and every bias.
    """
    decayed, plain = [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_weight = isinstance(module, DECAYED) and name == "weight"
            (decayed if is_weight or decay == "all" else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model, *, momentum, nesterov, weight_decay, decay):
    """torch's SGD over `parameter_groups`; the learning rate is set before every step by `set_learning_rate`."""
    groups = parameter_groups(model, weight_decay=weight_decay, decay=decay)
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=nesterov)


def set_learning_rate(optimizer, learning_rate):
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
