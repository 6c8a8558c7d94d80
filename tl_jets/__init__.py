"""Jets for TransformerLens: a transformer as a sum of input-to-output paths, and the lenses that read them.

Example:
    >>> import tl_jets as tj
    >>> tj.__version__.count(".") >= 2
    True
"""

from importlib.metadata import version

import tl_jets.adapters  # noqa: F401  (registers the views of TransformerLens models)
import tl_jets.studies as studies
import tl_jets.views as views
from tl_jets.calculus import Jet, Norm, NormJet, Series, jet, norm_jet
from tl_jets.core.decoder import Decoder, Metric
from tl_jets.core.linear_map import LinearMap, SingularVectors
from tl_jets.core.measures import Measures
from tl_jets.core.network import CallableModel, ResidualNetwork
from tl_jets.core.protocol import Stage, Step
from tl_jets.core.readout import TopTokens
from tl_jets.core.trace import Trace
from tl_jets.detached_map import (
    BlockNorms,
    DetachedJacobian,
    DetachedSpectra,
    detached,
    detached_jacobian,
    detached_spectra,
)
from tl_jets.interventions.ablation_effects import AblationEffect, ablation_effect
from tl_jets.interventions.hooks import ablation_hooks, patch_hooks, without_path
from tl_jets.interventions.path_ablations import path_ablation
from tl_jets.interventions.steering import steering_hooks
from tl_jets.jets import Expansion, JetCache, Path, Term, jet_expand
from tl_jets.lenses import IterativeJetLens, JointJetLens, iterative_jet_lens, joint_jet_lens
from tl_jets.ngrams import bigram_log_normalizers, jet_bigrams, jet_bigrams_by_path, jet_trigrams, trigram_scores
from tl_jets.ngrams.tables import NgramTable, side_by_side
from tl_jets.paths.cache import PathCache
from tl_jets.paths.component_interactions import Interactions, interactions
from tl_jets.paths.expansion import PathExpansion, exponential_expansion
from tl_jets.paths.reorganized import ReorganizedExpansion, reorganized_expansion
from tl_jets.paths.statistics import PathStatistics, path_lengths, path_sums
from tl_jets.pretrained import load_tinycode, load_tinydocs

__version__ = version("tl-jets")

__all__ = [
    "AblationEffect",
    "BlockNorms",
    "CallableModel",
    "Decoder",
    "DetachedJacobian",
    "DetachedSpectra",
    "Expansion",
    "Interactions",
    "IterativeJetLens",
    "Jet",
    "JetCache",
    "JointJetLens",
    "LinearMap",
    "Measures",
    "Metric",
    "NgramTable",
    "Norm",
    "NormJet",
    "Path",
    "PathCache",
    "PathExpansion",
    "PathStatistics",
    "ReorganizedExpansion",
    "ResidualNetwork",
    "Series",
    "SingularVectors",
    "Stage",
    "Step",
    "Term",
    "TopTokens",
    "Trace",
    "ablation_effect",
    "ablation_hooks",
    "bigram_log_normalizers",
    "detached",
    "detached_jacobian",
    "detached_spectra",
    "exponential_expansion",
    "interactions",
    "iterative_jet_lens",
    "jet",
    "jet_bigrams",
    "jet_bigrams_by_path",
    "jet_expand",
    "jet_trigrams",
    "joint_jet_lens",
    "load_tinycode",
    "load_tinydocs",
    "norm_jet",
    "patch_hooks",
    "path_ablation",
    "path_lengths",
    "path_sums",
    "reorganized_expansion",
    "side_by_side",
    "steering_hooks",
    "studies",
    "trigram_scores",
    "views",
    "without_path",
]
