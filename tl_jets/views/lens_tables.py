"""Lenses as tables: the best token of every layer or component at every position, and the k best at one.

Cells of the iterative lens are bluer the closer the layer is to the model. Cells of the joint lens show what a
component adds to the logit of its own best token, orange above zero and blue below. Answers borrowed from the model's
own final stream stand in square brackets, controls in round ones. Captions say if measures or controls are missing.

Source: Chen et al., arXiv 2410.06024, figure 3. Cost: none for the iterative lens; the joint lens reads its components'
jets at the shown positions through the unembedding.

Example:
    >>> import tl_jets as tj
    >>> lens = tj.iterative_jet_lens(tj.load_tinydocs(), "This function is available on Unix and", order=1)
    >>> lens_table(lens, order=0).title
    'Iterative jet lens, order 0 (the logit lens)'
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from tl_jets.core.decoder import in_unit
from tl_jets.core.markup import cell, diverging, largest, rising, row_head, table, text, token
from tl_jets.core.measures import MEASURES
from tl_jets.core.notebook import dataframe_html
from tl_jets.core.numerals import number, precise
from tl_jets.core.options import check_choice
from tl_jets.core.selection import positions_of
from tl_jets.core.tokens import visible
from tl_jets.lenses import IterativeJetLens, JointJetLens
from tl_jets.lenses.verdicts import changing
from tl_jets.views.names import MEASURE_NAMES, best_of_components, of_prompts, places_of
from tl_jets.views.pages import View, view_of

# Limits of a lens shown in a notebook.
SHOWN_POSITIONS, SHOWN_COMPONENTS, SHOWN_LAYERS = 8, 16, 12
# Larger KLs (nats) have no color.
FAR = 10.0
# Indices of a cell: layer, order, prompt, and place on the pos axis.
At = tuple[int, int, int, int]


def lens_table(
    lens: IterativeJetLens | JointJetLens,
    *,
    order: int | None = None,
    measure: str = "kl",
    prompt: int = 0,
    positions: Sequence[int] | None = None,
    top: int | None = None,
) -> View:
    """The best token of every layer or component (rows) at every position (columns); hover shows a cell's numbers.

    Args:
        lens: An iterative or a joint lens.
        order: Order of an iterative lens; None for its highest.
        measure: Measure of an iterative lens, written under the token with its control; it colors the cell.
        prompt: Index of the prompt.
        positions: Positions in the prompt, among those of the lens; None for all real ones.
        top: Number of components of a joint lens to show, those with the largest weights; None for all.

    Raises:
        ValueError: Unknown order, measure, prompt or position.
    """
    places = places_of(lens, prompt, positions)
    if isinstance(lens, JointJetLens):
        return _joint_table(lens, prompt, places, top)
    check_choice("measure", measure, MEASURES)
    return _iterative_table(lens, order_index(lens, order), measure, prompt, places)


def top_tokens(lens: IterativeJetLens | JointJetLens, *, position: int = -1, prompt: int = 0, k: int = 5) -> View:
    """The k best tokens of every layer and order, or of every component, at one position, with their logits.

    Args:
        lens: An iterative or a joint lens.
        position: Position in the prompt, among those of the lens; negative: from the prompt's last real token.
        prompt: Index of the prompt.
        k: Number of tokens; for an iterative lens at most its `top_k`.

    Returns:
        A `View`: additive logits of an iterative lens, with own parts where the answer is a mix; for a joint lens, the
        weighted, centered contributions.

    Raises:
        ValueError: Unknown position or prompt, or the lens kept fewer than k tokens.

    Example:
        >>> import tl_jets as tj
        >>> lens = tj.joint_jet_lens(tj.load_tinydocs(), "This function is available on Unix and")
        >>> "4_mlp" in top_tokens(lens, k=3).html, "3_mlp" in top_tokens(lens, k=3).html
        (False, True)
    """
    places = places_of(lens, prompt, None if position < 0 else [position])
    if not -len(places) <= min(position, 0):
        raise ValueError(f"position must be among the {len(places)} real ones of the prompt; got {position}.")
    place = places[position] if position < 0 else places[0]
    kept = lens.top_ids.shape[-1]
    if k < 1 or (isinstance(lens, IterativeJetLens) and k > kept):
        raise ValueError(f"k must lie in 1..{kept}, what the lens kept; got {k}. Run it with a larger top_k.")
    read = visible(lens.token_names[int(lens.tokens[prompt, place])])
    where = f"after {read} (position {positions_of(lens.positions, prompt)[place]}{of_prompts(lens, prompt)})"
    if isinstance(lens, JointJetLens):
        return View(f"Best tokens of components {where}", _joint_best(lens, prompt, place, k))
    return View(f"Best tokens of layers {where}", _iterative_best(lens, prompt, place, k))


@view_of.register(IterativeJetLens)
@view_of.register(JointJetLens)
def lens_summary(lens: IterativeJetLens | JointJetLens) -> View:
    """The notebook view: a verdict, and of the first prompt's last positions the layers or components that matter.

    Of an iterative lens: the lowest and the highest order, the layers where something changes at the last position.
    """
    prompt = int(lens.valid.any(1).nonzero()[0, 0])
    places = places_of(lens, prompt, None, most=SHOWN_POSITIONS)
    if isinstance(lens, JointJetLens):
        if lens.centers is None:  # loaded from a file
            return View(repr(lens), dataframe_html(lens.to_dataframe()))
        positions = [positions_of(lens.positions, prompt)[place] for place in places]
        view = lens_table(lens, prompt=prompt, positions=positions, top=SHOWN_COMPONENTS)
        return View(repr(lens), f"<p>{text(view.title)}</p>{view.html}")
    ends = [0, -1] if len(lens.orders) > 1 else [0]
    best = lens.top_ids[:, :, prompt, places[-1], 0][:, ends]
    kl = torch.zeros(best.shape, device="cpu")
    if lens.measures is not None:
        kl = lens.measures.kl[:, :, prompt, places[-1]][:, ends]
    shown = [lens.labels[i] for i in changing(kl, best.tolist(), SHOWN_LAYERS)]
    tables = [_iterative_table(lens[shown], k % len(lens.orders), "kl", prompt, places) for k in ends]
    said = [*lens.verdict().lines]
    if len(shown) < (n := len(lens.labels)):
        said.append(f"Shown: {len(shown)} of {n} layers, where something changes; all: lens_table(lens).")
    parts = [f"<p>{text(line)}</p>" for line in said] + [f"<p>{text(view.title)}</p>{view.html}" for view in tables]
    return View(repr(lens), "".join(parts))


def closeness(measure: str, value: float) -> float:
    """How close a cell is to the model by a measure, in 0..1: the strength of its color."""
    if measure == "kl":
        return 1 - math.sqrt(min(max(value, 0.0), FAR) / FAR)
    return 1 - min(value, 1.0) if measure == "remainder_norm" else max(value, 0.0)


def measured(lens: IterativeJetLens, measure: str, at: At) -> tuple[str, str]:
    """A cell's measure with its control in brackets, and its color; both empty if the lens has no measures."""
    if lens.measures is None:
        return "", ""
    value = float(getattr(lens.measures, measure)[at])
    control = "" if lens.control is None else f" ({number(float(getattr(lens.control, measure)[at]))})"
    return f"{number(value)}{control}", rising(closeness(measure, value))


def describe(lens: IterativeJetLens, at: At) -> str:
    """All numbers of one cell, one per line."""
    layer, order, prompt, place = at
    position = positions_of(lens.positions, prompt)[place]
    lines = [f"{lens.labels[layer]}, order {lens.orders[order]}, position {position}"]
    columns = (values[at].tolist() for values in (lens.top_ids, lens.full_values, lens.own_values))
    for token_id, full, own in zip(*columns, strict=True):
        part = f", own part {precise(own)}" if lens.orders[order] else ""
        lines.append(f"{visible(lens.token_names[token_id])}  logit {precise(full)}{part}{in_unit(lens.unit)}")
    for name, values in [] if lens.measures is None else lens.measures.items():
        control = "" if lens.control is None else f" (control {precise(float(getattr(lens.control, name)[at]))})"
        lines.append(f"{MEASURE_NAMES[name]} {precise(float(values[at]))}{control}")
    lines.append(f"alpha {precise(float(lens.alpha[at]))}, beta {precise(float(lens.beta[at]))}")
    if lens.orders[order]:
        lines.append(f"borrowed share {precise(float(lens.borrowed_share[at]))}")
    rho = float(lens.rho[layer, prompt, place])
    if not math.isnan(rho):
        lines.append(f"rho {precise(rho)}{': the series diverges' if rho >= 1 else ''}")
    return "\n".join(lines)


def order_index(lens: IterativeJetLens, order: int | None) -> int:
    """Index along the order axis; None is the highest order."""
    wanted = lens.orders[-1] if order is None else order
    if wanted not in lens.orders:
        raise ValueError(
            f"order must be one of {lens.orders}, those of the lens; got {order}. Run it with a higher order."
        )
    return lens.orders.index(wanted)


def answer(shown: str, borrowed: bool) -> str:
    """A best token as HTML: bold, or in square brackets if borrowed."""
    return f'<span class="borrowed">[{token(shown)}]</span>' if borrowed else f"<b>{token(shown)}</b>"


def _order_name(lens: IterativeJetLens, index: int) -> str:
    if lens.linearize == "detached":
        return "detached"
    return "order 0 (the logit lens)" if lens.orders[index] == 0 else f"order {lens.orders[index]}"


def _iterative_table(lens: IterativeJetLens, k: int, measure: str, prompt: int, places: list[int]) -> View:
    names = lens.token_names
    rows = []
    for i, label in enumerate(lens.labels):
        cells = [row_head(text(label))]
        for p in places:
            at = (i, k, prompt, p)
            below, color = measured(lens, measure, at)
            inner = _best(lens, at) + (f"<small>{below}</small>" if below else "")
            cells.append(cell(inner, color, hover=describe(lens, at)))
        rows.append(cells)
    rows.append(_model_row(lens, prompt, places))
    scale = "" if lens.center_scale == "none" else f", center_scale={lens.center_scale}"
    title = f"Iterative jet lens, {_order_name(lens, k)}{scale}{of_prompts(lens, prompt)}"
    heads = _read_heads(lens, prompt, places, names, "layer")
    return View(title, table(heads, rows, caption=_legend(lens, k, measure)))


def _best(lens: IterativeJetLens, at: At) -> str:
    """The best token of a cell."""
    return answer(lens.token_names[int(lens.top_ids[at][0])], lens.own_top_ids is not None and bool(lens.borrowed[at]))


def _model_row(lens: IterativeJetLens | JointJetLens, prompt: int, places: list[int]) -> list[str]:
    """The model's own answers."""
    ids = lens.model_top_ids[prompt, places].tolist()
    return [row_head("model"), *(cell(answer(lens.token_names[i], False)) for i in ids)]


def _legend(lens: IterativeJetLens, k: int, measure: str) -> str:
    if lens.measures is None:
        return "The best token of every layer. Run the lens with measures=True and a seed for its measures and their controls."
    parts = [f"Under each token its {MEASURE_NAMES[measure]}; bluer is closer to the model."]
    control = "In (round) brackets that of a random center of equal length and angle, which knows nothing of the layer."
    parts.append("No control: run the lens with a seed." if lens.control is None else control)
    if lens.orders[k]:
        parts.append("[Square] brackets: borrowed from the model's own final stream.")
    return " ".join(parts)


def _read_heads(
    lens: IterativeJetLens | JointJetLens, prompt: int, places: list[int], names: Mapping[int, str], first: str
) -> list[str]:
    read, own = [names[int(lens.tokens[prompt, p])] for p in places], positions_of(lens.positions, prompt)
    return [first, *(f"{token(name)}<small>{own[p]}</small>" for name, p in zip(read, places, strict=True))]


def _joint_table(lens: JointJetLens, prompt: int, places: list[int], top: int | None) -> View:
    means, chosen, found = best_of_components(lens, prompt, places, top)
    names = lens.texts(found.indices)
    values, ids = found.values[..., 0].tolist(), found.indices[..., 0].tolist()
    scale = largest(value for row in values for value in row)
    weights, rows, own = lens.weights[:, prompt, places], [], positions_of(lens.positions, prompt)
    for row, i in enumerate(chosen):
        label, mean = lens.labels[i], float(means[i])
        weighed = "weight, mean of the columns without attention sinks"
        cells = [row_head(f"{text(label)}<small>{number(mean)}</small>", weighed)]
        for value, best, weight, p in zip(values[row], ids[row], weights[i].tolist(), places, strict=True):
            hover = (
                f"{label}, position {own[p]}\n{visible(names[best])}  contribution {precise(value)}\n"
                f"weight {precise(weight)}, alpha {precise(float(lens.alpha[i, prompt, p]))}, beta "
                f"{precise(float(lens.beta[i, prompt, p]))}, rho {precise(float(lens.rho[i, prompt, p]))}"
            )
            shown = f"{token(names[best])}<small>{number(value)}</small>"
            cells.append(cell(shown, diverging(value, scale), hover=hover))
        rows.append(cells)
    total = [row_head("sum")]
    for p in places:
        kinds = (lens.measures, lens.control, lens.uniform, lens.control_uniform)
        kl, control, *uniform = (float(m.kl[prompt, p]) for m in kinds)
        hover = f"KL (nats) {precise(kl)} (control {precise(control)})\n"
        hover += "uniform weights {} (control {})".format(*map(precise, uniform))
        shown = answer(names[int(lens.top_ids[prompt, p, 0])], bool(lens.borrowed[prompt, p]))
        total.append(cell(f"{shown}<small>{number(kl)} ({number(control)})</small>", hover=hover))
    rows.append(total)
    rows.append(_model_row(lens, prompt, places))
    caption = (
        "Each component's own best token; under it, and as color, what the component adds to its logit beyond the mean of the "
        f"vocabulary (weights included{in_unit(lens.unit)}). Under the component its mean weight. Under the sum its KL to the "
        "model in nats, in (round) brackets that of random components."
    )
    kind = "detached" if lens.linearize == "detached" else f"order {lens.order}, {lens.objective} weights"
    if len(chosen) < len(lens.labels):
        kind += f", the {len(chosen)} largest weights of {len(lens.labels)}"
    heads = _read_heads(lens, prompt, places, names, "component")
    return View(f"Joint jet lens, {kind}{of_prompts(lens, prompt)}", table(heads, rows, caption=caption))


def _iterative_best(lens: IterativeJetLens, prompt: int, place: int, k: int) -> str:
    rows = []
    for i, label in enumerate(lens.labels):
        cells = [row_head(text(label))]
        for o in range(len(lens.orders)):
            at = (i, o, prompt, place)
            best = [token(lens.token_names[each]) for each in lens.top_ids[at][:k].tolist()]
            shown = zip([_best(lens, at), *best[1:]], lens.full_values[at][:k].tolist(), strict=True)
            below, color = measured(lens, "kl", at)
            inner = "<br>".join(f"{each} {number(value)}" for each, value in shown)
            inner += f"<small>KL {below}</small>" if below else ""
            cells.append(cell(inner, color, hover=describe(lens, at)))
        rows.append(cells)
    heads = ["layer", *(_order_name(lens, o) for o in range(len(lens.orders)))]
    caption = f"Tokens with their additive logits{in_unit(lens.unit)}. " + _legend(lens, len(lens.orders) - 1, "kl")
    return table(heads, rows, caption=caption)


def _joint_best(lens: JointJetLens, prompt: int, place: int, k: int) -> str:
    found = lens.contributions(k, prompt=prompt, places=[place])
    names = lens.texts(found.indices)
    values, ids = found.values[:, 0], found.indices[:, 0]
    scale = largest(values.flatten().tolist())
    rows = []
    for i, label in enumerate(lens.labels):
        cells = [row_head(text(label)), cell(number(float(lens.weights[i, prompt, place])))]
        for best, value in zip(ids[i].tolist(), values[i].tolist(), strict=True):
            hover = f"contribution {precise(value)}"
            shown = f"{token(names[best])} {number(value)}" if abs(value) > 1e-6 else "\u2013"  # all tokens are equal
            cells.append(cell(shown, diverging(value, scale), hover=hover))
        rows.append(cells)
    borrowed = bool(lens.borrowed[prompt, place])
    best = [cell(answer(names[i], borrowed and not j)) for j, i in enumerate(lens.top_ids[prompt, place, :k].tolist())]
    rows.append([row_head("sum"), cell(number(float(lens.weights[:, prompt, place].sum()))), *best])
    heads = ["component", "weight", *(str(j + 1) for j in range(k))]
    added = f"what the component adds to their logits beyond the mean of the vocabulary{in_unit(lens.unit)}"
    return table(heads, rows, caption=f"Tokens with {added}.")
