"""ImageNet to betons in the bucket: the plan, the check of what will be fetched, and the instance that does it.

The instance runs rn50/cloud/convert.py as any run is run (rn50/cloud/supervise.py): its dollars are bounded, `status`
shows it, `stop` stops it, and the same command goes on where it was.
"""

import getpass
import json
import os

from rn50.cloud import launch, mail, origins
from rn50.cloud import store as cloud
from rn50.cloud.account import UBUNTU_PARAMETER, check_bucket, find_image, quota_of, secret_name, subnets
from rn50.cloud.prices import hourly_prices
from rn50.cloud.status import read_config, refuse_second
from rn50.errors import RunError

# Nothing to train with is needed there, and a run that is idle for this long has lost the origin.
IDLE_MINUTES = 30


def convert(aws, args):
    """Fetch and convert on a new instance, or go on with a conversion that has not finished."""
    launch.check_settings(args.set)
    store = aws.store(cloud.CONVERSION)
    before = store.read("launch.json")
    refuse_second(aws, cloud.CONVERSION)
    if (store.read("ended") or {}).get("state") == "finished":
        raise RunError(
            f"ImageNet is converted already: s3://{aws.bucket}/{cloud.BETONS}/; to convert anew, remove what is there "
            f"and s3://{aws.bucket}/{store.prefix}/ first"
        )
    check_bucket(aws, args)
    origin = origins.parse(args.origin)
    secret = origins.secret(origin, getpass.getpass)
    files = origins.listing(origin, secret, aws.client("s3"))
    gigabytes = sum(file.bytes for file in files) / 1e9
    offers = aws.published.converters(origin.kind, gigabytes)
    if not offers:
        raise RunError(
            f"{gigabytes:.0f} GB are more than the largest disk here takes with the betons: is that ImageNet?"
        )
    args.instance = args.instance or choose(aws, offers)
    record = {
        "kind": "conversion",
        "run": cloud.CONVERSION,
        "bucket": aws.bucket,
        "region": aws.region,
        "from": origins.words(origin),
        "source": origin.places[0].removeprefix("s3://") if origin.kind == "s3" else None,
        "secret": secret_name(aws.bucket) if secret else None,
        "config": args.config,
        "settings": args.set,
        "commit": launch.pinned_commit(args.commit),
        "instance": args.instance,
        "spot": False,
        "idle_minutes": IDLE_MINUTES,
        "notify": args.notify and mail.address(args.notify),
        "attempt": (before["attempt"] + 1) if before else 1,
        "instance_id": None,
    }
    read_config(args.config)  # a mistyped path ends here
    zones, image = subnets(aws), find_image(aws, args, UBUNTU_PARAMETER)
    prices, source = hourly_prices(aws, args.instance, False, zones)
    record["dollars_per_hour"] = record["dollars_on_demand"] = max(prices.values())
    spent = cloud.dollars(store.instances())
    hours, low, high = aws.published.conversion_hours(args.instance, origin.kind, gigabytes)
    record["budget"] = args.budget or round(spent + 2 * high * record["dollars_per_hour"] + 1)
    a_day = aws.published.kept_for_a_day(gigabytes)
    print("\n".join(plan_lines(record, files, (hours, low, high), a_day, offers, source, spent)))
    if spent >= record["budget"]:
        raise RunError(f"${spent:.2f} of ${record['budget']:.2f} are spent: give a higher --budget")
    launch.ask(args, "convert")
    if secret:
        # made before the instance, which reads it once; only its role may
        aws.client("ssm").put_parameter(
            Name=record["secret"], Type="SecureString", Value=json.dumps(secret), Overwrite=True
        )
        aws.note(f"SSM parameter {record['secret']}, which the instance deletes at the end")
    launch.begin(aws, store, record, image, zones, prices, spent)


def choose(aws, offers):
    """The type that converts an image for the fewest dollars, of those that the account's quota allows."""
    quota = quota_of(aws, offers[0][0], spot=False)
    allowed = [name for name, _, vcpus in offers if quota is None or vcpus <= quota]
    if not allowed:
        raise RunError(
            f"{quota:.0f} vCPUs of on-demand standard instances are allowed, and the smallest that has the disk needs "
            f"{min(vcpus for *_, vcpus in offers)}: ask for them with: aws service-quotas "
            "request-service-quota-increase --service-code ec2 --quota-code L-1216C47A --desired-value 16"
        )
    return allowed[0]


def plan_lines(record, files, hours, a_day, offers, source, spent):
    """hours: expected, lowest, highest; a_day: dollars for what the bucket keeps; spent: dollars so far."""
    names = ", ".join(os.path.basename(file.name) for file in files[:3])
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    price, gigabytes = record["dollars_per_hour"], sum(file.bytes for file in files) / 1e9
    middle, low, high = hours
    yield f"{' '.join(record['from'])}: {len(files)} files, {gigabytes:.1f} GB ({names}{more}), all there"
    yield f"{record['config']} at {record['commit'][:12]} {' '.join(record['settings'])}".rstrip()
    yield f"on one {record['instance']}, on demand, {record['region']}: ${price:.3f}/h ({source})"
    listed = ", ".join(f"{name} ${dollars:.2f}" for name, dollars, _ in offers)
    yield f"a million images, by the table's prices, on what has the disk for it: {listed}"
    yield (
        f"projected: {middle:.1f} h ({low:.1f} to {high:.1f}, by the origin's speed), ${middle * price:.2f} "
        f"(${low * price:.2f} to ${high * price:.2f}); while it lasts the bucket keeps what "
        f"was fetched, ${a_day:.2f} a day"
    )
    yield (
        f"it ends at ${record['budget']:.2f}" + (f", of which ${spent:.2f} are spent" if spent else "")
        + " at the latest; an interrupted one goes on with the same command"
    )  # fmt: skip
