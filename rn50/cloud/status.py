"""A run that exists: which it is, how far it is, what it has cost and will cost, and its files."""

import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from rn50.cloud import group, watch
from rn50.cloud import store as cloud
from rn50.cloud.aws import ALIVE, ANY, ROOT, aws_errors, command, instances_of
from rn50.cloud.pace import LOW, slow_line
from rn50.cloud.watch import span
from rn50.errors import RunError, UsageError
from rn50.files import parse_rows


def run_names(aws):
    """The bucket's runs, a conversion among them."""
    found = cloud.objects(aws.client("s3"), aws.bucket, f"{cloud.RUNS}/", strip=f"{cloud.RUNS}/")
    return sorted({key.split("/")[0] for key in found})


def go_on(where, record):
    """The command that goes on with a launch record's run. where: what has `bucket`."""
    return command(where, "convert") if record.get("kind") else command(where, "resume", record["run"])


def known_run(aws, args):
    """(store, launch record) of --run, or of the bucket's only run."""
    if args.run is None:
        runs = run_names(aws)
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
    """RunError where the run has an instance, or a group that may launch one."""
    alive = instances_of(aws, run)
    waiting = [found["AutoScalingGroupName"] for found in group.found(aws, run) if group.may_launch(found)]
    if waiting and not alive:
        raise RunError(
            f"{run} has a group already, which waits for an instance: {waiting[0]}; see {command(aws, 'status', run)}, "
            f"or end it with {command(aws, 'stop', run)}"
        )
    if alive:
        raise RunError(
            f"{run} has an instance already: {alive[0]['InstanceId']} is {alive[0]['State']['Name']}; see "
            f"{command(aws, 'status', run)}"
        )


def status(aws, args):
    """Print how far the run is, and what it has cost; with --watch, on a screen until the run is over."""
    store, record = known_run(aws, args)

    def read():
        with aws_errors():
            return view_of(aws, look(aws, store, store.read("launch.json") or record, now=time.time()))

    if args.watch:
        watch.watch(read, args.watch)
    else:
        print("\n".join(status_lines(read())))


@dataclass
class Seen:
    """What the bucket and EC2 say of a run at one time. now: seconds since 1970."""

    store: cloud.Store
    record: dict
    now: float
    found: list  # EC2's instances, with those that ended within an hour
    groups: list
    records: list  # instances, by what they have reported, oldest first; then those that have not yet
    rows: list
    ended: dict | None

    @property
    def alive(self):
        """{id: instance} of EC2's."""
        return {i["InstanceId"]: i for i in self.found if i["State"]["Name"] in ALIVE}

    @property
    def last(self):
        return self.records[-1] if self.records else None

    @property
    def waits(self):
        """Whether a group is looking for an instance."""
        return not self.alive and any(group.may_launch(each) for each in self.groups)


def look(aws, store, record, now):
    """A run as it is seen now."""
    seen = Seen(
        store,
        record,
        now,
        found=instances_of(aws, record["run"], states=ANY),
        groups=group.found(aws, record["run"]) if record.get("groups") else [],
        records=store.instances(),
        rows=rows_of(store),
        ended=store.read("ended"),
    )
    reported = {r["instance_id"] for r in seen.records}
    # what has not reported yet costs, too
    seen.records += [unreported(record, i, now) for name, i in seen.alive.items() if name not in reported]
    return seen


def view_of(aws, seen):
    """A run as `watch.screen` takes it."""
    store, record, rows = seen.store, seen.record, seen.rows
    converts, spent = record.get("kind") == "conversion", cloud.dollars(seen.records)
    epochs = None if converts else epochs_of(store, record)
    progress = store.read(cloud.PROGRESS) or {}
    console = store.read_bytes(cloud.CONSOLE) or store.read_bytes(cloud.SETUP_LOG) or b""
    market = "spot" if record["spot"] else "on demand"
    return {
        "run": record["run"],
        "title": f"{record['config']} at {record['commit'][:12]} on {record['instance']}, {market}",
        "state": state_line(seen),
        "now": seen.now,
        "epochs": epochs,
        "epoch_share": share_of(progress, rows),
        "rows": rows,
        "progress": progress if converts else None,
        "spent": spent,
        "budget": record["budget"],
        "forecast": forecast(record, rows, epochs, spent) if rows else None,
        "instances": seen.records,
        "notes": list(notes_of(aws, seen)),
        "log": console.decode(errors="replace").strip().splitlines()[-5:],
        "ended": store.read("status.json"),
        "over": bool(seen.ended) and not seen.alive,
    }


def unreported(record, instance, now):
    """The record that an instance of EC2's list would have, had it said anything yet."""
    market = instance.get("InstanceLifecycle", "on-demand")
    return {
        "instance_id": instance["InstanceId"],
        "state": f"{instance['State']['Name']}, has not reported yet",
        "started": min(now, instance["LaunchTime"].timestamp()),
        "seen": now,
        "dollars_per_hour": cloud.price_of(record, instance["InstanceType"], market),
        "type": instance["InstanceType"],
        "market": market,
        "unreported": True,
    }


def share_of(progress, rows):
    """0 to 1 of the epoch under way, by the run's progress.json; 0 where the log is ahead of it."""
    if "epoch_steps" not in progress or progress["epoch"] != len(rows):
        return 0.0
    return progress["epoch_step"] / progress["epoch_steps"]


def state_line(seen):
    """One line on the newest instance."""
    last, alive = seen.last, seen.alive
    if last is None:
        return "waiting for an instance" if seen.waits else "no instance has reported"
    name = last["instance_id"]
    state = alive[name]["State"]["Name"] if name in alive else "gone"
    if last.get("unreported"):
        return f"instance {name}: {state} for {span(seen.now - last['started'])}, has not reported yet"
    reason = f" ({last['reason']})" if last.get("reason") else ""
    return f"instance {name}: {state}; {last['state']}{reason}, seen {span(seen.now - last['seen'])} ago"


def notes_of(aws, seen):
    """What a person should know or do, as lines."""
    record, last, alive, ended = seen.record, seen.last, seen.alive, seen.ended
    again = go_on(seen.store, record)
    if last and last["instance_id"] in alive and not last.get("unreported"):
        if seen.now - last["seen"] > cloud.LOST_SECONDS:
            yield "warning: it runs but does not report: look with aws ssm start-session, or end it with stop"
        pace = last.get("pace")
        if pace and pace["share"] < LOW:
            yield f"warning: {slow_line(pace)}: a stolen or throttled GPU, or a slow disk? stop and resume move it"
    for warning in cloud.warnings_of(seen.rows):
        yield f"warning: {warning['cause']}: {warning['text']}"
    name = record["instance_id"]
    if name and name not in {r["instance_id"] for r in seen.records}:
        why = next((i.get("StateReason", {}).get("Message") for i in seen.found if i["InstanceId"] == name), None)
        after = "" if seen.waits or ended else f": go on with {again}"
        yield f"instance {name}: gone before it reported ({why or 'EC2 does not say why'}){after}"
    if ended:
        if ended["state"] != "finished":
            yield f"the run ended: {ended['state']} ({ended['reason']}); go on with {again}"
    elif seen.waits:
        yield from waiting_lines(aws, seen)
    elif last and not alive and last["state"] not in cloud.FINAL:
        yield f"it was taken away: go on with {again}"
    elif record.get("groups") and not alive:
        yield f"its group has ended, and no instance has it: go on with {again}"


def waiting_lines(aws, seen):
    """Since when AWS has had no instance for the group, what it says, what happens next and what else would do."""
    record, now = seen.record, seen.now
    failed = [said for each in seen.groups if group.may_launch(each) for said in group.refusals(aws, each)]
    since = max(record["attempt_started"], seen.last["seen"] if seen.last else 0)
    said = f" after {len(failed)} tries: {failed[0]}" if failed else "; AWS is looking for one"
    yield f"no instance for {span(now - since)}{said}"
    left = since + 3600 * record["patience_hours"] - now
    then = "one on demand takes over" if record["fallback"] else "the group ends"
    yield f"where none comes, {then} in {span(max(0.0, left))}"
    price = record["dollars_on_demand"]
    dear = f" (${price:.3f}/h)" if price else ""
    yield (
        f"what else would do: stop it, then {go_on(seen.store, record)} with --on-demand{dear}, or with another "
        "--instance (tools/plan_run.py --spot has them)"
    )


def progress_line(phase, done, total, unit, detail=None, **rest):
    """How far a conversion is, by its progress.json."""
    share = f"{done / total:.0%} of " if total else ""
    amount = f"{total / 1e9:.1f} GB" if unit == "bytes" else f"{total:,} {unit}"
    return f"{phase}{f' {detail}' if detail else ''}: {share}{amount}"


def status_lines(view):
    """The view as plain lines."""
    yield f"{view['run']}: {view['title']}"
    yield view["state"]
    yield from view["notes"]
    yield f"dollars so far: {view['spent']:.2f} of {view['budget']:.2f} (instances; storage is extra)"
    if len(view["instances"]) > 1:
        yield f"instances so far: {len(view['instances'])}"
    rows = view["rows"]
    if view["progress"]:
        yield progress_line(**view["progress"])
    elif rows:
        row = rows[-1]
        best = next((r for r in reversed(rows) if "top1" in r), None)
        accuracy = f", top-1 {best['top1']:.2f} % after epoch {best['epoch'] + 1}" if best else ""
        loss = f"{row['resolution']} px, loss {row['train_loss']:.3f}"
        yield f"epoch {row['epoch'] + 1} of {view['epochs']}, {loss}{accuracy}"
        yield view["forecast"]
    else:
        yield "no epoch is done yet" if view["epochs"] else "nothing is fetched yet"
    if view["ended"]:
        yield "last command: {status} ({reason}) at step {step}".format(**view["ended"])
    yield from (f"  | {line}" for line in view["log"])


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


def fetch(aws, args):
    """Copy the run's files to a local run folder."""
    store, record = known_run(aws, args)
    folder = Path(args.out or "runs") / args.run
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in store.keys().items():
        if "/" in name or name in cloud.SIGNS:
            continue
        partial = folder / f"{name}.partial"
        aws.client("s3").download_file(aws.bucket, f"{store.prefix}/{name}", str(partial))
        partial.rename(folder / name)
        print(f"{folder / name}  {size} bytes")
    print(f"{len(rows_of(store))} epochs; curves: python tools/compare_runs.py {folder} --out curves.png")
