"""The command `tl-jets` (`python -m tl_jets`): what jets say about a real model's prediction.

Four commands, a module each: `lens`, `paths`, `ngrams`, `jacobian`; without one, `lens`; without options, of the embedded
model. Tables go to standard output, errors (one line) and bars to standard error.

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
from importlib.metadata import version

from tl_jets.cli import jacobian, lens, ngrams, paths
from tl_jets.cli.arguments import Help, Parser
from tl_jets.cli.session import UsageError, one_line
from tl_jets.core.divergence import DivergenceWarning

REFUSED, UNEXPECTED, INTERRUPTED, CLOSED_PIPE = 2, 1, 130, 141

DESCRIPTION = """\
What jets say about a TransformerLens model: a transformer as a sum of terms.

  tl-jets lens       what every layer says about the next token, and the
                     prediction as a weighted sum of components
  tl-jets paths      the largest paths from input to output, and what
                     ablation says of them
  tl-jets ngrams     what the weights say after every token of the
                     vocabulary, without a corpus
  tl-jets jacobian   the model as an exact linear map at one prompt: what
                     each token gives to the answer

Each prints tables with its controls beside them, and a legend; --json and
--html write the same to files. A model is a local Hugging Face directory or
a name on the hub; without --model it is the small one that comes along.
"""
EPILOG = """\
Options without a command are those of `lens`; `tl-jets COMMAND --help` tells
what a command's numbers mean.

example:
  tl-jets paths --model ./my-model --prompt "Once upon a" --ablate

exit status: 0 fine; 2 what was asked for cannot be done; 1 an unexpected
error; 130 interrupted; 141 the output's reader went away.
"""


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
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DivergenceWarning)  # the tables have the remainders
                options.run(options)
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


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = Parser(prog="tl-jets", description=DESCRIPTION, epilog=EPILOG, formatter_class=Help, allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"tl-jets {version('tl-jets')}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", help=argparse.SUPPRESS)
    for command in (lens, paths, ngrams, jacobian):
        command.add_to(commands)
    return top
