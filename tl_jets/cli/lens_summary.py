"""The first answer of `tl-jets lens`: a verdict, the layers where something changes, and each component's contribution."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tl_jets.cli.report import Table
from tl_jets.cli.session import Read
from tl_jets.core.decoder import in_unit
from tl_jets.core.numerals import number, signed
from tl_jets.core.protocol import DECODER_STEP
from tl_jets.lenses import IterativeJetLens, JointJetLens, joint_jet_lens
from tl_jets.lenses.verdicts import changing

# Draws of the control, and how many layers, components and characters of tokens are shown.
DRAWS, LAYERS, COMPONENTS, WIDTH = 8, 12, 8, 20


def summary(lens: IterativeJetLens, asked: Read, options: argparse.Namespace) -> list[Table]:
    """The tables of the first answer, from a lens of one position with several controls."""
    given: dict[str, Any] = {"positions": [asked.position], "embeddings": not options.no_embeddings, "top_k": 1}
    given["targets"] = None if lens.target_ids is None else lens.target_ids[0, 0].tolist()
    one = joint_jet_lens(asked.network, asked.trace, linearize="detached", **given)
    layers = range(len(lens.labels)) if options.layers else _changing(lens)
    return [_layers(lens, asked, layers), _components(one, asked, _next(asked))]


def _changing(lens: IterativeJetLens) -> list[int]:
    """The layers where something changes."""
    assert lens.measures is not None, "the command asks for them"
    ends = [0, -1] if len(lens.orders) > 1 else [0]
    best = lens.top_ids[:, :, 0, 0, 0][:, ends].tolist()
    return changing(lens.measures.kl[:, :, 0, 0][:, ends], best, LAYERS)


def _layers(lens: IterativeJetLens, asked: Read, layers: Sequence[int]) -> Table:
    """A row for each of some layers: the lowest and the highest order, each with KL, controls and best tokens."""
    assert lens.measures is not None, "the command asks for them"
    assert lens.control_draws is not None, "the command asks for several"
    verdict = lens.verdict()
    own = {} if verdict.own is None else dict(zip(verdict.labels, verdict.own.tolist(), strict=True))
    controls = lens.control_draws[:, :, 0, 0].double().quantile(0.5, -1)
    ends = [0, len(lens.orders) - 1] if len(lens.orders) > 1 else [0]
    rows = []
    for i in layers:
        row: dict[str, Any] = {"layer": lens.labels[i]}
        if lens.orders[-1]:
            row["rho"] = number(lens.rho[i, 0, 0])
        for k in ends:
            name = "detached" if lens.linearize == "detached" else f"order {lens.orders[k]}"
            at = (i, k, 0, 0)
            mark = "*" if own.get(lens.labels[i], [False] * (k + 1))[k] else ""
            row[f"KL, {name}"] = f"{number(lens.measures.kl[at])} ({number(controls[i, k])}){mark}"
            row["best" if k == 0 else f"best, {name}"] = _tokens(asked, lens.top_ids[at], bool(lens.borrowed[at]))
        rows.append(row)
    some = "" if len(rows) == len(lens.labels) else f", where something changes: {len(rows)} of {len(lens.labels)}"
    title = f"What each layer says{some}"
    borrowed = "" if lens.orders[-1] == 0 else "; [square]: a borrowed answer"
    note = f"(round): median KL of {lens.control_draws.shape[-1]} random vectors; *: below nine in ten{borrowed}"
    return Table(title, rows, notes=[note])


def _components(lens: JointJetLens, asked: Read, notes: list[str]) -> Table:
    """The largest exact contributions of components to the answer or the target, and the sum of all."""
    effects = lens.effects[:, 0, 0, 0]
    target = asked.token(int(lens.target_ids[0, 0, 0]))["token"]
    largest = sorted(effects.abs().argsort(descending=True, stable=True)[:COMPONENTS].tolist())
    labels = [lens.labels[i] for i in largest]
    found = lens.contributions(2, places=[0], labels=labels).indices[:, 0]
    rows: list[dict[str, Any]] = []
    for i, label, ids in zip(largest, labels, found, strict=True):
        best = "" if label == f"{DECODER_STEP}_bias" else _tokens(asked, ids, False)
        rows.append({"component": label, "effect": signed(effects[i]), "its own best tokens": best})
    of = f"the centered logit of {target}{in_unit(lens.unit)}"
    title = f"What components add to {of}, exactly: the {len(rows)} largest"
    return Table(title, rows, sums_below(effects, largest, "effect"), notes)


def sums_below(effects: Tensor, shown: list[int], name: str) -> list[dict[str, str]]:
    """The rows below the components that are shown: the sum of the others, if there are any, and that of all."""
    total, rest = effects.sum(), len(effects) - len(shown)
    others = [{"component": f"{rest} others", name: signed(total - effects[shown].sum())}] if rest else []
    return [*others, {"component": f"all {len(effects)}", name: signed(total)}]


def _next(asked: Read) -> list[str]:
    """What to run next."""
    n = sum(label.endswith("_pre") for label in asked.network.streams)
    return [
        "--all: every layer and order, the joint lens, and what --averages and --explain give alone",
        f"--layers {max(n - 6, 0)}:{n}: some layers; --order 2; --target TOKEN; --granularity head; --json, --html FILE",
        "tl-jets paths --ablate: what is given through later components, and what ablation says of it",
    ]


def _tokens(asked: Read, ids: Tensor, borrowed: bool) -> str:
    """Best tokens in a bounded width, the first in brackets if borrowed."""
    first, *others = [asked.token(token)["token"] for token in ids.tolist()]
    shown = " ".join([f"[{first}]" if borrowed else first, *others])
    return shown if len(shown) <= WIDTH else f"{shown[: WIDTH - 1]}\u2026"
