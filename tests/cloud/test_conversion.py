"""tools/ec2.py convert: from a token on the laptop to betons in the bucket, and nothing left of the token."""

import json
import re
import time

import pytest

from rn50.cloud import account as accounts
from rn50.cloud import conversion
from rn50.errors import RunError, UsageError
from tests import hub
from tests.cloud.helpers import BUCKET, IMAGE, alive, only_instance, put, quota, refused, stub, user_data
from tests.cloud.machine import Machine, committed
from tests.data.test_imagenet import make_images, make_parquet
from tests.services import Metadata
from tools import ec2

SETTINGS = ["--set=source.counts=any", "--set=out.resolutions=48,70", "--set=out.workers=2"]
CONVERT = ["convert", "--bucket", BUCKET, "--ami", IMAGE, "--yes", "--commit", "HEAD", "--instance", "c6id.4xlarge"]


@pytest.fixture
def origin(monkeypatch, tmp_path):
    """The Hub with a miniature ImageNet, and a token in the environment."""
    make_parquet(tmp_path / "hf", make_images())
    with hub.Origins() as server:
        server.files = {f"data/{path.name}": path.read_bytes() for path in (tmp_path / "hf" / "data").iterdir()}
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", hub.TOKEN)
        yield server


def parameters(account):
    return [found["Name"] for found in account.ssm.describe_parameters()["Parameters"]]


def everything(account):
    """All that the account keeps but the parameter, as text."""
    texts = [json.dumps(account.ec2.describe_instances(), default=str)]
    texts += [user_data(account, instance) for instance in alive(account)]
    for entry in account.s3.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        body = account.s3.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read()
        texts += [entry["Key"], body.decode(errors="replace")]
    return "\n".join(texts)


def test_one_command_fetches_converts_verifies_and_uploads(cloud_account, moto, origin, tmp_path, capsys):
    command = [*CONVERT[:-3], committed(), *SETTINGS, *CONVERT[-2:], "--from", "hf"]
    with Metadata() as metadata:
        metadata.instance_type = "c6id.4xlarge"
        ec2.main(command)
        said = capsys.readouterr().out
        assert re.search(r"hf:ILSVRC/imagenet-1k: \d files, 0\.0 GB \(.*\), all there", said)
        assert re.search(r"on one c6id.4xlarge, on demand, us-east-1: \$0\.806/h", said)
        assert re.search(r"a million images, .*: c6id\.\dxlarge \$0\.\d\d, c6id\.\dxlarge \$\d\.\d\d, ", said)
        assert re.search(r"projected: \d\.\d h \(.*\), \$\d\.\d\d", said)
        instance = only_instance(cloud_account)
        assert instance["InstanceType"] == "c6id.4xlarge"
        assert instance["IamInstanceProfile"]["Arn"].endswith(accounts.converter_name(BUCKET))
        assert parameters(cloud_account) == [accounts.secret_name(BUCKET)]
        assert hub.TOKEN not in said + everything(cloud_account)
        ec2.main(["status", "--bucket", BUCKET, "--run", "convert"])
        assert "nothing is fetched yet" in capsys.readouterr().out
        with pytest.raises(RunError, match="convert has an instance already"):
            ec2.main(command)

        machine = Machine(tmp_path / "one", user_data(cloud_account, instance), moto, metadata, instance["InstanceId"])
        machine.environment["HF_ENDPOINT"] = origin.url
        machine.start()
        machine.wait_for("shutdown -h now", "did")
    assert "finished: train, val are in" in machine.log("journal"), machine.everything()
    keys = {entry["Key"] for entry in cloud_account.s3.list_objects_v2(Bucket=BUCKET)["Contents"]}
    made = {f"rn50/betons/{s}_{px}.{kind}" for s in ("train", "val") for px in (48, 70) for kind in ("beton", "json")}
    assert {key for key in keys if key.startswith("rn50/betons/")} == made
    assert not [key for key in keys if key.startswith(("rn50/source", "rn50/partial"))]
    assert parameters(cloud_account) == []
    kept = everything(cloud_account) + machine.everything() + machine.log("etc/rn50.env")
    assert hub.TOKEN not in kept
    assert origin.strangers == 0
    cloud_account.ec2.terminate_instances(InstanceIds=[instance["InstanceId"]])
    capsys.readouterr()
    ec2.main(["status", "--bucket", BUCKET, "--run", "convert"])
    out = capsys.readouterr().out
    assert re.search(r"uploading val: 100% of 0\.0 GB|uploading train: 100% of 0\.0 GB", out)
    assert "last command: finished (train, val are in s3://bucket/rn50/betons/) at step 32" in out
    with pytest.raises(RunError, match="ImageNet is converted already"):
        ec2.main(command)
    # and what was made is what a launch looks for
    assert accounts.betons(type("Aws", (), {"client": lambda self, _: cloud_account.s3, "bucket": BUCKET})(), 70)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"gated": True}, r"accept its terms at http\S+/datasets/ILSVRC/imagenet-1k"),
        ({"token": "hf_wrong"}, r"token"),
        ({"files": {}}, r"has no train-\*.parquet"),
    ],
)
def test_what_can_be_known_beforehand_is_one_line_before_anything_is_made(
    cloud_account, origin, monkeypatch, change, problem
):
    if "token" in change:
        monkeypatch.setenv("HF_TOKEN", change["token"])
    else:
        vars(origin).update(change)
    with pytest.raises((RunError, UsageError), match=problem) as caught:
        ec2.main([*CONVERT, *SETTINGS, "--from", "hf"])
    assert "\n" not in str(caught.value)
    assert change.get("token", hub.TOKEN) not in str(caught.value)
    assert alive(cloud_account) == []
    assert parameters(cloud_account) == []
    assert cloud_account.iam.list_roles()["Roles"] == []


def test_nothing_is_made_without_a_yes_and_the_token_may_be_typed(cloud_account, origin, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "none"))
    asked = []
    monkeypatch.setattr(conversion.getpass, "getpass", lambda prompt: asked.append(prompt) or hub.TOKEN)
    monkeypatch.setattr("builtins.input", lambda prompt: "no")
    with pytest.raises(RunError, match="nothing was launched"):
        ec2.main([word for word in CONVERT if word != "--yes"] + [*SETTINGS, "--from", "hf"])
    assert len(asked) == 1
    assert alive(cloud_account) == []
    assert parameters(cloud_account) == []
    assert hub.TOKEN not in capsys.readouterr().out


def test_a_conversion_that_was_interrupted_goes_on_and_its_dollars_count_together(cloud_account, origin, capsys):
    ec2.main([*CONVERT, *SETTINGS, "--from", "hf", "--budget", "5"])
    first = only_instance(cloud_account)
    now = time.time()
    record = {"instance_id": first["InstanceId"], "started": now - 3600, "seen": now, "dollars_per_hour": 0.8064}
    put(cloud_account, f"rn50/runs/convert/instances/{first['InstanceId']}.json", record | {"state": "converting"})
    cloud_account.ec2.terminate_instances(InstanceIds=[first["InstanceId"]])
    capsys.readouterr()
    ec2.main(["status", "--bucket", BUCKET, "--run", "convert"])
    assert (
        f"it was taken away: go on with .venv/bin/python tools/ec2.py convert --bucket {BUCKET}"
        in capsys.readouterr().out
    )
    with pytest.raises(UsageError, match="a conversion goes on with: .* convert"):
        ec2.main(["resume", "--bucket", BUCKET, "--run", "convert", "--yes"])
    with pytest.raises(RunError, match=r"\$0\.81 of \$0\.50 are spent"):
        ec2.main([*CONVERT, *SETTINGS, "--from", "hf", "--budget", "0.5"])
    ec2.main([*CONVERT, *SETTINGS, "--from", "hf", "--budget", "5"])
    assert "it ends at $5.00, of which $0.81 are spent" in capsys.readouterr().out
    second = only_instance(cloud_account)
    assert second["ClientToken"] != first["ClientToken"]
    minutes = int(re.search(r"RN50_MINUTES=(\d+)", user_data(cloud_account, second))[1])
    assert minutes == int(60 * (5 - 0.8064) / 0.8064)


def test_the_cheapest_type_that_the_quota_allows_converts(cloud_account, origin, monkeypatch, capsys):
    command = [*CONVERT[:-2], *SETTINGS, "--from", "hf"]
    with monkeypatch.context() as patch:
        stub(patch, cloud_account, {"service-quotas": quota(5.0)})
        with pytest.raises(
            RunError, match="5 vCPUs of on-demand standard instances are allowed.*--quota-code L-1216C47A"
        ):
            ec2.main(command)
    stub(monkeypatch, cloud_account, {"service-quotas": quota(32.0)})
    ec2.main(command)
    assert only_instance(cloud_account)["InstanceType"] == "c6id.2xlarge"


def test_stop_and_clean_know_a_conversion(cloud_account, origin, capsys, monkeypatch):
    ec2.main([*CONVERT, *SETTINGS, "--from", "hf"])
    for key in ("rn50/source/data/train.parquet/0", "rn50/partial/train.journal"):
        put(cloud_account, key, b"x")
    ec2.main(["clean", "--bucket", BUCKET, "--yes"])
    out = capsys.readouterr().out
    for what in ("SSM parameter /rn50/", "-convert", "1 objects, 0.00 GB, in s3://bucket/rn50/source/"):
        assert f"removed {what}" in out or f"{what}\n" in out
    assert parameters(cloud_account) == []
    assert alive(cloud_account) == []
    assert cloud_account.iam.list_roles()["Roles"] == []
    assert "NoSuchKey" in refused(cloud_account, "rn50/source/data/train.parquet/0")


def test_a_run_may_not_have_the_conversions_name(cloud_account):
    with pytest.raises(UsageError, match="convert is what the conversion is called"):
        ec2.main(
            ["launch", "--bucket", BUCKET, "--config", "rn50_configs/demo.yaml", "--budget", "5", "--run", "convert"]
        )
