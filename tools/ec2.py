"""ImageNet to a trained model on EC2, from this machine: check, convert, launch, watch, stop, resume, fetch, clean.

    python tools/ec2.py doctor  --bucket BUCKET --instance g5.2xlarge --spot
    python tools/ec2.py convert --bucket BUCKET --from hf          # ImageNet to the bucket, once; kaggle, s3://, links
    python tools/ec2.py launch  --bucket BUCKET --config rn50_configs/rn50_78.yaml --spot --budget 25
    python tools/ec2.py status  --bucket BUCKET --run rn50_78 --watch      # also: stop, resume, fetch
    python tools/ec2.py clean   --bucket BUCKET                    # lists everything that is tagged, and removes it

Credentials and region are boto3's (aws configure, AWS_PROFILE, AWS_DEFAULT_REGION). The instance has no open port
(access by Session Manager), requires IMDSv2, has encrypted volumes and may use nothing but BUCKET/rn50. It terminates
itself when the run ends, the budget is spent, or nothing has happened for a while; a spot instance that is taken away
is replaced until then. docs/ec2.md tells the rest.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a laptop has no need to install what trains

from rn50.cloud import account, cleanup, conversion, launch, status
from rn50.cloud import store as cloud
from rn50.cloud.aws import Aws, aws_errors
from rn50.command import run
from rn50.errors import UsageError
from rn50.files import expanded
from rn50.help import HelpFormatter
from rn50.planning import conversion as converting
from rn50.planning import costs, speeds


def main(argv=None):
    args = arguments(argv)
    with aws_errors():
        aws = Aws(args, Published())
        ACTIONS[args.action](aws, args)


class Published:
    """What the cost table knows of instance types, and projects; rn50/cloud loads no planning."""

    def __init__(self):
        self._table = costs.read_table()
        self._instances = self._table.cpu | {row["name"]: row for row in self._table.instance}

    def vcpus(self, instance):
        """Of an instance type, or None."""
        row = self._instances.get(instance)
        return row and int(row["vcpus"])

    def disk_gb(self, instance):
        """Of its own disks, or None."""
        return self._instances.get(instance, {}).get("disk_gb")

    def price(self, instance, spot):
        """(dollars an hour in us-east-1, on demand or the highest spot price seen; the table's date), or None."""
        row = self._instances.get(instance)
        dollars = row and row["high" if spot else "value"]
        return dollars and (dollars, row["date"])

    def expected(self, record, config):
        """{px: training images/s} of a run's epochs, from published figures, or None where there are none for it."""
        machine, recipe = self._machine(record["instance"], spot=False), self._recipe(record, config)
        if machine is None or recipe is None:
            return None
        fitted, loader = speeds.fit(self._table), speeds.loader_rates(self._table)
        sizes = dict(zip(recipe.resolutions, recipe.rungs, strict=True))
        rates = {
            px: speeds.pace(self._table, fitted, loader, recipe, machine, px, rung, recipe.passes)[0]
            for px, rung in sizes.items()
        }
        return {px: round(rate, 1) for px, rate in rates.items()}

    def converters(self, origin, gigabytes):
        """[(instance type, dollars for a million images, vCPUs)] of those that can convert, the cheapest first."""
        millions = (self._table.value("images_train") + self._table.value("images_val")) / 1e6
        offers = converting.offers(self._table, origin, gigabytes)
        return [(row["name"], dollars / millions, int(row["vcpus"])) for dollars, _, row in offers]

    def kept_for_a_day(self, gigabytes):
        """Dollars of so much in S3."""
        return gigabytes * self._table.value("s3_dollars_gb_month") / 30

    def conversion_hours(self, instance, origin, gigabytes):
        """(expected, lowest, highest) hours of a conversion."""
        if instance not in self._table.cpu:
            raise UsageError(f"--instance {instance}: what converts must be one of {', '.join(self._table.cpu)}")
        return converting.hours(self._table, self.vcpus(instance), origin, gigabytes)

    def projection(self, record, config):
        """(what the run should take, from published figures, its dollars); says so where there are none for it."""
        table, machine = self._table, self._machine(record["instance"], spot=False)
        recipe = self._recipe(record, config)
        if machine is None or recipe is None:
            return "no projection: the table of published figures has none for this instance or these settings", None
        parts, limit = speeds.hours(
            table, speeds.fit(table), speeds.loader_rates(table), recipe, machine, record["spot"]
        )
        total = sum(parts.values())
        dollars = total * record["dollars_per_hour"]
        return (
            f"projected from published figures: {total:.1f} h, ${dollars:.2f} "
            f"(limited by {limit}; tools/plan_run.py gives the range)"
        ), dollars

    def _recipe(self, record, config):
        """The Recipe of a run that the table has figures for, or None."""
        if config.get("model", {}).get("arch") != "resnet50" or record["settings"]:
            return None
        try:
            return costs.recipe_of(record["run"], config)
        except KeyError:
            return None

    def _machine(self, instance, spot):
        return next((m for m in costs.machines(self._table, spot) if m.name == instance), None)


def positive(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def share(text):
    value = float(text)
    if not 0 <= value < 1:
        raise ValueError
    return value


def patience(text):
    value = positive(text)
    if value < 1:  # setting up takes up to half an hour, in which nothing is renewed
        raise ValueError
    return value


def count(text):
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    helps = {"doctor": "is everything there?", "convert": "ImageNet to .beton files in the bucket, once",
             "launch": "start a run on a new instance", "resume": "go on with a run on a new instance",
             "status": "how far it is, and what it has cost", "stop": "save a checkpoint, and end the instance",
             "fetch": "copy the results here", "clean": "list and remove what was made"}  # fmt: skip
    made = {name: actions.add_parser(name, help=text) for name, text in helps.items()}
    for sub in made.values():
        sub.add_argument("--bucket", required=True, help="everything is kept in s3://BUCKET/rn50/")
        sub.add_argument("--region", help="default: boto3's")
    for name in ("doctor", "convert", "launch", "resume"):
        made[name].add_argument(
            "--ami", help="image to start; default: the newest Deep Learning Base image, or Ubuntu's"
        )
    for name in ("doctor", "launch"):
        made[name].add_argument("--instance", default="g5.2xlarge", help="instance type")
        made[name].add_argument("--spot", action="store_true", help="cheaper; what AWS takes away it replaces")
    made["convert"].add_argument("--from", dest="origin", nargs="+", required=True, metavar="WHERE",
                                 help="hf, kaggle, s3://BUCKET/PREFIX, or image-net.org's two links")  # fmt: skip
    made["convert"].add_argument("--config", default="rn50_configs/write_imagenet.yaml", help="as committed")
    made["convert"].add_argument("--instance", help="default: what converts for the fewest dollars")
    made["launch"].add_argument("--config", required=True, help="rn50_configs/NAME.yaml, as committed")
    for name in ("convert", "launch"):
        sub = made[name]
        needed = name == "launch"
        sub.add_argument("--budget", type=positive, required=needed, help="dollars for instances, over all of them")
        sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides a key")
        sub.add_argument("--commit", help="what the instance runs; default: HEAD")
        sub.add_argument(
            "--notify", metavar="mailto:ADDRESS", help="mails of the end, interruptions, trouble, 80 %% spent"
        )
    made["launch"].add_argument("--tune", action="store_true", help="measure there what is fastest, and train with it")
    made["launch"].add_argument("--idle-minutes", type=positive, default=30, help="without progress, until it ends")
    made["launch"].add_argument("--min-speed", type=share, default=0.0, metavar="SHARE",
                                help="stop under this share of the expected images/s for 30 minutes")  # fmt: skip
    made["resume"].add_argument("--budget", type=positive, help="a new limit, over the whole run")
    made["resume"].add_argument("--instance", help="another instance type")
    market = made["resume"].add_mutually_exclusive_group()
    market.add_argument("--on-demand", action="store_const", const=True, help="not spot this time")
    market.add_argument("--spot", action="store_const", const=False, dest="on_demand", help="spot this time")
    for name, hours, replacements in (("launch", 6.0, 20), ("resume", None, None)):
        sub = made[name]
        sub.add_argument(
            "--fallback", choices=("on-demand",), help="where no spot instance has been for PATIENCE hours"
        )
        sub.add_argument("--patience-hours", type=patience, default=hours, metavar="PATIENCE",
                         help="spot: without a well instance, until the group ends (6; at least 1)")  # fmt: skip
        sub.add_argument("--replacements", type=count, default=replacements, help="spot: at most so many (20)")
    made["status"].add_argument("--watch", nargs="?", type=positive, const=20.0, metavar="SECONDS",
                                help="a screen that is renewed")  # fmt: skip
    made["fetch"].add_argument("--out", type=expanded, help="folder of run folders (default: runs)")
    for name in ("launch", "resume", "status", "stop", "fetch"):
        made[name].add_argument("--run", help="the run's name; launch: default logging.run_name of the config")
    for name in ("convert", "launch", "resume", "clean"):
        made[name].add_argument("--yes", action="store_true", help="do not ask")
    made["clean"].add_argument("--data", action="store_true", help="betons, code and results in the bucket too")
    args = parser.parse_args(argv)
    cloud.check_name("--bucket", args.bucket)
    if args.action == "resume" and args.run is None:
        parser.error("resume needs --run")
    return args


# Looked up, so that a word that is not here fails and cannot come to `clean`, which deletes.
ACTIONS = {
    "doctor": account.doctor,
    "convert": conversion.convert,
    "launch": launch.launch,
    "resume": launch.resume,
    "status": status.status,
    "stop": cleanup.stop,
    "fetch": status.fetch,
    "clean": cleanup.clean,
}


if __name__ == "__main__":
    run(main)
