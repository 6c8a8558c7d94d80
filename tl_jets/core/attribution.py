r"""Effects on logits, and the one unit of all of them: what everything that explains or ablates a logit is measured in.

An **effect** on a token t is what a part of the final stream, or of what the unembedding reads, adds to t's logit beyond the
mean of the vocabulary. With :math:`\tilde x = (x, s)` a state and its multiple of :math:`b_U`,

.. math::
    \text{effect} = \tilde x \cdot g_t, \qquad g_t = a \, (\tilde u_t - \bar u),

with :math:`\tilde u_t` a column of [W_U; b_U], :math:`\bar u` the mean column and a the model's own logit scale. Effects of parts
sum to the effect of the whole, and those of all parts to the model's own centered logit.

The unit is that of **additive logits**: after a logit scale (Granite, Cohere), which is linear, and before a softcap (Gemma
2), which is not, so that nothing behind it is a sum of parts. For a model without a softcap these are its own logits. What
ablations change is taken in the same unit, and what it is called in results is `Decoder.unit`. Dividing all logits of a model
by a number divides effects and ablations alike.

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

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.core.decoder import Decoder
from tl_jets.core.protocol import FINAL_STREAM
from tl_jets.core.trace import Trace


def directions(decoder: Decoder, ids: Int[Tensor, "*cells"]) -> Float[Tensor, "*cells d_model_and_bias"]:
    """What the effects on tokens are the products with: g of the module, for states with their multiple of b_U behind.

    Args:
        decoder: The model's decoder.
        ids: Token ids. Shape [*cells].

    Returns:
        In additive logits, float64. Shape [*cells, d_model + 1].
    """
    columns = torch.cat([decoder.W_U[:, ids].double(), decoder.b_U[ids].double()[None]]).movedim(0, -1)
    return decoder.scaled(columns) - decoder.metric(centered=True).mean / decoder.d_vocab**0.5


def mean_logits(
    decoder: Decoder, states: Float[Tensor, "*rows d_model"], bias_weight: float | Float[Tensor, "*#rows"]
) -> Float[Tensor, "*rows"]:
    """The mean of the additive logits of states over the vocabulary, float64. Shape [*rows]."""
    metric = decoder.metric(centered=True)
    return metric.augment(states, bias_weight) @ metric.mean / decoder.d_vocab**0.5


def centered(
    logits: Float[Tensor, "*cells d_vocab"], ids: Int[Tensor, "*cells target"]
) -> Float[Tensor, "*cells target"]:
    """Additive logits of targets beyond the mean of the vocabulary. Shape [*cells, target]."""
    return logits.gather(-1, ids) - logits.mean(-1, keepdim=True)


@torch.no_grad()
def additive_logits(trace: Trace, places: Int[Tensor, "batch out_pos"]) -> Float[Tensor, "batch out_pos d_vocab"]:
    """The model's own additive logits at some places of each row: as it gave them, unless a softcap bent them.

    Args:
        trace: The input.
        places: Which positions of each padded row. Shape [batch, out_pos].

    Returns:
        Float64. Shape [batch, out_pos, d_vocab].
    """
    decoder = trace.network.decoder

    def at(values: Tensor) -> Tensor:
        return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))

    if decoder.transform is None and trace.logits is not None:
        return at(trace.logits).double()
    return decoder.logits(decoder.norm(at(trace[FINAL_STREAM]))).double()
