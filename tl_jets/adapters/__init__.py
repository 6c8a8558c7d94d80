"""TransformerLens models as residual networks: one view a class of model. `tl_jets.core.network` asks `view`."""

from __future__ import annotations

import sys
from typing import Any

from tl_jets.adapters.bridge import TransformerBridgeView
from tl_jets.core.protocol import ModelView

__all__ = ["TransformerBridgeView", "view"]


def view(model: Any) -> ModelView | None:
    """The view of a TransformerLens model, or None if `model` is something else."""
    if "transformer_lens" not in sys.modules:  # it takes seconds to import, and nobody has made a model of it
        return None
    from transformer_lens.model_bridge import TransformerBridge

    if isinstance(model, TransformerBridge):
        return TransformerBridgeView(model)
    try:
        from transformer_lens import HookedTransformer
    except ImportError:  # TransformerLens 4 has no HookedTransformer, and raises when asked
        return None
    if isinstance(model, HookedTransformer):
        from tl_jets.adapters.hooked import HookedTransformerView

        return HookedTransformerView(model)
    return None
