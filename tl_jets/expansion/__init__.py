"""Expansions: a stage of the network, or its decoder, as a sum of jets at chosen centers (Algorithm 1)."""

from tl_jets.expansion.cache import Check, JetCache
from tl_jets.expansion.expand import Expansion, jet_expand
from tl_jets.expansion.paths import Function, Label, Path, Term

__all__ = ["Check", "Expansion", "Function", "JetCache", "Label", "Path", "Term", "jet_expand"]
