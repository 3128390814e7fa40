"""What an instance copies before it trains, and the commands of docs/ec2.md."""

import re
from types import SimpleNamespace

import pytest

from rn50.cloud import cleanup, status, watch
from rn50.cloud import launch as launching
from rn50.cloud import store as cloud
from rn50.errors import RunError
from tests import hub
from tests.cloud.helpers import BUCKET, IMAGE, alive, put, put_betons, quota, replaced, stub
from tests.conftest import ROOT
from tests.data.test_imagenet import make_images, make_parquet
from tools import ec2


def test_staging_takes_what_the_run_needs_and_checks_it(cloud_account, tmp_path, betons, capsys):
    for path in betons.iterdir():
        put(cloud_account, f"rn50/betons/{path.name}", path.read_bytes())
    cloud.stage(cloud_account.s3, BUCKET, tmp_path, rung=64)
    names = {f"{stem}.{kind}" for stem in ("train_64", "val_64", "val_96") for kind in ("beton", "json")}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "train_64.beton").read_bytes() == (betons / "train_64.beton").read_bytes()
    before = (tmp_path / "train_64.beton").stat().st_mtime_ns
    cloud.stage(cloud_account.s3, BUCKET, tmp_path, rung=None)
    assert (tmp_path / "train_64.beton").stat().st_mtime_ns == before
    assert (tmp_path / "train_96.beton").exists()
    damaged = bytearray((betons / "val_64.beton").read_bytes())
    damaged[100] ^= 1
    put(cloud_account, "rn50/betons/val_64.beton", bytes(damaged))
    (tmp_path / "val_64.beton").unlink()
    with pytest.raises(RunError, match="val_64.beton is not what its manifest says"):
        cloud.stage(cloud_account.s3, BUCKET, tmp_path, rung=64)
    assert not list(tmp_path.glob("val_64.beton*"))
    assert "arrived damaged; once more" in capsys.readouterr().out


def test_staging_says_what_is_not_there_or_does_not_fit(cloud_account, tmp_path, monkeypatch):
    with pytest.raises(RunError, match="there is no train_400.beton"):
        cloud.stage(cloud_account.s3, BUCKET, tmp_path, rung=400)
    for name in ("train_400.beton", "val_400.beton", "val_400.json"):
        put(cloud_account, f"rn50/betons/{name}", b"x" * 1000)
    with pytest.raises(RunError, match="train_400.beton has no manifest"):
        cloud.stage(cloud_account.s3, BUCKET, tmp_path, rung=400)
    put(cloud_account, "rn50/betons/train_400.json", b"{}")
    monkeypatch.setattr(cloud.shutil, "disk_usage", lambda path: SimpleNamespace(free=1500))
    with pytest.raises(RunError, match="the betons take"):
        cloud.stage(cloud_account.s3, BUCKET, tmp_path, rung=400)


@pytest.mark.parametrize(
    ("page", "actions"),
    [
        ("docs/ec2.md", "doctor convert launch launch status stop resume fetch clean"),
        ("README.md", "doctor convert launch launch status clean"),
    ],
)
def test_every_command_of_the_page_runs(cloud_account, monkeypatch, tmp_path, capsys, page, actions):
    text = (ROOT / page).read_text().replace("BUCKET", BUCKET)
    blocks = re.findall(r"```\n(.*?)```", text, re.S)
    lines = [line.partition("#")[0].split() for block in blocks for line in block.splitlines()]
    commands = [words[2:] for words in lines if words[1:2] == ["tools/ec2.py"]]
    assert [words[0] for words in commands] == actions.split()
    put_betons(cloud_account, 400)
    stub(monkeypatch, cloud_account, {"service-quotas": quota(16.0)})

    def parameter(own, Name, **options):
        return own(Name=Name, **options) if Name.startswith("/rn50/") else {"Parameter": {"Value": IMAGE}}

    replaced(monkeypatch, "ssm", get_parameter=parameter)
    make_parquet(tmp_path / "hf", make_images())
    monkeypatch.setenv("HF_TOKEN", hub.TOKEN)
    # a screen is renewed until the run is over, which it never is here
    monkeypatch.setattr(status.watch, "watch", lambda read, seconds: print("\n".join(watch.screen(read()))))
    monkeypatch.setattr(launching, "pinned_commit", lambda name: launching.git("rev-parse", "HEAD").decode().strip())
    monkeypatch.setattr(cleanup, "STOP_PATIENCE", 0.1)
    monkeypatch.setattr("builtins.input", lambda question: "yes")
    monkeypatch.chdir(tmp_path)
    with hub.Origins() as server:
        server.files = {f"data/{path.name}": path.read_bytes() for path in (tmp_path / "hf" / "data").iterdir()}
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        for words in commands:
            ec2.main(words)
            if words[0] == "convert":
                ec2.main(["stop", "--bucket", BUCKET, "--run", "convert"])
    assert (tmp_path / "runs" / "rn50_78" / "launch.json").exists() == ("fetch" in actions)
    assert alive(cloud_account) == []


def test_the_first_launch_that_the_page_advises_is_not_refused(cloud_account, monkeypatch, capsys):
    """A small budget for the whole recipe: refused without the setting that docs/ec2.md gives with it, not with it."""
    put_betons(cloud_account, 400)
    page = (ROOT / "docs" / "ec2.md").read_text()
    advice = re.search(r"`(--budget 2 [^`]*)`", page)[1].split()
    flags = ["launch", "--bucket", BUCKET, "--config", "rn50_configs/rn50_78.yaml", "--instance", "g5.xlarge"]
    flags += ["--ami", IMAGE, "--commit", "HEAD", "--yes"]
    with pytest.raises(RunError, match="is projected to cost"):
        ec2.main([*flags, "--budget", "2"])
    ec2.main([*flags, *advice])
    assert "budget $2.00" in capsys.readouterr().out
    assert len(alive(cloud_account)) == 1
