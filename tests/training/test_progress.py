"""Waiting for data: on a CPU the time of the call, on a GPU the time that it had nothing to do."""

import time

import torch

from rn50.training.progress import Waiting


def test_on_a_cpu_it_is_the_time_of_the_call():
    waiting = Waiting(torch.device("cpu"))
    for _ in range(2):
        with waiting.for_data():
            time.sleep(0.02)
    assert 0.04 <= waiting.lap() < 1
    assert waiting.lap() == 0


def test_on_a_gpu_it_is_the_time_between_two_of_its_events(monkeypatch):
    """The host waits for three seconds; the GPU, which was two behind, for one."""
    clock, reached = iter([5.0, 6.0, 9.0, 9.0]), [7.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)

        def query(self):
            return self.at <= reached[0]

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    waiting = Waiting(torch.device("cuda"))
    for _ in range(2):
        with waiting.for_data():
            pass
    assert waiting.lap() == 1
    reached[0] = 9.0
    assert (waiting.lap(), len(waiting._events)) == (0, 0)
