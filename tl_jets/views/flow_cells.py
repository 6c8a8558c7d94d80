"""What views of flows draw: one effect's flows by component, or by layer and position; whether it is closed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.core.decoder import in_unit
from tl_jets.core.markup import largest
from tl_jets.core.protocol import DECODER_STEP
from tl_jets.flows import Flow, JointFlow

# Prompt, read position and target, by their indices.
Cell = tuple[int, int, int]
FIRST: Cell = (0, -1, 0)
# Stands behind what is at an attention sink.
SINK = "\u2020"
KINDS = {"attn": "attention", "mlp": "MLP", "block": "block", "other": "sources and edits"}
_LAYER = re.compile(r"L(\d+)([HN])\d+|(\d+)_(attn|mlp|block)")


class Grid(NamedTuple):
    """Flows of one kind of component [row, write_pos], a row for each layer; of sources and edits, for each label."""

    kind: str
    rows: list[str]
    values: Float[Tensor, "row write_pos"]


def check_cell(shape: Sequence[int], cell: Cell) -> Cell:
    """The cell by indices from 0; ValueError unless it is within a shape [batch, pos, target]."""
    if len(cell) != 3 or not all(-n <= i < n for i, n in zip(cell, shape, strict=True)):
        raise ValueError(
            f"cell must be indices of prompt, read position and target within {list(shape)}; got {cell!r}."
        )
    batch, pos, target = (i % n for i, n in zip(cell, shape, strict=True))
    return batch, pos, target


def of_cell(values: Float[Tensor, "part batch pos target *rest"], cell: Cell) -> Tensor:
    """The values of one cell."""
    return values[(slice(None), *cell)]


def grids(flow: Flow, cell: Cell) -> list[Grid]:
    """Flows by layer and position of the write, real positions only; heads and neurons of a layer are added up."""
    check_cell(flow.effect.shape, cell)
    if flow.by_position is None or flow.prompt_tokens is None:
        raise ValueError("A heatmap of positions needs flows by position; pass by_position=True to tl_jets.flow.")
    real = flow.prompt_tokens[cell[:2]] >= 0
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
    for label, values in zip(flow.labels, of_cell(flow.by_position, cell)[:, real], strict=True):
        kind, row = _place(label)
        found[kind][row] = found[kind].get(row, torch.zeros_like(values)) + values
    layers = sorted({int(row) for kind, rows in found.items() if kind != "other" for row in rows})
    zero = torch.zeros(int(real.sum()), dtype=flow.flow.dtype, device=flow.flow.device)
    for kind in (kind for kind in found if kind != "other" and found[kind]):
        found[kind] = {
            str(layer): found[kind].get(str(layer), zero) for layer in layers
        }  # rows of all kinds are aligned
    return [Grid(kind, list(rows), torch.stack(list(rows.values()))) for kind, rows in found.items() if rows]


def columns(flow: Flow, cell: Cell) -> tuple[list[str], list[bool]]:
    """Texts of the tokens whose positions are the columns of `grids`, and whether each is an attention sink."""
    assert flow.prompt_tokens is not None, "grids has refused a flow without positions"
    assert flow.prompt_sinks is not None
    ids, sinks = flow.prompt_tokens[cell[:2]], flow.prompt_sinks[cell[:2]]
    return [flow.token_names[i] for i in ids[ids >= 0].tolist()], sinks[ids >= 0].tolist()


def scale_of(found: list[Grid]) -> float:
    """The largest value of all, which has full color."""
    return largest(value for grid in found for value in grid.values.flatten().tolist())


def _place(label: str) -> tuple[str, str]:
    """Kind and row of a component."""
    match = _LAYER.match(label)
    if match is None:
        return "other", label
    return {"H": "attn", "N": "mlp"}.get(match[2] or "", match[4]), match[1] or match[3]


def places_in_depth(labels: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Where a graph puts components: x is the layer, MLPs half a layer later; attention is above 0, MLPs are below.

    Heads and neurons of one layer stand apart. Sources stand before the first layer, edits of streams before their own,
    the final norm at the end.
    """
    layers = [int(row) for kind, row in map(_place, labels) if kind != "other"]
    first, last = min(layers, default=0), max(layers, default=0)
    found: dict[str, tuple[float, float]] = {}
    count: dict[tuple[str, str], int] = {}
    for label in labels:
        kind, row = _place(label)
        if kind == "other":
            layer = re.search(r"blocks\.(\d+)", label)
            x = last + 1.0 if label == DECODER_STEP else int(layer[1]) - 0.25 if layer else first - 1.0
            found[label] = (x, 0.0)
            continue
        before = count[kind, row] = count.get((kind, row), -1) + 1
        height = {"attn": 1.0, "mlp": -1.0}.get(kind, 0.0)
        found[label] = (int(row) + (0.5 if kind == "mlp" else 0.0), height * (1 + 0.6 * before))
    return found


def at_sinks(flow: Flow, cell: Cell) -> list[bool]:
    """Whether more than half of each component's flow, in absolute sum, is written at attention sinks."""
    if flow.by_position is None or flow.prompt_sinks is None:
        return [False] * len(flow.labels)
    sizes = of_cell(flow.by_position, cell).abs()
    return (sizes[:, flow.prompt_sinks[cell[:2]]].sum(1) > sizes.sum(1) / 2).tolist()


def effect_text(found: Flow | JointFlow, cell: Cell) -> str:
    """The effect in words: `effect -2.09 logits on ·Paris`."""
    b, p, t = check_cell(found.effect.shape, cell)
    target = found._target_text(found.token_names, b, p, t)
    return f"effect {float(found.effect[cell]):+.3g} on {target}{in_unit(found.unit)}"


def open_text(found: Flow | JointFlow, cell: Cell) -> str:
    """Empty for a closed effect; else that it is open, and by how much."""
    if bool(found.closed[cell]):
        return ""
    gap = found.gap_share[cell] if isinstance(found, Flow) else (found.gap / found.effect).abs()[cell]
    return f"OPEN: gap {100 * float(gap):.2g}% of the effect, this explains nothing"


def shortened(names: Sequence[Any], most: int = 24) -> list[str]:
    """Long names with an ellipsis in the middle."""
    return [name if len(name) <= most else f"{name[: most - 9]}\u2026{name[-8:]}" for name in map(str, names)]
