"""The ways a command may end on purpose; everything else is a bug and keeps its traceback."""

import os
import select
import sys
import traceback

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


def run(main):
    """Call `main()` and end the process: status 0, or one line and the status that the error stands for."""
    try:
        main()
        print(end="", flush=True)  # what cannot be written should be known here
    except BrokenPipeError:
        if under_torchrun() or not _nobody_reads():
            raise
        _leave(141)  # as a shell says of what SIGPIPE ended
    except Stopped as stop:
        _leave(planned_exit(stop.status))
    except UsageError as error:
        _leave(_report(error, 2))
    except RunError as error:
        _leave(_report(error, 1))
    except KeyboardInterrupt:
        _leave(_report("interrupted", 130))
    except Exception:
        if not under_torchrun():
            raise
        traceback.print_exc()
        _leave(1)


def _nobody_reads():
    """Whether stdout is a pipe that was closed, as by `| head`; if so, what is left for it goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    closed = bool(poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


def _leave(status):
    if under_torchrun():
        # the interpreter's own end waits for threads that may wait for a dead rank for ever
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _report(error, status):
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return status
