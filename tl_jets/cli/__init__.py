"""The command `tl-jets` (`python -m tl_jets`): what jets say about a real model's prediction.

Four commands, a module each: `lens`, `paths`, `ngrams`, `jacobian`; their options are in `grammar`. Without a command, `lens`;
without options, of the embedded model. Tables go to standard output, errors (one line) and bars to standard error.

Exit statuses: 0 fine; 2 what was asked for cannot be done (a bad option, an unknown token, a model that does not load); 1 an
unexpected error; 130 interrupted; 141 the reader of standard output went away.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from tl_jets.cli.arguments import UsageError, one_line
from tl_jets.cli.grammar import parser

REFUSED, UNEXPECTED, INTERRUPTED, CLOSED_PIPE = 2, 1, 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status (see the module)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version")):
        arguments = ["lens", *arguments]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # tokens hold what not every terminal can write
    options = argparse.Namespace(traceback=False)
    try:
        try:
            options = parser().parse_args(arguments)
            # What runs a command is loaded once its options are understood: PyTorch takes seconds.
            command = import_module(f"tl_jets.cli.{options.command}")
            from tl_jets.core.divergence import DivergenceWarning

            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DivergenceWarning)  # the tables have the remainders
                command.run(options)
        finally:
            if sys.stdout is not None:  # it is where it was closed
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
    """What is left in the buffer must go somewhere when Python flushes it at its end."""
    if sys.stdout is not None and sys.stdout is sys.__stdout__:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
