"""Figures of lenses: the table of the paper's figure 3, and measures with their controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from tl_jets.core.decoder import in_unit
from tl_jets.core.intervals import FEWEST
from tl_jets.core.measures import MEASURES
from tl_jets.core.options import check_choice
from tl_jets.core.selection import positions_of
from tl_jets.core.tokens import visible
from tl_jets.lenses import IterativeJetLens, JointJetLens
from tl_jets.views.figures.axes import (
    COLORS,
    MARKERS,
    SMALL,
    depth_color,
    draw_cells,
    legible,
    name_axes,
    name_ticks,
    new_panels,
    short_legend,
)
from tl_jets.views.lens_tables import order_index
from tl_jets.views.names import MEASURE_NAMES, best_of_components, of_prompts, places_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL_WIDTH, CELL_HEIGHT = 0.78, 0.27  # inches
ROUNDING = 1e-6


def lens_table(
    lens: IterativeJetLens | JointJetLens,
    *,
    order: int | None = None,
    prompt: int = 0,
    positions: Sequence[int] | None = None,
    top: int | None = None,
    ax: Axes | None = None,
) -> Figure:
    """The best token of every component or layer (rows) at every position (columns), as in the paper's figure 3.

    Args:
        lens: A joint lens: rows are components with mean weights, colored by what they add to the centered logit of
            their best token. Or an iterative lens: rows are layers, colored by KL; borrowed answers stand in square
            brackets (no colors or brackets without measures).
        order: Order of an iterative lens; None for its highest.
        prompt: Index of the prompt.
        positions: Positions in the prompt, among those of the lens; None for all real ones.
        top: Number of components of a joint lens to show, those with the largest weights; None for all.
        ax: Axes to draw on; None for a new figure.

    Raises:
        ValueError: Unknown order, prompt or position.

    Source: Chen et al., arXiv 2410.06024, figure 3. Cost: for a joint lens, its components' jets at these positions
    through the unembedding.

    Example:
        >>> import tl_jets as tj
        >>> lens = tj.joint_jet_lens(tj.load_tinydocs(), "This function is available on Unix and")
        >>> lens_table(lens).axes[1].get_ylabel()
        'added to the logit of its token (centered)'
    """
    places = places_of(lens, prompt, positions)
    if isinstance(lens, JointJetLens):
        labels, texts, values = _joint_cells(lens, prompt, places, top)
        title = "Joint jet lens" if lens.linearize == "detached" else f"Joint jet lens, order {lens.order}"
        bar = f"added to the logit of its token (centered{in_unit(lens.unit)})"
    else:
        k = order_index(lens, order)
        labels, texts, values = _iterative_cells(lens, k, prompt, places)
        title, bar = f"Iterative jet lens, order {lens.orders[k]}", "KL(model || lens), nats"
    names = lens.token_names
    labels = [*labels, "model"]
    texts = [*texts, [visible(names[int(lens.model_top_ids[prompt, p])]) for p in places]]
    widest = max(len(word) for row in texts for word in row)
    width = max(CELL_WIDTH, 0.075 * widest + 0.1)
    figure, (ax,) = new_panels(ax, 1, (width * len(places) + 2.0, CELL_HEIGHT * len(labels) + 1.0))
    draw_cells(ax, texts, values, diverging=isinstance(lens, JointJetLens), bar=bar)
    read = [f"{visible(names[int(lens.tokens[prompt, p])])}\n{positions_of(lens.positions, prompt)[p]}" for p in places]
    ax.set_xticks(range(len(places)), map(legible, read), fontsize=SMALL, parse_math=False)
    ax.set_yticks(range(len(labels)), labels, fontsize=SMALL, parse_math=False)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    name_axes(ax, title + of_prompts(lens, prompt))
    return figure


def measures(
    lens: IterativeJetLens | JointJetLens,
    *,
    names: str | Sequence[str] = ("kl", "centered_cosine", "remainder_norm", "top1_agreement"),
    against: Literal["layer", "order"] = "layer",
    log: bool | None = None,
    legend: bool = True,
    ax: Axes | None = None,
) -> Figure:
    """Distance of a lens from the model, averaged over positions without attention sinks, each measure with its control.

    Args:
        lens: A lens with measures. A joint lens gives bars: its weights and uniform ones (blue), and random centers with
            either (gray).
        names: One measure or several, one panel each.
        against: Horizontal axis for an iterative lens: `"layer"` (a line per order) or `"order"` (a line per layer).
            Controls (random centers of equal length and angle) are dashed.
        log: Logarithmic axis for KL and remainder of an iterative lens; None where they span two decades, or `ax` is
            logarithmic.
        legend: Whether to add a legend.
        ax: Axes to draw on, for a single measure; None for a new figure.

    Returns:
        The figure. Logarithmic axes omit values below 1e-6 (rounding), such as the line of the final stream. Of six or
        more prompts, bands (of bars: lines) are the 95% bootstrap intervals of the means over prompts.

    Raises:
        ValueError: The lens has no measures, a measure is unknown, or one axes is given for several.

    Source: Chen et al., arXiv 2410.06024, figure 3, bottom; the controls are ours.
    """
    names = (names,) if isinstance(names, str) else names
    for name in names:
        check_choice("measure", name, MEASURES)
    if lens.measures is None:
        raise ValueError("A figure of measures needs them; this lens was run without. Run it with measures=True.")
    check_choice("against", against, ("layer", "order"))
    figure, panels = new_panels(ax, len(names), (3.1, 2.5))
    for panel, name in zip(panels, names, strict=True):
        if isinstance(lens, JointJetLens):
            _bars_of(panel, lens, name)
        else:
            _lines_of(panel, lens, name, against, log)
        name_axes(panel, MEASURE_NAMES[name])
    if legend and isinstance(lens, IterativeJetLens):
        drawn = max((panel.lines for panel in panels), key=len)  # a logarithmic axis may omit some
        controls = [line for line in drawn if line.get_label() == "control"]
        lines = [line for line in drawn if line not in controls]
        short_legend(panels[-1], lines, controls[:1], outside=ax is None)
    return figure


def _joint_cells(
    lens: JointJetLens, prompt: int, places: list[int], top: int | None
) -> tuple[list[str], list[list[str]], list[list[float]]]:
    """Row labels with weights, best tokens, and what is added to their logits."""
    weights, chosen, found = best_of_components(lens, prompt, places, top)
    names = lens.texts(found.indices)
    labels = [f"{lens.labels[i]}  {float(weights[i]):.2f}" for i in chosen]
    texts = [[visible(names[best]) for best in row] for row in found.indices[..., 0].tolist()]
    return labels, texts, found.values[..., 0].tolist()


def _iterative_cells(
    lens: IterativeJetLens, k: int, prompt: int, places: list[int]
) -> tuple[list[str], list[list[str]], list[list[float]] | None]:
    """Layers, best tokens (borrowed ones in square brackets), and KL."""
    best = lens.top_ids[:, k, prompt, places, 0]
    names = lens.token_names
    texts = [[visible(names[token]) for token in row] for row in best.tolist()]
    if lens.own_top_ids is not None:
        borrowed = lens.borrowed[:, k, prompt, places].tolist()
        texts = [
            [f"[{word}]" if b else word for word, b in zip(*row, strict=True)]
            for row in zip(texts, borrowed, strict=True)
        ]
    values = None if lens.measures is None else lens.measures.kl[:, k, prompt, places].tolist()
    return list(lens.labels), texts, values


def _lines_of(panel: Axes, lens: IterativeJetLens, name: str, against: str, log: bool | None) -> None:
    """Draw one measure of an iterative lens, and its control."""
    spread = len(lens.tokens) >= FEWEST
    table = lens.average(include_sinks=lens.only_sinks, spread=spread)
    by_order = against == "layer"
    lines, ticks = (lens.orders, lens.labels) if by_order else (lens.labels, lens.orders)
    column, other = ("order", "layer") if by_order else ("layer", "order")
    is_log = panel.get_yscale() == "log"
    if name not in ("kl", "remainder_norm"):
        log = False
    elif log is None:
        log = is_log or _spans_decades(table[[c for c in (name, f"control_{name}") if c in table]].to_numpy())
    if log != is_log:
        panel.set_yscale("log" if log else "linear")

    def draw(rows: pd.DataFrame, column: str, **style: Any) -> None:
        above = rows[column] > ROUNDING if log else rows[column].notna()
        if above.any():
            panel.plot(range(len(ticks)), rows[column].where(above), **style)
            if spread:
                ends = [rows[f"{column}_{end}"].where(above).to_numpy(float) for end in ("low", "high")]
                panel.fill_between(range(len(ticks)), *ends, color=style["color"], alpha=0.15, lw=0)

    for i, line in enumerate(lines):
        rows = table[table[column] == line].set_index(other).loc[ticks]
        look = {"color": COLORS[i % len(COLORS)] if by_order else depth_color(i, len(lines))}
        look["marker"] = MARKERS[i % len(MARKERS)]
        draw(rows, name, ms=4, lw=1.3, label=f"order {line}" if by_order else str(line), **look)
        if lens.control is not None:
            draw(rows, f"control_{name}", ls="--", lw=1, ms=3, mfc="white", label="control", **look)
    if by_order:
        name_ticks(panel, lens.labels)
    else:
        panel.set_xticks(range(len(ticks)), [str(tick) for tick in ticks])
        name_axes(panel, x="order")


def _spans_decades(values: np.ndarray) -> bool:
    """Whether values above rounding span two decades."""
    values = values[values > ROUNDING]
    return len(values) > 0 and bool(values.max() > 100 * values.min())


def _bars_of(panel: Axes, lens: JointJetLens, name: str) -> None:
    """Draw one measure of a joint lens, of uniform weights (light), and of random centers with either (gray)."""
    spread = len(lens.tokens) >= FEWEST
    table = lens.average(include_sinks=lens.only_sinks, spread=spread)
    panel.bar(range(len(table)), table[name], color=[COLORS[0], COLORS[4], "0.55", "0.8"], width=0.6)
    if spread:
        panel.vlines(range(len(table)), table[f"{name}_low"], table[f"{name}_high"], color="0.2", lw=1)
    panel.set_xticks(range(len(table)), [kind.replace("_", "\n") for kind in table["weights"]])
