"""Flows in notebooks and pages: the effect and its certificate, the largest components, a heatmap of layers and positions.

Example:
    >>> import tl_jets as tj
    >>> model = tj.load_tinydocs()
    >>> hooks = tj.ablation_hooks(model, "0_mlp")
    >>> found = tj.flow(model, "This function is available on Unix and", hooks, by_position=True)
    >>> flow_heatmap(found).title
    'Flow by layer and position: effect -2.56 on  is'
"""

from __future__ import annotations

from tl_jets.core.markup import cell as drawn
from tl_jets.core.markup import diverging, largest, row_head, table, text, token
from tl_jets.core.numerals import precise, signed
from tl_jets.core.tokens import visible
from tl_jets.flows import Flow, JointFlow
from tl_jets.views.flow_cells import (
    FIRST,
    KINDS,
    SINK,
    Cell,
    at_sinks,
    check_cell,
    columns,
    effect_text,
    grids,
    of_cell,
    open_text,
    scale_of,
)
from tl_jets.views.names import largest_first
from tl_jets.views.pages import View, view_of


def flow_table(flow: Flow, *, cell: Cell = FIRST, top: int | None = 12) -> View:
    """The components of the largest flow of one effect, colored around zero; of an open effect only that it is open.

    Args:
        flow: Result of `tl_jets.flow`.
        cell: Indices of prompt, read position and target.
        top: Number of components; None for all, in the order of the network.

    Raises:
        ValueError: There is no such cell, or top is below 1.
    """
    check_cell(flow.effect.shape, cell)
    title = f"Flow: {effect_text(flow, cell)}"
    if not bool(flow.closed[cell]):
        return _open(title, flow, cell)
    values = of_cell(flow.flow, cell)
    order = range(len(values)) if top is None else largest_first(values, top)
    scale, sinks = largest(values.tolist()), at_sinks(flow, cell)
    edited = (of_cell(flow.edit, cell).abs() > 1e-3 * values.abs()).tolist()
    rows = []
    for i in order:
        value, direct = float(values[i]), float(of_cell(flow.direct, cell)[i])
        name = f"{flow.labels[i]}{' (edited)' if edited[i] else ''}{SINK if sinks[i] else ''}"
        share = value / float(flow.effect[cell])
        hover = f"{flow.labels[i]}\nflow {precise(value)}\nshare {precise(share)}\ndirect {precise(direct)}"
        cells = [drawn(text(signed(value)), diverging(value, scale), hover=hover), drawn(text(f"{share:+.0%}"))]
        rows.append([row_head(text(name)), *cells, drawn(text(signed(direct)))])
    gap = f"closed, gap {100 * float(flow.gap_share[cell]):.2g}% of the effect; {flow._checked()}"
    more = "" if len(rows) == len(flow.labels) else f", the {len(rows)} largest of {len(flow.labels)}"
    marks = f" {SINK}: mostly written at attention sinks." if any(sinks) else ""
    caption = f"Components{more}; {gap}. In series they carry the same effect one after another.{marks}"
    return View(title, table(["component", "flow", "share", "direct"], rows, caption=text(caption)))


def flow_heatmap(flow: Flow, *, cell: Cell = FIRST) -> View:
    """Flow by layer (rows) and position of the write (columns), of attention, MLPs, and sources: one color scale.

    Args:
        flow: Result of `tl_jets.flow(..., by_position=True)`.
        cell: Indices of prompt, read position and target.

    Raises:
        ValueError: Flows by position were not kept, or there is no such cell.
    """
    found = grids(flow, cell)
    title = f"Flow by layer and position: {effect_text(flow, cell)}"
    if not bool(flow.closed[cell]):
        return _open(title, flow, cell)
    (names, sinks), scale = columns(flow, cell), scale_of(found)
    marked = [f"{token(name)}{SINK * sink}" for name, sink in zip(names, sinks, strict=True)]
    heads = [f"{name}<small>{pos}</small>" for pos, name in enumerate(marked)]
    parts = []
    for kind, rows, values in found:
        body = []
        for row, own in zip(rows, values.tolist(), strict=True):
            cells = [row_head(text(row))]
            for pos, (name, value) in enumerate(zip(names, own, strict=True)):
                hover = f"{KINDS[kind]} {row}\n{pos} {visible(name)}\nflow {precise(value)}"
                cells.append(drawn(signed(value), diverging(value, scale), hover=hover))
            body.append(cells)
        parts.append(table([text(KINDS[kind]), *heads], body))
    marks = f" {SINK}: attention sink." if any(sinks) else ""
    caption = f"<p>Where components write what carries the effect; orange is above zero, blue below.{marks}</p>"
    return View(title, caption + "".join(parts))


def joint_table(joint: JointFlow, *, cell: Cell = FIRST) -> View:
    """Shares of a joint ablation, beside single ablations and gradients; of an open effect only that it is open.

    Args:
        joint: Result of `tl_jets.joint_flow`.
        cell: Indices of prompt, read position and target.

    Raises:
        ValueError: There is no such cell.
    """
    check_cell(joint.effect.shape, cell)
    title = f"Joint flow: {effect_text(joint, cell)}"
    if not bool(joint.closed[cell]):
        return _open(title, joint, cell)
    columns = {name: of_cell(getattr(joint, name), cell) for name in ("share", "single", "gradient")}
    scale = largest(value for values in columns.values() for value in values.tolist())
    rows = []
    for i in largest_first(columns["share"], None):
        values = [float(own[i]) for own in columns.values()]
        rows.append([row_head(text(joint.labels[i])), *(drawn(signed(v), diverging(v, scale)) for v in values)])
    sums = [drawn(signed(float(own.sum()))) for own in columns.values()]
    rows.append([row_head("sum"), *sums])
    control = of_cell(joint.control, cell)
    said = "no random sets to compare with"
    if len(control):
        said = f"{len(control)} random sets of the same layers: {signed(float(control.mean()))} in the mean, "
        said += f"{signed(max(control.tolist(), key=abs))} at most"
    caption = f"{joint.mode} ablation together; {said}."
    return View(title, table(["component", "share", "alone", "gradient"], rows, caption=text(caption.capitalize())))


def _open(title: str, found: Flow | JointFlow, cell: Cell) -> View:
    """Of an open effect only that it is open."""
    return View(title, f"<p><b>{text(open_text(found, cell))}</b></p>")


@view_of.register(Flow)
def _flow(flow: Flow) -> View:
    """The first effect's largest components and, if kept, its positions; a note of further effects."""
    if not len(flow.labels):
        return View("Flow: nothing changed", f"<p>{text(repr(flow))}</p>")
    parts = [flow_table(flow)]
    if flow.by_position is not None and bool(flow.closed[FIRST]):
        parts.append(flow_heatmap(flow))
    return View.joined(parts[0].title, _more(flow), *parts)


@view_of.register(JointFlow)
def _joint(joint: JointFlow) -> View:
    view = joint_table(joint)
    return View.joined(view.title, _more(joint), view)


def _more(found: Flow | JointFlow) -> View:
    n = found.effect.numel()
    note = f"<p>The first prompt's last position and first target, of {n} effects; cell= chooses.</p>" if n > 1 else ""
    return View(type(found).__name__, f"<p>{text(repr(found))}</p>{note}")
