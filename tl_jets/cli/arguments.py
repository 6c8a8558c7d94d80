"""Options shared by the commands, and their parser."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from typing import Any, NoReturn

EMBEDDED = "tinydocs"
EMBEDDED_PROMPT = "If the file does not exist, an error is"

# Copies of the library's choices and limits, so that parsing loads no PyTorch; a test compares them.
GRANULARITIES = ("block", "sublayer", "head")
CENTER_SCALES = ("none", "match", "orthogonal")
OBJECTIVES = ("l2", "centered_l2", "kl")
PER = ("global", "row")
SCORES = ("logprob", "logit")
NORMALIZES = ("vocab", "pair", "none")
LOGITS = "logits"
MAX_ORDER = 1000
MAX_PATHS = 4096
# Maximum number of n-grams per table; the functions allow more.
MOST = 1_000_000


class UsageError(Exception):
    """A request that cannot be fulfilled, with a one-line message."""


def one_line(error: Exception, width: int = 500) -> str:
    """An error's message on one line."""
    return textwrap.shorten(str(error) or type(error).__name__, width, placeholder=" ...")


class Parser(argparse.ArgumentParser):
    """A parser with one-line errors."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Reject leftover arguments here, where the command is known."""
        found, left = super().parse_known_args(args, namespace)
        if left:
            self.error(f"unrecognized arguments: {' '.join(left)}")
        return found, left

    def error(self, message: str) -> NoReturn:
        """Print the error and how to see the options, then exit with status 2."""
        text = " ".join(message.split())
        self.exit(2, f"tl-jets: {text} (see {self.prog} --help)\n")


class Help(argparse.RawDescriptionHelpFormatter):
    """Keeps paragraphs as written, and shows defaults."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if action.default in (None, argparse.SUPPRESS) or action.nargs == 0:
            return text
        return f"{text} (default: %(default)s)"


def add_command(commands: Any, name: str, *, summary: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """Add a command's parser, without options."""
    found = commands.add_parser(
        name, help=summary, description=description, epilog=epilog, formatter_class=Help, allow_abbrev=False
    )
    return found


def add_model(parser: Any, *, prompt: bool = True) -> None:
    """Add the options of the model and its prompt."""
    parser.add_argument(
        "--model",
        default=EMBEDDED,
        metavar="PATH_OR_NAME",
        help=f"a local Hugging Face directory, a model's name, or {EMBEDDED!r}, the embedded",
    )
    if prompt:
        parser.add_argument(
            "--prompt",
            metavar="TEXT",
            help=f"the text to read; without one, {EMBEDDED!r} reads {EMBEDDED_PROMPT!r}. One that begins with a dash is "
            "given as --prompt=TEXT",
        )
        parser.add_argument(
            "--position", type=int, default=-1, metavar="N", help="the position to read; -1 is the last"
        )


def add_granularity(parser: Any, what: str) -> None:
    """Add the option for what a component is; its default is the library's."""
    parser.add_argument("--granularity", choices=GRANULARITIES, default="sublayer", help=what)


def add_target(parser: Any, help: str, **options: Any) -> None:
    """Add the option for a target token."""
    parser.add_argument("--target", metavar="TOKEN", help=help, **options)


def add_seed(parser: Any, of: str) -> None:
    """Add the option for the random seed."""
    most = 2**64 - 1  # the largest seed of torch
    parser.add_argument("--seed", type=at_least(0, at_most=most), default=0, metavar="N", help=of)


def add_files(parser: Any, html: str, *, svg: bool = False) -> None:
    """Add the options for output files and tracebacks."""
    parser.add_argument("--html", metavar="FILE", help=f"also write {html}")
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="also write all numbers, tokens with their spaces shown (\u00b7); what is no number is null",
    )
    if svg:
        parser.add_argument("--svg", metavar="FILE", help="also write the two lenses as a picture")
    parser.add_argument("--traceback", action="store_true", help="show where an unexpected error came from")


def at_least(least: int, *, at_most: int | None = None) -> Callable[[str], int]:
    """An argparse type: an integer within limits."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number, {least} or more; got {text!r}")
        if at_most is not None and value > at_most:
            raise argparse.ArgumentTypeError(f"must be {at_most:,} or less; got {text!r}")
        return value

    return read


# Sentences shared by several --help texts.
TOKEN_HELP = "as text (' is', or \u00b7is as the tables write it) or as id:317"
FILES_HELP = """\
A FILE of - is standard output; the tables are then left out."""
