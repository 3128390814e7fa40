"""The ways a command may end on purpose; everything else is a bug and keeps its traceback."""

import contextlib
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
        print(end="", flush=True)  # what nobody reads should be known here
        status = 0
    except Stopped as stop:
        status = planned_exit(stop.status)
    except UsageError as error:
        status = _report(error, 2)
    except RunError as error:
        status = _report(error, 1)
    except KeyboardInterrupt:
        status = _report("interrupted", 130)
    except BrokenPipeError:
        status = 141 if _nobody_reads() else 1  # as a shell says of what SIGPIPE ended
        if status == 1:
            traceback.print_exc()
    except Exception:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    # The interpreter's own end would wait for threads: one that waits for a dead rank never ends, and numba, which FFCV
    # imports, has been seen to wait for ever for threads that a fork left behind.
    os._exit(status)


def _nobody_reads():
    """Whether stdout is a pipe that was closed, as by `| head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))


def _report(error, status):
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return status
