"""Expansions of a stage of the network, or of its decoder, as a sum of jets at chosen centers (Algorithm 1)."""

from tl_jets.core.path import Path
from tl_jets.jets.accuracy import Check
from tl_jets.jets.cache import JetCache
from tl_jets.jets.centers import Function, Label, Term
from tl_jets.jets.expand import Expansion, jet_expand

__all__ = ["Check", "Expansion", "Function", "JetCache", "Label", "Path", "Term", "jet_expand"]
