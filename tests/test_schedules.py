"""Schedules against figures worked out by hand and against FFCV's published switch epochs."""

import math

import pytest

from rn50.schedules import learning_rate, peak_learning_rate, resolution


def test_linear_scaling_rule():
    assert peak_learning_rate(lr_per_256=0.1, batch_size=256) == pytest.approx(0.1)
    assert peak_learning_rate(lr_per_256=0.1, batch_size=1024) == pytest.approx(0.4)


def test_warm_up_then_linear_to_zero():
    def at(epoch):
        return learning_rate(epoch, peak=1.7, epochs=16, schedule="linear", warmup_epochs=2, warmup_start=1e-4)

    assert at(0) == pytest.approx(1.7e-4)
    assert at(1) == pytest.approx(1.7 * (1 + 1e-4) / 2)
    assert at(2) == pytest.approx(1.7)
    assert at(9) == pytest.approx(0.85)
    assert at(16) == 0


def test_linear_equals_ffcvs_published_rate_at_the_end_of_an_epoch():
    # 312 iterations an epoch; the logged rate is that of the last of them (ffcv-imagenet, 16 epochs, epochs 0 and 1)
    def last(epoch):
        return learning_rate(
            epoch + 311 / 312, peak=1.7, epochs=16, schedule="linear", warmup_epochs=2, warmup_start=1e-4
        )

    assert last(0) == pytest.approx(0.8473609134615381, rel=1e-5)
    assert last(2) == pytest.approx(1.578960622710622, rel=1e-5)


def test_cosine():
    def at(epoch):
        return learning_rate(epoch, peak=2.0, epochs=90, schedule="cosine", warmup_epochs=10)

    assert at(10) == pytest.approx(2.0)
    assert at(50) == pytest.approx(1.0)
    assert at(30) == pytest.approx(1 + math.cos(math.pi / 4))
    assert at(90) == pytest.approx(0, abs=1e-12)


def test_step():
    def at(epoch):
        return learning_rate(epoch, peak=0.1, epochs=90, schedule="step", step_epochs=[30, 60], step_gamma=0.1)

    assert [at(0), at(29.99), at(30), at(60)] == pytest.approx([0.1, 0.1, 0.01, 0.001])


# ffcv-imagenet's ramps, and the epoch in which its published logs switch from 160 to 192 px
@pytest.mark.parametrize(("ramp", "first_at_192"), [((11, 13), 12), ((41, 48), 45)])
def test_resolution_switches_where_ffcvs_runs_did(ramp, first_at_192):
    def at(epoch):
        return resolution(epoch, start=160, end=192, start_ramp=ramp[0], end_ramp=ramp[1], multiple=32)

    assert at(first_at_192 - 1) == 160
    assert at(first_at_192) == 192


def test_resolution_keeps_ends_that_are_no_multiple():
    sizes = [resolution(e, start=50, end=90, start_ramp=1, end_ramp=5, multiple=16) for e in range(7)]
    assert sizes == [50, 50, 64, 64, 80, 90, 90]
