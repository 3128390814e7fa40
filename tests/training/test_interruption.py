"""Signals and EC2 notices only ask; who does not heed them in time is ended. Real processes, signals and HTTP."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest

from rn50.training import interruption
from tests.services import Metadata

PROGRAM = """
import ctypes, sys, time
from rn50 import errors
from rn50.command import run
from rn50.training import interruption

interruption.STOP_SECONDS, interruption.SAME_SIGNAL_SECONDS, interruption.POLL_SECONDS = {stop}, {same}, 0.1
interruption.SELDOM_SECONDS = 0.3
interruption.catch_signals()

def main():
    interruption.at_forced_exit(lambda why: print("forced:", why, flush=True))
    interruption.watch_ec2()
    print("ready", flush=True)
    {body}
    print("reason:", interruption.reason(), flush=True)
    raise errors.Stopped(interruption.reason())

run(main)
"""
HEED = "while interruption.reason() is None: time.sleep(0.01)"
# in C code that never returns, and keeps the main thread from running any signal handler
STUCK = "libc = ctypes.CDLL(None); libc.pthread_mutex_lock(m := ctypes.create_string_buffer(64)); "
STUCK += "libc.pthread_mutex_lock(m)"


@contextmanager
def program(body, *, stop=18, same=5, **environment):
    environment = {"AWS_EC2_METADATA_DISABLED": "true"} | environment
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "http_proxy", "HTTP_PROXY")}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=body, stop=stop, same=same)],
        env=kept | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def ended(process, within=10):
    out, err = process.communicate(timeout=within)
    assert err == ""
    return process.returncode, out.splitlines()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_reason_to_stop_and_status_3(number):
    with program(HEED) as process:
        process.send_signal(number)
        assert ended(process) == (3, [f"reason: {number.name}"])


def test_under_torchrun_a_planned_stop_is_status_0():
    with program(HEED, RANK="0") as process:
        process.send_signal(signal.SIGTERM)
        assert ended(process)[0] == 0


def test_signals_within_seconds_are_one():
    """A Ctrl-C reaches the agent and the ranks, and the agent passes it on."""
    with program(HEED + "\n    time.sleep(0.7)") as process:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            process.send_signal(number)
            time.sleep(0.2)
        assert ended(process) == (3, ["reason: SIGINT"])


def test_a_signal_long_after_the_first_ends_the_process_at_once_wherever_it_is():
    with program(STUCK, same=0.3) as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.8)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert ended(process, within=2) == (3, ["forced: SIGTERM, and SIGINT again"])


def test_a_step_that_does_not_end_is_ended():
    with program(STUCK, stop=0.5) as process:
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        status, lines = ended(process)
        assert 0.4 < time.monotonic() - asked < 3
        assert (status, len(lines)) == (3, 1)
        assert "SIGTERM, and the step did not end" in lines[0]


def test_a_dead_disk_does_not_keep_the_process():
    body = "interruption.at_forced_exit(lambda why: time.sleep(1000))\n    " + STUCK
    with program(body, stop=0.3) as process:
        process.send_signal(signal.SIGTERM)
        assert ended(process, within=5)[0] == 3


def test_the_limits_are_those_that_were_promised():
    assert interruption.STOP_SECONDS + 1 < 20  # and a second for the record
    assert interruption.SAME_SIGNAL_SECONDS == 5


def test_released_signals_end_the_process_again():
    with program("interruption.release_signals(); print('released', flush=True); time.sleep(1000)") as process:
        assert process.stdout.readline() == "released\n"
        process.send_signal(signal.SIGTERM)
        assert ended(process)[0] == -signal.SIGTERM


@pytest.fixture
def metadata():
    with Metadata() as server:
        yield server


def on_ec2(metadata):
    return {"AWS_EC2_METADATA_DISABLED": "", "AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.url}


def test_a_spot_notice_is_a_reason_to_stop(metadata):
    # a proxy must not be asked
    with program(HEED, **on_ec2(metadata), http_proxy="http://127.0.0.1:9") as process:
        metadata.wait_for_requests(4)
        assert process.poll() is None
        metadata.notice = {"action": "terminate", "time": "2030-01-02T03:04:05Z"}
        status, lines = ended(process)
    assert status == 3
    assert lines == ["reason: EC2 spot notice (terminate at 2030-01-02T03:04:05Z)"]
    assert metadata.tokens_issued == 1


def test_a_new_rebalance_recommendation_is_one_too_but_not_an_old_one(metadata):
    """The instance keeps it: heeding an old one would end every try to go on there."""
    metadata.rebalance = {"noticeTime": (datetime.now(UTC) - timedelta(minutes=1)).strftime("%Y-%m-%dT%H:%M:%SZ")}
    with program(HEED, **on_ec2(metadata)) as process:
        metadata.wait_for_requests(6)
        assert process.poll() is None
        metadata.rebalance = {"noticeTime": (now := datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))}
        assert ended(process) == (3, [f"reason: EC2 rebalance recommendation ({now})"])


@pytest.mark.parametrize("trouble", ["expired", "dropped", "garbage", "error"])
def test_metadata_in_trouble_is_passed_over_silently_and_asked_again(metadata, trouble):
    metadata.trouble = trouble
    with program(HEED, **on_ec2(metadata)) as process:
        metadata.wait_for_requests(6)
        assert process.poll() is None
        metadata.trouble = None
        metadata.notice = {"action": "stop", "time": "2030-01-02T03:04:05Z"}
        status, lines = ended(process)
    assert (status, len(lines)) == (3, 1)


def test_outside_ec2_and_where_it_is_disabled_there_is_silence(metadata):
    with program(
        "time.sleep(1); return", AWS_EC2_METADATA_DISABLED="", AWS_EC2_METADATA_SERVICE_ENDPOINT="http://127.0.0.1:9"
    ) as process:
        assert ended(process) == (0, [])
    metadata.notice = {"action": "stop", "time": "2030-01-02T03:04:05Z"}
    with program("time.sleep(1); return", **on_ec2(metadata) | {"AWS_EC2_METADATA_DISABLED": "TRUE"}) as process:
        assert ended(process) == (0, [])
    assert metadata.requests == 0
