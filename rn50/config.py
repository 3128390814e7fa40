"""fastargs sections -> one plain namespace, refusing whatever fastargs would let pass.

fastargs drops unknown YAML keys, exits 0 on bad values and reads any non-empty string as true.
Here every key must be declared, every value must fit its checker, and the first thing wrong is
one line and exit status 2 (`UsageError`).
"""

import argparse
import difflib
import math
import sys
from types import SimpleNamespace

import yaml
from fastargs.exceptions import MissingValueError, ValidationError
from fastargs.validation import Checker

from rn50.errors import UsageError
from rn50.files import expanded


class whole(Checker):
    """A whole number within [minimum, maximum]."""

    def __init__(self, minimum=None, maximum=None):
        self.minimum, self.maximum = minimum, maximum

    def check(self, value):
        if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
            raise ValueError
        return _within(int(value), self.minimum, self.maximum)

    def help(self):
        return "a whole number" + _range_text(self.minimum, self.maximum)


class number(Checker):
    """A finite number within [minimum, maximum]."""

    def __init__(self, minimum=None, maximum=None):
        self.minimum, self.maximum = minimum, maximum

    def check(self, value):
        if isinstance(value, bool):
            raise ValueError
        value = float(value)
        if not math.isfinite(value):
            raise ValueError
        return _within(value, self.minimum, self.maximum)

    def help(self):
        return "a number" + _range_text(self.minimum, self.maximum)


class switch(Checker):
    """true or false, from YAML or the command line."""

    WORDS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}

    def check(self, value):
        return self.WORDS[str(value).lower()]

    def help(self):
        return "true or false"


class choice(Checker):
    """One of the given words."""

    def __init__(self, *words):
        self.words = words

    def check(self, value):
        if value not in self.words:
            raise ValueError
        return value

    def help(self):
        return "one of " + ", ".join(self.words)


class text(Checker):
    """Non-empty text."""

    def check(self, value):
        if isinstance(value, (dict, list, bool)) or not str(value).strip():
            raise ValueError
        return str(value)

    def help(self):
        return "text"


class path(text):
    """A path, in which `~` and `$VAR` are what they are in a shell (rn50.files.expanded), or a URL."""

    def check(self, value):
        return expanded(super().check(value))


class numbers(Checker):
    """A list of numbers: a YAML list, or comma-separated. `item` checks each of them."""

    def __init__(self, item):
        self.item = item

    def check(self, value):
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
        if not parts:
            raise ValueError
        return [self.item.check(part) for part in parts]

    def help(self):
        return f"a comma-separated list, each {self.item.help()}"


class either(Checker):
    """A word such as `auto`, or what `checker` takes."""

    def __init__(self, word, checker):
        self.word, self.checker = word, checker

    def check(self, value):
        return value if value == self.word else self.checker.check(value)

    def help(self):
        return f"{self.word} or {self.checker.help()}"


def load(description, declared, argv=None):
    """Read `--config-file FILE` (repeatable, later wins) and then `--section.key=value` flags of `declared`.

    declared: a fastargs.Config of the script's own, because fastargs' global one holds the keys of all scripts.

    Returns a namespace of namespaces with one attribute per declared key (None where an optional
    key is unset). Raises UsageError, naming the key and, for an unknown one, its nearest neighbour.
    `--help` prints fastargs' table of every key and exits 0.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--help" in argv or "-h" in argv:
        _print_help(description, declared)
        raise SystemExit(0)
    values = {}
    files, flags = _split(argv)
    for file in files:
        values.update(_read_yaml(expanded(file)))
    values.update(flags)
    names = {".".join(path) for path in declared.entries}
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
            raise UsageError(f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else ""))
    declared.content.clear()
    # fastargs' own collect() would mistake a dotted key's None for "not given" and read the environment too.
    declared.content.update({tuple(key.split(".")): value for key, value in values.items()})
    return _namespace(declared)


def to_dict(namespace):
    """The plain nested dict of a namespace that `load` returned, without unset keys: `load` reads it again as YAML."""
    return {
        section: {key: value for key, value in vars(keys).items() if value is not None}
        for section, keys in vars(namespace).items()
    }


def defaults(declared):
    """The nested dict of the keys of a fastargs.Config that have a default."""
    values = {}
    for (section, *key), param in declared.entries.items():
        if param.default is not None:
            values.setdefault(section, {})[".".join(key)] = param.checker.check(param.default)
    return values


def refuse_change(saved, current, *, sections, free, folder, defaults):
    """UsageError naming the first key of `sections`, except those in `free`, in which two nested dicts differ.

    defaults: a nested dict of what a key is worth that did not exist yet when `saved` was.
    """
    for section in sections:
        before = {**defaults.get(section, {}), **saved.get(section, {})}
        for key in {**before, **current[section]}:
            name, value = f"{section}.{key}", current[section].get(key)
            if name not in free and before.get(key) != value:
                raise UsageError(
                    f"{name} is {value} but the run in {folder} was started with {before.get(key)}; "
                    "restore it, or choose another logging.run_name"
                )


def _namespace(declared):
    sections = {}
    for path, param in declared.entries.items():
        key = ".".join(path)
        given = path in declared.content
        value = declared.content.get(path)
        if given and value is None:
            raise UsageError(f"{key} has no value; expected {param.checker.help()}")
        try:
            value = declared[path]
        except MissingValueError:
            raise UsageError(f"{key} is required: {param.desc or param.checker.help()}") from None
        except ValidationError as error:
            # fastargs puts its own in the place of what a checker says
            if isinstance(error.__context__, UsageError):
                raise UsageError(f"{key}={error.__context__}") from None
            raise UsageError(f"{key} must be {param.checker.help()}, not {value!r}") from None
        sections.setdefault(path[0], {})[".".join(path[1:])] = value
    return SimpleNamespace(**{name: SimpleNamespace(**keys) for name, keys in sections.items()})


def _split(argv):
    files, flags, rest = [], {}, list(argv)
    while rest:
        token = rest.pop(0)
        name, equals, value = token.partition("=")
        if not name.startswith("-"):
            raise UsageError(f"cannot read {token!r}; settings are given as --section.key=value")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UsageError(f"{name} needs a value, as in {name}=value")
            value = rest.pop(0)
        if name in ("--config-file", "-C"):
            files.append(value)
        elif name.lstrip("-") in flags:
            raise UsageError(f"{name} is given twice")
        else:
            flags[name.lstrip("-")] = value if value != "" else None
    return files, flags


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a repeated key is an error: the last one would win silently."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(file):
    try:
        with open(file, encoding="utf-8") as handle:
            content = yaml.load(handle, Loader=_StrictLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read config file {file}: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"config file {file} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"config file {file} must hold sections of keys")
    flat = {}
    for section, keys in content.items():
        if not isinstance(keys, dict):
            raise UsageError(f"config file {file}: {section} must be a section of keys, not {keys!r}")
        flat.update({f"{section}.{key}": value for key, value in keys.items()})
    return flat


def _print_help(description, declared):
    saved, sys.argv = sys.argv, sys.argv[:1]
    try:
        parser = argparse.ArgumentParser(description=description)
        declared.augment_argparse(parser)
        parser.print_help()
    finally:
        sys.argv = saved


def _within(value, minimum, maximum):
    if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
        raise ValueError
    return value


def _range_text(minimum, maximum):
    if minimum is not None and maximum is not None:
        return f" from {minimum} to {maximum}"
    if minimum is not None:
        return f" of at least {minimum}"
    return f" of at most {maximum}" if maximum is not None else ""
