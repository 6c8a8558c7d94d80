"""Studies built on jet n-grams: knowledge, training, roles of components, and fine-tuning, each with its control.

Example:
    >>> import tl_jets as tj
    >>> from tl_jets.studies import mass
    >>> mass(tj.load_tinydocs(), [(" more", " than"), (" such", " as"), (" has", " been")], path="mlps", controls=0)
    Mass(mean of P(z2|z1) over 3 bi-grams, path mlps: 0.3738 [0.245, 0.498])
"""

from tl_jets.core.intervals import bootstrap_interval
from tl_jets.studies.ablation_checks import AblationCheck, ablation_check
from tl_jets.studies.checkpoints import Track, track, track_by_path
from tl_jets.studies.component_roles import Roles, roles
from tl_jets.studies.counts import ngram_counts, unigram_probabilities
from tl_jets.studies.differences import ModelDiff, diff
from tl_jets.studies.heads import HeadScores, head_scores
from tl_jets.studies.mass_changes import MassChange, mass_change
from tl_jets.studies.masses import Mass, mass
from tl_jets.studies.overlap import hit_ratio, pseudo_joint
from tl_jets.studies.pairs import RowScores, pair_scores
from tl_jets.studies.promoters import Promoters, search
from tl_jets.studies.sketches import Sketch, sketch
from tl_jets.studies.text_comparison import TextComparison, best_joint, compare_with_counts

__all__ = [
    "AblationCheck",
    "HeadScores",
    "Mass",
    "MassChange",
    "ModelDiff",
    "Promoters",
    "Roles",
    "RowScores",
    "Sketch",
    "TextComparison",
    "Track",
    "ablation_check",
    "best_joint",
    "bootstrap_interval",
    "compare_with_counts",
    "diff",
    "head_scores",
    "hit_ratio",
    "mass",
    "mass_change",
    "ngram_counts",
    "pair_scores",
    "pseudo_joint",
    "roles",
    "search",
    "sketch",
    "track",
    "track_by_path",
    "unigram_probabilities",
]
