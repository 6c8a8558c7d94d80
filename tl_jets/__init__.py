"""Jets for TransformerLens: a transformer as a sum of input-to-output paths, and the lenses that read them.

Example:
    >>> import tl_jets as tj
    >>> tj.__version__.count(".") >= 2
    True
"""

from importlib.metadata import version

import tl_jets.adapters  # noqa: F401  (registers the views of TransformerLens models)
from tl_jets.calculus import Jet, Norm, NormJet, Series, jet, norm_jet
from tl_jets.decoder import Decoder, Metric
from tl_jets.detached import DetachedJacobian, detached, detached_jacobian
from tl_jets.expansion import Expansion, JetCache, Path, Term, jet_expand
from tl_jets.lenses import IterativeJetLens, JointJetLens, iterative_jet_lens, joint_jet_lens
from tl_jets.linear_map import LinearMap, SingularVectors
from tl_jets.measures import Measures
from tl_jets.network import CallableModel, ResidualNetwork
from tl_jets.stages import Stage, Step
from tl_jets.trace import Trace

__version__ = version("tl-jets")

__all__ = [
    "CallableModel",
    "Decoder",
    "DetachedJacobian",
    "Expansion",
    "IterativeJetLens",
    "Jet",
    "JetCache",
    "JointJetLens",
    "LinearMap",
    "Measures",
    "Metric",
    "Norm",
    "NormJet",
    "Path",
    "ResidualNetwork",
    "Series",
    "SingularVectors",
    "Stage",
    "Step",
    "Term",
    "Trace",
    "detached",
    "detached_jacobian",
    "iterative_jet_lens",
    "jet",
    "jet_expand",
    "joint_jet_lens",
    "norm_jet",
]
