"""What a launch needs of an account: quota, image, network, bucket, role. `doctor` says what of it is missing."""

import hashlib
import json
from pathlib import Path

from rn50.cloud import store as cloud
from rn50.cloud.advice import ADVICE
from rn50.cloud.aws import TAG, aws_errors, command, once_ready, tags
from rn50.errors import RunError

AMI_PARAMETER = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
UBUNTU_PARAMETER = "/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id"
POLICIES = Path(__file__).with_name("policies.json")
# Service Quotas codes of vCPU limits, by family and market.
QUOTAS = {
    ("g", False): "L-DB2E81BA",
    ("g", True): "L-3819A6DF",
    ("p", False): "L-417A185B",
    ("p", True): "L-7212CCBC",
    ("p5", False): "L-417A185B",
    ("p5", True): "L-C4BD4855",
    ("standard", False): "L-1216C47A",
    ("standard", True): "L-34B43A08",
}
STANDARD = "acdhimrtz"
# The image's open kernel module begins with Turing; these have older GPUs.
TOO_OLD = ("g3", "p2", "p3")


def doctor(aws, args):
    """Say of everything a launch needs whether it is there, and what to do where it is not."""
    problems = 0
    for name, check in (
        ("credentials", check_credentials),
        ("region", check_region),
        ("quota", check_quota),
        ("image", check_image),
        ("network", check_network),
        ("bucket", check_bucket),
        ("betons", check_betons),
    ):
        try:
            with aws_errors():
                print(f"ok       {name}: {check(aws, args)}")
        except RunError as error:
            problems += 1
            print(f"PROBLEM  {name}: {error}")
    if problems:
        raise RunError(f"{problems} of these must be solved before a launch")
    print("a launch has what it needs")


def check_credentials(aws, args):
    return aws.client("sts").get_caller_identity()["Arn"]


def check_region(aws, args):
    filters = [{"Name": "instance-type", "Values": [args.instance]}]
    found = aws.client("ec2").describe_instance_type_offerings(Filters=filters)["InstanceTypeOfferings"]
    if not found:
        raise RunError(f"{aws.region} has no {args.instance}; choose another --region (the bucket should be there too)")
    return f"{aws.region} offers {args.instance}"


def check_quota(aws, args):
    needed, (what, code) = aws.published.vcpus(args.instance), quota_code(args.instance, args.spot)
    if code is None or needed is None:
        return f"not checked: no quota is known here for {args.instance}"
    value = quota_of(aws, args.instance, args.spot)
    if value is None:  # only a default is there, which the account may not have
        return f"not checked: AWS keeps no value of {what} for this account; see Service Quotas, {code}"
    if value < needed:
        raise RunError(
            f"{value:.0f} vCPUs of {what} are allowed in {aws.region} and {args.instance} has {needed}: ask for more "
            f"(hours to days) with: aws service-quotas request-service-quota-increase --service-code ec2 --quota-code "
            f"{code} --desired-value {needed} --region {aws.region}"
        )
    return f"{value:.0f} vCPUs of {what}, {args.instance} takes {needed}"


def quota_code(instance, spot):
    """(what, code) of the vCPU quota that an instance type counts to; the code is None where none is known."""
    first = instance[0]
    family = "g" if instance.startswith(("g", "vt")) else "p5" if instance.startswith("p5") else first
    family = "standard" if first in STANDARD else family
    return f"{'spot' if spot else 'on-demand'} {family.upper()} instances", QUOTAS.get((family, spot))


def quota_of(aws, instance, spot):
    """vCPUs that the account may have of the instance's kind, or None where AWS does not say."""
    _, code = quota_code(instance, spot)
    quotas = aws.client("service-quotas")
    try:
        return code and quotas.get_service_quota(ServiceCode="ec2", QuotaCode=code)["Quota"]["Value"]
    except quotas.exceptions.NoSuchResourceException:
        return None


def check_image(aws, args):
    image = find_image(aws, args)
    return f"{image['ImageId']} {image.get('Name', '')}".strip()


def check_network(aws, args):
    return f"default VPC with {len(subnets(aws))} subnets"


def check_bucket(aws, args):
    s3 = aws.client("s3")
    try:
        where = s3.get_bucket_location(Bucket=aws.bucket)["LocationConstraint"] or "us-east-1"
    except s3.exceptions.ClientError as error:
        code = error.response["Error"]["Code"]
        if code == "NoSuchBucket":
            raise RunError(
                f"there is no bucket {aws.bucket}: make it with: aws s3 mb s3://{aws.bucket} --region {aws.region}"
            ) from None
        if code == "AccessDenied":  # names are shared by all accounts
            raise RunError(
                f"{aws.bucket} is another account's bucket, or {ADVICE['AccessDenied']}: choose another name, or get it"
            ) from None
        raise
    where = "eu-west-1" if where == "EU" else where
    if where != aws.region:
        raise RunError(
            f"{aws.bucket} is in {where} and the region is {aws.region}: every staging would cost transfer; use "
            f"--region {where}, or a bucket there"
        )
    return f"{aws.bucket} in {where}"


def check_betons(aws, args):
    if not cloud.objects(aws.client("s3"), aws.bucket, f"{cloud.BETONS}/"):
        quota = quota_of(aws, "c6id.4xlarge", spot=False)
        if quota is not None and quota < 8:
            raise RunError(
                f"none yet, and {quota:.0f} vCPUs of on-demand standard instances are too few to convert: ask for 16 "
                f"of quota {QUOTAS['standard', False]}, or upload what write_dataset.py makes elsewhere"
            )
        return f"none yet: {command(aws, 'convert')} --from hf makes them (docs/ec2.md)"
    found = betons(aws, None)
    return f"{', '.join(name for name in found if name.endswith('.beton'))} ({sum(found.values()) / 1e9:.1f} GB)"


def betons(aws, rung):
    """{name: bytes} of what an instance will copy from the bucket; RunError where some of it is not there."""
    found = cloud.objects(aws.client("s3"), aws.bucket, f"{cloud.BETONS}/", strip=f"{cloud.BETONS}/")
    return {name: found[name] for name in cloud.wanted_betons(found, rung)}


def find_image(aws, args, parameter=AMI_PARAMETER):
    """The image to start: --ami, or the newest that `parameter` names; a dict of EC2's."""
    ami, ssm, ec2 = args.ami, aws.client("ssm"), aws.client("ec2")
    advice = "name one of that region with --ami: a Deep Learning Base AMI with NVIDIA's driver, Ubuntu 24.04, x86"
    if parameter == UBUNTU_PARAMETER:
        advice = "name one of that region with --ami: Ubuntu 24.04, x86"
    if ami is None and args.instance.startswith(TOO_OLD):
        raise RunError(f"the default image's NVIDIA driver does not know the GPU of {args.instance}: {advice}")
    if ami is None:
        try:
            ami = ssm.get_parameter(Name=parameter)["Parameter"]["Value"]
        except ssm.exceptions.ParameterNotFound:
            raise RunError(f"{aws.region} does not say which image is the newest: {advice}") from None
    try:
        found = ec2.describe_images(ImageIds=[ami])["Images"]
    except ec2.exceptions.ClientError as error:
        if not error.response["Error"]["Code"].startswith("InvalidAMIID"):
            raise
        found = []
    if not found:
        raise RunError(f"there is no image {ami} in {aws.region}: {advice}")
    return found[0]


def subnets(aws):
    """The default subnets of the default VPC, one a zone: others there may have no way to the internet."""
    ec2 = aws.client("ec2")
    vpcs = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    if not vpcs:
        raise RunError(
            f"{aws.region} has no default VPC: make it with: aws ec2 create-default-vpc --region {aws.region}"
        )
    filters = [{"Name": "vpc-id", "Values": [vpcs[0]["VpcId"]]}, {"Name": "default-for-az", "Values": ["true"]}]
    found = ec2.describe_subnets(Filters=filters)["Subnets"]
    if not found:
        raise RunError(
            f"the default VPC of {aws.region} has no default subnet: make one with: aws ec2 create-default-subnet "
            f"--availability-zone {aws.region}a --region {aws.region}"
        )
    return {subnet["AvailabilityZone"]: subnet for subnet in found}


def security_group(aws, zones):
    """A group without open ports in the default VPC, made once; its id."""
    ec2, vpc = aws.client("ec2"), next(iter(zones.values()))["VpcId"]
    filters = [{"Name": "group-name", "Values": ["rn50"]}, {"Name": "vpc-id", "Values": [vpc]}]
    found = ec2.describe_security_groups(Filters=filters)["SecurityGroups"]
    if found:
        if found[0]["IpPermissions"]:
            raise RunError(f"security group {found[0]['GroupId']} (rn50) has open ports: close them, or delete it")
        return found[0]["GroupId"]
    made = ec2.create_security_group(
        GroupName="rn50",
        Description="rn50 training: no inbound port",
        VpcId=vpc,
        TagSpecifications=[{"ResourceType": "security-group", "Tags": tags(TAG)}],
    )["GroupId"]
    aws.note(f"security group {made}")
    return made


def role_name(bucket):
    """The name of a bucket's role and of its profile, its topic, and what its groups' names begin with."""
    return f"rn50-{hashlib.sha256(bucket.encode()).hexdigest()[:10]}"


def converter_name(bucket):
    """The name of the role that converts: it may write the betons, which no training needs to."""
    return f"{role_name(bucket)}-convert"


def secret_name(bucket):
    """The SSM parameter that holds a conversion's token while it lasts."""
    return f"/rn50/{role_name(bucket)}/conversion"


def policy(kind, bucket, source=None):
    """The policy document `instance`, `converter` or `user` of policies.json, for a bucket.

    source: bucket/prefix that a conversion reads, where it does not read from the web.
    """
    document = json.loads(POLICIES.read_text())[kind]
    if kind == "converter" and source is None:
        document["Statement"] = [s for s in document["Statement"] if not s["Sid"].startswith("TheOrigin")]
    text = json.dumps(document).replace("BUCKET", bucket).replace("ROLE", role_name(bucket))
    origin, _, prefix = (source or "").partition("/")
    return text.replace("SOURCE/PREFIX", f"{origin}/{prefix}").replace("SOURCE", origin)


def instance_profile(aws, record):
    """The role of a run's instances and its profile, made once; its name."""
    converts = record.get("kind") == "conversion"
    iam, name = aws.client("iam"), (converter_name if converts else role_name)(aws.bucket)
    trust = {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}
    trust = json.dumps({"Version": "2012-10-17", "Statement": [trust]})
    try:
        iam.get_role(RoleName=name)
    except iam.exceptions.NoSuchEntityException:
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=trust, Tags=tags(TAG))
        aws.note(f"role {name}")
    document = policy("converter" if converts else "instance", aws.bucket, record.get("source"))
    once_ready(iam.put_role_policy, "NoSuchEntity", RoleName=name, PolicyName="rn50", PolicyDocument=document)
    try:
        profile = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]
    except iam.exceptions.NoSuchEntityException:
        profile = iam.create_instance_profile(InstanceProfileName=name, Tags=tags(TAG))["InstanceProfile"]
        aws.note(f"instance profile {name}")
    if not profile["Roles"]:
        once_ready(iam.add_role_to_instance_profile, "NoSuchEntity", InstanceProfileName=name, RoleName=name)
    return name
