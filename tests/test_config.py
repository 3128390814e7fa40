"""Bad settings end with one clear line and status 2; good ones arrive with their type."""

import ast
import json
import re
import subprocess
import sys
import textwrap

import pytest

import write_dataset
from rn50 import config, recipe
from rn50.errors import UsageError
from tests.conftest import ROOT

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
        (["--count=1"], None, ["unknown key count; did you mean --a.count?"]),
        (["--b.word=1"], None, ["unknown key b.word; did you mean --a.word?"]),
        (["--a=1"], None, ["unknown key a; did you mean --a.count or --a.rate or --a.flag?"]),
        (["--gpus"], None, ["unknown key gpus; --help lists all keys"]),
        (["--config=c.yaml"], None, ["unknown key config; did you mean --config-file FILE?"]),
        (["--out.dir=x"], None, ["unknown key out.dir: write_dataset.py has it"]),
        (["a.count=1"], None, ["'a.count=1'; did you mean --a.count=1?"]),
        (["c.yaml"], None, ["'c.yaml'; did you mean --config-file c.yaml?"]),
        (["\N{EN DASH}a.count=1"], None, ["printed dash: write --a.count=1"]),
        (["--a.name=\N{LEFT DOUBLE QUOTATION MARK}x"], None, ["printed quotes"]),
        (["--a.sizes", "1", "2"], None, ["cannot read '2'", "a list as 1,2"]),
        (["--a.count"], None, ["--a.count needs a value"]),
        (["--a.count="], None, ["a.count has no value"]),
        (["--a.count=1", "--a.count=2"], None, ["given twice"]),
        (["stray"], None, ["'stray'"]),
        ([], "a: {count: }", ["a.count has no value"]),
        ([], "a: {count: 1, count: 2}", ["count is given twice"]),
        ([], "a: {count: 1}\nb: {x: 1}", ["unknown key b.x"]),
        ([], "a: 3", ["a must be a section"]),
        ([], "a: [", ["not valid YAML"]),
        ([], "", ["sections of keys, and is empty"]),
        ([], "- a", ["sections of keys, and has none"]),
        ([], "a:\ncount: 1", ["c.yaml: a has no keys; they stand below it, indented"]),
        ([], "a:\n\tcount: 1", ["not valid YAML", "line 2", "indent with spaces, not tabs"]),
        ([], "a: {coutn: 1}", ["unknown key a.coutn in ", "c.yaml; did you mean a.count?"]),
        ([], "training: {epochs: 1}", ["c.yaml is for train_imagenet.py"]),
        (["--config-file=/bin/true"], None, ["/bin/true: it is no text"]),
        (["--config-file", "rn50_78"], None, ["No such file", f"did you mean {config.shown('rn50_78')}?"]),
        (["--config-file", f"{ROOT}/tests"], None, [f"{ROOT}/tests/config.yaml: No such file"]),
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


@pytest.mark.parametrize("columns", [None, "60"])
def test_help_is_plain_text_that_fits_the_terminal(program, monkeypatch, columns):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    result = program("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(r"[ -~\n]+", result.stdout)
    lines = result.stdout.splitlines()
    assert 50 < max(map(len, lines)) <= int(columns or 80)
    # what a line's end has broken
    words = " ".join(result.stdout.split())
    for text in (
        "--config-file FILE YAML with the keys below",
        "--a.count a count (a whole number from 1 to 9; required)",
        "--a.rate a rate (a number of at least 0; default 0.5)",
        "--a.flag a switch (true or false; default true)",
        "--a.word a word (one of red, blue; default red)",
        "--a.sizes sizes (a comma-separated list, each a whole number of at least 1; default 1)",
        "--a.name optional (text; not set by default)",
    ):
        assert text in words, text
    assert lines.index("Options") < lines.index("a: A")


def test_a_recipe_is_asked_for_by_name(monkeypatch):
    for argv in ([], ["--data.dir=x"], ["--quick"]):
        with pytest.raises(UsageError, match="^give a recipe: --config-file .*rn50_configs/NAME.yaml, .* of rn50_78, "):
            recipe.load("", argv)
    with pytest.raises(UsageError, match="write_imagenet.yaml is for write_dataset.py; give a recipe: .* rn50_78, "):
        recipe.load("", [f"--config-file={ROOT}/rn50_configs/write_imagenet.yaml"])
    with pytest.raises(UsageError, match="^give the images .* --source.dir=IMAGES .*rn50_configs/write_imagenet.yaml$"):
        config.load("", write_dataset.SETTINGS, [], advice=write_dataset.ADVICE)
    monkeypatch.setattr(config, "FOLDER", ROOT / "nowhere")
    with pytest.raises(UsageError, match=r"^give a recipe: --config-file \S*NAME.yaml$"):
        recipe.load("", [])


def test_the_keys_of_a_training_that_are_mistaken_most():
    for typed, meant in {
        "epochs=2": "--training.epochs", "lr=0.1": "--lr.lr_per_256", "training.lr=1": "--lr.lr_per_256",
        "data-dir=x": "--data.dir", "seed=1": "--training.seed", "micro-batch=8": "--training.micro_batch",
        "batch-size=8": "--training.batch_size or --validation.batch_size", "mixup_alpha=1": "--training.mixup",
        "validation.batch=1": "--validation.batch_size", "run-name=x": "--logging.run_name",
    }.items():  # fmt: skip
        with pytest.raises(UsageError) as refusal:
            recipe.load("", [f"--config-file={ROOT}/rn50_configs/demo.yaml", f"--{typed}"])
        assert str(refusal.value).endswith(f"; did you mean {meant}?"), refusal.value


TOOLS = [
    *ROOT.glob("tools/*.py"),
    *ROOT.glob("studies/*/*.py"),
    ROOT / "rn50/data/textures.py",
    ROOT / "tests/chaos.py",
]


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_every_option_of_every_command_has_a_phrase_and_no_sentence_is_cut(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    for call in calls:
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if call.func.attr == "add_argument" and len(call.args) + len(given) > 1:
            assert "help" in given, ast.unparse(call)
        if call.func.attr == "ArgumentParser":
            first = ast.unparse(given["description"])
            lines = ast.get_docstring(tree).partition("\n\n")[0].splitlines()
            assert len(lines) == 1 or "splitlines" not in first, lines
