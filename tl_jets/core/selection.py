"""Selects layers, positions and target tokens."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_jets.calculus import CENTER_SCALES
from tl_jets.core.labels import LabelInput, is_label
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.options import check_integers
from tl_jets.core.protocol import FINAL_STREAM
from tl_jets.core.structure import Structure
from tl_jets.core.tokens import check_text
from tl_jets.core.trace import Trace

# Texts or ids for all prompts; a list of such lists, one per prompt; or ids [batch, pos, target].
TargetInput = str | int | Sequence[str | int] | Sequence[Sequence[str | int]] | Tensor
# Name of the default target in results: the model's own best token.
ANSWER = "<answer>"


@dataclass(frozen=True)
class Rows:
    """Flat index of the selected non-padding tokens, with scatter back to [batch, pos].

    `positions` count from the start of the padded row, `places` in the prompt without padding; `keep` masks real ones.
    """

    positions: list[int]
    keep: Bool[Tensor, "batch pos"]
    places: Int[Tensor, " row"]

    @classmethod
    def of(cls, trace: Trace, positions: int | Sequence[int] | None) -> Rows:
        """The real tokens among `positions`; None for all."""
        length = trace.valid.shape[1]
        wanted = _read_positions(positions, length)
        chosen = [position % length for position in wanted]
        keep = trace.valid[:, chosen]
        for place, position in enumerate(wanted):
            if position < 0 and 0 < int(keep[:, place].sum()) < len(keep):
                raise ValueError(
                    f"Negative positions count from the end of the padded row; {position} is padding in prompts "
                    f"{(~keep[:, place]).nonzero()[:, 0].tolist()}, which are shorter. Pass prompts of one length, or tokens "
                    f"padded on the left with their attention_mask, or positions=None and choose by `valid`."
                )
        if not keep.any():
            raise ValueError(f"positions must hold a real token; got {chosen}, all padding. Choose others.")
        return cls(chosen, keep, (trace.valid.cumsum(1) - 1)[:, chosen][keep])

    def take(self, values: Tensor) -> Tensor:
        """[batch, pos, ...] -> [row, ...]."""
        return values[:, self.positions][self.keep]

    def pick(self, values: Tensor) -> Callable[[slice], Tensor]:
        """[batch, pos, ...] as a function of a slice of rows, which copies only those rows."""
        batch, place = self.keep.nonzero(as_tuple=True)
        positions = torch.tensor(self.positions, device=place.device)[place]
        return lambda rows: values[batch[rows], positions[rows]]

    def spread(self, values: Tensor, axis: int = -1, fill: float | int = float("nan")) -> Tensor:
        """[..., row, ...] -> [..., batch, pos, ...], with `fill` at padding."""
        moved = values.movedim(axis, 0)
        out = moved.new_full((*self.keep.shape, *moved.shape[1:]), fill)
        out[self.keep] = moved
        axis = axis % values.ndim
        return out.movedim((0, 1), (axis, axis + 1))


def model_logits(trace: Trace, rows: Rows) -> Callable[[slice], Tensor] | None:
    """Function from a slice of rows to the model's additive logits; None unless all is float32 without a softcap."""
    if trace.logits is None or trace.decoder.transform is not None or trace.logits.dtype != torch.float32:
        return None
    same = trace[FINAL_STREAM].dtype == trace.decoder.W_U.dtype == torch.float32
    return rows.pick(trace.logits) if same else None


def check_options(center_scale: str, top_k: Any, chunk_size: Any) -> None:
    """Raise for invalid lens options; the message names the option."""
    check_integers(1, top_k=top_k, chunk_size=chunk_size)
    if center_scale not in CENTER_SCALES:
        raise ValueError(f"center_scale must be one of {CENTER_SCALES}; got {center_scale!r}.")


def _read_positions(positions: Any, length: int) -> list[int]:
    """The requested positions as integers."""
    if positions is None:
        return list(range(length))
    try:
        wanted = [_index(positions)]
    except TypeError:
        try:
            wanted = [_index(position) for position in positions]
        except TypeError as error:
            raise TypeError(
                f"positions must be None, an integer or a sequence of integers; got {positions!r}. Write a slice as a "
                f"range."
            ) from error
    if not wanted:
        raise ValueError("positions must name at least one position; got none. Pass None for all.")
    for position in wanted:
        if not -length <= position < length:
            raise ValueError(f"positions must lie in {-length}..{length - 1} for this input; got {position}.")
    if len({position % length for position in wanted}) < len(wanted):
        raise ValueError(f"positions must be distinct, or averages would count some twice; got {wanted}.")
    return wanted


def _index(value: Any) -> int:
    """An integer of any library; booleans (perhaps a mask) are refused."""
    if isinstance(value, (bool, np.bool_)) or (isinstance(value, Tensor) and value.dtype is torch.bool):
        raise TypeError(f"got {value!r}")
    return operator.index(value)


def stream_labels(
    network: ResidualNetwork, layers: int | LabelInput | Sequence[int | LabelInput] | None, incl_mid: bool
) -> list[str]:
    """Labels of the streams to read, in the order of the network or of `layers`."""
    every = list(network.at("sublayer").streams)
    pre = [label for label in every if not label.endswith("_mid")]
    if layers is None:
        return every if incl_mid else pre
    if incl_mid:
        raise ValueError(
            "incl_mid adds streams to layers=None; got layers, too. Name the streams between attention and MLP among "
            "them, such as '0_mid'."
        )
    chosen = []
    for layer in [layers] if isinstance(layers, int) or is_label(layers) else layers:
        if isinstance(layer, int) and not isinstance(layer, bool) and -len(pre) <= layer < len(pre):
            chosen.append(pre[layer])
        elif is_label(layer) and network.label(layer) in every:
            chosen.append(network.label(layer))
        else:
            raise ValueError(
                f"layers must be 0..{len(pre) - 1}, stream labels such as {every[:2]}, or TransformerLens' names of streams "
                f"such as ('resid_post', 0); got {layer!r}."
            )
    if not chosen:
        raise ValueError("layers must name at least one stream; got none. Pass None for all.")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"layers must be distinct streams; got {chosen}. Leave the repeated ones out.")
    return chosen


def read_targets(
    network: Structure, targets: TargetInput | None, rows: Rows
) -> tuple[Tensor | None, list[str | int] | None]:
    """Target ids [batch, pos, target] at the selected positions, and their names; numbers where these differ."""
    if targets is None:
        return None, None
    shape, device = rows.keep.shape, rows.keep.device
    if isinstance(targets, Tensor):
        real = targets.is_floating_point() or targets.is_complex() or targets.dtype is torch.bool
        if real or targets.shape[:2] != shape or targets.ndim > 3 or targets.numel() == 0:
            raise ValueError(
                f"A tensor of targets must hold ids [batch, pos] or [batch, pos, target] with batch and pos "
                f"{tuple(shape)}, aligned with positions; got {targets.dtype} {tuple(targets.shape)}. Ids that are "
                f"the same everywhere may be a list, those of each prompt a list of lists."
            )
        ids = targets.long().to(device).reshape(*shape, -1)
        return ids, list(range(ids.shape[-1]))
    names: list[Any] = [targets] if isinstance(targets, (str, int)) else list(targets)
    if not names:
        raise ValueError("targets must name at least one token; got none. Pass None for no targets.")
    lists = [list(name) for name in names if isinstance(name, (list, tuple)) or getattr(name, "ndim", 0) == 1]
    if not lists:
        found = torch.tensor([_single_token(network, name) for name in names], device=device)
        return found.expand(*shape, -1), names
    n = len(lists[0])
    if len(lists) != len(names) or len(lists) != shape[0] or not n or any(len(own) != n for own in lists):
        raise ValueError(
            f"Targets of single prompts are one list a prompt, all of one length: {shape[0]} lists here, as in "
            f"targets=[[' Paris'], [' Rome']] of two prompts; got {targets!r}."
        )
    found = torch.tensor([[_single_token(network, name) for name in own] for own in lists], device=device)
    return found[:, None].expand(*shape, -1), lists[0] if len(lists) == 1 else list(range(n))


def _single_token(network: Structure, target: Any) -> int:
    token, d_vocab = _token_id(network, target), network.decoder.d_vocab
    if not 0 <= token < d_vocab:
        raise ValueError(f"targets must be token ids in 0..{d_vocab - 1}, or strings of one; got {target!r}.")
    return token


def _token_id(network: Structure, target: Any) -> int:
    if not isinstance(target, str):
        try:
            return _index(target)
        except TypeError as error:
            raise TypeError(f"targets must be strings, token ids, or a tensor of ids; got {target!r}.") from error
    if network.tokenizer is None:
        raise ValueError(f"A target string needs a tokenizer; the model has none. Pass the id of {target!r}.")
    check_text("A target", target)
    ids = network.tokenizer(target, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(
            f"A target must be a single token; {target!r} is {len(ids)}: "
            f"{[network.tokenizer.decode([i]) for i in ids]}. Mind the leading space, or pass a token id."
        )
    return int(ids[0])
