"""`tl-jets lens`: both jet lenses of a prompt."""

from __future__ import annotations

import argparse
from typing import Any

from tl_jets.calculus import CENTER_SCALES
from tl_jets.calculus.norms import MAX_ORDER
from tl_jets.cli.arguments import (
    FILES_HELP,
    TOKEN_HELP,
    add_command,
    add_files,
    add_granularity,
    add_model,
    add_seed,
    add_target,
    at_least,
)
from tl_jets.cli.output import Output, header, plain
from tl_jets.cli.session import load_network, read_position, read_prompt, read_token, refusals, steps, token_record
from tl_jets.cli.terminal import lenses as terminal
from tl_jets.jets.expand import OBJECTIVES
from tl_jets.lenses import iterative_jet_lens, joint_jet_lens
from tl_jets.views import lens_data, lens_page

DESCRIPTION = """\
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
EPILOG = f"""\
{FILES_HELP}

examples:
  tl-jets lens
  tl-jets lens --model ./my-model --prompt "The Eiffel Tower is in" --order 2
  tl-jets lens --linearize detached --granularity head   # direct attribution
  tl-jets lens --target " reported" --json - | jq .iterative.labels
"""


def add_to(commands: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(
        commands,
        "lens",
        run,
        summary="the iterative and the joint jet lens of a prompt",
        description=DESCRIPTION,
        epilog=EPILOG,
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


def run(options: argparse.Namespace) -> None:
    """Print both lenses of one prompt."""
    prompt, output = read_prompt(options.model, options.prompt), Output.of(options)
    shared: dict[str, Any] = {
        "center_scale": options.center_scale,
        "linearize": options.linearize,
        "top_k": options.top_k,
        "seed": options.seed,
    }
    with steps(4) as step, refusals():
        step("loading TransformerLens and the model")
        network = load_network(options.model, options.granularity)
        step("forward pass")
        trace = network.trace(prompt)
        position = read_position(options.position, trace.tokens.shape[1])
        layers = [int(label) if label.lstrip("-").isdecimal() else label for label in options.layers or []] or None
        targets = [read_token(network, target) for target in options.target or []] or None
        shared["targets"] = targets
        step("iterative jet lens")
        iterative = iterative_jet_lens(
            network,
            trace,
            order=options.order,
            layers=layers,
            incl_mid=options.incl_mid,
            **shared,
        )
        step("joint jet lens")
        joint = joint_jet_lens(
            network,
            trace,
            order=options.joint_order,
            embeddings=not options.no_embeddings,
            weights=options.weights,
            objective=options.objective,
            **shared,
        )
    data = header("lens") | lens_data(iterative, joint, model=options.model, prompt=prompt)
    if targets is not None:
        data["iterative"] |= {
            "targets": [token_record(network.tokenizer, target) for target in targets],
            "target_ranks": iterative.target_ranks,
            "target_logits": iterative.target_logits,
        }
    if "html" in output:
        output.write("html", lens_page(plain(data) | {"shown": position}))
    output.write_json(data)
    lenses = [
        terminal.heading(iterative, position, options.model, prompt),
        terminal.iterative_table(iterative, position, width=output.console.width),
        terminal.joint_table(joint, position),
    ]
    if "svg" in output:
        output.write("svg", terminal.picture(*lenses))
    if targets is not None:
        lenses.insert(2, terminal.target_table(iterative, position))
    output.print(*lenses, terminal.average_table(iterative, joint), terminal.legend(iterative))
