r"""Attribution of the model's logits to parts: length, angle, share, and effect on a target.

With T the model's additive logits at one position and P a part of them (a path, or a sum of paths), both centered over
the vocabulary,

==========  =====================================  ==========================================================
measure     definition                             what it says
==========  =====================================  ==========================================================
norm        \|P\| / \|T\|                          how large the part is; parts may cancel
cosine      P.T / (\|P\| \|T\|)                    whether it points to what the model says
share       P.T / \|T\|^2                          the part's projection on T: shares of all parts sum to 1
effect      P[target]                              logits it adds to a target, beyond the mean of the vocabulary
==========  =====================================  ==========================================================

Effects of all parts sum to the model's own centered logit of the target (unit: `tl_jets.core.attribution`). Lengths and
angles come from the metric of the unembedding, without vocabulary-sized tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.core.attribution import directions
from tl_jets.core.protocol import FINAL_STREAM
from tl_jets.core.readout import top_tokens
from tl_jets.core.selection import ANSWER, Rows, TargetInput, read_targets
from tl_jets.core.structure import Structure
from tl_jets.core.trace import Trace

Rank = Literal["length", "effect"]


@dataclass(frozen=True, eq=False)
class Yardstick:
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
    def of(cls, trace: Trace, rows: Rows, targets: TargetInput | None) -> Yardstick:
        """From a trace's logits at selected positions and targets; None for the model's best token."""
        return cls.at(trace.network, rows, trace.decoder.norm(rows.take(trace[FINAL_STREAM])), targets)

    @classmethod
    @torch.no_grad()
    def at(
        cls, network: Structure, rows: Rows, states: Float[Tensor, "row d_model"], targets: TargetInput | None
    ) -> Yardstick:
        """From the inputs of the unembedding at these rows."""
        decoder, metric = network.decoder, network.decoder.metric(centered=True)
        answers = top_tokens(decoder, states, k=1).indices[:, 0]
        ids, asked = read_targets(network, targets, rows)
        names: list[str | int] = [ANSWER] if asked is None else asked
        ids = rows.spread(answers, fill=0)[..., None] if ids is None else ids
        columns = directions(decoder, ids[rows.keep])
        return cls(rows, metric.augment(states, 1.0), metric.gram, columns, ids, names, answers)

    def augmented(self, states: Tensor, bias_weights: Tensor) -> Tensor:
        """Parts [part, batch, pos, d_model] with multiples of b_U [part], as rows [part, row, d_model + 1]."""
        parts = states[:, self.rows.keep].double()
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
