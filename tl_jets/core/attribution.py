r"""Attribution of the model's logits to parts: effect on a target, length, angle and share.

With :math:`\tilde x = (x, s)` a state and its multiple of :math:`b_U`, the **effect** on a token t of a part of the final
stream is what it adds to the logit of t, minus the mean over the vocabulary:

.. math::
    \text{effect} = \tilde x \cdot g_t, \qquad g_t = a \, (\tilde u_t - \bar u),

with :math:`\tilde u_t` a column of [W_U; b_U], :math:`\bar u` the mean column and a the logit scale. The unit is
**additive logits**: after the linear logit scale (Granite, Cohere) and before the softcap (Gemma 2); without a softcap,
the model's own logits. `Decoder.unit` is its name in results. With T the model's additive logits at one position and P
those of a part (a path, or a sum of paths), both centered over the vocabulary,

==========  =====================================  ==========================================================
measure     definition                             what it says
==========  =====================================  ==========================================================
norm        \|P\| / \|T\|                          how large the part is; parts may cancel
cosine      P.T / (\|P\| \|T\|)                    whether it points to what the model says
share       P.T / \|T\|^2                          the part's projection on T: shares of all parts sum to 1
effect      P[target]                              effects of all parts sum to the model's centered logit
==========  =====================================  ==========================================================

Lengths and angles come from the metric of the unembedding, without vocabulary-sized tensors.

Example:
    >>> import torch
    >>> from tl_jets.calculus import Norm
    >>> decoder = Decoder(Norm("RMS"), torch.randn(4, 7), torch.randn(7), transform=lambda logits: logits / 16)
    >>> state, token = torch.randn(2, 4), torch.tensor([3, 5])
    >>> by_hand = decoder.logits(state).double()
    >>> effect = (decoder.metric(True).augment(state, 1.0) * directions(decoder, token)).sum(-1)
    >>> bool(torch.allclose(effect, centered(by_hand, token[:, None])[:, 0], atol=1e-5))
    True
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.core.decoder import Decoder
from tl_jets.core.logit_reader import top_tokens
from tl_jets.core.metric import augmented
from tl_jets.core.protocol import FINAL_STREAM
from tl_jets.core.selection import ANSWER, Rows, TargetInput, read_targets
from tl_jets.core.trace import Trace

Rank = Literal["length", "effect"]


def directions(decoder: Decoder, ids: Int[Tensor, "*cells"]) -> Float[Tensor, "*cells d_model_and_bias"]:
    """The vectors g_t of the module for tokens `ids`, whose products with states (x, s) are effects; float64."""
    columns = torch.cat([decoder.W_U[:, ids].double(), decoder.b_U[ids].double()[None]]).movedim(0, -1)
    return decoder.scaled(columns - decoder.mean_column())


def mean_logits(
    decoder: Decoder, states: Float[Tensor, "*rows d_model"], bias_weight: float | Float[Tensor, "*#rows"]
) -> Float[Tensor, "*rows"]:
    """Mean over the vocabulary of the additive logits of states [*rows], float64."""
    decoder.check_states(states)
    return augmented(states, bias_weight) @ decoder.scaled(decoder.mean_column())


def centered(
    logits: Float[Tensor, "*cells d_vocab"], ids: Int[Tensor, "*cells target"]
) -> Float[Tensor, "*cells target"]:
    """Additive logits of targets minus the mean over the vocabulary [*cells, target]."""
    return logits.gather(-1, ids) - logits.mean(-1, keepdim=True)


@torch.no_grad()
def additive_logits(trace: Trace, places: Int[Tensor, "batch out_pos"]) -> Float[Tensor, "batch out_pos d_vocab"]:
    """The model's own additive logits at positions `places` of each padded row, float64."""
    decoder = trace.decoder

    def at(values: Tensor) -> Tensor:
        return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))

    if decoder.transform is None and trace.logits is not None:
        return at(trace.logits).double()
    return decoder.logits(decoder.norm(at(trace[FINAL_STREAM]))).double()


@dataclass(frozen=True, eq=False)
class LogitAttribution:
    """The model's own logits at selected real positions, against which parts are measured.

    Attributes:
        truth: Input of the unembedding, with multiple 1 of b_U, float64.
        gram: The centered metric of logits.
        directions: Vectors whose products with states are centered target logits, float64.
        target_ids: Token ids [batch, pos, target].
        target_names: Targets as the user gave them; `<answer>` is the model's own best token.
        answers: The model's best tokens [row].
    """

    rows: Rows
    truth: Float[Tensor, "row width"]
    gram: Float[Tensor, "width width"]
    directions: Float[Tensor, "row target width"]
    target_ids: Int[Tensor, "batch pos target"]
    target_names: list[str | int]
    answers: Int[Tensor, " row"]

    @classmethod
    @torch.no_grad()
    def of(cls, trace: Trace, rows: Rows, targets: TargetInput | None) -> LogitAttribution:
        """From a trace's logits at selected positions and targets; None for the model's best token."""
        return cls.at(trace, rows, trace.decoder.norm(rows.take(trace[FINAL_STREAM])), targets)

    @classmethod
    @torch.no_grad()
    def at(
        cls, trace: Trace, rows: Rows, states: Float[Tensor, "row d_model"], targets: TargetInput | None
    ) -> LogitAttribution:
        """From the inputs of the unembedding at these rows."""
        decoder = trace.decoder
        metric = decoder.metric(centered=True)
        answers = top_tokens(decoder, states, k=1).indices[:, 0]
        ids, asked = read_targets(trace.network, targets, rows)
        names: list[str | int] = [ANSWER] if asked is None else asked
        ids = rows.spread(answers, fill=0)[..., None] if ids is None else ids
        columns = directions(decoder, ids[rows.kept])
        return cls(rows, metric.augment(states, 1.0), metric.gram, columns, ids, names, answers)

    def augmented(self, states: Tensor, bias_weights: Tensor) -> Tensor:
        """Parts [part, batch, pos, d_model] with multiples of b_U [part], as rows [part, row, d_model + 1]."""
        batch, cell = self.rows.kept
        parts = states[:, batch, cell].double()
        return torch.cat([parts, bias_weights.to(parts)[:, None, None].expand(*parts.shape[:2], 1)], -1)

    def lengths(self, parts: Tensor) -> Tensor:
        """Lengths of centered logits, [part, row]."""
        return ((parts @ self.gram) * parts).sum(-1).clamp_min(0).sqrt()

    def products(self, parts: Tensor) -> Tensor:
        """Inner products with the model's centered logits, [part, row]."""
        return (parts * (self.truth @ self.gram)).sum(-1)

    def effects(self, parts: Tensor) -> Tensor:
        """Centered logits of the targets, [part, row, target]."""
        return torch.einsum("prd,rtd->prt", parts, self.directions)

    def sizes(self, parts: Tensor, rank: Rank) -> Tensor:
        """One number per part, over all positions: the length of its logits, or the sum of its absolute effects."""
        return self.lengths(parts).norm(dim=-1) if rank == "length" else self.effects(parts).abs().sum((-1, -2))

    def functionals(self, rank: Rank) -> Float[Tensor, "many batch pos d_model"]:
        """Linear functionals of the unembedding's input: products with the model's logits, or effects."""
        if rank == "length":
            unit = self.truth @ self.gram / self.lengths(self.truth[None])[0, :, None]
            found = unit[:, None]
        else:
            found = self.directions
        return self.rows.spread(found[..., :-1].movedim(1, 0), 1, fill=0.0)

    def measure(self, parts: Tensor) -> dict[str, Any]:
        """All measures of parts [part, row, d_model + 1], as [part, batch, pos]; NaN at padding."""
        lengths, own = self.lengths(parts), self.lengths(self.truth[None])[0]
        products, spread = self.products(parts), self.rows.spread
        return {
            "norm": spread(lengths / own),
            "cosine": spread((products / (lengths * own)).clamp(-1, 1)),
            "share": spread(products / own.square()),
            "effect": spread(self.effects(parts), axis=1),
        }
