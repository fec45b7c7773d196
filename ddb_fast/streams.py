"""Standard output and error of a command: closed, full, left by their reader, or in ASCII."""

import logging
import os
import sys
from collections.abc import Callable

logger = logging.getLogger(__name__)

_READER_LEFT = 141
"""What a shell says of a command that SIGPIPE ended."""


def log_to_stderr() -> None:
    """What this package says by the way; of others their warnings. A caller's own setup stays."""
    if not logging.getLogger().handlers:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("ddb_fast").setLevel(logging.INFO)
    if not sys.getfilesystemencoding().startswith("utf"):
        logger.warning(
            "this locale is not UTF-8: names that are not ASCII are recorded as it reads them, and "
            "mean nothing elsewhere; PYTHONUTF8=1 records them as they are"
        )


def printing(work: Callable[[], int], *, prog: str) -> int:
    """The exit status of a command that prints, once what it printed is out.

    A reader that leaves, as `head` does, is no error: what is finished keeps its status, what is
    not ends with 141. Output that the disk refuses is one line and 2, Ctrl-C one and 130.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell, `>&-`
            # The number stays taken: a file of the run's must not become the standard output.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif stream.errors == "strict":
            # A character that a terminal lacks must not end what may have taken days.
            stream.reconfigure(errors="backslashreplace")
    stop = None
    try:
        status = work()
    except SystemExit as error:  # of argparse, which may have printed the help
        stop = error
        status = 0
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        _discard()
        return _READER_LEFT
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard()
    except OSError as error:
        _discard()
        if status == 0:  # else the command has told
            print(f"{prog}: standard output: {error.strerror}", file=sys.stderr)
            return 2
    if stop is not None:
        raise stop
    return status


def _discard() -> None:
    """Drop what cannot be printed: Python would try again at its end, and complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
