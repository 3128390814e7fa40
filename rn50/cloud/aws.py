"""AWS through boto3: clients, errors as one line that says what to do, our tags, and what waits for AWS to be ready."""

import contextlib
import sys
import time
from pathlib import Path

from rn50.cloud import store as cloud
from rn50.cloud.advice import ADVICE, advice_in, said
from rn50.errors import RunError, UsageError

ROOT = Path(__file__).resolve().parents[2]

TAG = {"project": "rn50"}
ALIVE = ("pending", "running", "stopping", "stopped")
ANY = (*ALIVE, "shutting-down", "terminated")  # EC2 shows a terminated one for an hour
# IAM is eventually consistent: what is new is not known at once to EC2, nor to IAM itself.
PROFILE_PATIENCE, POLL_SECONDS = 120, 5


class Aws:
    """boto3's clients for one region, and what has been made so far.

    published: what is known of instance types without asking AWS, which tools/ec2.py has from the cost table: functions
    vcpus(instance), disk_gb(instance), price(instance, spot) -> (dollars an hour, its date), each None where it is not
    in the table; projection(record, config) -> (text, dollars or None) and expected(record, config) -> {px: images/s}
    or None, of a run; converters(origin, gigabytes), conversion_hours(instance, origin, gigabytes) and
    kept_for_a_day(gigabytes), of a conversion.
    """

    def __init__(self, args, published):
        try:
            import boto3
        except ImportError:
            raise UsageError("tools/ec2.py needs boto3; install it with: pip install boto3") from None
        self.session = boto3.Session(region_name=args.region)
        self.region = self.session.region_name
        if not self.region:
            raise UsageError("no region is set: give --region, or set AWS_DEFAULT_REGION")
        self.bucket, self.published, self.made, self._clients = args.bucket, published, [], {}

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
        # boto3's uploads tell S3's answer as text
        advice = advice_in(str(error)) if "An error occurred" in str(error) else None
        raise RunError(f"AWS cannot be reached or used: {error}" + (f": {advice}" if advice else "")) from None


def explain(error):
    """A botocore ClientError as text."""
    code, operation = error.response["Error"]["Code"], error.operation_name
    message = error.response["Error"].get("Message", "")
    return f"AWS refuses {operation} ({code}): {said(message) or ADVICE.get(code) or message}"


def explain_any(error):
    """An error of AWS or ours as text; any other is a bug, and raised."""
    try:
        with aws_errors():
            raise error
    except RunError as explained:
        return str(explained)


def once_ready(call, refused, **options):
    """Repeat the call while AWS refuses it for what was just made or ended, which is not so everywhere at once.

    refused: the code of such an answer, or a function of the ClientError.
    """
    from botocore.exceptions import ClientError

    give_up = time.monotonic() + PROFILE_PATIENCE
    while True:
        try:
            return call(**options)
        except ClientError as error:
            again = refused(error) if callable(refused) else error.response["Error"]["Code"] == refused
            if not again or time.monotonic() > give_up:
                raise
        pause()


def not_known_yet(error):
    """Whether EC2 refuses what was made just now: its own lists, and IAM's, lag."""
    code = error.response["Error"]["Code"]
    return code in ("InvalidGroup.NotFound", "InvalidInstanceID.NotFound") or (
        code in ("InvalidParameterValue", "ValidationError") and "rofile" in str(error)
    )


def pause():
    """Wait a little before AWS is asked again."""
    time.sleep(POLL_SECONDS)


def tags(values):
    """A dict as AWS wants its tags."""
    return [{"Key": key, "Value": value} for key, value in values.items()]


def instances_of(aws, run=None, states=ALIVE):
    """EC2's instances with our tag."""
    filters = [{"Name": "tag:project", "Values": ["rn50"]}, {"Name": "instance-state-name", "Values": list(states)}]
    filters.append({"Name": "tag:rn50-bucket", "Values": [aws.bucket]})
    if run:
        filters.append({"Name": "tag:rn50-run", "Values": [run]})
    pages = aws.client("ec2").get_paginator("describe_instances").paginate(Filters=filters)
    return [i for page in pages for reservation in page["Reservations"] for i in reservation["Instances"]]


def command(where, action, run=None):
    """What to type next, whole. where: what has `bucket`."""
    python = ".venv/bin/python" if Path(sys.prefix) == ROOT / ".venv" else "python"
    return f"{python} tools/ec2.py {action} --bucket {where.bucket}" + (f" --run {run}" if run else "")
