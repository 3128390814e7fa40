"""The ways a command may end on purpose; everything else is a bug and keeps its traceback."""

import os

# Exit statuses of a planned stop, by the word for it in status.json.
PLANNED = {"interrupted": 3, "budget": 4}


class UsageError(Exception):
    """The command line or config is wrong: one line on stderr, exit status 2."""


class RunError(Exception):
    """The world is not as the command needs it (file, disk, data): one line on stderr, exit status 1."""


class Stopped(Exception):
    """A planned stop: the same command goes on from here. Exit status by PLANNED[status]; 0 under torchrun."""

    def __init__(self, reason, status="interrupted"):
        super().__init__(reason)
        self.status = status


def planned_exit(status):
    """The exit status of a planned stop. torchrun would start again whatever ends with another status than 0."""
    return 0 if under_torchrun() else PLANNED[status]


def under_torchrun():
    return "RANK" in os.environ
