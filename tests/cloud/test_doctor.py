"""tools/ec2.py doctor, and the price: what moto lacks is stubbed with botocore's own Stubber."""

import json

import pytest

from rn50.errors import RunError, UsageError
from tests.cloud.helpers import BUCKET, price, put_betons, quota, stub, with_image
from tools import ec2


def test_doctor_passes_where_everything_is_there(cloud_account, monkeypatch, capsys):
    put_betons(cloud_account, 400)
    stub(monkeypatch, cloud_account, {"service-quotas": quota(8.0), "ssm": with_image(cloud_account)})
    ec2.main(["doctor", "--bucket", BUCKET, "--instance", "g5.2xlarge", "--spot"])
    out = capsys.readouterr().out
    assert out.count("ok ") == 7
    assert "8 vCPUs of spot G instances, g5.2xlarge takes 8" in out
    assert "a launch has what it needs" in out


def test_a_quota_that_aws_keeps_no_value_of_is_no_problem(cloud_account, monkeypatch, capsys):
    put_betons(cloud_account, 400)
    missing = ("get_service_quota", "NoSuchResourceException")
    stub(monkeypatch, cloud_account, {"service-quotas": missing, "ssm": with_image(cloud_account)})
    ec2.main(["doctor", "--bucket", BUCKET, "--instance", "p5.4xlarge", "--spot"])
    assert "not checked: AWS keeps no value of spot P5 instances" in (out := capsys.readouterr().out)
    assert "L-C4BD4855" in out


def test_doctor_says_what_to_do_about_each_problem(cloud_account, monkeypatch, capsys):
    stub(monkeypatch, cloud_account, {"service-quotas": quota(0.0), "ssm": ("get_parameter", "ParameterNotFound")})
    with pytest.raises(RunError, match="4 of these must be solved"):
        ec2.main(["doctor", "--bucket", "not-there", "--instance", "g5.xlarge"])
    out = capsys.readouterr().out
    assert "--quota-code L-DB2E81BA --desired-value 4 --region us-east-1" in out
    assert "aws s3 mb s3://not-there --region us-east-1" in out
    assert "PROBLEM  image: us-east-1 does not say which image is the newest: name one of that region with --ami" in out
    assert "PROBLEM  betons: AWS refuses ListObjectsV2 (NoSuchBucket)" in out


def test_doctor_knows_other_regions_images_networks_and_empty_buckets(cloud_account, monkeypatch, capsys):
    stub(monkeypatch, cloud_account, {"service-quotas": quota(8.0)})
    for subnet in cloud_account.ec2.describe_subnets()["Subnets"]:
        cloud_account.ec2.delete_subnet(SubnetId=subnet["SubnetId"])
    flags = ["doctor", "--bucket", BUCKET, "--ami", "ami-00000000"]
    with pytest.raises(RunError, match="3 of these must be solved"):
        ec2.main([*flags, "--instance", "g9.huge"])
    out = capsys.readouterr().out
    assert "PROBLEM  region: us-east-1 has no g9.huge; choose another --region" in out
    assert "PROBLEM  image: there is no image ami-00000000 in us-east-1: name one of that region with --ami" in out
    assert (
        "PROBLEM  network: the default VPC of us-east-1 has no default subnet: make one with: aws ec2 create-def" in out
    )
    assert "ok       betons: none yet: " in out
    assert f"tools/ec2.py convert --bucket {BUCKET} --from hf makes them" in out
    for vpc in cloud_account.ec2.describe_vpcs()["Vpcs"]:
        cloud_account.ec2.delete_vpc(VpcId=vpc["VpcId"])
    with pytest.raises(RunError, match="3 of these must be solved"):
        ec2.main([*flags, "--instance", "g9.huge"])
    assert "aws ec2 create-default-vpc --region us-east-1" in capsys.readouterr().out


def test_doctor_without_credentials_or_region(monkeypatch, moto, capsys, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto.url)
    with pytest.raises(UsageError, match="no region is set"):
        ec2.main(["doctor", "--bucket", BUCKET])
    with pytest.raises(RunError, match="7 of these"):
        ec2.main(["doctor", "--bucket", BUCKET, "--region", "us-east-1"])
    assert "there are no AWS credentials: aws configure" in capsys.readouterr().out


def test_the_price_is_asked_for_and_else_taken_from_the_table(cloud_account, monkeypatch):
    offer = {"terms": {"OnDemand": {"a": {"priceDimensions": {"b": {"pricePerUnit": {"USD": "1.3000000000"}}}}}}}
    reserved = json.dumps(offer).replace("1.3000000000", "0.0000000000")  # capacity that was bought ahead
    listed = {"pricing": ("get_products", {"PriceList": [reserved, json.dumps(offer)]})}
    assert price(monkeypatch, cloud_account, listed) == ({"us-east-1a": 1.3, "us-east-1b": 1.3}, "AWS Pricing API")
    refused = {"pricing": ("get_products", "AccessDeniedException")}
    prices, source = price(monkeypatch, cloud_account, refused, zones=["us-east-1a"])
    assert prices == {"us-east-1a": 1.212}
    assert "costs.csv" in source
    history = [("us-east-1b", "0.41"), ("us-east-1b", "0.5"), ("us-east-1a", "0.45")]  # newest first
    history = [{"InstanceType": "g5.2xlarge", "AvailabilityZone": z, "SpotPrice": dollars} for z, dollars in history]
    answers = {"ec2": ("describe_spot_price_history", {"SpotPriceHistory": history})}
    found = price(monkeypatch, cloud_account, answers, spot=True)
    assert found == ({"us-east-1a": 0.45, "us-east-1b": 0.41}, "spot prices of now")
    with pytest.raises(RunError, match="no price is known for x9.large"):
        price(monkeypatch, cloud_account, refused, instance="x9.large")
