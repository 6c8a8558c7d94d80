"""`tl-jets lens --prompts FILE`: where the answers of many prompts come first, and what components give to them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tl_jets.cli.lens_summary import sums_below
from tl_jets.cli.prompt_files import Prompts, prompt_text
from tl_jets.cli.report import Report, Table, header
from tl_jets.cli.session import read_layers, together
from tl_jets.cli.texts import legend
from tl_jets.core.decoder import in_unit
from tl_jets.core.intervals import FEWEST, bootstrap_intervals, median_intervals
from tl_jets.core.numerals import signed
from tl_jets.core.prompts import over_prompts
from tl_jets.core.selection import ANSWER
from tl_jets.core.tokens import visible
from tl_jets.lenses import IterativeJetLens, JointJetLens, answer_lens, joint_jet_lens
from tl_jets.lenses.answers import OTHER_ANSWER
from tl_jets.lenses.trajectories import leads_from
from tl_jets.lenses.verdicts import changing

# How many layers and components are shown.
LAYERS, COMPONENTS = 12, 8
# Options of a single prompt, with their defaults.
SINGLE = {
    "prompt": None,
    "target": None,
    "weights": None,
    "joint_order": 0,
    "objective": "centered_l2",
    "averages": False,
}


def report(options: argparse.Namespace) -> Report:
    """Both lenses over the prompts of a file."""
    many = Prompts.of(options, SINGLE)
    network, tokens = many.network, many.tokens
    shared = {"distributed": together(), "top_k": 1}
    own = {
        name: getattr(options, name) for name in ("position", "order", "incl_mid", "center_scale", "linearize", "seed")
    }
    own |= {"layers": read_layers(options.layers, network.n_layers)}
    lens = answer_lens(network, tokens, many.answers, **own, **shared)
    assert lens.target_ids is not None, "it follows the answers"
    own = {"positions": options.position, "targets": lens.target_ids[:, 0, :1].tolist()}
    own |= {"linearize": "detached", "embeddings": not options.no_embeddings}
    one = over_prompts(joint_jet_lens, network, tokens, **own, **shared)
    by_prompt = _by_prompt(lens, many.texts)
    data = header("lens", model=options.model, prompts=options.prompts, position=options.position)
    data |= {"trajectories": lens.trajectories().to_dict("records"), "components": _components(one)}
    data["by_prompt"] = by_prompt
    tables = [_layer_table(lens, options.all or bool(options.layers), many.answers is not None)]
    tables.append(_component_table(one, data["components"]))
    whole, verdict = [*tables, _prompt_table(by_prompt)], [*lens.verdict().lines, _first(lens)]
    names = legend("lens", "verdict", "rank", "leads", "effect")
    shown = whole if options.all else tables
    return Report(data, many.asked(options), shown, names, on_page=whole, picture=tables, verdict=verdict)


def _led(lens: IterativeJetLens) -> Tensor:
    """Index of the layer from which on each prompt's answer leads [order, batch]; the number of layers if none."""
    assert lens.target_ranks is not None, "it follows the answers"
    return len(lens.labels) - leads_from(lens.target_ranks[:, :, :, 0, 0] == 0).long().sum(0)


def _kept(lens: IterativeJetLens | JointJetLens) -> Tensor:
    """Which prompts count: those that are read at no attention sink."""
    return lens.valid[:, 0] if lens.sinks is None else (lens.valid & ~lens.sinks.mask)[:, 0]


def _first(lens: IterativeJetLens) -> str:
    """From where on the answer leads in most prompts, in words: the lowest order, without sinks."""
    found = _led(lens)[0, _kept(lens)].double().sort().values
    names = [*lens.labels, "nowhere"]
    low, high = median_intervals(found[None])[:, 0].tolist()
    said = "" if low != low else f" (95%: {names[int(low)]}..{names[int(high)]})"
    half, never = int(found[len(found) // 2]), int((found == len(lens.labels)).sum())
    if half == len(lens.labels):
        return f"In {never} of {len(found)} prompts the answer leads nowhere: it is not the model's."
    text = f"In more than half of {len(found)} prompts the answer leads from {names[half]} on{said}"
    return f"{text}; in {never} it leads nowhere." if never else f"{text}."


def _layer_table(lens: IterativeJetLens, every: bool, of_file: bool) -> Table:
    """A row for each of some layers: ranks of both answers, and how often the answer leads from there on."""
    rows = lens.trajectories().set_index(["target", "order", "layer"])
    ends = list(dict.fromkeys([lens.orders[0], lens.orders[-1]]))
    found_medians = [[rows.loc[(ANSWER, k, label)].rank_median for k in ends] for label in lens.labels]
    medians = torch.tensor(found_medians, device="cpu")
    shown = range(len(lens.labels)) if every else changing(medians, [[0]] * len(lens.labels), LAYERS)
    found = []
    for i in shown:
        row: dict[str, Any] = {"layer": lens.labels[i]}
        for k in ends:
            own, other = (rows.loc[(name, k, lens.labels[i])] for name in (ANSWER, OTHER_ANSWER))
            name = "detached" if lens.linearize == "detached" else f"order {k}"
            row[f"rank, {name}"] = f"{_rank(own.rank_median)} ({_rank(other.rank_median)})"
            known = own.rank_low == own.rank_low
            row[f"95%, {name}"] = f"{_rank(own.rank_low)}..{_rank(own.rank_high)}" if known else ""
            # The random vectors' best token is compared with the model's own.
            row[f"leads, {name}"] = f"{own.leads:.0%}" + ("" if of_file else f" ({own.control_leads:.0%})")
        found.append(row)
    some = "" if len(found) == len(lens.labels) else f", where it changes: {len(found)} of {len(lens.labels)} layers"
    notes = ["rank: 0 is the best, median over prompts (of another prompt's answer)"]
    notes[0] += "; leads: from there on" + ("" if of_file else " (random vectors)")
    notes += [] if len(lens.tokens) >= FEWEST else [f"95% intervals need {FEWEST} prompts"]
    said = "" if lens.sinks is None else lens.sinks.said(lens.valid)
    return Table(f"The answer's rank by layer{some}", found, notes=[*notes, *([said] if said else [])])


def _rank(rank: float) -> str:
    """A rank, 0 for the best token; from 10,000 on in thousands."""
    if rank != rank:
        return "?"
    return f"{rank:,.0f}" if rank < 9999.5 else f"{rank / 1000:.0f}k"


def _components(lens: JointJetLens) -> list[dict[str, Any]]:
    """What every component adds to the answer: mean over prompts with its 95% interval, and how often it is above zero."""
    effects = lens.effects[:, _kept(lens), 0, 0].double()
    low, high = bootstrap_intervals(effects)
    columns = {"effect": effects.mean(1), "low": low, "high": high, "raises": (effects > 0).double().mean(1)}
    frame = pd.DataFrame({"component": lens.labels} | {name: values.tolist() for name, values in columns.items()})
    return frame.to_dict("records")


def _component_table(lens: JointJetLens, rows: list[dict[str, Any]]) -> Table:
    """The components with the largest mean effects, in the order of the model, and the sum of all."""
    largest = sorted(range(len(rows)), key=lambda i: -abs(rows[i]["effect"]))[:COMPONENTS]
    found = []
    for row in (rows[i] for i in sorted(largest)):
        interval = f"{signed(row['low'])} to {signed(row['high'])}" if len(lens.tokens) >= FEWEST else ""
        cells = {"component": row["component"], "mean effect": signed(row["effect"]), "95%": interval}
        found.append(cells | {"raises it in": f"{row['raises']:.0%}"})
    effects = torch.tensor([row["effect"] for row in rows], dtype=torch.float64, device="cpu")
    sums = sums_below(effects, largest, "mean effect")
    title = f"What components add to the answer's logit{in_unit(lens.unit)}, exactly: the {len(found)} largest"
    return Table(title, found, sums, ["--all: every layer, and every prompt; --json, --html FILE"])


def _by_prompt(lens: IterativeJetLens, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Each prompt with its answer, what the model says, and the layer from which on the answer leads, by order."""
    assert lens.target_ids is not None, "it follows the answers"
    names, led = [*lens.labels, None], _led(lens)

    def token(i: Tensor) -> dict[str, Any]:
        return {"token": visible(lens.token_names[int(i)]), "id": int(i)}

    return [
        {
            "prompt": prompt,
            "answer": token(lens.target_ids[b, 0, 0]),
            "model_says": token(lens.model_top_ids[b, 0]),
            "leads_from": {str(order): names[int(led[k, b])] for k, order in enumerate(lens.orders)},
        }
        for b, prompt in enumerate(prompts)
    ]


def _prompt_table(by_prompt: list[dict[str, Any]]) -> Table:
    """A row for every prompt."""
    rows = []
    for found in by_prompt:
        row = {"prompt": prompt_text(found["prompt"]), "answer": found["answer"]["token"]}
        row["the model says"] = found["model_says"]["token"]
        rows.append(row | {f"leads from, order {k}": label or "nowhere" for k, label in found["leads_from"].items()})
    return Table("Every prompt", rows)
