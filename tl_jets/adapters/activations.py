"""Activations inside blocks (queries, patterns, `z`, MLP activations, norm scales) under TransformerLens' names.

A trace keeps streams and writes only. What is inside a block is read by a hook while the block is evaluated again at its
own stream.

Example:
    >>> from tl_jets import ResidualNetwork, load_tinydocs
    >>> trace = ResidualNetwork(load_tinydocs()).trace("This function is available on Unix and")
    >>> trace["pattern", 0].shape, torch.equal(trace["z0"], trace["blocks.0.attn.hook_z"])
    (torch.Size([1, 4, 8, 8]), True)
"""

from __future__ import annotations

import re
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from tl_jets.adapters.blocks import Blocks, saver
from tl_jets.adapters.parts import through_output
from tl_jets.core.labels import LabelInput
from tl_jets.core.protocol import Recording, Stage

_SHORT = re.compile(r"[a-z]+\d+[a-z]?\w*")
# Not a bridge's own `hook_in` and `hook_out`: Bloom's hold the stream as well.
_KINDS = (
    "q|k|v|z|rot_q|rot_k|result|pattern|attn_scores|pre|post|mid|pre_linear|scale|normalized|attn_in|mlp_in|[qkv]_input"
)
_INSIDE = re.compile(rf"blocks\.\d+\.([\w.]+\.)?hook_({_KINDS})")
_OF_MLP = re.compile(r"blocks\.\d+\.(mlp|ln2|hook_mlp)")


def inner_stage(view: Any, label: LabelInput) -> tuple[str, Stage] | None:
    """The hook inside a block that a name of TransformerLens means, and the attention or MLP around it; None for others."""
    hook = _inner_hook(view, label)
    if hook is None:
        return None
    layer = int(hook.split(".")[1])
    if layer in view.opaque:
        raise NotImplementedError(
            f"{hook} is inside a block of {view.name} that is read as one write only. Use run_with_cache."
        )
    own = f"{layer}_mlp" if _OF_MLP.match(hook) else f"{layer}_attn"
    return hook, next(stage for stage in view.stages("sublayer") if own in (step.label for step in stage.steps))


def _inner_hook(view: Blocks, label: LabelInput) -> str | None:
    """The hook; None for streams, writes, sources and labels of ours."""
    from transformer_lens.utilities.components_utils import (
        get_act_name,  # seconds to load: not before a trace is indexed
    )

    name = label
    if isinstance(label, tuple):
        kind, layer, *rest = label if len(label) in (2, 3) else (None, None)
        if not isinstance(kind, str) or not isinstance(layer, Integral):
            return None
        name = get_act_name(kind, int(layer) + (view.n_layers if layer < 0 else 0), *rest)
    elif isinstance(label, str) and _SHORT.fullmatch(label):
        name = get_act_name(label)
    return name if isinstance(name, str) and _INSIDE.fullmatch(name) and name in view.hook_dict else None


def inner_activation(view: Any, recording: Recording, hook: str, stage: Stage, stream: Tensor) -> Tensor:
    """The activation at a hook, with its stage evaluated at `stream`.

    Raises NotImplementedError if the hook does not fire: an option of the model is off, or its block runs it elsewhere.
    """
    saved: dict[str, Tensor] = {}
    is_made = hook.endswith("hook_result") and not view.cfg.use_attn_result  # TransformerLens leaves it out
    grabbed = hook.replace("hook_result", "hook_z") if is_made else hook
    with torch.no_grad(), view.hooks([saver(saved, grabbed, copies=True)]):
        view.writes(recording, stage, stream)
    if grabbed not in saved:
        raise NotImplementedError(
            f"{hook} does not fire when {view.name} runs its block: an option of the model is off (use_split_qkv_input, "
            f"use_attn_in, use_hook_mlp_in), or its kind of block has no such activation. Use run_with_cache to see what it has."
        )
    found = saved[grabbed]
    if is_made:
        found = through_output(view, stage.steps[0].layer, found).movedim(0, -2)
    return found.to(view.device)
