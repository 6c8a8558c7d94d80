"""The command `tl-jets` (`python -m tl_jets`): `lens` (default), `paths`, `flow`, `ngrams`, `jacobian`, `explore`.

Each command is a module whose `report(options)` returns a `Report`: plain data and tables. `session.run` writes it.

Tables go to standard output, errors (one line) and progress bars to standard error. Exit status: 0 success; 2 the
request cannot be fulfilled (bad option, unknown token, model that does not load); 1 unexpected error; 130 interrupted;
141 the reader of standard output closed it.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from tl_jets.cli.arguments import UsageError, one_line, parser

REFUSED, UNEXPECTED, INTERRUPTED, CLOSED_PIPE = 2, 1, 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status (see the module)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version")):
        arguments = ["lens", *arguments]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # some terminals cannot encode every token
    options = argparse.Namespace(traceback=False)
    try:
        try:
            options = parser().parse_args(arguments)
            from tl_jets.cli import session  # after parsing: PyTorch takes seconds to load

            session.run(options)
        finally:
            if sys.stdout is not None:  # it is None if it was closed
                sys.stdout.flush()
    except UsageError as error:
        print(f"tl-jets: {error}", file=sys.stderr)
        return REFUSED
    except BrokenPipeError:
        _discard_output()
        return CLOSED_PIPE
    except KeyboardInterrupt:
        print("tl-jets: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if options.traceback:
            raise
        _discard_output()
        name = type(error).__name__
        print(f"tl-jets: unexpected {name}: {one_line(error)} (--traceback shows where)", file=sys.stderr)
        return UNEXPECTED
    return 0


def _discard_output() -> None:
    """Send the rest of the buffer to the null device when Python flushes it at exit."""
    if sys.stdout is not None and sys.stdout is sys.__stdout__:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
