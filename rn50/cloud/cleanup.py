"""The end of a run's instance, and of everything that was made in the account."""

import contextlib
import time
from functools import partial

from rn50.cloud import store as cloud
from rn50.cloud.account import check_bucket, role_name
from rn50.cloud.aws import ALIVE, command, instances_of, once_ready, pause
from rn50.cloud.status import known_run
from rn50.errors import RunError

STOP_PATIENCE = 240  # seconds


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
        pause()
    else:
        print("it did not answer; terminating it. What the bucket has is the last mirrored checkpoint")
    aws.client("ec2").terminate_instances(InstanceIds=[i["InstanceId"] for i in alive])
    print(f"terminated. Go on with: {command(aws, 'resume', args.run)}")


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
    """Take its roles out of an instance profile, and delete it."""
    for role in roles:
        iam.remove_role_from_instance_profile(InstanceProfileName=name, RoleName=role["RoleName"])
    iam.delete_instance_profile(InstanceProfileName=name)


def delete_role(iam, name):
    """Delete a role and the policy in it."""
    with contextlib.suppress(iam.exceptions.NoSuchEntityException):
        iam.delete_role_policy(RoleName=name, PolicyName="rn50")
    iam.delete_role(RoleName=name)
