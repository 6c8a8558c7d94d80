"""`tl-jets lens`: both jet lenses of a prompt; `lens_summary` is what is shown first."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from tl_jets.cli import lens_prompts
from tl_jets.cli.lens_summary import DRAWS, summary
from tl_jets.cli.report import Report, Table, header
from tl_jets.cli.session import Read, read, read_layers, read_token, steps
from tl_jets.cli.texts import legend
from tl_jets.core.decoder import LOGITS_UNIT, in_unit
from tl_jets.core.measures import MEASURES
from tl_jets.core.numerals import number, signed
from tl_jets.core.protocol import DECODER_STEP
from tl_jets.core.selection import ANSWER
from tl_jets.lenses import IterativeJetLens, JointJetLens, iterative_jet_lens, joint_jet_lens

BAR, BAR_WIDTH = "\u2588", 20
# Components below this weight share one row if there are more than MAX_ROWS.
SMALL_WEIGHT, MAX_ROWS = 1e-3, 20
CONSTANT = f"{DECODER_STEP}_bias"
TITLES: dict[str, str] = dict(zip(MEASURES, ("remainder", "cosine", "centered cos", "KL", "top-1 %"), strict=True))


def report(options: argparse.Namespace) -> Report:
    """The first answer, or both lenses of one prompt; of many with `--prompts`."""
    if options.prompts is not None:
        return lens_prompts.report(options)
    shared: dict[str, Any] = {name: getattr(options, name) for name in ("center_scale", "linearize", "top_k", "seed")}
    files = any(getattr(options, kind) for kind in ("json", "html", "svg"))
    is_whole = options.all or options.averages or files
    with steps(4) as step:
        asked = read(options, options.granularity, step)
        network, trace = asked.network, asked.trace
        targets = [read_token(network, target) for target in options.target or []] or None
        layers = read_layers(options.layers, sum(label.endswith("_pre") for label in network.streams))
        streams = shared | {"order": options.order, "layers": layers, "incl_mid": options.incl_mid}
        step("iterative jet lens")
        here = iterative_jet_lens(network, trace, positions=[asked.position], targets=targets, draws=DRAWS, **streams)
        tables = [] if options.all else summary(here, asked, options)
        iterative = joint = None
        if is_whole:
            # A page ranks the model's answers.
            answers = trace.logits.argmax(-1)[..., None] if files and targets is None else targets  # type: ignore[union-attr]
            iterative = iterative_jet_lens(network, trace, targets=answers, **streams)
            step("joint jet lens")
            own = {"order": options.joint_order, "embeddings": not options.no_embeddings, "weights": options.weights}
            joint = joint_jet_lens(network, trace, objective=options.objective, targets=targets, **own, **shared)
    names = legend("lens", *_legend(here))
    answer = asked.token(int(here.model_top_ids[0, 0]))
    heading, data, verdict = asked.asked(options.model, answer), header("lens"), here.verdict().lines
    targeted = [] if targets is None else [_targets(here, asked)]
    if iterative is None or joint is None:
        return Report(data, heading, [*tables[:2], *targeted, *tables[2:]], names, verdict=verdict)
    whole, averages = [_iterative(iterative, asked), _joint(joint, asked)], _averages(iterative, joint)
    page = []
    if files:
        from tl_jets.views import lens_page  # a first answer takes no pages

        page = [lens_page(iterative, joint, model=options.model, prompt=asked.prompt, shown=asked.position)]
    data |= page[0].data if page else {}
    tables = whole if options.all else tables
    tables = [*tables[:2], *targeted, *tables[2:], *([averages] if options.all or options.averages else [])]
    further = {"on_page": [*targeted, averages], "views": lambda: page, "picture": whole, "verdict": verdict}
    return Report(data, heading, tables, names, **further)


def _iterative(lens: IterativeJetLens, asked: Read) -> Table:
    """A row for every layer and order: its convergence, KL with control, borrowed share and best tokens."""
    assert lens.measures is not None, "the command asks for them"
    assert lens.control is not None, "the command gives a seed"
    rows = []
    for i, k, row in _cells(lens):
        at = (i, k, 0, asked.position)
        if lens.linearize == "jet":
            row["rho"] = number(lens.rho[i, 0, asked.position]) if k == 0 else ""
        row["KL (control)"] = _beside(lens.measures.kl[at], lens.control.kl[at])
        if lens.orders[-1] > 0:
            own = " -own" if lens.alpha[at] < 0 else ""
            row["borrowed"] = f"{float(lens.borrowed_share[at]):.0%}{own}" if k > 0 else ""
        row["best tokens"] = _answers(asked, lens.top_ids[at], bool(lens.borrowed[at]))
        rows.append(row)
    how = "detached" if lens.linearize == "detached" else f"center_scale={lens.center_scale}"
    return Table(f"Iterative jet lens: what each layer's stream says ({how})", rows)


def _joint(lens: JointJetLens, asked: Read) -> Table:
    """A row for every component: its weight, or its effects if all weights are 1, and its own best tokens."""
    at, is_detached = (0, asked.position), lens.linearize == "detached"
    weights, effects = lens.weights[:, 0, asked.position], lens.effects[:, 0, asked.position]
    names = ["effect"]
    if lens.target_names != [ANSWER]:
        names = [f"effect on {name}" for name in _headings(asked, lens.target_ids[at])]

    def values(weight: float, added: Tensor) -> dict[str, str]:
        if is_detached:
            return dict(zip(names, map(signed, added), strict=True))
        return {"weight": f"{weight:.3f}", "": BAR * round(BAR_WIDTH * weight)}

    rows: list[dict[str, Any]] = []
    hidden = 0
    top = lens.contributions(lens.top_ids.shape[-1], places=[asked.position]).indices[:, 0]
    for i, (label, weight) in enumerate(zip(lens.labels, weights.tolist(), strict=True)):
        if is_detached and label == CONSTANT and not effects[i].any():
            continue  # the model has no such constant
        if weight < SMALL_WEIGHT and len(lens.labels) > MAX_ROWS:
            hidden += 1
            continue
        rows.append({"component": label, **values(weight, effects[i]), "its own best tokens": _names(asked, top[i])})
    if hidden:
        rows.append({"component": f"{hidden} others", "weight": f"< {SMALL_WEIGHT}"})
    total: dict[str, Any] = {"component": "sum", **values(float(weights.sum()), effects.sum(0))}
    total["its own best tokens"] = _answers(asked, lens.top_ids[at], bool(lens.borrowed[at]))
    said = f"the sum: KL {_beside(lens.kl[at], lens.control.kl[at])}"
    if is_detached:
        title = f"Joint jet lens, detached: what each component gives to the logits{in_unit(lens.unit)}"
        return Table(title, rows, [total], [said])
    said += f"; uniform weights: KL {_beside(lens.uniform.kl[at], lens.control_uniform.kl[at])}"
    gap = "" if lens.gap is None else f", gap {float(lens.gap[at]):.0e}"
    title = f"Joint jet lens, order {lens.order}: the logits as a weighted sum ({lens.objective}{gap})"
    return Table(title, rows, [total], [said])


def _targets(lens: IterativeJetLens, asked: Read) -> Table:
    """A row for every layer and order: ranks and logits of the targets at the only position."""
    ids, logits, ranks = (getattr(lens, f"target_{name}")[..., 0, 0, :] for name in ("ids", "logits", "ranks"))
    names = _headings(asked, ids)
    rows = []
    for i, k, row in _cells(lens):
        for name, rank, logit in zip(names, ranks[i, k].tolist(), logits[i, k].tolist(), strict=True):
            row[name] = f"{rank:,} ({signed(logit)})"
        rows.append(row)
    return Table(f"Targets: rank, 0 is the best (logit{in_unit(lens.unit)})", rows)


def _averages(iterative: IterativeJetLens, joint: JointJetLens) -> Table:
    """Measures averaged over the prompt's positions, with their controls."""

    def measures(mean: Mapping[str, Any]) -> dict[str, str]:
        beside = {name: (mean[name], mean[f"control_{name}"]) for name in TITLES}
        shares = [f"{100 * share:.0f}" for share in beside.pop("top1_agreement")]
        shown = {TITLES[name]: _beside(*values) for name, values in beside.items()}
        return shown | {TITLES["top1_agreement"]: f"{shares[0]} ({shares[1]})"}

    means = iterative.average().to_dict("records")
    rows = [row | measures(mean) for (*_, row), mean in zip(_cells(iterative), means, strict=True)]
    frame, sums = joint.average().set_index("weights"), []
    kinds = {"joint": ("weighted", "control"), "uniform": ("uniform", "control_uniform")}
    if joint.linearize == "detached":
        del kinds["uniform"]  # all weights are 1
    for label, (own, control) in kinds.items():
        mean = {**frame.loc[own], **frame.loc[control].add_prefix("control_")}
        sums.append({"layer": label, "order": _order(joint.linearize, joint.order)} | measures(mean))
    said = "" if iterative.sinks is None else iterative.sinks.said(iterative.valid)
    return Table("Averages over the prompt's positions: measure (control)", rows, sums, [said] if said else [])


def _cells(lens: IterativeJetLens) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Indices of every layer and order, with the first entries of its row; a layer is named once."""
    for i, label in enumerate(lens.labels):
        for k, order in enumerate(lens.orders):
            yield i, k, {"layer": "" if k else label, "order": _order(lens.linearize, order)}


def _order(linearize: str, order: int) -> str:
    return "-" if linearize == "detached" else str(order)


def _names(asked: Read, ids: Tensor) -> list[str]:
    return [asked.token(token)["token"] for token in ids.tolist()]


def _headings(asked: Read, ids: Tensor) -> list[str]:
    """A name for every target, with its id if they read alike."""
    names = _names(asked, ids)
    alike = len(set(names)) < len(names)
    return [f"{name} (id:{token})" for name, token in zip(names, ids.tolist(), strict=True)] if alike else names


def _answers(asked: Read, ids: Tensor, borrowed: bool) -> list[str]:
    """Best tokens, the first one in brackets if borrowed."""
    first, *others = _names(asked, ids)
    return [f"[{first}]" if borrowed else first, *others]


def _beside(value: Any, control: Any) -> str:
    return f"{number(value)} ({number(control)})"


def _legend(lens: IterativeJetLens) -> list[str]:
    """The entries of the legend that the tables need."""
    softcap = [] if lens.unit == LOGITS_UNIT else ["softcap"]
    if lens.linearize == "detached":
        return ["verdict", "detached", "effect", "KL (control)", "remainder", "not here", *softcap]
    borrowed = ["[token]", "borrowed"] if lens.orders[-1] > 0 else []
    return ["verdict", "order", *borrowed, "KL (control)", "rho", "joint", "remainder", *softcap]
