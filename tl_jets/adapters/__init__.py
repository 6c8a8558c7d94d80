"""TransformerLens models as residual networks; `view` returns the view of a model's class."""

from __future__ import annotations

import sys
from typing import Any

from tl_jets.adapters.bridge import TransformerBridgeView
from tl_jets.core.protocol import ModelView

__all__ = ["TransformerBridgeView", "view"]


def view(model: Any) -> ModelView | None:
    """The view of a TransformerLens model, or None if `model` is something else."""
    if "transformer_lens" not in sys.modules:  # importing takes seconds, and no model can exist without it
        return None
    from transformer_lens.model_bridge import TransformerBridge

    if isinstance(model, TransformerBridge):
        return TransformerBridgeView(model)
    try:
        from transformer_lens import HookedTransformer
    except ImportError:  # TransformerLens 4 raises for HookedTransformer
        return None
    if isinstance(model, HookedTransformer):
        from tl_jets.adapters.hooked import HookedTransformerView

        return HookedTransformerView(model)
    return None
