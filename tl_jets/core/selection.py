"""Selects layers, positions and target tokens; slices of the batch and position dimensions."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_jets.calculus import CENTER_SCALES
from tl_jets.core.labels import LabelInput, is_label
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.options import check_choice, check_integers
from tl_jets.core.protocol import FINAL_STREAM
from tl_jets.core.structure import Structure
from tl_jets.core.tokens import check_text, unescaped
from tl_jets.core.trace import Trace

# Texts or ids for all prompts; a list of such lists, one per prompt; or ids [batch, pos, target].
TargetInput = str | int | Sequence[str | int] | Sequence[Sequence[str | int]] | Tensor
# Name of the default target in results: the model's own best token.
ANSWER = "<answer>"


@dataclass(frozen=True)
class Rows:
    """Flat index of the selected non-padding tokens, with scatter back to [batch, pos].

    Attributes:
        positions: Positions among each prompt's real tokens, for results: one list if all prompts have the same, else
            [batch, pos], -1 at padding.
        index: The selected cells' positions in the padded rows [batch, pos].
        keep: Which of them are real tokens [batch, pos].
        places_of_cells: Position of every cell in its prompt [batch, pos], -1 at padding; on the CPU.
    """

    positions: list[int] | Int[Tensor, "batch pos"]
    index: Int[Tensor, "batch pos"]
    keep: Bool[Tensor, "batch pos"]
    places_of_cells: Int[Tensor, "batch pos"]

    @classmethod
    def of(cls, trace: Trace, positions: int | Sequence[int] | None) -> Rows:
        """The tokens at `positions` among each prompt's real tokens, -1 its last; None for all, as in the padded row."""
        valid = trace.valid
        if positions is None:
            return cls.at_cells(valid, torch.arange(valid.shape[1], device=valid.device).expand(valid.shape))
        # Found on the device and on the CPU: every copy, either way, waits for the device.
        on_host = valid.cpu()
        wanted = _read_positions(positions, on_host.sum(1).tolist())
        index, places = _cells_at(valid, wanted), _places(on_host, _cells_at(on_host, wanted))
        return cls(shared_positions(places, places >= 0, _places(valid, index)), index, valid.gather(1, index), places)

    @classmethod
    def at_cells(cls, valid: Bool[Tensor, "batch length"], index: Int[Tensor, "batch pos"]) -> Rows:
        """The real tokens among the cells at `index` of the padded rows."""
        places = _places(valid, index)
        cells = places.cpu()  # one copy: every look at a device waits for it
        return cls(shared_positions(cells, cells >= 0, places), index, valid.gather(1, index), cells)

    @property
    def places(self) -> Int[Tensor, " row"]:
        """Position of every row in its prompt, on the CPU."""
        return self.places_of_cells[self.places_of_cells >= 0]

    @property
    def are_real(self) -> bool:
        """Whether all selected cells are real tokens; does not synchronize a device."""
        return bool((self.places_of_cells >= 0).all())

    @property
    def cells(self) -> list[int] | Tensor:
        """`index`, as a list if it is the same for all prompts."""
        index = self.index.cpu()
        return index[0].tolist() if bool((index == index[0]).all()) else self.index

    def columns(self, what: str) -> list[int]:
        """The positions in the padded row, which must be real and the same in every prompt."""
        index = self.index.cpu()
        if not self.are_real or not bool((index == index[0]).all()):
            raise ValueError(
                f"{what} must be real tokens, at the same positions of the padded row in every prompt; got {index.tolist()}, "
                f"of which {self.keep.tolist()} are real. Pass prompts of one length, or one at a time."
            )
        return index[0].tolist()

    def at(self, values: Tensor, axis: int = 0) -> Tensor:
        """[..., batch, pos, ...] -> [..., batch, out_pos, ...], padding included; `axis` is that of batch."""
        batch = torch.arange(len(self.index), device=values.device)[:, None]
        return values[(slice(None),) * axis + (batch, self.index.to(values.device))]

    def take(self, values: Tensor) -> Tensor:
        """[batch, pos, ...] -> [row, ...]."""
        batch, positions = self.cells_of_rows
        return values[batch.to(values.device), positions.to(values.device)]

    @cached_property
    def kept(self) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"]]:
        """Indices where `keep` is True, computed once, as a mask synchronizes the device at every use."""
        if self.are_real:
            n_batch, n_pos = self.keep.shape
            cells = torch.arange(n_batch * n_pos, device=self.keep.device)
            return cells // n_pos, cells % n_pos
        batch, cell = self.keep.nonzero(as_tuple=True)
        return batch, cell

    @cached_property
    def cells_of_rows(self) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"]]:
        """Prompt and position in the padded row of every row."""
        return self.kept[0], self.index[self.kept]

    def pick(self, values: Tensor) -> Callable[[slice], Tensor]:
        """[batch, pos, ...] as a function of a slice of rows, which copies only those rows."""
        batch, positions = self.cells_of_rows
        return lambda rows: values[batch[rows], positions[rows]]

    def spread(self, values: Tensor, axis: int = -1, fill: float | int = float("nan")) -> Tensor:
        """[..., row, ...] -> [..., batch, pos, ...], with `fill` at padding."""
        moved = values.movedim(axis, 0)
        out = moved.new_full((*self.keep.shape, *moved.shape[1:]), fill)
        out[tuple(cells.to(out.device) for cells in self.kept)] = moved
        axis = axis % values.ndim
        return out.movedim((0, 1), (axis, axis + 1))


def _cells_at(valid: Bool[Tensor, "batch length"], wanted: list[int]) -> Int[Tensor, "batch pos"]:
    """Cells in the padded rows of positions among each prompt's real tokens; its last padding for those that it has not."""
    lengths, at = valid.sum(1)[:, None], torch.tensor(wanted, device=valid.device)
    places = torch.where(at < 0, lengths + at, at)
    exists = (places >= 0) & (places < lengths)
    order = (~valid).long().argsort(dim=1, stable=True)  # real tokens first
    return order.gather(1, torch.where(exists, places, valid.shape[1] - 1))


def _places(valid: Bool[Tensor, "batch length"], index: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """The position of every cell in its prompt, -1 at padding."""
    return (valid.cumsum(1) - 1).gather(1, index).masked_fill(~valid.gather(1, index), -1)


def shared_positions(
    places: Int[Tensor, "batch pos"], keep: Bool[Tensor, "batch pos"], otherwise: Tensor | None = None
) -> list[int] | Int[Tensor, "batch pos"]:
    """`Rows.positions` from the place of every cell in its prompt, -1 at padding; `otherwise` are the same on a device."""
    common = places.amax(0)
    is_common = bool(((places == common) | ~keep).all() and (common >= 0).all())
    return common.tolist() if is_common else places if otherwise is None else otherwise


def model_logits(trace: Trace, rows: Rows) -> Callable[[slice], Tensor] | None:
    """Function from a slice of rows to the model's additive logits; None unless all is float32 without a softcap."""
    if trace.logits is None or trace.decoder.transform is not None or trace.logits.dtype != torch.float32:
        return None
    same = trace[FINAL_STREAM].dtype == trace.decoder.W_U.dtype == torch.float32
    return rows.pick(trace.logits) if same else None


def check_options(center_scale: str, top_k: Any, chunk_size: Any) -> None:
    """Raise for invalid lens options; the message names the option."""
    check_integers(1, top_k=top_k, chunk_size=chunk_size)
    check_choice("center_scale", center_scale, CENTER_SCALES)


def positions_of(positions: Sequence[int] | Tensor, prompt: int) -> list[int]:
    """The `positions` of a result that are of one prompt."""
    return positions[prompt].tolist() if isinstance(positions, Tensor) else list(positions)


def positions_at(positions: Sequence[int] | Tensor, batch: Tensor, cell: Tensor) -> list[int]:
    """The `positions` of a result at some cells, within their prompts."""
    return positions[batch, cell].tolist() if isinstance(positions, Tensor) else [positions[i] for i in cell.tolist()]


def _read_positions(positions: Any, lengths: list[int]) -> list[int]:
    """The requested positions as integers, checked against the prompts' numbers of real tokens."""
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
    longest = max(lengths)
    for position in wanted:
        if not -longest <= position < longest:
            raise ValueError(
                f"positions must lie in {-longest}..{longest - 1} for this input; got {position}. They count real tokens."
            )
    for length in set(lengths):
        found = [position % length for position in wanted if -length <= position < length]
        if len(set(found)) < len(found):
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
    by_id, tokenizer = re.fullmatch(r"id:(\d+)", target), network.tokenizer
    if tokenizer is None and not by_id:
        raise ValueError(f"A target string needs a tokenizer; the model has none. Pass the id of {target!r}.")
    check_text("A target", target)
    ids: list[int] = []
    if tokenizer is not None:
        for text in dict.fromkeys((target, unescaped(target))):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            unknown = ids == [getattr(tokenizer, "unk_token_id", None)] and text != tokenizer.unk_token
            if len(ids) == 1 and not unknown:
                return int(ids[0])
    if by_id:
        return int(by_id[1])
    raise ValueError(
        f"A target must be a single token that the tokenizer knows; {target!r} is {len(ids)}: "
        f"{[network.tokenizer.decode([i]) for i in ids]}. Mind the leading space, or pass a token id."
    )


# As in TransformerLens, a tuple is (start, stop, step), and an int drops the dimension.
SliceInput = int | slice | tuple[int, ...] | list[int] | Tensor


def read_slice(
    name: str, index: Any, chosen: list[int] | int | Tensor | None, size: int
) -> tuple[int | slice | list[Any], list[int] | int | Tensor]:
    """A slice as PyTorch takes it, and the entries of `chosen` (None: all of `size`) that it keeps."""
    if isinstance(chosen, int) or (isinstance(chosen, Tensor) and chosen.ndim < 2):
        raise ValueError(
            f"A slice of the {name} dimension needs one; an int index dropped it from this cache. Slice the whole cache, or "
            f"index with [int] in place of int."
        )
    index = index.tolist() if isinstance(index, Tensor) else slice(*index) if isinstance(index, tuple) else index
    size = size if chosen is None else chosen.shape[1] if isinstance(chosen, Tensor) else len(chosen)
    left = torch.arange(size, device="cpu")[index]
    if left.ndim > 1 or not left.numel():
        raise ValueError(
            f"A slice of the {name} dimension must keep some of its {size} entries; "
            f"{index!r} keeps {left.tolist()}. Pass an int, a slice, or indices."
        )
    if isinstance(chosen, Tensor):
        return index, chosen[:, left.to(chosen.device)]
    return index, left.tolist() if chosen is None else torch.tensor(chosen, device="cpu")[left].tolist()
