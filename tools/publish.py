"""Publish an exported model on the Hugging Face Hub, and a Space that runs it.

    python tools/publish.py --model model/ --repo USER/NAME --space USER/NAME --dry-run    lists what would be uploaded
    python tools/publish.py --model model/ --repo USER/NAME --space USER/NAME

Creates or updates both, each in one commit; the Space names the commit of the model that it runs. Uploads only files of
an export and of app/, and nothing that looks like a credential. The token is the one of `hf auth login` or HF_TOKEN;
--dry-run needs neither token nor network.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from rn50.command import run
from rn50.errors import RunError, UsageError
from rn50.files import expanded_path

APP = Path(__file__).resolve().parents[1] / "app"
sys.path.insert(0, str(APP))
import inference  # noqa: E402

MODEL_FILES = ("README.md", "config.json", "model.onnx", "model.safetensors", "model_int8.onnx")
NEEDED = ("README.md", "config.json", "model.onnx", "model.safetensors")
EXAMPLE = re.compile(r"examples/[\w-]+\.jpg")
APP_FILES = (
    "README.md",
    "about.py",
    "app.py",
    "inference.py",
    "page.css",
    "page.js",
    "pictures.py",
    "requirements.txt",
)
APP_FILES += ("uploads.py",)
POINTER = "model.json"
REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
# What to do about a refusal of the Hub, by its status.
HINTS = {
    401: "; is HF_TOKEN one that may write there?",
    402: "; `bash tools/app.sh MODEL` opens the same page on a machine of your own",
    403: "; is HF_TOKEN one that may write there?",
}
NETWORK = ("httpx", "httpx2", "hf_xet")
SECRETS = {
    "a Hugging Face token": re.compile(rb"\bhf_[A-Za-z0-9]{30,}"),
    "an AWS access key": re.compile(rb"\b(AKIA|ASIA)[A-Z0-9]{16}\b"),
    "an AWS secret key": re.compile(rb"(?i)aws_secret_access_key\W{1,4}[A-Za-z0-9/+]{40}"),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a GitHub token": re.compile(rb"\b(ghp|gho|ghs|github_pat)_[A-Za-z0-9_]{30,}"),
    "an API key": re.compile(rb"\bsk-[A-Za-z0-9_-]{32,}"),
}


def main():
    args = arguments()
    config = check_model(args.model)
    model = {name: args.model / name for name in listed(args.model, MODEL_FILES, EXAMPLE, NEEDED)}
    space = {name: APP / name for name in listed(APP, APP_FILES, None, APP_FILES)} if args.space else {}
    for path in [*model.values(), *space.values()]:
        refuse_secrets(path)
    if args.dry_run:
        show(f"model {args.repo}", model)
        if args.space:
            space |= space_texts(config, args.repo, "COMMIT-OF-THE-MODEL", model)
            show(f"space {args.space}", space)
        print("nothing was uploaded (--dry-run)")
        return
    publish(args, config, model, space)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="model", type=expanded_path, help="an exported model's folder (default: model)"
    )
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="model repository")
    parser.add_argument("--space", metavar="USER/NAME", help="Space that runs it")
    parser.add_argument("--private", action="store_true", help="where they are created now, create them private")
    parser.add_argument("--dry-run", action="store_true", help="list all files with their sizes and stop")
    args = parser.parse_args()
    for name in filter(None, (args.repo, args.space)):
        if not REPO.fullmatch(name):
            raise UsageError(f"{name} is not of the form USER/NAME")
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise UsageError(" ".join(str(error).split())) from None
    return args


def check_model(folder):
    """The config of a folder that the app can run; RunError where it cannot."""
    try:
        return inference.Classifier(folder, threads=1).config
    except inference.BadModel as error:
        raise RunError(str(error)) from None


def listed(folder, names, pattern, needed):
    """The files of `folder` that may be uploaded. RunError where one is there that may not, or is missing."""
    found = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts and (path.is_symlink() or not path.is_dir())
    )
    foreign = [name for name in found if name not in names and not (pattern and pattern.fullmatch(name))]
    foreign += [name for name in found if (folder / name).is_symlink()]
    if foreign:
        raise RunError(f"{folder} holds files that are not published: {', '.join(foreign[:5])}; move them elsewhere")
    if missing := [name for name in needed if name not in found]:
        raise RunError(f"{folder} lacks {', '.join(missing)}")
    return found


def refuse_secrets(path):
    if path.suffix in (".onnx", ".safetensors", ".jpg"):
        return
    content = path.read_bytes()
    for what, pattern in SECRETS.items():
        if pattern.search(content):
            raise RunError(f"{path} holds what looks like {what}; remove it and, if it was real, revoke it")


def space_texts(config, repo, revision, model, *, open_to_all=True):
    """The two files that tie a Space to its model: {name: bytes}."""
    wanted = [config["network"], "config.json", "README.md", *sorted(name for name in model if EXAMPLE.fullmatch(name))]
    pointer = {"repo": repo, "revision": revision, "files": wanted}
    front, body = (APP / "README.md").read_text(encoding="utf-8").split("---\n", 2)[1:]
    settings = yaml.safe_load(front)
    settings |= {"title": config["name"], "models": [repo]}
    if open_to_all:
        # fetched while the Space is built, which has no token, so that it starts without a download
        settings["preload_from_hub"] = [f"{repo} {','.join(wanted)} {revision}"]
    readme = f"---\n{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)}---\n{body}"
    return {POINTER: json.dumps(pointer, indent=1).encode() + b"\n", "README.md": readme.encode()}


def show(title, files):
    print(title)
    for name, content in sorted(files.items()):
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        print(f"  {size:>12,} bytes  {name}")


def publish(args, config, model, space):
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import disable_progress_bars

    if not get_token():
        raise RunError("no token: run `hf auth login`, or set HF_TOKEN to one that may write")
    if not sys.stderr.isatty():
        disable_progress_bars()
    api, done = HfApi(library_name="rn50"), ""
    try:
        revision = upload(api, args.repo, "model", model, private=args.private)
        print(f"{api.endpoint}/{args.repo}/tree/{revision}", flush=True)
        if args.space:
            done = f"{args.repo} is published, {args.space} is not: "
            now = api.model_info(args.repo)
            open_to_all = not (now.private or now.gated)
            files = {**space, **space_texts(config, args.repo, revision, model, open_to_all=open_to_all)}
            upload(api, args.space, "space", files, private=args.private)
            address = f"{api.endpoint}/spaces/{args.space}"
            print(address)
            if not open_to_all:
                print(f"{args.repo} is not open to all: in {address}/settings add a secret HF_TOKEN that may read it")
    except OfflineModeIsEnabled:
        raise RunError("HF_HUB_OFFLINE is set; unset it to publish") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        said = " ".join(str(error.server_message or error).split())
        raise RunError(f"{done}the Hub refused ({status}): {said}{HINTS.get(status, '')}") from None
    except ValueError as error:  # front matter that it does not take, or an answer that is none, as of a gateway
        raise RunError(f"{done}the Hub did not take it: {' '.join(str(error).split())}") from None
    except Exception as error:
        # the HTTP library under huggingface_hub has changed twice; hf_xet, which uploads, raises RuntimeError
        if not isinstance(error, OSError | RuntimeError) and type(error).__module__.split(".")[0] not in NETWORK:
            raise
        raise RunError(f"{done}the Hub could not be reached: {' '.join(str(error).split())}") from None


def upload(api, repo, kind, files, *, private):
    """One commit after which the repository holds these files and no others of ours; returns the commit's id."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    sdk = {"space_sdk": "gradio"} if kind == "space" else {}
    api.create_repo(repo, repo_type=kind, private=private or None, exist_ok=True, **sdk)
    ours = APP_FILES if kind == "space" else MODEL_FILES
    stale = [
        name
        for name in api.list_repo_files(repo, repo_type=kind)
        if name not in files and (name in ours or EXAMPLE.fullmatch(name))
    ]
    operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
    operations += [CommitOperationDelete(name) for name in stale]
    return api.create_commit(
        repo, operations, repo_type=kind, commit_message=f"Publish {len(files)} files with rn50's tools/publish.py"
    ).oid


if __name__ == "__main__":
    run(main)
