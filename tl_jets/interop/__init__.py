"""Other tools of the field: traces and terms as TransformerLens' caches, results as circuitsvis views."""

from tl_jets.interop.activation_caches import to_activation_cache
from tl_jets.interop.circuitsvis import to_circuitsvis

__all__ = ["to_activation_cache", "to_circuitsvis"]
