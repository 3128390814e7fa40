"""Bad settings end with one clear line and status 2; good ones arrive with their type."""

import json
import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
import sys
from fastargs import Config, Param, Section
from rn50 import config
from rn50.command import run
from rn50.config import choice, either, number, numbers, switch, text, whole

SETTINGS = Config()
Section("a", "A", SETTINGS).params(
    count=Param(whole(1, 9), "a count", required=True),
    rate=Param(number(0), "a rate", default=0.5),
    flag=Param(switch(), "a switch", default=True),
    word=Param(choice("red", "blue"), "a word", default="red"),
    sizes=Param(numbers(whole(1)), "sizes", default=[1]),
    rung=Param(either("auto", whole(1)), "rung", default="auto"),
    name=Param(text(), "optional"),
)
run(lambda: print(config.to_dict(config.load("test", SETTINGS))))
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(PROGRAM))

    def run(*argv, yaml=None):
        if yaml is not None:
            (tmp_path / "c.yaml").write_text(yaml)
            argv = ("--config-file", str(tmp_path / "c.yaml"), *argv)
        return subprocess.run([sys.executable, str(path), *argv], capture_output=True, text=True, timeout=60)

    return run


def values(result):
    assert result.returncode == 0, result.stderr
    return eval(result.stdout)["a"]


def test_yaml_and_flags_give_typed_values_and_flags_win(program):
    got = values(program("--a.count=3", "--a.flag", "false", yaml="a: {count: 2, rate: 1e-1, sizes: [4, 5], rung: 7}"))
    assert got == {
        "count": 3, "rate": 0.1, "flag": False, "word": "red", "sizes": [4, 5], "rung": 7
    }  # fmt: skip


def test_switches_are_true_and_false_in_yaml_too(program):
    assert values(program(yaml="a: {count: 1, flag: false}"))["flag"] is False
    assert values(program(yaml="a: {count: 1, flag: true}"))["flag"] is True


def test_later_config_file_wins(program, tmp_path):
    (tmp_path / "more.yaml").write_text("a: {count: 8}")
    assert values(program("-C", str(tmp_path / "more.yaml"), yaml="a: {count: 1, word: blue}")) == {
        "count": 8, "rate": 0.5, "flag": True, "word": "blue", "sizes": [1], "rung": "auto"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "yaml", "words"),
    [
        ([], None, ["a.count", "required"]),
        (["--a.count=x"], None, ["a.count", "whole number", "'x'"]),
        (["--a.count=1.5"], None, ["a.count", "whole number"]),
        (["--a.count=10"], None, ["a.count", "from 1 to 9"]),
        (["--a.count=true"], None, ["a.count"]),
        (["--a.count=1", "--a.rate=nan"], None, ["a.rate", "a number"]),
        (["--a.count=1", "--a.rate=-1"], None, ["a.rate", "at least 0"]),
        (["--a.count=1", "--a.flag=maybe"], None, ["a.flag", "true or false"]),
        (["--a.count=1", "--a.word=green"], None, ["a.word", "red, blue"]),
        (["--a.count=1", "--a.sizes=1,x"], None, ["a.sizes", "comma-separated"]),
        (["--a.count=1", "--a.rung=big"], None, ["a.rung", "auto or a whole number"]),
        (["--a.coutn=1"], None, ["unknown key a.coutn", "a.count"]),
        (["--a.coun=1"], None, ["unknown key a.coun", "a.count"]),
        (["--a.count"], None, ["--a.count needs a value"]),
        (["--a.count="], None, ["a.count has no value"]),
        (["--a.count=1", "--a.count=2"], None, ["given twice"]),
        (["stray"], None, ["'stray'"]),
        ([], "a: {count: }", ["a.count has no value"]),
        ([], "a: {count: 1, count: 2}", ["count is given twice"]),
        ([], "a: {count: 1}\nb: {x: 1}", ["unknown key b.x"]),
        ([], "a: 3", ["a must be a section"]),
        ([], "a: [", ["not valid YAML"]),
        ([], "", ["sections of keys"]),
        (["--config-file=/nowhere.yaml"], None, ["/nowhere.yaml", "No such file"]),
    ],
)
def test_bad_settings_are_one_line_and_status_2(program, flags, yaml, words):
    result = program(*flags, yaml=yaml)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in result.stderr
    assert result.stdout == ""


def test_what_was_read_can_be_read_again(program, tmp_path):
    first = values(program("--a.count=3", "--a.sizes=4,5", "--a.flag=false"))
    assert values(program(yaml=f"a: {json.dumps(first)}")) == first


def test_environment_is_not_a_config(program, monkeypatch):
    monkeypatch.setenv("a.count", "5")
    assert program().returncode == 2


def test_help_lists_every_key(program):
    result = program("--help")
    assert result.returncode == 0
    for key in ("a.count", "a.rate", "a.flag", "a.word", "a.sizes", "a.rung", "a.name"):
        assert key in result.stdout
