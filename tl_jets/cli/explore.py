"""`tl-jets explore`: one page of a prompt, with layers, components, ranks, bi-grams, and what an ablation does."""

from __future__ import annotations

import argparse
import warnings
from typing import Any

from tl_jets.cli.report import Report
from tl_jets.cli.session import UsageError, ablated_positions, read, steps
from tl_jets.core.numerals import signed
from tl_jets.core.protocol import FINAL_STREAM
from tl_jets.flows import flow
from tl_jets.interventions.hooks import ablation_hooks
from tl_jets.views import explorer


def report(options: argparse.Namespace) -> Report:
    """The page of one prompt."""
    with steps(3) as step:
        asked = read(options, "sublayer", step)
        found = None
        if options.ablate is not None:
            hooks = ablation_hooks(asked.network, options.ablate, positions=ablated_positions(options, asked))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", r"\d+ of \d+ effects stay open", UserWarning)  # the page says so
                found = flow(asked.network, asked.trace, hooks, positions=asked.position, edges=True)
        elif options.keep_bos:
            raise UsageError("--keep-bos goes with --ablate")
        step("page")
        given = {"order": options.order, "bigrams": None if options.bigrams == "none" else options.bigrams}
        page = explorer(asked.network, asked.trace, flow=found, title=asked.prompt, name=options.model, **given)
    answer = asked.token(asked.answer)
    rows = asked.asked(options.model, answer)
    if found is not None and options.ablate is not None:
        said = f"{', '.join(options.ablate)}: {signed(found.effect)} on the centered logit of {answer['token']}"
        rows["ablation"] = said + ("" if bool(found.closed) else "; its flows are OPEN, and explain nothing")
    rows["page"] = f"{options.html}, which opens offline in a browser"
    data = asked.header(options) | page.data
    verdict, further = _verdict(page.data, asked.position, answer["token"]), _further(page.data, options)
    return Report(data, rows, (), {}, views=lambda: [page], verdict=verdict, further=further)


def _verdict(data: dict[str, Any], pos: int, answer: str) -> list[str]:
    """What the page says of the position that was asked for, in words."""
    lens, parts = data["iterative"], data["joint"]
    labels, n = lens["labels"], len(lens["labels"])
    kl, control = ([layer[0][0][pos] for layer in lens[kind]["kl"]] for kind in ("measures", "control"))
    leads = [layer[0][0][pos][0] == 0 for layer in lens["target_ranks"]]
    first = next((i for i in range(n) if all(leads[i:])), n - 1)
    own = sum(kl[i] < control[i] for i in range(n) if labels[i] != FINAL_STREAM)
    where = "at the end only" if first == n - 1 else f"from {labels[first]} on"
    pairs = zip((row[0][pos][0] for row in parts["effects"]), parts["labels"], strict=True)
    effects = sorted(pairs, key=lambda x: -abs(x[0]))
    largest = ", ".join(f"{label} {signed(effect)}" for effect, label in effects[:3])
    total = signed(sum(effect for effect, _ in effects))
    return [
        f"The answer {answer} leads {where} (order 0, the logit lens), which is nearer to the model than one random vector at "
        f"{own} of {n - (FINAL_STREAM in labels)} layers.",
        f"Components that add most to its centered logit, {total} in all: {largest}.",
    ]


def _further(data: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """What to run next."""
    effects = [abs(row[0][options.position][0]) for row in data["joint"]["effects"]]
    written = [i for i, label in enumerate(data["joint"]["labels"]) if label.endswith(("_attn_out", "_mlp_out"))]
    found = ["tl-jets lens: the verdict with eight random vectors a layer; --order 2: other orders on the page"]
    if options.ablate is None and written:
        step = data["joint"]["labels"][max(written, key=effects.__getitem__)].removesuffix("_out")
        found.insert(0, f"--ablate {step} --keep-bos: what the model does without it, through which components")
    return found
