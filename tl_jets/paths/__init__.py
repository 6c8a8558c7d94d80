"""Paths from input to output: expansions of a whole network, exact when it is frozen (Algorithm 2)."""

from tl_jets.paths.cache import PathCache
from tl_jets.paths.circuit import Circuit
from tl_jets.paths.component_interactions import Interactions, interactions
from tl_jets.paths.expansion import PathExpansion, exponential_expansion
from tl_jets.paths.reorganized import ReorganizedExpansion, reorganized_expansion
from tl_jets.paths.statistics import PathStatistics, path_lengths, path_sums

__all__ = [
    "Circuit",
    "Interactions",
    "PathCache",
    "PathExpansion",
    "PathStatistics",
    "ReorganizedExpansion",
    "exponential_expansion",
    "interactions",
    "path_lengths",
    "path_sums",
    "reorganized_expansion",
]
