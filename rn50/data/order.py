"""Which sample is at which position of an epoch: one global order, cut the same way for any number of GPUs."""

import numpy as np

# Pages of a .beton file that are in play at a time, in page-aware order.
PAGES_IN_WINDOW = 64


def steps_per_epoch(num_samples, batch_size):
    """Whole optimizer steps in an epoch; the rest of the order is left for another epoch's shuffle."""
    return num_samples // batch_size


def random_order(num_samples, *, seed, epoch):
    """A uniform permutation of range(num_samples), int64, that depends on (seed, epoch) alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


def page_aware_order(pages, *, seed, epoch, pages_in_window):
    """A permutation, int64, that reads whole pages: for files larger than memory.

    pages: the page of every sample, integers [num_samples]. Pages are shuffled, `pages_in_window` of them
    at a time are in play, and the samples of those are shuffled uniformly. A window is
    `pages_in_window` x page_size bytes of page cache; a batch mixes samples of the whole window.
    """
    generator = np.random.default_rng([seed, epoch])
    by_page = np.argsort(pages, kind="stable")
    starts = np.flatnonzero(np.diff(pages[by_page], prepend=-1))
    members = np.split(by_page, starts[1:])
    sequence = generator.permutation(len(members))
    windows = [
        generator.permutation(np.concatenate([members[page] for page in sequence[first : first + pages_in_window]]))
        for first in range(0, len(sequence), pages_in_window)
    ]
    return np.concatenate(windows)


def rank_positions(order, *, batch_size, micro_batch, rank, world_size, first_step=0):
    """The part of a global order that one rank reads, in reading order, from `first_step` to the last whole step.

    Step k is order[k * batch_size : (k + 1) * batch_size], seen as [accumulation, world_size, micro_batch].
    So a micro-batch, which is what BatchNorm sees, holds the same samples for any world size.
    """
    steps = steps_per_epoch(len(order), batch_size)
    grid = order[: steps * batch_size].reshape(steps, -1, world_size, micro_batch)
    return np.ascontiguousarray(grid[first_step:, :, rank]).reshape(-1)


def evaluation_share(num_samples, *, rank, world_size):
    """The samples that one rank evaluates, int64: contiguous, every sample on exactly one rank, none repeated."""
    return np.array_split(np.arange(num_samples), world_size)[rank]
