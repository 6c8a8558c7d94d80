"""What a flow explains: a function of the final stream at the positions that are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.core.attribution import directions
from tl_jets.core.decoder import Decoder
from tl_jets.core.logit_reader import top_tokens
from tl_jets.core.options import check_choice
from tl_jets.core.protocol import FINAL_STREAM
from tl_jets.core.selection import ANSWER, Rows, TargetInput, read_targets
from tl_jets.core.trace import Trace

Measure = Literal["centered", "kl"]


@dataclass(frozen=True, eq=False)
class Target:
    """Centered logits, logit differences or a KL divergence, as a function of the final stream.

    Attributes:
        names: Names of the targets.
        ids: Their tokens [batch, pos, target].
        unit: Unit of the values.
        measure: `"centered"`, `"logit difference"` or `"kl"`.
        columns: The vectors whose products with the unembedding's input are the logits, with a multiple 1 of `b_U`; None
            for KL.
        clean: Log-probabilities of the clean run, for KL.
    """

    decoder: Decoder
    names: list[str | int]
    ids: Int[Tensor, "batch pos target"]
    unit: str
    measure: str
    columns: Float[Tensor, "batch pos target width"] | None
    clean: Float[Tensor, "batch pos d_vocab"] | None = None

    def __call__(self, states: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos target"]:
        """Values at streams before the final norm, in float64."""
        states = self.decoder.norm(states.double())
        if self.columns is not None:
            return torch.einsum("bpd,bptd->bpt", states, self.columns[..., :-1]) + self.columns[..., -1]
        assert self.clean is not None
        found = self.decoder.transformed(self.decoder.logits(states)).log_softmax(-1)
        return (self.clean.exp() * (self.clean - found)).sum(-1, keepdim=True)


@torch.no_grad()
def read_target(
    clean: Trace, rows: Rows, targets: TargetInput | None, against: TargetInput | None, measure: Measure
) -> Target:
    """The target of a flow; ValueError for options that do not go together."""
    check_choice("measure", measure, get_args(Measure))
    decoder, states = clean.decoder, rows.at(clean[FINAL_STREAM])
    if (measure == "kl" and (targets is not None or against is not None)) or (targets is None and against is not None):
        raise ValueError(
            f"Tokens to compare with (against=) need targets, and the divergence of whole predictions (measure='kl') takes "
            f"neither; got targets={targets!r}, against={against!r}, measure={measure!r}."
        )
    ids, names = read_targets(clean.network, targets, rows)
    if ids is None or names is None:
        normed = decoder.norm(states)
        best = top_tokens(decoder, normed.reshape(-1, decoder.d_model), k=1).indices[:, 0]
        ids, names = best.view(*states.shape[:2], 1), [ANSWER]
    if measure == "kl":
        logits = decoder.logits(decoder.norm(states.double()))
        return Target(decoder, ["KL"], ids, "nats", measure, None, decoder.transformed(logits).log_softmax(-1))
    columns = directions(decoder, ids)
    if against is not None:
        others, other_names = read_targets(clean.network, against, rows)
        if others is None or other_names is None or others.shape != ids.shape:
            raise ValueError(
                f"Each target needs one token to compare with; got {ids.shape[-1]} targets, and against={against!r}."
            )
        columns = columns - directions(decoder, others)
        names = [f"{one!s} - {other!s}" for one, other in zip(names, other_names, strict=True)]
    kind = "centered" if against is None else "logit difference"
    return Target(decoder, list(names), ids, decoder.unit, kind, columns)
