"""The training criteria. Both take logits [N, C] and class indices [N] and return the mean over images."""

import torch.nn.functional as F


def cross_entropy(logits, labels, *, smoothing=0.0):
    """Softmax cross-entropy in nats against (1 - smoothing) on the label and smoothing / C on every class."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
