"""Every sample once, the same micro-batches for any number of GPUs, whole pages in page-aware order."""

import numpy as np
import pytest

from rn50.data.order import evaluation_share, page_aware_order, random_order, rank_positions, steps_per_epoch


def test_random_order_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    one = random_order(1000, seed=3, epoch=7)
    assert sorted(one) == list(range(1000))
    assert np.array_equal(one, random_order(1000, seed=3, epoch=7))
    for seed, epoch in ((3, 8), (4, 7), (7, 3)):
        assert not np.array_equal(one, random_order(1000, seed=seed, epoch=epoch))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_micro_batches_hold_the_same_samples_for_any_world_size(world_size):
    order = random_order(1000, seed=0, epoch=0)
    batch_size, micro_batch = 96, 12

    def micro_batches(world_size):
        ranks = [
            rank_positions(order, batch_size=batch_size, micro_batch=micro_batch, rank=r, world_size=world_size)
            for r in range(world_size)
        ]
        return {tuple(chunk) for mine in ranks for chunk in mine.reshape(-1, micro_batch)}

    got = micro_batches(world_size)
    assert got == {tuple(chunk) for chunk in order[:960].reshape(-1, micro_batch)}


def test_a_step_is_one_stretch_of_the_global_order_on_all_ranks_together():
    order = random_order(100, seed=0, epoch=0)
    ranks = [rank_positions(order, batch_size=32, micro_batch=4, rank=r, world_size=2) for r in range(2)]
    per_step = 32 // 2
    for step in range(steps_per_epoch(100, 32)):
        seen = np.concatenate([mine[step * per_step : (step + 1) * per_step] for mine in ranks])
        assert sorted(seen) == sorted(order[32 * step : 32 * (step + 1)])


def test_starting_at_a_step_gives_the_rest_of_the_epoch():
    order = random_order(100, seed=0, epoch=0)
    settings = {"batch_size": 32, "micro_batch": 8, "rank": 1, "world_size": 2}
    assert np.array_equal(rank_positions(order, **settings)[16:], rank_positions(order, first_step=1, **settings))


@pytest.mark.parametrize(("samples", "world_size"), [(10, 1), (10, 3), (50_000, 7), (2, 4)])
def test_evaluation_covers_every_sample_exactly_once(samples, world_size):
    shares = [evaluation_share(samples, rank=r, world_size=world_size) for r in range(world_size)]
    assert np.array_equal(np.concatenate(shares), np.arange(samples))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_page_aware_order_reads_a_window_of_pages_before_the_next():
    # 40 pages of 25 samples whose order in the file is not that of their numbers
    pages = np.random.default_rng(0).permutation(np.repeat(np.arange(100, 140), 25))
    order = page_aware_order(pages, seed=1, epoch=2, pages_in_window=8)
    assert sorted(order) == list(range(1000))
    windows = [set(pages[order[first : first + 200]]) for first in range(0, 1000, 200)]
    assert [len(window) for window in windows] == [8] * 5
    assert len(set.union(*windows)) == 40
    assert not np.array_equal(order, page_aware_order(pages, seed=1, epoch=3, pages_in_window=8))
    # within a window the samples of its pages are mixed: neighbours are seldom of one page
    neighbours = pages[order]
    assert np.mean(neighbours[1:] == neighbours[:-1]) < 0.2


def test_batches_in_page_aware_order_hold_as_many_classes_as_random_ones():
    """At the size of ImageNet's 400-px rung: 1,281,167 samples, 256 on a page of 8 MiB, written in shuffled order.

    A random batch of 1024 holds 1000 x (1 - 0.999^1024) = 641 of the 1000 classes; in page-aware order it is the same.
    """
    samples, classes, batch_size = 1_281_167, 1000, 1024
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.arange(samples) % classes)
    pages = np.arange(samples) // 256

    def classes_in_a_batch(order):
        batches = labels[order[: 200 * batch_size]].reshape(200, batch_size)
        return np.mean([len(np.unique(batch)) for batch in batches])

    order = page_aware_order(pages, seed=0, epoch=0, pages_in_window=64)
    assert abs(classes_in_a_batch(order) - 641) < 4
    assert abs(classes_in_a_batch(random_order(samples, seed=0, epoch=0)) - 641) < 4
    # a batch comes from all 64 pages of its window: about 16 samples of each
    _, per_page = np.unique(pages[order[:batch_size]], return_counts=True)
    assert len(per_page) == 64
    assert per_page.max() < 48
    # which samples meet changes with the epoch: of a batch, hardly any are together in one of the next epoch
    again = page_aware_order(pages, seed=0, epoch=1, pages_in_window=64)
    where = np.empty(samples, np.int64)
    where[again] = np.arange(samples) // batch_size
    _, together = np.unique(where[order[:batch_size]], return_counts=True)
    assert together.max() < 16
    # a page is read in one go, within its window, and not again
    first, last = np.full(pages[-1] + 1, samples), np.zeros(pages[-1] + 1, np.int64)
    np.minimum.at(first, pages[order], np.arange(samples))
    np.maximum.at(last, pages[order], np.arange(samples))
    assert (last - first).max() < 64 * 256
