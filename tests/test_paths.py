"""`~` and variables mean what they mean in a shell, in every path of every command and YAML."""

import argparse
import importlib
import pwd
import sys
from pathlib import Path

import pytest
from fastargs import Config, Param, Section

import write_dataset
from rn50 import config, recipe
from rn50.errors import UsageError
from rn50.files import RUN_FILES, expanded, expanded_path, file_of_run
from tests.conftest import ROOT

# What is text and no path. A new argument or key must be put here, or be one of the paths.
WORDS = {
    "compare_runs": [],
    "ec2": ["bucket", "region", "ami", "instance", "origin", "set", "commit", "notify", "run"]
    + ["config"],  # within the repository, as committed: the instance reads it
    "export_model": ["name", "dataset", "licence", "examples_licence"],
    "gpu_check": ["instance"],
    "plan_run": ["instance"],
    "predict": ["cam_class"],
    "preflight": ["instance"],
    "publish": ["hardware", "repo", "space", "static"],
    "verify_beton": [],
}
WORD_KEYS = {"source.splits", "budget.instance"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)
    return tmp_path / "home"


def test_a_path_is_what_a_shell_makes_of_it(home, monkeypatch):
    monkeypatch.setenv("QUOTED", "~/quoted")
    for text, meant in {
        "~": home, "~/x": f"{home}/x", "~root/x": f"{pwd.getpwnam('root').pw_dir}/x",
        "$DATA/x": "/data/x", "${DATA}bis": "/databis",
        "$DATA$DATA": "/data/data", "é$DATAé": "é/dataé", "$EMPTY/x": "/x", "$QUOTED/x": f"{home}/quoted/x",
        "x/~/y": "x/~/y", "a~": "a~", "~no such user/x": "~no such user/x", "a$": "a$", "$5 bill": "$5 bill",
        "s3://bucket/$UNSET/~": "s3://bucket/$UNSET/~", "https://host/~me": "https://host/~me", ".": ".",
    }.items():  # fmt: skip
        assert expanded(text) == str(meant)
        assert expanded_path(text) == Path(meant) or "://" in text


@pytest.mark.parametrize(
    ("text", "words"), [("$UNSET/x", "variable UNSET"), ("a/${UNSET}", "variable UNSET"), ("$EMPTY", "is empty")]
)
def test_what_is_not_set_is_an_error_that_names_it(home, text, words):
    with pytest.raises(UsageError, match=words) as refusal:
        expanded(text)
    assert text in str(refusal.value)


def test_a_file_that_a_shell_found_keeps_its_name(home):
    Path("$UNSET.jpg").touch()
    assert expanded("$UNSET.jpg") == "$UNSET.jpg"


def test_without_a_home_no_folder_of_that_name_is_made(home, monkeypatch):
    monkeypatch.setattr("os.path.expanduser", lambda text: text)  # as for a user who is in no list and has no HOME
    with pytest.raises(UsageError, match="no home folder"):
        expanded("~/x")


def test_a_run_is_its_folder_or_any_of_its_files(tmp_path):
    run = tmp_path / "runs" / "rn50_78"
    run.mkdir(parents=True)
    for given in (run, str(run), f"{run}/", *(run / name for name in RUN_FILES)):
        assert file_of_run(given, "last.pt") == run / "last.pt"
        assert file_of_run(given, "log.jsonl") == run / "log.jsonl"
    for other in (run / "previous.pt", run / "mine.yaml", tmp_path / "no folder"):
        assert file_of_run(other, "last.pt") == other
    assert file_of_run("log.jsonl", "last.pt") == Path("last.pt")


def test_flags_and_yaml_and_the_name_of_a_yaml_are_read_alike(home):
    declared = Config()
    Section("a", "", declared).params(
        dir=Param(config.path(), "", required=True),
        again=Param(config.path(), ""),
        other=Param(config.path(), "", default="runs"),
    )
    home.mkdir()
    (home / "c.yaml").write_text("a: {dir: ~/in, again: $DATA/b}")
    found = config.load("", declared, ["--config-file=~/c.yaml", "--a.dir=~/x"]).a
    assert (found.dir, found.again, found.other) == (f"{home}/x", "/data/b", "runs")
    assert config.load("", declared, ["-C", "$HOME/c.yaml"]).a.dir == f"{home}/in"
    assert config.load("", declared, ["--a.dir=x"]).a.again is None
    with pytest.raises(UsageError, match=r"^a.dir=\$UNSET/x: the variable UNSET is not set; "):
        config.load("", declared, ["--a.dir=$UNSET/x"])
    with pytest.raises(UsageError, match="variable UNSET"):
        config.load("", declared, ["--config-file=$UNSET.yaml"])


@pytest.mark.parametrize("declared", [recipe.SETTINGS, write_dataset.SETTINGS])
def test_every_key_that_is_a_path_is_declared_as_one(declared):
    texts = {".".join(key): param.checker for key, param in declared.entries.items()}
    texts = {key: checker for key, checker in texts.items() if isinstance(checker, config.text)}
    assert len(texts) > 2
    for key, checker in texts.items():
        assert isinstance(checker, config.path) == (key not in WORD_KEYS), key


class Made(Exception):
    """A parser."""


def arguments(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from arguments(sub)
        else:
            yield action


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "tools").glob("*.py")) + ["textures"])
def test_every_argument_that_is_a_path_is_read_as_one(name, monkeypatch):
    module = importlib.import_module("rn50.data.textures" if name == "textures" else f"tools.{name}")

    def stop(parser, *args, **kwargs):
        raise Made(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(Made) as made:
        module.main()
    texts = {
        action.dest: action.type
        for action in arguments(made.value.args[0])
        if action.nargs != 0 and action.choices is None and action.type in (None, str, Path, expanded, expanded_path)
    }
    words = {dest for dest, kind in texts.items() if kind not in (expanded, expanded_path)}
    assert words == set(WORDS.get(name, []))
