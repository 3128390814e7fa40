"""What a launch needs of an account: quota, image, network, bucket, role. `doctor` says what of it is missing."""

import hashlib
import json
from pathlib import Path

from rn50.cloud import store as cloud
from rn50.cloud.aws import ADVICE, TAG, aws_errors, once_ready, tags
from rn50.errors import RunError

AMI_PARAMETER = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
POLICIES = Path(__file__).with_name("policies.json")
# Service Quotas codes of vCPU limits, by family and market.
QUOTAS = {
    ("g", False): "L-DB2E81BA",
    ("g", True): "L-3819A6DF",
    ("p", False): "L-417A185B",
    ("p", True): "L-7212CCBC",
    ("p5", False): "L-417A185B",
    ("p5", True): "L-C4BD4855",
}
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
    family = (
        "g" if args.instance.startswith(("g", "vt")) else "p5" if args.instance.startswith("p5") else args.instance[0]
    )
    code = QUOTAS.get((family, args.spot))
    needed = aws.published.vcpus(args.instance)
    if code is None or needed is None:
        return f"not checked: no quota is known here for {args.instance}"
    what = f"{'spot' if args.spot else 'on-demand'} {family.upper()} instances"
    quotas = aws.client("service-quotas")
    try:
        value = quotas.get_service_quota(ServiceCode="ec2", QuotaCode=code)["Quota"]["Value"]
    except quotas.exceptions.NoSuchResourceException:  # only a default is there, which the account may not have
        return f"not checked: AWS keeps no value of {what} for this account; see Service Quotas, {code}"
    if value < needed:
        raise RunError(
            f"{value:.0f} vCPUs of {what} are allowed in {aws.region} and {args.instance} has {needed}: ask for more "
            f"(hours to days) with: aws service-quotas request-service-quota-increase --service-code ec2 --quota-code "
            f"{code} --desired-value {needed} --region {aws.region}"
        )
    return f"{value:.0f} vCPUs of {what}, {args.instance} takes {needed}"


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
    found = betons(aws, None)
    return f"{', '.join(name for name in found if name.endswith('.beton'))} ({sum(found.values()) / 1e9:.1f} GB)"


def betons(aws, rung):
    """{name: bytes} of what an instance will copy from the bucket; RunError where some of it is not there."""
    found = cloud.objects(aws.client("s3"), aws.bucket, f"{cloud.BETONS}/", strip=f"{cloud.BETONS}/")
    return {name: found[name] for name in cloud.wanted_betons(found, rung)}


def find_image(aws, args):
    """The image to start: --ami, or the newest Deep Learning Base image; a dict of EC2's."""
    ami, ssm, ec2 = args.ami, aws.client("ssm"), aws.client("ec2")
    advice = "name one of that region with --ami: a Deep Learning Base AMI with NVIDIA's driver, Ubuntu 24.04, x86"
    if ami is None and args.instance.startswith(TOO_OLD):
        raise RunError(f"the default image's NVIDIA driver does not know the GPU of {args.instance}: {advice}")
    if ami is None:
        try:
            ami = ssm.get_parameter(Name=AMI_PARAMETER)["Parameter"]["Value"]
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
    """The name of the role and of its profile for a bucket."""
    return f"rn50-{hashlib.sha256(bucket.encode()).hexdigest()[:10]}"


def policy(kind, bucket):
    """The policy document `instance` or `user` of policies.json, for a bucket."""
    text = json.dumps(json.loads(POLICIES.read_text())[kind])
    return text.replace("BUCKET", bucket)


def instance_profile(aws):
    """The role that may use the bucket's part and Session Manager, and its profile, made once; its name."""
    iam, name = aws.client("iam"), role_name(aws.bucket)
    trust = {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}
    trust = json.dumps({"Version": "2012-10-17", "Statement": [trust]})
    try:
        iam.get_role(RoleName=name)
    except iam.exceptions.NoSuchEntityException:
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=trust, Tags=tags(TAG))
        aws.note(f"role {name}")
    document = policy("instance", aws.bucket)
    once_ready(iam.put_role_policy, "NoSuchEntity", RoleName=name, PolicyName="rn50", PolicyDocument=document)
    try:
        profile = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]
    except iam.exceptions.NoSuchEntityException:
        profile = iam.create_instance_profile(InstanceProfileName=name, Tags=tags(TAG))["InstanceProfile"]
        aws.note(f"instance profile {name}")
    if not profile["Roles"]:
        once_ready(iam.add_role_to_instance_profile, "NoSuchEntity", InstanceProfileName=name, RoleName=name)
    return name
