"""A run that exists: which it is, how far it is, what it has cost and will cost, and its files."""

import time
from pathlib import Path

import yaml

from rn50.cloud import store as cloud
from rn50.cloud.aws import ALIVE, ANY, ROOT, command, instances_of
from rn50.errors import RunError, UsageError
from rn50.files import parse_rows


def known_run(aws, args):
    """(store, launch record) of --run, or of the bucket's only run."""
    if args.run is None:
        runs = sorted({key.split("/")[0] for key in cloud.objects(aws.client("s3"), aws.bucket, f"{cloud.RUNS}/",
                                                                   strip=f"{cloud.RUNS}/")})  # fmt: skip
        if len(runs) != 1:
            raise UsageError(f"say which run: --run, one of {', '.join(runs) or '(there is none)'}")
        args.run = runs[0]
    store = aws.store(cloud.check_name("--run", args.run))
    record = store.read("launch.json")
    if record is None:
        raise RunError(f"there is no run {args.run} in s3://{aws.bucket}/{cloud.RUNS}/")
    if record["region"] != aws.region:  # its instance would seem to be gone
        raise UsageError(
            f"{args.run} is in {record['region']} and the region is {aws.region}: --region {record['region']}"
        )
    return store, record


def refuse_second(aws, run):
    """RunError where the run has an instance."""
    alive = instances_of(aws, run)
    if alive:
        raise RunError(
            f"{run} has an instance already: {alive[0]['InstanceId']} is {alive[0]['State']['Name']}; see "
            f"{command(aws, 'status', run)}"
        )


def status(aws, args):
    """Print how far the run is, and what it has cost."""
    store, record = known_run(aws, args)
    found, records = instances_of(aws, args.run, states=ANY), store.instances()
    for line in status_lines(store, record, found, records, now=time.time()):
        print(line)


def status_lines(store, record, found, records, now):
    alive = [i for i in found if i["State"]["Name"] in ALIVE]
    resume_command = command(store, "resume", record["run"])
    market = "spot" if record["spot"] else "on demand"
    yield f"{record['run']}: {record['config']} at {record['commit'][:12]} on {record['instance']}, {market}"
    states = {i["InstanceId"]: i["State"]["Name"] for i in alive}
    last = records[-1] if records else None
    if last:
        seen = f"seen {span(now - last['seen'])} ago"
        reason = f" ({last['reason']})" if last.get("reason") else ""
        state = states.get(last["instance_id"], "gone")
        yield f"instance {last['instance_id']}: {state}; {last['state']}{reason}, {seen}"
        if state == "running" and now - last["seen"] > cloud.LOST_SECONDS:
            yield "warning: it runs but does not report: look with aws ssm start-session, or end it with stop"
        if state == "gone" and last["state"] in ("staging", "staged", "tuning", "training", "interrupted"):
            yield f"it was taken away: go on with {resume_command}"
    spent, reported = cloud.dollars(records), {r["instance_id"] for r in records}
    for instance in alive:
        if instance["InstanceId"] not in reported:
            up = now - instance["LaunchTime"].timestamp()
            spent += max(0.0, up) / 3600 * record["dollars_per_hour"]
            yield f"instance {instance['InstanceId']}: {instance['State']['Name']} for {span(up)}, has not reported yet"
    name = record["instance_id"]
    if name and name not in reported | set(states):
        why = next((i.get("StateReason", {}).get("Message") for i in found if i["InstanceId"] == name), None)
        yield f"instance {name}: gone before it reported ({why or 'EC2 does not say why'}): go on with {resume_command}"
    yield f"dollars so far: {spent:.2f} of {record['budget']:.2f} (instances; storage is extra)"
    rows = rows_of(store)
    epochs = epochs_of(store, record)
    if rows:
        row = rows[-1]
        best = next((r for r in reversed(rows) if "top1" in r), None)
        accuracy = f", top-1 {best['top1']:.2f} % after epoch {best['epoch'] + 1}" if best else ""
        yield f"epoch {row['epoch'] + 1} of {epochs}, {row['resolution']} px, loss {row['train_loss']:.3f}{accuracy}"
        yield forecast(record, rows, epochs, spent)
    else:
        yield "no epoch is done yet"
    ended = store.read("status.json")
    if ended:
        yield f"last command: {ended['status']} ({ended['reason']}) at step {ended['step']}"
    console = store.read_bytes(cloud.CONSOLE) or store.read_bytes(cloud.SETUP_LOG) or b""
    console = console.decode(errors="replace").strip().splitlines()
    yield from (f"  | {line}" for line in console[-5:])


def forecast(record, rows, epochs, spent):
    """What the run will cost and reach: its own forecast where its log has one, else the pace of its latest epochs."""
    latest = rows[-1]
    if latest["epoch"] + 1 == epochs:
        return "all epochs are done"
    own = latest.get("forecast")
    more = latest.get("dollars_to_finish")
    if isinstance(own, dict) and own.get("top1") is not None:
        money = f", ${spent + more:.2f} in all" if more is not None else ""
        return f"forecast: top-1 {own['top1']:.1f} % at {own.get('evaluation', 'the end')}{money}"
    recent = [r["train_seconds"] + r.get("val_seconds", 0) for r in rows[-3:]]
    left = (epochs - latest["epoch"] - 1) * sum(recent) / len(recent)
    total = spent + left / 3600 * record["dollars_per_hour"]
    return (
        f"forecast: {span(left)} more at the pace of the last epochs, ${total:.2f} in all "
        "(later epochs at a higher resolution take longer)"
    )


def rows_of(store):
    """The rows of the run's log that are in the bucket."""
    data = store.read_bytes("log.jsonl") or b""
    rows = parse_rows(data.decode(errors="replace"), f"{store.prefix}/log.jsonl")
    return sorted(rows, key=lambda row: row["epoch"])


def epochs_of(store, record):
    """training.epochs as the run has it: --set counts over the file."""
    data = store.read_bytes("config.yaml")
    config = yaml.safe_load(data) if data else read_config(record["config"])
    return config["training"]["epochs"]


def read_config(path):
    """The YAML at `path`, within the repository, as a dict."""
    try:
        return yaml.safe_load((ROOT / path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; --config is a path within the repository") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {error}") from None


def span(seconds):
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def fetch(aws, args):
    """Copy the run's files to a local run folder."""
    store, record = known_run(aws, args)
    folder = Path(args.out or "runs") / args.run
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in store.keys().items():
        if "/" in name or name == "stop":
            continue
        partial = folder / f"{name}.partial"
        aws.client("s3").download_file(aws.bucket, f"{store.prefix}/{name}", str(partial))
        partial.rename(folder / name)
        print(f"{folder / name}  {size} bytes")
    print(f"{len(rows_of(store))} epochs; curves: python tools/compare_runs.py {folder} --out curves.png")
