"""A run's state on one screen that renews itself: tools/ec2.py status --watch."""

import contextlib
import math
import re
import shutil
import signal
import sys
import textwrap
import time
import unicodedata
from dataclasses import dataclass

from rn50.errors import RunError


@dataclass
class Look:
    """The characters that a screen is drawn with."""

    levels: str  # of a sparkline, from low to high
    full: str
    empty: str
    limit: str  # in a bar that is longer than it may be
    more: str  # at the end of a line that was cut


BLOCKS = Look(levels="▁▂▃▄▅▆▇█", full="█", empty="░", limit="┃", more="…")
ASCII = Look(levels="_.:-=+*#", full="#", empty="-", limit="|", more="...")

# Where there is little room, lines are given out in rounds of one line a part, in this order.
ORDER = ("state", "error", "done", "dollars", "notes", "title", "top-1", "forecast", "instances", "log", "detail")
# From top to bottom; an empty line between the groups where there is room.
GROUPS = (
    ("title", "state", "error"),
    ("done", "detail", "top-1", "dollars", "forecast"),
    ("instances",),
    ("notes",),
    ("log",),
)
LOG_LINES = 5
NOTE_LINES = 3  # a longer note or forecast is cut
NARROW = 100  # columns; below, an instance's market is left out, which the title says too
SHORTEST_BAR = 5
LONGEST = 4000  # characters of a text that are looked at: a torn log may have a line of megabytes

ESCAPE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # colours, cursor
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)"  # titles, links
    r"|\x1b[ -/]*[0-~]?"
)
STACKED = ("Mn", "Me")  # Unicode categories of what is drawn over the character before: accents by the dozen
AGE = re.compile(r"\d[\d.]* (?:s|min|h) ago")
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # the alternate screen, without a cursor
HOME, CLEAR_LINE, CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
STEP_SECONDS = 1.0  # a terminal of a new size is drawn again this soon


# --- What is shown ---------------------------------------------------------------------------------------------------


def screen(view, width=80, height=24, ascii_only=False):
    """The lines of a screen, at most `height`, each of at most `width` columns.

    view: a dict. What is missing, None or empty is not shown; `run`, `title` and `state` must be there.
      run          its name
      title        config at commit on instance, market
      state        such as "training on i-0abc, seen 12 s ago"
      now          time.time() when this was true; for `watch`
      epochs       of the whole run
      epoch_share  0 to 1 of the epoch under way that is done
      rows         of the run's log.jsonl, oldest first: epoch (from 0), resolution, train_loss, images_per_second,
                   train_seconds, and top1 in percent where it was measured
      progress     of a job without epochs, instead of them: phase, done, total (both in `unit`), unit, and the seconds
                   that `done` took
      spent, budget    in dollars
      forecast     a text
      instances    of dicts: instance_id, state, started and seen (as time.time()), dollars_per_hour, and, where known,
                   reason, type, market
      notes        warnings and advice, texts
      log          the last lines that the run wrote
      error        why this is old
      over         whether nothing will change any more; for `watch`
    """
    look = ASCII if ascii_only else BLOCKS
    instances = sorted(view.get("instances") or [], key=lambda instance: instance["started"], reverse=True)
    notes, forecast = view.get("notes") or [], [view.get("forecast") or ""]
    parts = {
        "title": [f"{view['run']}: {view['title']}"],
        "state": [view["state"]],
        "error": [view["error"]] if view.get("error") else [],
        **_figures(view, width, look),
        "forecast": _wrap(forecast, width),
        "instances": instances,
        "notes": _wrap(notes, width),
        "log": [f"  | {line}" for line in map(clean, view.get("log") or []) if line][-LOG_LINES:],
    }
    given = _share({name: len(lines) for name, lines in parts.items()}, height)
    parts["forecast"] = _wrap(forecast, width, given["forecast"])
    parts["notes"] = _wrap(notes, width, given["notes"])
    parts["instances"] = _history(instances, given["instances"], width)
    parts["log"] = parts["log"][len(parts["log"]) - given["log"] :]
    parts = {name: lines[: given[name]] for name, lines in parts.items()}
    groups = [[line for name in group for line in parts[name]] for group in GROUPS]
    return [_fit(line, width, look) for line in _spaced([group for group in groups if group], height)]


def _share(wanted, height):
    """{part: how many lines it gets}, in rounds of one line each."""
    given = dict.fromkeys(wanted, 0)
    left = min(height, sum(wanted.values()))
    while left > 0:
        for name in ORDER:
            if left and given[name] < wanted[name]:
                given[name] += 1
                left -= 1
    return given


def _spaced(groups, height):
    """The lines of the groups, with empty lines between them while there is room."""
    room = height - sum(map(len, groups))
    lines = []
    for group in groups:
        if lines and room > 0:
            lines.append("")
            room -= 1
        lines += group
    return lines


def _figures(view, width, look):
    """The parts done, detail, top-1 and dollars, a line each or none. Their bars have the same length."""
    rows, progress = view.get("rows") or [], view.get("progress")
    accuracies = [row["top1"] for row in rows if math.isfinite(row.get("top1", math.nan))]
    name, share, tail, detail = _conversion(progress) if progress else _epochs(view, rows)
    lines = {"done": (name, lambda length: bar(share, length, look), tail)}
    if not progress or accuracies:
        lines["top-1"] = ("top-1", lambda length: sparkline(accuracies, length, look), _accuracy(accuracies))
    if view.get("spent") is not None:
        spent, budget = view["spent"], view.get("budget")
        lines["dollars"] = ("dollars", lambda length: _dollar_bar(spent, budget, length, look), _dollars(spent, budget))
    indent = max(len(label) for label, _, _ in lines.values()) + 2
    length = width - indent - 2 - max(len(tail) for _, _, tail in lines.values())
    graphs = {part: graph(length) if length >= SHORTEST_BAR else "" for part, (_, graph, _) in lines.items()}
    column = length + 2 if any(graphs.values()) else 0
    parts = dict.fromkeys(("done", "detail", "top-1", "dollars"), ())
    for part, (label, _, tail) in lines.items():
        parts[part] = [f"{label:{indent}}{graphs[part]:{column}}{tail}"]
    if detail:
        parts["detail"] = [" " * indent + detail]
    return parts


def _epochs(view, rows):
    """(label, share done or None, text, more text) of a training run."""
    epochs, latest = view.get("epochs"), rows[-1] if rows else {}
    whole = latest.get("epoch", -1) + 1
    done = whole + (view.get("epoch_share") or 0)
    shown = f"{done:.1f}" if done != whole else f"{whole}"
    detail = []
    if latest:
        detail.append(f"epoch {whole}: {latest['resolution']} px")
    if latest.get("train_loss") is not None:
        detail.append(f"loss {latest['train_loss']:.3f}")
    if latest.get("images_per_second") is not None:
        detail.append(f"{latest['images_per_second']:,.0f} images/s")
    if latest.get("train_seconds") is not None:
        detail.append(span(latest["train_seconds"]))
    if not epochs:
        return "epochs", None, f"{shown} done", ", ".join(detail)
    return "epochs", done / epochs, f"{shown} of {epochs}, {_percent(done / epochs)}", ", ".join(detail)


def _conversion(progress):
    """As _epochs, of a job that is measured in something else."""
    done, total, unit = progress.get("done") or 0, progress.get("total"), progress["unit"]
    rate = done / progress["seconds"] if progress.get("seconds") else 0
    detail = [f"{_number(done)} of {_number(total)} {unit}" if total else f"{_number(done)} {unit}"]
    if rate > 0:
        detail.append(f"{_number(rate)} {unit}/s")
    share = done / total if total else None
    tail = _percent(share) if total else ""
    if rate > 0 and total and done < total:
        tail += f", {span((total - done) / rate)} left"
    return clean(progress["phase"])[:16], share, tail, ", ".join(detail)


def _percent(share):
    return f"{int(100 * min(1, share) + 1e-9)} %"  # 100 % only when all is done


def _number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _accuracy(accuracies):
    return f"{accuracies[-1]:.2f} %, best {max(accuracies):.2f} %" if accuracies else "not measured yet"


def _dollars(spent, budget):
    if budget is None:
        return f"${spent:.2f}"
    beyond = f", ${spent - budget:.2f} beyond" if spent > budget else ""
    return f"${spent:.2f} of ${budget:.2f}{beyond}"


def _dollar_bar(spent, budget, length, look):
    if budget is None or spent <= budget:
        return bar(spent / budget if budget else None, length, look)
    limit = min(length - 1, int(max(0, budget) / spent * length))
    return look.full * limit + look.limit + look.full * (length - limit - 1)


def bar(share, length, look=BLOCKS):
    """A bar of `length` characters, `share` (0 to 1) of it full; nothing where the share is None."""
    if share is None:
        return ""
    full = int(min(1, max(0, share)) * length + 1e-9)
    return look.full * full + look.empty * (length - full)


def sparkline(values, length, look=BLOCKS):
    """A character a value, from the lowest to the highest; of more than `length` values, some, with first and last."""
    if len(values) > length:
        steps = max(1, length - 1)
        values = [values[len(values) - 1 - round(k * (len(values) - 1) / steps)] for k in range(length)][::-1]
    if not values:
        return ""
    low, high = min(values), max(values)
    if low == high:
        return look.levels[4] * len(values)
    top = len(look.levels) - 1
    return "".join(look.levels[round((value - low) / (high - low) * top)] for value in values)


def _history(instances, count, width):
    """`count` lines of the instances, newest first: each one's, or what the last ones add up to."""
    if not count:
        return []
    if count < len(instances):
        shown, rest = instances[: count - 1], instances[count - 1 :]
        hours, dollars = sum(map(_hours, rest)), sum(map(_cost, rest))
        name = f"and {len(rest)} earlier" if shown else f"{len(rest)} instances"
        return [*_table([_instance(one, width) for one in shown]), f"{name}: {hours:.1f} h, ${dollars:.2f}"]
    return _table([_instance(one, width) for one in instances])


def _instance(one, width):
    """The cells of an instance's line."""
    market = one.get("market") if width >= NARROW else None
    reason = f" ({one['reason']})" if one.get("reason") else ""
    machine = " ".join(filter(None, (one.get("type"), market)))
    return one["instance_id"], machine, f"{_hours(one):.1f} h", f"${_cost(one):.2f}", f"{one['state']}{reason}"


def _table(rows):
    """The rows of cells as lines, figures to the right. A column without any text is left out."""
    columns = [column for column in zip(*rows, strict=True) if any(column)]
    padded = []
    for column in columns:
        length = max(map(len, column))
        right = all(re.match(r"\$|[\d.]+ h$", cell) for cell in column)
        padded.append([cell.rjust(length) if right else cell.ljust(length) for cell in column])
    return ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]


def _hours(one):
    return max(0, one["seen"] - one["started"]) / 3600


def _cost(one):
    return _hours(one) * one["dollars_per_hour"]


def span(seconds):
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


# --- Text that fits --------------------------------------------------------------------------------------------------


def clean(text):
    """What a terminal would show of the line `text`, without colours and without anything that moves the cursor."""
    text = str(text).rstrip("\r\n").rsplit("\r", 1)[-1]  # a progress bar returns and writes over itself
    text = ESCAPE.sub("", text[:LONGEST])
    text = unicodedata.normalize("NFC", " ".join(text.expandtabs(4).splitlines()))
    kinds = map(unicodedata.category, text)
    return "".join(c for c, kind in zip(text, kinds, strict=True) if kind[0] != "C" and kind not in STACKED).rstrip()


def _columns(text):
    """The width of a clean text: Chinese, Japanese and most emoji take two columns."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _fit(text, width, look):
    """The clean text, cut where it is longer than `width` columns."""
    text = clean(text)
    if look is ASCII:
        text = text.encode("ascii", "replace").decode()
    if _columns(text) <= width:
        return text
    more = look.more[:width]
    text = text[: width - len(more)]
    while _columns(text) > width - len(more):
        text = text[:-1]
    return text.rstrip() + more


def _wrap(texts, width, height=math.inf):
    """Lines of the texts: at most NOTE_LINES of each, and `height` in all if that is one each. `_fit` cuts the rest."""
    texts = list(filter(None, map(clean, texts)))
    lines = []
    for later, text in zip(reversed(range(len(texts))), texts, strict=True):
        own = textwrap.wrap(text, max(1, width), break_on_hyphens=False)
        room = max(1, min(NOTE_LINES, height - len(lines) - later))
        lines += own if len(own) <= room else [*own[: room - 1], " ".join(own[room - 1 :])]
    return lines


# --- Drawing it again and again --------------------------------------------------------------------------------------


def watch(read, seconds, out=None, sleep=time.sleep):
    """Draw what read() returns, a view as `screen` takes it, every `seconds` on `out` (stdout), until it is over.

    On a terminal it renews one screen in place, and leaves the last one below what was there before. Elsewhere it
    prints a screen whenever it has changed. A RunError of the first `read` is raised; a later one is shown, and `read`
    called again. Ctrl-C ends it without a word.
    """
    out = out or sys.stdout
    with contextlib.suppress(KeyboardInterrupt):
        view = read()
        if not out.isatty():
            _follow(read, view, seconds, Printer(out).show, sleep)
            return
        if not view.get("over"):
            with _alternate_screen(out):
                view = _follow(read, view, seconds, Terminal(out).show, sleep)
        out.write("\n".join(_lines(view, out, below=1)) + "\n")
        out.flush()


def _follow(read, view, seconds, show, sleep):
    """Show views, from `view` on, until one is over. Returns that."""
    show(view)
    while not view.get("over"):
        left = seconds
        while left > 0:
            sleep(min(left, STEP_SECONDS))
            left -= STEP_SECONDS
            show(view)
        try:
            view = read()
        except RunError as error:
            view = view | {"error": f"as of {_clock(view['now'])}, trying again: {error}"}
        show(view)
    return view


class Printer:
    """Shows a view where there is no terminal: once, if more than the ages in it have changed."""

    def __init__(self, out):
        self._out, self._shown = out, None

    def show(self, view):
        lines = _lines(view, self._out)
        timeless = [AGE.sub("ago", line) for line in lines]
        if timeless != self._shown:
            self._shown = timeless
            self._out.write("\n".join([f"--- {_clock(view['now'])}", *lines]) + "\n")
            self._out.flush()


class Terminal:
    """Shows a view over the one before, in one write and without clearing the screen first, which would flicker."""

    def __init__(self, out):
        self._out, self._shown = out, None

    def show(self, view):
        size = shutil.get_terminal_size()
        lines = _lines(view, self._out)
        if (size, lines) == self._shown:  # so that a selection with the mouse stays
            return
        self._shown = size, lines
        # After a line that fills its row the cursor still is on the last character, which clearing would remove.
        rows = [line if _columns(line) == size.columns else line + CLEAR_LINE for line in lines]
        below = "\n" + CLEAR_BELOW if len(lines) < size.lines else ""
        self._out.write(HOME + "\n".join(rows) + below)
        self._out.flush()


@contextlib.contextmanager
def _alternate_screen(out):
    """Without a cursor, and left again however it ends; SIGTERM ends it as an exception does."""

    def end(number, frame):
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        out.write(ENTER)
        yield
    finally:
        with contextlib.suppress(OSError):  # the terminal is gone
            out.write(LEAVE)
            out.flush()
        signal.signal(signal.SIGTERM, before)


def _lines(view, out, below=0):
    """The screen for `out`, `below` lines shorter than the terminal."""
    size = shutil.get_terminal_size()
    return screen(view, size.columns, size.lines - below, ascii_only=not _takes_blocks(out))


def _takes_blocks(out):
    try:
        "".join((BLOCKS.levels, BLOCKS.full, BLOCKS.empty, BLOCKS.limit, BLOCKS.more)).encode(out.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _clock(seconds):
    return time.strftime("%H:%M:%S", time.localtime(seconds))
