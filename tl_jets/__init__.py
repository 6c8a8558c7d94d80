"""Jets for TransformerLens: a transformer as a sum of input-to-output paths, and the lenses that read them.

Importing the package loads nothing else: every name is loaded from its room when it is first used.

Example:
    >>> import tl_jets as tj
    >>> tj.__version__.count(".") >= 2
    True
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and the documentation read
    from tl_jets import studies as studies
    from tl_jets import views as views
    from tl_jets.adapters.callables import CallableModel
    from tl_jets.adapters.dictionaries import with_dictionary
    from tl_jets.calculus.norms import Norm
    from tl_jets.circuits.attribution_patching import attribution_patching
    from tl_jets.circuits.contrast import Contrast, contrast
    from tl_jets.circuits.faithfulness import CircuitFaithfulness, circuit_faithfulness
    from tl_jets.circuits.patching import PatchingComparison, compare_patching
    from tl_jets.core.concatenation import concat
    from tl_jets.core.decoder import Decoder
    from tl_jets.core.divergence import DivergenceWarning
    from tl_jets.core.linear_map import LinearMap, SingularVectors
    from tl_jets.core.logit_reader import TopTokens
    from tl_jets.core.measures import Measures
    from tl_jets.core.metric import Metric
    from tl_jets.core.network import ResidualNetwork
    from tl_jets.core.prompts import over_prompts
    from tl_jets.core.protocol import Stage, Step
    from tl_jets.core.results import Result, load
    from tl_jets.core.trace import Trace
    from tl_jets.core.trace_values import TraceValues
    from tl_jets.detached_map import (
        BlockNorms,
        DetachedJacobian,
        DetachedSpectra,
        detached,
        detached_jacobian,
        detached_spectra,
    )
    from tl_jets.flows import Flow, JointFlow, flow, joint_flow
    from tl_jets.interop.activation_caches import to_activation_cache
    from tl_jets.interop.circuitsvis import to_circuitsvis
    from tl_jets.interventions.ablation_effects import ablation_effect
    from tl_jets.interventions.ablation_jets import AblationJet
    from tl_jets.interventions.effects import AblationEffect
    from tl_jets.interventions.first_order_effects import FirstOrderEffects, first_order_effects
    from tl_jets.interventions.hooks import ablation_hooks
    from tl_jets.interventions.path_ablations import path_ablation
    from tl_jets.interventions.steering import steering_hooks
    from tl_jets.jets import Expansion, JetCache, Path, Term, jet_expand
    from tl_jets.lenses import (
        IterativeJetLens,
        JointJetLens,
        answer_lens,
        iterative_jet_lens,
        joint_jet_lens,
        translated_lens,
    )
    from tl_jets.ngrams import jet_bigrams, jet_trigrams
    from tl_jets.ngrams.tables import NgramTable
    from tl_jets.paths.cache import PathCache
    from tl_jets.paths.circuit import Circuit
    from tl_jets.paths.component_interactions import Interactions
    from tl_jets.paths.expansion import PathExpansion, exponential_expansion
    from tl_jets.paths.reorganized import ReorganizedExpansion
    from tl_jets.paths.statistics import PathStatistics, path_lengths, path_sums
    from tl_jets.pretrained import load_tinycode, load_tinydocs

__version__ = version("tl-jets")

__all__ = [
    "CallableModel",
    "ResidualNetwork",
    "ablation_effect",
    "ablation_hooks",
    "answer_lens",
    "attribution_patching",
    "circuit_faithfulness",
    "compare_patching",
    "concat",
    "contrast",
    "detached",
    "detached_jacobian",
    "detached_spectra",
    "exponential_expansion",
    "first_order_effects",
    "flow",
    "iterative_jet_lens",
    "jet_bigrams",
    "jet_expand",
    "jet_trigrams",
    "joint_flow",
    "joint_jet_lens",
    "load",
    "load_tinycode",
    "load_tinydocs",
    "over_prompts",
    "path_ablation",
    "path_lengths",
    "path_sums",
    "steering_hooks",
    "studies",
    "to_activation_cache",
    "to_circuitsvis",
    "translated_lens",
    "views",
    "with_dictionary",
]

# Where each name is: the front door's, and classes of results, which their rooms export.
_PLACES = {
    "tl_jets.adapters.callables": ("CallableModel",),
    "tl_jets.adapters.dictionaries": ("with_dictionary",),
    "tl_jets.calculus.norms": ("Norm",),
    "tl_jets.circuits.attribution_patching": ("attribution_patching",),
    "tl_jets.circuits.contrast": ("Contrast", "contrast"),
    "tl_jets.circuits.faithfulness": ("CircuitFaithfulness", "circuit_faithfulness"),
    "tl_jets.circuits.patching": ("PatchingComparison", "compare_patching"),
    "tl_jets.core.concatenation": ("concat",),
    "tl_jets.core.decoder": ("Decoder",),
    "tl_jets.core.linear_map": ("LinearMap", "SingularVectors"),
    "tl_jets.core.measures": ("Measures",),
    "tl_jets.core.metric": ("Metric",),
    "tl_jets.core.network": ("ResidualNetwork",),
    "tl_jets.core.prompts": ("over_prompts",),
    "tl_jets.core.protocol": ("Stage", "Step"),
    "tl_jets.core.logit_reader": ("TopTokens",),
    "tl_jets.core.results": ("Result", "load"),
    "tl_jets.core.trace": ("Trace",),
    "tl_jets.core.trace_values": ("TraceValues",),
    "tl_jets.core.divergence": ("DivergenceWarning",),
    "tl_jets.detached_map": (
        "BlockNorms",
        "DetachedJacobian",
        "DetachedSpectra",
        "detached",
        "detached_jacobian",
        "detached_spectra",
    ),
    "tl_jets.flows": ("Flow", "JointFlow", "flow", "joint_flow"),
    "tl_jets.interop.activation_caches": ("to_activation_cache",),
    "tl_jets.interop.circuitsvis": ("to_circuitsvis",),
    "tl_jets.interventions.ablation_effects": ("ablation_effect",),
    "tl_jets.interventions.ablation_jets": ("AblationJet",),
    "tl_jets.interventions.effects": ("AblationEffect",),
    "tl_jets.interventions.first_order_effects": ("FirstOrderEffects", "first_order_effects"),
    "tl_jets.interventions.hooks": ("ablation_hooks",),
    "tl_jets.interventions.path_ablations": ("path_ablation",),
    "tl_jets.interventions.steering": ("steering_hooks",),
    "tl_jets.jets": ("Expansion", "JetCache", "Path", "Term", "jet_expand"),
    "tl_jets.lenses": (
        "IterativeJetLens",
        "JointJetLens",
        "answer_lens",
        "iterative_jet_lens",
        "joint_jet_lens",
        "translated_lens",
    ),
    "tl_jets.ngrams": ("jet_bigrams", "jet_trigrams"),
    "tl_jets.ngrams.tables": ("NgramTable",),
    "tl_jets.paths.cache": ("PathCache",),
    "tl_jets.paths.circuit": ("Circuit",),
    "tl_jets.paths.component_interactions": ("Interactions",),
    "tl_jets.paths.expansion": ("PathExpansion", "exponential_expansion"),
    "tl_jets.paths.reorganized": ("ReorganizedExpansion",),
    "tl_jets.paths.statistics": ("PathStatistics", "path_lengths", "path_sums"),
    "tl_jets.pretrained": ("load_tinycode", "load_tinydocs"),
}
_ROOMS = (
    "adapters",
    "calculus",
    "circuits",
    "core",
    "detached_map",
    "flows",
    "interop",
    "interventions",
    "jets",
    "lenses",
    "ngrams",
    "paths",
    "studies",
    "views",
)
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name in _ROOMS:
        return import_module(f"tl_jets.{name}")
    if name not in _PLACE_OF:
        raise AttributeError(f"tl_jets has no attribute {name!r}; its names are in tl_jets.__all__.")
    found = globals()[name] = getattr(import_module(_PLACE_OF[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
