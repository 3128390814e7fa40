"""How every command ends: `run(main)`."""

import contextlib
import fcntl
import os
import select
import sys
import traceback

from rn50.errors import RunError, Stopped, UsageError, planned_exit


def run(main):
    """Call `main()` and end the process: status 0, or one line and the status that the error stands for."""
    open_streams()
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
        status = 141 if _nobody_reads() else _trace()  # as a shell says of what SIGPIPE ended
    except OSError:
        if refused := _refused(sys.stdout):
            status = _report(f"stdout cannot be written: {refused.strerror}", 1)
        elif _refused(sys.stderr):
            status = 1
        else:
            status = _trace()
    except Exception:
        status = _trace()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    # The interpreter's own end would wait for threads: one that waits for a dead rank never ends, and numba, which FFCV
    # imports, has been seen to wait for ever for threads that a fork left behind.
    os._exit(status)


def open_streams():
    """Let /dev/null stand for stdin, stdout or stderr where the command was started without (`>&-`, some daemons).

    Call it before anything opens a file: a file gets the lowest free number, and what is printed would go into it.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if not _usable(number):
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, number)
            if nowhere > 2:
                os.close(nowhere)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
    # a file's name may be no text in the terminal's encoding
    sys.stdout.reconfigure(errors="backslashreplace")


def _usable(number):
    """Whether the descriptor is open, and one of output not for reading alone: pyenv's shims leave such a one."""
    try:
        access = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError:
        return False
    return number == 0 or access != os.O_RDONLY


def _nobody_reads():
    """Whether stdout is a pipe that was closed, as by `| head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))


def _refused(stream):
    """The error of a stream that takes nothing, such as a file on a full disk, or None."""
    try:
        stream.flush()  # what was refused may still be in its buffer
        os.write(stream.fileno(), b"\n")
    except OSError as error:
        return error


def _report(error, status):
    with contextlib.suppress(OSError):  # a full disk: the status says it alone
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return status


def _trace():
    with contextlib.suppress(OSError):
        traceback.print_exc()
    return 1
