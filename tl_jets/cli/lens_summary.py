"""The first answer of `tl-jets lens`: a verdict, the layers where something changes, and each component's contribution."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from tl_jets.cli.report import Table
from tl_jets.cli.session import Read
from tl_jets.core.decoder import in_unit
from tl_jets.core.numerals import number, signed
from tl_jets.core.protocol import DECODER_STEP
from tl_jets.lenses import IterativeJetLens, JointJetLens, iterative_jet_lens, joint_jet_lens
from tl_jets.lenses.verdicts import changing

# Draws of the control, and how many layers, components and characters of tokens are shown.
DRAWS, LAYERS, COMPONENTS, WIDTH = 8, 12, 8, 20


def summary(
    lens: IterativeJetLens, place: int, asked: Read, options: argparse.Namespace, draws: Sequence[torch.Tensor]
) -> list[Table]:
    """The tables of the first answer; `place` is the index of the position in the lens."""
    one = joint_jet_lens(
        asked.network,
        asked.trace,
        linearize="detached",
        positions=[asked.position],
        embeddings=not options.no_embeddings,
        targets=None if lens.target_ids is None else lens.target_ids[0, place].tolist(),
        top_k=1,
    )
    layers = range(len(lens.labels)) if options.layers else _changing(lens, place)
    return [_layers(lens, place, asked, layers, draws), _components(one, asked, _next(asked))]


def more_draws(lens: IterativeJetLens, asked: Read, seed: int, **options: Any) -> list[torch.Tensor]:
    """KL of further random controls at the position that was asked for: [layer, order, batch, 1]."""
    options |= {"positions": [asked.position], "layers": lens.labels, "order": lens.orders[-1], "top_k": 1}
    drawn = (iterative_jet_lens(asked.network, asked.trace, seed=seed + i, **options).control for i in range(1, DRAWS))
    return [control.kl for control in drawn if control is not None]


def spoken(lens: IterativeJetLens, place: int, draws: Sequence[torch.Tensor]) -> list[str]:
    """The verdict on one position, in words."""
    return lens.verdict(place=place, controls=[draw.expand_as(lens.kl) for draw in draws]).lines


def _changing(lens: IterativeJetLens, place: int) -> list[int]:
    """The layers where something changes at a position."""
    assert lens.measures is not None, "the command asks for them"
    ends = [0, -1] if len(lens.orders) > 1 else [0]
    best = lens.top_ids[:, :, 0, place, 0][:, ends].tolist()
    return changing(lens.measures.kl[:, :, 0, place][:, ends], best, LAYERS)


def _layers(
    lens: IterativeJetLens, place: int, asked: Read, layers: Sequence[int], draws: Sequence[torch.Tensor]
) -> Table:
    """A row for each of some layers: the lowest and the highest order, each with KL, controls and best tokens."""
    assert lens.measures is not None, "the command asks for them"
    assert lens.control is not None, "the command gives a seed"
    verdict = lens.verdict(place=place, controls=[draw.expand_as(lens.kl) for draw in draws])
    own = {} if verdict.own is None else dict(zip(verdict.labels, verdict.own.tolist(), strict=True))
    controls = torch.stack([lens.control.kl[:, :, 0, place], *(draw[:, :, 0, 0] for draw in draws)]).double()
    controls = controls.quantile(0.5, 0)
    ends = [0, len(lens.orders) - 1] if len(lens.orders) > 1 else [0]
    rows = []
    for i in layers:
        row: dict[str, Any] = {"layer": lens.labels[i]}
        if lens.orders[-1]:
            row["rho"] = number(lens.rho[i, 0, place])
        for k in ends:
            name = "detached" if lens.linearize == "detached" else f"order {lens.orders[k]}"
            at = (i, k, 0, place)
            mark = "*" if own.get(lens.labels[i], [False] * (k + 1))[k] else ""
            row[f"KL, {name}"] = f"{number(lens.measures.kl[at])} ({number(controls[i, k])}){mark}"
            row["best" if k == 0 else f"best, {name}"] = _tokens(asked, lens.top_ids[at], bool(lens.borrowed[at]))
        rows.append(row)
    some = "" if len(rows) == len(lens.labels) else f", where something changes: {len(rows)} of {len(lens.labels)}"
    title = f"What each layer says{some}"
    borrowed = "" if lens.orders[-1] == 0 else "; [square]: a borrowed answer"
    note = f"(round): median KL of {1 + len(draws)} random vectors; *: below nine in ten{borrowed}"
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
    rest = len(effects) - len(largest)
    sums: list[dict[str, Any]] = [{"component": f"all {len(effects)}", "effect": signed(effects.sum())}]
    if rest:
        others = effects.sum() - effects[largest].sum()
        sums.insert(0, {"component": f"{rest} others", "effect": signed(others)})
    title = (
        f"What components add to the centered logit of {target}{in_unit(lens.unit)}, exactly: the {len(rows)} largest"
    )
    return Table(title, rows, sums, notes)


def _next(asked: Read) -> list[str]:
    """What to run next."""
    n = sum(label.endswith("_pre") for label in asked.network.streams)
    return [
        "--all: every layer and order, the joint lens, and what --averages and --explain give alone",
        f"--layers {max(n - 6, 0)}:{n}: some layers; --order 2; --target TOKEN; --granularity head; --json, --html FILE",
        "tl-jets paths --ablate: what is given through later components, and what ablation says of it",
    ]


def _tokens(asked: Read, ids: torch.Tensor, borrowed: bool) -> str:
    """Best tokens in a bounded width, the first in brackets if borrowed."""
    first, *others = [asked.token(token)["token"] for token in ids.tolist()]
    shown = " ".join([f"[{first}]" if borrowed else first, *others])
    return shown if len(shown) <= WIDTH else f"{shown[: WIDTH - 1]}\u2026"
