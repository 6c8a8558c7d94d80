r"""How a layer scores queries against keys at a distance, fitted to the model's own attention.

.. math:: s(z_2, z_1) = \tau\bigl(q(z_2)^\top M_{\text{distance}} \, k(z_1)\bigr)

TransformerLens' attention modules rotate in different places and do not all show the rotated vectors. Since a rotation
turns pairs of coordinates, M has two unknowns a pair. The log-ratio of two attention weights, for random streams,

.. math:: \log p(z_1 | z_2) - \log p(z_2 | z_2) = s(z_2, z_1) - s_0(z_2, z_2) + \text{bias}

determines them by least squares in float64, for each way to pair coordinates. The pairing that reproduces the model is
kept; if none does, the model is refused. `bias` comes from an ALiBi slope.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.core.protocol import relative_error


@dataclass(frozen=True, eq=False)
class QKScores:
    """Scores from queries and keys at a distance, `tau(q . keys(k))`, without `bias`.

    `scale` and `turn` multiply each coordinate of the key and its rotation `partner`; `own_scale` is the scale at
    distance 0. `bias` is what the model adds to scores at the distance minus what it adds at 0 (ALiBi).
    """

    scale: Float[Tensor, " d_head"]
    turn: Float[Tensor, " d_head"]
    partner: Int[Tensor, " d_head"]
    own_scale: Float[Tensor, " d_head"]
    bias: Float[Tensor, " head"]
    cap: float | None
    rotation: str

    def keys(self, key: Float[Tensor, "*token d_head"]) -> Float[Tensor, "*token d_head"]:
        """Rotated and scaled keys; their product with the query is the score before the softcap."""
        return key * self.scale.to(key.dtype) + key[..., self.partner] * self.turn.to(key.dtype)

    def own_keys(self, key: Float[Tensor, "*token d_head"]) -> Float[Tensor, "*token d_head"]:
        """Keys scaled for distance 0, for the score of a token with itself."""
        return key * self.own_scale.to(key.dtype)

    def capped(self, scores: Tensor) -> Tensor:
        """Scores after the softcap."""
        return scores if self.cap is None else self.cap * torch.tanh(scores / self.cap)


@dataclass(frozen=True, eq=False)
class QKSample:
    """Random pairs: vectors of query token x and key token y, and the log-weights of y and x for query x.

    `shown` are the scores before the softmax, or None if the model does not show them.
    """

    query: Float[Tensor, "pair head d_head"]
    key: Float[Tensor, "pair head d_head"]
    own_key: Float[Tensor, "pair head d_head"]
    log_weights: Float[Tensor, "pair head 2"]
    shown: Float[Tensor, "pair head 2"] | None

    def fit(self, pairs: Tensor, cap: float | None, rotation: str) -> QKScores:
        """Least-squares fit on three quarters of the data, for the coordinate pairs `pairs` [2, rotated pair]."""
        i, j = pairs
        n_pairs, d_head, n_heads = len(i), self.query.shape[-1], self.query.shape[1]
        rest = torch.ones(d_head, dtype=torch.bool, device="cpu")
        rest[pairs.flatten()] = False
        q, k, own = self.query, self.key, self.own_key
        columns = [
            q[..., i] * k[..., i] + q[..., j] * k[..., j],
            q[..., i] * k[..., j] - q[..., j] * k[..., i],
            -(q[..., i] * own[..., i] + q[..., j] * own[..., j]),
            (q * (k - own))[..., rest].sum(-1, keepdim=True),
            torch.eye(n_heads, dtype=q.dtype, device=q.device).expand(len(q), -1, -1),
        ]
        design = torch.cat(columns, dim=-1)
        values = self.log_weights if cap is None else self.shown
        assert values is not None
        slope = torch.ones_like(values[..., 0])
        if cap is not None:  # invert the softcap; scores near the cap get little weight
            ratio = (values / cap).clamp(-1 + 1e-12, 1 - 1e-12)
            slope = (1 - ratio.pow(2)).amin(-1)
            values = cap * torch.atanh(ratio)
        target = values[..., 0] - values[..., 1]
        fitted = (torch.arange(len(q), device=q.device) % 4 < 3)[:, None] & target.isfinite()
        weights = slope[fitted].unsqueeze(-1)
        left, right = design[fitted] * weights, (target[fitted] * weights[:, 0]).unsqueeze(-1)
        norms = left.norm(dim=0).clamp_min(1e-300)
        # If all coordinates rotate, one column is zero, and only the CPU has a driver for deficient rank.
        solved = torch.linalg.lstsq((left / norms).cpu(), right.cpu(), driver="gelsd").solution[:, 0]
        solution = solved.to(norms.device) / norms
        cos, sin, own_cos, plain, bias = solution.split([n_pairs, n_pairs, n_pairs, 1, n_heads])
        scale, own_scale = plain.repeat(d_head), plain.repeat(d_head)
        turn, partner = torch.zeros_like(scale), torch.arange(d_head, device=scale.device)
        for one, other, sign in ((i, j, 1), (j, i, -1)):
            scale[one], own_scale[one], turn[one], partner[one] = cos, own_cos, sign * sin, other
        return QKScores(scale, turn, partner, own_scale, bias, cap, rotation)

    def error(self, found: QKScores) -> float:
        """Largest error of the log-ratio of weights over all data, relative to the largest log-ratio."""
        score = found.capped((self.query * found.keys(self.key)).sum(-1))
        own = found.capped((self.query * found.own_keys(self.own_key)).sum(-1))
        wanted = self.log_weights[..., 0] - self.log_weights[..., 1]
        finite = wanted.isfinite()
        return relative_error((score - own + found.bias)[finite], wanted[finite])


def rotations(d_head: int, rotary_dim: int | None) -> Iterator[tuple[Tensor, str]]:
    """Ways to pair coordinates, likely ones first: none, then halves and neighbours of the first r coordinates.

    Example:
        >>> [words for _, words in rotations(4, None)]
        ['none', 'halves of 4', 'neighbours of 4', 'halves of 2', 'neighbours of 2']
    """
    yield torch.empty(2, 0, dtype=torch.long, device="cpu"), "none"
    likely = [rotary_dim or d_head, d_head, d_head // 2, d_head // 4]
    for size in dict.fromkeys([*likely, *range(d_head, 0, -1)]):
        if 2 <= size <= d_head and size % 2 == 0:
            first = torch.arange(size // 2, device="cpu")
            yield torch.stack([first, first + size // 2]), f"halves of {size}"
            yield torch.stack([2 * first, 2 * first + 1]), f"neighbours of {size}"
