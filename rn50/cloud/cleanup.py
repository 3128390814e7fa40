"""The end of a run's instance, and of everything that was made in the account."""

import contextlib
import time
from functools import partial

from rn50.cloud import group
from rn50.cloud import store as cloud
from rn50.cloud.account import check_bucket, converter_name, role_name, secret_name
from rn50.cloud.aws import ALIVE, instances_of, not_known_yet, once_ready, pause
from rn50.cloud.fetch import SOURCE, delete_objects
from rn50.cloud.snapshot import PARTIAL
from rn50.cloud.status import go_on, known_run, run_names
from rn50.errors import RunError

STOP_PATIENCE = 240  # seconds


def stop(aws, args):
    """Let the run write its checkpoint, and end the instance, and the group that would bring another."""
    store, record = known_run(aws, args)
    alive, groups = instances_of(aws, args.run), group.found(aws, args.run)
    if not alive and not any(group.may_launch(each) for each in groups):
        group.remove(aws, groups)
        print(f"{args.run} has no instance")
        return
    # from here on nothing is replaced, whatever becomes of the rest
    group.throw(aws.client("autoscaling"), group.no_more([each["AutoScalingGroupName"] for each in groups]))
    store.write("stop", {"asked": time.time()})
    if alive:
        wait_for_checkpoint(aws, args, store, alive[0]["InstanceId"])
    group.remove(aws, groups)
    alive = instances_of(aws, args.run)
    if alive:
        end_instances(aws, alive)
    if record.get("secret"):
        forget_secret(aws)
    print(f"terminated. Go on with: {go_on(aws, record)}")


def wait_for_checkpoint(aws, args, store, name):
    """Wait until the instance says that it has stopped, or for as long as that may take."""
    print(f"asked {name} to save a checkpoint and end; waiting for it, at most {STOP_PATIENCE} s")
    give_up = time.monotonic() + STOP_PATIENCE
    while time.monotonic() < give_up and instances_of(aws, args.run, states=("running",)):
        found = store.read(f"instances/{name}.json") or {}
        if found.get("state") in cloud.GONE:
            print(f"{name} has stopped: {found.get('reason')}")
            return
        pause()
    print("it did not answer; terminating it. What the bucket has is the last mirrored checkpoint")


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
    groups = group.found(aws)
    if groups:  # first: they would launch again what is terminated
        listed = ", ".join(each["AutoScalingGroupName"] for each in groups)
        things.append((f"Auto Scaling groups {listed}, with their launch templates", lambda: group.remove(aws, groups)))
    alive = instances_of(aws, states=(*ALIVE, "shutting-down"))
    if alive:
        ids = [i["InstanceId"] for i in alive]
        things.append((f"instances {', '.join(ids)}", partial(end_instances, aws, alive, wait=True)))
    ours = [{"Name": "tag:project", "Values": ["rn50"]}]
    free = [*ours, {"Name": "status", "Values": ["available"]}, of_bucket(aws)]
    for volume in ec2.describe_volumes(Filters=free)["Volumes"]:
        name = volume["VolumeId"]
        things.append((f"volume {name}", lambda name=name: ec2.delete_volume(VolumeId=name)))
    for firewall in ec2.describe_security_groups(Filters=ours)["SecurityGroups"]:
        # it cannot go before the network interfaces of its last instance have
        delete = partial(once_ready, ec2.delete_security_group, "DependencyViolation", GroupId=firewall["GroupId"])
        things.append((f"security group {firewall['GroupId']}", delete))
    with_groups = {group.template_of(each) for each in groups}
    for template in ec2.describe_launch_templates(Filters=[*ours, of_bucket(aws)])["LaunchTemplates"]:
        name = template["LaunchTemplateName"]
        if name not in with_groups:
            things.append((f"launch template {name}", partial(ec2.delete_launch_template, LaunchTemplateName=name)))
    for role in (role_name(aws.bucket), converter_name(aws.bucket)):
        things += role_and_profile(iam, role)
    things += secret_and_topic(aws)
    uploads = s3.list_multipart_uploads(Bucket=aws.bucket, Prefix=f"{cloud.PREFIX}/").get("Uploads", [])
    for upload in uploads:
        key, number = upload["Key"], upload["UploadId"]
        things.append(
            (
                f"unfinished upload {key}",
                lambda key=key, number=number: s3.abort_multipart_upload(Bucket=aws.bucket, Key=key, UploadId=number),
            )
        )
    prefixes = [cloud.PREFIX] if data else [SOURCE, PARTIAL]  # what an unfinished conversion keeps costs 11 cents a day
    for prefix in prefixes:
        found = list(cloud.objects(s3, aws.bucket, f"{prefix}/").items())
        text = f"{len(found)} objects, {sum(size for _, size in found) / 1e9:.2f} GB, in s3://{aws.bucket}/{prefix}/"
        delete = partial(delete_objects, s3, aws.bucket, [key for key, _ in found])
        things += [(text, delete)] if found else []
    return things


def end_instances(aws, alive, wait=False):
    """Terminate them; one that was launched just now is not known everywhere yet."""
    ec2, ids = aws.client("ec2"), [instance["InstanceId"] for instance in alive]
    once_ready(ec2.terminate_instances, not_known_yet, InstanceIds=ids)
    if wait:
        ec2.get_waiter("instance_terminated").wait(InstanceIds=ids)


def of_bucket(aws):
    return {"Name": "tag:rn50-bucket", "Values": [aws.bucket]}


def role_and_profile(iam, role):
    """What there is of a role and its profile, as `find_everything` lists things."""
    with contextlib.suppress(iam.exceptions.NoSuchEntityException):
        profile = iam.get_instance_profile(InstanceProfileName=role)["InstanceProfile"]
        yield f"instance profile {role}", lambda: delete_profile(iam, role, profile["Roles"])
    with contextlib.suppress(iam.exceptions.NoSuchEntityException):
        iam.get_role(RoleName=role)
        yield f"role {role}", lambda: delete_role(iam, role)


def secret_and_topic(aws):
    """A conversion's token that was left behind, and the topic of the mails."""
    sns, store = aws.client("sns"), aws.store(cloud.CONVERSION)
    if (store.read("launch.json") or {}).get("secret") and store.read("ended") is None:
        yield f"SSM parameter {secret_name(aws.bucket)}", partial(forget_secret, aws)
    topics = {(aws.store(run).read("launch.json") or {}).get("notify") for run in run_names(aws)} - {None}
    for topic in sorted(topics):
        yield f"topic {topic}", partial(sns.delete_topic, TopicArn=topic)


def forget_secret(aws):
    """Delete a conversion's token, which the instance deletes where it comes to its end."""
    ssm = aws.client("ssm")
    with contextlib.suppress(ssm.exceptions.ParameterNotFound):
        ssm.delete_parameter(Name=secret_name(aws.bucket))


def delete_profile(iam, name, roles):
    """Take its roles out of an instance profile, and delete it."""
    for role in roles:
        iam.remove_role_from_instance_profile(InstanceProfileName=name, RoleName=role["RoleName"])
    iam.delete_instance_profile(InstanceProfileName=name)


def delete_role(iam, name):
    """Delete a role and the policy in it."""
    with contextlib.suppress(iam.exceptions.NoSuchEntityException):
        iam.delete_role_policy(RoleName=name, PolicyName="rn50")
    iam.delete_role(RoleName=name)
