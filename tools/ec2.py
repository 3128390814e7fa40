"""One training run on one EC2 instance, from this machine: check, launch, watch, stop, resume, fetch, clean up.

    python tools/ec2.py doctor --bucket BUCKET --instance g5.2xlarge --spot
    python tools/ec2.py launch --bucket BUCKET --config rn50_configs/rn50_78.yaml --spot --budget 25
    python tools/ec2.py status --bucket BUCKET --run rn50_78       # also: stop, resume, fetch
    python tools/ec2.py clean  --bucket BUCKET                     # lists everything that is tagged, and removes it

Credentials and region are boto3's (aws configure, AWS_PROFILE, AWS_DEFAULT_REGION). The instance has no open port
(access by Session Manager), requires IMDSv2, has encrypted volumes and may use nothing but BUCKET/rn50. It terminates
itself when the run ends, the budget is spent, or nothing has happened for a while. docs/ec2.md tells the rest.
"""

import argparse
import contextlib
import hashlib
import json
import shlex
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a laptop has no need to install what trains

from rn50.cloud import store as cloud
from rn50.command import run
from rn50.errors import RunError, UsageError
from rn50.files import parse_rows
from rn50.planning import costs, speeds

ROOT = Path(__file__).resolve().parents[1]
TAG = {"project": "rn50"}
AMI_PARAMETER = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
POLICIES = Path(__file__).with_name("ec2_policies.json")
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
ALIVE = ("pending", "running", "stopping", "stopped")
ANY = (*ALIVE, "shutting-down", "terminated")  # EC2 shows a terminated one for an hour
# The image's own files and toolkits fill most of what its snapshot has.
ROOT_GIB, ROOM_GIB = 100, 40
# Setting up compiles ffcv and copies the betons: longer than this, it hangs.
SETUP_MINUTES = 120
# IAM is eventually consistent: what is new is not known at once to EC2, nor to IAM itself.
PROFILE_PATIENCE, STOP_PATIENCE, POLL_SECONDS = 120, 240, 5
JUST_ENDED = "; an instance that has just ended counts for some minutes more: then repeat the command"
NO_ROOM = ("InsufficientInstanceCapacity", "SpotMaxPriceTooLow", "Unsupported", "InsufficientFreeAddressesInSubnet")
ADVICE = {
    "UnauthorizedOperation": "your credentials may not do this: docs/ec2.md has the policy they need",
    "AccessDenied": "your credentials may not do this: docs/ec2.md has the policy they need",
    "AccessDeniedException": "your credentials may not do this: docs/ec2.md has the policy they need",
    "VcpuLimitExceeded": "ask for a higher vCPU quota (tools/ec2.py doctor says which)" + JUST_ENDED,
    "MaxSpotInstanceCountExceeded": "ask for a higher spot vCPU quota (tools/ec2.py doctor says which)" + JUST_ENDED,
    "AuthFailure.ServiceLinkedRoleCreationNotPermitted": "spot needs a role that your credentials may not make; an "
    "administrator makes it once: aws iam create-service-linked-role --aws-service-name spot.amazonaws.com",
    "ExpiredToken": "your credentials have expired: log in again",
    "RequestExpired": "your credentials have expired, or this machine's clock is wrong",
    "RequestTimeTooSkewed": "this machine's clock is wrong",
    "InvalidClientTokenId": "your credentials are not valid: aws configure",
    "AuthFailure": "your credentials are not valid: aws configure",
}


def main(argv=None):
    args = arguments(argv)
    with aws_errors():
        aws = Aws(args)
        ACTIONS[args.action](aws, args)


class Aws:
    """boto3's clients for one region, and what has been made so far."""

    def __init__(self, args):
        try:
            import boto3
        except ImportError:
            raise UsageError("tools/ec2.py needs boto3; install it with: pip install boto3") from None
        self.session = boto3.Session(region_name=args.region)
        self.region = self.session.region_name
        if not self.region:
            raise UsageError("no region is set: give --region, or set AWS_DEFAULT_REGION")
        self.bucket, self.made, self._clients = args.bucket, [], {}

    def client(self, name, region=None):
        if (name, region) not in self._clients:
            self._clients[name, region] = self.session.client(name, region_name=region or self.region)
        return self._clients[name, region]

    def note(self, what):
        self.made.append(what)
        print(f"  made {what}")

    def store(self, run):
        return cloud.Store(self.client("s3"), self.bucket, run)


@contextlib.contextmanager
def aws_errors():
    """botocore's errors as one line that says what to do."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except NoCredentialsError:
        raise RunError("there are no AWS credentials: aws configure, or set AWS_PROFILE") from None
    except ClientError as error:
        raise RunError(explain(error)) from None
    except (BotoCoreError, Boto3Error) as error:
        raise RunError(f"AWS cannot be reached or used: {error}") from None


def explain(error):
    code, operation = error.response["Error"]["Code"], error.operation_name
    advice = ADVICE.get(code) or error.response["Error"].get("Message", "")
    return f"AWS refuses {operation} ({code}): {advice}"


# --- doctor ----------------------------------------------------------------------------------------------------------


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
    needed = vcpus_of(args.instance)
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


def vcpus_of(instance):
    return next((int(row["vcpus"]) for row in costs.read_table().instance if row["name"] == instance), None)


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


# --- launch and resume -----------------------------------------------------------------------------------------------


def launch(aws, args):
    config = read_config(args.config)
    run = cloud.check_name("the run's name", args.run or config.get("logging", {}).get("run_name"))
    store = aws.store(run)
    before = store.read("launch.json")
    refuse_second(aws, run)
    if before and before["instance_id"]:
        raise RunError(
            f"{run} was launched before ({before['instance_id']}): go on with it by {command(aws, 'resume', run)}, "
            "or give this one another --run"
        )
    for setting in args.set:
        if "=" not in setting or setting.startswith("-"):
            raise UsageError(f"--set {setting} is not of the form section.key=value")
    record = {
        "run": run,
        "bucket": aws.bucket,
        "region": aws.region,
        "config": args.config,
        "settings": args.set,
        "commit": pinned_commit(args.commit),
        "instance": args.instance,
        "spot": args.spot,
        "budget": args.budget,
        "idle_minutes": args.idle_minutes,
        "attempt": 1,
        "instance_id": None,
    }
    start(aws, args, store, record, config)


def resume(aws, args):
    """Another instance for the run, which goes on from the checkpoint in the bucket."""
    store, record = known_run(aws, args)
    refuse_second(aws, args.run)
    found = store.read("status.json") or {}
    if found.get("status") == "finished":
        raise RunError(f"{args.run} is finished: get it with: {command(aws, 'fetch', args.run)}")
    # an instance that reported counts, too: its launch may have died before it could write the id
    record["attempt"] = max(record["attempt"] + bool(record["instance_id"]), len(store.instances()) + 1)
    record["instance_id"] = None
    record["budget"] = args.budget or record["budget"]
    record["instance"] = args.instance or record["instance"]
    record["spot"] = record["spot"] if args.on_demand is None else not args.on_demand
    args.instance, args.spot = record["instance"], record["spot"]
    spent = cloud.dollars(store.instances())
    if spent >= record["budget"]:
        raise RunError(f"${spent:.2f} of ${record['budget']:.2f} are spent: give a higher --budget")
    start(aws, args, store, record, read_config(record["config"]))


def start(aws, args, store, record, config):
    """Show the plan, ask, and make what is missing; what fails half-way is said with how to remove it."""
    check_bucket(aws, args)
    zones = subnets(aws)
    image = find_image(aws, args)
    prices, source = hourly_prices(aws, record["instance"], record["spot"], zones)
    record["dollars_per_hour"] = max(prices.values())
    spent = cloud.dollars(store.instances())
    text, projected = projection(record, config)
    print("\n".join(plan_lines(record, prices, source, spent, image, text)))
    if projected and not spent and projected > record["budget"]:
        raise RunError(
            f"the run is projected to cost ${projected:.2f} of a budget of ${record['budget']:.2f}, and the training "
            "would refuse to begin: give a higher --budget, a shorter recipe, or --set budget.allow_overrun=true"
        )
    betons(aws, cloud.rung_of(record, config))  # a set-up that is paid for would end without them
    if not args.yes and input("Type yes to launch: ").strip() != "yes":
        raise RunError("nothing was launched")
    try:
        if not record.get("code_sha256"):
            record["code_sha256"] = upload_code(aws, record["commit"])
        aws.client("s3").delete_object(Bucket=aws.bucket, Key=f"{store.prefix}/stop")
        group = security_group(aws, zones)
        profile = instance_profile(aws)
        store.write("launch.json", record)  # before the instance, which reads it
        instance = run_instance(aws, record, image, zones, prices, group, profile, spent)
        record["instance_id"] = instance["InstanceId"]
        store.write("launch.json", record)
    except Exception as error:
        reason = explain_any(error)
        there = ", ".join(aws.made) or "nothing new"
        raise RunError(
            f"{reason}. There is now: {there}. Repeat the command to go on, or remove it with: {command(aws, 'clean')}"
        ) from None
    wait_until_shown(aws, record)
    print(f"{instance['InstanceId']} starts in {instance['Placement']['AvailabilityZone']}. Next:")
    print(f"  watch    {command(aws, 'status', record['run'])}")
    print(f"  a shell  aws ssm start-session --target {instance['InstanceId']} --region {aws.region}")


def command(where, action, run=None):
    """What to type next, whole. where: what has `bucket`."""
    python = ".venv/bin/python" if Path(sys.prefix) == ROOT / ".venv" else "python"
    return f"{python} tools/ec2.py {action} --bucket {where.bucket}" + (f" --run {run}" if run else "")


def explain_any(error):
    """An error of AWS or ours as text; any other is a bug, and raised."""
    try:
        with aws_errors():
            raise error
    except RunError as explained:
        return str(explained)


def plan_lines(record, prices, source, spent, image, projected):
    market = "spot" if record["spot"] else "on demand"
    hours = record["budget"] / record["dollars_per_hour"]
    yield f"run {record['run']}: {record['config']} {' '.join(record['settings'])} at commit {record['commit'][:12]}"
    low, high = min(prices.values()), max(prices.values())
    price = f"${high:.3f}/h" if low == high else f"${low:.3f} to ${high:.3f}/h"
    yield f"on one {record['instance']}, {market}, {record['region']}, image {image['ImageId']}: {price} ({source})"
    yield projected
    yield (
        f"budget ${record['budget']:.2f}, {hours:.1f} h at the highest of these prices"
        + (f", of which ${spent:.2f} are spent" if spent else "")
        + "; the instance terminates itself then, at the end of the run, or after "
        f"{record['idle_minutes']:.0f} minutes without progress"
    )
    yield "made where missing, tagged project=rn50: a security group without open ports, a role and its profile"


def projection(record, config):
    """(what the run should take, from published figures, its dollars); says so where there are none for it."""
    table = costs.read_table()
    machine = next((m for m in costs.machines(table, False) if m.name == record["instance"]), None)
    try:
        recipe = costs.recipe_of(record["run"], config)
    except KeyError:
        machine = None
    if machine is None or config.get("model", {}).get("arch") != "resnet50" or record["settings"]:
        return "no projection: the table of published figures has none for this instance or these settings", None
    parts, limit = speeds.hours(table, speeds.fit(table), speeds.loader_rates(table), recipe, machine, record["spot"])
    total = sum(parts.values())
    dollars = total * record["dollars_per_hour"]
    return (
        f"projected from published figures: {total:.1f} h, ${dollars:.2f} "
        f"(limited by {limit}; tools/plan_run.py gives the range)"
    ), dollars


def hourly_prices(aws, instance, spot, zones):
    """({zone: dollars an hour}, where they are from): spot prices of now, or the on-demand price."""
    if spot:
        history = aws.client("ec2").describe_spot_price_history(
            InstanceTypes=[instance], ProductDescriptions=["Linux/UNIX"], StartTime=time.time()
        )["SpotPriceHistory"]
        latest = {entry["AvailabilityZone"]: float(entry["SpotPrice"]) for entry in reversed(history)}
        prices = {zone: latest[zone] for zone in zones if latest.get(zone)}
        if prices:
            return prices, "spot prices of now"
    else:
        price = listed_price(aws, instance)
        if price:
            return {zone: price for zone in zones}, "AWS Pricing API"
    machine = next((m for m in costs.machines(costs.read_table(), spot) if m.name == instance), None)
    if machine is None:
        raise RunError(f"no price is known for {instance}{', spot' if spot else ''} in {aws.region}")
    date = next(row["date"] for row in costs.read_table().instance if row["name"] == instance)
    return {zone: machine.dollars_high for zone in zones}, f"rn50/planning/costs.csv, {date}, us-east-1: check it"


def listed_price(aws, instance):
    """On-demand dollars an hour (Linux, shared) by the Pricing API, or None where it does not answer."""
    from botocore.exceptions import BotoCoreError, ClientError

    wanted = {
        "instanceType": instance,
        "regionCode": aws.region,
        "operatingSystem": "Linux",
        "tenancy": "Shared",
        "preInstalledSw": "NA",
        "capacitystatus": "Used",
    }
    filters = [{"Type": "TERM_MATCH", "Field": key, "Value": value} for key, value in wanted.items()]
    try:
        found = aws.client("pricing", "us-east-1").get_products(ServiceCode="AmazonEC2", Filters=filters)
        prices = []
        for product in found["PriceList"]:
            (term,) = json.loads(product)["terms"]["OnDemand"].values()
            (dimension,) = term["priceDimensions"].values()
            prices.append(float(dimension["pricePerUnit"]["USD"]))
    except (BotoCoreError, ClientError, KeyError, ValueError):
        return None
    return max(prices, default=0) or None  # where capacity can be bought ahead, that is a product too, for 0 dollars


def read_config(path):
    try:
        return yaml.safe_load((ROOT / path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; --config is a path within the repository") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {error}") from None


def git(*arguments, **options):
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, **options)
    if done.returncode:
        raise RunError(f"git {arguments[0]} failed: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def pinned_commit(name):
    """The commit that the instance gets. What is not committed would not be on the instance."""
    commit = git("rev-parse", "--verify", f"{name or 'HEAD'}^{{commit}}").decode().strip()
    if name is None and git("status", "--porcelain", "--untracked-files=no").strip():
        raise RunError(
            "there are uncommitted changes, which would not be on the instance: commit them, or give --commit"
        )
    return commit


def upload_code(aws, commit):
    """Put the tree at `commit` into the bucket; gives its sha256."""
    data = git("archive", "--format=tar.gz", commit)
    digest = hashlib.sha256(data).hexdigest()
    key = f"{cloud.CODE}/{commit}.tar.gz"
    aws.client("s3").put_object(Bucket=aws.bucket, Key=key, Body=data)
    return digest


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
    return f"rn50-{hashlib.sha256(bucket.encode()).hexdigest()[:10]}"


def policy(kind, bucket):
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


def once_ready(call, code, **options):
    """Repeat the call while AWS refuses it with `code`: what was just made or ended is not so everywhere at once."""
    from botocore.exceptions import ClientError

    give_up = time.monotonic() + PROFILE_PATIENCE
    while True:
        try:
            return call(**options)
        except ClientError as error:
            if error.response["Error"]["Code"] != code or time.monotonic() > give_up:
                raise
        time.sleep(POLL_SECONDS)


def run_instance(aws, record, image, zones, prices, group, profile, spent):
    """Start the instance in the cheapest zone that has room."""
    ec2, refused = aws.client("ec2"), []
    for zone in sorted(prices, key=lambda zone: (prices[zone], zone)):
        record["dollars_per_hour"] = prices[zone]
        aws.store(record["run"]).write("launch.json", record)
        give_up = time.monotonic() + PROFILE_PATIENCE
        while True:
            request = instance_request(record, image, zones[zone]["SubnetId"], group, profile, spent)
            try:
                instance = ec2.run_instances(**request)["Instances"][0]
                aws.note(f"instance {instance['InstanceId']}")
                return instance
            except ec2.exceptions.ClientError as error:
                code = error.response["Error"]["Code"]
                not_known_yet = code == "InvalidGroup.NotFound" or (
                    code == "InvalidParameterValue" and "rofile" in str(error)
                )
                if not_known_yet and time.monotonic() < give_up:
                    time.sleep(POLL_SECONDS)
                    continue
                if code == "IdempotentInstanceTerminated":  # an earlier try's, which nobody noted
                    record["attempt"] += 1
                    continue
                if code not in NO_ROOM:
                    raise
                refused.append(f"{zone}: {code}")
                break
    raise RunError(
        f"no zone has a {record['instance']} now ({'; '.join(refused)}): try later, another --instance or --region"
        + (", or without --spot" if record["spot"] else "")
    )


def instance_request(record, image, subnet, group, profile, spent):
    """What RunInstances is asked for. The token makes a repeated request give the same instance.

    EC2 keeps the token of a request that it refused, too, and refuses another request with it: price and image change.
    """
    marks = tags({**TAG, "Name": f"rn50-{record['run']}", "rn50-run": record["run"], "rn50-bucket": record["bucket"]})
    device = image.get("RootDeviceName", "/dev/sda1")
    smallest = max((m.get("Ebs", {}).get("VolumeSize", 0) for m in image.get("BlockDeviceMappings", [])), default=0)
    local = next((row["disk_gb"] for row in costs.read_table().instance if row["name"] == record["instance"]), 0)
    disk = {
        "VolumeSize": max(smallest + ROOM_GIB, ROOT_GIB if local else 3 * ROOT_GIB),
        "VolumeType": "gp3",
        "Encrypted": True,
        "DeleteOnTermination": True,
    }
    request = {
        "ImageId": image["ImageId"],
        "InstanceType": record["instance"],
        "MinCount": 1,
        "MaxCount": 1,
        # without a public address neither S3 nor Session Manager is reached; a subnet may be set to give none
        "NetworkInterfaces": [
            {"DeviceIndex": 0, "SubnetId": subnet, "Groups": [group], "AssociatePublicIpAddress": True}
        ],
        "IamInstanceProfile": {"Name": profile},
        "InstanceInitiatedShutdownBehavior": "terminate",
        "MetadataOptions": {"HttpTokens": "required", "HttpEndpoint": "enabled", "HttpPutResponseHopLimit": 2},
        "BlockDeviceMappings": [{"DeviceName": device, "Ebs": disk}],
        "TagSpecifications": [{"ResourceType": kind, "Tags": marks} for kind in ("instance", "volume")],
        "UserData": user_data(record, spent),
    }
    if record["spot"]:
        options = {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}
        request["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": options}
    identity = json.dumps([record["run"], record["attempt"], request], sort_keys=True)
    return request | {"ClientToken": hashlib.sha256(identity.encode()).hexdigest()}


def user_data(record, spent):
    """The script that the instance runs as root at its first start. It holds names and a checksum, and no secret."""
    minutes = max(1, int(60 * (record["budget"] - spent) / record["dollars_per_hour"]))
    values = {
        "RN50_BUCKET": record["bucket"],
        "RN50_RUN": record["run"],
        "RN50_COMMIT": record["commit"],
        "RN50_CODE_SHA256": record["code_sha256"],
        "AWS_DEFAULT_REGION": record["region"],
        "RN50_MINUTES": minutes,
        "RN50_SETUP_MINUTES": SETUP_MINUTES,
    }
    assignments = "\n".join(f"export {name}={shlex.quote(str(value))}" for name, value in values.items())
    return USER_DATA.replace("@VALUES@", assignments)


USER_DATA = r"""#!/bin/bash
# rn50: fetches the tree at its pinned commit, and hands over to tools/ec2_bootstrap.sh.
set -euo pipefail
prefix=${RN50_PREFIX:-}
mkdir -p "$prefix/etc" "$prefix/var/log" "$prefix/opt/rn50"
exec >>"$prefix/var/log/rn50-bootstrap.log" 2>&1
@VALUES@
failed() {
    aws s3 cp --only-show-errors "$prefix/var/log/rn50-bootstrap.log" \
        "s3://$RN50_BUCKET/rn50/runs/$RN50_RUN/rn50-bootstrap.log" || true
    shutdown -h +1
}
trap failed ERR
# whatever happens, the machine is gone when the budget is spent: switching off terminates it
shutdown -h "+$RN50_MINUTES"
# a restart of the machine forgets that, and does not run this script again
limit=$(date -u -d "+$RN50_MINUTES minutes" '+%F %T UTC')
mkdir -p "$prefix/etc/systemd/system"
printf '[Unit]\nDescription=rn50: the budget is spent\n[Service]\nType=oneshot\nExecStart=shutdown -h now\n' \
    >"$prefix/etc/systemd/system/rn50-limit.service"
printf '[Unit]\nDescription=rn50: when the budget is spent\n[Timer]\nOnCalendar=%s\nPersistent=true\n%s\n' \
    "$limit" $'[Install]\nWantedBy=timers.target' >"$prefix/etc/systemd/system/rn50-limit.timer"
systemctl daemon-reload
systemctl enable --now rn50-limit.timer
metadata=${AWS_EC2_METADATA_SERVICE_ENDPOINT:-http://169.254.169.254}
token=$(curl -sSf -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 300' "$metadata/latest/api/token")
RN50_INSTANCE=$(curl -sSf -H "X-aws-ec2-metadata-token: $token" "$metadata/latest/meta-data/instance-id")
export RN50_INSTANCE
# botocore asks the metadata service once, for a second; a client that got no credentials then never gets any
export AWS_METADATA_SERVICE_NUM_ATTEMPTS=5 AWS_METADATA_SERVICE_TIMEOUT=5
variables='RN50_(BUCKET|RUN|COMMIT|CODE_SHA256|INSTANCE|MINUTES)|AWS_(DEFAULT_REGION|METADATA_SERVICE_[A-Z_]+)'
env | grep -E "^($variables)=" >"$prefix/etc/rn50.env"
archive=$prefix/opt/rn50.tar.gz
# not every image has it
command -v aws >/dev/null || snap install aws-cli --classic
PATH=$PATH:/snap/bin
# a role that was made just now is not known everywhere at once
for _ in {1..12}; do
    aws s3 cp --only-show-errors "s3://$RN50_BUCKET/rn50/code/$RN50_COMMIT.tar.gz" "$archive" && break
    sleep "${RN50_POLL_SECONDS:-10}"
done
echo "$RN50_CODE_SHA256  $archive" | sha256sum --check --quiet
tar -xzf "$archive" -C "$prefix/opt/rn50"
timeout --kill-after=60 "${RN50_SETUP_MINUTES}m" bash "$prefix/opt/rn50/tools/ec2_bootstrap.sh"
"""


def span(seconds):
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def tags(values):
    return [{"Key": key, "Value": value} for key, value in values.items()]


# --- A run that exists -----------------------------------------------------------------------------------------------


def known_run(aws, args):
    """(store, launch record) of --run, or of the bucket's only run."""
    if args.run is None:
        runs = sorted({key.split("/")[0] for key in cloud.objects(aws.client("s3"), aws.bucket, f"{cloud.RUNS}/",
                                                                   strip=f"{cloud.RUNS}/")})  # fmt: skip
        if len(runs) != 1:
            raise UsageError(f"say which run: --run, one of {', '.join(runs) or '(there is none)'}")
        args.run = runs[0]
    store = aws.store(cloud.check_name("--run", args.run))
    record = store.read("launch.json")
    if record is None:
        raise RunError(f"there is no run {args.run} in s3://{aws.bucket}/{cloud.RUNS}/")
    if record["region"] != aws.region:  # its instance would seem to be gone
        raise UsageError(
            f"{args.run} is in {record['region']} and the region is {aws.region}: --region {record['region']}"
        )
    return store, record


def instances_of(aws, run=None, states=ALIVE):
    """EC2's instances with our tag."""
    filters = [{"Name": "tag:project", "Values": ["rn50"]}, {"Name": "instance-state-name", "Values": list(states)}]
    filters.append({"Name": "tag:rn50-bucket", "Values": [aws.bucket]})
    if run:
        filters.append({"Name": "tag:rn50-run", "Values": [run]})
    pages = aws.client("ec2").get_paginator("describe_instances").paginate(Filters=filters)
    return [i for page in pages for reservation in page["Reservations"] for i in reservation["Instances"]]


def wait_until_shown(aws, record):
    """EC2's lists lag: a `stop` right after the launch would find nothing, a `resume` start a second instance."""
    give_up = time.monotonic() + PROFILE_PATIENCE
    while time.monotonic() < give_up:
        if any(i["InstanceId"] == record["instance_id"] for i in instances_of(aws, record["run"], states=ANY)):
            return
        time.sleep(POLL_SECONDS)
    print(f"warning: EC2 does not show {record['instance_id']} yet: wait until status does")


def refuse_second(aws, run):
    alive = instances_of(aws, run)
    if alive:
        raise RunError(
            f"{run} has an instance already: {alive[0]['InstanceId']} is {alive[0]['State']['Name']}; see "
            f"{command(aws, 'status', run)}"
        )


def status(aws, args):
    store, record = known_run(aws, args)
    found, records = instances_of(aws, args.run, states=ANY), store.instances()
    for line in status_lines(store, record, found, records, now=time.time()):
        print(line)


def status_lines(store, record, found, records, now):
    alive = [i for i in found if i["State"]["Name"] in ALIVE]
    resume_command = command(store, "resume", record["run"])
    market = "spot" if record["spot"] else "on demand"
    yield f"{record['run']}: {record['config']} at {record['commit'][:12]} on {record['instance']}, {market}"
    states = {i["InstanceId"]: i["State"]["Name"] for i in alive}
    last = records[-1] if records else None
    if last:
        seen = f"seen {span(now - last['seen'])} ago"
        reason = f" ({last['reason']})" if last.get("reason") else ""
        state = states.get(last["instance_id"], "gone")
        yield f"instance {last['instance_id']}: {state}; {last['state']}{reason}, {seen}"
        if state == "running" and now - last["seen"] > cloud.LOST_SECONDS:
            yield "warning: it runs but does not report: look with aws ssm start-session, or end it with stop"
        if state == "gone" and last["state"] in ("staging", "staged", "training", "interrupted"):
            yield f"it was taken away: go on with {resume_command}"
    spent, reported = cloud.dollars(records), {r["instance_id"] for r in records}
    for instance in alive:
        if instance["InstanceId"] not in reported:
            up = now - instance["LaunchTime"].timestamp()
            spent += max(0.0, up) / 3600 * record["dollars_per_hour"]
            yield f"instance {instance['InstanceId']}: {instance['State']['Name']} for {span(up)}, has not reported yet"
    name = record["instance_id"]
    if name and name not in reported | set(states):
        why = next((i.get("StateReason", {}).get("Message") for i in found if i["InstanceId"] == name), None)
        yield f"instance {name}: gone before it reported ({why or 'EC2 does not say why'}): go on with {resume_command}"
    yield f"dollars so far: {spent:.2f} of {record['budget']:.2f} (instances; storage is extra)"
    rows = rows_of(store)
    epochs = epochs_of(store, record)
    if rows:
        row = rows[-1]
        best = next((r for r in reversed(rows) if "top1" in r), None)
        accuracy = f", top-1 {best['top1']:.2f} % after epoch {best['epoch'] + 1}" if best else ""
        yield f"epoch {row['epoch'] + 1} of {epochs}, {row['resolution']} px, loss {row['train_loss']:.3f}{accuracy}"
        yield forecast(record, rows, epochs, spent)
    else:
        yield "no epoch is done yet"
    ended = store.read("status.json")
    if ended:
        yield f"last command: {ended['status']} ({ended['reason']}) at step {ended['step']}"
    console = store.read_bytes(cloud.CONSOLE) or store.read_bytes(cloud.SETUP_LOG) or b""
    console = console.decode(errors="replace").strip().splitlines()
    yield from (f"  | {line}" for line in console[-5:])


def forecast(record, rows, epochs, spent):
    """What the run will cost and reach: its own forecast where its log has one, else the pace of its latest epochs."""
    latest = rows[-1]
    if latest["epoch"] + 1 == epochs:
        return "all epochs are done"
    own = latest.get("forecast")
    more = latest.get("dollars_to_finish")
    if isinstance(own, dict) and own.get("top1") is not None:
        money = f", ${spent + more:.2f} in all" if more is not None else ""
        return f"forecast: top-1 {own['top1']:.1f} % at {own.get('evaluation', 'the end')}{money}"
    recent = [r["train_seconds"] + r.get("val_seconds", 0) for r in rows[-3:]]
    left = (epochs - latest["epoch"] - 1) * sum(recent) / len(recent)
    total = spent + left / 3600 * record["dollars_per_hour"]
    return (
        f"forecast: {span(left)} more at the pace of the last epochs, ${total:.2f} in all "
        "(later epochs at a higher resolution take longer)"
    )


def rows_of(store):
    data = store.read_bytes("log.jsonl") or b""
    rows = parse_rows(data.decode(errors="replace"), f"{store.prefix}/log.jsonl")
    return sorted(rows, key=lambda row: row["epoch"])


def epochs_of(store, record):
    """training.epochs as the run has it: --set counts over the file."""
    data = store.read_bytes("config.yaml")
    config = yaml.safe_load(data) if data else read_config(record["config"])
    return config["training"]["epochs"]


def stop(aws, args):
    """Let the run write its checkpoint, and end the instance."""
    store, record = known_run(aws, args)
    alive = instances_of(aws, args.run)
    if not alive:
        print(f"{args.run} has no instance")
        return
    store.write("stop", {"asked": time.time()})
    name = alive[0]["InstanceId"]
    print(f"asked {name} to save a checkpoint and end; waiting for it, at most {STOP_PATIENCE} s")
    give_up = time.monotonic() + STOP_PATIENCE
    while time.monotonic() < give_up and instances_of(aws, args.run, states=("running",)):
        found = store.read(f"instances/{name}.json") or {}
        if found.get("state") in ("stopped", "finished", "budget", "failed", "interrupted"):
            print(f"{name} has stopped: {found.get('reason')}")
            break
        time.sleep(POLL_SECONDS)
    else:
        print("it did not answer; terminating it. What the bucket has is the last mirrored checkpoint")
    aws.client("ec2").terminate_instances(InstanceIds=[i["InstanceId"] for i in alive])
    print(f"terminated. Go on with: {command(aws, 'resume', args.run)}")


def fetch(aws, args):
    """Copy the run's files to a local run folder."""
    store, record = known_run(aws, args)
    folder = Path(args.out or "runs") / args.run
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in store.keys().items():
        if "/" in name or name == "stop":
            continue
        partial = folder / f"{name}.partial"
        aws.client("s3").download_file(aws.bucket, f"{store.prefix}/{name}", str(partial))
        partial.rename(folder / name)
        print(f"{folder / name}  {size} bytes")
    print(f"{len(rows_of(store))} epochs; curves: python tools/compare_runs.py {folder} --out curves.png")


def clean(aws, args):
    """List everything that is tagged, and remove it after a yes. Objects in the bucket stay unless --data."""
    check_bucket(aws, args)  # in another region there would seem to be no instance, and the role is in all of them
    things = find_everything(aws, data=args.data)
    if not things:
        print("there is nothing to remove")
        return
    for text, _ in things:
        print(f"  {text}")
    if not args.yes and input("Type yes to remove these: ").strip() != "yes":
        raise RunError("nothing was removed")
    for text, remove in things:
        remove()
        print(f"removed {text}")
    if not args.data:
        print(f"s3://{aws.bucket}/{cloud.PREFIX}/ is kept, and costs its storage; --data removes it too")


def find_everything(aws, data):
    """[(text, function that removes it)] in an order that works."""
    ec2, iam, s3 = aws.client("ec2"), aws.client("iam"), aws.client("s3")
    things = []
    alive = instances_of(aws, states=(*ALIVE, "shutting-down"))
    if alive:
        ids = [i["InstanceId"] for i in alive]

        def end_instances():
            ec2.terminate_instances(InstanceIds=ids)
            ec2.get_waiter("instance_terminated").wait(InstanceIds=ids)

        things.append((f"instances {', '.join(ids)}", end_instances))
    ours = [{"Name": "tag:project", "Values": ["rn50"]}]
    free = [*ours, {"Name": "status", "Values": ["available"]}, {"Name": "tag:rn50-bucket", "Values": [aws.bucket]}]
    for volume in ec2.describe_volumes(Filters=free)["Volumes"]:
        name = volume["VolumeId"]
        things.append((f"volume {name}", lambda name=name: ec2.delete_volume(VolumeId=name)))
    for group in ec2.describe_security_groups(Filters=ours)["SecurityGroups"]:
        # it cannot go before the network interfaces of its last instance have
        delete = partial(once_ready, ec2.delete_security_group, "DependencyViolation", GroupId=group["GroupId"])
        things.append((f"security group {group['GroupId']}", delete))
    role = role_name(aws.bucket)
    with contextlib.suppress(iam.exceptions.NoSuchEntityException):
        profile = iam.get_instance_profile(InstanceProfileName=role)["InstanceProfile"]
        things.append((f"instance profile {role}", lambda: delete_profile(iam, role, profile["Roles"])))
    with contextlib.suppress(iam.exceptions.NoSuchEntityException):
        iam.get_role(RoleName=role)
        things.append((f"role {role}", lambda: delete_role(iam, role)))
    uploads = s3.list_multipart_uploads(Bucket=aws.bucket, Prefix=f"{cloud.PREFIX}/").get("Uploads", [])
    for upload in uploads:
        key, number = upload["Key"], upload["UploadId"]
        things.append(
            (
                f"unfinished upload {key}",
                lambda key=key, number=number: s3.abort_multipart_upload(Bucket=aws.bucket, Key=key, UploadId=number),
            )
        )
    if data:
        found = cloud.objects(s3, aws.bucket, f"{cloud.PREFIX}/")
        text = f"{len(found)} objects, {sum(found.values()) / 1e9:.2f} GB, in s3://{aws.bucket}/{cloud.PREFIX}/"

        def delete_objects():
            for key in found:
                s3.delete_object(Bucket=aws.bucket, Key=key)

        things += [(text, delete_objects)] if found else []
    return things


def delete_profile(iam, name, roles):
    for role in roles:
        iam.remove_role_from_instance_profile(InstanceProfileName=name, RoleName=role["RoleName"])
    iam.delete_instance_profile(InstanceProfileName=name)


def delete_role(iam, name):
    with contextlib.suppress(iam.exceptions.NoSuchEntityException):
        iam.delete_role_policy(RoleName=name, PolicyName="rn50")
    iam.delete_role(RoleName=name)


# --- Command line ----------------------------------------------------------------------------------------------------


def positive(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    helps = {"doctor": "is everything there for a launch?", "launch": "start a run on a new instance",
             "resume": "go on with a run on a new instance", "status": "how far it is, and what it has cost",
             "stop": "save a checkpoint, and end the instance", "fetch": "copy the results here",
             "clean": "list and remove what was made"}  # fmt: skip
    made = {name: actions.add_parser(name, help=text) for name, text in helps.items()}
    for sub in made.values():
        sub.add_argument("--bucket", required=True, help="everything is kept in s3://BUCKET/rn50/")
        sub.add_argument("--region", help="default: boto3's")
    for name in ("doctor", "launch", "resume"):
        made[name].add_argument("--ami", help="image to start; default: the newest Deep Learning Base image")
    for name in ("doctor", "launch"):
        made[name].add_argument("--instance", default="g5.2xlarge", help="instance type")
        made[name].add_argument("--spot", action="store_true", help="cheaper, and may be taken away")
    made["launch"].add_argument("--config", required=True, help="rn50_configs/NAME.yaml, as committed")
    made["launch"].add_argument(
        "--budget", type=positive, required=True, help="dollars for instances over the whole run"
    )
    made["launch"].add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides a key")
    made["launch"].add_argument("--commit", help="what the instance runs; default: HEAD")
    made["launch"].add_argument("--idle-minutes", type=positive, default=30, help="without progress, until it ends")
    made["resume"].add_argument("--budget", type=positive, help="a new limit, over the whole run")
    made["resume"].add_argument("--instance", help="another instance type")
    market = made["resume"].add_mutually_exclusive_group()
    market.add_argument("--on-demand", action="store_const", const=True, help="not spot this time")
    market.add_argument("--spot", action="store_const", const=False, dest="on_demand")
    made["fetch"].add_argument("--out", help="folder of run folders (default: runs)")
    for name in ("launch", "resume", "status", "stop", "fetch"):
        made[name].add_argument("--run", help="the run's name; launch: default logging.run_name of the config")
    for name in ("launch", "resume", "clean"):
        made[name].add_argument("--yes", action="store_true", help="do not ask")
    made["clean"].add_argument("--data", action="store_true", help="betons, code and results in the bucket too")
    args = parser.parse_args(argv)
    cloud.check_name("--bucket", args.bucket)
    if args.action == "resume" and args.run is None:
        parser.error("resume needs --run")
    return args


# Looked up, so that a word that is not here fails and cannot come to `clean`, which deletes.
ACTIONS = {
    "doctor": doctor,
    "launch": launch,
    "resume": resume,
    "status": status,
    "stop": stop,
    "fetch": fetch,
    "clean": clean,
}


if __name__ == "__main__":
    run(main)
