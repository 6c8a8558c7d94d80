"""Figures of flows: bars of components, shares of joint ablations, heatmaps of layers and positions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tl_jets.core.markup import largest
from tl_jets.core.options import check_integers
from tl_jets.core.tokens import visible
from tl_jets.flows import Flow, JointFlow
from tl_jets.views.figures.axes import (
    BELOW_TO_ABOVE,
    COLORS,
    SMALL,
    color_map,
    legible,
    name_axes,
    name_rows,
    named_bars,
    new_panels,
    short_legend,
    sign_colors,
)
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
    places_in_depth,
    scale_of,
    shortened,
)
from tl_jets.views.names import largest_first, shown_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Rows of a heatmap have a tick each up to this number.
MOST_TICKS = 16


def flow_bars(flow: Flow, *, cell: Cell = FIRST, top: int | None = 20, ax: Axes | None = None) -> Figure:
    """Bars of the largest flows of one effect, on an axis symmetric around zero.

    Components mostly written at attention sinks are light (if flows by position were kept). Bars of an open effect are
    hatched, and the title says that they explain nothing.

    Args:
        flow: Result of `tl_jets.flow`.
        cell: Indices of prompt, read position and target.
        top: Number of components, largest first; None for all.
        ax: Axes to draw on; None for a new figure.

    Raises:
        ValueError: There is no such cell, or top is below 1.

    Example:
        >>> import tl_jets as tj
        >>> model = tj.load_tinydocs()
        >>> found = tj.flow(model, "This function is available on Unix and", tj.ablation_hooks(model, "0_mlp"))
        >>> len(flow_bars(found, top=5).axes[0].patches)
        5
    """
    check_cell(flow.effect.shape, cell)
    values = of_cell(flow.flow, cell)
    order = largest_first(values, top)
    sinks, is_open = at_sinks(flow, cell), open_text(flow, cell)
    figure, (ax,) = new_panels(ax, 1, (5.5, 0.24 * len(order) + 0.9))
    shown = values[order].tolist()
    names = shortened([flow.labels[i] for i in order])
    bars = named_bars(ax, names, shown, hatch="////" if is_open else None)
    for bar, i in zip(bars, order, strict=True):
        bar.set_alpha(0.4 if sinks[i] or is_open else 1.0)
    _symmetric(ax, shown)
    marks = "; light: at attention sinks" if any(sinks[i] for i in order) else ""
    title = is_open or f"Flow: {shown_of(len(order), len(values))}"
    name_axes(ax, title, x=f"flow; {effect_text(flow, cell)}{marks}")
    return figure


def joint_shares(joint: JointFlow, *, cell: Cell = FIRST, ax: Axes | None = None) -> Figure:
    """Bars of each component's share of a joint ablation, beside the effect of ablating it alone.

    Dashed lines are the joint effects of random sets of the same layers, as means per component.

    Args:
        joint: Result of `tl_jets.joint_flow`.
        cell: Indices of prompt, read position and target.
        ax: Axes to draw on; None for a new figure.

    Raises:
        ValueError: There is no such cell.
    """
    check_cell(joint.effect.shape, cell)
    share, single = of_cell(joint.share, cell), of_cell(joint.single, cell)
    order, is_open = largest_first(share, None), open_text(joint, cell)
    figure, (ax,) = new_panels(ax, 1, (5.5, 0.34 * len(order) + 1.0))
    places = range(len(order))
    style = {"height": 0.36, "hatch": "////" if is_open else None, "alpha": 0.4 if is_open else 1.0}
    drawn = ax.barh([p - 0.19 for p in places], share[order].tolist(), color=COLORS[0], label="share", **style)
    alone = ax.barh([p + 0.19 for p in places], single[order].tolist(), color=COLORS[5], label="alone", height=0.36)
    control = (of_cell(joint.control, cell) / len(order)).tolist()
    lines = [ax.axvline(value, color="0.5", ls="--", lw=0.8, label="random sets, per component") for value in control]
    name_rows(ax, shortened([joint.labels[i] for i in order]))
    _symmetric(ax, [*share.tolist(), *single.tolist(), *control])
    short_legend(ax, [drawn, alone], lines[:1])
    title = f"Joint {joint.mode} ablation; alone they add up to {float(single.sum()):+.3g}"
    name_axes(ax, is_open or title, x=effect_text(joint, cell))
    return figure


def flow_heatmap(flow: Flow, *, cell: Cell = FIRST) -> Figure:
    """Flow by layer and position of the write, a panel for attention, MLPs (or blocks), and sources; one color scale.

    Attention sinks are marked by a dagger. Of an open effect the title says that it explains nothing.

    Args:
        flow: Result of `tl_jets.flow(..., by_position=True)`.
        cell: Indices of prompt, read position and target.

    Raises:
        ValueError: Flows by position were not kept, or there is no such cell.
    """
    found = [grid for grid in grids(flow, cell) if grid.kind != "other"] or grids(flow, cell)
    texts, sinks = columns(flow, cell)
    names = [f"{visible(text)}{SINK * sink}" for text, sink in zip(texts, sinks, strict=True)]
    rows = max(len(grid.rows) for grid in found)
    size = (max(3.0, 0.22 * len(names) + 1.2), max(2.4, 0.14 * rows + 1.4))
    figure, panels = new_panels(None, len(found), size)
    scale, cmap = scale_of(found), color_map(BELOW_TO_ABOVE)
    image: Any = None
    for panel, (kind, labels, values) in zip(panels, found, strict=True):
        image = panel.imshow(
            values.tolist(), cmap=cmap, vmin=-scale, vmax=scale, aspect="auto", interpolation="nearest"
        )
        step = -(-len(labels) // MOST_TICKS)
        panel.set_yticks(range(0, len(labels), step), labels[::step], parse_math=False)
        ticks = [legible(name) for name in shortened(names, 14)]
        panel.set_xticks(range(len(names)), ticks, rotation=90, parse_math=False)
        name_axes(panel, KINDS[kind], y="layer" if panel is panels[0] else "")
    bar = figure.colorbar(image, ax=panels, pad=0.01, aspect=30)
    bar.set_label("flow", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL - 1)
    title = open_text(flow, cell) or f"Flow by layer and position: {effect_text(flow, cell)}"
    figure.suptitle(legible(title), fontsize=SMALL + 2, x=0.01, ha="left", parse_math=False)
    return figure


def flow_graph(flow: Flow, *, target: int = 0, top: int = 40, ax: Axes | None = None) -> Figure:
    """The largest flows on edges, from where the intervention acts to the answer: attention above, MLPs below.

    Widths are sizes, colors signs. Components that the intervention itself edits are outlined.

    Args:
        flow: Result of `tl_jets.flow(..., edges=True)`; of several prompts and positions, means.
        target: The index of the target.
        top: Number of edges, largest first.
        ax: Axes to draw on; None for a new figure.

    Raises:
        ValueError: Edges were not asked for, an effect is open, or top is below 1.

    Example:
        >>> import tl_jets as tj
        >>> model = tj.load_tinydocs()
        >>> found = tj.flow(model, "This function is available on Unix and", tj.ablation_hooks(model, "0_mlp"), edges=True)
        >>> len(flow_graph(found, top=10).axes[0].patches)
        10
    """
    graph = flow.graph(target)
    check_integers(1, top=top)
    edges = sorted(graph.edges(data="flow"), key=lambda edge: -abs(edge[2]))[:top]
    drawn = [name for name in graph.nodes if any(name in edge[:2] for edge in edges)]
    places = places_in_depth(drawn)
    figure, (ax,) = new_panels(ax, 1, (9.0, 3.4))
    from matplotlib.patches import FancyArrowPatch

    scale = largest(value for _, _, value in edges)
    for writer, reader, value in reversed(edges):
        (x0, y0), (x1, y1) = places[writer], places[reader]
        bend = 0.0 if y0 != y1 else math.copysign(0.35 / (1 + 0.25 * abs(x1 - x0)), -y0)
        look = {"color": sign_colors([value])[0], "lw": 0.4 + 3.2 * abs(value) / scale, "alpha": 0.7}
        look |= {"arrowstyle": "-|>", "connectionstyle": f"arc3,rad={bend}", "shrinkA": 3, "shrinkB": 4}
        ax.add_patch(FancyArrowPatch((x0, y0), (x1, y1), mutation_scale=7, **look))
    for name, (x, y) in places.items():
        own = graph.nodes[name]
        is_edited = abs(own["edit"]) > 1e-3 * max(abs(own["flow"]), 1e-12)
        ax.plot(x, y, "o", ms=6, color="0.25", mec=COLORS[3] if is_edited else "0.25", mew=2.5 if is_edited else 0)
        where = {"xytext": (0, 9 if y >= 0 else -9), "textcoords": "offset points", "va": "bottom" if y >= 0 else "top"}
        box = {"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.8}
        ax.annotate(name, (x, y), ha="center", fontsize=SMALL - 1, parse_math=False, bbox=box, **where)
    xs, ys = zip(*places.values(), strict=True)
    ax.set_xlim(min(xs) - 1, max(xs) + 1)
    ax.set_ylim(min(*ys, -1) - 0.9, max(*ys, 1) + 0.9)
    ax.axis("off")
    share = sum(abs(value) for _, _, value in edges) / sum(abs(value) for _, _, value in graph.edges(data="flow"))
    effect = float(flow.effect[..., target].mean())
    shown = shown_of(len(edges), graph.number_of_edges())
    name_axes(ax, f"Flow on edges, effect {effect:+.3g}: {shown}, {share:.0%} of all in size")
    return figure


def _symmetric(ax: Axes, values: list[float]) -> None:
    """An axis of values that is symmetric around zero."""
    bound = 1.05 * largest(values)
    ax.set_xlim(-bound, bound)
