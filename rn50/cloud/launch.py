"""An instance for a run: the plan, the request, the script of its first start, and another one that goes on.

On demand it is one request, whose refusal is told at once. A spot instance is launched by a group, which brings another
one when it is taken away (rn50/cloud/group.py).
"""

import base64
import hashlib
import json
import shlex
import subprocess
import time
from pathlib import Path

from rn50.cloud import group, mail
from rn50.cloud import store as cloud
from rn50.cloud.account import betons, check_bucket, find_image, instance_profile, security_group, subnets
from rn50.cloud.advice import NO_ROOM, advice_in
from rn50.cloud.aws import (
    ANY,
    PROFILE_PATIENCE,
    ROOT,
    TAG,
    command,
    explain_any,
    instances_of,
    not_known_yet,
    once_ready,
    pause,
    tags,
)
from rn50.cloud.prices import DISK_SHARE, hourly_prices, on_demand_price, spot_types
from rn50.cloud.status import known_run, read_config, refuse_second
from rn50.errors import RunError, UsageError

FIRST_BOOT = Path(__file__).with_name("first_boot.sh")
# The image's own files and toolkits fill most of what its snapshot has.
ROOT_GIB, ROOM_GIB = 100, 40
# Setting up compiles ffcv and copies the betons: longer than this, it hangs.
SETUP_MINUTES = 120
# How long a launch waits for its group's first instance.
GROUP_SECONDS = 180
# A spot price may rise to so many times what the budget counts with: below the range that was seen, 0.36 to 0.59, a run
# would wait for a price that does not come back; without a limit a budget would mean nothing.
PRICE_ROOM = 2.0


def launch(aws, args):
    """A new run on a new instance."""
    config = read_config(args.config)
    run = cloud.check_name("the run's name", args.run or config.get("logging", {}).get("run_name"))
    if run == cloud.CONVERSION:
        raise UsageError(f"{run} is what the conversion is called: give this run another --run")
    store = aws.store(run)
    before = store.read("launch.json")
    refuse_second(aws, run)
    known = before and (before["instance_id"] or next((r["instance_id"] for r in store.instances()), None))
    if known:
        raise RunError(
            f"{run} was launched before ({known}): go on with it by {command(aws, 'resume', run)}, "
            "or give this one another --run"
        )
    check_settings(args.set)
    if args.fallback and not args.spot:
        raise UsageError("--fallback on-demand is for --spot")
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
        "min_speed": args.min_speed,
        "patience_hours": args.patience_hours,
        "replacements": args.replacements,
        "fallback": args.fallback,
        "notify": args.notify and mail.address(args.notify),
        "attempt": 1,
        "instance_id": None,
    }
    start(aws, args, store, record, config)


def check_settings(settings):
    """UsageError unless each is of the form section.key=value."""
    for setting in settings:
        if "=" not in setting or setting.startswith("-"):
            raise UsageError(f"--set {setting} is not of the form section.key=value")


def resume(aws, args):
    """Another instance for the run, which goes on from the checkpoint in the bucket."""
    store, record = known_run(aws, args)
    if args.run == cloud.CONVERSION:
        raise UsageError(f"a conversion goes on with: {command(aws, 'convert')}")
    if "groups" not in record:  # its tree has no gate.py, which the user data calls
        raise RunError(
            f"{args.run} was launched by an earlier version of tools/ec2.py: go on with it in a checkout of its own "
            f"commit, {record['commit'][:12]}"
        )
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
    for key in ("fallback", "patience_hours", "replacements"):
        if getattr(args, key) is not None:
            record[key] = getattr(args, key)
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
    if projected and not spent and projected > record["budget"]:
        raise RunError(
            f"the run is projected to cost ${projected:.2f} of a budget of ${record['budget']:.2f}, and the training "
            "would refuse to begin: give a higher --budget, a shorter recipe, or --set budget.allow_overrun=true"
        )
    # a set-up that is paid for would end without them, or without room for them
    copied = betons(aws, cloud.rung_of(record, config))
    gigabytes = sum(copied.values()) / 1e9
    record["dollars_on_demand"] = on_demand_price(aws, record["instance"])
    record["types"] = spot_types(aws, record, zones, gigabytes, max(prices.values())) if record["spot"] else {}
    record["dollars_per_hour"] = max([*record["types"].values(), *prices.values()])
    record["expected"] = aws.published.expected(record, config)
    print("\n".join(plan_lines(record, prices, source, spent, image, text)))
    print(f"copies {', '.join(name for name in copied if name.endswith('.beton'))}, {gigabytes:.3g} GB")
    disk = aws.published.disk_gb(record["instance"])
    if disk and gigabytes > disk * DISK_SHARE:
        raise RunError(
            f"the betons of this run take {gigabytes:.3g} GB and {record['instance']} has a disk of {disk:.3g} GB: "
            "choose another --instance, or one size for all epochs with --set data.rung=400"
        )
    ask(args, "launch")
    begin(aws, store, record, image, zones, prices, spent)


def ask(args, what):
    """RunError unless a person says yes."""
    if not args.yes and input(f"Type yes to {what}: ").strip() != "yes":
        raise RunError("nothing was launched")


def begin(aws, store, record, image, zones, prices, spent):
    """Make what is missing, then the instance, or the group that makes it. Nothing of an earlier attempt is left."""
    record["attempt_started"] = time.time()
    earlier = group.found(aws, record["run"])
    if earlier and record["attempt"] == (store.read("launch.json") or {}).get("attempt"):
        record["attempt"] += 1  # a group that is being deleted keeps its name for minutes
    record["groups"] = (
        group.names(aws.bucket, record["run"], record["attempt"], record["fallback"]) if record["spot"] else []
    )
    try:
        if not record.get("code_sha256"):
            record["code_sha256"] = upload_code(aws, record["commit"])
        for word in ("stop", "ended"):
            aws.client("s3").delete_object(Bucket=aws.bucket, Key=f"{store.prefix}/{word}")
        group.remove(aws, earlier)
        firewall = security_group(aws, zones)
        profile = instance_profile(aws, record)
        if record.get("notify") and "@" in record["notify"]:
            record["notify"] = mail.subscribe(aws, record["notify"])
        store.write("launch.json", record)  # before the instance, which reads it
        common = common_request(record, image, firewall, profile, spent, aws.published.disk_gb(record["instance"]))
        instance = (run_group if record["spot"] else run_instance)(aws, record, common, zones, prices)
        record["instance_id"] = instance and instance["InstanceId"]
        store.write("launch.json", record)
    except Exception as error:
        reason = explain_any(error)
        there = ", ".join(aws.made) or "nothing new"
        raise RunError(
            f"{reason}. There is now: {there}. Repeat the command to go on, or remove it with: {command(aws, 'clean')}"
        ) from None
    if instance:
        wait_until_shown(aws, record)
        print(f"{instance['InstanceId']} starts in {instance['Placement']['AvailabilityZone']}. Next:")
    print(f"  watch    {command(aws, 'status', record['run'])} --watch")
    if instance:
        print(f"  a shell  aws ssm start-session --target {instance['InstanceId']} --region {aws.region}")


def plan_lines(record, prices, source, spent, image, projected):
    market = "spot" if record["spot"] else "on demand"
    hours = record["budget"] / record["dollars_per_hour"]
    yield f"run {record['run']}: {record['config']} {' '.join(record['settings'])} at commit {record['commit'][:12]}"
    every = [*prices.values(), *record["types"].values()]
    low, high = min(every), max(every)
    price = f"${high:.3f}/h" if low == high else f"${low:.3f} to ${high:.3f}/h"
    types = " or ".join(record["types"] or [record["instance"]])
    yield f"on one {types}, {market}, {record['region']}, image {image['ImageId']}: {price} ({source})"
    yield projected
    if record.get("tune"):
        yield "precision and torch.compile as tools/preflight.py finds them fastest there, in about five minutes"
    yield (
        f"budget ${record['budget']:.2f}, {hours:.1f} h at the highest of these prices"
        + (f", of which ${spent:.2f} are spent" if spent else "")
        + "; the instance terminates itself then, at the end of the run, or after "
        f"{record['idle_minutes']:.0f} minutes without progress"
    )
    if record["spot"]:
        after = f"{record['patience_hours']:g} h without an instance that is well"
        then = (
            f"one on demand takes over at ${record['dollars_on_demand'] or 0:.3f}/h"
            if record["fallback"]
            else "it ends"
        )
        yield (
            f"what AWS takes away it replaces, at most {record['replacements']} times; after {after}, {then}. "
            f"The group cannot go on longer, even if everything of ours fails, nor pay more than {PRICE_ROOM:g} times "
            "these prices"
        )
    more = ", and the group with its launch template" if record["spot"] else ""
    yield f"made where missing, tagged project=rn50: a security group without open ports, a role and its profile{more}"


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


def run_instance(aws, record, common, zones, prices):
    """Start the instance in the cheapest zone that has room."""
    ec2, refused = aws.client("ec2"), []
    for zone in sorted(prices, key=lambda zone: (prices[zone], zone)):
        give_up = time.monotonic() + PROFILE_PATIENCE
        while True:
            try:
                request = instance_request(record, common, zones[zone]["SubnetId"])
                instance = ec2.run_instances(**request)["Instances"][0]
                aws.note(f"instance {instance['InstanceId']}")
                return instance
            except ec2.exceptions.ClientError as error:
                code = error.response["Error"]["Code"]
                if not_known_yet(error) and time.monotonic() < give_up:
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
    )


def run_group(aws, record, common, zones, prices):
    """Make the group, and wait a while for its first instance; None where AWS has no room for one yet."""
    ec2, scaling, name = aws.client("ec2"), aws.client("autoscaling"), record["groups"][0]
    template = launch_template(record, common)
    ec2.create_launch_template(LaunchTemplateName=name, LaunchTemplateData=template, TagSpecifications=[
        {"ResourceType": "launch-template", "Tags": marks_of(record)}])  # fmt: skip
    aws.note(f"launch template {name}")
    once_ready(
        group.create,
        not_known_yet,
        client=scaling,
        groups=record["groups"],
        template=name,
        subnets=[zone["SubnetId"] for zone in zones.values()],
        types=list(record["types"]),
        most=min(record["dollars_on_demand"] or float("inf"), PRICE_ROOM * record["dollars_per_hour"]),
        instance=record["instance"],
        marks=marks_of(record),
        patience_hours=record["patience_hours"],
        now=time.time(),
    )
    for each in record["groups"]:
        aws.note(f"Auto Scaling group {each}")
    give_up, told = time.monotonic() + GROUP_SECONDS, ""
    while True:
        alive = instances_of(aws, record["run"])
        if alive:
            return alive[0]
        (made,) = [g for g in group.found(aws, record["run"]) if g["AutoScalingGroupName"] == name]
        failed = group.refusals(aws, made)
        for message in failed:
            if advice := advice_in(message):
                group.remove(aws, group.found(aws, record["run"]))
                aws.made[:] = [thing for thing in aws.made if name not in thing]
                raise RunError(f"AWS does not launch it ({message.rstrip('. ')}): {advice}")
        if failed and failed[0] != told:
            told = failed[0]
            print(f"  no instance yet: {told}")
        if time.monotonic() > give_up:
            break
        pause()
    otherwise = "one on demand takes over" if record["fallback"] else "the group ends"
    print(
        "AWS has no instance now. The group goes on asking in every zone, for free; after "
        f"{record['patience_hours']:g} h {otherwise}. status says more; stop ends it"
    )
    return None


def marks_of(record):
    return tags({**TAG, "Name": f"rn50-{record['run']}", "rn50-run": record["run"], "rn50-bucket": record["bucket"]})


def common_request(record, image, firewall, profile, spent, disk_gb):
    """What RunInstances and a launch template are both asked for.

    firewall: the security group's id; spent: dollars of earlier instances; disk_gb: of the instance's own disks, None
    or 0 where it has none.
    """
    device = image.get("RootDeviceName", "/dev/sda1")
    smallest = max((m.get("Ebs", {}).get("VolumeSize", 0) for m in image.get("BlockDeviceMappings", [])), default=0)
    disk = {
        "VolumeSize": max(smallest + ROOM_GIB, ROOT_GIB if disk_gb else 3 * ROOT_GIB),
        "VolumeType": "gp3",
        "Encrypted": True,
        "DeleteOnTermination": True,
    }
    return {
        "ImageId": image["ImageId"],
        "InstanceType": record["instance"],
        # without a public address neither S3 nor Session Manager is reached; a subnet may be set to give none
        "NetworkInterfaces": [{"DeviceIndex": 0, "Groups": [firewall], "AssociatePublicIpAddress": True}],
        "IamInstanceProfile": {"Name": profile},
        "InstanceInitiatedShutdownBehavior": "terminate",
        "MetadataOptions": {"HttpTokens": "required", "HttpEndpoint": "enabled", "HttpPutResponseHopLimit": 2},
        "BlockDeviceMappings": [{"DeviceName": device, "Ebs": disk}],
        "TagSpecifications": [{"ResourceType": kind, "Tags": marks_of(record)} for kind in ("instance", "volume")],
        "UserData": user_data(record, spent),
    }


def instance_request(record, common, subnet):
    """What RunInstances is asked for. The token makes a repeated request give the same instance.

    EC2 keeps the token of a request that it refused, too, and refuses another request with it: price and image change.
    """
    (interface,) = common["NetworkInterfaces"]
    request = common | {"MinCount": 1, "MaxCount": 1, "NetworkInterfaces": [{**interface, "SubnetId": subnet}]}
    identity = json.dumps([record["run"], record["attempt"], request], sort_keys=True)
    return request | {"ClientToken": hashlib.sha256(identity.encode()).hexdigest()}


def launch_template(record, common):
    """The same for a group, which chooses type and subnet."""
    return common | {"UserData": base64.b64encode(common["UserData"].encode()).decode()}


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
        "RN50_GROUPS": " ".join(record.get("groups", [])),
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
