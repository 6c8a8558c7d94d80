r"""First-order effects of many ablations, by one backward pass: attribution patching with an ablation as its other run.

With a dose a of each ablation, w + a (ablated - w) for the write w, the effect of order 1 is the derivative of a target's
centered logit with respect to the dose at 0: c_1 of `tl_jets.interventions.ablation_jets`.

*Read before use*: order 1 alone says nothing of its error. `ablation_effect(order=1)` has an error estimate, `order=None` the
truth; on SmolLM2-135M 23% of these effects are off by more than the true effect.

Source: Nanda 2023, *Attribution Patching: Activation Patching At Industrial Scale*; Kramar et al. 2024, *AtP\**.

Example:
    >>> import tl_jets as tj
    >>> model, prompt = tj.load_tinydocs(), "This function is available on Unix and"
    >>> found = first_order_effects(model, prompt, ["3_mlp", "L2H1"])
    >>> found
    FirstOrderEffects(2 ablations, zero; 1 prompts at [7]; of ['<answer>'])
    >>> jet = tj.ablation_effect(model, prompt, ["3_mlp", "L2H1"], order=1)
    >>> bool(torch.allclose(found.effect, jet.coefficients[0].float(), atol=1e-4))
    True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.core.attribution import additive_logits
from tl_jets.core.changes import one_look
from tl_jets.core.network import trace_of
from tl_jets.core.protocol import FINAL_STREAM
from tl_jets.core.selection import TargetInput
from tl_jets.core.sinks import Sinks
from tl_jets.core.target_results import target_fields
from tl_jets.interventions.ablation_jets import centered_of, dose_gradients
from tl_jets.interventions.effects import AblationResult, read_ablations, real_rows, targets_or_answer
from tl_jets.interventions.hooks import Mode, Steps, hookable


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class FirstOrderEffects(AblationResult):
    """First-order changes of centered logits under ablations, ablated - clean. Axes: [ablation, batch, pos, target].

    Ablations and targets as in `AblationResult`.

    Attributes:
        effect: c_1 of each effect on the centered logit.
    """

    effect: Float[Tensor, "ablation batch pos target"]

    def _columns(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """Columns step and effect, averaged over targets, too."""
        return [{"step": label} for label in self.labels], {"effect": self.effect.mean(-1)}

    def to_dataframe(self, tokenizer: Any = None) -> pd.DataFrame:
        """One row per ablation, prompt, position, target: step, batch, pos, token, target, effect."""
        return self._table("step", self.labels, {"effect": self.effect}, tokenizer)


@one_look()
def first_order_effects(
    model: Any,
    prompts: Any,
    steps: Steps | None = None,
    *,
    mode: Mode = "zero",
    targets: TargetInput | None = None,
    reference: Any = None,
    positions: int | Sequence[int] = -1,
    ablated_positions: int | Sequence[int] | None = None,
    seed: int = 0,
    attention_mask: Tensor | None = None,
) -> FirstOrderEffects:
    """A `FirstOrderEffects` of some ablations: the first order of `ablation_effect`, with its arguments.

    Raises:
        ValueError: Bad steps, mode, reference, positions, targets or input.
        NotImplementedError: A network of plain callables, which has no hooks.

    Source: as the module. Cost: two forward passes, the reference's, and a backward pass for each target and position.

    Example: in the docstring of `tl_jets.interventions.first_order_effects`.
    """
    network = hookable(model)
    with torch.inference_mode(False):
        trace = trace_of(network, prompts, attention_mask)
        rows = real_rows(trace, positions)
        labels, each = read_ablations(trace, steps, mode, reference, ablated_positions, seed)
        ids, names = targets_or_answer(trace, targets, rows, lambda: additive_logits(trace, rows.index))
        read = centered_of(trace, ids, rows)
        effect = dose_gradients(trace, each, 0.0, lambda final: read(final[None])[0])
    return FirstOrderEffects(
        labels=labels,
        mode=mode,
        effect=effect.to(trace[FINAL_STREAM].dtype),
        sinks=Sinks.of(trace, rows),
        seed=int(seed) if mode == "resample" else None,
        **target_fields(trace, rows, ids, names),
    )
