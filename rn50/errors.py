"""The two ways a command may fail on purpose; everything else is a bug and keeps its traceback."""

import sys


class UsageError(Exception):
    """The command line or config is wrong: one line on stderr, exit status 2."""


class RunError(Exception):
    """The world is not as the command needs it (file, disk, data): one line on stderr, exit status 1."""


def run(main):
    """Call `main()` and end the process: status 0, or one line and the status that the error stands for."""
    try:
        main()
    except UsageError as error:
        sys.exit(_report(error, 2))
    except RunError as error:
        sys.exit(_report(error, 1))
    except KeyboardInterrupt:
        sys.exit(_report("interrupted", 130))


def _report(error, status):
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return status
