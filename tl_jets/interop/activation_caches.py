"""`to_activation_cache`: a trace, or the terms of a stage, as TransformerLens' own `ActivationCache`.

TransformerLens' patching, `decompose_resid`, `accumulated_resid` and `stack_head_results` then run on them unchanged.

Example: the model with one term in place of an MLP, by TransformerLens' own hooks
    >>> import tl_jets as tj
    >>> model = tj.load_tinydocs()
    >>> prompt = "This function is available on Unix and"
    >>> terms = tj.jet_expand(model, "3_mlp", centers=["embed", "3_attn_out"], linearize="detached")(prompt)
    >>> cache = to_activation_cache(terms, paths=terms.labels[:1])
    >>> put = lambda stream, hook: cache[hook.name]
    >>> logits = model.run_with_hooks(prompt, fwd_hooks=[("blocks.3.hook_resid_post", put)])
    >>> torch.equal(cache["resid_post", 3], terms[terms.labels[0]])
    True
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformer_lens import ActivationCache

from tl_jets.core.labels import hook_names
from tl_jets.core.path import Path
from tl_jets.core.trace import Trace
from tl_jets.core.trace_values import TraceValues, final_scale
from tl_jets.jets.cache import JetCache


class CheckedActivationCache(ActivationCache):
    """An `ActivationCache` whose `logit_attrs` refuses a final norm with a gain, which TransformerLens leaves out."""

    gain_is_folded = True
    is_difference = False
    trace: Trace | None = None  # of the same cells, from which scales of norms inside blocks are read on request

    def apply_ln_to_stack(
        self, residual_stack: Tensor, layer: int | None = None, mlp_input: bool = False, *args: Any, **kwargs: Any
    ) -> Tensor:
        """As in TransformerLens; raises ValueError for a difference, which has no scale of a norm."""
        if self.is_difference:
            raise ValueError(
                "A difference of two runs has no norm scale of its own; apply TransformerLens' layer norms and logit_attrs to the "
                "cache of each run, and subtract what they give."
            )
        if self.trace is not None and self.has_batch_dim and layer in range(self.trace.network.n_layers):
            name = f"blocks.{layer}.{'ln2' if mlp_input else 'ln1'}.hook_scale"
            if name not in self.cache_dict:
                self.cache_dict[name] = self.trace[name]
        return super().apply_ln_to_stack(residual_stack, layer, mlp_input, *args, **kwargs)

    def logit_attrs(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in TransformerLens; raises ValueError where the final norm has a gain."""
        if not self.gain_is_folded:
            raise ValueError(
                "TransformerLens' logit_attrs needs the gain of ln_final folded into W_U; this model has one of its own, which "
                "would be left out. Fold it (enable_compatibility_mode, fold_ln=True), or use JetCache.logit_attrs or "
                "joint_jet_lens(linearize='detached'), which take it."
            )
        return super().logit_attrs(*args, **kwargs)

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> ActivationCache:
        """As in TransformerLens."""
        found = super().apply_slice_to_batch_dim(batch_slice)
        cache = _cache(found.cache_dict, self.model, self.gain_is_folded, found.has_batch_dim)
        cache.is_difference = self.is_difference
        return cache


@torch.no_grad()
def to_activation_cache(
    result: Trace | TraceValues | JetCache,
    *,
    paths: Sequence[str | Path] | None = None,
    include_remainder: bool = False,
) -> ActivationCache:
    """A trace, a difference of two or a `JetCache` as a TransformerLens `ActivationCache` of the same run.

    It holds `hook_embed`, `hook_pos_embed`, `hook_resid_pre`, `hook_resid_mid`, `hook_resid_post`, `hook_attn_out` and
    `hook_mlp_out` of every block, where the model has them; `attn.hook_result`, if the network has granularity `"head"`;
    and `ln_final.hook_scale`. On raw weights a head's result here leaves out what biases of its values and of the norm
    before it give, the same at every position, which is in `<layer>_attn_bias`; TransformerLens' own has it.

    For a `JetCache` the sum of its terms, or of some, takes the place of the stream that its stage writes to, under each
    of that stream's names; everything else is the run's own. A `TransformerBridge` reads `hook_resid_mid` in the MLP
    only: an edit there does not change what the block passes on. A difference of two traces has no `ln_final.hook_scale`.

    Args:
        result: A trace, `trace.freeze()`, `trace - other`, or the cache of a stage's expansion with its trace.
        paths: Terms of a `JetCache` that count; None for all.
        include_remainder: Whether what all terms leave over is added, so that all paths give the model's own stream.

    Returns:
        The cache; values [batch, pos, d_model], at the cells of the `JetCache`. Its `logit_attrs` refuses models whose
        final norm has a gain, which TransformerLens leaves out.

    Raises:
        TypeError: Neither a trace nor a `JetCache`; a trace is given terms.
        ValueError: Terms of the decoder, whose input to `W_U` has no hook; a slice that dropped an axis; no TransformerLens
            model; a cache without its trace.
        KeyError: A path that the cache does not have.

    Cost:
        Nothing beyond the trace; below heads, their writes once.

    Example: in the docstring of `tl_jets.interop.activation_caches`.
    """
    if isinstance(result, (Trace, TraceValues)):
        if paths is not None or include_remainder:
            raise TypeError("A trace has no terms; `paths` and `include_remainder` are for a JetCache.")
        return _of_trace(result)
    if not isinstance(result, JetCache):
        raise TypeError(f"to_activation_cache takes a Trace or a JetCache; got {type(result).__name__}.")
    if result.is_decoded or result.truth.ndim != 3:
        what = "terms of the decoder" if result.is_decoded else f"a cache of shape {list(result.truth.shape)}"
        raise ValueError(
            f"to_activation_cache needs the terms of a stage inside the model, [batch, pos, d_model]; got {what}. The input of "
            f"W_U has no hook in TransformerLens; use `logits` and `logit_attrs` of the JetCache."
        )
    trace = result.traced("An ActivationCache")
    found = _of_trace(trace)
    values = {name: result.here(value) for name, value in found.cache_dict.items()}
    total = result.stack(None if paths is None else list(paths)).sum(0)
    total = total + result.remainder if include_remainder else total
    following = result.expansion.network.next_stream(result.expansion.stage)
    values |= dict.fromkeys(_names(trace.network.n_layers, found.model)[following], total)
    return _cache(values, found.model, found.gain_is_folded)


def _of_trace(trace: Trace | TraceValues) -> CheckedActivationCache:
    """Streams, writes, heads and the final scale of a run under TransformerLens' names."""
    network = trace.network
    if network is None:
        raise ValueError(
            "An ActivationCache needs the model, which a loaded result does not have; make the trace again, or index the values by "
            "TransformerLens' names: values['resid_post', 3]."
        )
    model = getattr(network.view, "model", None)
    if model is None:
        raise ValueError("An ActivationCache is of a TransformerLens model; this network is one of plain callables.")
    names = _names(network.n_layers, model)
    values = {name: trace[label] for label in trace.labels for name in names.get(label, ())}
    heads: dict[int, list[Tensor]] = {}
    for step in network.steps:
        if step.kind == "head":
            heads.setdefault(step.layer, []).append(trace[step.write])
    values |= {f"blocks.{layer}.attn.hook_result": torch.stack(own, -2) for layer, own in heads.items()}
    scale = final_scale(trace) if isinstance(trace, Trace) else trace.final_scale
    values |= {} if scale is None else {"ln_final.hook_scale": scale}
    gain = network.decoder.norm.weight
    found = _cache(values, model, gain is None or bool((gain == 1).all()))
    found.is_difference = isinstance(trace, TraceValues) and trace.is_difference
    found.trace = trace if isinstance(trace, Trace) else None
    return found


def _names(n_layers: int, model: Any) -> dict[str, list[str]]:
    """The names of activations by label: TransformerLens' and, on a bridge, those of the modules whose hooks they are."""
    points = model.hook_dict
    there = {label: [hook for hook in hooks if hook in points] for label, hooks in hook_names(n_layers).items()}
    return {
        label: list(dict.fromkeys([*hooks, *(points[hook].name for hook in hooks)])) for label, hooks in there.items()
    }


def _cache(values: dict[str, Tensor], model: Any, gain_is_folded: bool, has_batch_dim: bool = True) -> Any:
    found = CheckedActivationCache(values, model, has_batch_dim=has_batch_dim)
    found.gain_is_folded = gain_is_folded
    return found
