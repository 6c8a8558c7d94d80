"""Other tools of the field: traces and terms as TransformerLens' caches, results as circuitsvis views.

Each name is loaded on first use: circuitsvis takes half a second.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tl_jets.interop.activation_caches import to_activation_cache
    from tl_jets.interop.circuitsvis import to_circuitsvis

__all__ = ["to_activation_cache", "to_circuitsvis"]

_PLACES = {"to_activation_cache": "activation_caches", "to_circuitsvis": "circuitsvis"}


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"tl_jets.interop has no attribute {name!r}; its names are {__all__}.")
    return getattr(import_module(f"tl_jets.interop.{_PLACES[name]}"), name)
