r"""A transformer as a residual network of callables: stages, writes, streams, labels, traces.

A residual network (Chen et al., eq. 1-4) is

.. math::
    h_0 = \eta(z), \qquad h_l = h_{l-1} + \gamma_l(h_{l-1}), \qquad
    \text{logits} = U \gamma_{L+1}(h_L) + b_U .

Here it is a sequence of **stages**. A stage is the set of **writes** that read the same **stream**: a sequential block
is two stages of one write, a parallel block (Pythia, GPT-J) one stage of two; at head granularity every head is a
write. A write is what a step *adds*, without the identity.

===============  ==============================  =====================================================
symbol           name here                       label
===============  ==============================  =====================================================
h_l              stream                          ``3_pre``, ``3_mid``, ``final_post``
gamma_l          step                            ``3_attn``, ``3_mlp``, ``3_block``, ``L3H2``, ``3_attn_bias``
gamma_l(h)       write                           step + ``_out`` (``3_mlp_out``; ``3_attn_bias`` is its own write)
part of an MLP   neuron, and what is without     ``L3N17``, ``3_mlp_bias``; with chosen neurons the others, ``3_mlp_rest``
eta(z)           sources                         ``embed``, ``pos_embed``
                 edit of a stream by a hook      ``edit:blocks.3.hook_resid_pre``
===============  ==============================  =====================================================

A *view* (`ModelView`) supplies everything that depends on the kind of model: `tl_jets.adapters` holds the views of
TransformerLens models, and `CallableModel`, the view of plain functions.

Example:
    >>> import torch
    >>> from tl_jets.calculus import Norm
    >>> from tl_jets.core.decoder import Decoder
    >>> from tl_jets.adapters.callables import CallableModel
    >>> _ = torch.manual_seed(0)
    >>> W = torch.randn(2, 4, 4)
    >>> model = CallableModel(
    ...     embed=torch.nn.Embedding(5, 4),
    ...     stages=[{"0_block": lambda x: x @ W[0]}, {"1_block": lambda x: torch.tanh(x @ W[1])}],
    ...     decoder=Decoder(norm=Norm("RMS"), W_U=torch.randn(4, 5), b_U=torch.zeros(5)),
    ... )
    >>> trace = ResidualNetwork(model).trace(torch.tensor([[0, 3, 1]]))
    >>> bool(torch.allclose(trace["final_post"], trace["embed"] + trace["0_block_out"] + trace["1_block_out"]))
    True
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_jets.calculus.modes import refuse_autocast
from tl_jets.core.protocol import Granularity
from tl_jets.core.structure import Structure
from tl_jets.core.trace import Trace, check_run


class ResidualNetwork(Structure):
    """A model as a sequence of stages, with a decoder. The model is never changed.

    Pass it instead of the model to share the self-check and the metric of the unembedding between calls. They are
    recomputed when weights change (`tl_jets.core.changes`).

    Args:
        model: A `TransformerBridge`, a `HookedTransformer`, a `CallableModel`, or a network (returned at another
            granularity, sharing the view).
        granularity: `"block"` (one write per block), `"sublayer"` (attention and MLP) or `"head"` (every head, the
            attention bias, and the MLP).
        neurons: Neurons (`"L3N17"`) that become steps of their own, beside `3_mlp_rest` (the other neurons and the
            bias). Traces can be indexed with any neuron's write without this.

    Raises:
        TypeError: Unknown kind of model.
        NotImplementedError: An encoder-decoder or a quantized unembedding. State-space blocks, routed experts and
            quantized weights are refused only when one of their steps is evaluated on another stream.
        ValueError: Unknown granularity or neurons, neurons of blocks, or a model in training mode.

    Source: Chen et al., *Jet Expansions of Residual Computation*, eq. 1-4.
    """

    @classmethod
    def of(cls, model: Any, granularity: Granularity | None = None) -> ResidualNetwork:
        """The network of a model, or a network itself, at `granularity` (None: its own, or the default).

        Raises what the constructor raises.
        """
        network = model if isinstance(model, cls) else cls(model)
        network.view.follow(everywhere=False)
        return network if granularity is None else network.at(granularity)

    def tokenize(self, text: str | Sequence[str], *, prepend_bos: bool | None = None) -> dict[str, Tensor]:
        """Token ids and attention mask of text; every function accepts the result in place of the text.

        Args:
            text: A prompt or a list of prompts.
            prepend_bos: Whether to prepend the model's BOS; None for the model's default. Use False for text that
                starts with BOS, as chat templates write it.

        Returns:
            `input_ids` [batch, pos], padded on the right, and `attention_mask` [batch, pos], 1 for tokens and 0 for
            padding.

        Raises:
            ValueError: No prompt, an empty one, or a model without a tokenizer.
            TypeError: Not text.

        Example:
            >>> from tl_jets.pretrained import load_tinydocs
            >>> network = ResidualNetwork(load_tinydocs())
            >>> network.tokenize(["is available", "is available on"], prepend_bos=False)["attention_mask"].tolist()
            [[1, 1, 0], [1, 1, 1]]
        """
        tokens, valid = self.view.tokenize(text, prepend_bos)
        return {"input_ids": tokens, "attention_mask": valid.long()}

    def trace(
        self,
        text_or_tokens: Any,
        *,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        cache: Any = None,
    ) -> Trace:
        """Run the model once and return its streams and writes as a `Trace`, valid while the same hooks are active.

        Args:
            text_or_tokens: A prompt, a list of prompts (padded on the right), token ids [batch, pos] or [pos], a list
                of ids per prompt, or the output of a tokenizer or of `tokenize` (`input_ids` and `attention_mask`).
            attention_mask: 1 for tokens, 0 for padding, passed to the model. Without one, pad tokens at the ends of
                rows of ids count as padding, with a warning if the pad token is EOS or BOS.
            cache: A TransformerLens `ActivationCache` of the same input under the active hooks; the model then runs
                only to evaluate steps on other streams. Tokens, mask and hooks are checked up to the first attention's
                write, hooks on later layers when their steps are evaluated.

        Raises:
            ValueError: Empty or too long input, tokens outside the vocabulary, a cache that lacks streams or is of
                another input, a model in training mode, streams that do not add up, or logits that the decoder does not
                reproduce.

        Cost: One forward pass; with a cache an embedding and the first attention.
        """
        refuse_autocast(self.decoder.W_U.device)
        heads = {"heads": True} if self.granularity == "head" else {}
        # Derivatives are taken at a trace, which inference tensors do not allow.
        with torch.inference_mode(False), torch.no_grad():
            trace = Trace(self, self.view.record(text_or_tokens, attention_mask, cache, **heads))
            check_run(trace)
        return trace


def trace_of(network: ResidualNetwork, text_or_tokens: Any, attention_mask: Any = None, cache: Any = None) -> Trace:
    """Trace an input on a network; a `Trace` of unchanged hooks and weights is taken over, without its expansions.

    Raises:
        ValueError: A trace of another model, hooks or weights, or a trace combined with a mask or cache.
    """
    if not isinstance(text_or_tokens, Trace):
        return network.trace(text_or_tokens, attention_mask=attention_mask, cache=cache)
    if attention_mask is not None or cache is not None:
        raise ValueError("A trace already holds its attention mask and streams; leave attention_mask and cache out.")
    trace = text_or_tokens.on(network)
    trace.check_model()
    return trace
