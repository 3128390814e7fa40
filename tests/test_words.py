import time
from pathlib import Path

from rn50.words import counted, duration, from_here, moment


def test_moments_and_numbers_in_words(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_796_300_000.0)
    monkeypatch.setattr(time, "localtime", time.gmtime)
    assert [moment(seconds) for seconds in (0, 61, 59 * 60)] == ["in 1 min", "in 2 min", "in 59 min"]
    assert moment(59 * 60 + 1) == "Thu 13:12"
    assert moment(5 * 86400) == "Tue 12:13"
    assert moment(6 * 86400) == "9 Dec"
    assert [duration(seconds) for seconds in (0.4, 119, 120, 7199, 7200)] == [
        "0 s",
        "119 s",
        "2 min",
        "120 min",
        "2.0 h",
    ]
    assert [counted(1, "class"), counted(1000, "class"), counted(2, "epoch")] == [
        "1 class",
        "1,000 classes",
        "2 epochs",
    ]


def test_a_path_is_shown_as_it_is_typed_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert from_here(tmp_path / "a" / "b.yaml") == "a/b.yaml"
    assert from_here(Path("/elsewhere/b.yaml")) == "/elsewhere/b.yaml"
