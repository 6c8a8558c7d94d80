"""Reads labels of streams, writes and sources; TransformerLens' names are accepted wherever a label is.

=========================  ==================  =====================
TransformerLens            as a tuple          label
=========================  ==================  =====================
hook_embed                 ("embed",)          embed
hook_pos_embed             ("pos_embed",)      pos_embed
blocks.3.hook_resid_pre   ("resid_pre", 3)    3_pre
blocks.3.hook_resid_mid   ("resid_mid", 3)    3_mid
blocks.3.hook_resid_post  ("resid_post", 3)   4_pre, or final_post
blocks.3.hook_attn_out    ("attn_out", 3)     3_attn_out
blocks.3.hook_mlp_out     ("mlp_out", 3)      3_mlp_out
=========================  ==================  =====================

Layers of tuples may be negative, as in `ActivationCache`: -1 is the last block. A stream is the one that the next
block reads, after the hooks on it.

Example:
    >>> read_label("blocks.0.hook_resid_post", 2), read_label(("resid_post", -1), 2), read_label("1_mlp", 2)
    ('1_pre', 'final_post', '1_mlp')
"""

from __future__ import annotations

import re
from numbers import Integral
from typing import Any, TypeGuard

from tl_jets.core.protocol import FINAL_STREAM

# A label, or TransformerLens' name of the same activation: `blocks.3.hook_mlp_out`, ("mlp_out", 3).
LabelInput = str | tuple[Any, ...]

_SOURCES = ("embed", "pos_embed")
_KINDS = {"resid_pre": "pre", "resid_mid": "mid", "resid_post": "post", "attn_out": "attn_out", "mlp_out": "mlp_out"}
_HOOK = re.compile(r"blocks\.(\d+)\.hook_(\w+)")


def is_label(value: Any) -> TypeGuard[LabelInput]:
    """Whether a value is one label: a string, or a tuple such as ("mlp_out", 3); other tuples are sequences of labels."""
    if not isinstance(value, tuple):
        return isinstance(value, str)
    return len(value) in (2, 3) and value[0] in _KINDS and isinstance(value[1], Integral)


def is_hook_name(value: Any) -> bool:
    """Whether a value is TransformerLens' name of an activation: `blocks.0.attn.hook_z`, `hook_embed`, ("z", 0)."""
    return isinstance(value, tuple) or (isinstance(value, str) and value.startswith(("blocks.", "hook_")))


def read_label(label: LabelInput, n_layers: int) -> str:
    """The label that a name of TransformerLens means; other strings are returned as they are.

    Raises:
        ValueError: A hook or tuple that names no stream, write or source, or a layer that the model does not have.
        TypeError: Neither a string nor a tuple.
    """
    if isinstance(label, str) and not is_hook_name(label):
        return label
    if not isinstance(label, (str, tuple)):
        raise TypeError(f"A label must be a string, or a tuple such as ('mlp_out', 3); got {label!r}.")
    found = _HOOK.fullmatch(label) if isinstance(label, str) else None
    name, layer = label, None
    if found is not None:
        name, layer = found[2], int(found[1])
    elif isinstance(label, str):
        name = label.removeprefix("hook_")
    elif label and all(rest is None for rest in label[2:]):
        name, layer = (*label, None)[:2]
        if isinstance(layer, Integral):
            layer = int(layer) + (n_layers if int(layer) < 0 else 0)
    if name in _SOURCES and layer is None:
        return str(name)
    if name not in _KINDS or not isinstance(layer, int) or not 0 <= layer < n_layers:
        hooks = ", ".join(f"hook_{kind}" for kind in _KINDS)
        raise ValueError(
            f"TransformerLens' names of a stream, a write or a source are hook_embed, hook_pos_embed, and blocks.0 to "
            f"blocks.{n_layers - 1} with {hooks}, or tuples such as ('mlp_out', 3) and ('resid_post', -1); got {label!r}. Heads "
            f"and neurons are 'L0H2_out' and 'L0N17_out'; what is inside a block, ('z', 0) or ('pattern', 3), is read from a Trace."
        )
    if name != "resid_post":
        return f"{layer}_{_KINDS[name]}"
    return FINAL_STREAM if layer == n_layers - 1 else f"{layer + 1}_pre"


def hook_names(n_layers: int) -> dict[str, list[str]]:
    """TransformerLens' hooks of every stream, write and source, by label; a stream between blocks has two.

    Example:
        >>> names = hook_names(2)
        >>> names["1_pre"], names["1_mlp_out"]
        (['blocks.0.hook_resid_post', 'blocks.1.hook_resid_pre'], ['blocks.1.hook_mlp_out'])
    """
    found: dict[str, list[str]] = {}
    hooks = [f"blocks.{layer}.hook_{kind}" for layer in range(n_layers) for kind in _KINDS]
    for hook in [*(f"hook_{source}" for source in _SOURCES), *hooks]:
        found.setdefault(read_label(hook, n_layers), []).append(hook)
    return found
