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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.core.attribution import additive_logits, centered
from tl_jets.core.averages import Averaged
from tl_jets.core.decoder import in_unit
from tl_jets.core.labels import is_label
from tl_jets.core.network import trace_of
from tl_jets.core.path import Path
from tl_jets.core.results import Result
from tl_jets.core.selection import ANSWER, Rows, TargetInput, positions_at, read_targets
from tl_jets.core.sinks import Sinks
from tl_jets.core.tokens import token_names
from tl_jets.core.trace import Trace
from tl_jets.interventions.hooks import Hooks, Mode, Steps, ablation_hooks, hookable


@dataclass(frozen=True, eq=False, repr=False)
class AblationEffect(Averaged, Result):
    """Changes under ablations, ablated - clean. Axes: [ablation, batch, pos].

    Attributes:
        labels: The ablated steps, aligned to the ablation axis.
        mode: The mode of `ablation_hooks`; `"path"` for ablations of single paths.
        positions: Positions among each prompt's real tokens (-1 is its last), aligned to the pos axis.
        target_names: The targets as requested; `<answer>` is the model's own best token.
        logit: Change of the targets' additive logits (before a softcap).
        centered: The same, less the change of the mean over the vocabulary.
        kl: KL(clean || ablated) of the model's own predictions, in nats.
        unit: Unit of `logit` and `centered`: `"logits"`, or `"logits before the softcap"`.
        token_names: Texts of the ids.
        sinks: Positions that `average` leaves out.
    """

    labels: list[str]
    mode: str
    positions: list[int] | Int[Tensor, "batch pos"]
    tokens: Int[Tensor, "batch pos"]
    target_ids: Int[Tensor, "batch pos target"]
    target_names: list[str | int]
    logit: Float[Tensor, "ablation batch pos target"]
    centered: Float[Tensor, "ablation batch pos target"]
    kl: Float[Tensor, "ablation batch pos"]
    unit: str
    token_names: dict[int, str]
    sinks: Sinks | None = None

    def __repr__(self) -> str:
        return (
            f"AblationEffect({len(self.labels)} ablations, {self.mode}; {len(self.tokens)} prompts at {self.positions}; "
            f"of {self.target_names}{in_unit(self.unit)}{self._left_out()})"
        )

    def _columns(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """Columns step, logit, centered, kl; logits averaged over targets, too."""
        columns = {"logit": self.logit.mean(-1), "centered": self.centered.mean(-1), "kl": self.kl}
        return [{"step": label} for label in self.labels], columns

    def to_dataframe(self, tokenizer: Any = None) -> pd.DataFrame:
        """One row per ablation, prompt, position, target: step, batch, pos, token, target, logit, centered, kl."""
        names = token_names(tokenizer, [self.tokens, self.target_ids]) if tokenizer else self.token_names
        step, b, p, t = torch.ones_like(self.logit).nonzero().T
        columns = {"step": [self.labels[i] for i in step], "batch": b.tolist()}
        columns |= {"pos": positions_at(self.positions, b, p), "token": [names[i] for i in self.tokens[b, p].tolist()]}
        columns |= {"target": [names[i] for i in self.target_ids[b, p, t].tolist()]}
        columns |= {name: getattr(self, name).flatten().tolist() for name in ("logit", "centered")}
        return pd.DataFrame(columns | {"kl": self.kl[step, b, p].tolist()})


@torch.no_grad()
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
    seed: int = 0,
    attention_mask: Tensor | None = None,
) -> AblationEffect:
    """An `AblationEffect` of some ablations, one at a time.

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
        seed: Seed of `"resample"`.
        attention_mask: Passed to the model (left padding needs it).

    Raises:
        ValueError: Bad steps, mode, reference, positions, targets or input; or the streams do not follow the edit.
        NotImplementedError: A network of plain callables, which has no hooks.

    Cost: a forward pass per ablation, one for the clean answers, and the reference's.
    """
    network = hookable(model)
    trace = trace_of(network, prompts, attention_mask)
    mask = trace.recording.memo.get("attention_mask")
    rows = real_rows(trace, positions)
    if steps is None:
        steps = [step.label for step in network.steps if step.kind not in ("attn_bias", "mlp_rest")]
    ablations: list[Any] = [steps] if is_label(steps) or isinstance(steps, Path) else list(steps)
    if not ablations:
        raise ValueError("ablation_effect needs at least one step or path; got none. Pass None for all steps.")
    if reference is not None and not isinstance(reference, Trace):
        reference = network.trace(reference)

    def answers(hooks: Hooks) -> Float[Tensor, "batch pos d_vocab"]:
        with network.view.hooks(hooks):  # type: ignore[attr-defined]
            return additive_logits(network.trace(trace.tokens, attention_mask=mask), rows.index)

    labels = [str(a) if isinstance(a, Path) else network.label(a) for a in ablations]
    options: dict[str, Any] = {"mode": mode, "reference": reference, "seed": seed}
    if ablated_positions is not None:
        where = real_rows(trace, ablated_positions).index
        options["positions"] = torch.zeros_like(trace.valid).scatter(1, where, True)
    every = (answers(ablation_hooks(network, a, **options)) for a in ablations)
    return effect_of(trace, answers([]), every, labels, mode, rows, targets=targets)


def effect_of(
    trace: Trace,
    clean: Float[Tensor, "batch pos d_vocab"],
    ablated: Iterable[Float[Tensor, "batch pos d_vocab"]],
    labels: list[str],
    mode: str,
    rows: Rows,
    *,
    targets: TargetInput | None,
) -> AblationEffect:
    """The effects of ablations from additive logits, `clean` and `ablated`, at some positions, in float64."""
    ids, names = read_targets(trace.network, targets, rows)
    if ids is None or names is None:
        ids, names = clean.argmax(-1, keepdim=True), [ANSWER]
    decoder, tokens = trace.decoder, rows.at(trace.tokens)
    logit, beyond, kl = [], [], []
    for found in ablated:
        change = found - clean
        logit.append(change.gather(-1, ids))
        beyond.append(centered(change, ids))
        before, after = (decoder.transformed(logits).log_softmax(-1) for logits in (clean, found))
        kl.append((before.exp() * (before - after)).sum(-1))
    return AblationEffect(
        labels=labels,
        mode=mode,
        positions=rows.positions,
        tokens=tokens,
        target_ids=ids,
        target_names=list(names),
        logit=torch.stack(logit),
        centered=torch.stack(beyond),
        kl=torch.stack(kl),
        unit=decoder.unit,
        token_names=token_names(trace.network.tokenizer, [tokens, ids]),
        sinks=Sinks.of(trace, rows),
    )


def real_rows(trace: Trace, positions: int | Sequence[int]) -> Rows:
    """The requested positions among each prompt's real tokens; ValueError if a prompt is too short for one."""
    rows, shortest = Rows.of(trace, positions), int(trace.valid.sum(1).min())
    if not bool(rows.keep.all()):
        raise ValueError(
            f"positions must lie in {-shortest}..{shortest - 1}, the real tokens of the shortest prompt; got {positions}."
        )
    return rows
