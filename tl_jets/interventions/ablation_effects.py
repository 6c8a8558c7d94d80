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

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_jets.core.attribution import additive_logits, centered
from tl_jets.core.averages import Averaged
from tl_jets.core.decoder import in_unit
from tl_jets.core.labels import is_label
from tl_jets.core.network import trace_of
from tl_jets.core.path import Path
from tl_jets.core.protocol import FINAL_STREAM
from tl_jets.core.results import Result
from tl_jets.core.selection import ANSWER, Rows, TargetInput, positions_at, read_targets
from tl_jets.core.sinks import Sinks
from tl_jets.core.tokens import token_names
from tl_jets.core.trace import Trace
from tl_jets.interventions.hooks import Mode, Steps, hookable, hooks_of_each
from tl_jets.interventions.places import Hooks
from tl_jets.interventions.replays import (
    NotReplayedError,
    can_replay,
    final_streams,
    first_stage,
    logits_of,
    stack_size,
)


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

    Cost: a forward pass, the reference's, and the stages after each ablation, of many ablations at once; where they
    cannot be replayed (`tl_jets.interventions.replays`) a forward pass per ablation.
    """
    network = hookable(model)
    trace = trace_of(network, prompts, attention_mask)
    if trace.logits is None:  # a cache, which need not be exact
        trace = network.trace(trace.tokens, attention_mask=trace.recording.memo.get("attention_mask"))
    rows = real_rows(trace, positions)
    if steps is None:
        steps = [step.label for step in network.steps if step.kind not in ("attn_bias", "mlp_rest")]
    ablations: list[Any] = [steps] if is_label(steps) or isinstance(steps, Path) else list(steps)
    if not ablations:
        raise ValueError("ablation_effect needs at least one step or path; got none. Pass None for all steps.")
    labels = [str(a) if isinstance(a, Path) else network.label(a) for a in ablations]
    where = None if ablated_positions is None else cells_of(trace, ablated_positions)
    hooks = hooks_of_each(network, ablations, mode=mode, reference=reference, positions=where, seed=seed)
    order = sorted(range(len(hooks)), key=lambda i: first_stage(trace, hooks[i]))
    clean, ablated = _answers(trace, [hooks[i] for i in order], rows)
    found = effect_of(trace, clean, ablated, [labels[i] for i in order], mode, rows, targets=targets)
    back = torch.tensor(order, device=found.logit.device).argsort()
    changes = {name: getattr(found, name)[back] for name in ("logit", "centered", "kl")}
    return replace(found, labels=labels, **changes)


def _answers(trace: Trace, runs: list[Hooks], rows: Rows) -> tuple[Tensor, Iterator[Tensor]]:
    """Additive logits [batch, out_pos, d_vocab] of the clean run, and of each run in the order of `first_stage`."""
    if can_replay(trace, first_stage(trace, runs[0])):
        size = stack_size(trace)
        with suppress(NotReplayedError):
            first = final_streams(trace, runs[:size], check=True)
            clean = next(logits_of(trace, trace[FINAL_STREAM][None], rows))
            return clean, _replayed_answers(trace, first, runs[size:], rows)
    network, mask = trace.network, trace.recording.memo.get("attention_mask")

    def hooked(hooks: Hooks) -> Tensor:
        with network.view.hooks(hooks):  # type: ignore[attr-defined]
            return additive_logits(network.trace(trace.tokens, attention_mask=mask), rows.index)

    return hooked([]), map(hooked, runs)


def _replayed_answers(trace: Trace, first: Tensor, runs: list[Hooks], rows: Rows) -> Iterator[Tensor]:
    yield from logits_of(trace, first, rows)
    for start in range(0, len(runs), stack_size(trace)):
        finals = final_streams(trace, runs[start : start + stack_size(trace)])
        yield from logits_of(trace, finals, rows)


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
    before = decoder.transformed(clean).log_softmax(-1)
    for found in ablated:
        change = found - clean
        logit.append(change.gather(-1, ids))
        beyond.append(centered(change, ids))
        after = decoder.transformed(found).log_softmax(-1)
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


def cells_of(trace: Trace, positions: int | Sequence[int]) -> Bool[Tensor, "batch pos"]:
    """Whether a cell of the padded rows is at one of the positions, counted as in `real_rows`."""
    return torch.zeros_like(trace.valid).scatter(1, real_rows(trace, positions).index, True)
