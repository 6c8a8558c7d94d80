"""Which layers, positions and tokens a lens reads, and how its results name them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_jets.expansion.expand import CENTER_SCALES
from tl_jets.network import ResidualNetwork
from tl_jets.stages import FINAL_STREAM
from tl_jets.trace import Trace

TargetInput = str | int | Sequence[str | int] | Tensor


@dataclass(frozen=True)
class Rows:
    """Real positions among the chosen ones, flattened, and the way back to [batch, pos]."""

    positions: list[int]
    keep: Bool[Tensor, "batch pos"]

    @classmethod
    def of(cls, trace: Trace, positions: int | Sequence[int] | None) -> Rows:
        length = trace.tokens.shape[1]
        wanted = range(length) if positions is None else [positions] if isinstance(positions, int) else list(positions)
        for position in wanted:
            if not -length <= position < length:
                raise ValueError(f"positions must lie in {-length}..{length - 1}; got {position}.")
        chosen = [position % length for position in wanted]
        return cls(chosen, trace.valid[:, chosen])

    def take(self, values: Tensor) -> Tensor:
        """[batch, pos, ...] -> [row, ...]."""
        return values[:, self.positions][self.keep]

    def spread(self, values: Tensor, axis: int = -1, fill: float = float("nan")) -> Tensor:
        """[..., row, ...] -> [..., batch, pos, ...], with `fill` where a position is padding."""
        moved = values.movedim(axis, 0)
        out = moved.new_full((*self.keep.shape, *moved.shape[1:]), fill)
        out[self.keep] = moved
        axis = axis % values.ndim
        return out.movedim((0, 1), (axis, axis + 1))


def check_options(order: Any, center_scale: str) -> None:
    if isinstance(order, bool) or not isinstance(order, int):
        raise TypeError(f"order must be an integer >= 0; got {order!r}.")
    if order < 0:
        raise ValueError(f"order must be an integer >= 0; got {order}.")
    if center_scale not in CENTER_SCALES:
        raise ValueError(f"center_scale must be one of {CENTER_SCALES}; got {center_scale!r}.")


def trace_of(network: ResidualNetwork, text_or_tokens: Any, attention_mask: Any, cache: Any) -> Trace:
    if not isinstance(text_or_tokens, Trace):
        return network.trace(text_or_tokens, attention_mask=attention_mask, cache=cache)
    if text_or_tokens.network.view is not network.view:
        raise ValueError("A trace must be of the same model; this one is of another. Trace again.")
    if attention_mask is not None or cache is not None:
        raise ValueError("A trace already holds its attention mask and streams; leave attention_mask and cache out.")
    return Trace(network, text_or_tokens.recording)


def stream_labels(network: ResidualNetwork, layers: Sequence[int | str] | None, incl_mid: bool) -> list[str]:
    """Labels of the streams to read, in the order of the network or of `layers`."""
    known = [label for label in network.labels if label.endswith(("_pre", "_mid")) or label == FINAL_STREAM]
    every = sorted(
        known,
        key=lambda label: (
            label == FINAL_STREAM,
            int(label.split("_")[0]) if "_" in label and label[0].isdigit() else 0,
            label.endswith("_mid"),
        ),
    )
    pre = [label for label in every if not label.endswith("_mid")]
    if layers is None:
        return every if incl_mid else pre
    chosen = []
    for layer in layers:
        if isinstance(layer, int) and -len(pre) <= layer < len(pre):
            chosen.append(pre[layer])
        elif layer in every:
            chosen.append(str(layer))
        else:
            raise ValueError(f"layers must be 0..{len(pre) - 1} or stream labels such as {every[:2]}; got {layer!r}.")
    if not chosen:
        raise ValueError("layers must name at least one stream; got none. Pass None for all.")
    return chosen


def read_targets(
    network: ResidualNetwork, targets: TargetInput | None, trace: Trace
) -> tuple[Tensor | None, list[str | int] | None]:
    """Target ids [batch, pos, target] and how they were asked for."""
    if targets is None:
        return None, None
    shape = trace.tokens.shape
    if isinstance(targets, Tensor):
        if targets.is_floating_point() or targets.shape[:2] != shape or targets.ndim > 3:
            raise ValueError(
                f"A tensor of targets must hold ids [batch, pos] or [batch, pos, target] with batch and pos "
                f"{tuple(shape)}; got {targets.dtype} {tuple(targets.shape)}."
            )
        ids = targets.long().to(trace.tokens.device).reshape(*shape, -1)
        return ids, list(range(ids.shape[-1]))
    names = [targets] if isinstance(targets, (str, int)) else list(targets)
    ids = torch.tensor([_single_token(network, name) for name in names], device=trace.tokens.device)
    return ids.expand(*shape, -1), names


def _single_token(network: ResidualNetwork, target: Any) -> int:
    if isinstance(target, int):
        return target
    if not isinstance(target, str):
        raise TypeError(f"targets must be strings, token ids, or a tensor of ids; got {type(target).__name__}.")
    if network.tokenizer is None:
        raise ValueError(f"A target string needs a tokenizer; the model has none. Pass the id of {target!r}.")
    ids = network.tokenizer(target, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(
            f"A target must be a single token; {target!r} is {len(ids)}: "
            f"{[network.tokenizer.decode([i]) for i in ids]}. Mind the leading space, or pass a token id."
        )
    return int(ids[0])
