"""`JetCache`: the terms of an expansion on one input, and their remainder.

Like TransformerLens' `ActivationCache`, it maps names (here paths) to tensors [batch, pos, d_model], with `stack`, `to`,
`remove_batch_dim` and slices. Only `logits` allocates d_vocab. Terms and `remainder` sum to the model's value by
definition; `check` recomputes the terms independently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tl_jets.calculus import norm_jet
from tl_jets.core.attribution import LogitAttribution
from tl_jets.core.labels import LabelInput, is_hook_name
from tl_jets.core.logit_reader import TopTokens, top_tokens
from tl_jets.core.model_marks import model_mark
from tl_jets.core.network import trace_of
from tl_jets.core.notebook import SHOWN_ROWS, dataframe_html
from tl_jets.core.path import Path
from tl_jets.core.protocol import DECODER_STEP, FINAL_STREAM
from tl_jets.core.results import Result, handle
from tl_jets.core.selection import Rows, SliceInput, TargetInput, read_slice, shared_positions
from tl_jets.core.sinks import Sinks
from tl_jets.core.tokens import token_names
from tl_jets.core.trace import Trace
from tl_jets.jets.accuracy import Check
from tl_jets.jets.activations import activation, is_of_trace
from tl_jets.jets.simplex import SimplexSolution

Kind = TypeVar("Kind", bound="JetCache")


@dataclass(frozen=True, eq=False, repr=False)
class JetCache(Result, Mapping[str, Tensor]):
    """The terms of an expansion on one input, by path.

    A loaded or unpickled cache has no `expansion` and `trace`, which logits, attributions and `check` need: `with_model`.

    Attributes:
        terms: Path -> weighted term, [batch, pos, d_model]; at the decoder the input of `W_U` (`logits` adds w_i b_U).
        weights: w [center, batch, pos], in the order of the expansion's centers. For detached terms of the decoder, the
            multiple of b_U of each term [path, batch, pos]: 1 for `ln_final_bias`, else 0.
        truth: The approximated tensor: the stream that the stage produces, or the final norm's output.
        tokens: Token ids [batch, pos].
        valid: Mask of real tokens; False at padding [batch, pos].
        places: Position of each cell among its prompt's real tokens; -1 at padding [batch, pos].
        kind: `order 1`, or `detached`.
        steps: Labels of the expanded steps.
        is_decoded: Whether these are terms of the decoder, which have logits.
        token_names: Texts of the ids in `tokens`.
        solution: The solved weights and their certificate; None for given or uniform weights.
        prompts: Indices of the trace's prompts on the batch axis; an int if a slice dropped the axis; None for all.
        columns: Indices of its cells in the padded rows, likewise; [batch, pos] where prompts differ.
        model: Name of the model and a digest of its weights; None: not known.
        sinks: Which of `tokens` are BOS or attention sinks, whose norms notebooks leave out; None: not known.
        expansion: The expansion.
        trace: The trace of the input.
    """

    terms: dict[str, Tensor]
    weights: Tensor
    truth: Tensor
    tokens: Int[Tensor, "*cells"]
    valid: Bool[Tensor, "*cells"]
    places: Int[Tensor, "*cells"]
    kind: str
    steps: list[str]
    is_decoded: bool
    token_names: dict[int, str]
    solution: SimplexSolution | None = None
    prompts: list[int] | int | None = None
    columns: list[int] | int | Tensor | None = None
    model: str | None = None
    sinks: Bool[Tensor, "*cells"] | None = None
    expansion: Any = handle()
    trace: Any = handle()

    @classmethod
    def of(cls: type[Kind], expansion: Any, trace: Trace, terms: dict[str, Tensor], **data: Any) -> Kind:
        """The cache of an expansion on a trace; `data` are weights, truth, and other fields that are not None."""
        found = cls(
            terms=terms,
            tokens=trace.tokens,
            valid=trace.valid,
            places=(trace.valid.cumsum(1) - 1).masked_fill(~trace.valid, -1),
            kind=expansion.kind,
            steps=list(expansion.steps),
            is_decoded=expansion.stage is None,
            token_names=token_names(trace.network.tokenizer, [trace.tokens]),
            model=model_mark(trace.network, trace.recording.hook_state),
            sinks=Sinks.of(trace, Rows.of(trace, None)).mask,
            expansion=expansion,
            trace=trace,
            **data,
        )
        return replace(
            found, **{name: found.here(getattr(found, name)) for name in ("tokens", "valid", "places", "sinks")}
        )

    def __getitem__(self, key: LabelInput | Path) -> Tensor:
        """A term by its path, or an activation of the run by TransformerLens' name: `cache["z", 0]`."""
        if str(key) in self.terms:
            return self.terms[str(key)]
        if isinstance(key, Path) or not is_hook_name(key):
            raise KeyError(f"No term {str(key)!r}; the terms are {list(self.terms)[:12]} ({len(self)} in all).")
        return activation(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.terms)

    def __len__(self) -> int:
        return len(self.terms)

    def __repr__(self) -> str:
        return (
            f"JetCache({len(self)} terms of {list(self.truth.shape)} for {', '.join(self.steps[:3])}, {self.kind}; "
            f"relative remainder {self.relative_remainder:.3g})"
        )

    @property
    def labels(self) -> list[str]:
        """The paths, in the order of `stack()`."""
        return list(self.terms)

    @property
    def positions(self) -> list[int] | int | Int[Tensor, "*cells"]:
        """Position of each cell among its prompt's real tokens: a list (an int) where prompts share them, else `places`."""
        has_pos = self.truth.ndim == (2 if isinstance(self.prompts, int) else 3)
        places = rearrange(self.places if has_pos else self.places[..., None], "... pos -> (...) pos")
        shared = shared_positions(places, places >= 0)
        return self.places if isinstance(shared, Tensor) else shared if has_pos else shared[0]

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
    def is_whole(self) -> bool:
        """Whether the cache has all prompts and positions of the trace, in order."""
        shape = self.traced("Comparisons with the input").valid.shape
        pairs = zip((self.prompts, self.columns), shape, strict=True)
        return all(index is None or (isinstance(index, list) and index == list(range(size))) for index, size in pairs)

    def here(self, values: Shaped[Tensor, "batch pos *rest"]) -> Tensor:
        """Index a tensor of the trace [batch, pos, *rest] at the cached cells: [*cells, *rest], on the cache's device."""
        if isinstance(self.columns, Tensor):
            batch = torch.arange(len(values), device=values.device)
            columns = self.columns.to(values.device)
            values = values[batch[:, None] if columns.ndim > 1 else batch, columns]
        elif self.columns is not None:
            values = values[:, self.columns]
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
        rows, trace = self.rows("Attributions"), self.traced("Attributions")
        norm, final = trace.decoder.norm, self.here(trace[FINAL_STREAM])[self.valid]
        states, weights = self.stack()[:, self.valid], self.weights[:1, self.valid] * 0
        if self.is_decoded:
            weights = self.bias_weights()[:, self.valid]
        else:
            states = norm.scale(norm_jet(norm, final, final, 0).alpha[0][:, None] * norm.center(states))
        attribution = LogitAttribution.at(trace, rows, norm(final), targets)
        parts = trace.decoder.metric(centered=True).augment(states, weights.expand(states.shape[:-1]))
        return rows.spread(attribution.effects(parts), axis=1)

    def rows(self, what: str) -> Rows:
        """The real cells of a cache [batch, pos]; `what` names the caller in errors."""
        if self.truth.ndim != 3:
            raise ValueError(
                f"{what} need a cache [batch, pos, d_model]; this one has shape {list(self.truth.shape)}. Slice with lists in "
                f"place of ints, or take them first."
            )
        self._require_real(what)
        valid = self.traced(what).valid.to(self.truth.device)
        every = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
        return Rows.at_cells(valid if self.prompts is None else valid[self.prompts], self.here(every))

    def bias_weights(self) -> Float[Tensor, "path ..."]:
        """The multiple of b_U in each term's logits, in the order of `labels`: w_i; detached, 0 or 1."""
        self._require_decoded("bias weights")
        return self.weights

    def logits(self, path: str | Path | None = None) -> Float[Tensor, "*cells d_vocab"]:
        """Additive logits (before a final softcap) of one path with its share w_i of b_U, or of the sum of all terms."""
        self._require_decoded("logits")
        decoder = self.traced("Logits").decoder
        if path is None:
            return decoder.logits(self.stack().sum(0))
        return decoder.logits(self[path], self.weights[self.labels.index(str(path))])

    def top_tokens(self, k: int = 5) -> TopTokens:
        """The k largest additive logits of every path, values and token ids [path, batch, pos, k]; reads W_U in chunks."""
        self._require_decoded("top tokens")
        return top_tokens(self.traced("Top tokens").decoder, self.stack(), bias_weight=self.weights, k=k)

    def to(self: Kind, device_or_dtype: Any) -> Kind:
        """A cache on another device, or with terms, weights and truth in another dtype."""
        if not isinstance(device_or_dtype, torch.dtype):
            return super().to(device_or_dtype)
        return self._mapped(lambda values: values.to(device_or_dtype), ["terms", "weights", "truth"])

    def with_model(self: Kind, expansion: Any, text_or_tokens: Any) -> Kind:
        """A loaded cache with its expansion and trace.

        Args:
            expansion: The same expansion, made again.
            text_or_tokens: The whole input that was expanded, before any slice: prompts, token ids, or a `Trace`.

        Raises:
            ValueError: Another expansion, or other tokens or activations at the cached cells; `check` compares the terms.
        """
        found = replace(self, expansion=expansion, trace=trace_of(expansion.network, text_or_tokens))
        given = (expansion.kind, list(expansion.steps), expansion.stage is None)
        try:
            same = torch.equal(found.here(found.trace.tokens.cpu()), self.tokens)
            same = same and torch.equal(found.here(found.trace.valid.cpu()), self.valid)
            same = same and is_of_trace(found)
        except IndexError:
            same = False
        if not same or given != (self.kind, self.steps, self.is_decoded):
            raise ValueError(
                f"with_model takes the expansion of the cache ({self.kind} of {', '.join(self.steps[:3])}) and its whole input; "
                f"got {given[0]} of {', '.join(given[1][:3])}, and {'the same' if same else 'other'} tokens or weights. Pass the "
                f"prompts that were expanded, all of them and in order."
            )
        return found

    def apply_slice_to_batch_dim(self, batch_slice: SliceInput) -> JetCache:
        """Return the cache of some prompts; an int drops the batch dimension.

        Args:
            batch_slice: An int, a slice or TransformerLens' (start, stop), a list or tensor of indices, or a mask.

        Raises:
            ValueError: There is no batch dimension, or nothing is left.
        """
        index, prompts = read_slice("batch", batch_slice, self.prompts, len(self.truth))
        return self._cut((index,), prompts=prompts)

    def apply_slice_to_pos_dim(self, pos_slice: SliceInput) -> JetCache:
        """Return the cache of some columns of the padded rows, as TransformerLens' method; an int drops the dimension."""
        index, columns = read_slice("pos", pos_slice, self.columns, self.truth.shape[-2])
        return self._cut((index,) if isinstance(self.prompts, int) else (slice(None), index), columns=columns)

    def at_rows(self, rows: Rows) -> JetCache:
        """Return a whole cache at selected positions of each prompt."""
        return self._at(rows.at, columns=rows.cells)

    def remove_batch_dim(self) -> JetCache:
        """Return the cache without its batch dimension, which must be 1."""
        if not isinstance(self.prompts, int) and self.truth.shape[0] != 1:
            raise ValueError(
                f"remove_batch_dim needs a batch of 1; this cache holds {self.truth.shape[0]} inputs. Use "
                f"apply_slice_to_batch_dim(index)."
            )
        return self.apply_slice_to_batch_dim(0)

    def _cut(self, cells: tuple[Any, ...], **where: Any) -> JetCache:
        """Index every tensor at `cells`; `where` sets the new prompts or columns."""
        return self._at(lambda tensor, leading: tensor[(slice(None),) * leading + cells], **where)

    def _at(self, change: Callable[[Tensor, int], Tensor], **where: Any) -> JetCache:
        """Apply `change(tensor, number of axes before the cells)` to every tensor; replace `where`."""
        names = ("terms", "truth", "tokens", "valid", "places", "sinks", "solution")
        found = self._mapped(lambda tensor: change(tensor, 0), names)
        return replace(found, weights=change(self.weights, 1), **where)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per path and real position: path, batch, pos, token, weight, norm, and with the decoder's, top_token.

        `batch` indexes the cached prompts, `pos` the positions of the prompt. `norm` is the term's length in d_model, `weight`
        that of its center (1 for identity terms of order >= 1 and detached terms).
        """
        weights = self._term_weights()
        norms = self.stack().norm(dim=-1)
        top = self.top_tokens(1).indices[..., 0] if self.is_decoded and self.trace is not None else None
        best = {} if top is None else token_names(self.traced("Top tokens").network.tokenizer, [top])
        rows = []
        for cell in map(tuple, self.valid.nonzero().tolist()):
            batch = 0 if isinstance(self.prompts, int) else cell[0]
            here = {"batch": batch, "pos": int(self.places[cell]), "token": self.token_names[int(self.tokens[cell])]}
            for index, path in enumerate(self.labels):
                row = {"path": path, **here, "weight": float(weights[index][cell]), "norm": float(norms[index][cell])}
                rows.append(row if top is None else row | {"top_token": best[int(top[index][cell])]})
        return pd.DataFrame(rows)

    def _body(self) -> str:
        """Table of the first terms, averaged over real positions without attention sinks; decodes nothing."""
        keep, note = self.valid, ""
        if self.sinks is not None and 0 < (left_out := int(self.sinks.sum())) < int(self.valid.sum()):
            keep, note = self.valid & ~self.sinks, f"<p>Norms leave out {left_out} attention sinks (core.sinks).</p>"
        paths = self.labels[:SHOWN_ROWS]
        norms = [float(self.terms[path].norm(dim=-1)[keep].mean()) for path in paths]
        length = float(self.truth.norm(dim=-1)[keep].mean())
        frame = pd.DataFrame({"path": paths, "norm": norms, "relative": [norm / length for norm in norms]})
        return dataframe_html(frame, total=len(self)) + note

    def _term_weights(self) -> Tensor:
        """The weight of each term, in the order of `labels`."""
        one, cells = torch.ones_like(self.weights[:1]), self.weights.shape[1:]
        if self.kind == "detached":
            return one.expand(len(self), *cells)
        parts = [self.weights] * len(self.steps)
        if not self.is_decoded:
            parts = [self.weights if self.kind == "order 0" else torch.ones_like(self.weights), *parts]
        return torch.cat([*parts, one.expand(len(self) - sum(map(len, parts)), *cells)])

    def check(self) -> Check:
        """Recompute every term independently and compare; see `tl_jets.jets.checks`.

        Returns:
            A `Check`; `check().passed` says whether all agree. The size of the remainder (`relative_remainder`) is not checked.

        Raises:
            ValueError: The model's hooks or weights changed since the trace, or the slice has only padding.

        Cost: one jet and two evaluations of the stage per center; detached, one evaluation.
        """
        self._require_real("check")
        self.traced("Checks")
        return self.expansion.check(self)

    def traced(self, what: str) -> Trace:
        """The trace; raises ValueError in a loaded cache, where `what` needs it."""
        if self.trace is None or self.expansion is None:
            raise ValueError(
                f"{what} need the model, which a loaded cache does not hold. Give it back: cache.with_model(expansion, prompts)."
            )
        return self.trace

    def _require_real(self, what: str) -> None:
        if not self.valid.any():
            raise ValueError(
                f"{what} needs a real token; this slice holds {self.valid.numel()} of padding. Slice others."
            )

    def _require_decoded(self, what: str) -> None:
        if not self.is_decoded:
            raise ValueError(
                f"{what.capitalize()} belong to terms of the decoder; these are terms of {self.steps[0]}. Use "
                f"them as centers: jet_expand(model, {DECODER_STEP!r}, centers=expansion)."
            )
