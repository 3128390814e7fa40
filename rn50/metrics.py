"""Accuracy counts, intervals of accuracies and of their differences, and classes under other names."""

import math
import statistics

# Of a class under another name, more than TAKEN is given that name, and of what is given that name more than TAKEN is
# of this class; less than KEPT has its own name; of the class whose name it is, less than OTHERS of that share has it.
# So neither twins count nor a network that has hardly learned and gives most classes a few names.
TAKEN, KEPT, OTHERS, ENOUGH_IMAGES = 0.5, 0.05, 0.25, 10


# Student's t: the 97.5th percentile at n - 1 degrees of freedom, for n pairs.
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


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


def paired_difference(differences):
    """{paired, mean, low, high} of one difference a seed; low and high: the 95 % t interval, None for one pair."""
    mean = statistics.fmean(differences)
    if len(differences) == 1:
        return {"paired": differences, "mean": mean, "low": None, "high": None}
    half = T_975[len(differences)] * statistics.stdev(differences) / len(differences) ** 0.5
    return {"paired": differences, "mean": mean, "low": mean - half, "high": mean + half}


def renamed_classes(confusion):
    """Classes that the network knows under the name of another: [[label, name's label], ...].

    confusion: counts [C, C], an int64 tensor; rows are labels, columns predictions. Where most images of class 3 are
    called 7, none 3, and hardly any image of class 7 is called 7, the network was trained with other labels than it is
    evaluated with. Classes that are only hard to tell apart are not like that: 7 is then what both are called.
    """
    counts = confusion.cpu().double()
    images = counts.sum(1)
    shares = counts / images.clamp(min=1)[:, None]
    taken, name = shares.max(1)
    kept = shares.diagonal()
    enough = images >= ENOUGH_IMAGES
    mostly = (taken > TAKEN) & (taken > TAKEN * shares.sum(0)[name])
    renamed = enough & enough[name] & mostly & (kept < KEPT) & (kept[name] < OTHERS * taken)
    return [[label, int(name[label])] for label in renamed.nonzero().flatten().tolist()]
