r"""Effects on logits, in the one unit that all attributions and ablations use.

The **effect** on a token t of a part of the final stream is what it adds to the logit of t, minus the mean over the
vocabulary. With :math:`\tilde x = (x, s)` a state and its multiple of :math:`b_U`,

.. math::
    \text{effect} = \tilde x \cdot g_t, \qquad g_t = a \, (\tilde u_t - \bar u),

with :math:`\tilde u_t` a column of [W_U; b_U], :math:`\bar u` the mean column and a the logit scale. The effects of all
parts sum to the model's centered logit. The unit is **additive logits**: after the linear logit scale (Granite, Cohere)
and before the softcap (Gemma 2); without a softcap, the model's own logits. `Decoder.unit` is its name in results.

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
    """The vectors g_t of the module for tokens `ids`, whose products with states (x, s) are effects; float64."""
    columns = torch.cat([decoder.W_U[:, ids].double(), decoder.b_U[ids].double()[None]]).movedim(0, -1)
    return decoder.scaled(columns) - decoder.metric(centered=True).mean / decoder.d_vocab**0.5


def mean_logits(
    decoder: Decoder, states: Float[Tensor, "*rows d_model"], bias_weight: float | Float[Tensor, "*#rows"]
) -> Float[Tensor, "*rows"]:
    """Mean over the vocabulary of the additive logits of states [*rows], float64."""
    metric = decoder.metric(centered=True)
    return metric.augment(states, bias_weight) @ metric.mean / decoder.d_vocab**0.5


def centered(
    logits: Float[Tensor, "*cells d_vocab"], ids: Int[Tensor, "*cells target"]
) -> Float[Tensor, "*cells target"]:
    """Additive logits of targets minus the mean over the vocabulary [*cells, target]."""
    return logits.gather(-1, ids) - logits.mean(-1, keepdim=True)


@torch.no_grad()
def additive_logits(trace: Trace, places: Int[Tensor, "batch out_pos"]) -> Float[Tensor, "batch out_pos d_vocab"]:
    """The model's own additive logits at positions `places` of each padded row, float64."""
    decoder = trace.network.decoder

    def at(values: Tensor) -> Tensor:
        return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))

    if decoder.transform is None and trace.logits is not None:
        return at(trace.logits).double()
    return decoder.logits(decoder.norm(at(trace[FINAL_STREAM]))).double()
