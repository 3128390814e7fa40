"""An instance for a run: the plan, the request, the script of its first start, and another one that goes on."""

import hashlib
import json
import shlex
import subprocess
import time
from pathlib import Path

from rn50.cloud import store as cloud
from rn50.cloud.account import betons, check_bucket, find_image, instance_profile, security_group, subnets
from rn50.cloud.aws import ANY, PROFILE_PATIENCE, ROOT, TAG, command, explain_any, instances_of, pause, tags
from rn50.cloud.status import known_run, read_config, refuse_second
from rn50.errors import RunError, UsageError

FIRST_BOOT = Path(__file__).with_name("first_boot.sh")
# The image's own files and toolkits fill most of what its snapshot has.
ROOT_GIB, ROOM_GIB = 100, 40
# Of an instance's own disk: a file system takes some, and the run's folder is there too.
DISK_SHARE = 0.95
# Setting up compiles ffcv and copies the betons: longer than this, it hangs.
SETUP_MINUTES = 120
NO_ROOM = ("InsufficientInstanceCapacity", "SpotMaxPriceTooLow", "Unsupported", "InsufficientFreeAddressesInSubnet")


def launch(aws, args):
    """A new run on a new instance."""
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
        "tune": args.tune,
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
    text, projected = aws.published.projection(record, config)
    print("\n".join(plan_lines(record, prices, source, spent, image, text)))
    if projected and not spent and projected > record["budget"]:
        raise RunError(
            f"the run is projected to cost ${projected:.2f} of a budget of ${record['budget']:.2f}, and the training "
            "would refuse to begin: give a higher --budget, a shorter recipe, or --set budget.allow_overrun=true"
        )
    # a set-up that is paid for would end without them, or without room for them
    copied = betons(aws, cloud.rung_of(record, config))
    gigabytes = sum(copied.values()) / 1e9
    print(f"copies {', '.join(name for name in copied if name.endswith('.beton'))}, {gigabytes:.3g} GB")
    disk = aws.published.disk_gb(record["instance"])
    if disk and gigabytes > disk * DISK_SHARE:
        raise RunError(
            f"the betons of this run take {gigabytes:.3g} GB and {record['instance']} has a disk of {disk:.3g} GB: "
            "choose another --instance, or one size for all epochs with --set data.rung=400"
        )
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


def plan_lines(record, prices, source, spent, image, projected):
    market = "spot" if record["spot"] else "on demand"
    hours = record["budget"] / record["dollars_per_hour"]
    yield f"run {record['run']}: {record['config']} {' '.join(record['settings'])} at commit {record['commit'][:12]}"
    low, high = min(prices.values()), max(prices.values())
    price = f"${high:.3f}/h" if low == high else f"${low:.3f} to ${high:.3f}/h"
    yield f"on one {record['instance']}, {market}, {record['region']}, image {image['ImageId']}: {price} ({source})"
    yield projected
    if record.get("tune"):
        yield "precision and torch.compile as tools/preflight.py finds them fastest there, in about five minutes"
    yield (
        f"budget ${record['budget']:.2f}, {hours:.1f} h at the highest of these prices"
        + (f", of which ${spent:.2f} are spent" if spent else "")
        + "; the instance terminates itself then, at the end of the run, or after "
        f"{record['idle_minutes']:.0f} minutes without progress"
    )
    yield "made where missing, tagged project=rn50: a security group without open ports, a role and its profile"


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
    known = aws.published.price(instance, spot)
    if known is None:
        raise RunError(f"no price is known for {instance}{', spot' if spot else ''} in {aws.region}")
    price, date = known
    return {zone: price for zone in zones}, f"rn50/planning/costs.csv, {date}, us-east-1: check it"


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


def git(*arguments, **options):
    """What git prints, as bytes."""
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
    """Put the tree at `commit` into the bucket; returns its sha256."""
    data = git("archive", "--format=tar.gz", commit)
    digest = hashlib.sha256(data).hexdigest()
    key = f"{cloud.CODE}/{commit}.tar.gz"
    aws.client("s3").put_object(Bucket=aws.bucket, Key=key, Body=data)
    return digest


def run_instance(aws, record, image, zones, prices, group, profile, spent):
    """Start the instance in the cheapest zone that has room."""
    ec2, refused = aws.client("ec2"), []
    for zone in sorted(prices, key=lambda zone: (prices[zone], zone)):
        record["dollars_per_hour"] = prices[zone]
        aws.store(record["run"]).write("launch.json", record)
        give_up = time.monotonic() + PROFILE_PATIENCE
        while True:
            subnet, disk_gb = zones[zone]["SubnetId"], aws.published.disk_gb(record["instance"])
            request = instance_request(record, image, subnet, group, profile, spent, disk_gb)
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
                    pause()
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


def instance_request(record, image, subnet, group, profile, spent, disk_gb):
    """What RunInstances is asked for. The token makes a repeated request give the same instance.

    disk_gb: of the instance's own disks, None or 0 where it has none.

    EC2 keeps the token of a request that it refused, too, and refuses another request with it: price and image change.
    """
    marks = tags({**TAG, "Name": f"rn50-{record['run']}", "rn50-run": record["run"], "rn50-bucket": record["bucket"]})
    device = image.get("RootDeviceName", "/dev/sda1")
    smallest = max((m.get("Ebs", {}).get("VolumeSize", 0) for m in image.get("BlockDeviceMappings", [])), default=0)
    disk = {
        "VolumeSize": max(smallest + ROOM_GIB, ROOT_GIB if disk_gb else 3 * ROOT_GIB),
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
    return FIRST_BOOT.read_text(encoding="utf-8").replace("@VALUES@", assignments)


def wait_until_shown(aws, record):
    """EC2's lists lag: a `stop` right after the launch would find nothing, a `resume` start a second instance."""
    give_up = time.monotonic() + PROFILE_PATIENCE
    while time.monotonic() < give_up:
        if any(i["InstanceId"] == record["instance_id"] for i in instances_of(aws, record["run"], states=ANY)):
            return
        pause()
    print(f"warning: EC2 does not show {record['instance_id']} yet: wait until status does")
