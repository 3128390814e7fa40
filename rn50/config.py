"""fastargs sections -> one plain namespace, refusing whatever fastargs would let pass.

fastargs drops unknown YAML keys, exits 0 on bad values and reads any non-empty string as true.
Here every key must be declared, every value must fit its checker, and the first thing wrong is
one line and exit status 2 (`UsageError`).
"""

import difflib
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import yaml
from fastargs.exceptions import MissingValueError, ValidationError
from fastargs.validation import Checker

from rn50.errors import UsageError
from rn50.files import expanded, file_of_run
from rn50.help import columns, entry, wrapped
from rn50.words import from_here

FOLDER = Path(__file__).resolve().parents[1] / "rn50_configs"
# Which script a section of settings belongs to, where it is given to the other one.
SCRIPTS = {"source": "write_dataset.py", "out": "write_dataset.py"}
SCRIPTS |= dict.fromkeys(("model", "training", "lr", "resolution", "data", "validation"), "train_imagenet.py")
CONFIG_FILE = ("--config-file", "-C")
# What text editors and web pages make of " and of --.
QUOTES = tuple("\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}\N{DOUBLE LOW-9 QUOTATION MARK}")
DASHES = ("\N{EN DASH}", "\N{EM DASH}", "\N{MINUS SIGN}", "\N{NON-BREAKING HYPHEN}")


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

    def help(self):
        return "a path"


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


def load(about, declared, argv=None, *, advice=""):
    """Read `--config-file FILE` (repeatable, later wins) and then `--section.key=value` flags of `declared`.

    about: the text of `--help` above the keys. declared: a fastargs.Config of the script's own, because fastargs'
    global one holds the keys of all scripts. advice: what to do where no arguments are given.

    Returns a namespace of namespaces with one attribute per declared key (None where an optional
    key is unset). Raises UsageError, naming the key and, for an unknown one, its nearest neighbours.
    """
    files, flags = read(about, declared, argv, advice=advice)
    if advice and not files and not flags:
        raise UsageError(advice)
    return namespace(declared, files | flags)


def read(about, declared, argv=None, *, switches=None, advice=""):
    """({key: value} of all config files, the same of all flags), unchecked; prints the help, and ends, for `--help`.

    switches: {flag without a value: its text for the help}; where one is given, its value is True. Raises UsageError
    for what is no key, and for a config file that cannot be read.
    """
    argv, switches = sys.argv[1:] if argv is None else list(argv), switches or {}
    if "--help" in argv or "-h" in argv:
        print("\n".join(_help(about, declared, switches)))
        raise SystemExit(0)
    names = [".".join(path) for path in declared.entries]
    found, flags = _split(argv, names, switches, advice)
    values = {}
    for file in found:
        values |= _read_yaml(file, names, advice)
    return values, flags


def namespace(declared, values):
    """The checked namespace of {key: value}, as `load` returns it."""
    declared.content.clear()
    # fastargs' own collect() would mistake a dotted key's None for "not given" and read the environment too.
    declared.content.update({tuple(key.split(".")): value for key, value in values.items()})
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
            raise UsageError(f"{key} is required: {param.desc}; give it as --{key}=VALUE, or in a YAML") from None
        except ValidationError as error:
            # fastargs puts its own in the place of what a checker says
            if isinstance(error.__context__, UsageError):
                raise UsageError(f"{key}={error.__context__}") from None
            raise UsageError(f"{key} must be {param.checker.help()}, not {value!r}") from None
        sections.setdefault(path[0], {})[".".join(path[1:])] = value
    return SimpleNamespace(**{name: SimpleNamespace(**keys) for name, keys in sections.items()})


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


def _split(argv, names, switches, advice):
    """(config files, {key: value}) of the arguments; UsageError for what is none of `names` or `switches`."""
    files, flags, rest = [], {}, list(argv)
    while rest:
        token = rest.pop(0)
        name, equals, value = token.partition("=")
        if not name.startswith("-"):
            raise UsageError(_stray(token, "" if files or flags else advice))
        if name in switches:
            if equals:
                raise UsageError(f"{name} takes no value: leave out ={value}")
            value = True
        else:
            if name not in CONFIG_FILE:
                _refuse_unknown(name.lstrip("-"), names)
            if not equals:
                if not rest or rest[0].startswith("--"):
                    raise UsageError(f"{name} needs a value, as in {name}=VALUE")
                value = rest.pop(0)
            if value.startswith(QUOTES):
                raise UsageError(f'{token} has printed quotes: leave them out, or write " in their place')
        if name in CONFIG_FILE:
            files.append(value)
        elif name.lstrip("-") in flags:
            raise UsageError(f"{name} is given twice")
        else:
            flags[name.lstrip("-")] = value if value != "" else None
    return files, flags


def _stray(token, advice):
    """What is wrong with an argument that is no flag. advice: on how to begin, where it is the first."""
    if token.startswith(DASHES):
        return f"{token!r} begins with a printed dash: write --{token.lstrip('-' + ''.join(DASHES))}"
    if "=" in token and "." in token.partition("=")[0]:
        return f"cannot read {token!r}; did you mean --{token}?"
    if token.endswith((".yaml", ".yml")):
        return f"cannot read {token!r}; did you mean --config-file {token}?"
    return f"cannot read {token!r}; " + (
        advice or 'settings are given as --section.key=value: a list as 1,2 and a value with spaces as "a b"'
    )


def _refuse_unknown(key, names, file=None):
    """UsageError where `key`, from a flag or from `file`, is none of `names`, with those that may be meant."""
    if key in names:
        return
    where = f" in {file}" if file else ""
    section = key.rpartition(".")[0]
    if section not in {name.partition(".")[0] for name in names} and section in SCRIPTS:
        raise UsageError(f"unknown key {key}{where}: {SCRIPTS[section]} has it")
    dashes = "" if file else "--"
    near = ["config-file FILE"] if key in ("c", "config") and not file else _near(key, names)
    meant = " or ".join(dashes + name for name in near)
    raise UsageError(f"unknown key {key}{where}; " + (f"did you mean {meant}?" if meant else "--help lists all keys"))


def _near(key, names):
    """At most three of `names` that `key` may be meant for; what follows the last dot counts most."""
    key = key.replace("-", "_")
    section, _, last = key.rpartition(".")
    lasts = {name: name.rpartition(".")[2] for name in names}
    for alike in (
        lambda name: lasts[name] == last,
        lambda name: lasts[name].startswith(f"{last}_"),
        lambda name: last.startswith(f"{lasts[name]}_"),
    ):
        found = [name for name in names if alike(name)]
        mine = [name for name in found if name.startswith(f"{section}.")]
        if found := mine or found:
            return found[:3]
    if within := [name for name in names if name.startswith(f"{key}.")]:
        return within[:3]
    if near := difflib.get_close_matches(key, names, n=1, cutoff=0.7):
        return near
    near = difflib.get_close_matches(last, sorted(set(lasts.values())), n=1, cutoff=0.7)
    if found := [name for name in names if lasts[name] in near]:
        return found[:3]
    return difflib.get_close_matches(key, names, n=1, cutoff=0.5) if section else []


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a repeated key is an error: the last one would win silently."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def recipes():
    """Names of the training recipes in rn50_configs/, which another installation may not have; ImageNet's first."""
    names = [path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("write_")]
    return sorted(names, key=lambda name: (not name.startswith("rn50"), name != "rn50_78", _natural(name)))


def shown(name):
    """Path of rn50_configs/{name}.yaml as it is typed in this folder."""
    return from_here(FOLDER / f"{name}.yaml")


def _natural(name):
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split("_")]


def _read_yaml(given, names, advice):
    """{key: value} of the config file, or run folder, `given`; UsageError for what is none of `names`."""
    file = file_of_run(expanded(given), "config.yaml")
    try:
        with open(file, encoding="utf-8") as handle:
            content = yaml.load(handle, Loader=_StrictLoader)
    except UnicodeDecodeError:
        raise UsageError(f"cannot read config file {file}: it is no text, so no YAML") from None
    except OSError as error:
        raise UsageError(f"cannot read config file {file}: {error.strerror}{_meant(file)}") from None
    except yaml.YAMLError as error:
        tabs = "; indent with spaces, not tabs" if "'\\t'" in str(error) else ""
        raise UsageError(f"config file {file} is not valid YAML: {error}{tabs}") from None
    if not isinstance(content, dict):
        what = "is empty" if content is None else "has none"
        raise UsageError(f"config file {file} must hold sections of keys, and {what}")
    sections = {name.partition(".")[0] for name in names}
    if content and not sections & content.keys() and (script := SCRIPTS.get(next(iter(content)))):
        raise UsageError(f"config file {file} is for {script}" + (f"; {advice}" if advice else ""))
    flat = {}
    for section, keys in content.items():
        if keys is None:
            raise UsageError(f"config file {file}: {section} has no keys; they stand below it, indented")
        if not isinstance(keys, dict):
            raise UsageError(f"config file {file}: {section} must be a section of keys, not {keys!r}")
        flat.update({f"{section}.{key}": value for key, value in keys.items()})
    for key in flat:
        _refuse_unknown(key, names, file)
    return flat


def _meant(file):
    """What may be meant by the name of a config file that is not there, as the end of a message."""
    stem = Path(file).name.removesuffix(".yml").removesuffix(".yaml")
    known = [path.stem for path in FOLDER.glob("*.yaml")]
    near = difflib.get_close_matches(stem, known, n=1)
    return f"; did you mean {shown(near[0])}?" if near else ""


def _help(about, declared, switches):
    """The lines of `--help`."""
    width = columns()
    lines = [*wrapped(about, width), "", "Options"]
    lines += entry(
        "--config-file FILE",
        "YAML with the keys below, in sections (also -C FILE). Of several files the later wins; a flag wins over all",
        width,
    )
    for flag, text in switches.items():
        lines += entry(flag, text, width)
    lines += entry("--help, -h", "this text", width)
    for section, entries in declared.sections_to_entries.items():
        lines += ["", f"{'.'.join(section)}: {declared.sections[section].desc}"]
        for path in entries:
            param = declared.entries[path]
            text = f"{param.desc} ({param.checker.help()}; {_worth(param)})"
            lines += entry(f"--{'.'.join(path)}", text, width)
    return lines


def _worth(param):
    """What a key is worth where it is not given, as it would be typed."""
    if param.required:
        return "required"
    value = param.default
    if value is None:
        return "not set by default"
    if isinstance(value, bool):
        return f"default {str(value).lower()}"
    values = value if isinstance(value, list) else [value]
    return "default " + ",".join(f"{one:g}" if isinstance(one, float) else str(one) for one in values)


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
