"""Optimal weights of an expansion of the final norm, which fit the model's logits.

Source: Chen et al. (arXiv 2410.06024), Lemma 1; the solvers are those of `tl_jets.jets.simplex` and `simplex_kl`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tl_jets.core.decoder import Decoder
from tl_jets.jets.simplex import SimplexSolution, gram, simplex_qp
from tl_jets.jets.simplex_kl import simplex_kl

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
            "KL weights need a model without a final softcap: the cap bends the logits, the problem is no longer convex "
            "and its certificate would be wrong. Use objective='centered_l2', which is taken before the cap."
        )
    dtype = torch.promote_types(decoder.W_U.dtype, torch.float32)  # the precision of the model's logits
    rows, truth = jets.flatten(1, -2).to(dtype), truth.flatten(0, -2).to(dtype)
    target = torch.log_softmax(decoder.logits(truth), -1)
    chunks = zip(rows.split(KL_TOKENS, 1), target.split(KL_TOKENS), strict=True)
    return SimplexSolution.cat([simplex_kl(decoder.logits(part), aim) for part, aim in chunks]).reshape(*shape)
