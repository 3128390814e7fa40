"""What the answers of a trained network say of stored images: labels, channels, sizes. Functions of numpy arrays.

A cause is {cause: one word or two, text: a line for a person, certain}. One that is not certain matters only where the
figure is not as published: small pictures may be all there is, and grey ones what they should be.
"""

import math

import numpy as np

from rn50.data.imagenet import CLASSES, is_imagenet
from rn50.errors import RunError
from rn50.metrics import ENOUGH_IMAGES, KEPT, TAKEN

# Points of top-1 that stored images may cost. Networks lost 0.8 to 1.5 where the stored image was of the evaluation's
# own size, and at most 0.5 where it was 1.6 times as large (studies/decode_accuracy); ImageNet's 500-px file is 1.46
# times the 256 px of a published evaluation.
TOLERANCE = 1.0
# Of a class that is looked at more closely.
CLOSER_IMAGES = 50
# A class is suspect where at most this share of its images is recognised; with more suspect classes than SUSPECTS of
# all, it is not single classes.
SUSPECT, SUSPECTS = 0.2, 0.2
# One chance in 200,000 on one side: of a thousand classes in two splits, a good set accuses one in a hundred times.
SURE = 4.4
# A class all of whose images are another's, which has its own too: hard twins keep more.
NONE_KEPT, MOST_TAKEN, MANY_IMAGES = 0.02, 0.6, 20
# Another reading of the same pixels must be right on so many more pictures, in points and in standard errors.
GAIN, GAIN_SURE = 2.0, 4.0
# Points by which labels must be better under other names before the order of the classes is in doubt.
REORDERED = 10.0
# Shares of a sample that no good set has: of ImageNet's pictures 2 % are grey.
CONSTANT, GREY, REPEATED, SQUARE = 0.002, 0.2, 0.01, 0.9
# What the first five ids of the devkit's meta.mat stand for.
ILSVRC_IDS = ("kit fox", "English setter", "Siberian husky", "Australian terrier", "English springer")


def cause(name, text, *, certain=True):
    return {"cause": name, "text": text, "certain": certain}


def sample(labels, count, *, seed=0):
    """Up to `count` of range(len(labels)), int64, in random order: of every class the same share, in any beginning."""
    order = np.random.default_rng(seed).permutation(len(labels))
    shuffled, counts = labels[order], np.bincount(labels)
    by_class = np.argsort(shuffled, kind="stable")
    place = np.empty(len(labels))
    place[by_class] = np.arange(len(labels)) - (np.cumsum(counts) - counts)[shuffled[by_class]]
    return order[np.argsort((place + 0.5) / counts[shuffled], kind="stable")[:count]]


def more_of(labels, wanted, *, without):
    """Up to CLOSER_IMAGES samples of each label in `wanted`, those of `without` counted and left out; int64."""
    chosen = []
    for label in wanted:
        members = np.flatnonzero(labels == label)
        seen = np.isin(members, without)
        members = np.random.default_rng(0).permutation(members[~seen])
        chosen.append(members[: max(0, CLOSER_IMAGES - int(seen.sum()))])
    return np.concatenate(chosen) if chosen else np.empty(0, np.int64)


def confusion(labels, predictions, classes):
    """Counts, int64 [classes, classes]: rows are labels, columns predictions."""
    return np.bincount(labels * classes + predictions, minlength=classes * classes).reshape(classes, classes)


def verdict(figures, published, *, at_least=False):
    """`ok`, `below` or `above` of figures {top1_low, top1_high, ...} in %; `unknown` where `published` is None.

    at_least: more is as good.
    """
    if published is None:
        return "unknown"
    if figures["top1_high"] + TOLERANCE < published:
        return "below"
    return "above" if figures["top1_low"] - TOLERANCE > published and not at_least else "ok"


# --- Classes ---------------------------------------------------------------------------------------------------------


def columns(classes, count, *, outputs, known):
    """(which of a network's `outputs` stands for each of `count` labels, int64 [count], whether names say so).

    classes: [{wnid, name}] of the data in label order, known: the same of the outputs; None where nobody says. A name
    that two outputs have is none. torchvision's order of ImageNet is that of the sorted wnids. RunError where labels
    and outputs cannot be brought together.
    """
    wnids = [c["wnid"] for c in classes or []]
    if count == outputs == CLASSES and is_imagenet(sorted(wnids)):
        return np.argsort(np.argsort(wnids)), True
    for key in ("wnid", "name"):
        of_outputs = [c.get(key) for c in known or []]
        place = {word: k for k, word in enumerate(of_outputs) if word and of_outputs.count(word) == 1}
        if classes and all(c[key] in place for c in classes):
            return np.array([place[c[key]] for c in classes]), True
    if count == outputs:
        return np.arange(count), False
    unknown = [c["name"] for c in classes or [] if c["name"] not in {k["name"] for k in known or []}]
    why = f"such as {unknown[0]}" if unknown else "and nothing says what they are called"
    raise RunError(
        f"the data has {count} classes and the weights {outputs}, {why}: give weights with as many classes, or data "
        "whose manifest has the weights' names of classes"
    )


def suspects(counts):
    """Labels of a small sample that need a closer look, and the labels of the names that these are given."""
    images, kept = counts.sum(1), counts.diagonal()
    odd = np.flatnonzero((images > 0) & (kept <= SUSPECT * images))
    if len(odd) > max(2, SUSPECTS * len(counts)):
        return np.empty(0, np.int64)
    taken, name = _other_names(counts)
    return np.union1d(odd, name[odd][taken[odd] > 1])


def relabelled(counts):
    """(names int64 [C], top-1 in % as labelled, in % under these names).

    names: what most images of a label are called, -1 where that is not clear. A name counts where it leads by two
    images, so that it would lead without the image that is judged by it, and for one label alone: of several, for that
    of which most are called so, or a network that always gives the same answer would be right.
    """
    images, ordered = counts.sum(1), np.sort(counts, 1)
    shares = ordered[:, -1] / images.clip(1)
    names = np.where(ordered[:, -1] - ordered[:, -2:-1].sum(1) > 1, counts.argmax(1), -1)
    order = np.lexsort((names != np.arange(len(names)), -shares))
    first = order[np.unique(names[order], return_index=True)[1]]
    names[np.setdiff1d(order, first)] = -1
    right = np.where(names >= 0, ordered[:, -1], counts.diagonal())
    return names, 100 * counts.diagonal().sum() / max(1, images.sum()), 100 * right.sum() / max(1, images.sum())


def order_cause(counts, names, *, split, describe, called):
    """The cause `labels permuted`, with its top1, where labels are in another order than the outputs; or None.

    names: what the network calls each label's class. describe(label), called(label): how the data, and how the network
    calls it, for a person.
    """
    held, before, after = relabelled(counts)
    moved = np.flatnonzero((held >= 0) & (held != np.arange(len(held))))
    if after - before < REORDERED or len(moved) < max(3, SUSPECTS * len(held)):
        return None
    order = known_order(held, names)
    shown = ", ".join(f"label {k} ({describe(k)}) holds pictures of {called(held[k])}" for k in moved[:3])
    one_to_one = ", one to one," if len(set(held[moved].tolist())) == len(moved) else ""
    text = f"{split}: labels are permuted{f' ({order})' if order else ''}: {shown}{', ...' if moved[3:].size else ''}; "
    text += f"under other names for {len(moved)} of {len(held)} labels{one_to_one} top-1 would be {after:.1f} %"
    return cause("labels permuted", f"{text}, not {before:.1f} %") | {"top1": after}


def known_order(held, names):
    """What order of the classes `held`, from `relabelled`, is, in words; None where it is none of the usual ones."""
    count = len(held)
    numbers = list(range(count))
    orders = {
        "each label is one too large": [(k - 1) % count for k in numbers],
        "each label is one too small": [(k + 1) % count for k in numbers],
        "the order is reversed": numbers[::-1],
        "folders that are numbers, sorted as text: 0, 1, 10, 100": sorted(numbers, key=str),
        "folders that are numbers from 1, sorted as text: 1, 10, 100": sorted(numbers, key=lambda k: str(k + 1)),
        "sorted by name": sorted(numbers, key=lambda k: names[k]),
        "sorted by name, without regard to capitals": sorted(numbers, key=lambda k: names[k].casefold()),
    }
    clear = held >= 0
    for text, order in orders.items():
        if (held[clear] == np.array(order)[clear]).mean() > 0.9:
            return text
    first = [names[k] if k >= 0 else None for k in held[: len(ILSVRC_IDS)]]
    if sum(name == wanted for name, wanted in zip(first, ILSVRC_IDS, strict=False)) >= 3:
        return "in the order of the devkit's ILSVRC2012_ID, not of the wnids"
    return None


def class_causes(counts, renamed, *, split, describe, called, other=None, learned=False):
    """A list of causes: classes of `split` whose pictures are another's, and those that are recognised too rarely.

    counts: of `split`; other: of the other split, or None. renamed: [[label, name's label]] of rn50.metrics. learned:
    whether the network was trained on such a split, so that it recognises it at least as often as the other one.
    Classes are of very different difficulty, and of the easily confused ones one is preferred: so a class is named
    where nearly none of its images is left to it, or where the other split's are better by SURE standard errors.
    A few wrong pictures in a class are not found.
    """
    images, kept = counts.sum(1), counts.diagonal()
    taken, name = _other_names(counts)
    share_kept, share_taken = kept / images.clip(1), taken / images.clip(1)
    misnamed = (images >= MANY_IMAGES) & (share_kept <= NONE_KEPT) & (share_taken > MOST_TAKEN)
    rare = np.zeros(len(counts), bool)
    if other is not None:
        enough = (images >= ENOUGH_IMAGES) & (other.sum(1) >= ENOUGH_IMAGES)
        others_taken = other[np.arange(len(other)), name]
        more_taken = _errors_apart(others_taken, other.sum(1), taken, images) > SURE
        few = 2 * KEPT if learned else KEPT
        misnamed |= enough & more_taken & (share_taken > TAKEN) & (share_kept < few)
        others_kept = other.diagonal() / other.sum(1).clip(1)
        fewer_kept = _errors_apart(kept, images, other.diagonal(), other.sum(1)) > SURE
        parted = more_taken & (share_taken > SUSPECT) & (share_taken > 2 * others_taken / other.sum(1).clip(1))
        rare = (fewer_kept & (share_kept < others_kept / 2)) | (parted & (share_kept < others_kept))
        rare &= enough & learned
    # several under one name are a network that has not learned
    misnamed &= np.bincount(name[misnamed], minlength=len(counts))[name] == 1
    found = {label: held for label, held in renamed} | {int(k): int(name[k]) for k in np.flatnonzero(misnamed)}
    causes = []
    for label, held in found.items():
        if found.get(held) == label and label > held:
            continue  # said with the other one
        figures = f"{kept[label]} of {images[label]} are recognised, {counts[label, held]} are called {called(held)}"
        if found.get(held) == label:
            text = f"{split}: {describe(label)} and {describe(held)} are exchanged: of the first {figures}"
        else:
            text = f"{split}: label {label} ({describe(label)}) holds pictures of {called(held)}: {figures}"
        causes.append(cause("class under another label", text))
    for label in np.flatnonzero(rare):
        if int(label) not in found:
            text = (
                f"{split}: {describe(label)}: {100 * share_kept[label]:.0f} % of its {images[label]} sampled pictures "
                f"are recognised, {100 * others_kept[label]:.0f} % of the other split's"
            )
            if share_taken[label] > SUSPECT:
                text += f"; {100 * share_taken[label]:.0f} % are called {called(name[label])}"
            causes.append(cause("class mixed", text))
    return causes


def guessing_causes(figures, classes, *, split):
    """A list of the cause `guessing`, where top-1 is no better than one in `classes`."""
    if figures["top1_low"] > 100 / classes:
        return []
    text = f"{split}: top-1 is that of guessing: the labels are in no relation to the pictures, or the weights are of "
    return [cause("guessing", text + "other classes")]


def _other_names(counts):
    """(how many images of each label are given its most frequent other name, that name), int64 [C] each."""
    others = counts - np.diag(counts.diagonal())
    return others.max(1), others.argmax(1)


def _errors_apart(low, of_low, high, of_high):
    """By how many standard errors high / of_high is above low / of_low; arrays of counts."""
    of_low, of_high = np.maximum(of_low, 1), np.maximum(of_high, 1)
    share = (low + high + 1) / (of_low + of_high + 2)
    return (high / of_high - low / of_low) / np.sqrt(share * (1 - share) * (1 / of_low + 1 / of_high))


# --- Pictures --------------------------------------------------------------------------------------------------------


def gain(right, other):
    """(points, standard errors) by which `other` is better than `right`, bool [n] of the same pictures (McNemar)."""
    better, worse = int((other & ~right).sum()), int((right & ~other).sum())
    return 100 * (better - worse) / max(1, len(right)), (better - worse) / math.sqrt(max(1, better + worse))


def reading_cause(right, readings, *, split):
    """The cause for which pixels that are read otherwise are clearly better than `right`, with its top1; or None.

    readings: {(cause, text): bool [n]}.
    """
    gains = {reading: gain(right, other) for reading, other in readings.items()}
    clear = [r for r, (points, errors) in gains.items() if points >= GAIN and errors >= GAIN_SURE]
    if not clear:
        return None
    name, text = best = max(clear, key=lambda reading: gains[reading])
    before, after = 100 * right.mean(), 100 * readings[best].mean()
    text = f"{split}: {text}: so read, {after:.1f} % of {len(right)} pictures are right, not {before:.1f} %"
    return cause(name, text) | {"top1": after}


def file_causes(info, side):
    """A list of causes: what the sizes of a file's pictures say of its name, SPLIT_{side}.beton.

    A manifest that is of another size is refused before, by loaders.find_rungs.
    """
    largest = int(max(info.widths.max(), info.heights.max()))
    if largest > side:
        return [cause("wrong rung", f"{info.path} is named for {side} px and holds pictures of up to {largest} px")]
    if info.manifest is None and largest < side:
        text = f"{info.path} is named for {side} px, but no picture in it is larger than {largest} px"
        return [cause("wrong rung", text, certain=False)]
    return []


def size_causes(info, px, crop_ratio):
    """A list of causes: pictures too small for an evaluation at `px` pixels, and pictures that are squares."""
    causes, resized = [], round(px / crop_ratio)
    if info.median_short_side < resized:
        text = (
            f"{info.path}: the pictures are too small: their median short side is {info.median_short_side:.0f} px and "
            f"the evaluation resizes it to {resized} px; evaluate from a larger rung"
        )
        causes.append(cause("too small", text, certain=False))
    squares = float((info.widths == info.heights).mean())
    if squares > SQUARE:
        text = (
            f"{info.path}: {100 * squares:.0f} % of the pictures are squares: resized without regard to their shape, "
        )
        causes.append(cause("squares", text + "or cropped before", certain=False))
    return causes


def pixel_causes(samples, constant, grey, keys, split):
    """A list of causes from what decoded pictures look like.

    samples: numbers [n]. constant, grey: bool [n], of one colour and without colours. keys: a bytes object a picture,
    equal where two look the same.
    """
    causes, total = [], len(samples)
    if constant.any():
        text = f"{split}: {constant.sum()} of {total} pictures are of one colour (sample {samples[constant.argmax()]})"
        causes.append(cause("blank pictures", text, certain=bool(constant.mean() > CONSTANT)))
    if grey.mean() > GREY:
        text = f"{split}: {100 * grey.mean():.0f} % of the pictures are grey, of ImageNet's 2 %: the colours are lost"
        causes.append(cause("grey pictures", text, certain=False))
    _, first, times = np.unique(np.array([key for key, k in zip(keys, constant, strict=True) if not k], dtype=bytes),
                                return_index=True, return_counts=True)  # fmt: skip
    repeated = int((times - 1).sum())
    if repeated > REPEATED * total:
        shown = np.flatnonzero(~constant)[first[times.argmax()]]
        most = f"sample {samples[shown]} is there {times.max()} times"
        causes.append(cause("copies", f"{split}: {repeated} of {total} pictures are copies of others ({most})"))
    return causes
