"""Effects of ablations on a model's answers: logits of targets and predictions, ablated - clean.

The hooks of `tl_jets.interventions.hooks` run through `ResidualNetwork.trace`, which refuses a model whose streams do
not follow the edit.

Example:
    >>> from tl_jets.pretrained import load_tinydocs
    >>> from tl_jets.interventions.hooks import ablation_hooks
    >>> model = load_tinydocs()
    >>> prompt = "This function is available on Unix and"
    >>> effect = ablation_effect(model, prompt, ["0_mlp", "L1H2"])
    >>> effect
    AblationEffect(2 ablations, zero; 1 prompts at [7]; of ['<answer>'])
    >>> answer = effect.target_ids[0, 0, 0]
    >>> without = model.run_with_hooks(prompt, fwd_hooks=ablation_hooks(model, "L1H2"))
    >>> change = (without - model(prompt))[0, -1, answer].double()
    >>> bool(torch.isclose(effect.logit[1, 0, 0, 0], change, atol=1e-5))
    True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from tl_jets.core.changes import one_look
from tl_jets.core.protocol import FINAL_STREAM
from tl_jets.core.selection import TargetInput
from tl_jets.interventions.ablation_jets import AblationJet, check_doses, jets_of
from tl_jets.interventions.effects import AblationEffect, effect_of, exact_trace, read_ablations, real_rows
from tl_jets.interventions.hooks import Mode, Steps, hookable
from tl_jets.interventions.replays import first_stage, last_streams, logits_of


@torch.no_grad()
@one_look()
def ablation_effect(
    model: Any,
    prompts: Any,
    steps: Steps | None = None,
    *,
    mode: Mode = "zero",
    targets: TargetInput | None = None,
    reference: Any = None,
    positions: int | Sequence[int] = -1,
    ablated_positions: int | Sequence[int] | None = None,
    order: int | None = None,
    doses: Sequence[float | int] = (),
    seed: int = 0,
    attention_mask: Tensor | None = None,
) -> AblationEffect:
    """An `AblationEffect` of some ablations, one at a time; with `order` an `AblationJet`, which also has their Taylor series.

    Args:
        model: A `TransformerBridge`, a `HookedTransformer`, or a `ResidualNetwork` of one.
        prompts: A prompt, a list of prompts, token ids [batch, pos], or a `Trace`.
        steps: Ablations: each a step (as in `ablation_hooks`), or a `Path`, whose steps are ablated together. None for
            all steps of the network's granularity (attention and MLP sublayers for a model).
        mode: `"zero"`, `"mean"` or `"resample"`.
        targets: Tokens whose logits are reported: strings or ids, one list of them a prompt, or ids [batch, pos, target];
            None for the model's own best.
        reference: For `"mean"` and `"resample"`, as in `ablation_hooks`.
        positions: Positions to read, counted among each prompt's real tokens; -1 is the last.
        ablated_positions: Positions at which the steps are ablated, counted in the same way; None for all.
        order: Order of the Taylor series of every effect along the dose of its ablation, 1 or more; None for no series.
        doses: Doses, 0 to 1, at which an `AblationJet` has the true effects, too.
        seed: Seed of `"resample"`.
        attention_mask: Passed to the model (left padding needs it).

    Raises:
        ValueError: Bad steps, mode, reference, positions, targets or input; or the streams do not follow the edit.
        NotImplementedError: A network of plain callables, which has no hooks; an operation without a Taylor rule.

    Cost: a forward pass, the reference's, and the stages after each ablation, of many ablations at once; where they
    cannot be replayed (`tl_jets.interventions.replays`) a forward pass per ablation. A series costs about order + 3 times
    as much as its effects.
    """
    network = hookable(model)
    check_doses(order, doses)
    trace = exact_trace(network, prompts, attention_mask)
    rows = real_rows(trace, positions)
    labels, hooks = read_ablations(trace, steps, mode, reference, ablated_positions, seed)
    by_stage = sorted(range(len(hooks)), key=lambda i: first_stage(trace, hooks[i]))
    runs = [hooks[i] for i in by_stage]
    ablated = (logits for finals in last_streams(trace, runs) for logits in logits_of(trace, finals, rows))
    clean = next(logits_of(trace, trace[FINAL_STREAM][None], rows))
    found = effect_of(trace, clean, ablated, [labels[i] for i in by_stage], mode, rows, targets=targets)
    back = torch.tensor(by_stage, device=found.logit.device).argsort()
    changes: dict[str, Any] = {name: getattr(found, name)[back] for name in ("logit", "centered", "kl")}
    changes |= {"labels": labels, "seed": int(seed) if mode == "resample" else None}
    if order is None:
        return replace(found, **changes)
    series, truth = jets_of(trace, runs, found.target_ids, rows, order, doses)
    own: dict[str, Any] = {f.name: getattr(found, f.name) for f in fields(found)} | changes
    return AblationJet(**own, coefficients=series[:, back], doses=list(map(float, doses)), truth=truth[:, back])
