"""Where a user has ImageNet: Hugging Face, Kaggle, image-net.org's links, or S3. Needs boto3 alone, and that for S3.

The protocols: huggingface_hub 1.x (tree, resolve, X-Error-Code), Kaggle's own client (kagglesdk: Basic or Bearer), and
what torchvision says of image-net.org's file names.
"""

import base64
import contextlib
import json
import os
import re
import time
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path

from rn50.cloud import ranges
from rn50.cloud import store as cloud
from rn50.errors import RunError, UsageError

DATASET = "ILSVRC/imagenet-1k"
COMPETITION = "imagenet-object-localization-challenge"
KAGGLE_ARCHIVE = "imagenet_object_localization_patched2019.tar.gz"
KAGGLE_TABLES = ("LOC_val_solution.csv", "LOC_synset_mapping.txt")
TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
SHARD = re.compile(r"(train|validation)(?:-(\d+)-of-(\d+)\S*)?\.parquet")
FORMS = "hf, hf:OWNER/NAME, kaggle, s3://BUCKET/PREFIX, or the links of image-net.org to " + f"{TRAIN} and {VAL}"
HF_TOKENS = "https://huggingface.co/settings/tokens"
KAGGLE_TOKENS = "https://www.kaggle.com/settings"
LINKS = "https://image-net.org/download-images"
WHOLE = 64 << 20  # bytes; a server without byte ranges will do for files up to this size
TRIES, PAUSE_SECONDS = 3, 1.0  # for what is asked once, on the user's machine


@dataclass(frozen=True)
class Origin:
    """kind: hf, kaggle, s3 or links. places: the data set, s3://..., or the links (empty where the secret has them)."""

    kind: str
    places: tuple = field(repr=False)


@dataclass(frozen=True)
class File:
    """name: path under the folder that write_dataset.py reads. place: http(s) address or s3://BUCKET/KEY.

    mark: what changes when the file does. ranged: whether parts of it can be asked for.
    """

    name: str
    bytes: int
    sha256: str | None
    place: str = field(repr=False)
    mark: str = ""
    ranged: bool = True


def parse(words):
    """The Origin that the words of --from, or of a launch record, stand for. UsageError for anything else."""
    if words in (["hf"], ["kaggle"], ["links"]):
        return Origin(words[0], {"hf": (DATASET,)}.get(words[0], ()))
    if len(words) == 1 and re.fullmatch(r"hf:[\w.-]+/[\w.-]+", words[0]):
        return Origin("hf", (words[0].removeprefix("hf:"),))
    if len(words) == 1 and re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]+(/.*)?", words[0]):
        return Origin("s3", (words[0].rstrip("/"),))
    if words and all(re.match(r"https?://[^/\s]+/", word) for word in words):
        return Origin("links", _links(words))
    raise UsageError(f"cannot read --from {' '.join(words)}; it must be {FORMS}")


def words(origin):
    """What may be stored and shown of an origin; `parse` reads it again. Links stay with the secret."""
    return {"hf": [f"hf:{''.join(origin.places)}"], "s3": list(origin.places)}.get(origin.kind, [origin.kind])


def _links(given):
    found = {}
    for link in given:
        name = _file_name(link)
        if name not in (TRAIN, VAL, DEVKIT) or name in found:
            raise UsageError(f"the links must be to {TRAIN}, {VAL} and, if it lies elsewhere, {DEVKIT}, once each")
        found[name] = link
    if missing := [name for name in (TRAIN, VAL) if name not in found]:
        raise UsageError(f"the link to {missing[0]} is missing; {LINKS} shows it to who is logged in")
    return found[TRAIN], found[VAL], found.get(DEVKIT) or urllib.parse.urljoin(found[TRAIN], DEVKIT)


def _file_name(link):
    return urllib.parse.unquote(urllib.parse.urlsplit(link).path).rsplit("/", 1)[-1]


# --- Secrets ---------------------------------------------------------------------------------------------------------


def secret(origin, ask):
    """What must be kept secret, a dict: from where the origin's own tools keep it, else from ask(question) -> text.

    UsageError where there is none.
    """
    if origin.kind == "hf":
        return {"token": _hf_token(ask)}
    if origin.kind == "kaggle":
        return _kaggle_key(ask)
    return {"links": list(origin.places)} if origin.kind == "links" else {}


def _hf_token(ask):
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    kept = os.environ.get("HF_TOKEN_PATH") or os.path.join(home, "token")
    token = os.environ.get("HF_TOKEN", "").strip() or _text(kept) or ask("Hugging Face token (hf_...): ").strip()
    if not token:
        raise UsageError(f"a Hugging Face token is needed; make one that may read at {HF_TOKENS}")
    return token


def _kaggle_key(ask):
    """As Kaggle's client looks for it: its newer tokens first, which stand alone."""
    folder = Path(os.environ.get("KAGGLE_CONFIG_DIR") or os.path.expanduser("~/.kaggle"))
    user, key = os.environ.get("KAGGLE_USERNAME", "").strip(), os.environ.get("KAGGLE_KEY", "").strip()
    if token := os.environ.get("KAGGLE_API_TOKEN", "").strip():
        return _kaggle_text(_text(token) or token)
    if user and key:
        return {"username": user, "key": key}
    for name in ("kaggle.json", "access_token"):
        if text := _text(folder / name):
            return _kaggle_text(text)
    return _kaggle_text(ask("Kaggle token (KGAT_..., USER:KEY, or what kaggle.json holds): ").strip())


def _kaggle_text(text):
    if not text:
        raise UsageError(f"a Kaggle token is needed; make one at {KAGGLE_TOKENS}, under API")
    if text.startswith("{"):
        try:
            return {name: str(json.loads(text)[name]) for name in ("username", "key")}
        except (ValueError, KeyError):
            raise UsageError(f"kaggle.json has no username and key; make a new one at {KAGGLE_TOKENS}") from None
    user, colon, key = text.partition(":")
    return {"username": user, "key": key} if colon else {"token": text}


def _text(path):
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


def authorization(origin, secret):
    """The header that goes with every request to the origin's own host, or None."""
    if "username" in secret:
        return "Basic " + base64.b64encode(f"{secret['username']}:{secret['key']}".encode()).decode()
    return f"Bearer {secret['token']}" if "token" in secret else None


# --- What is there ---------------------------------------------------------------------------------------------------


def listing(origin, secret, s3):
    """A File for each that is needed, after a look whether the origin gives them out. s3: boto3's client.

    UsageError where the user must do something about it (token, licence, links, files that are missing), RunError where
    the network or the server is to blame: one line each.
    """
    if origin.kind == "s3":
        return _s3(origin, s3)
    return {"hf": _hf, "kaggle": _kaggle, "links": _by_link}[origin.kind](origin, secret)


def _hf(origin, secret):
    (repo,), endpoint = origin.places, _hf_endpoint()
    url, entries = f"{endpoint}/api/datasets/{repo}/tree/main/data?recursive=true", []
    while url:
        # Pages are the endpoint's own; the token goes nowhere else.
        header = authorization(origin, secret) if ranges.host(url) == ranges.host(endpoint) else None
        with _asked(origin, f"file list of {repo}", url, header) as answer:
            entries += _json(answer, endpoint)
            following = re.search(r'<([^>]+)>\s*;\s*rel="?next"?', answer.headers.get("Link", ""))
        url = following and urllib.parse.urljoin(url, following[1])
    shards = {e["path"]: e for e in entries if SHARD.fullmatch(e["path"].removeprefix("data/"))}
    _check_shards([path.removeprefix("data/") for path in shards], f"{endpoint}/datasets/{repo}")
    files = [
        File(path, e["size"], (e.get("lfs") or {}).get("oid"), f"{endpoint}/datasets/{repo}/resolve/main/{path}")
        for path, e in sorted(shards.items())
    ]
    # The list of a gated data set is public; whether its files are is said by one of them.
    probed = _probe(origin, secret, files[0].name, files[0].place)
    if probed.bytes != files[0].bytes:
        raise RunError(f"{files[0].name} has {probed.bytes} bytes and not the {files[0].bytes} that its list says")
    return files


def _hf_endpoint():
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _check_shards(names, where):
    """UsageError unless the parquet files of both splits are all there."""
    for split in ("train", "validation"):
        found = [match for name in names if (match := SHARD.fullmatch(name)) and match[1] == split]
        if not found:
            raise UsageError(f"{where} has no {split}-*.parquet; expected ImageNet as {DATASET} has it")
        total = int(found[0][3] or 1)
        absent = sorted(set(range(total)) - {int(match[2] or 0) for match in found})
        if absent:
            raise UsageError(f"{where} lacks {len(absent)} of {total} files: {split}-{absent[0]:05d}-of-{total:05d} "
                             "first")  # fmt: skip


def _kaggle(origin, secret):
    base = (os.environ.get("KAGGLE_API_ENDPOINT") or "https://www.kaggle.com").rstrip("/").removesuffix("/api/v1")
    base = f"{base}/api/v1/competitions/data/download/{COMPETITION}"
    return [_probe(origin, secret, name, f"{base}/{name}") for name in (KAGGLE_ARCHIVE, *KAGGLE_TABLES)]


def _by_link(origin, secret):
    return [_probe(origin, secret, _file_name(link), link) for link in _links(secret.get("links", []))]


def _probe(origin, secret, name, url):
    """The File at `url`, after its first byte."""
    with _asked(origin, name, url, authorization(origin, secret), 0, 0) as answer:
        first, total = ranges.span(answer)
        page = answer.headers.get("Content-Type", "").startswith("text/html") and not name.endswith((".csv", ".txt"))
        mark = ranges.mark(answer)
    if page:
        raise UsageError(f"a web page came instead of {name}; log in at {_site(origin)} and copy the links again")
    if first is None and (total is None or total > WHOLE):
        raise UsageError(f"the server of {name} does not give parts of a file (byte ranges), so that a broken download "
                         "cannot go on; put the files into S3 and give --from s3://...")  # fmt: skip
    if not total:
        raise UsageError(f"{name} is empty where it comes from")
    return File(name, total, None, url, mark, ranged=first is not None)


@contextlib.contextmanager
def _asked(origin, name, *request):
    """The answer to a request of ranges.ask, tried again a little; what is refused becomes one line."""
    for attempt in range(TRIES):
        try:
            answer = ranges.ask(*request)
            break
        except (ranges.Refused, ranges.Broken) as error:
            if attempt + 1 < TRIES and error.repeatable:
                time.sleep(min(error.retry_after or PAUSE_SECONDS * 2**attempt, 30.0))
                continue
            raise explain(origin, name, error) from None
    with answer:
        yield answer


def explain(origin, name, error):
    """The UsageError or RunError, one line, for a ranges.Refused or Broken about the file `name`."""
    where = {"hf": "Hugging Face", "kaggle": "Kaggle"}.get(origin.kind, "the server")
    if isinstance(error, ranges.Broken):
        return RunError(f"cannot reach {where} for {name}: {error}; look after the network and try again")
    if error.repeatable or error.status < 400:
        return RunError(f"{where} answers {name} with status {error.status}; try again later")
    return _refusal(origin, name, error) or UsageError(f"{where} answers {name} with status {error.status}")


def _refusal(origin, name, error):
    status, repo = error.status, "".join(origin.places[:1])
    if origin.kind == "hf":
        page = f"{_hf_endpoint()}/datasets/{repo}"
        if status == 403:
            return UsageError(f"Hugging Face does not let you have {repo} yet: accept its terms at {page}, and let a "
                              f"fine-grained token read gated repositories ({HF_TOKENS})")  # fmt: skip
        if status == 401:
            return UsageError(f"Hugging Face does not take the token; make one that may read at {HF_TOKENS}, and "
                              f"accept the terms at {page}")  # fmt: skip
        if status == 404:
            return UsageError(f"Hugging Face has no {name} ({page}), or the token may not see it")
    if origin.kind == "kaggle":
        page = f"https://www.kaggle.com/competitions/{COMPETITION}/rules"
        if status == 403:
            return UsageError(f"Kaggle does not let you have {name} yet: accept the rules at {page}")
        if status == 401:
            return UsageError(f"Kaggle does not take the token; make one at {KAGGLE_TOKENS}, under API")
        if status == 404:
            return UsageError(f"Kaggle has no {name} in {COMPETITION}, or the rules are not accepted: {page}")
    if origin.kind == "links" and status in (401, 403, 404, 410):
        return UsageError(f"the link to {name} leads to status {status}; log in at {LINKS} and copy the links again")
    return None


def _site(origin):
    return {"hf": "https://huggingface.co", "kaggle": "https://www.kaggle.com"}.get(origin.kind, LINKS)


def _json(answer, where):
    try:
        found = json.loads(ranges.read(answer, 64 << 20))
    except (ValueError, ranges.Broken):
        found = None
    if not isinstance(found, list):
        raise RunError(f"{where} answers with something else than a list of files; try again later")
    return found


# --- S3 --------------------------------------------------------------------------------------------------------------


def _s3(origin, s3):
    bucket, prefix = split_s3(origin.places[0])
    folder = f"{prefix}/" if prefix else ""
    found = {entry["Key"]: entry for entry in _objects(s3, bucket, folder)}
    by_name = {}
    for key in sorted(found, key=lambda key: (-key.count("/"), key)):
        by_name[key.rsplit("/", 1)[-1]] = key  # the one nearest to the top is kept
    where = origin.places[0]
    shards = [name for name in by_name if SHARD.fullmatch(name)]
    if TRAIN in by_name or VAL in by_name:
        chosen = {name: name for name in _all_there(by_name, (TRAIN, VAL, DEVKIT), where)}
    elif KAGGLE_ARCHIVE in by_name:
        chosen = {name: name for name in _all_there(by_name, (KAGGLE_ARCHIVE, KAGGLE_TABLES[0]), where)}
        chosen |= {name: name for name in KAGGLE_TABLES if name in by_name}
    elif shards:
        _check_shards(shards, where)
        chosen = {name: f"data/{name}" for name in sorted(shards)}
    else:
        raise UsageError(f"{where} has neither {TRAIN} with {VAL} and {DEVKIT}, nor train-*.parquet with "
                         f"validation-*.parquet, nor {KAGGLE_ARCHIVE} with {KAGGLE_TABLES[0]}")  # fmt: skip
    files = []
    for name, target in chosen.items():
        entry = found[by_name[name]]
        if not entry["Size"]:
            raise UsageError(f"s3://{bucket}/{entry['Key']} is empty")
        files.append(File(target, entry["Size"], None, f"s3://{bucket}/{entry['Key']}", entry["ETag"]))
    return files


def _all_there(found, names, where):
    if missing := [name for name in names if name not in found]:
        raise UsageError(f"{where} lacks {', '.join(missing)}")
    return names


def _objects(s3, bucket, prefix):
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return cloud.entries(s3, bucket, prefix)
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code in ("NoSuchBucket", "AccessDenied", "403", "404"):
            what = "there is no such bucket" if code in ("NoSuchBucket", "404") else "your credentials may not list it"
            raise UsageError(f"cannot list s3://{bucket}/{prefix}: {what}") from None
        raise RunError(f"cannot list s3://{bucket}/{prefix}: {code}") from None
    except BotoCoreError as error:
        raise RunError(f"cannot list s3://{bucket}/{prefix}: {error}") from None


def split_s3(place):
    """(bucket, key) of s3://BUCKET/KEY."""
    bucket, _, key = place.removeprefix("s3://").partition("/")
    return bucket, key
