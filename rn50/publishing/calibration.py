"""What the probabilities of a page are worth: a temperature for the softmax, and below which of them it is unsure.

A network that was trained with a sigmoid for each class is shown as a softmax of the same logits: given that exactly
one class is true, the probability of class k is in proportion to p_k / (1 - p_k) = exp(logit_k).
"""

import numpy as np

# Temperatures that are tried. Beyond these the network knows nothing, or the images are too few to say more.
LEAST, MOST = 0.02, 50.0
# Of the right answers, the share that is called unsure.
UNSURE = 0.05
BINS = 15


def softmax(logits, temperature=1.0):
    """Probabilities float64 [N, classes] of logits [N, classes] / temperature."""
    logits = np.asarray(logits, np.float64) / temperature
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def calibrate(logits, labels):
    """What config.json says of the probabilities of logits [N, classes] for the true classes `labels`, int [N].

    Every second image is for fitting the temperature and the threshold, the others for judging them:
    `ece` and `ece_before` (at temperature 1) in points, `right_unsure` and `wrong_unsure` in per cent; None where there
    are no such images. `images`: how many they are of, beside `fitted_images`.
    """
    temperature = fit_temperature(logits[::2], labels[::2])
    sure, right = answers(softmax(logits, temperature), labels)
    least = unsure_below(sure[::2], right[::2])
    judged, hit = sure[1::2], right[1::2]
    return {
        "temperature": temperature,
        "unsure_below": least,
        "fitted_images": len(labels[::2]),
        "images": len(judged),
        "ece_before": calibration_error(*answers(softmax(logits[1::2]), labels[1::2])),
        "ece": calibration_error(judged, hit),
        "right_unsure": _percent(judged[hit] < least),
        "wrong_unsure": _percent(judged[~hit] < least),
    }


def answers(probabilities, labels):
    """(probability of the best class, whether it is the true one) of probabilities [N, classes]: [N] each."""
    return probabilities.max(axis=1), probabilities.argmax(axis=1) == labels


def fit_temperature(logits, labels):
    """The temperature with the least negative log-likelihood (Guo et al. 2017, arXiv 1706.04599), in LEAST..MOST.

    As in Platt's scaling, one image more is taken to be wrong than is known to be: a few images that are all right do
    not prove that the network is always right. 1.0 where the logits say nothing.
    """
    logits = np.asarray(logits, np.float64)
    doubt = 1 / (len(labels) + 2)
    wanted = (1 - doubt) * logits[np.arange(len(labels)), labels] + doubt * logits.mean(axis=1)

    def slope(inverse):
        """Of the negative log-likelihood, which is convex in the inverse of the temperature."""
        return ((softmax(logits, 1 / inverse) * logits).sum(axis=1) - wanted).mean()

    if not np.ptp(logits, axis=1).any():
        return 1.0
    low, high = np.log(1 / MOST), np.log(1 / LEAST)
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(np.exp(middle)) > 0 else (middle, high)
    return float(np.exp(-(low + high) / 2))


def unsure_below(sure, right):
    """The probability of the best class below which UNSURE of the right answers are: `sure` float, `right` bool [N].

    1.0, which is all answers, where none is right.
    """
    ordered = np.sort(sure[right])
    return float(ordered[int(UNSURE * len(ordered))]) if len(ordered) else 1.0


def calibration_error(sure, right):
    """Expected calibration error of the best classes, in points; None of no images.

    How far the mean probability of BINS equal bins is from the share that is right, by images (Guo et al. 2017).
    """
    if not len(sure):
        return None
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    apart = np.bincount(bins, weights=sure - right, minlength=BINS)
    return float(100 * np.abs(apart).sum() / len(sure))


def _percent(flags):
    return 100 * float(flags.mean()) if len(flags) else None
