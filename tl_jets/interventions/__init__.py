"""Interventions: hooks that ablate, patch and steer, and what they change."""

from tl_jets.interventions.ablation_effects import ablation_effect
from tl_jets.interventions.ablation_jets import AblationJet
from tl_jets.interventions.effects import AblationEffect
from tl_jets.interventions.first_order_effects import FirstOrderEffects, first_order_effects
from tl_jets.interventions.hooks import ablation_hooks, patch_hooks, without_path
from tl_jets.interventions.path_ablations import path_ablation
from tl_jets.interventions.steering import steering_hooks

__all__ = [
    "AblationEffect",
    "AblationJet",
    "FirstOrderEffects",
    "ablation_effect",
    "ablation_hooks",
    "first_order_effects",
    "patch_hooks",
    "path_ablation",
    "steering_hooks",
    "without_path",
]
