"""Random numbers that depend on (seed, epoch, sample) alone: not on threads, batches or ranks."""

import numpy as np

# What the numbers are for: each purpose has its own.
CROPS, JITTER = 0, 1

_GOLDEN = 0x9E3779B97F4A7C15


def uniforms(samples, draws, *, seed, epoch, purpose):
    """Uniform in [0, 1), float64 [len(samples), draws].

    `samples`: indices in the file. `purpose`: CROPS or JITTER.
    SplitMix64 (Steele, Lea and Flood 2014, doi 10.1145/2714064.2660195), started from a hash of the four.
    """
    with np.errstate(over="ignore"):
        state = np.uint64(0)
        for part in (seed, epoch, purpose):
            state = _mix(state + np.uint64(_GOLDEN) ^ np.uint64(part))
        states = _mix(state + np.uint64(_GOLDEN) ^ np.asarray(samples).astype(np.uint64))
        steps = np.arange(1, draws + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        return (_mix(states[:, None] + steps) >> np.uint64(11)) * 2.0**-53


def _mix(z):
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)
