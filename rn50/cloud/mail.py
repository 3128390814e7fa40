"""Mails about a run, through an SNS topic of the bucket: made and subscribed to by the launch, used by the instance."""

from rn50.cloud.account import role_name
from rn50.cloud.aws import TAG, tags
from rn50.errors import UsageError

BUDGET_SHARE = 0.8


def address(text):
    """The address of `mailto:somebody@somewhere`; UsageError for anything else."""
    kind, _, value = text.partition(":")
    if kind != "mailto" or value.count("@") != 1 or not all(value.split("@")) or " " in value:
        raise UsageError(f"--notify {text} is not of the form mailto:you@example.org")
    return value


def subscribe(aws, to):
    """The topic's ARN, made and subscribed to where that is missing. AWS asks the address for a confirmation once."""
    sns = aws.client("sns")
    topic = sns.create_topic(Name=role_name(aws.bucket), Tags=tags(TAG))["TopicArn"]
    pages = sns.get_paginator("list_subscriptions_by_topic").paginate(TopicArn=topic)
    known = [entry for page in pages for entry in page["Subscriptions"] if entry["Endpoint"] == to]
    if not known:
        sns.subscribe(TopicArn=topic, Protocol="email", Endpoint=to)
        aws.note(f"topic {topic}, for {to}: AWS has sent a mail there with a link to confirm")
    elif known[0]["SubscriptionArn"] == "PendingConfirmation":
        print(f"  {to} has not confirmed AWS's mail yet: nothing is sent before that")
    return topic


class Postman:
    """Tells the run's topic of events, each kind that is given `once` a single time over all instances.

    store: the run's; record: its launch record, with `notify`, a topic or None. What SNS refuses is said and forgotten:
    no mail is worth a run.
    """

    def __init__(self, store, record, client, say):
        self.store, self.record, self.client, self.say = store, record, client, say

    def tell(self, subject, text, once=None):
        from botocore.exceptions import BotoCoreError, ClientError

        if not self.record.get("notify"):
            return
        try:
            told = self.store.read("told") or []
            if once in told:
                return
            # SNS takes subjects of 100 ASCII characters at most, in one line
            line = f"rn50 {self.record['run']}: {subject}".encode("ascii", "replace").decode()[:100]
            self.client("sns").publish(TopicArn=self.record["notify"], Subject=line, Message=text)
            if once:
                self.store.write("told", [*told, once])
        except (BotoCoreError, ClientError, OSError) as error:
            self.say(f"warning: no mail could be sent: {str(error).splitlines()[0]}")
