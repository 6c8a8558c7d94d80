"""Jet lenses: `iterative_jet_lens` reads each layer's stream, `joint_jet_lens` all components together.

The jet of a final norm mixes the layer's own reading and the model's own answer. So every result contains the borrowed
share, and every measure has a control with a random center.
"""

from tl_jets.lenses.answers import answer_lens
from tl_jets.lenses.iterative import IterativeJetLens, iterative_jet_lens
from tl_jets.lenses.joint import JointJetLens, joint_jet_lens
from tl_jets.lenses.translated import translated_lens

__all__ = ["IterativeJetLens", "JointJetLens", "answer_lens", "iterative_jet_lens", "joint_jet_lens", "translated_lens"]
