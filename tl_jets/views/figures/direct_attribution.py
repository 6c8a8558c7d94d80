"""Figure of direct attribution: what each component adds to an answer, beside what its ablation takes away."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tl_jets.core.decoder import in_unit
from tl_jets.core.selection import positions_at
from tl_jets.interventions.ablation_effects import AblationEffect
from tl_jets.lenses import JointJetLens
from tl_jets.views.figures.axes import name_axes, named_bars, new_panels, sign_colors, small_legend
from tl_jets.views.flow_cells import FIRST, Cell, check_cell, shortened
from tl_jets.views.names import largest_first

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def attributions(
    joint: JointJetLens,
    ablations: AblationEffect | None = None,
    *,
    cell: Cell = FIRST,
    top: int | None = 20,
    ax: Axes | None = None,
) -> Figure:
    """Bars of what each component adds to the centered logit of one target, largest first; the others in one gray bar.

    Args:
        joint: Result of `tl_jets.joint_jet_lens(linearize="detached")`, whose effects add up to the centered logit exactly;
            of another joint lens the title has its order.
        ablations: Result of `tl_jets.ablation_effect` for the same prompts, positions and targets: diamonds are what the
            centered logit loses if the component is ablated, which counts what later components make of it, too.
        cell: Indices of prompt, position and target.
        top: Number of components; None for all.
        ax: Axes to draw on; None for a new figure.

    Raises:
        ValueError: There is no such cell, top is below 1, or the ablations are of other prompts or targets.

    Example:
        >>> import tl_jets as tj
        >>> joint = tj.joint_jet_lens(tj.load_tinydocs(), "This function is available on Unix and", linearize="detached")
        >>> len(attributions(joint, top=4).axes[0].patches)
        5
    """
    index = _inside(joint, cell)
    values = joint.effects[(slice(None), *index)]
    order = largest_first(values, top)
    shown, names = values[order].tolist(), [joint.labels[i] for i in order]
    rest = float(values.sum()) - sum(shown)
    colors = sign_colors(shown)
    if len(order) < len(values):
        shown, names = [*shown, rest], [*names, f"{len(values) - len(order)} others"]
        colors.append("0.6")
    figure, (ax,) = new_panels(ax, 1, (5.5, 0.24 * len(shown) + 0.9))
    named_bars(ax, shortened(names), shown, colors=colors)
    if ablations is not None:
        lost = _lost(joint, ablations, index)
        places = [(i, lost[name]) for i, name in enumerate(names) if name in lost]
        ax.plot(
            [x for _, x in places], [i for i, _ in places], "D", ms=4, mfc="none", mec="0.15", label="lost if ablated"
        )
        small_legend(ax, loc="lower right")
    target = joint.token_names.get(int(joint.target_ids[index]), str(joint.target_names[index[2]]))
    what = f"added to the centered logit of {target!r}{in_unit(joint.unit)}; all: {float(values.sum()):+.3g}"
    kind = "exact (detached)" if joint.linearize == "detached" else f"jets of order {joint.order}"
    name_axes(ax, f"Direct attribution, {kind}", x=what)
    return figure


def _inside(joint: JointJetLens, cell: Cell) -> Cell:
    """The cell by indices from 0; ValueError unless the lens has it, at a real position."""
    index = check_cell(joint.effects.shape[1:], cell)
    if not bool(joint.valid[index[:2]]):
        raise ValueError(f"cell must be at a real position; prompt {cell[0]} is padded at {cell[1]}.")
    return index


def _lost(joint: JointJetLens, ablations: AblationEffect, index: Cell) -> dict[str, float]:
    """What the centered logit of a cell loses by each component's ablation, by the label of its write."""
    batch, pos = index[:2]
    row, column = torch.tensor([[batch], [pos]], device=joint.tokens.device)
    place = positions_at(joint.positions, row, column)[0]
    text = joint.token_names[int(joint.target_ids[index])]
    frame = ablations.to_dataframe()
    here = frame[(frame["batch"] == batch) & (frame["pos"] == place) & (frame["target"] == text)]
    if here.empty:
        raise ValueError(
            f"Ablations must be of the prompts, positions and targets of the lens; none is of {text!r} at position {place} of "
            f"prompt {batch}."
        )
    return {f"{step}_out": -value for step, value in zip(here["step"], here["centered"], strict=True)}
