"""Accuracy counts and their confidence interval."""

import math


def correct_in_top(logits, labels, k):
    """How many of `labels` [N] are among the k largest of `logits` [N, C]: an int64 scalar tensor.

    k is at most C; a NaN row counts as wrong.
    """
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    hits = (top == labels[:, None]).any(dim=1) & ~logits.isnan().any(dim=1)
    return hits.sum()


def wilson_interval(correct, total, z=1.96):
    """The 95 % Wilson score interval of `correct` out of `total`, as two fractions.

    Wilson 1927; it says how far sampling of the test images alone may move the figure, not the training seed.
    """
    share = correct / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    margin = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, centre - margin), min(1.0, centre + margin)
