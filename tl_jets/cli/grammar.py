"""The parser of the command line: all options of the four commands, without loading PyTorch."""

from __future__ import annotations

import argparse
from importlib.metadata import version
from typing import Any

from tl_jets.cli.arguments import (
    CENTER_SCALES,
    FILES_HELP,
    LOGITS,
    MAX_ORDER,
    MAX_PATHS,
    MOST,
    NORMALIZES,
    OBJECTIVES,
    PER,
    SCORES,
    TOKEN_HELP,
    Help,
    Parser,
    add_command,
    add_files,
    add_granularity,
    add_model,
    add_seed,
    add_target,
    at_least,
)

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

LENS_DESCRIPTION = """\
What every layer's stream says about the next token (the iterative lens, a
layer a row, an order a column), and the prediction as a weighted sum of
components (the joint lens). Order 0 is the logit lens; order k is the final
norm's Taylor polynomial of degree k, taken at the model's final stream.

what the numbers mean:
  KL 0.20 (0.18)   KL(model || lens) in nats, and in round brackets its
                   control: a random vector of the layer's length and angle.
                   A KL no better than its control says nothing of the layer.
  [token]          a borrowed answer: it comes from the model's own final
                   stream, of which every order above 0 has a part.
  rho              below 1 the series converges.
"""

LENS_EPILOG = f"""\
{FILES_HELP}

examples:
  tl-jets lens
  tl-jets lens --model ./my-model --prompt "The Eiffel Tower is in" --order 2
  tl-jets lens --linearize detached --granularity head   # direct attribution
  tl-jets lens --target " reported" --json - | jq .iterative.labels
"""


def _add_lens(commands: Any) -> None:
    """Add `tl-jets lens`."""
    parser = add_command(
        commands,
        "lens",
        summary="the iterative and the joint jet lens of a prompt",
        description=LENS_DESCRIPTION,
        epilog=LENS_EPILOG,
    )
    add_model(parser)
    add = parser.add_argument
    add(
        "--order",
        type=at_least(0, at_most=MAX_ORDER),
        metavar="K",
        help="highest order of the iterative lens (default: 1; detached 0)",
    )
    add("--joint-order", type=at_least(0, at_most=MAX_ORDER), default=0, metavar="K", help="order of the joint lens")
    add(
        "--linearize",
        choices=("jet", "detached"),
        default="jet",
        help="jet: the paper's lenses; detached: the final norm keeps its scale, direct logit attribution",
    )
    add("--center-scale", choices=CENTER_SCALES, default="none", help="length of the centers")
    add("--incl-mid", action="store_true", help="also read the streams between attention and MLP")
    add(
        "--layers",
        action="append",
        metavar="LAYER",
        help="read this stream only (3, -1, 3_pre, 3_mid); repeat it for more",
    )
    add_granularity(parser, "components of the joint lens")
    add("--no-embeddings", action="store_true", help="leave the embeddings out of the components")
    add("--weights", choices=("optimal", "uniform"), help="of the components (default: optimal; detached 1)")
    add("--objective", choices=OBJECTIVES, default="centered_l2", help="what the joint weights minimize")
    add_target(parser, f"a token to follow through the layers and components, {TOKEN_HELP}; repeat it for more",
               action="append")  # fmt: skip
    add("--top-k", type=at_least(1), default=3, metavar="N", help="best tokens a cell")
    add_seed(parser, "of the random controls")
    add_files(parser, "one page that opens offline in a browser", svg=True)


PATHS_DESCRIPTION = """\
A transformer whose norm scales, attention patterns and gates are frozen at
one prompt is, exactly, the sum of its paths from input to output. This prints
the largest of them, and the sums of all paths through each component, by what
they give to the answer's logit.

what the numbers mean:
  effect      what the path adds to the answer's logit beyond the mean of the
              vocabulary, while everything else stays frozen; all effects sum
              to the answer's own
  ablation    how far that logit falls if what arrives along this path is
              taken away and the model responds (--ablate)
  verdict     confirmed: the fall is within a factor of two of the effect;
              refuted: below a tenth of it, or of the other sign; else partly

The controls: an effect is a fact about the frozen network; whether the model
would miss the path only an ablation can say, and random paths beside it say
how often that happens by chance.
"""

PATHS_EPILOG = f"""\
{FILES_HELP}

examples:
  tl-jets paths
  tl-jets paths --prompt "This function is available on Unix and" --ablate
  tl-jets paths --granularity head --through L1H2 --top 10
  tl-jets paths --target " raised" --linearize jet --order 0

--through and --avoiding take steps (3_mlp, L3H2), sources (embed, 3_mlp_bias)
or kinds (attn, mlp, head, block, bias), --sources sources or the kind bias;
repeat them for more.
More than --max-paths detached paths are searched by a beam (greedy: large
paths may be missed; the effects shown are exact all the same).
"""


def _add_paths(commands: Any) -> None:
    """Add `tl-jets paths`."""
    parser = add_command(
        commands,
        "paths",
        summary="the largest paths of a prediction, and what ablation says of them",
        description=PATHS_DESCRIPTION,
        epilog=PATHS_EPILOG,
    )
    add_model(parser)
    add = parser.add_argument
    add_target(parser, f"the token whose logit is explained, {TOKEN_HELP} (default: the model's answer)")
    add("--top", type=at_least(1), default=20, metavar="N", help="how many paths, and components")
    add(
        "--rank",
        choices=("effect", "length"),
        default="effect",
        help="what is large: the effect on the target, or the length of a path's logits",
    )
    add_granularity(parser, "what a step of a path is")
    add("--ablate", action="store_true", help="also ablate each path alone, and as many random ones")
    add("--no-components", action="store_true", help="leave out the sums through each component")
    add("--through", action="append", metavar="LABEL", help="keep paths through this")
    add("--avoiding", action="append", metavar="LABEL", help="keep paths that do not pass through this")
    add("--sources", action="append", metavar="LABEL", help="keep paths that start here")
    add("--max-writes", type=at_least(0), metavar="N", help="keep paths with at most N steps before the final norm")
    add("--max-paths", type=at_least(1), default=MAX_PATHS, metavar="N", help="evaluate at most so many")
    add(
        "--linearize",
        choices=("detached", "jet"),
        default="detached",
        help="detached: exact paths; jet: the paper's, which carry the model's answer into most paths",
    )
    add("--order", type=at_least(0, at_most=MAX_ORDER), default=1, metavar="K", help="of the jets of --linearize jet")
    add("--center-scale", choices=CENTER_SCALES, default="none", help="length of the jets' centers")
    add("--renormalize", action="store_true", help="spread the weights of jets over the paths that are kept")
    add_seed(parser, "of the random paths")
    add_files(parser, "one page that opens offline in a browser")


NGRAMS_DESCRIPTION = """\
A path that mixes no positions is a function of one token. Evaluated on the
whole vocabulary it is a table of bi-grams: exact, from the weights alone. A
head gives skip-trigrams: how much a query token looks at a key token, and what
the head then writes of the key.

paths (--path):
  direct            the embedding, decoded at once
  mlps              all MLPs, without attention
  3_mlp             one MLP alone, of the embedding
  1_mlp > 3_mlp     one MLP of another's output

what the numbers mean:
  score      log-probability, in nats: of the second token after the first;
             of skip-trigrams log attention + log-probability of the output
  The controls are in Python: whether a text has these n-grams
  (tl_jets.studies.compare_with_counts), and whether the model says less of
  them without the component (tl_jets.studies.ablation_check).
"""

NGRAMS_EPILOG = f"""\
{FILES_HELP}

examples:
  tl-jets ngrams
  tl-jets ngrams --path mlps --top-k 1000 --save mlps.parquet
  tl-jets ngrams --token " Victor"
  tl-jets ngrams --trigrams 1 --head 0 --head 2
  tl-jets ngrams --trigrams 1 --top-k 1000 --save heads/

cost: about V^2 d_model multiply-adds a path (GPT-2 small: a quarter of a minute
on two cores), a fraction of that a head.
"""


def _add_ngrams(commands: Any) -> None:
    """Add `tl-jets ngrams`."""
    parser = add_command(
        commands,
        "ngrams",
        summary="bi-grams and skip-trigrams of the weights, without a corpus",
        description=NGRAMS_DESCRIPTION,
        epilog=NGRAMS_EPILOG,
    )
    add_model(parser, prompt=False)
    add = parser.add_argument
    add(
        "--path",
        action="append",
        metavar="PATH",
        help="a path of bi-grams, see above; repeat it for more (default: direct, mlps, and each MLP)",
    )
    add("--per", choices=PER, help="best of all (global), or of each first token (row) (default: global)")
    add("--score", choices=SCORES, help="of bi-grams: log-probability in nats, or the logit (default: logprob)")
    add("--trigrams", type=at_least(0), metavar="LAYER", help="skip-trigrams of this layer's heads, not bi-grams")
    add("--head", action="append", type=at_least(0), metavar="H", help="a head; repeat it for more (default: all)")
    add("--distance", type=at_least(0), metavar="N", help="places from key to query (default: 1)")
    add(
        "--normalize",
        choices=NORMALIZES,
        help="of attention: over the vocabulary as keys, over key and query alone, or raw scores (default: vocab)",
    )
    add(
        "--token",
        action="append",
        metavar="TOKEN",
        help=f"only n-grams whose first token (of skip-trigrams: the key) is this, {TOKEN_HELP}; repeat it for more",
    )
    add(
        "--top-k",
        type=at_least(1, at_most=MOST),
        default=20,
        metavar="N",
        help="how many n-grams a table, or a row of it",
    )
    add("--scores", action="store_true", help="show scores beside tables that stand side by side, too")
    add(
        "--save",
        metavar="FILE|DIR/",
        help="also save the tables as Parquet (NgramTable.load reads them); the names of several tables get their path: "
        "FILE.parquet becomes FILE.mlps.parquet; DIR/ keeps each as DIR/mlps.parquet when it is finished, and the same command "
        "goes on from there after it was stopped",
    )
    add_files(parser, "one page that opens offline in a browser")


JACOBIAN_DESCRIPTION = """\
Freeze every norm scale, attention pattern and gate at one prompt, and the
model is a linear map J of its token embeddings, plus a bias, with the same
output. This prints what each token gives through J, and the directions that J
passes on most.

what the numbers mean:
  reconstruction error   what J e + bias misses of the model's own output,
                         relative; rounding only. The control beside it is the
                         ordinary Jacobian, which is no equivalent of the model
  effect                 what a token gives to the answer's logit beyond the
                         mean of the vocabulary; effects and bias sum to it
  share                  of the output: its projection on it; shares sum to 1
  norm                   length of what the token gives; parts may cancel
"""

JACOBIAN_EPILOG = f"""\
{FILES_HELP}

examples:
  tl-jets jacobian
  tl-jets jacobian --prompt "The file is opened in" --svd 6
  tl-jets jacobian --output 2_pre                # map to the stream before layer 2
  tl-jets jacobian --wrt 3_mid --output 3_mlp_out --svd 4      # one MLP

What the model does elsewhere J does not tell: it is exact at this prompt only.
"""


def _add_jacobian(commands: Any) -> None:
    """Add `tl-jets jacobian`."""
    parser = add_command(
        commands,
        "jacobian",
        summary="the model as an exact linear map at one prompt",
        description=JACOBIAN_DESCRIPTION,
        epilog=JACOBIAN_EPILOG,
    )
    add_model(parser)
    add = parser.add_argument
    add_target(parser, f"the token whose logit is explained, {TOKEN_HELP} (default: the model's answer)")
    add(
        "--output",
        default=LOGITS,
        metavar="LABEL",
        help="what is mapped to: logits, ln_final, a stream (final_post, 3_pre) or a write (3_mlp_out, L3H2_out)",
    )
    add("--wrt", default="embed", metavar="LABEL", help="what it is a map of: embed, pos_embed, or a stream (3_mid)")
    add(
        "--svd",
        type=at_least(0),
        default=4,
        metavar="K",
        help="how many singular values, with their directions; 0 for none",
    )
    add("--top-k", type=at_least(1), default=3, metavar="N", help="tokens by which a direction is described")
    add_seed(parser, "of the search for singular values")
    add_files(parser, "one page that opens offline in a browser")


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = Parser(prog="tl-jets", description=DESCRIPTION, epilog=EPILOG, formatter_class=Help, allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"tl-jets {version('tl-jets')}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", help=argparse.SUPPRESS)
    for add in (_add_lens, _add_paths, _add_ngrams, _add_jacobian):
        add(commands)
    return top
