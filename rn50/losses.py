"""The training criteria. Both take logits [N, C] and class indices [N] and return the mean over images."""

import torch.nn.functional as F


def cross_entropy(logits, labels, *, smoothing=0.0):
    """Softmax cross-entropy in nats against (1 - smoothing) on the label and smoothing / C on every class."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def binary_cross_entropy(logits, labels, *, smoothing=0.0):
    """Sigmoid cross-entropy in nats, summed over the classes: one yes-or-no question a class, same targets as above.

    The mean over classes, torch's default, would be C times smaller and train at a learning rate as much too low.
    """
    classes = logits.shape[1]
    targets = F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="sum") / len(labels)
