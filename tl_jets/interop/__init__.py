"""Other tools of the field: results as circuitsvis views."""

from tl_jets.interop.circuitsvis import to_circuitsvis

__all__ = ["to_circuitsvis"]
