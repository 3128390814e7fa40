"""rn50/cloud/{origins,ranges}.py against servers that speak as the Hub, Kaggle and image-net.org do, and moto's S3."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import boto3
import pytest

from rn50.cloud import origins, ranges
from rn50.errors import RunError, UsageError
from tests import hub
from tests.conftest import ROOT

SHARDS = [f"data/train-{k:05d}-of-00004.parquet" for k in range(4)] + ["data/validation-00000-of-00001.parquet"]
TARS = (origins.TRAIN, origins.VAL, origins.DEVKIT)
HF = origins.parse(["hf"])
TOKEN = {"token": hub.TOKEN}


@pytest.fixture
def server(monkeypatch):
    with hub.Origins() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("KAGGLE_API_ENDPOINT", server.url)
        monkeypatch.setattr(origins, "PAUSE_SECONDS", 0.01)
        server.files = {name: name.encode() * 9 for name in SHARDS}
        server.files["data/test-00000-of-00001.parquet"] = b"test"
        yield server


@pytest.fixture(scope="module")
def s3(moto):
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    return boto3.client("s3", endpoint_url=moto.url, region_name="us-east-1", **keys)


def refused(kind, match, *request):
    with pytest.raises(kind, match=match) as caught:
        origins.listing(*request)
    line = str(caught.value)
    assert "\n" not in line
    assert hub.TOKEN not in line
    assert "/links/" not in line
    return line


def nobody(question):
    raise AssertionError(f"asked for {question}")


# --- Words -----------------------------------------------------------------------------------------------------------

LINKS = [f"https://image-net.org/data/ILSVRC/2012/{name}" for name in TARS]


@pytest.mark.parametrize(
    ("given", "kind", "places"),
    [
        (["hf"], "hf", (origins.DATASET,)),
        (["hf:me/my.set"], "hf", ("me/my.set",)),
        (["kaggle"], "kaggle", ()),
        (["links"], "links", ()),
        (["s3://my-bucket"], "s3", ("s3://my-bucket",)),
        (["s3://my-bucket/a b/c/"], "s3", ("s3://my-bucket/a b/c",)),
        (LINKS, "links", tuple(LINKS)),
        (LINKS[1::-1], "links", tuple(LINKS)),
        ([LINKS[2], LINKS[0] + "?key=1", LINKS[1]], "links", (LINKS[0] + "?key=1", *LINKS[1:])),
    ],
)
def test_words_name_an_origin_and_can_be_stored(given, kind, places):
    origin = origins.parse(given)
    assert (origin.kind, origin.places) == (kind, places)
    again = origins.parse(origins.words(origin))
    assert again == (origins.Origin("links", ()) if kind == "links" else origin)
    assert "image-net" not in json.dumps(origins.words(origin))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ([], "must be hf"),
        (["hf:alone"], "must be hf"),
        (["hf", "kaggle"], "must be hf"),
        (["s3://"], "must be hf"),
        (["/data/imagenet"], "must be hf"),
        (["ftp://image-net.org/ILSVRC2012_img_train.tar"], "must be hf"),
        (LINKS[:1], "the link to ILSVRC2012_img_val.tar is missing"),
        (LINKS[:1] * 2, "once each"),
        (["https://image-net.org/other.tar", LINKS[1]], "the links must be to"),
    ],
)
def test_other_words_are_refused(given, match):
    with pytest.raises(UsageError, match=match):
        origins.parse(given)


# --- Secrets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HF_HOME", "HF_TOKEN_PATH", "XDG_CACHE_HOME", "KAGGLE_USERNAME", "KAGGLE_KEY",
                 "KAGGLE_API_TOKEN", "KAGGLE_CONFIG_DIR"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_hub_s_token_is_found_where_its_own_tools_keep_it(home, monkeypatch):
    with pytest.raises(UsageError, match="https://huggingface.co/settings/tokens"):
        origins.secret(HF, lambda question: " ")
    assert origins.secret(HF, lambda question: "hf_asked\n") == {"token": "hf_asked"}
    put(home / ".cache/huggingface/token", "hf_file\n")
    assert origins.secret(HF, nobody) == {"token": "hf_file"}
    put(home / "other/token", "hf_home")
    monkeypatch.setenv("HF_HOME", str(home / "other"))
    assert origins.secret(HF, nobody) == {"token": "hf_home"}
    monkeypatch.setenv("HF_TOKEN", "hf_variable")
    assert origins.secret(HF, nobody) == {"token": "hf_variable"}


def test_kaggle_s_key_is_found_where_its_own_tools_keep_it(home, monkeypatch):
    kaggle, pair = origins.parse(["kaggle"]), {"username": "me", "key": "k"}
    with pytest.raises(UsageError, match="https://www.kaggle.com/settings"):
        origins.secret(kaggle, lambda question: "")
    with pytest.raises(UsageError, match=r"kaggle.json has no"):
        origins.secret(kaggle, lambda question: "{}")
    assert origins.secret(kaggle, lambda question: "me:k") == pair
    assert origins.secret(kaggle, lambda question: json.dumps(pair)) == pair
    assert origins.secret(kaggle, lambda question: "KGAT_1") == {"token": "KGAT_1"}
    put(home / ".kaggle/access_token", "KGAT_file\n")
    assert origins.secret(kaggle, nobody) == {"token": "KGAT_file"}
    put(home / ".kaggle/kaggle.json", json.dumps(pair))
    assert origins.secret(kaggle, nobody) == pair
    put(home / "config/kaggle.json", json.dumps({"username": "you", "key": "k"}))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(home / "config"))
    assert origins.secret(kaggle, nobody) == {"username": "you", "key": "k"}
    monkeypatch.setenv("KAGGLE_USERNAME", "her")
    monkeypatch.setenv("KAGGLE_KEY", "key")
    assert origins.secret(kaggle, nobody) == {"username": "her", "key": "key"}
    monkeypatch.setenv("KAGGLE_API_TOKEN", "KGAT_variable")
    assert origins.secret(kaggle, nobody) == {"token": "KGAT_variable"}


def test_links_are_the_secret_and_s3_has_none():
    assert origins.secret(origins.parse(LINKS), nobody) == {"links": LINKS}
    assert origins.secret(origins.parse(["s3://bucket"]), nobody) == {}
    assert "image-net" not in repr(origins.parse(LINKS))


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def test_the_hub_s_files_have_sizes_and_checksums_over_pages_and_the_token_stays_home(server):
    server.broken_tree = 1
    files = origins.listing(HF, TOKEN, None)
    assert [file.name for file in files] == sorted(SHARDS)
    assert [file.bytes for file in files] == [len(server.files[name]) for name in sorted(SHARDS)]
    assert all(len(file.sha256) == 64 for file in files)
    assert server.asked == [(SHARDS[0], 0, 0)]
    assert server.strangers == 0


def test_what_the_hub_refuses_is_one_line(server):
    refused(UsageError, "does not take the token", HF, {"token": "hf_wrong"}, None)
    refused(UsageError, "does not take the token.*accept the terms", HF, {}, None)
    server.gated = True
    line = refused(UsageError, "accept its terms", HF, TOKEN, None)
    assert f"{server.url}/datasets/{origins.DATASET}" in line
    server.gated = False
    refused(UsageError, "has no file list of no/body", origins.parse(["hf:no/body"]), TOKEN, None)
    server.broken_tree = 9
    refused(RunError, "status 503; try again later", HF, TOKEN, None)
    server.broken_tree = 0
    del server.files[SHARDS[2]]
    refused(UsageError, "lacks 1 of 4 files: train-00002-of-00004", HF, TOKEN, None)
    server.files = {name: b"data" for name in SHARDS[:4]}
    refused(UsageError, r"has no validation-\*.parquet", HF, TOKEN, None)


def test_a_network_that_is_down_is_one_line(monkeypatch, server):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused(RunError, "cannot reach Hugging Face.*refused; look after the network", HF, TOKEN, None)
    monkeypatch.setenv("HF_ENDPOINT", "http://no-such-host.invalid")
    refused(RunError, "cannot reach Hugging Face", HF, TOKEN, None)


def test_credentials_do_not_follow_to_another_host(server):
    server.files["a"] = b"12345"
    url = f"{server.url}/datasets/{origins.DATASET}/resolve/main/a"
    with ranges.ask(url, f"Bearer {hub.TOKEN}", 1, 3) as answer:
        assert ranges.read(answer, 9) == b"234"
        assert ranges.span(answer) == (1, 5)
    assert server.strangers == 0


# --- Kaggle ----------------------------------------------------------------------------------------------------------

KAGGLE, PAIR = origins.parse(["kaggle"]), {"username": hub.USER, "key": hub.KEY}


@pytest.mark.parametrize("secret", [PAIR, {"token": hub.KAGGLE_TOKEN}])
def test_kaggle_s_files(server, secret):
    names = [origins.KAGGLE_ARCHIVE, *origins.KAGGLE_TABLES]
    server.files = {name: b"x" * (40 + k) for k, name in enumerate(names)}
    assert [(file.name, file.bytes) for file in origins.listing(KAGGLE, secret, None)] == list(
        zip(names, (40, 41, 42), strict=True)
    )
    assert server.strangers == 0


def test_what_kaggle_refuses_is_one_line(server):
    server.files = {origins.KAGGLE_ARCHIVE: b"x" * 40}
    refused(UsageError, "Kaggle does not take the token", KAGGLE, {"token": "KGAT_wrong"}, None)
    refused(UsageError, r"Kaggle has no LOC_val_solution.csv", KAGGLE, PAIR, None)
    server.unaccepted = True
    line = refused(UsageError, "accept the rules", KAGGLE, PAIR, None)
    assert f"https://www.kaggle.com/competitions/{hub.COMPETITION}/rules" in line


# --- Links -----------------------------------------------------------------------------------------------------------


def linked(server):
    server.files = {name: name.encode() for name in TARS}
    links = server.links(*TARS[:2])
    return origins.parse(["links"]), origins.secret(origins.parse(links), nobody)


def test_links_lead_to_the_tars_and_to_the_devkit_beside_them(server):
    files = origins.listing(*linked(server), None)
    assert [file.name for file in files] == list(TARS)
    assert all(file.mark.startswith('"') and file.ranged for file in files)
    assert "/links/" not in repr(files)


def test_links_that_do_not_lead_there_are_one_line(server, monkeypatch):
    request = (*linked(server), None)
    server.page = "<html>Please log in</html>"
    refused(
        UsageError, "a web page came instead of ILSVRC2012_img_train.tar; log in at https://image-net.org", *request
    )
    server.page = None
    del server.files[origins.DEVKIT]
    refused(UsageError, "the link to ILSVRC2012_devkit_t12.tar.gz leads to status 404", *request)
    request = (*linked(server), None)
    server.ranged = False
    assert not origins.listing(*request)[0].ranged
    monkeypatch.setattr(origins, "WHOLE", 10)
    refused(UsageError, "does not give parts of a file", *request)
    refused(UsageError, "the link to ILSVRC2012_img_train.tar is missing", origins.parse(["links"]), {}, None)


# --- S3 --------------------------------------------------------------------------------------------------------------


def fill(s3, prefix, *names):
    for name in names:
        s3.put_object(Bucket="bucket", Key=f"{prefix}/{name}", Body=b"x")
    return origins.parse([f"s3://bucket/{prefix}"]), {}, s3


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (TARS, TARS),
        ([f"deeper/{name}" for name in TARS], TARS),
        (SHARDS, sorted(SHARDS)),
        ([name.removeprefix("data/") for name in SHARDS], sorted(SHARDS)),
        ((origins.KAGGLE_ARCHIVE, "LOC_val_solution.csv"), [origins.KAGGLE_ARCHIVE, "LOC_val_solution.csv"]),
    ],
)
def test_s3_may_hold_any_form(s3, names, expected, request):
    files = origins.listing(*fill(s3, f"form-{abs(hash(request.node.name))}", *names, "readme.txt"))
    assert [file.name for file in files] == list(expected)
    assert all(file.mark and file.bytes == 1 and file.place.startswith("s3://bucket/form-") for file in files)


def test_s3_without_it_is_one_line(s3):
    refused(UsageError, "has neither ILSVRC2012_img_train.tar.*nor train-.*nor imagenet", *fill(s3, "empty", "a"))
    refused(UsageError, "lacks ILSVRC2012_img_val.tar, ILSVRC2012_devkit_t12.tar.gz", *fill(s3, "half", origins.TRAIN))
    refused(UsageError, "lacks LOC_val_solution.csv", *fill(s3, "table", origins.KAGGLE_ARCHIVE))
    refused(UsageError, "lacks 3 of 4 files", *fill(s3, "shards", SHARDS[0]))
    refused(UsageError, "there is no such bucket", origins.parse(["s3://no-such-bucket/x"]), {}, s3)


# --- A laptop --------------------------------------------------------------------------------------------------------


def test_a_laptop_needs_the_standard_library_and_boto3_alone():
    allowed = set(sys.stdlib_module_names) | {"rn50", "botocore", "boto3", "yaml"}
    for name in ("origins", "ranges"):
        for node in ast.walk(ast.parse(Path(ROOT, f"rn50/cloud/{name}.py").read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {module.partition(".")[0] for module in modules} <= allowed
    code = "import sys; from rn50.cloud import origins; print({'numpy', 'torch', 'boto3', 'cv2'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert said.stdout.strip() == "set()", said.stderr
