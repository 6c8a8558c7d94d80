"""The parser of the command line: all options of the six commands, without loading PyTorch."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NoReturn

from tl_jets.cli.texts import DESCRIPTION, EPILOG, TOKEN_HELP, description, epilog

EMBEDDED = "tinydocs"
EMBEDDED_PROMPT = "If the file does not exist, an error is"

# Copies of the library's choices and limits, so that parsing loads no PyTorch; a test compares them.
GRANULARITIES = ("block", "sublayer", "head")
CENTER_SCALES = ("none", "match", "orthogonal")
OBJECTIVES = ("l2", "centered_l2", "kl")
PER = ("global", "row")
SCORES = ("logprob", "logit", "centered", "lift")
NORMALIZES = ("vocab", "pair", "none")
LOGITS = "logits"
MODES = ("zero", "mean", "resample")
FLOW_MEASURES = ("centered", "kl")
MAX_ORDER = 1000
MAX_PATHS = 4096
# How many largest paths are found without --top, and how many of them, and of components, the terminal shows.
MOST_PATHS, SHOWN_PATHS = 20, 8
# Maximum number of n-grams per table; the functions allow more.
MOST = 1_000_000
# The largest seed of torch.
MAX_SEED = 2**64 - 1


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


Options = dict[str, Any]
ORDER: Options = {"type": at_least(0, at_most=MAX_ORDER), "metavar": "K"}
COUNT: Options = {"type": at_least(1), "metavar": "N"}
NUMBER: Options = {"type": at_least(0), "metavar": "N"}
SEED: Options = {"type": at_least(0, at_most=MAX_SEED), "default": 0, "metavar": "N"}
FLAG: Options = {"action": "store_true"}
FILE: Options = {"metavar": "FILE"}
TOKEN: Options = {"metavar": "TOKEN"}
LABELS: Options = {"action": "append", "metavar": "LABEL"}
COMPONENTS: Options = {"nargs": "+", "metavar": "COMPONENT"}
GRANULARITY: Options = {"choices": GRANULARITIES, "default": "sublayer"}
CENTER_SCALE: Options = {"choices": CENTER_SCALES, "default": "none"}
EXPLAINED = f"the token whose logit is explained, {TOKEN_HELP} (default: the model's answer)"
KEEP_BOS = "leave the first position, on which attention rests, as it is"
PROMPTS = (
    'read many prompts, not one: a line each, or in a file .jsonl {"prompt": ..., "answer": TOKEN}; without answers '
    "they are the model's own; processes that torchrun started divide them"
)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = Parser(prog="tl-jets", description=DESCRIPTION, epilog=EPILOG, formatter_class=Help, allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"tl-jets {version('tl-jets')}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", help=argparse.SUPPRESS)
    options = {"lens": _lens, "paths": _paths, "flow": _flow, "ngrams": _ngrams, "jacobian": _jacobian}
    options |= {"explore": _explore}
    for name, add_options in options.items():
        command = commands.add_parser(
            name, description=description(name), epilog=epilog(name), formatter_class=Help, allow_abbrev=False
        )
        _add_input(command, prompt=name != "ngrams")
        add_options(command.add_argument)
        command.add_argument("--html", **FILE, help="also write one page that opens offline in a browser")
        command.add_argument(
            "--json",
            **FILE,
            help="also write all numbers, tokens with their spaces shown (\u00b7); what is no number is null",
        )
        if name == "explore":
            command.set_defaults(html="explore.html")
        command.add_argument("--explain", **FLAG, help="also say what the numbers mean")
        command.add_argument("--traceback", **FLAG, help="show where an unexpected error came from")
    return top


def _add_input(parser: argparse.ArgumentParser, *, prompt: bool) -> None:
    """Add the options of the model and its prompt."""
    parser.add_argument(
        "--model",
        default=EMBEDDED,
        metavar="PATH_OR_NAME",
        help=f"a local Hugging Face directory, a model's name, or {EMBEDDED!r}, the embedded",
    )
    if not prompt:
        return
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help=f"the text to read; without one, {EMBEDDED!r} reads {EMBEDDED_PROMPT!r}. One that begins with a dash is "
        "given as --prompt=TEXT",
    )
    parser.add_argument(
        "--prepend-bos",
        action=argparse.BooleanOptionalAction,
        help="whether the prompt begins with the beginning-of-sequence token (default: as the model does)",
    )
    parser.add_argument("--position", type=int, default=-1, metavar="N", help="the position to read; -1 is the last")


def _lens(add: Callable[..., Any]) -> None:
    add("--prompts", **FILE, help=PROMPTS)
    add("--order", **ORDER, help="highest order of the iterative lens (default: 1; detached 0)")
    add("--joint-order", **ORDER, default=0, help="order of the joint lens")
    add(
        "--linearize",
        choices=("jet", "detached"),
        default="jet",
        help="jet: the paper's lenses; detached: the final norm keeps its scale, direct logit attribution",
    )
    add("--center-scale", **CENTER_SCALE, help="length of the centers")
    add("--incl-mid", **FLAG, help="also read the streams between attention and MLP")
    add(
        "--layers",
        action="append",
        metavar="LAYER",
        help="read this stream only (3, -1, 3_pre, 3_mid), or a range of layers (20:30, without 30); repeat it for more",
    )
    add("--granularity", **GRANULARITY, help="components of the joint lens")
    add("--no-embeddings", **FLAG, help="leave the embeddings out of the components")
    add("--weights", choices=("optimal", "uniform"), help="of the components (default: optimal; detached 1)")
    add("--objective", choices=OBJECTIVES, default="centered_l2", help="what the joint weights minimize")
    add(
        "--target",
        action="append",
        **TOKEN,
        help=f"a token to follow through the layers and components, {TOKEN_HELP}; repeat it for more",
    )
    add("--top-k", **COUNT, default=3, help="best tokens a row")
    add("--seed", **SEED, help="of the random controls")
    add("--all", **FLAG, help="show every layer and order, the joint lens, averages, and what they mean")
    add("--averages", **FLAG, help="also show averages over the prompt's positions, without sinks")
    add("--svg", **FILE, help="also write the two lenses as a picture")


def _paths(add: Callable[..., Any]) -> None:
    add("--prompts", **FILE, help=PROMPTS)
    add("--target", **TOKEN, help=EXPLAINED)
    add(
        "--top",
        **COUNT,
        help=f"how many paths, and components (default: {MOST_PATHS}; of one prompt the terminal shows {SHOWN_PATHS})",
    )
    add(
        "--rank",
        choices=("effect", "length"),
        default="effect",
        help="what is large: the effect on the target, or the length of a path's logits",
    )
    add("--granularity", **GRANULARITY, help="what a step of a path is")
    add("--ablate", **FLAG, help="also ablate each path alone, and as many random ones")
    add("--no-components", **FLAG, help="leave out the sums through each component")
    add("--through", **LABELS, help="keep paths through this")
    add("--avoiding", **LABELS, help="keep paths that do not pass through this")
    add("--sources", **LABELS, help="keep paths that start here")
    add("--max-length", **NUMBER, help="keep paths with at most N steps before the final norm")
    add("--max-paths", **COUNT, default=MAX_PATHS, help="evaluate at most so many")
    add(
        "--linearize",
        choices=("detached", "jet"),
        default="detached",
        help="detached: exact paths; jet: the paper's, which carry the model's answer into most paths",
    )
    add("--order", **ORDER, default=1, help="of the jets of --linearize jet")
    add("--center-scale", **CENTER_SCALE, help="length of the jets' centers")
    add("--renormalize", **FLAG, help="spread the weights of jets over the paths that are kept")
    add("--seed", **SEED, help="of the random paths")


def _flow(add: Callable[..., Any]) -> None:
    add("--ablate", **COMPONENTS, help="ablate these (8_mlp, 3_attn, 3_block, L17H3, L2N17)")
    add("--corrupted", metavar="TEXT", help="run this prompt instead, of as many tokens")
    add("--joint", **COMPONENTS, help="ablate these, and divide the effect over themselves (joint flow)")
    add("--keep-bos", **FLAG, help=KEEP_BOS)
    add("--mode", choices=MODES, default="zero", help="what ablated writes become; mean and resample need --reference")
    add("--reference", **FILE, help="prompts of the mean, or to resample from, a line each")
    add("--target", **TOKEN, help=EXPLAINED)
    add("--against", **TOKEN, help="explain the difference of the target's logit and this token's")
    add(
        "--measure",
        choices=FLOW_MEASURES,
        default="centered",
        help="centered: logits less the vocabulary's mean; kl: KL(clean || intervened) in nats",
    )
    add("--granularity", **GRANULARITY, help="the components that carry flow")
    add("--nodes", **COUNT, help="gradients of every stage (default: as many as the gap needs)")
    add("--check", **NUMBER, default=0, help="path patch the N components of the largest flow, and N random ones")
    add("--controls", **NUMBER, help="random sets beside --joint (default: 6)")
    add("--top", **COUNT, default=12, help="how many components")
    add("--seed", **SEED, help="of random components, sets and --mode resample")


def _explore(add: Callable[..., Any]) -> None:
    add("--order", **ORDER, default=1, help="highest order of the lens; the page chooses between 0 and this one")
    add(
        "--bigrams",
        default="auto",
        metavar="PATH",
        help="path of each token's bi-grams, as in `ngrams`; auto is mlps, where the model has them; none for none",
    )
    add("--ablate", **COMPONENTS, help="also show what the ablation of these does (8_mlp, L17H3)")
    add("--keep-bos", **FLAG, help=KEEP_BOS)


def _ngrams(add: Callable[..., Any]) -> None:
    add(
        "--path",
        action="append",
        metavar="PATH",
        help="a path of bi-grams, see above; repeat it for more; all: direct, mlps, and each MLP (default: all of a small "
        "model; of a deep or large one mlps, with direct after single tokens)",
    )
    add("--per", choices=PER, help="best of all (global), or of each first token (row) (default: global)")
    add(
        "--score",
        choices=SCORES,
        help="of bi-grams: log-probability, logit, or centered; lift: over the path's mean (default: logprob)",
    )
    add(
        "--keep-all",
        **FLAG,
        help="of bi-grams, where embeddings are tied: keep each token after itself, and tokens never trained",
    )
    add("--trigrams", type=at_least(0), metavar="LAYER", help="skip-trigrams of this layer's heads, not bi-grams")
    add("--head", action="append", type=at_least(0), metavar="H", help="a head; repeat it for more (default: all)")
    add("--distance", **NUMBER, help="places from key to query (default: 1)")
    add(
        "--normalize",
        choices=NORMALIZES,
        help="of attention: over the vocabulary as keys, over key and query alone, or raw scores (default: vocab)",
    )
    add(
        "--token",
        action="append",
        **TOKEN,
        help=f"only n-grams whose first token (of skip-trigrams: the key) is this, {TOKEN_HELP}; repeat it for more",
    )
    add(
        "--top-k",
        type=at_least(1, at_most=MOST),
        default=20,
        metavar="N",
        help="how many n-grams a table, or a row of it",
    )
    add("--scores", **FLAG, help="show scores beside tables that stand side by side, too")
    add(
        "--save",
        metavar="FILE|DIR/",
        help="also save the tables as Parquet (NgramTable.load reads them); the names of several tables get their path: "
        "FILE.parquet becomes FILE.mlps.parquet; DIR/ keeps each as DIR/mlps.parquet when it is finished, and the same command "
        "goes on from there after it was stopped",
    )


def _jacobian(add: Callable[..., Any]) -> None:
    add("--target", **TOKEN, help=EXPLAINED)
    add(
        "--output",
        default=LOGITS,
        metavar="LABEL",
        help="what is mapped to: logits, ln_final, a stream (final_post, 3_pre) or a write (3_mlp_out, L3H2_out)",
    )
    add("--wrt", default="embed", metavar="LABEL", help="what it is a map of: embed, pos_embed, or a stream (3_mid)")
    add("--svd", **NUMBER, default=4, help="how many singular values, with their directions; 0 for none")
    add("--top-k", **COUNT, default=3, help="tokens by which a direction is described")
    add("--seed", **SEED, help="of the search for singular values")
    add("--all", **FLAG, help="show every token of a long prompt")
