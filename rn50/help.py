"""How `--help` looks: plain text, as wide as the terminal."""

import argparse
import shutil
import textwrap

# Where the text beside a name begins; longer lines than WIDEST are hard to read.
INDENT, WIDEST = 28, 100


def columns():
    """The terminal's width, and 80 where there is no terminal."""
    return max(50, min(WIDEST, shutil.get_terminal_size().columns))


def wrapped(text, width):
    """The lines of `text`: paragraphs wrapped to `width` characters, and indented lines, which are commands, kept."""
    lines, paragraph = [], []
    for line in [*text.strip("\n").splitlines(), ""]:
        if line and not line.startswith(" "):
            paragraph.append(line)
            continue
        lines += _filled(" ".join(paragraph), width)
        paragraph = []
        lines.append(line)
    return lines[:-1]


def entry(name, text, width):
    """The lines of an option: its name, and beside it, or below where the name is long, what it means."""
    beside = [" " * INDENT + line for line in _filled(text, width - INDENT)]
    if len(name) > INDENT - 4:
        return [f"  {name}", *beside]
    return [f"  {name}".ljust(INDENT) + beside[0].lstrip(), *beside[1:]]


def _filled(text, width):
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


class HelpFormatter(argparse.HelpFormatter):
    """Of a parser whose description is a module's docstring: wraps its paragraphs, and leaves its commands."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=INDENT, width=columns())

    def _fill_text(self, text, width, indent):
        return "\n".join(wrapped(text, width))
