"""What tl-jets is compared with: nested forward-mode differentiation, TransformerLens' logit lens, weights by gradient descent.

    python demos/alternatives.py [MODEL]

Without MODEL (a local Hugging Face directory, or a model's name) the embedded model is taken. Prints three tables:

1. Relative error of the coefficients of a Taylor series through `torch.nn.functional.layer_norm`, by nested `torch.func.jvp` and by
   `tj.calculus.jet`, means over 100 random points. The reference is nested `torch.func.jvp` through the norm's definition, in
   float64.
2. Logits of the logit lens by `ActivationCache.accumulated_resid` and by `tj.iterative_jet_lens(order=0)`: largest difference,
   seconds.
3. Squared distance of the joint lens to the model's logits: weights by `tj.joint_jet_lens`, and by Adam on a softmax.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.func import jvp
from torch.nn.functional import layer_norm

import tl_jets as tj
from tl_jets.lenses import IterativeJetLens
from tl_jets.pretrained import load_model

PROMPT = "The Eiffel Tower is in the city of"
DOCS = "This function is available on Unix and"
ORDERS = range(5)


def main() -> None:
    """Print the tables for the model of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a local Hugging Face directory, or a model's name")
    options = parser.parse_args()
    model = tj.load_tinydocs() if options.model is None else load_model(options.model)
    network = tj.ResidualNetwork(model)
    prompt = DOCS if options.model is None else PROMPT
    console = Console(width=100)

    errors = Table("order", "nested jvp", "tj.calculus.jet", title="1. Error through layer_norm")
    for order, (nested, ours) in zip(ORDERS, norm_errors(), strict=True):
        errors.add_row(str(order), f"{nested:.2g}", f"{ours:.2g}")
    console.print(errors)

    difference, theirs, ours = logit_lens(network, prompt)
    lens = Table("largest difference of logits", "TransformerLens", "tj, top 5 tokens kept", title="2. Logit lens")
    lens.add_row(f"{difference:.1e}", f"{theirs:.2f} s", f"{ours:.2f} s")
    console.print(lens)

    descent = Table("weights", "squared distance per logit", title="3. Joint lens, last position")
    for name, loss in joint_losses(network, prompt).items():
        descent.add_row(name, f"{loss:.4f}")
    console.print(descent)


def norm_errors(points: int = 100, d_model: int = 64) -> list[tuple[float, float]]:
    """Relative errors by order, of nested jvp through `layer_norm` and of `tj.calculus.jet`: means over points and directions."""
    draw = torch.Generator().manual_seed(0)
    gain = 0.5 + torch.rand(d_model, generator=draw, dtype=torch.float64)

    def module(x: Tensor) -> Tensor:
        return layer_norm(x, (d_model,), weight=gain, eps=1e-5)

    def definition(x: Tensor) -> Tensor:
        centered = x - x.mean()
        return gain * centered / (centered.square().mean() + 1e-5).sqrt()

    errors = torch.zeros(len(ORDERS), 2, dtype=torch.float64)
    for _ in range(points):
        center, change = torch.randn(2, d_model, generator=draw, dtype=torch.float64)
        jet = tj.calculus.jet(module, center, center + change, ORDERS[-1])
        for order, term in enumerate(jet.coefficients):
            true = coefficient(definition, center, change, order)
            for i, found in enumerate((coefficient(module, center, change, order), term)):
                errors[order, i] += (found - true).norm() / true.norm() / points
    return [(float(nested), float(ours)) for nested, ours in errors]


def coefficient(f: Callable[[Tensor], Tensor], center: Tensor, change: Tensor, order: int) -> Tensor:
    """The Taylor coefficient of t -> f(center + t change) at 0, by nested `torch.func.jvp`."""

    def derivative(g: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda t: jvp(g, (t,), (torch.ones_like(t),))[1]

    def along(t: Tensor) -> Tensor:
        return f(center + t * change)

    factorial = 1
    for k in range(1, order + 1):
        along, factorial = derivative(along), factorial * k
    return along(torch.zeros((), dtype=center.dtype)) / factorial


def logit_lens(network: tj.ResidualNetwork, prompt: str) -> tuple[float, float, float]:
    """The largest difference of the two logit lenses, and the CPU seconds of each."""
    model = network.view.model
    tokens = model.to_tokens(prompt)

    def by_transformer_lens() -> Tensor:
        _, cache = model.run_with_cache(tokens)
        return cache.accumulated_resid(layer=-1, incl_mid=False, apply_ln=True) @ model.W_U + model.b_U

    def by_jets() -> IterativeJetLens:
        return tj.iterative_jet_lens(network, tokens, order=0, measures=False, seed=None)

    with torch.no_grad():
        by_transformer_lens(), by_jets()  # what is computed once a model
        start = time.process_time()
        theirs = by_transformer_lens()
        middle = time.process_time()
        lens = by_jets()
        end = time.process_time()
    trace = network.trace(tokens)
    ours = torch.stack([lens.logits(label, order=0, trace=trace) for label in lens.labels])
    return float((ours - theirs).abs().max()), middle - start, end - middle


def joint_losses(network: tj.ResidualNetwork, prompt: str) -> dict[str, float]:
    """Squared distance per logit of the weighted sum to the model's logits at the last position, by the way to the weights."""
    model = network.view.model
    lens = tj.joint_jet_lens(network, prompt, objective="l2", positions=-1)
    trace = network.trace(prompt)
    with torch.no_grad():
        terms = torch.stack([model.ln_final(trace[label])[0, -1] @ model.W_U + model.b_U for label in lens.labels])
    terms, answer = terms.double(), trace.logits[0, -1].double()

    def loss(weights: Tensor) -> Tensor:
        return (weights @ terms - answer).square().mean()

    found = {"tj.joint_jet_lens": float(loss(lens.weights[:, 0, 0].double()))}
    found["equal"] = float(loss(torch.full((len(terms),), 1 / len(terms), dtype=torch.float64)))
    for rate, steps in ((0.01, 100), (0.1, 100), (0.1, 1000)):
        free = torch.zeros(len(terms), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([free], lr=rate)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(free.softmax(0)).backward()
            optimizer.step()
        found[f"Adam on a softmax, rate {rate}, {steps} steps"] = float(loss(free.detach().softmax(0)))
    return found


if __name__ == "__main__":
    main()
