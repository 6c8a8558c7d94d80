"""`concat`: results of several batches of prompts as one, so that an average over a data set is one loop.

Which fields have a batch axis, and where, is what their annotations say (`"layer order batch pos"`). They are joined along
it; shorter batches are padded at the end of the position axis as results are: NaN, ids -1, `valid` False. `positions` and
`token_names` are merged, and tables with a column `batch` follow one another. All other fields (labels, options, units) must
be equal.

Example:
    >>> import tl_jets as tj
    >>> network = tj.ResidualNetwork(tj.load_tinydocs())
    >>> batches = [["This function is available on Unix and", "If the file"], ["A list of"]]
    >>> lens = concat(tj.iterative_jet_lens(network, batch) for batch in batches)
    >>> lens.tokens.shape, lens.valid.sum(1).tolist()
    (torch.Size([3, 8]), [8, 4, 4])
    >>> lens.average(spread=True)["kl"].round(1).tolist()[:2]
    [2.8, 5.8]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import cache
from itertools import zip_longest
from typing import Any, TypeVar, get_args, get_type_hints

import pandas as pd
import torch
from torch import Tensor

from tl_jets.core.averages import Averaged
from tl_jets.core.results import Result
from tl_jets.core.selection import shared_positions

Kind = TypeVar("Kind", bound=Averaged)

# Axes by which batches may differ, in this order in every tensor.
AXES = ["batch", "pos"]
# Values of settings in an error are cut here.
MOST_CHARACTERS = 200


def concat(results: Iterable[Kind], *, rows: Sequence[Sequence[int]] | None = None) -> Kind:
    """The results of several batches of prompts as one result, prompts in order.

    Equal to one call on all prompts, up to rounding; resampled ablations draw within each call. Results hold their model and
    seed, which must be equal; nothing can check the hooks that were on it. What belongs to the running model
    (`JointJetLens.center_top_tokens`) is gone, as in a loaded result.

    Args:
        results: Results of one kind and one set of options: `IterativeJetLens`, `JointJetLens`, `PathStatistics`,
            `AblationEffect` or `Interactions`. Targets that differ by prompt are passed to the calls as ids [batch, pos, target].
        rows: Place of each result's prompts in the whole, each place once; None: one result after another.

    Raises:
        TypeError: Results of several kinds, or of one without an `average`.
        ValueError: No results, a label or an option differs, or `rows` are not one place a prompt; the message names it.

    Cost: a copy of all tensors.

    Example: in the docstring of `tl_jets.core.concatenation`.
    """
    parts: list[Any] = list(results)
    if not parts:
        raise ValueError("concat needs at least one result; got none.")
    check_joinable(parts)
    lengths = [part.tokens.shape[1] for part in parts]
    if len(set(lengths)) > 1 and not hasattr(parts[0], "valid"):
        raise ValueError(
            f"{type(parts[0]).__name__} has no padding, so all must have as many positions; got {min(lengths)} and {max(lengths)}."
        )
    return _joined(parts, max(lengths), _places(parts, rows))


def check_joinable(results: Sequence[Any]) -> None:
    """Raise TypeError unless the results are of one kind that `concat` joins."""
    kinds = list(dict.fromkeys(type(result) for result in results))
    if len(kinds) > 1 or not isinstance(results[0], Averaged):
        raise TypeError(
            "concat joins lenses, path statistics, ablation effects or interactions, all of one kind; got "
            f"{', '.join(kind.__name__ for kind in kinds)}."
        )


def _places(parts: Sequence[Any], rows: Sequence[Sequence[int]] | None) -> list[Tensor]:
    """Places of each part's prompts in the whole."""
    sizes = [len(part.tokens) for part in parts]
    if rows is None:
        return list(torch.arange(sum(sizes), device="cpu").split(sizes))
    if [len(own) for own in rows] != sizes or sorted(i for own in rows for i in own) != list(range(sum(sizes))):
        raise ValueError(f"rows must hold each of 0..{sum(sizes) - 1} once, {sizes} a result; got {rows!r}.")
    return [torch.tensor(list(own), device="cpu") for own in rows]


def _joined(parts: Sequence[Any], length: int, rows: Sequence[Tensor], prefix: str = "") -> Any:
    """One result of several of one kind, whose position axis is padded to `length`; `rows` as from `_places`."""
    kind, found = type(parts[0]), {}
    # Settings first: they say better than shapes what differs.
    for field in sorted(fields(kind), key=lambda field: isinstance(getattr(parts[0], field.name), Tensor | Result)):
        name, values = prefix + field.name, [getattr(part, field.name) for part in parts]
        if field.metadata.get("handle"):
            found[field.name] = None
        elif name == "positions":
            found[field.name] = _positions(parts, length, rows)
        elif name == "token_names":
            found[field.name] = _token_names(values)
        elif all(isinstance(value, Tensor) for value in values):
            found[field.name] = _stacked(name, values, batch_axes(kind)[field.name], length, rows)
        elif all(isinstance(value, Result) for value in values):
            found[field.name] = _joined(values, length, rows, f"{name}.")
        elif all(isinstance(value, pd.DataFrame) for value in values):
            found[field.name] = _tables(name, values, rows)
        else:
            found[field.name] = _same(name, values)
    return kind(**found)


@cache
def batch_axes(kind: type) -> dict[str, int]:
    """Index from the end of the batch axis of every tensor of a kind of result; pos is the next one."""
    found = {}
    for name, hint in get_type_hints(kind).items():
        for tensor in (each for each in (hint, *get_args(hint)) if hasattr(each, "dim_str")):
            axes = tensor.dim_str.split()
            at = [i for i in range(len(axes)) if axes[i : i + 2] == AXES]
            if len(at) != 1:
                raise NotImplementedError(f"concat needs axes [..., batch, pos, ...]; {name} has {axes}.")
            found[name] = at[0] - len(axes)
    return found


def _stacked(name: str, values: Sequence[Tensor], axis: int, length: int, rows: Sequence[Tensor]) -> Tensor:
    """Tensors [..., batch, pos, ...] in one whose pos is `length`: each value's prompts along `axis` at its `rows`."""
    first = values[0]
    fill = False if first.dtype is torch.bool else float("nan") if first.is_floating_point() else -1
    shape = list(first.shape)
    shape[axis], shape[axis + 1] = sum(map(len, rows)), length
    whole = first.new_full(shape, fill)
    for value, own in zip(values, rows, strict=True):
        if (value.dtype, value.device, _others(value, axis)) != (first.dtype, first.device, _others(first, axis)):
            raise ValueError(
                f"{name} must have one dtype, device and shape in all results, but for batch (axis {axis}) and pos; got "
                f"{_said(first)} and {_said(value)}."
            )
        part = whole.narrow(axis + 1, 0, value.shape[axis + 1])
        part.index_copy_(axis, own.to(value.device), value)
    return whole


def _others(value: Tensor, axis: int) -> list[int]:
    """Sizes of the axes other than batch and pos."""
    shape = list(value.shape)
    del shape[axis], shape[axis + 1]
    return shape


def _positions(parts: Sequence[Any], length: int, rows: Sequence[Tensor]) -> list[int] | Tensor:
    """Positions as one call gives them: a list if all prompts have the same, else [batch, pos]."""
    keep = [getattr(part, "valid", torch.ones_like(part.tokens, dtype=torch.bool)) for part in parts]
    places = [
        torch.as_tensor(part.positions, device=real.device).expand(real.shape).masked_fill(~real, -1)
        for part, real in zip(parts, keep, strict=True)
    ]
    at = -2, length, rows
    return shared_positions(_stacked("positions", places, *at), _stacked("valid", keep, *at))


def _token_names(values: Sequence[dict[int, str]]) -> dict[int, str]:
    """All names of tokens, by id; ValueError if one id has two."""
    found: dict[int, str] = {}
    for names in values:
        for token, text in names.items():
            if found.setdefault(token, text) != text:
                raise ValueError(
                    f"token_names must be of one tokenizer; token {token} is {found[token]!r} and {text!r}."
                )
    return dict(sorted(found.items()))


def _tables(name: str, values: Sequence[pd.DataFrame], rows: Sequence[Tensor]) -> pd.DataFrame:
    """The rows of all tables, their numbers of prompts (column batch) moved to the whole."""
    columns = [list(value.columns) for value in values]
    if any(own != columns[0] for own in columns) or "batch" not in columns[0]:
        raise ValueError(f"{name} must have the same columns, batch among them, in all results; got {columns}.")
    placed = [
        value.assign(batch=own[torch.tensor(value["batch"].tolist(), dtype=torch.long, device="cpu")].tolist())
        for value, own in zip(values, rows, strict=True)
    ]
    return pd.concat(placed, ignore_index=True)


def _same(name: str, values: Sequence[Any]) -> Any:
    """A label or an option, which must be equal in all results."""
    first = values[0]
    for value in values:
        if type(value) is type(first) and (isinstance(first, Tensor | Result | pd.DataFrame) or value == first):
            continue
        if isinstance(value, list) and isinstance(first, list):
            differing = (i for i, (a, b) in enumerate(zip_longest(first, value)) if a != b)
            name = f"{name} (first at index {next(differing)})"
        raise ValueError(f"{name} must be equal in all results; got {_said(first)} and {_said(value)}.")
    return first


def _said(value: Any) -> str:
    """A value in an error: tensors and results by kind and size."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    text = type(value).__name__ if isinstance(value, Result | pd.DataFrame) else repr(value)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."
