"""tools/publish.py against a Hub on this machine: what it uploads, in how many commits, and what it never does."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import tiny_model
from tests.conftest import ROOT
from tests.fake_hub import TOKEN, UNPAID, Hub
from tests.services import Proxy

MODEL_FILES = {"README.md", "config.json", "model.onnx", "model.safetensors"}
SPACE_FILES = {
    "README.md",
    "about.py",
    "app.py",
    "inference.py",
    "page.css",
    "page.js",
    "pictures.py",
    "requirements.txt",
    "uploads.py",
}
SPACE_FILES |= {"model.json"}


@pytest.fixture
def model(exported, tmp_path):
    """An exported model to change files of; weights can be removed, but not changed: they are the fixture's own."""

    def copy(source, target):
        (os.link if source.endswith((".onnx", ".safetensors")) else shutil.copy2)(source, target)

    return shutil.copytree(exported[0], tmp_path / "model", copy_function=copy)


def run(tmp_path, *arguments, hub="http://127.0.0.1:9", token=TOKEN):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, str(ROOT / "tools/publish.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def assert_refused(done, *words, status=1):
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_publishing_again_is_one_commit_each_and_the_space_runs_the_commit_it_names(model, tmp_path):
    with Hub() as hub:
        done = run(tmp_path, "--model", model, "--repo", "me/net", "--space", "me/demo", hub=hub.url)
        assert done.returncode == 0, done.stderr
        revision = hub.oid(1, ("model", "me/net"))
        assert done.stdout.splitlines() == [f"{hub.url}/me/net/tree/{revision}", f"{hub.url}/spaces/me/demo"]
        assert hub.settings["space", "me/demo"]["sdk"] == "gradio"
        assert [len(hub.repos[key]) for key in (("model", "me/net"), ("space", "me/demo"))] == [2, 2]
        uploaded, space = hub.repos["model", "me/net"][1], hub.repos["space", "me/demo"][1]
        ours = {path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()}
        assert uploaded == ours
        assert set(space) == SPACE_FILES
        for name in SPACE_FILES - {"README.md", "model.json"}:
            assert space[name] == (ROOT / "app" / name).read_bytes()
        pointer = json.loads(space["model.json"])
        assert (pointer["repo"], pointer["revision"]) == ("me/net", revision)
        front = yaml.safe_load(space["README.md"].decode().split("---\n")[1])
        assert front["models"] == ["me/net"]
        assert front["preload_from_hub"] == [f"me/net {','.join(pointer['files'])} {revision}"]
        assert front["sdk"] == "gradio"
        # what the Hub's validation asks for beside
        assert len(front["short_description"]) <= 60
        colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
        assert {front["colorFrom"], front["colorTo"]} <= colours

        # another export: what is gone there goes here too, what is not ours stays
        removed = sorted(model.glob("examples/*.jpg"))[0]
        removed.unlink()
        hub.repos["model", "me/net"][1]["NOTES.md"] = b"by hand"
        done = run(tmp_path, "--model", model, "--repo", "me/net", hub=hub.url)
        assert done.returncode == 0, done.stderr
        assert len(hub.repos["model", "me/net"]) == 3
        assert set(uploaded) - set(hub.repos["model", "me/net"][2]) == {f"examples/{removed.name}"}
        assert hub.repos["model", "me/net"][2]["NOTES.md"] == b"by hand"

        if not tiny_model.APP_PYTHON.exists():
            pytest.skip("the Space's packages are not installed; run: bash tools/app.sh --install")
        # the Space as it was uploaded, in a folder of its own, takes the model from the Hub at that commit
        folder = tmp_path / "space"
        folder.mkdir()
        for name, content in space.items():
            (folder / name).write_bytes(content)
        cache = {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": "http://hub.invalid", "HF_HUB_DISABLE_XET": "1"}
        code = "import app; print(app.MODEL.config['name'], app.MODEL.folder)"
        command = [tiny_model.APP_PYTHON, "-c", code]
        environment = {"PATH": os.environ["PATH"], **cache}
        # and there is no way to the Hub but a proxy
        with Proxy(hub.url) as proxy:
            proxied = {**environment, "HTTP_PROXY": proxy.url, "NO_PROXY": "localhost"}
            started = subprocess.run(command, cwd=folder, env=proxied, capture_output=True, text=True, timeout=90)
        assert started.stdout.startswith("tiny "), started.stderr
        assert any(revision in asked for asked in proxy.requests)
        assert revision in started.stdout
    # and once that is in the cache it needs no Hub
    again = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=90)
    assert again.stdout == started.stdout, again.stderr


def test_dry_run_lists_all_with_sizes_and_needs_neither_network_nor_token(model, tmp_path):
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))  # never listens
        hub = f"http://127.0.0.1:{dead.getsockname()[1]}"
        done = run(
            tmp_path, "--model", model, "--repo", "me/net", "--space", "me/demo", "--dry-run", hub=hub, token=None
        )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split("space me/demo\n")
    listed = [dict(re.findall(r" ([\d,]+) bytes  (\S+)", part)) for part in (first, second)]
    sizes = {name: int(size.replace(",", "")) for size, name in re.findall(r" ([\d,]+) bytes  (\S+)", first)}
    assert set(sizes) >= MODEL_FILES
    assert sizes == {p.relative_to(model).as_posix(): p.stat().st_size for p in model.rglob("*") if p.is_file()}
    assert set(listed[1].values()) == SPACE_FILES
    assert second.endswith("nothing was uploaded (--dry-run)\n")


def test_files_that_are_not_on_the_list_are_refused(model, tmp_path):
    import tools.publish as tool

    def refusal():
        with pytest.raises(tool.RunError) as refused:
            tool.listed(model, tool.MODEL_FILES, tool.EXAMPLE, tool.NEEDED)
        return str(refused.value)

    for name in ("last.pt", "examples/notes.txt"):
        (model / name).write_text("x")
        assert f"files that are not published: {name}" in refusal()
        (model / name).unlink()
    (model / "examples/link.jpg").symlink_to("/etc/passwd")
    assert "link.jpg" in refusal()
    (model / "examples/link.jpg").unlink()
    (model / ".env").write_text("x")
    assert_refused(run(tmp_path, "--model", model, "--repo", "me/net", "--dry-run"), "not published: .env")


@pytest.mark.parametrize(
    ("secret", "what"),
    [
        (TOKEN, "a Hugging Face token"),
        ("AKIA" + "ABCDEFGHIJKLMNOP", "an AWS access key"),
        ("-----BEGIN RSA " + "PRIVATE KEY-----", "a private key"),
    ],
    ids=["hf", "aws", "key"],
)
def test_what_looks_like_a_credential_is_refused(model, tmp_path, secret, what):
    import tools.publish as tool

    card = model / "README.md"
    card.write_text(card.read_text() + f"\n{secret}\n")
    with pytest.raises(tool.RunError, match=what) as refusal:
        tool.refuse_secrets(card)
    assert secret not in str(refusal.value)


def test_no_secret_is_found_in_what_we_publish(model):
    import tools.publish as tool

    for folder, names in ((model, tool.MODEL_FILES), (ROOT / "app", tool.APP_FILES)):
        for name in names:
            if (folder / name).exists():
                tool.refuse_secrets(folder / name)


def test_refusals_of_the_hub_and_of_the_network_are_one_line(model, tmp_path):
    base = ["--model", model, "--repo", "me/net"]
    with Hub() as hub:
        assert_refused(run(tmp_path, *base, hub=hub.url, token="hf_" + "w" * 34), "the Hub refused")
        assert_refused(run(tmp_path, *base, hub=hub.url, token=None), "no token")
        hub.refuse = 403
        assert_refused(run(tmp_path, *base, hub=hub.url), "403")
        assert hub.repos["model", "me/net"] == [{}]  # nothing half-published
    assert_refused(run(tmp_path, *base), "could not be reached")


def test_the_model_is_published_where_the_space_is_refused(model, tmp_path):
    """As to accounts without a subscription; a Space that is there already is updated all the same."""
    command = ["--model", model, "--repo", "me/net", "--space", "me/demo"]
    with Hub() as hub:
        hub.unpaid = True
        done = run(tmp_path, *command, hub=hub.url)
        assert_refused(done, "me/net is published, me/demo is not", "(402)", UNPAID, "tools/app.sh")
        assert done.stdout == f"{hub.url}/me/net/tree/{hub.oid(1, ('model', 'me/net'))}\n"
        hub.repos["space", "me/demo"], hub.settings["space", "me/demo"] = [{}], {}
        done = run(tmp_path, *command, hub=hub.url)
        assert done.returncode == 0, done.stderr
        assert set(hub.repos["space", "me/demo"][-1]) == SPACE_FILES
        assert len(hub.repos["model", "me/net"]) == 2  # nothing has changed there


def test_front_matter_that_the_hub_does_not_take_is_one_line(model, tmp_path):
    with Hub() as hub:
        hub.invalid = '"license" must be one of [apache-2.0,\nmit]'
        done = run(tmp_path, "--model", model, "--repo", "me/net", hub=hub.url)
        assert_refused(done, 'README.md. - "license" must be one of [apache-2.0, mit]')
        assert hub.repos["model", "me/net"] == [{}]


def test_the_space_of_a_private_model_is_built_without_it_and_says_what_it_needs(model, tmp_path):
    with Hub() as hub:
        done = run(tmp_path, "--model", model, "--repo", "me/net", "--space", "me/demo", "--private", hub=hub.url)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[2] == (
            f"me/net is not open to all: in {hub.url}/spaces/me/demo/settings add a secret HF_TOKEN that may read it"
        )
        space = hub.repos["space", "me/demo"][1]
        front = yaml.safe_load(space["README.md"].decode().split("---\n")[1])
        assert "preload_from_hub" not in front  # a build has no secrets
        if not tiny_model.APP_PYTHON.exists():
            pytest.skip("the Space's packages are not installed; run: bash tools/app.sh --install")
        for name, content in space.items():
            (tmp_path / name).write_bytes(content)
        environment = {"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": hub.url}

        def start(**secrets):
            command = [tiny_model.APP_PYTHON, "-c", "import app; print(app.MODEL.config['name'])"]
            settings = environment | {"HF_HUB_DISABLE_XET": "1"} | secrets
            return subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=90)

        assert_refused(start(), "me/net is gone or private", "HF_TOKEN")
        assert start(HF_TOKEN=TOKEN).stdout == "tiny\n"


def test_the_token_of_hf_auth_login_is_taken(model, tmp_path):
    with Hub() as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        environment = {name: value for name, value in environment.items() if name not in ("HF_TOKEN", "HF_TOKEN_PATH")}
        # with the token as an option in place of the question, which needs a terminal
        command = [sys.executable, Path(sys.prefix) / "bin" / "hf", "auth", "login", "--token", TOKEN]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        done = run(tmp_path, "--model", model, "--repo", "me/net", hub=hub.url, token=None)
        assert done.returncode == 0, done.stderr
        assert len(hub.repos["model", "me/net"]) == 2


def test_a_folder_that_is_no_model_is_refused(tmp_path, model):
    assert_refused(run(tmp_path, "--model", tmp_path, "--repo", "me/net"), "no config.json")
    assert_refused(run(tmp_path, "--model", model, "--repo", "net"), "not of the form USER/NAME", status=2)
    # names that the Hub does not take, before anything is sent
    for name in ("me/net--v2", "me/net.git", f"me/{'n' * 97}"):
        assert_refused(run(tmp_path, "--model", model, "--repo", name, "--dry-run"), name, status=2)
    (model / "model.safetensors").unlink()
    assert_refused(run(tmp_path, "--model", model, "--repo", "me/net", "--dry-run"), "lacks model.safetensors")
