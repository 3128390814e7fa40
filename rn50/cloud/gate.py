"""What a fresh instance asks before anything is installed: is there still work, and money for it?

    python3 -m rn50.cloud.gate     # prints the minutes that are left to it; status 3: this run has ended

It runs with the system's Python and the aws command alone, from the tree that the user data has just fetched. An
instance that is let in has noted itself in the bucket, so that its dollars count from its start on, and its group
replaces it from now on. The user data ends the group for one that is not. It keeps its path: the user data of a later
version may call it in the tree of an earlier one.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rn50.cloud import group
from rn50.cloud import store as cloud
from rn50.command import run
from rn50.errors import RunError

ENDED = 3
TRIES, WAIT_SECONDS = 6, 10


def main():
    place = f"s3://{os.environ['RN50_BUCKET']}/{cloud.RUNS}/{os.environ['RN50_RUN']}"
    with tempfile.TemporaryDirectory() as folder:
        wanted = ("launch.json", "stop", "ended", "instances/*")
        includes = [word for name in wanted for word in ("--include", name)]
        aws("s3", "cp", "--recursive", "--only-show-errors", f"{place}/", folder, "--exclude", "*", *includes)
        found = Path(folder)
        records = [json.loads(path.read_text()) for path in sorted(found.glob("instances/*.json"))]
        names = ("launch.json", "ended", "stop")
        launch, ended, stop = (json.loads(p.read_text()) if (p := found / n).exists() else None for n in names)
    if launch is None:
        raise RunError(f"there is no {place}/launch.json")
    why = refusal(launch, ended, stop, records, os.environ["RN50_INSTANCE"])
    if why:
        state, reason = why
        say(f"{state}: {reason}")
        if ended is None:
            put(f"{place}/ended", {"state": state, "reason": reason, "time": time.time()})
        sys.exit(ENDED)
    price = cloud.price_of(launch, os.environ.get("RN50_TYPE"), os.environ.get("RN50_MARKET"))
    record = cloud.instance_record(os.environ, price)
    put(f"{place}/instances/{record['instance_id']}.json", record | {"state": "starting", "seen": time.time()})
    arm(launch, os.environ.get("RN50_MARKET"))
    left = launch["budget"] - cloud.dollars(records)
    print(max(1, int(60 * left / price)))


def refusal(launch, ended, stop, records, instance_id):
    """(how the run has ended, why) where an instance must not begin, or None."""
    if ended:
        return ended["state"], ended["reason"]
    if stop:
        return "stopped", "stop was asked for"
    spent, others = cloud.dollars(records), [r for r in records if r["instance_id"] != instance_id]
    if spent >= launch["budget"]:
        return "budget", f"${spent:.2f} of ${launch['budget']:.2f} are spent"
    # those of earlier attempts do not count: whoever resumes means it
    attempt = [r for r in others if r["started"] >= launch.get("attempt_started", 0)]
    if launch.get("groups") and len(attempt) > launch["replacements"]:
        return "failed", f"it was replaced {launch['replacements']} times, the most that --replacements allows"
    return None


def arm(launch, market):
    """Have the group replace this instance, and end only when nothing has been well for a while."""
    if not launch.get("groups"):
        return
    mine = cloud.group_of(launch, market)
    switches = group.arming(mine) + group.renewal(launch["groups"], mine, launch["patience_hours"], time.time())
    # on demand, it takes the place of the spot instances
    for operation, parameters in group.ending([g for g in launch["groups"][:1] if g != mine]) + switches:
        aws("autoscaling", operation.replace("_", "-"), "--cli-input-json", json.dumps(parameters))


def put(place, value):
    aws("s3", "cp", "--only-show-errors", "-", place, given=json.dumps(value))


def aws(*words, given=None):
    """The aws command; RunError where it fails for a minute: its role may be new."""
    for attempt in range(TRIES):
        done = subprocess.run(["aws", *words], input=given, capture_output=True, text=True)
        if not done.returncode:
            return
        if attempt < TRIES - 1:
            time.sleep(float(os.environ.get("RN50_POLL_SECONDS", WAIT_SECONDS)))
    said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    raise RunError(f"aws {' '.join(words[:2])} failed: {said}")


def say(message):
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
