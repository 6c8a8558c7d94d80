"""`tl-jets lens`: both jet lenses of a prompt."""

from __future__ import annotations

import argparse
from typing import Any

from tl_jets.cli.output import Output, header, plain
from tl_jets.cli.session import load_network, read_position, read_prompt, read_token, refusals, steps, token_record
from tl_jets.cli.terminal import lenses as terminal
from tl_jets.lenses import iterative_jet_lens, joint_jet_lens
from tl_jets.views import lens_data, lens_page


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
