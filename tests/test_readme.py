"""README.md: its commands are understood by their own programs as they are written, and run by tests; its links, names
and map are true. A new command has to enter the table RUN_BY.
"""

import argparse
import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from torch.distributed.run import parse_args as torchrun_arguments

import write_dataset
from rn50 import config, recipe
from rn50.errors import UsageError
from tests import commands, tiny_model
from tests.conftest import ROOT
from tests.test_packaging import SETUP_INPUTS, lock
from tools import compare_runs

README = (ROOT / "README.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
MAP = re.search(r"\n## What is where\n\n```\n(.*?)```", README, re.S)[1]
HOUSE = re.search(r"\n## Every file\n\n```\n(.*?)```", (ROOT / "docs/architecture.md").read_text(), re.S)[1]
# What a shell would take for the beginning of a command.
PROGRAM = re.compile(
    r"(\w+=\S+ )*(bash|sh|python3?|\.venv/bin/\w+|torchrun|pip|hf|aws|docker|conda|git|curl|sudo) |\S+\.(py|sh)( |$)"
)
SCRIPTS = ("write_dataset.py", "train_imagenet.py")

TORCHRUN = ("nproc_per_node", "max-restarts")
ADDRESS = "https://github.com/OWNER/rn50"

# Test that runs them, on a miniature set and with what has to be small made small: commands, as README.md has them.
RUN_BY = {
    "test_readme.py::test_the_repository_has_one_address": ["git clone https://github.com/OWNER/rn50 && cd rn50"],
    "test_readme.py::test_the_demo_starts_what_it_should_and_checks_the_accuracy": ["bash tools/demo.sh"],
    "test_readme.py::test_the_demo_goes_from_photographs_to_an_exported_network": [
        "DATA=imagenette bash tools/demo.sh"
    ],
    "test_readme.py::test_linters_and_tests_are_run": ["bash tools/test.sh"],
    "test_readme.py::test_from_images_to_a_model": [
        ".venv/bin/python write_dataset.py --config-file rn50_configs/write_imagenet.yaml "
        "--source.dir=IMAGENET --out.dir=/data/betons",
        ".venv/bin/python tools/verify_beton.py /data/betons",
        ".venv/bin/python train_imagenet.py --config-file rn50_configs/rn50_78.yaml --data.dir=/data/betons "
        "--budget.max_dollars=25 --budget.dollars_per_hour=0.48",
        ".venv/bin/torchrun --nproc_per_node=8 train_imagenet.py --config-file rn50_configs/rn50_56_epochs.yaml "
        "--data.dir=/data/betons",
        ".venv/bin/python tools/compare_runs.py runs/rn50_mild_28 runs/rn50_78 --out curves.png",
        ".venv/bin/python train_imagenet.py --config-file runs/rn50_78/config.yaml --training.eval_only=true",
    ],
    "test_check_data.py::test_a_good_set_is_found_good": [
        ".venv/bin/python tools/check_data.py --data /data/betons",
    ],
    "training/test_sam.py::test_the_recipes_run_from_end_to_end": [
        ".venv/bin/python train_imagenet.py --config-file rn50_configs/rn50_mild_28.yaml --data.dir=/data/betons",
    ],
    "test_plan_run.py::test_the_first_line_is_a_recommendation_and_the_second_what_it_is_worth": [
        ".venv/bin/python tools/plan_run.py --budget 25 --target 78 --spot --plot plan.png",
        "tools/plan_run.py --spot --instance g5.2xlarge --budget 25 --target 78",
    ],
    "test_plan_run.py::test_preflight_measures_projects_and_feeds_the_plan": [
        ".venv/bin/python tools/preflight.py rn50_configs/rn50_78.yaml --data /data/betons "
        "--dollars-per-hour 0.48 --budget 25",
        "tools/preflight.py",
    ],
    "cloud/test_staging.py::test_every_command_of_the_page_runs": [
        ".venv/bin/python tools/ec2.py doctor --bucket BUCKET --instance g5.2xlarge --spot",
        ".venv/bin/python tools/ec2.py convert --bucket BUCKET --from hf",
        ".venv/bin/python tools/ec2.py launch --bucket BUCKET --config rn50_configs/rn50_mild_28.yaml "
        "--instance g5.2xlarge --spot --budget 6",
        ".venv/bin/python tools/ec2.py launch --bucket BUCKET --config rn50_configs/rn50_78.yaml "
        "--instance g5.2xlarge --spot --budget 19",
        ".venv/bin/python tools/ec2.py status --bucket BUCKET --run rn50_78 --watch",
        ".venv/bin/python tools/ec2.py clean --bucket BUCKET",
    ],
    "publishing/test_export.py::test_the_exported_network_is_the_checkpoints_ema_on_real_images": [
        ".venv/bin/python tools/export_model.py --checkpoint runs/rn50_78 --out model/",
    ],
    "test_readme.py::test_the_app_opens_an_exported_network": [
        "bash tools/app.sh demo/model-textures",
        "bash tools/app.sh model/",
    ],
    "test_publish.py::test_the_token_of_hf_auth_login_is_taken": [".venv/bin/hf auth login"],
    "test_publish.py::test_publishing_again_is_one_commit_each_and_the_space_runs_the_commit_it_names": [
        ".venv/bin/python tools/publish.py --model model/ --repo USER/NAME --static USER/PAGE",
    ],
}
COMMANDS = [command for listed in RUN_BY.values() for command in listed]


def test_every_command_has_a_test_that_runs_it():
    found = readme_commands()
    assert [command for command in found if command not in COMMANDS] == [], "no test runs these commands of README.md"
    assert [command for command in COMMANDS if command not in found] == [], "README.md has no such command any more"
    for place in RUN_BY:
        file, _, name = place.partition("::")
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.M), place


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood_by_its_program(command, monkeypatch):
    words = shlex.split(plain(command))
    # the config of a run, in place of one that is not there yet
    words = [word.replace("runs/rn50_78/", "studies/imagenette_cpu/") for word in words]
    understand(words, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        ".venv/bin/python tools/plan_run.py --budget 25 --goal 78",
        ".venv/bin/python train_imagenet.py --config-file rn50_configs/rn50_78.yaml --training.epoch=3",
        ".venv/bin/python train_imagenet.py --config-file rn50_configs/rn50_17_epochs.yaml",
        ".venv/bin/torchrun --nproc_per_node=3 train_imagenet.py --config-file rn50_configs/rn50_16_epochs.yaml",
        ".venv/bin/python tools/ec2.py launch --config rn50_configs/rn50_78.yaml --budget 25",
        "bash tools/train.sh",
    ],
)
def test_a_command_that_is_wrong_is_not_understood(command, monkeypatch):
    with pytest.raises((SystemExit, UsageError, AssertionError)):
        understand(command.split(), monkeypatch)


def test_the_commands_of_the_other_pages_are_understood_too(monkeypatch):
    """Not those of studies/, which say what was typed then; `…` stands for what was said before."""
    found = set()
    for page in PAGES:
        if "results" not in page.parts:
            text = page.read_text().replace("\\\n", " ")
            block = re.compile(r"^```\n(.*?)^```\n", re.M | re.S)
            code = [line for lines in block.findall(text) for line in lines.splitlines()]
            code += re.findall(r"`([^`]+)`", block.sub("", text))
            found |= {" ".join(re.sub(r"(^|\s)#.*", "", line).split()) for line in code}
    start = re.compile(r"(\.venv/bin/)?(python|torchrun|bash) (?!-c).*\.(py|sh)|tools/\w+\.py ")
    found = sorted(line for line in found - set(COMMANDS) if start.match(line) and "…" not in line)
    assert len(found) > 20
    for line in found:
        print(line)
        understand(shlex.split(plain(line)), monkeypatch)


def plain(command):
    """`IMAGE... [--json]` as one would type it."""
    return re.sub(r"[\[\]]|\.\.\.", "", command)


def readme_commands():
    """Every command in blocks, tables and text once, each in one line without its comment."""
    found = []

    def take(block):
        lines = block[1].replace("\\\n", " ").splitlines()
        written = [" ".join(re.sub(r"(^|\s)#.*", "", line).split()) for line in lines]
        assert [line for line in written if line and not PROGRAM.match(line)] == []
        found.extend(filter(None, written))
        return ""

    text = re.sub(r"^```\n(.*?)^```\n", take, README.replace(MAP, ""), flags=re.M | re.S)
    code = [" ".join(part.split()) for part in re.findall(r"`([^`]+)`", text)]
    return list(dict.fromkeys(found + [part for part in code if PROGRAM.match(part)]))


def understand(words, monkeypatch, ranks=1):
    """Let the program that `words` begin with read the rest, by its own parser; anything wrong raises."""
    words = list(words)
    while "=" in words[0]:
        assert words.pop(0) == "DATA=imagenette"
    program = words.pop(0)
    if program.startswith(".venv/bin/"):
        assert (Path(sys.prefix) / program.removeprefix(".venv/")).exists()
    if Path(program).name in ("hf", "git"):
        return
    if program == "bash":
        script = ROOT / words[0]
        assert os.access(script, os.X_OK)
        assert subprocess.run(["bash", "-n", script]).returncode == 0
        if script.name == "app.sh":
            assert len(words) == 2 or words[2:] == ["--browser"]
        else:
            assert script.name == "test.sh" or len(words) == 1
    elif Path(program).name == "torchrun":
        named = any(word.endswith(".py") for word in words)
        options = torchrun_arguments(words if named else [*words, "train_imagenet.py"])
        if named:
            arguments = [options.training_script, *options.training_script_args]
            understand(arguments, monkeypatch, ranks=int(options.nproc_per_node))
    elif Path(program).name == "python":
        understand(words, monkeypatch)
    elif program == "-m":
        parsed_by(importlib.import_module(words.pop(0)), words, monkeypatch)
    else:
        assert (ROOT / program).is_file(), program
        if words and program in SCRIPTS:
            settings(program, words, ranks)
        elif words:
            module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
            found, rest = parsed_by(module, words, monkeypatch)
            if program == "tools/preflight.py":  # which takes settings, too
                settings("train_imagenet.py", ["--config-file", found.config, "--data.dir=betons", *rest], 1)
            else:
                assert rest == []


def settings(script, words, ranks):
    """The script's settings from `words`, checked as it checks them."""
    if "tuned.yaml" in words:  # which tools/preflight.py has written by then
        at = words.index("tuned.yaml")
        words = words[: at - 1] + words[at + 1 :]
    if script == "train_imagenet.py":
        recipe.check_batch(recipe.load("", words), ranks)
    else:
        config.load("", write_dataset.SETTINGS, words)


class Parsed(Exception):
    """The command line was read."""


def parsed_by(module, words, monkeypatch):
    """(namespace, words left over) by the parser that the module's main() makes; nothing after that runs."""
    real, depth = argparse.ArgumentParser.parse_known_args, [0]

    def parse_and_stop(self, *args, **options):
        depth[0] += 1
        found = real(self, *args, **options)
        depth[0] -= 1
        if depth[0]:  # the parser of a command such as `ec2.py launch`, within its parent's
            return found
        raise Parsed(found)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
        patch.setattr(sys, "argv", [module.__file__, *words])
        with pytest.raises(Parsed) as parsed:
            module.main()
    return parsed.value.args[0]


# --- The commands, run -----------------------------------------------------------------------------------------------


def written(beginning):
    """The README's only command that begins so."""
    (command,) = [command for command in readme_commands() if command.startswith(beginning)]
    return command


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The committed files in a folder of their own, with .venv and .venv-app as the set-up leaves them."""
    folder = tmp_path_factory.mktemp("newcomer") / "clone"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    built = [path.relative_to(ROOT) for path in (ROOT / "rn50/data").glob("_decode*.so")]
    for name in [*filter(None, listed.split("\0")), *built]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    version = ".".join(map(str, sys.version_info[:3]))
    stamp = f"{folder} {version} {digest(*(folder / name for name in SETUP_INPUTS))}\n"
    link_venv(folder / ".venv", Path(sys.prefix), "rn50-setup-done", stamp)
    stamp = f"{folder} {digest(folder / 'app/requirements.txt')}\n"
    link_venv(folder / ".venv-app", tiny_model.APP_PYTHON.parents[1], "rn50-app-done", stamp)
    return folder


def digest(*files):
    done = subprocess.run(["sha256sum"], input=b"".join(f.read_bytes() for f in files), capture_output=True, check=True)
    return done.stdout[:64].decode()


def link_venv(folder, real, stamp, text):
    folder.mkdir()
    for part in ("bin", "lib", "pyvenv.cfg"):
        (folder / part).symlink_to(real / part)
    (folder / stamp).write_text(text)


def shell(command, folder, status=0, **environment):
    """stdout and stderr of a command that is typed in `folder`."""
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_demo_goes_from_photographs_to_an_exported_network(clone, textures, tmp_path):
    for path in textures.glob("*/*/000[0-3].jpg"):
        few = tmp_path / path.relative_to(textures)
        few.parent.mkdir(parents=True, exist_ok=True)
        few.symlink_to(path)
    said = shell(written("DATA=imagenette"), clone, IMAGENETTE_DIR=str(tmp_path))
    assert "making .venv" not in said
    assert re.search(r"top-1 \d+\.\d\d % on the validation images of imagenette, after 4 epochs", said)
    assert (clone / "demo/imagenette.png").stat().st_size > 10_000
    assert (clone / "demo/model-imagenette/model.onnx").exists()
    assert "bash tools/app.sh demo/model-imagenette" in said


@pytest.mark.parametrize(("top1", "status"), [(99.0, 0), (94.9, 1)])
def test_the_demo_starts_what_it_should_and_checks_the_accuracy(clone, tmp_path, monkeypatch, top1, status):
    """Its commands are noted instead of run, but for the textures; from a fresh clone it takes minutes."""
    left_out = {".venv", ".venv-app", "demo", "tests"}
    tree = shutil.copytree(clone, tmp_path / "clone", ignore=lambda folder, names: left_out)
    (tree / "tools/setup.sh").write_text("echo set-up\n")
    python = tree / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        "#!/bin/bash\n"
        f'if [[ $1 == - ]]; then exec "{sys.executable}" "$@"; fi\n'
        f'printf "%s\\n" "$(printf "%q " "$@")" >>"{tmp_path}/log"\n'
        f'if [[ $1 == -m ]]; then exec "{sys.executable}" -m "$2" "$3" --train-per-class 1 --val-per-class 1; fi\n'
        f"if [[ $1 == train_imagenet.py ]]; then mkdir -p demo/runs/textures; "
        f"""echo '{{"top1": {top1}, "epoch": 7}}' >demo/runs/textures/log.jsonl; fi\n"""
    )
    python.chmod(0o755)
    said = shell(written("bash tools/demo.sh"), tree, status)
    assert said.startswith("set-up\n")
    assert f"top-1 {top1:.2f} %" in said
    noted = [shlex.split(line) for line in (tmp_path / "log").read_text().splitlines()]
    names = [
        "rn50.data.textures",
        "write_dataset.py",
        "train_imagenet.py",
        "tools/compare_runs.py",
        "tools/export_model.py",
    ]
    for words, name in zip(noted, names, strict=False):
        assert name in words[:2]
        understand([".venv/bin/python", *words], monkeypatch)
    assert len(noted) == (5 if status == 0 else 4)
    assert ("error: top-1 is below 95 %" in said) == (status == 1)


def test_linters_and_tests_are_run(clone, tmp_path):
    if not shutil.which("chromedriver"):  # it would be installed
        (tmp_path / "chromedriver").touch(0o755)
    path = f"{os.environ['PATH']}:{tmp_path}"
    said = shell(written("bash tools/test.sh") + " tests/test_schedules.py", clone, PATH=path)
    assert "All checks passed!" in said
    assert re.search(r"^\d+ passed", said, re.M)
    with open(clone / "rn50/schedules.py", "a") as file:
        file.write("import os\n")
    try:
        said = shell(written("bash tools/test.sh") + " tests/test_schedules.py", clone, status=1, PATH=path)
    finally:
        shutil.copy(ROOT / "rn50/schedules.py", clone / "rn50/schedules.py")
    assert "passed" not in said


def test_from_images_to_a_model(clone, textures, tmp_path, monkeypatch, capsys):
    """Each step from what the one before it wrote; of the recipes, what takes hours is made small."""

    def here(command):
        command = command.replace("IMAGENET ", f"{textures} ").replace("/data/betons", str(clone / "data/betons"))
        return command.replace("runs/", f"{clone}/runs/")

    convert = here(written(".venv/bin/python write_dataset.py"))
    said = shell(f"{convert} --source.counts=any --out.workers=1", clone)
    made = sorted(path.name for path in (clone / "data/betons").glob("*.beton"))
    assert made == [f"{split}_{side}.beton" for split in ("train", "val") for side in (256, 400, 500)]
    assert "still to write" in said
    said = shell(here(written(".venv/bin/python tools/verify_beton.py")), clone)
    assert len(re.findall(r"^\S+: OK: ", said, re.M)) == 6, said

    free = {"data.dir", "data.rung", "logging.run_name"}
    small = [f"--{name}={value}" for name, value in commands.SMALL.items() if name not in free]
    # the network that takes resnet18's place there has no max-pool and no classifier to set up
    small += ["--model.blurpool=false", "--model.blur_maxpool=false", "--model.zero_init_last_bn=false"]
    small += ["--model.log_prior_bias=false", f"--logging.folder={clone}/runs"]
    said = train(
        here(written(".venv/bin/python train_imagenet.py --config-file rn50_configs/rn50_78")), small, tmp_path
    )
    assert "$" in said
    train(here(written(".venv/bin/torchrun")), small, tmp_path)
    shutil.copytree(
        clone / "runs/rn50_56_epochs", clone / "runs/rn50_mild_28"
    )  # which tests/training/test_sam.py trains
    monkeypatch.chdir(tmp_path)
    compare_runs.main(shlex.split(here(written(".venv/bin/python tools/compare_runs.py")))[2:])
    assert "settings that differ" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["curves.png"]
    said = train(here(written(".venv/bin/python train_imagenet.py --config-file runs/")), [], tmp_path)
    assert "<- headline" in said
    rows = [json.loads(line) for line in (clone / "runs/rn50_78/log.jsonl").read_text().splitlines()]
    assert f"{rows[-1]['top1']:.2f}" in said


def train(command, more, folder):
    """What train_imagenet.py says, forked, with the words that follow its name in `command`; under ROOT's configs."""
    words = shlex.split(command)
    output = folder / f"output-{time.monotonic_ns()}"
    environment = {"AWS_EC2_METADATA_DISABLED": "true", "OMP_NUM_THREADS": "1"}
    arguments = [*words[words.index("train_imagenet.py") + 1 :], *more]
    arguments = [str(ROOT / word) if word.startswith("rn50_configs/") else word for word in arguments]
    process = commands.context.Process(target=commands.enter, args=(arguments, environment, output))
    process.start()
    process.join(120)
    assert process.exitcode == 0, output.read_text()
    return output.read_text()


@pytest.mark.parametrize("command", RUN_BY["test_readme.py::test_the_app_opens_an_exported_network"])
def test_the_app_opens_an_exported_network(clone, exported, tmp_path, command):
    if not tiny_model.APP_PYTHON.exists():
        pytest.skip("the Space's packages are not installed; run: bash tools/app.sh --install")
    shutil.copytree(exported[0], clone / command.split()[-1], dirs_exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "TMPDIR": str(tmp_path)}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(shlex.split(command), cwd=clone, env=environment, stdout=log, stderr=log)
    try:
        deadline, page = time.monotonic() + 90, None
        while page is None:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            with contextlib.suppress(OSError):
                page = requests.get(f"http://127.0.0.1:{port}", timeout=10)
            time.sleep(0.2)
        assert page.status_code == 200
        assert '"title":"tiny"' in page.text
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


# --- Links, names, map -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_names_lead_somewhere(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
        target, _, anchor = "".join(link).partition("#")
        if re.match(r"https?:", target):
            continue
        file = page.parent / target if target else page
        assert file.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)", file.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings], link
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for code in re.findall(r"`([^`]+)`", prose):
        for name in re.findall(
            r"(?:^|\s)((?:app|docs|notebooks|rn50|rn50_configs|studies|tests|tools)/[\w./-]*\w/?)(?=$|[\s,;:])", code
        ):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_and_options_in_the_text_exist(page):
    keys = {".".join(path) for path in [*recipe.SETTINGS.entries, *write_dataset.SETTINGS.entries]}
    sections = {key.partition(".")[0] for key in keys}
    programs = [
        *ROOT.glob("tools/*.py"),
        *ROOT.glob("studies/*/*.py"),
        ROOT / "tests/chaos.py",
        ROOT / "rn50/recipe.py",
    ]
    sources = "".join(path.read_text() for path in programs)
    for code in re.findall(r"`([^`\n]+)`", page.read_text()):
        for word in code.split():
            dashes, name = re.fullmatch(r"(-{0,2})([^=]*).*", word).groups()
            section, dot, key = name.partition(".")
            if dot and section in sections and re.fullmatch(r"[a-z_]+", key) and key not in ("onnx", "safetensors"):
                assert name in keys, f"{page.name}: {word}"
            elif dashes == "--" and not dot and name and code.startswith("--"):
                known = f'"--{name}"' in sources or name == "help" or name in TORCHRUN
                assert known, f"{page.name}: {word}"


def expanded(text):
    """The words of the map, with `a_{b,c}.py` written out."""
    for stem, inner, rest in re.findall(r"([\w./]*)\{([^}]*)\}([\w./]*)", text):
        text += " " + " ".join(stem + part + rest for part in inner.split(","))
    return set(re.findall(r"[\w./-]*\w", re.sub(r"\S*\{[^}]*\}\S*|\(|\)", " ", text)))


def test_the_repository_has_one_address():
    """A placeholder as yet, which one replacement fills everywhere."""
    pages = [ROOT / "README.md", ROOT / "CITATION.cff", ROOT / "notebooks/01_pipeline_test.ipynb", *PAGES]
    named = {page.name: re.findall(r"github(?:\.com)?/(\w+/rn50)\b", page.read_text()) for page in pages}
    assert all(named[name] for name in ("README.md", "CITATION.cff", "01_pipeline_test.ipynb"))
    assert {name for found in named.values() for name in found} == {ADDRESS.removeprefix("https://github.com/")}


def test_the_maps_name_every_file_that_a_user_may_meet():
    """README's the folders and what lies beside them, docs/architecture.md what is in them."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    words, inner_words = expanded(MAP), expanded(HOUSE)
    for name in listed:
        folder, _, file = name.partition("/")
        assert folder in words or name == "README.md", f"{folder} is not in README's map"
        inner = Path(file)
        if folder in ("tools", "rn50", "rn50_configs", "app", "notebooks") and inner.name != "__init__.py":
            known = {inner.name, inner.stem, str(inner), str(inner.parent)} - {"."}
            assert known & inner_words, f"{name} is not in docs/architecture.md"


def test_the_maps_name_nothing_that_is_not_there():
    for name in expanded(MAP) | expanded(HOUSE):
        if re.search(r"\.(py|sh|yaml|yml|json|ipynb|css|js|md|txt|toml|lock|c)$", name):
            found = subprocess.run(["git", "ls-files", name, f"**/{name}"], cwd=ROOT, capture_output=True, text=True)
            assert found.stdout, f"there is no {name}"


def test_the_versions_that_were_tested_are_those_that_are_installed():
    page = (ROOT / "docs/setup.md").read_text()
    names = {"PyTorch": "torch", "torchvision": "torchvision", "FFCV": "ffcv", "NumPy": "numpy", "numba": "numba"}
    told = dict(re.findall(rf"({'|'.join(names)})\s+(\d+\.\d+\.\d+)", page))
    assert {names[name]: version for name, version in told.items()} == {name: lock()[name] for name in names.values()}
