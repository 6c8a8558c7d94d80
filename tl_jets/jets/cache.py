"""`JetCache`: the terms of an expansion on one input, and their remainder.

Like TransformerLens' `ActivationCache`, it maps names (here paths) to tensors [batch, pos, d_model], with `stack`, `to`,
`remove_batch_dim` and slices. Only `logits` allocates d_vocab. Terms and `remainder` sum to the model's value by
definition; `check` recomputes the terms independently.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tl_jets.calculus import CenterScale, norm_jet
from tl_jets.core.attribution import Yardstick
from tl_jets.core.notebook import SHOWN_ROWS, Shown, dataframe_html
from tl_jets.core.path import Path
from tl_jets.core.protocol import DECODER_STEP, FINAL_STREAM, Stage
from tl_jets.core.readout import TopTokens, top_tokens
from tl_jets.core.selection import Rows, TargetInput
from tl_jets.core.tokens import token_text
from tl_jets.core.trace import Trace
from tl_jets.jets.centers import Center
from tl_jets.jets.simplex import SimplexSolution

# As in TransformerLens, a tuple is (start, stop, step), and an int drops the dimension.
SliceInput = int | slice | tuple[int, ...] | list[int] | Tensor
# Relative tolerance of a check; float32 models reach about 1e-6.
ACCURACY = 1e-4


@dataclass(frozen=True)
class Check:
    """Result of `JetCache.check`.

    Attributes:
        sum_error: Largest difference between `truth` and the model, relative to the model's largest value.
        slopes: For each center, the exponent with which the jet's error falls as the step shrinks; k + 1 for a jet of
            order k. None where the error is within rounding.
        order: k.
        term_error: Largest difference between a term and its recomputation, relative to the term's largest summand or to
            rounding; None if terms are not compared.
    """

    sum_error: float
    slopes: dict[str, float | None]
    order: int
    term_error: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the errors are below 1e-4 and every slope is above k + 1/2."""
        errors = [self.sum_error] if self.term_error is None else [self.sum_error, self.term_error]
        return all(error < ACCURACY for error in errors) and all(
            slope is None or slope > self.order + 0.5 for slope in self.slopes.values()
        )


@runtime_checkable
class Expanded(Protocol):
    """The members of an expansion that a cache reads."""

    @property
    def stage(self) -> Stage | None:
        """The expanded stage; None for the decoder."""
        ...

    @property
    def steps(self) -> tuple[str, ...]:
        """Labels of the expanded steps."""
        ...

    @property
    def stream(self) -> str:
        """Label of the stream that the stage reads."""
        ...

    @property
    def centers(self) -> tuple[Center, ...]:
        """The centers of the expansion."""
        ...

    @property
    def center_scale(self) -> CenterScale:
        """How centers are rescaled inside gamma."""
        ...

    @property
    def kind(self) -> str:
        """`order 1`, or `detached`."""
        ...

    @property
    def order(self) -> int:
        """The order of the jets."""
        ...

    @property
    def linearize(self) -> str:
        """`"jet"` or `"detached"`."""
        ...

    def check(self, cache: JetCache) -> Check:
        """Recompute the terms and compare them."""
        ...


@dataclass(frozen=True, eq=False)
class JetCache(Shown, Mapping[str, Tensor]):
    """The terms of an expansion on one input, by path.

    Attributes:
        expansion: The expansion.
        trace: The trace of the input.
        terms: Path -> weighted term, [batch, pos, d_model]; at the decoder the input of `W_U` (`logits` adds w_i b_U).
        weights: w [center, batch, pos], in the order of `expansion.centers`. For detached terms of the decoder, the
            multiple of b_U of each term [path, batch, pos]: 1 for `ln_final_bias`, else 0.
        truth: The approximated tensor: the stream that the stage produces, or the final norm's output.
        solution: The solved weights and their certificate; None for given or uniform weights.
        prompts: Indices of the trace's prompts on the batch axis; an int if a slice dropped the axis; None for all.
        positions: Indices of its positions in the padded rows, likewise; [batch, pos] where prompts differ.
    """

    expansion: Expanded
    trace: Trace
    terms: dict[str, Tensor]
    weights: Tensor
    truth: Tensor
    solution: SimplexSolution | None = None
    prompts: list[int] | int | None = None
    positions: list[int] | int | Tensor | None = None

    def __getitem__(self, path: str | Path) -> Tensor:
        try:
            return self.terms[str(path)]
        except KeyError:
            raise KeyError(
                f"No term {str(path)!r}; the terms are {list(self.terms)[:12]} ({len(self)} in all)."
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.terms)

    def __len__(self) -> int:
        return len(self.terms)

    def __repr__(self) -> str:
        return (
            f"JetCache({len(self)} terms of {list(self.truth.shape)} for {', '.join(self.expansion.steps[:3])}, "
            f"{self.expansion.kind}; relative remainder {self.relative_remainder:.3g})"
        )

    @property
    def labels(self) -> list[str]:
        """The paths, in the order of `stack()`."""
        return list(self.terms)

    @property
    def remainder(self) -> Float[Tensor, "*cells d_model"]:
        """`truth` minus all terms: includes h - sum x_i for k >= 1, and sum (1 - w_i) x_i for k = 0."""
        return self.truth - torch.stack(list(self.terms.values())).sum(0)

    @property
    def relative_remainder(self) -> float:
        """Norm of the remainder over the norm of `truth`, over real tokens."""
        return float(self.remainder[self.valid].detach().norm() / self.truth[self.valid].detach().norm())

    @property
    def gap(self) -> Tensor | None:
        """Frank-Wolfe gap of optimal weights [batch, pos]; None for given or uniform weights."""
        return None if self.solution is None else self.solution.gap

    @property
    def is_decoded(self) -> bool:
        """Whether these are terms of the decoder, which have logits."""
        return self.expansion.stage is None

    @property
    def tokens(self) -> Int[Tensor, "*cells"]:
        """Token ids of the cached positions."""
        return self.here(self.trace.tokens)

    @property
    def valid(self) -> Bool[Tensor, "*cells"]:
        """Mask of real tokens; False at padding."""
        return self.here(self.trace.valid)

    @property
    def is_whole(self) -> bool:
        """Whether the cache has all prompts and positions of the trace, in order."""
        shape = self.trace.valid.shape
        here = (self.prompts, self.positions)
        pairs = zip(here, shape, strict=True)
        return all(index is None or (isinstance(index, list) and index == list(range(size))) for index, size in pairs)

    def here(self, values: Shaped[Tensor, "batch pos *rest"]) -> Tensor:
        """Index a tensor of the trace [batch, pos, *rest] at the cached cells: [*cells, *rest], on the cache's device."""
        if isinstance(self.positions, Tensor):
            batch = torch.arange(len(values), device=values.device)
            places = self.positions.to(values.device)
            values = values[batch[:, None] if places.ndim > 1 else batch, places]
        elif self.positions is not None:
            values = values[:, self.positions]
        if self.prompts is not None:
            values = values[self.prompts]
        return values.to(self.truth.device)

    def stack(self, paths: list[str | Path] | None = None) -> Float[Tensor, "path *cells d_model"]:
        """The terms on a leading axis, in the order of `labels` or of `paths`.

        Use `logit_attrs` for their effects on logits: TransformerLens' `cache.logit_attrs(stack, tokens)` omits the final
        norm's gain unless folded into W_U, and normalizes terms of the decoder twice.
        """
        return torch.stack([self[path] for path in (self.labels if paths is None else paths)])

    @torch.no_grad()
    def logit_attrs(self, targets: TargetInput | None = None) -> Float[Tensor, "path batch pos target"]:
        """Effect of every term on target logits, minus its mean over the vocabulary: direct logit attribution.

        Terms of the decoder contribute their own logits, w_i b_U included. Terms of an inner stage are read through the final
        norm without its bias, with the scale of the model's final stream. Weights may be folded or not.

        Args:
            targets: Tokens, as strings or ids for all prompts, one list per prompt, or ids [batch, pos, target]; None for the
                model's top token.

        Returns:
            Additive logits (`tl_jets.core.attribution`), float64, in the order of `labels`; NaN at padding.

        Raises:
            ValueError: A slice dropped the batch or position dimension, or only padding is left; or bad targets.

        Source: Elhage et al. 2021 (direct logit attribution); TransformerLens' `ActivationCache.logit_attrs`.

        Example:
            >>> import tl_jets as tj
            >>> last = tj.jet_expand(tj.load_tinydocs(), "3_mlp", centers=["embed", "3_attn_out"], linearize="detached")
            >>> cache = last("This function is available on Unix and")
            >>> cache.logit_attrs([" is"]).shape == (len(cache), 1, 8, 1)
            True
        """
        rows = self.rows("Attributions")
        decoder, final = self.trace.decoder, self.here(self.trace[FINAL_STREAM])[self.valid]
        norm = decoder.norm
        states, weights = self.stack()[:, self.valid], self.weights[:1, self.valid] * 0
        if self.is_decoded:
            weights = self.bias_weights()[:, self.valid]
        else:
            states = norm.scale(norm_jet(norm, final, final, 0).alpha[0][:, None] * norm.center(states))
        yardstick = Yardstick.at(self.trace, rows, norm(final), targets)
        parts = decoder.metric(centered=True).augment(states, weights.expand(states.shape[:-1]))
        return rows.spread(yardstick.effects(parts), axis=1)

    def rows(self, what: str) -> Rows:
        """The real cells of a cache [batch, pos]; `what` names the caller in errors."""
        if self.truth.ndim != 3:
            raise ValueError(
                f"{what} need a cache [batch, pos, d_model]; this one has shape {list(self.truth.shape)}. Slice with lists in "
                f"place of ints, or take them first."
            )
        self._require_real(what)
        valid = self.trace.valid.to(self.truth.device)
        every = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
        return Rows.at_cells(valid if self.prompts is None else valid[self.prompts], self.here(every))

    def bias_weights(self) -> Float[Tensor, "path ..."]:
        """The multiple of b_U in each term's logits, in the order of `labels`: w_i; detached, 0 or 1."""
        self._require_decoded("bias weights")
        return self.weights

    def logits(self, path: str | Path | None = None) -> Float[Tensor, "*cells d_vocab"]:
        """Additive logits (before a final softcap) of one path with its share w_i of b_U, or of the sum of all terms."""
        self._require_decoded("logits")
        decoder = self.trace.decoder
        if path is None:
            return decoder.logits(self.stack().sum(0))
        return decoder.logits(self[path], self.weights[self.labels.index(str(path))])

    def top_tokens(self, k: int = 5) -> TopTokens:
        """The k largest additive logits of every path, values and token ids [path, batch, pos, k]; reads W_U in chunks."""
        self._require_decoded("top tokens")
        return top_tokens(self.trace.decoder, self.stack(), bias_weight=self.weights, k=k)

    def to(self, device_or_dtype: Any) -> JetCache:
        """Return a cache on another device or in another dtype; a dtype does not apply to `solution`."""
        numbers = isinstance(device_or_dtype, torch.dtype)
        return self._map(lambda tensor, leading: tensor.to(device_or_dtype), solution=not numbers)

    def apply_slice_to_batch_dim(self, batch_slice: SliceInput) -> JetCache:
        """Return the cache of some prompts; an int drops the batch dimension.

        Args:
            batch_slice: An int, a slice or TransformerLens' (start, stop), a list or tensor of indices, or a mask.

        Raises:
            ValueError: There is no batch dimension, or nothing is left.
        """
        index, prompts = _read_slice("batch", batch_slice, self.prompts, len(self.trace.tokens))
        return self._cut((index,), prompts=prompts)

    def apply_slice_to_pos_dim(self, pos_slice: SliceInput) -> JetCache:
        """Return the cache of some positions, likewise; an int drops the position dimension."""
        index, positions = _read_slice("pos", pos_slice, self.positions, self.trace.tokens.shape[1])
        return self._cut((index,) if isinstance(self.prompts, int) else (slice(None), index), positions=positions)

    def at_rows(self, rows: Rows) -> JetCache:
        """Return a whole cache at selected positions of each prompt."""
        return self._map(lambda tensor, leading: rows.at(tensor, leading), positions=rows.cells)

    def remove_batch_dim(self) -> JetCache:
        """Return the cache without its batch dimension, which must be 1."""
        if not isinstance(self.prompts, int) and self.truth.shape[0] != 1:
            raise ValueError(
                f"remove_batch_dim needs a batch of 1; this cache holds {self.truth.shape[0]} inputs. Use "
                f"apply_slice_to_batch_dim(index)."
            )
        return self.apply_slice_to_batch_dim(0)

    def _cut(self, cells: tuple[Any, ...], **where: Any) -> JetCache:
        """Index every tensor at `cells`; `where` sets the new prompts or positions."""
        return replace(self._map(lambda tensor, leading: tensor[(slice(None),) * leading + cells]), **where)

    def _map(self, change: Any, *, solution: bool = True, **where: Any) -> JetCache:
        """Apply `change(tensor, number of axes before the cells)` to every tensor but the trace's; replace `where`."""
        solved = self.solution
        if solved is not None and solution:
            known = {field.name: getattr(solved, field.name) for field in fields(solved)}
            solved = replace(solved, **{name: change(v, 0) for name, v in known.items() if isinstance(v, Tensor)})
        return replace(
            self,
            terms={path: change(term, 0) for path, term in self.terms.items()},
            weights=change(self.weights, 1),
            truth=change(self.truth, 0),
            solution=solved,
            **where,
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row per path and real position: path, batch, pos, token, weight, norm, and top_token if decoded.

        `batch` indexes the cached prompts, `pos` the positions of the prompt. `norm` is the term's length in d_model, `weight`
        that of its center (1 for identity terms of order >= 1 and detached terms).
        """
        weights = self._term_weights()
        norms = self.stack().norm(dim=-1)
        top = self.top_tokens(1).indices[..., 0] if self.is_decoded else None
        tokenizer, tokens = self.trace.network.tokenizer, self.tokens
        places = self.here(self.trace.valid.cumsum(1) - 1)
        rows = []
        for cell in map(tuple, self.valid.nonzero().tolist()):
            here = {
                "batch": 0 if isinstance(self.prompts, int) else cell[0],
                "pos": int(places[cell]),
                "token": token_text(tokenizer, int(tokens[cell])),
            }
            for index, path in enumerate(self.labels):
                row = {"path": path, **here}
                row |= {"weight": float(weights[index][cell]), "norm": float(norms[index][cell])}
                if top is not None:
                    row["top_token"] = token_text(tokenizer, int(top[index][cell]))
                rows.append(row)
        return pd.DataFrame(rows)

    def _body(self) -> str:
        """Table of the first terms, averaged over real positions; decodes nothing."""
        keep = self.valid
        paths = self.labels[:SHOWN_ROWS]
        norms = [float(self.terms[path].norm(dim=-1)[keep].mean()) for path in paths]
        length = float(self.truth.norm(dim=-1)[keep].mean())
        frame = pd.DataFrame({"path": paths, "norm": norms, "relative": [norm / length for norm in norms]})
        return dataframe_html(frame, total=len(self))

    def _term_weights(self) -> Tensor:
        """The weight of each term, in the order of `labels`."""
        if self.expansion.linearize == "detached":
            return torch.ones_like(self.weights[:1]).expand(len(self), *self.weights.shape[1:])
        parts = [self.weights] * len(self.expansion.steps)
        if self.expansion.stage is not None:
            parts = [self.weights if self.expansion.order == 0 else torch.ones_like(self.weights), *parts]
        parts.append(
            torch.ones_like(self.weights[:1]).expand(len(self) - sum(map(len, parts)), *self.weights.shape[1:])
        )
        return torch.cat(parts)

    def check(self) -> Check:
        """Recompute every term independently and compare; see `tl_jets.jets.checks`.

        Returns:
            A `Check`; `check().passed` says whether all agree. The size of the remainder (`relative_remainder`) is not checked.

        Raises:
            ValueError: The model's hooks or weights changed since the trace, or the slice has only padding.

        Cost: one jet and two evaluations of the stage per center; detached, one evaluation.
        """
        self._require_real("check")
        return self.expansion.check(self)

    def _require_real(self, what: str) -> None:
        if not self.valid.any():
            raise ValueError(
                f"{what} needs a real token; this slice holds {self.valid.numel()} of padding. Slice others."
            )

    def _require_decoded(self, what: str) -> None:
        if not self.is_decoded:
            raise ValueError(
                f"{what.capitalize()} belong to terms of the decoder; these are terms of {self.expansion.steps[0]}. Use "
                f"them as centers: jet_expand(model, {DECODER_STEP!r}, centers=expansion)."
            )


def _read_slice(
    name: str, index: Any, chosen: list[int] | int | Tensor | None, size: int
) -> tuple[int | slice | list[Any], list[int] | int | Tensor]:
    """A slice as PyTorch takes it, and the entries of `chosen` (None: all of `size`) that it keeps."""
    if isinstance(chosen, int) or (isinstance(chosen, Tensor) and chosen.ndim < 2):
        raise ValueError(
            f"A slice of the {name} dimension needs one; an int took it from this cache. Slice the cache from before, or "
            f"write [index] for the int."
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
