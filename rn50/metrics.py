"""Accuracy counts, their confidence interval, and classes whose labels cannot be right."""

import math

# Of an exchanged class, more than this share is taken for another, and less than that for itself.
TAKEN, KEPT, ENOUGH_IMAGES = 0.5, 0.05, 10


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


def exchanged_classes(confusion):
    """Classes that are taken for one another in a ring: [[3, 7], ...], each beginning with its smallest.

    confusion: counts [C, C], an int64 tensor; rows are labels, columns predictions. A network that takes most of class
    3 for 7, most of 7 for 3, and neither for itself has learned both: it was trained with other labels than it is
    evaluated with. Classes that are only hard to tell apart do not do that: one of them is then predicted for both.
    """
    counts = confusion.cpu().double()
    images = counts.sum(1)
    largest, taken_for = counts.max(1)
    kept = counts.diagonal()
    wrong = (images >= ENOUGH_IMAGES) & (largest > TAKEN * images) & (kept < KEPT * images)
    following = {label: int(taken_for[label]) for label in wrong.nonzero().flatten().tolist()}
    rings, seen = [], set()
    for label in following:
        path = []
        while label in following and label not in seen:
            seen.add(label)
            path.append(label)
            label = following[label]
        if label in path:
            ring = path[path.index(label) :]
            first = ring.index(min(ring))
            rings.append(ring[first:] + ring[:first])
    return rings
