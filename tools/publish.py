"""Publish an exported model on the Hugging Face Hub, and Spaces that run it.

    python tools/publish.py --model model/ --repo USER/NAME --static USER/NAME    in the visitor's browser; free
    python tools/publish.py --model model/ --repo USER/NAME --space USER/NAME     on a server of the Hub, by Gradio
        --dry-run    only list the files

Creates or updates each in one commit; the Gradio Space names the commit of the model that it runs. Of a new one the
hardware is what its owner's account can have: cpu-basic with PRO or a plan, else ZeroGPU. Uploads only files of an
export and of app/, and nothing that looks like a credential. The token is the one of `hf auth login` or HF_TOKEN;
--dry-run needs neither token nor network.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import yaml
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from rn50.command import run
from rn50.errors import RunError, UsageError
from rn50.files import expanded_path

APP = Path(__file__).resolve().parents[1] / "app"
sys.path[:0] = [str(APP), str(APP / "browser")]
import build  # noqa: E402
import inference  # noqa: E402

MODEL_FILES = ("README.md", "config.json", "model.onnx", "model.safetensors", "model_int8.onnx", "model_w8.onnx")
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
BINARY = (".gz", ".jpg", ".onnx", ".safetensors")
CPU, ZERO_GPU = "cpu-basic", "zero-a10g"
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
    static = static_site(args, args.space) if args.static else {}
    names = listed(APP, APP_FILES, None, APP_FILES, apart="browser") if args.space else ()
    space = {name: APP / name for name in names}
    for name, content in [*model.items(), *static.items(), *space.items()]:
        refuse_secrets(name, content)
    if args.dry_run:
        show(f"model {args.repo}", model)
        if args.static:
            show(f"static space {args.static}", static)
        if args.space:
            space |= space_texts(args, config, "COMMIT-OF-THE-MODEL", model)
            show(f"space {args.space}", space)
            print(f"hardware of {args.space}: {args.hardware or 'chosen when it is published'}")
        print("nothing was uploaded (--dry-run)")
        return
    from huggingface_hub import HfApi

    publish(HfApi(library_name="rn50"), args, config, model, static, space)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="model", type=expanded_path, help="an exported model's folder (default: model)"
    )
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="model repository")
    parser.add_argument("--static", metavar="USER/NAME", help="Space in which it runs in the visitor's browser")
    parser.add_argument("--space", metavar="USER/NAME", help="Space in which it runs on a server, by Gradio")
    parser.add_argument(
        "--hardware", metavar="NAME", help=f"of --space, e.g. {CPU}, {ZERO_GPU} (default: what the account can have)"
    )
    parser.add_argument("--private", action="store_true", help="where they are created now, create them private")
    parser.add_argument("--dry-run", action="store_true", help="list all files with their sizes and stop")
    args = parser.parse_args()
    if args.hardware and not args.space:
        raise UsageError("--hardware is that of the Gradio Space: name it with --space")
    if args.space and args.space == args.static:
        raise UsageError("--static and --space are two Spaces: give them two names")
    for name in filter(None, (args.repo, args.static, args.space)):
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


def static_site(args, space):
    """{path: bytes or Path} of the static Space, which links to the Gradio Space `space` unless that is None.

    RunError where the model has no network for browsers.
    """
    try:
        return build.site(args.model, repo=args.repo, space_url=space and address(space))
    except inference.BadModel as error:
        raise RunError(str(error)) from None


def address(space):
    return f"{ENDPOINT}/spaces/{space}"


def listed(folder, names, pattern, needed, apart=None):
    """The files of `folder` that may be uploaded, but for those in its folder `apart`.

    RunError where one is there that may not, or is missing.
    """
    found = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts and (path.is_symlink() or not path.is_dir())
    )
    found = [name for name in found if name.split("/")[0] != apart]
    foreign = [name for name in found if name not in names and not (pattern and pattern.fullmatch(name))]
    foreign += [name for name in found if (folder / name).is_symlink()]
    if foreign:
        raise RunError(f"{folder} holds files that are not published: {', '.join(foreign[:5])}; move them elsewhere")
    if missing := [name for name in needed if name not in found]:
        raise RunError(f"{folder} lacks {', '.join(missing)}")
    return found


def refuse_secrets(name, content):
    """RunError where a text, bytes or the file at a Path, holds what looks like a credential."""
    if name.endswith(BINARY):
        return
    where, text = (name, content) if isinstance(content, bytes) else (content, content.read_bytes())
    for what, pattern in SECRETS.items():
        if pattern.search(text):
            raise RunError(f"{where} holds what looks like {what}; remove it and, if it was real, revoke it")


def space_texts(args, config, revision, model, *, open_to_all=True):
    """The two files that tie a Gradio Space to its model, and to the static Space: {name: bytes}."""
    repo = args.repo
    wanted = [config["network"], "config.json", "README.md", *sorted(name for name in model if EXAMPLE.fullmatch(name))]
    pointer = {"repo": repo, "revision": revision, "files": wanted}
    if args.static:
        pointer["browser"] = address(args.static)
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


def publish(api, args, config, model, static, space):
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import disable_progress_bars

    if not get_token():
        raise RunError("no token: run `hf auth login`, or set HF_TOKEN to one that may write")
    if not sys.stderr.isatty():
        disable_progress_bars()
    published = []
    try:
        upload_all(api, args, config, model, static, space, published)
    except OfflineModeIsEnabled:
        raise RunError("HF_HUB_OFFLINE is set; unset it to publish") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        said = " ".join(str(error.server_message or error).split())
        raise RunError(
            f"{done(args, published)}the Hub refused ({status}): {said}{hint(status, args, published)}"
        ) from None
    except ValueError as error:  # front matter that it does not take, or an answer that is none, as of a gateway
        raise RunError(f"{done(args, published)}the Hub did not take it: {' '.join(str(error).split())}") from None
    except Exception as error:
        # the HTTP library under huggingface_hub has changed twice; hf_xet, which uploads, raises RuntimeError
        if not isinstance(error, OSError | RuntimeError) and type(error).__module__.split(".")[0] not in NETWORK:
            raise
        said = " ".join(str(error).split())
        raise RunError(f"{done(args, published)}the Hub could not be reached: {said}") from None


def upload_all(api, args, config, model, static, space, published):
    """Model, static Space and Gradio Space, the one that can be refused last; their names go to `published`."""
    from huggingface_hub.errors import HfHubHTTPError

    there = args.space and api.repo_exists(args.space, repo_type="space")
    if args.space and not there:
        print(choose_hardware(api, args), flush=True)
    api.create_repo(args.repo, private=args.private or None, exist_ok=True)
    revision = upload(api, args.repo, "model", model)
    print(f"{api.endpoint}/{args.repo}/tree/{revision}", flush=True)
    published.append(args.repo)
    new, refusal = {"repo_type": "space", "private": args.private or None, "exist_ok": True}, None
    if args.space and not there:
        try:
            api.create_repo(args.space, space_sdk="gradio", space_hardware=args.hardware, **new)
        except HfHubHTTPError as error:
            refusal = error
    now = api.model_info(args.repo)
    open_to_all = not (now.private or now.gated)
    if args.static:
        if refusal:  # nothing to link to
            static = static_site(args, None)
        # with the model in it
        api.create_repo(args.static, space_sdk="static", **new | {"private": args.private or not open_to_all or None})
        upload(api, args.static, "static", static)
        print(address(args.static), flush=True)
        published.append(args.static)
    if refusal:
        raise refusal
    if args.space:
        if there and args.hardware:
            api.request_space_hardware(args.space, args.hardware)
        upload(api, args.space, "gradio", space | space_texts(args, config, revision, model, open_to_all=open_to_all))
        print(address(args.space), flush=True)
        if not open_to_all:
            where = f"{address(args.space)}/settings"
            print(f"{args.repo} is not open to all: in {where} add a secret HF_TOKEN that may read it")


def choose_hardware(api, args):
    """Set args.hardware of a new Gradio Space to what its owner can have: a line that says so.

    RunError where that is nothing.
    """
    if args.hardware:
        return f"{args.space} will run on {args.hardware}"
    owner, who = args.space.split("/")[0], api.whoami()
    accounts = [who, *(who.get("orgs") or [])]
    account = next((one for one in accounts if str(one.get("name")).lower() == owner.lower()), {})
    args.hardware = CPU
    if account is who and who.get("type") != "org":
        if who.get("isPro"):
            return f"{owner} has PRO: {args.space} will run on {CPU}"
        args.hardware = ZERO_GPU
        return f"{owner} is a free account: {args.space} will run on ZeroGPU (two such Spaces at most)"
    if account.get("isEnterprise") or account.get("plan") not in (None, "", "free"):
        return f"{owner} has a plan: {args.space} will run on {CPU}"
    if account.keys() & {"plan", "isEnterprise"}:
        raise RunError(
            f"{owner} is an organisation without a plan, which can have no Gradio Space: publish it under your own "
            "name, or use --static, which is free for everyone, in place of --space"
        )
    return f"the Hub does not say which plan {owner} has: {args.space} will run on {CPU}"


def done(args, published):
    """The beginning of an error: what is published all the same."""
    asked = list(filter(None, (args.repo, args.static, args.space)))
    if not published:
        return ""
    parts = [f"{' and '.join(names)} {'are' if names[1:] else 'is'}" for names in (published, asked[len(published) :])]
    return f"{parts[0]} published, {parts[1]} not: "


def hint(status, args, published):
    """What to do about a refusal of the Hub with this status."""
    said = "; is HF_TOKEN one that may write there?" if status in (401, 403) else ""
    if status in (402, 403) and args.space and len(published) == 1 + bool(args.static):
        if args.hardware == ZERO_GPU:
            said = f"; free accounts have two ZeroGPU Spaces, with a verified e-mail address and after 30 days{said}"
        if not args.static:
            said += "; `--static USER/NAME` is free for everyone"
    return said


def upload(api, repo, kind, files):
    """One commit after which the repository holds these files and no others of ours; returns the commit's id.

    kind: model, static or gradio.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    where = {"repo_type": "model" if kind == "model" else "space"}
    there = set(api.list_repo_files(repo, **where))
    if kind == "static":
        ours = former_site(api, repo) if build.INDEX in there else set()
    else:
        names = MODEL_FILES if kind == "model" else APP_FILES
        ours = {name for name in there if name in names or EXAMPLE.fullmatch(name)}
    operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
    operations += [CommitOperationDelete(name) for name in sorted(there & ours - files.keys())]
    message = f"Publish {len(files)} files with rn50's tools/publish.py"
    return api.create_commit(repo, operations, commit_message=message, **where).oid


def former_site(api, repo):
    """The files of the publication that the static Space holds, as it lists them; none where a person changed that."""
    path = api.hf_hub_download(repo, build.INDEX, repo_type="space")
    try:
        return set(json.loads(Path(path).read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError):
        return set()


if __name__ == "__main__":
    run(main)
