"""What may ask a run to stop: SIGTERM, Ctrl-C, and EC2's notices that a spot instance is taken away.

Whoever asks only leaves a reason, which the training loop reads between two steps. Python runs signal handlers in the
main thread, which may be stuck in a collective or a read; so a thread of its own listens, and ends the process where
the loop does not get to it in time. That is as safe as kill -9, which every file here survives.
"""

import http.client
import json
import os
import select
import signal
import threading
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime

from rn50.errors import planned_exit

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A run must be gone 20 s after it was asked to stop: torchrun kills after 30 s.
STOP_SECONDS = 18.0
# One Ctrl-C reaches the agent and the ranks, and the agent passes it on.
SAME_SIGNAL_SECONDS = 5.0
# AWS's advice. Where nothing answers, as outside EC2, asking once a minute is enough: a notice comes two minutes ahead.
POLL_SECONDS, SELDOM_SECONDS, PATIENCE = 5.0, 60.0, 3
METADATA_TIMEOUT = 2.0
TOKEN_SECONDS = 21600

_asked = None  # (reason, time.monotonic()) of the first request
_wake = None  # the listening thread's pipe
_record = None


def catch_signals():
    """From now on SIGTERM and SIGINT ask for a stop. Call it once, in the main thread, as early as can be."""
    global _wake
    listen, _wake = os.pipe()
    os.set_blocking(_wake, False)
    signal.set_wakeup_fd(_wake, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: None)
    threading.Thread(target=_listen, args=(listen,), name="signals", daemon=True).start()


def release_signals():
    """Let signals end the process again: nothing reads the flag any more."""
    if _wake is not None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


def request_stop(reason):
    """Ask for a stop; the first `reason` (a few words) is kept. For any thread."""
    global _asked
    if _asked is None:
        _asked = reason, time.monotonic()
        if _wake is not None:
            os.write(_wake, b"\0")


def reason():
    """Why the run should stop at the next step, or None."""
    return _asked and _asked[0]


def seconds_left():
    """Seconds until a requested stop is enforced; infinite while nobody asked for one."""
    return float("inf") if _asked is None else _asked[1] + STOP_SECONDS - time.monotonic()


def at_forced_exit(record):
    """`record(reason)` is called, for a second at most, before the process is ended without the training loop."""
    global _record
    _record = record


def _listen(listen):
    first_signal = None
    while True:
        ready, _, _ = select.select([listen], [], [], None if _asked is None else max(0, seconds_left()))
        if not ready:
            _exit_now(f"{reason()}, and the step did not end within {STOP_SECONDS:.0f} s")
        number = os.read(listen, 1)[0]
        if number not in SIGNALS:
            continue
        name, now = signal.Signals(number).name, time.monotonic()
        request_stop(name)
        first_signal = first_signal or now
        if now - first_signal > SAME_SIGNAL_SECONDS:
            _exit_now(f"{reason()}, and {name} again")


def _exit_now(why):
    if _record is not None:
        # on a dead disk this would wait for ever
        recording = threading.Thread(target=_record, args=(why,), daemon=True)
        recording.start()
        recording.join(1.0)
    os._exit(planned_exit("interrupted"))


def watch_ec2():
    """Poll EC2's instance metadata (IMDSv2) for spot notices in a thread; silent where there is none.

    The variables of AWS's own tools are heeded: AWS_EC2_METADATA_SERVICE_ENDPOINT, AWS_EC2_METADATA_DISABLED.
    """
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() != "true":
        endpoint = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or "http://169.254.169.254"
        threading.Thread(target=_poll_ec2, args=(endpoint.rstrip("/"),), name="ec2", daemon=True).start()


def _poll_ec2(endpoint):
    started, failures, token = datetime.now(UTC), 0, None
    while _asked is None:
        try:
            token = token or _fetch(
                f"{endpoint}/latest/api/token",
                method="PUT",
                headers={"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)},
            )
            notice = _notice(endpoint, token, started)
            failures = 0
            if notice:
                request_stop(notice)
        except (OSError, ValueError, http.client.HTTPException):  # also a token that has expired
            failures, token = failures + 1, None
        time.sleep(POLL_SECONDS if failures < PATIENCE else SELDOM_SECONDS)


def _notice(endpoint, token, started):
    action = _metadata(endpoint, "spot/instance-action", token)
    if action:
        return f"EC2 spot notice ({action['action']} at {action['time']})"
    advice = _metadata(endpoint, "events/recommendations/rebalance", token)
    # Advice from before this process began was there when someone chose to begin: heeding it would end every try.
    if advice and datetime.fromisoformat(advice["noticeTime"]) >= started.replace(microsecond=0):
        return f"EC2 rebalance recommendation ({advice['noticeTime']})"
    return None


def _metadata(endpoint, path, token):
    try:
        text = _fetch(f"{endpoint}/latest/meta-data/{path}", headers={"X-aws-ec2-metadata-token": token})
    except urllib.error.HTTPError as error:
        if error.code == 404:  # no notice
            return None
        raise
    found = json.loads(text)
    if not isinstance(found, dict) or not {"time", "noticeTime"} & set(found):
        raise ValueError(f"not a notice: {text}")
    return found


def _fetch(url, *, method="GET", headers):
    # a proxy must not be asked for a link-local address
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, method=method, headers=headers), timeout=METADATA_TIMEOUT) as reply:
        return reply.read().decode()
