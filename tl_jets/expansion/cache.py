"""`JetCache`: the terms of an expansion on one input, and what they leave over.

Used as TransformerLens' `ActivationCache` is: keys are names (here paths), values are tensors [batch, pos, d_model],
and `stack`, `to`, `remove_batch_dim` and slices work. Nothing of size [paths, batch, pos, d_vocab] is made unless
`logits` is asked for it. The terms and `remainder` sum to what the model has at that place, by definition; `check`
compares with the model by ways that do not use that definition.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.calculus import jet
from tl_jets.expansion.paths import Path
from tl_jets.expansion.simplex import SimplexSolution
from tl_jets.notebook import SHOWN_ROWS, Shown, dataframe_html
from tl_jets.readout import TopTokens, top_tokens
from tl_jets.stages import DECODER_STEP, FINAL_STREAM
from tl_jets.tokens import token_text
from tl_jets.trace import Trace

if TYPE_CHECKING:
    from tl_jets.expansion.expand import Expansion


@dataclass(frozen=True, eq=False)
class JetCache(Shown, Mapping[str, Tensor]):
    """The terms of an expansion on one input, by path.

    Attributes:
        expansion: What was evaluated.
        trace: The input that it was evaluated on.
        terms: Path -> term, [batch, pos, d_model], weights included. At the decoder a term is what the unembedding
            reads, before `W_U`; its logits also carry w_i b_U (`logits`).
        weights: w [center, batch, pos], in the order of `expansion.centers`. Detached terms of the decoder: the multiple of
            b_U that each carries [path, batch, pos], 0 but for `ln_final_bias`, 1.
        truth: What the terms approximate: the stream that the stage produces, or the final norm's output.
        solution: The solved weights with their certificate, or None if the weights were given or uniform.
    """

    expansion: Expansion
    trace: Trace
    terms: dict[str, Tensor]
    weights: Tensor
    truth: Tensor
    solution: SimplexSolution | None = None

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
        """The paths, aligned to the leading axis of `stack()`."""
        return list(self.terms)

    @property
    def remainder(self) -> Float[Tensor, "*cells d_model"]:
        """What the terms leave of the true output: for k >= 1 that includes h - sum x_i, for k = 0 sum (1 - w_i) x_i."""
        return self.truth - torch.stack(list(self.terms.values())).sum(0)

    @property
    def relative_remainder(self) -> float:
        """Length of the remainder over the length of the true output, real tokens only, in d_model."""
        keep = self._real()
        return float(self.remainder[keep].norm() / self.truth[keep].norm())

    @property
    def gap(self) -> Tensor | None:
        """The Frank-Wolfe certificate of optimal weights [batch, pos]; None for given or uniform ones."""
        return None if self.solution is None else self.solution.gap

    @property
    def is_decoded(self) -> bool:
        """Whether the terms are of the decoder, so that they have logits."""
        return self.expansion.stage is None

    @property
    def _whole(self) -> bool:
        shape, valid = self.truth.shape[:-1], self.trace.valid
        return shape == valid.shape or (len(valid) == 1 and shape == valid.shape[1:])

    def stack(self, paths: list[str | Path] | None = None) -> Float[Tensor, "path *cells d_model"]:
        """The terms stacked on a leading axis, in the order of `labels` or of `paths`.

        Terms of an inner stage are parts of a residual stream: TransformerLens' `cache.logit_attrs(stack, tokens)`
        takes them, and so does a hook that patches `cache["resid_post", l]`.
        """
        return torch.stack([self[path] for path in (self.labels if paths is None else paths)])

    def bias_weights(self) -> Float[Tensor, "path ..."]:
        """The multiple of b_U that each term's logits carry, in the order of `labels`: w_i, or 0 and 1 (detached)."""
        self._require_decoded("bias weights")
        return self.weights

    def logits(self, path: str | Path | None = None) -> Float[Tensor, "*cells d_vocab"]:
        """Additive logits (before a final softcap or logit scale) of one path, or of all terms together.

        The logits of all paths sum to the logits of the expansion: each carries its share w_i of b_U.
        """
        self._require_decoded("logits")
        decoder = self.trace.network.decoder
        if path is None:
            return decoder.logits(self.stack().sum(0))
        return decoder.logits(self[path], self.weights[self.labels.index(str(path))])

    def top_tokens(self, k: int = 5) -> TopTokens:
        """The k largest additive logits of every path at every position: [path, batch, pos, k] values and token ids.

        The vocabulary is read in chunks; [path, batch, pos, d_vocab] is never held.
        """
        self._require_decoded("top tokens")
        return top_tokens(self.trace.network.decoder, self.stack(), bias_weight=self.weights, k=k)

    def to(self, device_or_dtype: Any) -> JetCache:
        """A cache on another device or in another dtype; this one is unchanged."""
        return self._map(lambda tensor, axis: tensor.to(device_or_dtype))

    def apply_slice_to_batch_dim(self, batch_slice: int | slice | list[int] | Tensor) -> JetCache:
        """The cache of some of the inputs; an int drops the batch dimension."""
        return self._map(lambda tensor, axis: tensor[(slice(None),) * axis + (batch_slice,)])

    def apply_slice_to_pos_dim(self, pos_slice: int | slice | list[int] | Tensor) -> JetCache:
        """The cache at some positions; an int drops the position dimension. The batch dimension must be there."""
        return self._map(lambda tensor, axis: tensor[(slice(None),) * (axis + 1) + (pos_slice,)])

    def remove_batch_dim(self) -> JetCache:
        """The cache without its batch dimension, which must be 1; this one is unchanged."""
        if self.truth.shape[0] != 1:
            raise ValueError(
                f"remove_batch_dim needs a batch of 1; this cache holds {self.truth.shape[0]} inputs. Use "
                f"apply_slice_to_batch_dim(index)."
            )
        return self.apply_slice_to_batch_dim(0)

    def _map(self, change: Any) -> JetCache:
        """Apply `change(tensor, axis of the batch dimension)` to every tensor."""
        return replace(
            self,
            terms={path: change(term, 0) for path, term in self.terms.items()},
            weights=change(self.weights, 1),
            truth=change(self.truth, 0),
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row a path and real position: path, batch, pos, token, weight, norm, and the top token if decoded.

        `norm` is the length of the term in d_model; `weight` is that of its center (identity terms of order >= 1 and
        detached terms carry 1).
        """
        if not self._whole or self.truth.ndim != 3:
            raise ValueError("to_dataframe needs a whole cache [batch, pos, d_model]; slice the table instead.")
        weights = self._term_weights()
        norms = self.stack().norm(dim=-1)
        top = self.top_tokens(1).indices[..., 0] if self.is_decoded else None
        tokenizer, tokens = self.trace.network.tokenizer, self.trace.tokens
        rows = []
        for batch, pos in self.trace.valid.nonzero().tolist():
            for index, path in enumerate(self.labels):
                row = {
                    "path": path,
                    "batch": batch,
                    "pos": pos,
                    "token": token_text(tokenizer, int(tokens[batch, pos])),
                    "weight": float(weights[index, batch, pos]),
                    "norm": float(norms[index, batch, pos]),
                }
                if top is not None:
                    row["top_token"] = token_text(tokenizer, int(top[index, batch, pos]))
                rows.append(row)
        return pd.DataFrame(rows)

    def _body(self) -> str:
        """The first terms, averaged over real positions: nothing is decoded for a look."""
        keep = self._real()
        paths = self.labels[:SHOWN_ROWS]
        norms = [float(self.terms[path].norm(dim=-1)[keep].mean()) for path in paths]
        length = float(self.truth.norm(dim=-1)[keep].mean())
        frame = pd.DataFrame({"path": paths, "norm": norms, "relative": [norm / length for norm in norms]})
        return dataframe_html(frame, total=len(self))

    def _real(self) -> Any:
        """Which cells are real tokens: all of a slice, whose positions are not known."""
        return self.trace.valid.reshape(self.truth.shape[:-1]) if self._whole else ...

    def _term_weights(self) -> Tensor:
        """The weight that each term carries, in the order of `labels`."""
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
        """Compare with the model by ways that do not use the remainder's definition.

        Two things are measured: whether terms and remainder, decoded by the model's own transform, give the model's
        logits (at the decoder) or its next stream; and whether each jet agrees with gamma itself near its center, as
        a Taylor polynomial of order k must: the error at step t falls like t^(k+1). Detached terms are no jets and have no
        slopes: that the frozen stage gives the model's own write was compared when it was frozen.

        Returns:
            A `Check`; `check().passed` says whether both hold.

        Cost:
            Two evaluations of the stage and one jet a center.
        """
        total = self.truth
        trace, network, stage = self.trace, self.trace.network, self.expansion.stage
        keep = trace.valid
        if stage is not None:
            own = trace[network.next_stream(stage)]
        elif trace.logits is not None:
            total, own = network.decoder.logits(total), trace.logits
            total = total if network.decoder.transform is None else network.decoder.transform(total)
        else:
            own = network.decoder.norm(trace[FINAL_STREAM])
        sum_error = float((total - own)[keep].abs().max() / own[keep].abs().max())
        gamma = network.decoder.norm if stage is None else trace.stage_function(stage)
        slopes = {}
        for center in self.expansion.centers if self.expansion.linearize == "jet" else ():
            slopes[str(center.path)] = _slope(
                gamma, center.evaluate(trace), trace[self.expansion.stream], self.expansion.order, keep
            )
        return Check(sum_error, slopes, self.expansion.order)

    def _require_decoded(self, what: str) -> None:
        if not self.is_decoded:
            raise ValueError(
                f"{what.capitalize()} belong to terms of the decoder; these are terms of {self.expansion.steps[0]}. Use "
                f"them as centers: jet_expand(model, {DECODER_STEP!r}, centers=expansion)."
            )


@dataclass(frozen=True)
class Check:
    """What `JetCache.check` found.

    Attributes:
        sum_error: Largest difference between the model and terms + remainder, relative to the model's largest value.
        slopes: By center, the exponent with which the jet's error falls as the step shrinks, or None where the error
            is at rounding already. A jet of order k must reach k + 1.
        order: k.
    """

    sum_error: float
    slopes: dict[str, float | None]
    order: int

    @property
    def passed(self) -> bool:
        """Whether the sum is the model's to 1e-4 and every slope is at least k + 1/2."""
        return self.sum_error < 1e-4 and all(s is None or s > self.order + 0.5 for s in self.slopes.values())


def _slope(gamma: Any, center: Tensor, variate: Tensor, order: int, keep: Tensor) -> float | None:
    """Log-log slope of |gamma(x + t v) - sum_j c_j t^j| between two small steps t."""
    # Small enough for the leading term to show, large enough for it to stand above rounding.
    eps = torch.finfo(center.dtype).eps
    step = max(1e-4, (1e4 * eps) ** (1 / (order + 1)))
    direction = (variate - center) * (step * center.norm() / (variate - center).norm().clamp_min(1e-30))
    with torch.no_grad():
        series = jet(gamma, center, center + direction, order)
        errors = []
        for t in (1.0, 0.5):
            polynomial = sum(c * t**j for j, c in enumerate(series.coefficients))
            errors.append((gamma(center + t * direction) - polynomial)[..., keep, :].norm())
        floor = 64 * eps * series.coefficients[0][..., keep, :].norm()
    if float(errors[1]) <= float(floor):
        return None
    return float(torch.log2(errors[0] / errors[1]))
