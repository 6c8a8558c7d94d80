r"""Inner products of logit vectors: `Metric`, which every decoder has, from vectors that are d_model wide.

Source and formulas: `tl_jets.core.decoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# Inner products of some vectors: a row and a column for each.
Gram = list[list[Tensor]]


@dataclass(frozen=True, eq=False)
class Metric:
    """Inner products of logit vectors, computed from d_model-sized vectors.

    Attributes:
        gram: G or G_c, float64; the last row and column belong to `b_U` [d_model + 1, d_model + 1].
        centered: Whether logits are centered over the vocabulary.
        mean: sqrt(V) times the mean column: G = G_c + mean mean' [d_model + 1].
    """

    gram: Float[Tensor, "d_model_and_bias d_model_and_bias"]
    centered: bool
    mean: Float[Tensor, " d_model_and_bias"]

    def augment(
        self, states: Float[Tensor, "*rows d_model"], bias_weight: float | Float[Tensor, "*#rows"] = 0.0
    ) -> Float[Tensor, "*rows d_model_and_bias"]:
        """Append the multiple `bias_weight` of `b_U` to normalized states, in float64; ValueError for another width."""
        d_model = self.gram.shape[0] - 1
        if states.shape[-1] != d_model:
            raise ValueError(
                f"States must have d_model = {d_model} as their last dimension, got shape {tuple(states.shape)}. "
                "Pass what the unembedding reads, not logits."
            )
        return augmented(states, bias_weight)

    def inner(
        self,
        x: Float[Tensor, "*#rows d_model"],
        y: Float[Tensor, "*#rows d_model"],
        x_bias: float | Float[Tensor, "*#rows"] = 1.0,
        y_bias: float | Float[Tensor, "*#rows"] = 1.0,
    ) -> Float[Tensor, "*rows"]:
        """Inner product of the logit vectors of normalized states `x` and `y`, in logits squared, float64.

        `x_bias` and `y_bias` are the multiples of `b_U` in these logits: numbers, or one per row.
        """
        return ((self.augment(x, x_bias) @ self.gram) * self.augment(y, y_bias)).sum(-1)

    def norm(
        self, x: Float[Tensor, "*rows d_model"], bias_weight: float | Float[Tensor, "*#rows"] = 1.0
    ) -> Float[Tensor, "*rows"]:
        """Euclidean length of the logit vector of a normalized state, in logits, float64.

        For a difference of states, `bias_weight` is the difference of the multiples of `b_U`.
        """
        # Rounding can leave a null vector slightly below zero.
        return self.inner(x, x, bias_weight, bias_weight).clamp_min(0).sqrt()

    def cosine(
        self,
        x: Float[Tensor, "*#rows d_model"],
        y: Float[Tensor, "*#rows d_model"],
        x_bias: float | Float[Tensor, "*#rows"] = 1.0,
        y_bias: float | Float[Tensor, "*#rows"] = 1.0,
    ) -> Float[Tensor, "*rows"]:
        """Cosine between the logit vectors of `x` and `y` (arguments of `inner`), float64; NaN where one is zero."""
        cosine = self.inner(x, y, x_bias, y_bias) / (self.norm(x, x_bias) * self.norm(y, y_bias))
        return cosine.clamp(-1, 1)


def augmented(
    states: Float[Tensor, "*rows d_model"], bias_weight: float | Float[Tensor, "*#rows"]
) -> Float[Tensor, "*rows d_model_and_bias"]:
    """States with a multiple of `b_U` appended, in float64."""
    weight = torch.as_tensor(bias_weight, dtype=torch.float64, device=states.device)
    return torch.cat([states.double(), weight.expand(states.shape[:-1]).unsqueeze(-1)], dim=-1)


def products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Gram:
    """Inner products of the last axes of left and right tensors, which broadcast and give a symmetric table."""
    n = range(len(left))
    found = {(i, j): (left[i] * right[j]).sum(-1) for i in n for j in n if i <= j}
    return [[found[min(i, j), max(i, j)] for j in n] for i in n]


def added(first: Gram, second: Gram) -> Gram:
    """The sum of two tables."""
    return [[x + y for x, y in zip(*rows, strict=True)] for rows in zip(first, second, strict=True)]
