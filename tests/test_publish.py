"""tools/publish.py against a Hub on this machine: what it uploads, in how many commits, and what it never does."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import HfApi

from tests import tiny_model
from tests.conftest import ROOT
from tests.fake_hub import DOWNGRADE, THIRD, TOKEN, UNPAID, YOUNG, Hub
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


def files_of(site):
    """{path: bytes} of what build.site() returns."""
    return {name: file if isinstance(file, bytes) else file.read_bytes() for name, file in site.items()}


def test_publishing_again_is_one_commit_each_and_the_space_runs_the_commit_it_names(model, tmp_path):
    import tools.publish as tool

    names = ["--repo", "me/net", "--static", "me/web"]
    with Hub() as hub:
        done = run(tmp_path, "--model", model, *names, "--space", "me/demo", hub=hub.url)
        assert done.returncode == 0, done.stderr
        revision = hub.oid(1, ("model", "me/net"))
        addresses = [f"{hub.url}/{path}" for path in (f"me/net/tree/{revision}", "spaces/me/web", "spaces/me/demo")]
        words = "me is a free account: me/demo will run on ZeroGPU (two such Spaces at most)"
        assert done.stdout.splitlines() == [words, *addresses]
        settings = {
            name: (hub.settings["space", name]["sdk"], hub.settings["space", name].get("hardware"))
            for name in ("me/web", "me/demo")
        }
        assert settings == {"me/web": ("static", None), "me/demo": ("gradio", "zero-a10g")}
        assert [len(commits) for commits in hub.repos.values()] == [2, 2, 2]
        uploaded, space = hub.repos["model", "me/net"][1], hub.repos["space", "me/demo"][1]
        static = files_of(tool.build.site(model, repo="me/net", space_url=addresses[2]))
        assert hub.repos["space", "me/web"][1] == static
        ours = {path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()}
        assert uploaded == ours
        assert set(space) == SPACE_FILES
        for name in SPACE_FILES - {"README.md", "model.json"}:
            assert space[name] == (ROOT / "app" / name).read_bytes()
        pointer = json.loads(space["model.json"])
        assert (pointer["repo"], pointer["revision"], pointer["browser"]) == ("me/net", revision, addresses[1])
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
        config = json.loads((model / "config.json").read_text())
        config["examples"] = [entry for entry in config["examples"] if not entry["file"].endswith(removed.name)]
        (model / "config.json").write_text(json.dumps(config))
        for key in (("model", "me/net"), ("space", "me/web")):
            hub.repos[key][1]["NOTES.md"] = b"by hand"
        done = run(tmp_path, "--model", model, *names, hub=hub.url)
        assert done.returncode == 0, done.stderr
        for key, before in ((("model", "me/net"), uploaded), (("space", "me/web"), static)):
            assert len(hub.repos[key]) == 3
            assert set(before) - set(hub.repos[key][2]) == {f"examples/{removed.name}"}
            assert hub.repos[key][2]["NOTES.md"] == b"by hand"
        # without --space there is no Gradio Space to link to
        assert addresses[2] in hub.repos["space", "me/web"][1]["index.html"].decode()
        assert addresses[2] not in hub.repos["space", "me/web"][2]["index.html"].decode()

        if not tiny_model.APP_PYTHON.exists():
            pytest.skip("the Space's packages are not installed; run: bash tools/app.sh --install")
        # the Space as it was uploaded, in a folder of its own, takes the model from the Hub at that commit
        folder = tmp_path / "space"
        folder.mkdir()
        for name, content in space.items():
            (folder / name).write_bytes(content)
        cache = {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": "http://hub.invalid", "HF_HUB_DISABLE_XET": "1"}
        # as a person may have written it
        (folder / "model.json").write_text(json.dumps(pointer | {"browser": 'https://hub/"<b>&'}))
        code = (
            "import app; print(app.MODEL.config['name'], app.MODEL.folder); parts = app.build('')[0].blocks.values()\n"
        )
        code += "print(next(part.value for part in parts if 'rn50-header' in str(getattr(part, 'value', ''))))"
        command = [tiny_model.APP_PYTHON, "-c", code]
        environment = {"PATH": os.environ["PATH"], **cache}
        # and there is no way to the Hub but a proxy
        with Proxy(hub.url) as proxy:
            proxied = {**environment, "HTTP_PROXY": proxy.url, "NO_PROXY": "localhost"}
            started = subprocess.run(command, cwd=folder, env=proxied, capture_output=True, text=True, timeout=90)
        assert started.stdout.startswith("tiny "), started.stderr
        assert any(revision in asked for asked in proxy.requests)
        assert revision in started.stdout
        link = '<a href="https://hub/&quot;&lt;b&gt;&amp;" target="_blank">The same model in your own browser'
        assert link in started.stdout
    # and once that is in the cache it needs no Hub
    again = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=90)
    assert again.stdout == started.stdout, again.stderr


def test_dry_run_lists_all_with_sizes_and_needs_neither_network_nor_token(model, tmp_path):
    import tools.publish as tool

    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))  # never listens
        hub = f"http://127.0.0.1:{dead.getsockname()[1]}"
        names = ["--repo", "me/net", "--static", "me/web", "--space", "me/demo"]
        done = run(tmp_path, "--model", model, *names, "--dry-run", hub=hub, token=None)
    assert done.returncode == 0, done.stderr
    parts = re.fullmatch("model me/net\n(.*)static space me/web\n(.*)space me/demo\n(.*)", done.stdout, re.S).groups()
    sizes, static, space = (
        {name: int(size.replace(",", "")) for size, name in re.findall(r" ([\d,]+) bytes  (\S+)", part)}
        for part in parts
    )
    assert set(sizes) >= MODEL_FILES
    assert sizes == {p.relative_to(model).as_posix(): p.stat().st_size for p in model.rglob("*") if p.is_file()}
    site = tool.build.site(model, repo="me/net", space_url=f"{hub}/spaces/me/demo")
    assert static == {name: len(content) for name, content in files_of(site).items()}
    assert set(space) == SPACE_FILES
    last = "hardware of me/demo: chosen when it is published\nnothing was uploaded (--dry-run)\n"
    assert parts[2].endswith(last)


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
def test_what_looks_like_a_credential_is_refused(model, monkeypatch, secret, what):
    import tools.publish as tool

    def assert_found(*names):
        monkeypatch.setattr(sys, "argv", ["publish.py", "--model", str(model), "--repo", "me/net", "--dry-run", *names])
        with pytest.raises(tool.RunError, match=what) as refusal:
            tool.main()
        assert secret not in str(refusal.value)

    monkeypatch.setattr(tool.build, "site", lambda *args, **how: {"ort/main.mjs": f"x {secret}\n".encode()})
    assert_found("--static", "me/web")
    card = model / "README.md"
    card.write_text(card.read_text() + f"\n{secret}\n")
    assert_found()


def test_no_secret_is_found_in_what_we_publish(model):
    import tools.publish as tool

    for folder, names in ((model, tool.MODEL_FILES), (ROOT / "app", tool.APP_FILES)):
        for name in names:
            if (folder / name).exists():
                tool.refuse_secrets(name, folder / name)
    for name, content in tool.build.site(model, repo="me/net", space_url="https://hub/spaces/me/demo").items():
        tool.refuse_secrets(name, content)


def test_refusals_of_the_hub_and_of_the_network_are_one_line(model, tmp_path):
    base = ["--model", model, "--repo", "me/net"]
    with Hub() as hub:
        assert_refused(run(tmp_path, *base, hub=hub.url, token="hf_" + "w" * 34), "the Hub refused")
        assert_refused(run(tmp_path, *base, hub=hub.url, token=None), "no token")
        hub.refuse = 403
        assert_refused(run(tmp_path, *base, hub=hub.url), "403")
        assert hub.repos["model", "me/net"] == [{}]  # nothing half-published
    assert_refused(run(tmp_path, *base), "could not be reached")


def test_all_else_is_published_where_the_gradio_space_is_refused(model, tmp_path):
    """As to an account that is too young for ZeroGPU; the same command goes on when it is not."""
    command = ["--model", model, "--repo", "me/net", "--static", "me/web", "--space", "me/demo"]
    with Hub() as hub:
        hub.young = True
        done = run(tmp_path, *command, hub=hub.url)
        assert_refused(done, "error: me/net and me/web are published, me/demo is not: ", f"(402): {YOUNG}", "30 days")
        assert "--static" not in done.stderr  # that has been done
        assert done.stdout.splitlines()[1:] == [
            f"{hub.url}/me/net/tree/{hub.oid(1, ('model', 'me/net'))}",
            f"{hub.url}/spaces/me/web",
        ]
        assert "spaces/me/demo" not in hub.repos["space", "me/web"][1]["index.html"].decode()
        hub.young = False
        done = run(tmp_path, *command, hub=hub.url)
        assert done.returncode == 0, done.stderr
        assert set(hub.repos["space", "me/demo"][-1]) == SPACE_FILES
        assert f"{hub.url}/spaces/me/demo" in hub.repos["space", "me/web"][2]["index.html"].decode()
        assert len(hub.repos["model", "me/net"]) == 2  # nothing has changed there


FREE, PRO = {"isPro": False, "orgs": []}, {"isPro": True, "orgs": [{"name": "lab", "plan": None}]}
ORGS = [{"name": "lab", "plan": "team"}, {"name": "firm", "isEnterprise": True}, {"name": "club", "plan": None}]
ORGS += [{"name": "old"}]


@pytest.mark.parametrize(
    ("account", "space", "hardware", "said"),
    [
        (FREE, "me/demo", "zero-a10g", "me is a free account: me/demo will run on ZeroGPU (two such Spaces at most)"),
        ({}, "ME/demo", "zero-a10g", "ME is a free account: ME/demo will run on ZeroGPU (two such Spaces at most)"),
        (PRO, "me/demo", "cpu-basic", "me has PRO: me/demo will run on cpu-basic"),
        ({"orgs": ORGS}, "lab/demo", "cpu-basic", "lab has a plan: lab/demo will run on cpu-basic"),
        ({"orgs": ORGS}, "firm/demo", "cpu-basic", "firm has a plan: firm/demo will run on cpu-basic"),
        (
            {"orgs": None},
            "lab/demo",
            "cpu-basic",
            "the Hub does not say which plan lab has: lab/demo will run on cpu-basic",
        ),
        (
            {"orgs": ORGS},
            "old/demo",
            "cpu-basic",
            "the Hub does not say which plan old has: old/demo will run on cpu-basic",
        ),
    ],
)
def test_the_hardware_is_what_the_account_can_have(account, space, hardware, said):
    import tools.publish as tool

    with Hub() as hub:
        hub.account = account
        args = SimpleNamespace(space=space, hardware=None)
        assert tool.choose_hardware(HfApi(endpoint=hub.url, token=TOKEN), args) == said
        assert args.hardware == hardware


@pytest.fixture
def publish(model, monkeypatch):
    """publish(hub, *names): what the command does after it has read its files, in this process."""
    import tools.publish as tool

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    config = json.loads((model / "config.json").read_text())

    def published(hub, *names):
        monkeypatch.setattr(sys, "argv", ["publish.py", "--model", str(model), "--repo", "me/net", *names])
        api, files = HfApi(endpoint=hub.url, token=TOKEN), {"README.md": model / "README.md"}
        tool.publish(api, tool.arguments(), config, files, {"index.html": b"<p>"}, {"app.py": b"pass"})

    return published


def test_each_refusal_of_a_gradio_space_says_what_to_do(publish, capsys):
    import tools.publish as tool

    def refusal(*names):
        with pytest.raises(tool.RunError) as refused:
            publish(hub, "--space", *names)
        return str(refused.value)

    zero = "free accounts have two ZeroGPU Spaces, with a verified e-mail address and after 30 days; is HF_TOKEN"
    with Hub() as hub:
        hub.account = {"isPro": False, "orgs": ORGS}
        before = "club is an organisation without a plan, which can have no Gradio Space: "
        assert refusal("club/demo").startswith(before)
        assert hub.repos == {}  # before anything is created
        before = "me/net is published, me/demo is not: the Hub refused (402): "
        assert refusal("me/demo", "--hardware", "cpu-basic") == (
            f"{before}{UNPAID}; `--static USER/NAME` is free for everyone"
        )
        assert capsys.readouterr().out.startswith("me/demo will run on cpu-basic\n")
        for name in ("me/one", "me/two"):
            publish(hub, "--space", name)
        said = refusal("me/three")
        assert said.startswith(f"me/net is published, me/three is not: the Hub refused (403): {THIRD}; {zero}")
        assert said.endswith("; `--static USER/NAME` is free for everyone")
        # what is there keeps its hardware, and nobody is asked who the account is
        hub.requests.clear()
        publish(hub, "--space", "me/two")
        assert "/api/whoami-v2" not in hub.requests
        assert refusal("me/two", "--hardware", "cpu-basic") == (
            f"me/net is published, me/two is not: the Hub refused (402): {DOWNGRADE}; `--static USER/NAME` is free for "
            "everyone"
        )
        assert hub.settings["space", "me/two"]["hardware"] == "zero-a10g"
        publish(hub, "--space", "me/two", "--hardware", "t4-small")
        assert hub.settings["space", "me/two"]["hardware"] == "t4-small"
        publish(hub, "--space", "lab/demo")
        assert hub.settings["space", "lab/demo"]["hardware"] == "cpu-basic"


def test_the_static_space_of_a_private_model_is_private(publish):
    """It holds the model."""
    with Hub() as hub:
        publish(hub, "--static", "me/open")
        publish(hub, "--private", "--static", "me/closed")
        hub.settings["model", "me/net"]["visibility"] = "private"
        publish(hub, "--static", "me/web")
        assert [hub.private(("space", f"me/{name}")) for name in ("open", "closed", "web")] == [False, True, True]


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
        assert done.stdout.splitlines()[3] == (
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
    two = run(tmp_path, "--model", model, "--repo", "me/net", "--space", "me/web", "--static", "me/web")
    assert_refused(two, "give them two names", status=2)
    assert_refused(run(tmp_path, "--repo", "me/net", "--hardware", "t4-small"), "name it with --space", status=2)
    (model / "model.safetensors").unlink()
    assert_refused(run(tmp_path, "--model", model, "--repo", "me/net", "--dry-run"), "lacks model.safetensors")
