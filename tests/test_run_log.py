"""Logs survive interruptions without duplicate or torn rows."""

import json
import resource
from types import SimpleNamespace

import pytest
import yaml

from rn50.errors import RunError, Stopped
from rn50.files import read_json, read_rows, write_atomically
from rn50.training.distributed import LostContact
from rn50.training.run_folder import RunLog, recorded


def open_log(folder, rows=(), warn=pytest.fail):
    return RunLog(folder, config={"a": {"b": 1}}, environment={"commit": "x"}, rows=list(rows), warn=warn)


def test_the_log_is_the_checkpoints_and_rows_that_will_be_repeated_are_dropped(tmp_path):
    log = open_log(tmp_path)
    for epoch in range(3):
        log.add_epoch({"epoch": epoch, "top1": 10.0 * epoch})
    log.close()
    log = open_log(tmp_path, log.rows[:2])
    log.add_epoch({"epoch": 2, "top1": 99.0})
    log.close()
    assert [row["top1"] for row in read_rows(tmp_path / "log.jsonl")] == [0, 10, 99]


def test_a_torn_last_line_is_not_a_row(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"epoch": 0}\n{"epoch": 1, "to')
    assert read_rows(tmp_path / "log.jsonl") == [{"epoch": 0}]


def test_folder_holds_config_and_every_sessions_environment(tmp_path):
    open_log(tmp_path).close()
    open_log(tmp_path, [{"epoch": epoch} for epoch in range(4)]).close()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"a": {"b": 1}}
    sessions = json.loads((tmp_path / "environment.json").read_text())
    assert [session["from_epoch"] for session in sessions] == [0, 4]
    assert list((tmp_path / "tensorboard").iterdir())


def test_the_log_is_whole_when_room_comes_after_the_last_row(tmp_path):
    warnings = []
    log = open_log(tmp_path, warn=warnings.append)
    log.add_epoch({"epoch": 0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))
    try:
        log.add_epoch({"epoch": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(read_rows(tmp_path / "log.jsonl")) == 1
    assert len(warnings) == 1
    log.close()
    assert [row["epoch"] for row in read_rows(tmp_path / "log.jsonl")] == [0, 1]


def test_writing_aside_keeps_the_old_file_on_failure(tmp_path):
    write_atomically(tmp_path / "x", "old")
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "x", 3)
    assert (tmp_path / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


PROGRESS = SimpleNamespace(step=7, epoch=2)


def status(folder):
    return json.loads((folder / "status.json").read_text())


@pytest.mark.parametrize(
    ("error", "word"),
    [(Stopped("SIGTERM"), "interrupted"), (RunError("no disk"), "failed"), (ValueError("x"), "failed")],
)
def test_how_a_run_ends_is_in_its_folder_and_nothing_while_it_runs(tmp_path, error, word):
    with pytest.raises(type(error)), recorded(tmp_path, PROGRESS, rank=0):
        raise error
    found = status(tmp_path)
    assert (found["status"], found["reason"], found["step"], found["epoch"]) == (word, str(error), 7, 2)
    with recorded(tmp_path, PROGRESS, rank=0):
        assert not (tmp_path / "status.json").exists()
    assert status(tmp_path)["status"] == "finished"


def test_the_rank_that_knows_why_says_so_and_the_others_leave_it(tmp_path):
    with pytest.raises(LostContact), recorded(tmp_path, PROGRESS, rank=0):  # noqa: PT012
        with pytest.raises(RunError), recorded(tmp_path, PROGRESS, rank=1):
            raise RunError("a corrupt image")
        raise LostContact("rank 1 is gone")
    assert status(tmp_path)["reason"] == "a corrupt image"
    with pytest.raises(LostContact), recorded(tmp_path, PROGRESS, rank=0):
        raise LostContact("rank 1 is gone")
    assert status(tmp_path)["reason"] == "rank 1 is gone"


def test_a_run_that_has_no_folder_leaves_none(tmp_path):
    with pytest.raises(RunError), recorded(tmp_path / "none", PROGRESS, rank=0):
        raise RunError("no data")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [None, b"", b'{"status": "fini', b"\xff\xfe"])
def test_json_that_cannot_be_read_is_as_none(tmp_path, content):
    path = tmp_path / "status.json"
    if content is not None:
        path.write_bytes(content)
    assert read_json(path, default={}) == {}
    path.write_text('{"status": "finished"}')
    assert read_json(path, default={}) == {"status": "finished"}
