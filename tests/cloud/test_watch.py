"""The screen of tools/ec2.py status --watch: what it shows in which room, and what it leaves on a real terminal."""

import fcntl
import io
import itertools
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import unicodedata
from contextlib import contextmanager

import pytest

from rn50.cloud.aws import ROOT
from rn50.cloud.watch import ENTER, LEAVE, Look, bar, clean, screen, sparkline, watch
from rn50.errors import RunError

STRANGE = [
    "\x1b[1;31mred\x1b[0m\tafter a tab",
    "\x1b]0;a title\x07\x1b]8;;http://example.org\x1b\\a link\x1b]8;;\x1b\\ \x9b31mold\x1b(B",
    "10 %\r20 %\r30 %\r",
    "bell\x07 null\x00 back\x08 delete\x7f turned \u202eround\u2066 \ud800 torn \x1b[3",
    "two\nlines\u2028three\x0bfour\x85five",
    "z" + "\u0301" * 500,
    "日本語🎉" * 500,
    "long " * 100_000,
    "\x1b[2J\x1b[H",
    "",
]


TRAINING = """\
demo: rn50_configs/rn50_78.yaml at 0123456789ab on g5.2xlarge, spot
training on i-00000000000000001, seen 12 s ago

epochs   ███████████████████████░░░░░░░░░░░░░░░░░░░░░░░░░  44.5 of 90, 49 %
         epoch 44: 160 px, loss 4.850, 2,411 images/s, 9 min
top-1    ▁▆▇▇███████████                                   76.60 %, best 76.60 %
dollars  ██████████████░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░  $7.50 of $25.00
forecast: 4.1 h more at the pace of the last epochs, $9.20 in all

i-00000000000000001  g5.2xlarge  2.0 h  $1.00  training
i-00000000000000000  g5.2xlarge  1.0 h  $0.50  interrupted (EC2 takes it back)

warning: it runs but does not report: look with aws ssm start-session, or end it
with stop

  | one
  | two
  | three"""

CONVERSION = """\
demo: rn50_configs/rn50_78.yaml at 0123456789ab on g5.2xlar…
training on i-00000000000000001, seen 12 s ago
train_500  ████░░░░░░░░░░░░░  25 %, 20 min left
           320,000 of 1,280,000 images, 800 images/s
dollars    ███████████████┃█  $27.50 of $25.00, $2.50 beyond
forecast: 4.1 h more at the pace of the last epochs, $9.20
in all
i-0000000000000001d  g5.2xlarge  2.0 h  $1.00  training
i-0000000000000001c  g5.2xlarge  1.0 h  $0.50  interrupted…
and 28 earlier: 28.0 h, $14.00
warning: it runs but does not report: look with aws ssm
start-session, or end it with stop
  | two
  | three
  | four"""


def rows(count):
    return [
        {"epoch": k, "resolution": 96 + 32 * (k // 20), "train_loss": 7 - k / 20, "images_per_second": 2411.3,
         "train_seconds": 531} | ({"top1": 78 - 60 / (k + 1)} if k % 3 == 0 else {})
        for k in range(count)
    ]  # fmt: skip


def instances(count):
    """Oldest first, each of them up for an hour, except for the last: two."""
    last = count - 1
    return [
        {"instance_id": f"i-{k:017x}", "state": "training" if k == last else "interrupted", "type": "g5.2xlarge",
         "started": 10_000.0 * k, "seen": 10_000.0 * k + 3600 * (1 + (k == last)), "dollars_per_hour": 0.5,
         "market": "spot"} | ({} if k == last else {"reason": "EC2 takes it back"})
        for k in range(count)
    ]  # fmt: skip


def view(**changes):
    return {
        "run": "demo",
        "title": "rn50_configs/rn50_78.yaml at 0123456789ab on g5.2xlarge, spot",
        "state": "training on i-00000000000000001, seen 12 s ago",
        "notes": ["warning: it runs but does not report: look with aws ssm start-session, or end it with stop"],
        "epochs": 90,
        "epoch_share": 0.5,
        "rows": rows(44),
        "progress": None,
        "spent": 7.5,
        "budget": 25.0,
        "forecast": "forecast: 4.1 h more at the pace of the last epochs, $9.20 in all",
        "instances": instances(2),
        "log": ["one", "two", "three"],
        "now": 0.0,
    } | changes


def conversion(**changes):
    progress = {"phase": "train_500", "done": 320_000, "total": 1_280_000, "unit": "images", "seconds": 400}
    return view(progress=progress | changes, rows=[], epochs=None, epoch_share=None)


def columns(line):
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


# --- What is shown ---------------------------------------------------------------------------------------------------


def test_a_training_run_in_80_x_24():
    assert "\n".join(screen(view(), 80, 24)) == TRAINING


def test_a_conversion_with_many_instances_beyond_its_budget_in_60_x_15():
    shown = conversion() | {"instances": instances(30), "spent": 27.5, "log": ["one", "two", "three", "four"]}
    assert "\n".join(screen(shown, 60, 15)) == CONVERSION


def test_what_matters_most_stays_where_there_are_six_lines():
    lines = screen(view(error="as of 12:00:00, trying again: no network", instances=instances(30)), 60, 6)
    assert [line.split()[0] for line in lines] == ["demo:", "training", "as", "epochs", "dollars", "warning:"]


def test_nothing_is_longer_than_its_room_and_nothing_moves_the_cursor():
    sizes = itertools.product((1, 2, 9, 40, 60, 80, 200), (0, 1, 5, 15, 24))
    counts = [(0, 0), (1, 1), (90, 30)]
    texts = {"log": STRANGE, "notes": STRANGE[:8], "forecast": STRANGE[7], "state": STRANGE[6], "title": STRANGE[3]}
    for (width, height), (epochs, taken), kind, plain in itertools.product(sizes, counts, range(4), (False, True)):
        changes = {"rows": rows(epochs), "instances": instances(taken)} | (texts if kind % 2 else {})
        shown = (conversion() if kind > 1 else view()) | changes
        lines = screen(shown, width, height, ascii_only=plain)
        assert len(lines) <= height
        for line in lines:
            assert columns(line) <= width, line
            assert len(line) <= width
            assert not any(unicodedata.category(c)[0] == "C" for c in line), line
            assert line.isascii() or not plain
        if kind == 1 and height <= 15:
            assert len(lines) == height, "there is more to show"
            assert "" not in lines


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rows": [], "epoch_share": None}, r"epochs   ░{30,}  0 of 90, 0 %"),
        ({"rows": [], "epoch_share": None}, r"top-1    +  not measured yet"),
        ({"rows": [], "epoch_share": 0.25}, r"epochs   ░+  0\.2 of 90, 0 %"),
        ({"rows": rows(1), "epochs": 1, "epoch_share": None}, r"epochs   █+  1 of 1, 100 %"),
        ({"rows": rows(1)}, r"top-1    ▅ +18\.00 %, best 18\.00 %"),
        ({"rows": rows(89), "epoch_share": 0.999}, r"epochs   █+░  90\.0 of 90, 99 %"),
        ({"rows": rows(90), "epoch_share": 0}, r"epochs   █+  90 of 90, 100 %"),
        ({"epochs": None, "rows": rows(3), "epoch_share": None}, r"epochs    +3 done"),
        ({"epochs": 0, "rows": []}, r"epochs    +0\.5 done"),
        ({"rows": [{"epoch": 0, "resolution": 64, "train_loss": 2.0}]}, r"         epoch 1: 64 px, loss 2\.000"),
        ({"rows": [rows(1)[0] | {"top1": float("nan")}]}, r"top-1    +not measured yet"),
        ({"spent": 25.0}, r"dollars  █+  \$25\.00 of \$25\.00"),
        ({"spent": 50.0}, r"dollars  (█+)┃█+  \$50\.00 of \$25\.00, \$25\.00 beyond"),
        ({"spent": 0, "budget": 0}, r"dollars    +\$0\.00 of \$0\.00"),
        ({"spent": 1, "budget": 0}, r"dollars  ┃█+  \$1\.00 of \$0\.00, \$1\.00 beyond"),
        ({"spent": 3, "budget": None}, r"dollars    +\$3\.00"),
        ({"instances": instances(1)}, r"i-0+  g5\.2xlarge  2\.0 h  \$1\.00  training"),
    ],
)
def test_the_edges_of_its_figures(changes, line):
    lines = screen(view(**changes), 80, 24)
    assert any(re.fullmatch(line, one) for one in lines), lines


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"done": 0, "seconds": 0}, r"           0 of 1,280,000 images"),
        ({"done": 1_280_000}, r"           1,280,000 of 1,280,000 images, 3,200 images/s"),
        ({"total": None, "done": 12.5, "unit": "GB"}, r"           12\.5 GB, 0\.0312 GB/s"),
        ({"phase": "\x1b[1mupload\x07 " + "x" * 100}, r"upload xxxxxxxxx  █+░+  25 %, 20 min left"),
    ],
)
def test_the_edges_of_a_conversion(changes, line):
    lines = screen(conversion(**changes), 80, 24)
    assert any(re.fullmatch(line, one) for one in lines), lines
    assert not any(one.startswith("top-1") for one in lines)


def test_only_the_first_lines_must_be_there():
    assert screen({"run": "demo", "title": "a", "state": "b"}) == ["demo: a", "b", "", "epochs  0 done",
                                                                  "top-1   not measured yet"]  # fmt: skip


def test_a_wide_screen_says_the_market_and_a_single_line_what_all_instances_took():
    assert "i-00000000000000001  g5.2xlarge spot  2.0 h  $1.00  training" in screen(view(), 100, 24)
    shown = view(instances=instances(30), notes=[], forecast=None, log=[])
    assert "30 instances: 31.0 h, $15.50" in screen(shown, 80, 6)


def test_a_bar_and_a_sparkline():
    assert [bar(share, 4) for share in (0, 0.24, 0.25, 0.999, 1, 1.5, -1, None)] == [
        "░░░░", "░░░░", "█░░░", "███░", "████", "████", "░░░░", ""]  # fmt: skip
    assert sparkline([], 5) == ""
    assert sparkline([3.0], 5) == "▅"
    assert sparkline([3.0, 3.0], 5) == "▅▅"
    assert sparkline([9, 1, 5], 5) == "█▁▅"
    assert sparkline(list(range(1000)), 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1, 2, 3], 1) == "▅"
    look = Look(levels="01234567", full="#", empty="-", limit="|", more="~")
    assert sparkline([*range(100), 50], 6, look)[-1] == sparkline([*range(100), 50], 99, look)[-1] == "4"


def test_a_log_line_is_what_a_terminal_would_show():
    assert [clean(line) for line in STRANGE[:6]] == [
        "red after a tab",
        "a link old",
        "30 %",
        "bell null back delete turned round  torn 3",
        "two lines three four five",
        "ź",
    ]
    assert [line for line in screen(view(log=STRANGE[:3])) if "|" in line] == [
        "  | red after a tab", "  | a link old", "  | 30 %"]  # fmt: skip


# --- Where there is no terminal --------------------------------------------------------------------------------------


def script(*steps):
    """A read() that returns these views, or raises these errors, one after the other."""
    left = iter(steps)

    def read():
        step = next(left)
        if isinstance(step, BaseException):
            raise step
        return step

    return read


def test_a_pipe_gets_a_screen_a_change(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    out, slept = io.StringIO(), []
    brief = {"run": "demo", "title": "a", "notes": [], "now": 10.0}
    watch(
        script(
            brief | {"state": "seen 2 s ago"},
            brief | {"state": "seen 12 s ago", "now": 20.0},  # older, not different
            RunError("no network"),
            RunError("no network"),
            brief | {"state": "seen 3 s ago", "now": 50.0},
            brief | {"state": "finished", "now": 60.0, "over": True},
        ),
        2.5,
        out,
        sleep=slept.append,
    )
    rest = "\n\nepochs  0 done\ntop-1   not measured yet\n"
    assert out.getvalue() == (
        f"--- 00:00:10\ndemo: a\nseen 2 s ago{rest}"
        f"--- 00:00:20\ndemo: a\nseen 12 s ago\nas of 00:00:20, trying again: no network{rest}"
        f"--- 00:00:50\ndemo: a\nseen 3 s ago{rest}"
        f"--- 00:01:00\ndemo: a\nfinished{rest}"
    )
    assert slept == [1.0, 1.0, 0.5] * 5
    monkeypatch.undo()
    time.tzset()


def test_what_is_over_is_shown_once_and_the_first_error_is_raised():
    out = io.StringIO()
    watch(script(view(over=True)), 5, out, sleep=pytest.fail)
    assert out.getvalue().count("demo: ") == 1
    with pytest.raises(RunError, match="there is no run"):
        watch(script(RunError("there is no run")), 5, out, sleep=pytest.fail)
    watch(script(KeyboardInterrupt()), 5, out, sleep=pytest.fail)


@pytest.mark.parametrize(("encoding", "full"), [("utf-8", "█"), ("latin-1", "#"), ("ascii", "#"), ("cp437", "#")])
def test_an_encoding_without_blocks_gets_plain_characters(encoding, full):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    watch(script(view(over=True, log=["naïve 日本"])), 5, out, sleep=pytest.fail)
    text = out.buffer.getvalue().decode(encoding)
    assert f"dollars  {full}{full}" in text
    assert ("  | naïve 日本" if full == "█" else "  | na?ve ??") in text


# --- On a real terminal ----------------------------------------------------------------------------------------------

PROGRAM = """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that this terminal's Ctrl-C is for this process
from rn50.cloud.watch import watch
from rn50.errors import RunError
from tests.cloud.test_watch import instances, script, view

print("before", flush=True)
watch({read}, {seconds})
print("after", flush=True)
"""


@contextmanager
def terminal(read, *, seconds=1):
    """(process, our end of its terminal, read_until) of a program that watches on an 80 x 24 terminal of its own."""
    ours, theirs = pty.openpty()
    resize(ours, 80, 24)
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(read=read, seconds=seconds)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env=environment | {"PYTHONIOENCODING": "utf-8"},
        start_new_session=True,
    )
    os.close(theirs)
    said = bytearray()

    def read_until(text):
        """All that came, until `text` is in it; to the end where it is None."""
        deadline = time.monotonic() + 60
        while text is None or text.encode() not in said:
            assert time.monotonic() < deadline, said.decode(errors="replace")
            if select.select([ours], [], [], 1)[0]:
                try:
                    data = os.read(ours, 65536)
                except OSError:  # Linux's way to say that the other end is closed
                    data = b""
                if not data:
                    assert text is None, said.decode(errors="replace")
                    break
                said.extend(data)
        return said.decode()

    try:
        yield process, ours, read_until
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def resize(descriptor, width, height):
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))


def test_ctrl_c_ends_it_quietly_and_gives_the_cursor_back():
    with terminal("view", seconds=300) as (process, keyboard, read_until):
        assert LEAVE not in read_until("three")
        os.write(keyboard, b"\x03")
        said = read_until(None)
        assert process.wait() == 0
    before, screens = said.split(ENTER)
    assert before == "before\r\n"
    inside, after = screens.split(LEAVE)
    assert "training on i-00000000000000001" in inside
    assert after == "after\r\n"


@pytest.mark.parametrize(
    ("read", "end", "status", "last"),
    [
        ("script(view(), ZeroDivisionError('a bug'))", None, 1, "ZeroDivisionError: a bug"),
        ("view", signal.SIGTERM, 143, ""),
    ],
)
def test_the_cursor_is_back_whatever_ends_it(read, end, status, last):
    with terminal(read, seconds=0.1 if end is None else 300) as (process, _, read_until):
        read_until("three")
        if end:
            process.send_signal(end)
        said = read_until(None)
        assert process.wait() == status
    assert said.count(ENTER) == said.count(LEAVE) == 1
    assert said.split(LEAVE)[1].strip().endswith(last)
    assert "after" not in said


def test_an_error_is_shown_and_gone_again_and_the_last_screen_stays():
    steps = "view(), RunError('no network'), view(state='it is back'), view(state='finished', over=True)"
    with terminal(f"script({steps})", seconds=0.05) as (process, _, read_until):
        said = read_until(None)
        assert process.wait() == 0
    inside, after = said.split(LEAVE)
    first, error, back, over = inside.split("\x1b[H")[1:]
    assert "trying again" not in first
    assert re.search(r"as of \d\d:\d\d:\d\d, trying again: no network\x1b\[K\r\n", error)
    assert "seen 12 s ago" in error
    assert "it is back" in back
    assert "trying again" not in back
    assert "finished" in over
    assert "\x1b[2J" not in said
    assert after.startswith("demo: rn50_configs")
    assert "finished\r\n" in after
    assert "\x1b" not in after
    assert after.endswith("  | three\r\nafter\r\n")


def test_a_terminal_of_another_size_is_drawn_again_soon():
    with terminal("view", seconds=300) as (_, keyboard, read_until):
        assert "on g5.2xlarge, spot" in read_until("three")
        resize(keyboard, 40, 8)
        small = read_until("demo: rn50_configs/rn50_78.yaml at 0123…").split("\x1b[H")
        assert len(small) == 3


def test_a_full_row_keeps_its_last_character_and_a_full_screen_its_last_line():
    """There the cursor still is on the last character: clearing to the end of the row would remove it."""
    with terminal("lambda: view(log=['x' * 200] * 9, state='y' * 80)") as (_, keyboard, read_until):
        read_until("xxx")
        os.write(keyboard, b"\x03")
        inside = read_until(None).split(ENTER)[1].split(LEAVE)[0]
    assert "y" * 80 + "\r\n" in inside
    assert "x…\r\n" in inside
    assert "…\x1b[K" not in inside


def test_the_last_screen_leaves_a_line_for_the_prompt():
    with terminal("script(view(over=True, instances=instances(30)))") as (_, _, read_until):
        shown = read_until(None).removeprefix("before\r\n").removesuffix("after\r\n")
    assert shown.count("\r\n") == 23
    assert shown.startswith("demo: ")
