"""What an instance costs an hour, and which types may stand in for the one that was asked for."""

import json
import time

from rn50.cloud.account import quota_of
from rn50.errors import RunError

# Of an instance's own disk: a file system takes some, and the run's folder is there too.
DISK_SHARE = 0.95


def hourly_prices(aws, instance, spot, zones):
    """({zone: dollars an hour}, where they are from): spot prices of now, or the on-demand price."""
    if spot:
        prices = spot_prices(aws, [instance], zones).get(instance)
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


def spot_prices(aws, instances, zones):
    """{type: {zone: dollars an hour}} of now, for those of the types and zones that have a price."""
    history = aws.client("ec2").describe_spot_price_history(
        InstanceTypes=instances, ProductDescriptions=["Linux/UNIX"], StartTime=time.time()
    )["SpotPriceHistory"]
    prices = {}
    for entry in reversed(history):  # newest first
        if entry["AvailabilityZone"] in zones and float(entry["SpotPrice"]):
            prices.setdefault(entry["InstanceType"], {})[entry["AvailabilityZone"]] = float(entry["SpotPrice"])
    return prices


def spot_types(aws, record, zones, gigabytes, own_price):
    """{type: dollars an hour, of its dearest zone}: what may stand in for the type that was asked for.

    Those of its family with the same GPUs and at least its vCPUs, memory and room for `gigabytes`, which the account's
    quota allows and whose spot price is below the on-demand price of what was asked for: spot is there to save.
    """
    asked, ec2, limit = record["instance"], aws.client("ec2"), record["dollars_on_demand"]
    types = {asked: own_price}
    family = f"{asked.partition('.')[0]}.*"
    pages = ec2.get_paginator("describe_instance_types").paginate(
        Filters=[{"Name": "instance-type", "Values": [family]}]
    )
    found = {each["InstanceType"]: each for page in pages for each in page["InstanceTypes"]}
    if asked not in found or limit is None:
        return types
    quota = quota_of(aws, asked, spot=True)

    def size(name):
        info = found[name]
        gpus = [(gpu["Name"], gpu["Count"]) for gpu in info.get("GpuInfo", {}).get("Gpus", [])]
        disk = info.get("InstanceStorageInfo", {}).get("TotalSizeInGB", 0)
        return gpus, info["VCpuInfo"]["DefaultVCpus"], info["MemoryInfo"]["SizeInMiB"], disk

    gpus, vcpus, memory, disk = size(asked)
    larger = [
        name
        for name in found
        if name != asked and (theirs := size(name))[0] == gpus and theirs[1] >= vcpus and theirs[2] >= memory
        and (theirs[3] * DISK_SHARE >= gigabytes or not disk) and (quota is None or theirs[1] <= quota)
    ]  # fmt: skip
    prices = spot_prices(aws, larger, zones) if larger else {}
    highest = {name: max(by_zone.values()) for name, by_zone in prices.items()}
    return types | {name: price for name, price in sorted(highest.items(), key=lambda p: p[1]) if price < limit}


def on_demand_price(aws, instance):
    """On-demand dollars an hour of an instance type, or None where nobody says."""
    known = aws.published.price(instance, False)
    return listed_price(aws, instance) or (known and known[0])


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
