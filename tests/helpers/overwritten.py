"""Ordinary models made affine by hooks: norm scales, patterns and gates of one input, written into other forward passes.

An independent reference for the detached map: nothing of tl_jets freezes anything here.
"""

from __future__ import annotations

from typing import Any

import torch
import zoo
from torch import Tensor

from tl_jets.calculus import full_precision

GATED = ["llama", "mistral", "qwen3", "olmo2", "gemma2", "gemma1", "qwen2"]
UNGATED = ["gpt2", "gpt_neo", "pythia", "gptj", "attn_only"]
# The bridge ignores edits of scales or patterns elsewhere, and its own norms are not read from hook_scale.
SPECS = [
    spec
    for spec in zoo.available([*GATED, *UNGATED])
    if spec.processing == "raw" and (spec.world == "hooked" or spec.name == "gpt2")
]


def first_stream(model: Any, tokens: Tensor, stream: Tensor | None = None, hooks: list | None = None) -> Any:
    """The model's output with its first stream replaced, and that stream."""
    seen: list[Tensor] = []

    def replace(own: Tensor, hook: Any) -> Tensor:
        seen.append(own if stream is None else stream)
        return seen[-1]

    with model.hooks([("blocks.0.hook_resid_pre", replace), *(hooks or [])]):
        return model(tokens, return_type="logits"), seen[-1]


def overwriting(model: Any, tokens: Tensor, gated: bool) -> list:
    """Hooks that put the recorded norm scales, patterns and gates (or slopes) into another forward pass."""
    with torch.no_grad(), full_precision():
        _, cache = model.run_with_cache(tokens)
    hooks: list = []
    for layer in range(len(model.blocks)):
        block = f"blocks.{layer}."
        names = [name for name in cache if name.startswith(block) and name.endswith(("hook_scale", "hook_pattern"))]
        hooks += [(name, lambda own, hook, value=cache[name]: value) for name in names]
        if gated:
            gate = next(name for name in (block + "mlp.hook_pre", block + "mlp.gate.hook_out") if name in cache)
            hooks.append((gate, lambda own, hook, value=cache[gate]: value))
        elif block + "mlp.hook_post" in cache:
            slope = cache[block + "mlp.hook_post"] / cache[block + "mlp.hook_pre"]
            box: list[Tensor] = []
            hooks.append((block + "mlp.hook_pre", lambda own, hook, box=box: box.append(own)))
            hooks.append((block + "mlp.hook_post", lambda own, hook, box=box, slope=slope: slope * box[-1]))
    return hooks
