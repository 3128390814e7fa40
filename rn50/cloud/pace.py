"""Whether a run is as fast as its machine should be: a stolen GPU, a throttled one or a slow disk cost hours unseen."""

LOW = 0.5  # share of the expected images/s under which `status` says so
WINDOW_SECONDS = 1800.0  # of training, without evaluations


def expected_at(rates, px):
    """Images/s at `px` pixels, from {px: images/s} of a machine.

    Straight lines between what is known; less above it, as the pixels ask; no more below it, where the loader may set
    the pace.
    """
    known = sorted((int(key), rate) for key, rate in rates.items())
    if px <= known[0][0]:
        return known[0][1]
    for (low, before), (high, after) in zip(known, known[1:], strict=False):
        if px <= high:
            return before + (after - before) * (px - low) / (high - low)
    largest, rate = known[-1]
    return rate * (largest / px) ** 2


def slow_line(pace):
    """A pace, as `Pace.now` returns it, as text."""
    return (
        f"{pace['images_per_second']:.0f} images/s over {pace['minutes']} minutes, {pace['share']:.0%} of what is "
        "expected of this machine"
    )


class Pace:
    """Images/s over the last half hour of training. rates: {px: images/s} that are expected, or None."""

    def __init__(self, rates):
        self.rates, self._seen = rates, []

    def add(self, progress):
        """progress: what the run's progress.json says, or {}."""
        if "images_seen" not in progress:
            return
        if self._seen and progress["seconds"] < self._seen[-1]["seconds"]:
            self._seen = []  # begun again from a checkpoint
        if not self._seen or progress["seconds"] > self._seen[-1]["seconds"]:
            self._seen.append(progress)
        while len(self._seen) > 2 and progress["seconds"] - self._seen[1]["seconds"] >= WINDOW_SECONDS:
            del self._seen[0]

    def now(self):
        """{images_per_second, share, minutes}: share of what is expected; None before half an hour is seen."""
        if not self.rates or not self._seen:
            return None
        first, last = self._seen[0], self._seen[-1]
        seconds = last["seconds"] - first["seconds"]
        if seconds < WINDOW_SECONDS:
            return None
        images = last["images_seen"] - first["images_seen"]
        expected = sum(
            (after["seconds"] - before["seconds"]) * expected_at(self.rates, after["resolution"])
            for before, after in zip(self._seen, self._seen[1:], strict=False)
        )
        return {
            "images_per_second": round(images / seconds, 1),
            "share": round(images / expected, 3),
            "minutes": round(seconds / 60),
        }
