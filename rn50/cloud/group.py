"""What brings a spot instance back: an Auto Scaling group of size one, and its switches.

Why not an EC2 Fleet of type maintain: it replaces as well, but has neither processes that can be suspended nor actions
at an hour, and both are what keeps this from looping, whatever else fails:

- The group begins with ReplaceUnhealthy suspended. An instance resumes it at its first start, after it has shown that
  its role may end the group. So where that permission is missing, nothing is ever replaced.
- An action at AWS ends the group at an hour that the living instance moves on. Where no instance has been well for
  `patience_hours` (no room anywhere, the role or the bucket is gone), AWS itself ends it, without any of us.
- What has ended keeps Launch suspended, under which no size, no action and no health check launches anything. Another
  attempt is another group.

With `fallback`, a second group of on-demand instances begins at the hour at which the first ends.

Each switch is given as [(operation, parameters)] of the service `autoscaling`: the instance calls the first of them
with the aws command, before it has any package, and all others use boto3.
"""

import contextlib
from datetime import UTC, datetime, timedelta

from rn50.cloud.account import role_name

END, BEGIN = "end", "begin"
ON_DEMAND = "-on-demand"
# Another zone's instance before this one is gone would be a second one for the same run.
SUSPENDED_FOR_GOOD = ["AZRebalance"]
NOTHING = {"MinSize": 0, "MaxSize": 0, "DesiredCapacity": 0}
ONE = {"MinSize": 0, "MaxSize": 1, "DesiredCapacity": 1}


def names(bucket, run, attempt, fallback):
    """The names of an attempt's groups: that of spot instances, and the one that takes its place."""
    name = f"{role_name(bucket)}-{run}-{attempt}"
    return [name, f"{name}{ON_DEMAND}"] if fallback else [name]


def arming(group):
    """From now on the group replaces what it loses. The first call is refused where its end would be, too."""
    return [
        ("update_auto_scaling_group", {"AutoScalingGroupName": group, "MinSize": 0, "MaxSize": 1}),
        ("resume_processes", {"AutoScalingGroupName": group, "ScalingProcesses": ["ReplaceUnhealthy"]}),
    ]


def renewal(groups, group, patience_hours, now):
    """Move on the hour at which AWS ends `group`; if it is the first of two, also that at which the other begins.

    now: seconds since 1970; groups: `names`; patience_hours: from now.
    """
    later = [_at(now, patience_hours), _at(now, 2 * patience_hours)]
    switches = [_action(group, END, later[0], NOTHING)]
    if group == groups[0] and len(groups) > 1:
        # one minute later: two instances of one run would be in each other's way
        begin = (datetime.fromisoformat(later[0]) + timedelta(minutes=1)).isoformat()
        switches += [_action(groups[1], BEGIN, begin, ONE), _action(groups[1], END, later[1], NOTHING)]
    return switches


def no_more(groups):
    """Nothing is launched for these groups any more, whatever their size; what lives stays."""
    return [("suspend_processes", {"AutoScalingGroupName": group, "ScalingProcesses": ["Launch"]}) for group in groups]


def ending(groups):
    """No instance of these groups any more, and none again. Living ones are terminated by AWS within minutes."""
    return [
        switch
        for group in groups
        for switch in (*no_more([group]), ("update_auto_scaling_group", {"AutoScalingGroupName": group, **NOTHING}))
    ]


def throw(client, switches, refused=None):
    """Call boto3's client. refused: is told what AWS refuses, and the rest is done; else ClientError."""
    from botocore.exceptions import BotoCoreError, ClientError

    for operation, parameters in switches:
        try:
            getattr(client, operation)(**parameters)
        except (BotoCoreError, ClientError) as error:
            if refused is None:
                raise
            refused(str(error).splitlines()[0])


def _action(group, name, start, sizes):
    given = {"AutoScalingGroupName": group, "ScheduledActionName": f"{group}-{name}", "StartTime": start, **sizes}
    return "put_scheduled_update_group_action", given


def _at(now, hours):
    return datetime.fromtimestamp(int(now + 3600 * hours), UTC).isoformat()


# --- From the laptop -------------------------------------------------------------------------------------------------


def create(*, client, groups, template, subnets, types, most, instance, marks, patience_hours, now):
    """Make the groups, one with a spot instance; the switches are thrown before anything may be launched.

    template: the launch template's name; subnets: ids; types: names, for spot; most: dollars an hour for any of them;
    instance: the type on demand; marks: tags, for the group and what it launches.
    """
    for name in groups:
        spot = name == groups[0]
        overrides = [{"InstanceType": each} for each in (types if spot else [instance])]
        distribution = {"OnDemandBaseCapacity": 0, "OnDemandPercentageAboveBaseCapacity": 0 if spot else 100}
        if spot:
            # of the pools that are least likely to be taken away, the cheapest: AWS's own advice, and a student's
            distribution["SpotAllocationStrategy"] = "price-capacity-optimized"
            distribution["SpotMaxPrice"] = f"{most:.4f}"
        client.create_auto_scaling_group(
            AutoScalingGroupName=name,
            **NOTHING | {"MaxSize": 1},
            VPCZoneIdentifier=",".join(subnets),
            MixedInstancesPolicy={
                "LaunchTemplate": {
                    "LaunchTemplateSpecification": {"LaunchTemplateName": template, "Version": "$Latest"},
                    "Overrides": overrides,
                },
                "InstancesDistribution": distribution,
            },
            CapacityRebalance=False,  # it launches a second one beside the first
            Tags=[{**mark, "PropagateAtLaunch": True} for mark in marks],
        )
        suspended = [*SUSPENDED_FOR_GOOD, "ReplaceUnhealthy"]
        client.suspend_processes(AutoScalingGroupName=name, ScalingProcesses=suspended)
    throw(client, renewal(groups, groups[0], patience_hours, now))
    client.update_auto_scaling_group(AutoScalingGroupName=groups[0], **ONE)


def found(aws, run=None):
    """The groups that were made for the bucket, or for one of its runs, as AWS describes them."""
    filters = [{"Name": "tag:project", "Values": ["rn50"]}, {"Name": "tag:rn50-bucket", "Values": [aws.bucket]}]
    filters += [{"Name": "tag:rn50-run", "Values": [run]}] if run else []
    pages = aws.client("autoscaling").get_paginator("describe_auto_scaling_groups").paginate(Filters=filters)
    return [group for page in pages for group in page["AutoScalingGroups"]]


def may_launch(group):
    """Whether the group would still launch an instance."""
    suspended = {process["ProcessName"] for process in group["SuspendedProcesses"]}
    # its first instance could not show that it may end the group, or has not come to it yet
    unarmed = "ReplaceUnhealthy" in suspended and bool(group["Instances"])
    return group["DesiredCapacity"] > 0 and "Launch" not in suspended and not unarmed


def refusals(aws, group):
    """What AWS said of the launches that failed since the last one that did not, newest first."""
    told = aws.client("autoscaling").describe_scaling_activities(AutoScalingGroupName=group["AutoScalingGroupName"])
    failed = []
    for activity in told["Activities"]:
        if activity["StatusCode"] != "Failed":
            break
        failed.append(activity.get("StatusMessage", "no reason given"))
    return failed


def remove(aws, groups):
    """Delete groups, with what is left in them, and their launch templates."""
    scaling, ec2 = aws.client("autoscaling"), aws.client("ec2")
    for group in groups:
        name = group["AutoScalingGroupName"]
        # deleting takes AWS minutes, in which it would go on launching
        throw(scaling, ending([name]))
        scaling.delete_auto_scaling_group(AutoScalingGroupName=name, ForceDelete=True)
    for name in {template_of(group) for group in groups}:
        with contextlib.suppress(ec2.exceptions.ClientError):  # two groups have one; or it was deleted by hand
            ec2.delete_launch_template(LaunchTemplateName=name)


def template_of(group):
    """The name of a group's launch template: that of the attempt's first group."""
    return group["AutoScalingGroupName"].removesuffix(ON_DEMAND)
