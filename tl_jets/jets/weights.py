"""Weights of an expansion: given ones on the probability simplex (w >= 0, sum w = 1), and those that fit the logits.

Source: Chen et al. (arXiv 2410.06024), Lemma 1; the solvers are those of `tl_jets.jets.simplex` and `simplex_kl`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.core.decoder import Decoder
from tl_jets.jets.simplex import SimplexSolution, gram, simplex_qp
from tl_jets.jets.simplex_kl import simplex_kl

# Largest distance of a sum of weights from 1, where the dtype allows it.
TOLERANCE = 1e-6


def uniform_weights(
    n: int, *problems: int, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
) -> Float[Tensor, "*problems n"]:
    """Equal weights 1/n for every center, [*problems, n]."""
    return torch.full((*problems, n), 1 / n, dtype=dtype, device=device)


def read_weights(weights: Any, n: int) -> Tensor:
    """Given weights [n, *problems] as a checked tensor; a tensor is returned unchanged, numbers become float64.

    Raises:
        TypeError: Not floating-point numbers.
        ValueError: Not n weights on the first axis, not finite, negative, or a sum other than 1.
    """
    if not isinstance(weights, Tensor):
        weights = torch.as_tensor(weights, dtype=torch.float64, device="cpu")
    if not weights.is_floating_point():
        raise TypeError(f"weights must be floating-point numbers; got {weights.dtype}; pass weights.double().")
    if weights.ndim == 0 or len(weights) != n:
        raise ValueError(
            f"weights must have one entry a center on the first axis ({n}); got shape {tuple(weights.shape)}; reorder or "
            "re-count them."
        )
    values = weights.detach().double()
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"weights must be finite; got {int((~values.isfinite()).sum())} that are not; check what made them."
        )
    if bool((values < 0).any()):
        raise ValueError(
            f"weights must be non-negative; got a smallest of {float(values.min()):.3g}; clamp and renormalize them."
        )
    off = (values.sum(0) - 1).abs()
    if bool((off > max(TOLERANCE, n * torch.finfo(weights.dtype).eps)).any()):
        worst = float(values.sum(0).flatten()[off.argmax()])
        raise ValueError(
            f"weights must sum to 1 over the centers; got a sum of {worst:.6g}; divide by weights.sum(0, keepdim=True)."
        )
    return weights


Objective = Literal["l2", "centered_l2", "kl"]
OBJECTIVES: tuple[Objective, ...] = ("l2", "centered_l2", "kl")
# Tokens whose logits at all centers are held at once.
KL_TOKENS = 8


def decoder_weights(decoder: Decoder, jets: Tensor, truth: Tensor, objective: Objective) -> SimplexSolution:
    """Optimal weights of an expansion of the final norm, per token.

    Args:
        decoder: Final norm and unembedding.
        jets: e_i = J^k norm(x_i)(h_L), [center, batch, pos, d_model].
        truth: norm(h_L), [batch, pos, d_model].
        objective: `"l2"`, `"centered_l2"` or `"kl"`.

    Returns:
        A `SimplexSolution` with weights [batch, pos, center] and the certificate `gap`.
    """
    if objective == "kl":
        return _kl_weights(decoder, jets, truth)
    metric = decoder.metric(centered=objective == "centered_l2")
    jets64, truth64 = jets.double(), truth.double()
    # The weights sum to one, so b_U cancels in all differences.
    H = gram(jets64 - truth64, metric.gram[:-1, :-1])
    return simplex_qp(H, metric.norm(truth64).square())


def _kl_weights(decoder: Decoder, jets: Tensor, truth: Tensor) -> SimplexSolution:
    """Weights that minimize KL(model || expansion), in nats, per token."""
    shape = truth.shape[:-1]
    if decoder.transform is not None:
        raise NotImplementedError(
            "KL weights need a model without a final softcap: with it the problem is not convex, and its certificate would "
            "be wrong. Use objective='centered_l2', which is taken before the softcap."
        )
    dtype = torch.promote_types(decoder.W_U.dtype, torch.float32)  # the precision of the model's logits
    rows, truth = jets.flatten(1, -2).to(dtype), truth.flatten(0, -2).to(dtype)
    target = torch.log_softmax(decoder.logits(truth), -1)
    chunks = zip(rows.split(KL_TOKENS, 1), target.split(KL_TOKENS), strict=True)
    return SimplexSolution.cat([simplex_kl(decoder.logits(part), aim) for part, aim in chunks]).reshape(*shape)
