"""pyproject.toml, requirements.lock and environment.yml say the same, and the shell scripts keep their promises."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from rn50 import errors, recipe
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIME = [Requirement(line) for line in PROJECT["dependencies"]]
TEST = [Requirement(line) for line in PROJECT["optional-dependencies"]["test"]]
SETUP_INPUTS = ("pyproject.toml", "requirements.lock", "setup.py", "rn50/data/csrc/decode.c", "rn50/data/csrc/decode.h")
CONDA_NAMES = {"torch": "pytorch", "opencv-python": "opencv"}


def lock():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"==[^*,]+", str(pin.specifier)) for pin in pins)
    names = [canonicalize_name(pin.name) for pin in pins]
    assert len(set(names)) == len(names)
    return {name: str(pin.specifier)[2:] for name, pin in zip(names, pins, strict=True)}


def conda():
    """({conda package: specifier}, [pip lines])"""
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(item["pip"] for item in listed if isinstance(item, dict))
    specs = [re.match(r"([\w.-]+)(.*)", item).groups() for item in listed if isinstance(item, str)]
    return dict(specs), pip


@pytest.mark.parametrize("requirement", RUNTIME + TEST, ids=lambda requirement: requirement.name)
def test_the_lock_pins_what_pyproject_asks_for(requirement):
    assert requirement.specifier.contains(lock()[canonicalize_name(requirement.name)])


def test_the_lock_pins_what_the_dependencies_ask_for():
    """Everything that pip would add on Python 3.11 or 3.12, except the CUDA libraries that torch pins itself."""
    pins, todo, seen = lock(), [requirement.name for requirement in RUNTIME + TEST], set()
    while todo:
        name = canonicalize_name(todo.pop())
        if name in seen or re.match(r"cuda-|nvidia-|triton$", name):
            continue
        seen.add(name)
        assert name in pins
        for line in metadata.requires(name) or []:
            requirement = Requirement(line)
            for version in ("3.11", "3.12"):
                environment = {"python_version": version, "python_full_version": f"{version}.1", "extra": ""}
                if requirement.marker is None or requirement.marker.evaluate(environment):
                    assert name == "torch" or requirement.specifier.contains(
                        pins.get(canonicalize_name(requirement.name), ""), prereleases=True
                    ), f"{name} needs {line}"
                    todo.append(requirement.name)
    assert set(pins) - seen <= {"setuptools"}, "pinned but needed by nothing"


@pytest.mark.parametrize("requirement", RUNTIME, ids=lambda requirement: requirement.name)
def test_environment_yml_has_every_runtime_dependency(requirement):
    packages, pip = conda()
    from_pip = {Requirement(line).name: Requirement(line).specifier for line in pip if not line.startswith("-e")}
    conda_name = CONDA_NAMES.get(requirement.name, requirement.name)
    assert (conda_name in packages) != (requirement.name in from_pip)
    found = from_pip[requirement.name] if requirement.name in from_pip else SpecifierSet(packages[conda_name])
    assert found == requirement.specifier


def test_environment_yml_has_what_compiles_ffcv_and_an_allowed_python():
    packages, pip = conda()
    assert {"pip", "setuptools", "compilers", "pkg-config", "libjpeg-turbo", "opencv"} <= set(packages)
    assert any(line.startswith("-e .") for line in pip)
    assert SpecifierSet(PROJECT["requires-python"]).contains(packages["python"].lstrip("="))


@pytest.mark.parametrize(
    ("version", "allowed"),
    [("3.10.14", False), ("3.11.0rc1", False), ("3.11.0", True), ("3.12.9", True), ("3.13.0", False)],
)
def test_set_up_takes_the_pythons_that_pyproject_allows(tmp_path, version, allowed):
    number, _, prerelease = version.partition("rc")
    assert SpecifierSet(PROJECT["requires-python"]).contains(version) == allowed
    fake = tmp_path / "python"
    numbers = (*(int(part) for part in number.split(".")), "candidate" if prerelease else "final", 0)
    fake.write_text(
        f"#!{sys.executable}\nimport sys\nsys.version_info = {numbers}\nsys.argv = sys.argv[2:]\n"
        "exec(compile(sys.argv[0], 'command', 'exec'))\n"
    )
    fake.chmod(0o755)
    copy = copy_of_tree(tmp_path / "tree", finished_for=version)
    done = run_script(copy / "tools/setup.sh", PYTHON=fake, PATH=os.environ["PATH"])
    if allowed:
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    else:
        assert done.returncode == 1
        assert done.stderr == f"error: PYTHON={fake} is not a working Python 3.11 or 3.12\n"


def test_set_up_installs_once_and_again_when_its_inputs_change(tmp_path):
    copy = copy_of_tree(tmp_path / "tree")
    fake = fake_machine(tmp_path)

    done = run_script(copy / "tools/setup.sh", **fake)
    assert done.returncode == 0, done.stderr
    first = installs(tmp_path)
    assert any("ffcv" in line and "--no-build-isolation" in line for line in first)
    assert all("-c requirements.lock" in line for line in first)

    done = run_script(copy / "tools/setup.sh", **fake)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert installs(tmp_path) == first

    (copy / ".venv" / "kept").touch()
    for name in SETUP_INPUTS:
        before = len(installs(tmp_path))
        with open(copy / name, "a") as file:
            file.write("# changed\n")
        run_script(copy / "tools/setup.sh", **fake)
        assert len(installs(tmp_path)) == before + len(first)
    before = len(installs(tmp_path))
    (copy / "rn50" / "data" / "_decode.built.so").unlink()
    run_script(copy / "tools/setup.sh", **fake)
    assert len(installs(tmp_path)) == before + len(first)
    assert (copy / ".venv" / "kept").exists()


def test_an_interrupted_set_up_is_not_taken_for_done_and_starts_over(tmp_path):
    copy = copy_of_tree(tmp_path / "tree")
    fake = fake_machine(tmp_path)
    assert run_script(copy / "tools/setup.sh", **fake, FAIL_PIP="ffcv").returncode != 0
    assert not (copy / ".venv" / "rn50-setup-done").exists()
    (copy / ".venv" / "half a package").touch()
    done = run_script(copy / "tools/setup.sh", **fake)
    assert done.returncode == 0, done.stderr
    assert (copy / ".venv" / "rn50-setup-done").exists()
    assert not (copy / ".venv" / "half a package").exists()


def test_a_moved_tree_gets_a_new_venv(tmp_path):
    copy = copy_of_tree(tmp_path / "tree")
    fake = fake_machine(tmp_path)
    run_script(copy / "tools/setup.sh", **fake)
    (copy / ".venv" / "old").touch()
    moved = copy.rename(tmp_path / "moved")
    assert run_script(moved / "tools/setup.sh", **fake).returncode == 0
    assert not (moved / ".venv" / "old").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_set_up_without_root_prints_the_command_to_run():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        copy = copy_of_tree(folder / "tree")
        tools = folder / "bin"
        tools.mkdir()
        for tool in ("bash", "cat", "cut", "dirname", "sha256sum"):
            (tools / tool).symlink_to(shutil.which(tool))
        (tools / "apt-get").symlink_to(shutil.which("false"))
        folder.chmod(0o755)
        done = run_script(copy / "tools/setup.sh", PATH=tools, user=65534)
    assert done.returncode == 1
    assert done.stderr == (
        "error: system packages are missing; run: sudo apt-get update && sudo apt-get install -y "
        "--no-install-recommends build-essential pkg-config libopencv-dev libturbojpeg-dev "
        "python3 python3-dev python3-venv\n"
    )


@pytest.mark.parametrize(
    ("system", "installs"),
    [
        ({"python3-venv": "3.11.2-1+b1", "python3.11": "3.11.2-6+deb12u6"}, "python3.11"),  # Debian 12
        ({"python3-venv": "3.12.3-0ubuntu2.1", "python3.12": "3.12.3-1ubuntu0.13"}, "python3.12"),  # Ubuntu 24.04
        ({"python3-venv": "3.10.6-1~22.04.1", "python3.11": "3.11.0~rc1-1~22.04"}, None),  # Ubuntu 22.04
        ({"python3-venv": "3.13.5-1", "python3.13": "3.13.5-2"}, None),  # Debian 13
    ],
)
def test_set_up_takes_pythons_from_apt_that_it_can_use_and_else_installs_nothing(tmp_path, system, installs):
    """Told to install what does not help, a user without passwordless sudo would be told so for ever."""
    copy = copy_of_tree(tmp_path / "tree")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "cat", "cut", "dirname", "env", "sha256sum"):
        (tools / tool).symlink_to(shutil.which(tool))
    (tools / "apt-get").write_text(f'#!/bin/bash\necho "$*" >>"{tmp_path}/apt.log"\n[[ $1 == update ]]\n')
    known = "".join(f"{name}) echo 'Version: {version}' ;;\n" for name, version in system.items())
    (tools / "apt-cache").write_text(f'#!/bin/bash\ncase "${{@: -1}}" in\n{known}*) exit 100 ;;\nesac\n')
    for tool in ("apt-get", "apt-cache"):
        (tools / tool).chmod(0o755)
    done = run_script(copy / "tools/setup.sh", PATH=tools)
    assert done.returncode == 1
    if installs:
        assert f" {installs} {installs}-dev {installs}-venv\n" in done.stderr
    else:
        assert done.stderr == (
            "error: no Python 3.11 or 3.12 here, and none by apt; get one with uv (https://docs.astral.sh/uv), then "
            "repeat this: uv python install 3.12 && PYTHON=$(uv python find --system 3.12) bash tools/setup.sh\n"
        )
        assert not (tmp_path / "apt.log").exists()


def test_set_up_locks_a_file_that_is_open_for_writing(tmp_path):
    """On NFS flock becomes a POSIX lock, which as an exclusive one needs that; here the tool takes such a lock."""
    copy = copy_of_tree(tmp_path / "tree")
    fake = fake_machine(tmp_path)
    lock = tmp_path / "bin" / "flock"
    lock.write_text(f"#!{sys.executable}\nimport fcntl, sys\nfcntl.lockf(int(sys.argv[1]), fcntl.LOCK_EX)\n")
    lock.chmod(0o755)
    before = (copy / "pyproject.toml").read_bytes()
    done = run_script(copy / "tools/setup.sh", **fake)
    assert done.returncode == 0, done.stderr
    assert (copy / "pyproject.toml").read_bytes() == before


def test_set_up_leaves_a_foreign_venv_alone(tmp_path):
    copy = copy_of_tree(tmp_path / "tree")
    (copy / ".venv").mkdir()
    (copy / ".venv" / "mine").touch()
    done = run_script(copy / "tools/setup.sh", PATH=os.environ["PATH"], PYTHON=sys.executable)
    assert done.returncode == 1
    assert done.stderr.startswith("error: .venv exists and was not made by tools/setup.sh")
    assert os.listdir(copy / ".venv") == ["mine"]


def test_the_demo_refuses_an_unknown_data_set_before_it_installs_anything(tmp_path):
    copy = copy_of_tree(tmp_path / "tree")
    done = run_script(copy / "tools/demo.sh", DATA="cifar", PATH=os.environ["PATH"])
    assert (done.returncode, done.stderr) == (2, "error: DATA=cifar is neither textures nor imagenette\n")
    assert not (copy / ".venv").exists()


def test_scripts_are_executable_and_stop_at_the_first_failure():
    for script in [*ROOT.glob("tools/*.sh"), ROOT / ".ci/run"]:
        assert os.access(script, os.X_OK), script
        assert "\nset -euo pipefail\n" in script.read_text(), script


def copy_of_tree(folder, finished_for=None):
    """What set-up reads, in a new folder; with `finished_for`, a .venv as if set-up had ended for that version."""
    (folder / "tools").mkdir(parents=True)
    (folder / "rn50" / "data" / "csrc").mkdir(parents=True)
    for name in (*SETUP_INPUTS, "tools/setup.sh", "tools/demo.sh"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "rn50" / "data" / "_decode.built.so").touch()
    if finished_for:
        (folder / ".venv" / "bin").mkdir(parents=True)
        (folder / ".venv" / "bin" / "python").symlink_to(sys.executable)
        inputs = "".join((folder / name).read_text() for name in SETUP_INPUTS)
        digest = subprocess.run(["sha256sum"], input=inputs, capture_output=True, text=True, check=True).stdout[:64]
        (folder / ".venv" / "rn50-setup-done").write_text(f"{folder} {finished_for} {digest}\n")
    return folder


def fake_machine(folder):
    """Environment with a Python, pip and compiler that only note in `folder/pip.log` what they were asked for."""
    tools = folder / "bin"
    tools.mkdir()
    (tools / "pkg-config").symlink_to(shutil.which("true"))
    compiler = tools / "g++"
    compiler.write_text("#!/bin/bash\ncat >/dev/null\n")  # one that does not read would break the script's pipe
    compiler.chmod(0o755)
    python = tools / "python-for-test"
    python.write_text(
        "#!/bin/bash\n"
        'case "$*" in\n'
        '"-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;\n'
        f'"-m pip "*) echo "$*" >>"{folder}/pip.log"; [[ -z ${{FAIL_PIP:-}} || "$*" != *"$FAIL_PIP"* ]] ;;\n'
        '*"import cv2"* | *"import ffcv"* | *"import torch"*) ;;\n'
        f'*) exec "{sys.executable}" -IS "$@" ;;\n'
        "esac\n"
    )
    python.chmod(0o755)
    return {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": python}


def installs(folder):
    return (folder / "pip.log").read_text().splitlines()


def run_script(script, user=None, **environment):
    environment = {name: str(value) for name, value in environment.items()}
    return subprocess.run(["bash", script], env=environment, capture_output=True, text=True, timeout=60, user=user)


def test_the_dockerfile_installs_what_setup_would_and_the_cuda_that_torch_has():
    text = (ROOT / "Dockerfile").read_text()
    base = re.search(r"^FROM nvidia/cuda:(\d+)\.[\d.]+-base-ubuntu24\.04$", text, re.M)
    needs = " ".join(metadata.requires("torch"))
    cuda = re.search(r"nvidia-\w+-cu(\d+)|cuda-toolkit\[[^]]*\]==(\d+)", needs)
    if cuda:  # a build for CPUs names none
        assert base[1] == (cuda[1] or cuda[2])[:2]
    installed = set(re.search(r"--no-install-recommends \\\n(.*?) \\\n", text, re.S)[1].split())
    version = re.search(r"PYTHON=python(\d\.\d+) bash tools/setup.sh", text)[1]
    assert SpecifierSet(PROJECT["requires-python"]).contains(version)
    setup = (ROOT / "tools" / "setup.sh").read_text()
    wanted = set(
        re.findall(r"echo ([a-z][\w-]+)$", setup.partition("missing_packages()")[2].partition("\n}\n")[0], re.M)
    )
    wanted = {name for name in wanted if not name.startswith("python")} - {"libturbojpeg-dev"}
    assert wanted <= installed
    assert {f"python{version}{part}" for part in ("", "-dev", "-venv")} <= installed
    assert "pip install" not in text  # versions come from requirements.lock by tools/setup.sh alone


def test_what_git_ignores_stays_out_of_the_image():
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    kept_out = {line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    assert {".git", *ignored} <= kept_out


def test_scripts_keep_their_line_ends_where_git_writes_crlf(tmp_path):
    """As Git for Windows does by default; bash in WSL or a container then fails at the first line."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "tools", tree / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".gitattributes", tree)
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.autocrlf=true")
    for command in (("init", "-q"), ("add", "."), ("commit", "-qm", "a"), ("clone", "-q", ".", "../clone")):
        subprocess.run([*git, *command], cwd=tree, check=True, capture_output=True)
    assert b"\r" not in (tmp_path / "clone" / "tools" / "setup.sh").read_bytes()


def test_sky_yaml_sets_up_with_the_python_that_uv_installed(tmp_path):
    setup = yaml.safe_load((ROOT / "tools" / "sky.yaml").read_text())["setup"]
    uv = tmp_path / ".local" / "bin" / "uv"
    (tmp_path / "tools").mkdir()
    uv.parent.mkdir(parents=True)
    uv.write_text('#!/bin/bash\ncase "$*" in\n*install*) ;;\n*find*) echo /found/python ;;\nesac\n')
    uv.chmod(0o755)
    (tmp_path / "tools" / "setup.sh").write_text("echo $PYTHON\n")
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["bash", "-c", setup], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "/found/python\n"


def test_skypilot_reads_sky_yaml():
    sky = pytest.importorskip("sky", reason="SkyPilot is not installed")
    task = yaml.safe_load((ROOT / "tools" / "sky.yaml").read_text())
    (resources,) = sky.Task.from_yaml_config(task, [("BUCKET", "bucket")]).resources
    assert (resources.use_spot, resources.accelerators, resources.disk_size) == (True, {"A10G": 1}, 200)


def test_sky_yaml_has_keys_that_there_are():
    task = yaml.safe_load((ROOT / "tools" / "sky.yaml").read_text())
    # those of SkyPilot 0.14.1, which read the file so
    assert set(task) == {"name", "workdir", "resources", "envs", "setup", "run"}
    assert set(task["resources"]) == {"infra", "accelerators", "cpus", "disk_size", "use_spot", "job_recovery"}
    assert set(task["resources"]["job_recovery"]) == {"recover_on_exit_codes"}
    done = subprocess.run(["bash", "-n"], input=task["setup"] + task["run"], text=True, capture_output=True)
    assert done.stderr == ""
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [errors.PLANNED["interrupted"]]
    given = re.findall(r"--(\w+)\.(\w+)=", task["run"])
    assert given
    assert set(given) <= set(recipe.SETTINGS.entries)
    assert (ROOT / task["envs"]["CONFIG"]).exists()
