"""The command `tl-jets` (`python -m tl_jets`): what jets say about a real model's prediction.

`tl-jets lens --model PATH_OR_NAME --prompt TEXT` prints the iterative lens (a layer a row, an order a column) and the
joint lens (a component a row) of one prompt; without arguments it does so for the embedded model. Errors are one line on
standard error, with exit status 2.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tl_jets import terminal
from tl_jets.expansion.expand import CENTER_SCALES, OBJECTIVES
from tl_jets.lenses import iterative_jet_lens, joint_jet_lens
from tl_jets.loading import load_model
from tl_jets.network import ResidualNetwork
from tl_jets.pretrained import load_tinydocs
from tl_jets.stages import GRANULARITIES
from tl_jets.views import lens_data, lens_page

EMBEDDED = "tinydocs"
EMBEDDED_PROMPT = "If the file does not exist, an error is"


class UsageError(Exception):
    """What the user asked for cannot be done; the message is one line."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, too."""

    def error(self, message: str) -> NoReturn:
        """Print the error and where to find the options, then exit with status 2."""
        self.exit(2, f"tl-jets: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status (0, or 2 for bad input)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version")):
        arguments = ["lens", *arguments]
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except UsageError as error:
        print(f"tl-jets: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = Parser(
        prog="tl-jets",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="Options without a command are those of `lens`; without any, the embedded model is read.",
    )
    top.add_argument("--version", action="version", version=f"tl-jets {version('tl-jets')}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    lens = commands.add_parser(
        "lens",
        help="the iterative and the joint jet lens of a prompt",
        description="Print what every layer's stream says about the next token (the iterative lens), and the "
        "prediction as a weighted sum of components (the joint lens). Order 0 is the logit lens. An answer in "
        "brackets is borrowed: it comes from the model's own final stream, not from the layer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    lens.add_argument(
        "--model",
        default=EMBEDDED,
        help=f"a local Hugging Face directory, a model's name, or {EMBEDDED!r}, the embedded",
    )
    lens.add_argument("--prompt", help=f"the text to read; without one, {EMBEDDED!r} reads {EMBEDDED_PROMPT!r}")
    lens.add_argument("--order", type=int, default=1, help="highest order of the iterative lens")
    lens.add_argument("--joint-order", type=int, default=0, help="order of the joint lens")
    lens.add_argument("--center-scale", choices=CENTER_SCALES, default="none", help="length of the centers")
    lens.add_argument("--granularity", choices=GRANULARITIES, default="block", help="components of the joint lens")
    lens.add_argument("--objective", choices=OBJECTIVES, default="centered_l2", help="what the joint weights minimize")
    lens.add_argument("--position", type=int, default=-1, help="the position to read; -1 is the last")
    lens.add_argument("--top-k", type=int, default=3, help="best tokens a cell")
    lens.add_argument("--html", metavar="FILE", type=Path, help="also write one page that opens offline in a browser")
    lens.add_argument("--json", metavar="FILE", type=Path, help="also write the numbers")
    lens.add_argument("--svg", metavar="FILE", type=Path, help="also write the two lenses as a picture")
    lens.set_defaults(run=run_lens)
    return top


def run_lens(options: argparse.Namespace) -> int:
    """Print both lenses of one prompt."""
    if options.order < 0 or options.joint_order < 0:
        raise UsageError(f"an order must be 0 or more; got {min(options.order, options.joint_order)}")
    if options.prompt is None:
        if options.model != EMBEDDED:
            raise UsageError("a --model of your own needs a --prompt")
        options.prompt = EMBEDDED_PROMPT
    if not options.prompt:
        raise UsageError("the prompt must not be empty")
    if options.top_k < 1:
        raise UsageError(f"--top-k must be 1 or more; got {options.top_k}")
    for path in (options.html, options.json, options.svg):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"cannot write {str(path)!r}: there is no directory {str(path.parent)!r}")
        if path is not None and path.is_dir():
            raise UsageError(f"cannot write {str(path)!r}: it is a directory")
    shared: dict[str, Any] = {"center_scale": options.center_scale, "top_k": options.top_k}
    with _steps(4) as step:
        try:
            step("loading TransformerLens and the model")
            network = _network(options.model, options.granularity)
            step("forward pass")
            trace = network.trace(options.prompt)
            position = _position(options.position, trace.tokens.shape[1])
            step("iterative jet lens")
            iterative = iterative_jet_lens(network, trace, order=options.order, **shared)
            step("joint jet lens")
            joint = joint_jet_lens(network, trace, order=options.joint_order, objective=options.objective, **shared)
        except (ValueError, NotImplementedError) as error:
            raise UsageError(_one_line(error)) from error
    console = Console()
    lenses = (
        terminal.heading(iterative, position, options.model, options.prompt),
        terminal.iterative_table(iterative, position, width=console.width),
        terminal.joint_table(joint, position),
    )
    for part in (*lenses, terminal.average_table(iterative, joint), terminal.legend(iterative)):
        console.print(part)
    data = lens_data(iterative, joint, model=options.model, prompt=options.prompt)
    if options.html is not None:
        _write(options.html, lens_page(data | {"shown": position}))
    if options.json is not None:
        _write(options.json, json.dumps(data, allow_nan=False, ensure_ascii=False, indent=1))
    if options.svg is not None:
        _write(options.svg, terminal.picture(*lenses))
    return 0


@contextmanager
def _steps(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on standard error while the work lasts, in a terminal only; call what it gives when a step begins."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    quiet = not console.is_terminal
    # Downloads draw bars of their own: standard error is left to them.
    with Progress(*columns, console=console, transient=True, disable=quiet, redirect_stderr=False) as progress:
        task = progress.add_task("", total=total)
        yield lambda name: progress.update(task, description=name, advance=1)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {str(path)!r}: {_one_line(error)}") from error


def _network(name: str, granularity: Any) -> ResidualNetwork:
    try:
        with _quiet():
            model = load_tinydocs() if name == EMBEDDED else load_model(name)
            return ResidualNetwork(model, granularity)
    except FileNotFoundError as error:
        raise UsageError(_one_line(error)) from error
    except OSError as error:
        raise UsageError(
            f"cannot load model {name!r}: it is no local directory, and the hub did not give it ({_one_line(error, 120)})"
        ) from error
    except Exception as error:  # a loader has many ways to fail, and every one of them is the model's
        raise UsageError(f"cannot load model {name!r}: {_one_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the loader's log, warnings and bar of loaded weights; the bar of a download stays."""
    from transformers.utils import logging as of_transformers

    bar, disabled = of_transformers.is_progress_bar_enabled(), logging.root.manager.disable
    of_transformers.disable_progress_bar()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if bar:
            of_transformers.enable_progress_bar()


def _position(position: int, length: int) -> int:
    if not -length <= position < length:
        raise UsageError(f"--position must lie in {-length}..{length - 1} for this prompt; got {position}")
    return position % length


def _one_line(error: Exception, width: int = 300) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, width, placeholder=" ...")


if __name__ == "__main__":
    sys.exit(main())
