"""Paths as a user writes them, files that are whole or not there, and the one reader of a log.jsonl. No torch."""

import contextlib
import hashlib
import json
import os
import re
import sys
from pathlib import Path

from rn50.errors import RunError, UsageError

# What people point at when they mean a run.
RUN_FILES = ("last.pt", "log.jsonl", "config.yaml", "status.json", "environment.json")
VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})", re.ASCII)


def expanded_path(text):
    """A Path from an argument: `expanded`, for a parser's `type`."""
    return Path(expanded(text))


def expanded(text):
    """`text` with `~`, `~user`, `$NAME` and `${NAME}` as a shell reads them: YAML and `--key=~/x` go through none.

    A URL (s3://…) stays as it is, and so does the name of a file that is there, as `*` in a shell may give it.
    UsageError names a variable that is not set: taken for nothing, it would make another path.
    """
    if "://" in text or ("$" in text and os.path.lexists(text)):
        return text
    found = os.path.expanduser(VARIABLE.sub(lambda match: _variable(match, text), text))
    if found.split("/")[0] == "~":
        raise UsageError(f"{text}: there is no home folder here for ~; set HOME, or write the path in full")
    if not found:
        raise UsageError(f"{text or 'a path'} is empty")
    return found


def _variable(match, text):
    name = match[1] or match[2]
    if name not in os.environ:
        raise UsageError(f"{text}: the variable {name} is not set; set it, or write the path in full")
    return os.environ[name]


def file_of_run(run, name):
    """Path of the file `name` of a run: `run` is its folder, or one of RUN_FILES in it; another file stays itself."""
    run = Path(run)
    if run.is_dir():
        return run / name
    return run.with_name(name) if run.name in RUN_FILES else run


def write_atomically(path, content):
    """Put the text `content` at `path` whole or not at all. OSError where the disk does not take it."""
    aside = Path(f"{path}.{os.getpid()}.partial")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def write_result(path, content):
    """`write_atomically` for a command's result: RunError, one line, where the disk does not take it."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from None


def sha256(path):
    """The file's sha256, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path, default):
    """What the JSON file holds; `default` where there is none, or none that can be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default


def read_rows(path, warn=None, check=None):
    """The rows of a file of JSON lines, as `parse_rows` reads them; none where there is no file."""
    try:
        content = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None
    return parse_rows(content, path, warn, check)


def parse_rows(content, name, warn=None, check=None):
    """A list of dicts, one a line of the text `content`.

    A killed process may leave the last line torn: `warn` is told (default: a note on stderr) and the line is passed
    over. RunError, with `name` and the line's number, for any other line that is not a JSON object, or of which
    check(value) says what is wrong (None: nothing).
    """
    rows, lines = [], content.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            if number < len(lines) or content.endswith("\n"):
                raise RunError(f"{name}, line {number}: not valid JSON") from None
            (warn or _note)(f"{name}: line {number} is incomplete and passed over")
            continue
        problem = (check or _object)(row)
        if problem:
            raise RunError(f"{name}, line {number}: {problem}")
        rows.append(row)
    return rows


def _object(value):
    return None if isinstance(value, dict) else "not a JSON object"


def _note(text):
    print(f"note: {text}", file=sys.stderr, flush=True)
