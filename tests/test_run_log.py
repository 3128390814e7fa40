"""Logs survive interruptions without duplicate or torn rows."""

import json

import pytest
import yaml

from rn50.run_log import RunLog, read_rows, write_atomically


def open_log(folder, epochs_done=0):
    return RunLog(folder, config={"a": {"b": 1}}, environment={"commit": "x"}, epochs_done=epochs_done)


def test_rows_of_epochs_that_will_be_repeated_are_dropped(tmp_path):
    log = open_log(tmp_path)
    for epoch in range(3):
        log.add_epoch({"epoch": epoch, "top1": 10.0 * epoch})
    log.close()
    log = open_log(tmp_path, epochs_done=2)
    log.add_epoch({"epoch": 2, "top1": 99.0})
    log.close()
    assert [row["top1"] for row in read_rows(tmp_path / "log.jsonl")] == [0, 10, 99]


def test_a_torn_last_line_is_not_a_row(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"epoch": 0}\n{"epoch": 1, "to')
    assert read_rows(tmp_path / "log.jsonl") == [{"epoch": 0}]


def test_folder_holds_config_and_every_sessions_environment(tmp_path):
    open_log(tmp_path).close()
    open_log(tmp_path, epochs_done=4).close()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"a": {"b": 1}}
    sessions = json.loads((tmp_path / "environment.json").read_text())
    assert [session["from_epoch"] for session in sessions] == [0, 4]
    assert list((tmp_path / "tensorboard").iterdir())


def test_writing_aside_keeps_the_old_file_on_failure(tmp_path):
    write_atomically(tmp_path / "x", "old")
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "x", 3)
    assert (tmp_path / "x").read_text() == "old"
