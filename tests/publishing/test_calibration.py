"""The temperature and the threshold of an exported model: right on what they are made of, and never in the way."""

import json

import numpy as np
import pytest

from rn50.publishing import calibration


def drawn(temperature, images=4000, classes=10):
    """Logits whose softmax at `temperature` is how often each class is the true one, and labels drawn so."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(images, classes)) * 3
    shares = calibration.softmax(logits, temperature)
    return logits.astype(np.float32), np.array([rng.choice(classes, p=share) for share in shares])


def test_a_softmax_of_the_logits_is_what_sigmoids_say_of_exactly_one_true_class():
    logits = np.random.default_rng(0).normal(size=(20, 5)) * 4
    p = 1 / (1 + np.exp(-logits))
    alone = np.array([[row[k] * np.prod(np.delete(1 - row, k)) for k in range(5)] for row in p])
    np.testing.assert_allclose(calibration.softmax(logits), alone / alone.sum(1, keepdims=True), rtol=1e-9)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_that_made_the_labels_is_found(temperature):
    logits, labels = drawn(temperature)
    found = calibration.calibrate(logits, labels)
    assert found["temperature"] == pytest.approx(temperature, rel=0.06)
    assert (found["fitted_images"], found["images"]) == (2000, 2000)
    assert found["ece"] < 5
    if temperature != 1:
        assert found["ece_before"] > 3 * found["ece"]
    assert 3 < found["right_unsure"] < 7 < found["wrong_unsure"]


def test_only_every_second_image_is_fitted_on():
    logits, labels = drawn(1.0, images=400)
    other = logits.copy()
    other[1::2] *= 5
    first, second = calibration.calibrate(logits, labels), calibration.calibrate(other, labels)
    fitted = ("temperature", "unsure_below")
    assert [first[key] for key in fitted] == [second[key] for key in fitted]
    assert first["ece"] < second["ece"]


def test_of_the_right_answers_one_in_twenty_is_below_the_threshold():
    sure = np.linspace(0.3, 0.99, 120)
    right = np.arange(120) % 6 > 0
    least = calibration.unsure_below(sure, right)
    assert (sure[right] < least).sum() == 5
    assert calibration.unsure_below(sure[:10], right[:10]) == sure[1]  # too few for one in twenty


def test_the_calibration_error_is_the_distance_of_each_bins_mean_from_its_share():
    sure = np.array([0.9, 0.91, 0.92, 0.5, 0.5, 1.0])
    right = np.array([True, True, False, True, True, True])
    assert calibration.calibration_error(sure, right) == pytest.approx(100 * ((2.73 - 2) + (2 - 1)) / 6)
    assert calibration.calibration_error(sure[:0], right[:0]) is None


def network(right, images):
    logits = np.full((images, 3), -4.0, np.float32)
    labels = np.arange(images) % 3
    logits[np.arange(images), labels if right else (labels + 1) % 3] = 5
    return logits, labels


@pytest.mark.parametrize("images", [1, 2, 3, 400])
@pytest.mark.parametrize("kind", ["right everywhere", "right nowhere", "says nothing"])
def test_a_network_without_mistakes_or_sense_and_a_few_images_break_nothing(kind, images):
    logits, labels = network(kind == "right everywhere", images)
    found = calibration.calibrate(logits * (kind != "says nothing"), labels)
    json.loads(json.dumps(found, allow_nan=False))
    shown = calibration.softmax(logits, found["temperature"]).max(1)
    assert 0 < found["unsure_below"] <= 1
    if kind == "right everywhere":
        # the more images, the surer; never as sure as a proof
        assert 1 - 2 / (len(labels[::2]) + 1) < shown[0] < 1
        assert found["right_unsure"] in (0, None)
        assert found["wrong_unsure"] is None
    elif kind == "says nothing":
        assert found["temperature"] == 1
    else:
        assert shown[0] < 0.5
        assert found["unsure_below"] == 1
