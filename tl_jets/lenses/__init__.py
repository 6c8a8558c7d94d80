"""Jet lenses: what a layer's stream, or all components together, say about the next token.

`iterative_jet_lens` reads layer by layer, `joint_jet_lens` all components together. Whatever the order, the jet of a final
norm is a mix of the layer's own reading and the model's own answer, so every result says how much of it is borrowed, and
every measure stands beside a random center that knows nothing of the layer.
"""

from tl_jets.lenses.iterative import IterativeJetLens, iterative_jet_lens
from tl_jets.lenses.joint import JointJetLens, joint_jet_lens

__all__ = ["IterativeJetLens", "JointJetLens", "iterative_jet_lens", "joint_jet_lens"]
