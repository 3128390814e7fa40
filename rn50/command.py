"""How every command ends: `run(main)`."""

import contextlib
import os
import select
import sys
import traceback

from rn50.errors import RunError, Stopped, UsageError, planned_exit


def run(main):
    """Call `main()` and end the process: status 0, or one line and the status that the error stands for."""
    try:
        main()
        print(end="", flush=True)  # so that a closed pipe fails here and not at exit
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
