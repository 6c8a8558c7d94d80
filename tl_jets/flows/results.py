"""`Flow`: an intervention's effect on targets, divided over the components that it passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_jets.core.averages import Averaged
from tl_jets.core.decoder import in_unit
from tl_jets.core.sinks import Sinks
from tl_jets.core.target_results import TargetResult
from tl_jets.flows.edges import EdgeFlows, largest
from tl_jets.paths.cancellation import LARGE, cancellation


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class FlowResult(TargetResult):
    """Base of flows; a `TargetResult` whose unit is `"logits"`, `"logits before the softcap"` or `"nats"`.

    Attributes:
        measure: `"centered"`, `"logit difference"` or `"kl"`.
        tolerance: The share of the effect above which an effect is open.
    """

    measure: str
    tolerance: float

    def _target_text(self, names: Mapping[int, str], batch: int, pos: int, target: int) -> str:
        if self.measure != "centered":
            return str(self.target_names[target])
        return super()._target_text(names, batch, pos, target)

    def _index(
        self, axis: str, labels: Sequence[str], cells: Int[Tensor, "cell 4"], tokenizer: Any = None
    ) -> dict[str, Any]:
        """As in `TargetResult`, without the token that is read."""
        columns = super()._index(axis, labels, cells, tokenizer)
        del columns["token"]
        return columns


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Flow(EdgeFlows, FlowResult, Averaged):
    """Flows of an intervention. Axes: [component, batch, pos, target] and [stage, batch, pos, target], float64.

    Positions, targets, their unit and the tolerance as in `FlowResult`.

    Attributes:
        labels: Components that changed, in the order of the network: sources, `edit:<hook>`, writes.
        flow: The part of the effect that passes through each component, from wherever it came. Components in series carry
            the same effect one after another; across any cut of the network flows add up.
        edit: The part of `flow` that starts at the component, as the intervention itself writes there; all of them add up
            to the effect.
        direct: The part that goes from the component straight to the final norm; all of them add up to the effect.
        effect: Target in the intervened run, less target in the clean run [batch, pos, target].
        clean: Target in the clean run.
        stages: Labels of the streams from which stages read, and `ln_final`, in the order of the network, from the first
            that changed.
        gap: Error of each stage's nodes, the only error of flows; all of them add up to the sum of `edit` less the effect.
        carried: The part of the effect that each of these streams carries.
        nodes: Nodes of each stage.
        evaluations: Evaluations of each stage and its gradients, in all tries.
        by_position: `flow` by the position of the write [component, batch, pos, target, write_pos], if requested.
        prompt_tokens: The clean run's tokens at these positions, the same for all that are read; -1 at padding.
        prompt_sinks: Whether these positions are BOS or have outlying streams (`tl_jets.core.sinks`).
        check: Flows beside path patching (`tl_jets.flows.checks`), one row per mediator, prompt, position and target; None
            without a check.
        sinks: Positions that `average` leaves out.
        seed: Seed of the random components of `check`; None without one.
        readers: What reads the stream, in the order of the network, if edges were asked for: steps, `L1H2_q`, `L1H2_k` and
            `L1H2_v` of heads, `ln_final`.
        edge_flow: Flows from components to readers (`tl_jets.flows.edges`), 0 to earlier ones.
    """

    labels: list[str]
    flow: Float[Tensor, "component batch pos target"]
    edit: Float[Tensor, "component batch pos target"]
    direct: Float[Tensor, "component batch pos target"]
    effect: Float[Tensor, "batch pos target"]
    clean: Float[Tensor, "batch pos target"]
    stages: list[str]
    gap: Float[Tensor, "stage batch pos target"]
    carried: Float[Tensor, "stage batch pos target"]
    nodes: list[int]
    evaluations: list[int]
    by_position: Float[Tensor, "component batch pos target write_pos"] | None = None
    prompt_tokens: Int[Tensor, "batch pos write_pos"] | None = None
    prompt_sinks: Bool[Tensor, "batch pos write_pos"] | None = None
    check: pd.DataFrame | None = None
    sinks: Sinks | None = None
    seed: int | None = None
    readers: list[str] | None = None
    edge_flow: Float[Tensor, "reader component batch pos target"] | None = None

    def __repr__(self) -> str:
        said = (
            f"effect {float(self.effect.mean()):+.3g}" if self.effect.numel() == 1 else f"{self.effect.numel()} effects"
        )
        still = "" if bool(self.closed.all()) else f"; {int((~self.closed).sum())} OPEN: their flows explain nothing"
        return (
            f"Flow({said} on {self.target_names}{in_unit(self.unit)}; {len(self.labels)} components; gap "
            f"{100 * float(self.gap_share.max()):.2g}% of the effect, {self.passes:.1f} passes{still}{self._cancel()}; "
            f"{self._checked()})"
        )

    def _cancel(self) -> str:
        index = float(self.cancellation.max())
        return f"; direct parts cancel: their sizes add up to {index:.3g} times the effect" if index > LARGE else ""

    def _checked(self) -> str:
        if self.check is None:
            return "not checked by path patching"
        rank, error = (float(self.agreement()[name].median()) for name in ("spearman", "relative_error"))
        return f"{self.check['component'].nunique()} mediators path patched: Spearman {rank:.2f}, relative error {error:.2f}"

    @property
    def gap_share(self) -> Float[Tensor, "batch pos target"]:
        """The absolute gaps of stages (with edges: of components) in sum, as a share of the effect; 0 where both are 0."""
        gap = self.gap if self.edge_flow is None else self._balance()[1]["gap"]
        total = gap.abs().sum(0)
        return torch.where(total == 0, 0.0, total / self.effect.abs())

    @property
    def closed(self) -> Bool[Tensor, "batch pos target"]:
        """Whether the gap is within the tolerance; flows of other effects are no explanation."""
        return self.gap_share <= self.tolerance

    @property
    def cancellation(self) -> Float[Tensor, "batch pos target"]:
        """Sum of the sizes of `direct` over the size of the effect, 1 or more; above 3, shares of the effect say little."""
        return cancellation(self.direct)

    @property
    def passes(self) -> float:
        """Cost in forward-backward passes through the stages that changed."""
        return sum(self.evaluations) / max(1, len(self.stages))

    def _columns(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """Columns component, flow, edit, direct, averaged over targets, too, without open effects."""
        columns = {
            n: torch.where(self.closed, getattr(self, n), torch.nan).nanmean(-1) for n in ("flow", "edit", "direct")
        }
        return [{"component": label} for label in self.labels], columns

    def to_dataframe(self) -> pd.DataFrame:
        """One row per component, prompt, position and target.

        Columns: component, batch, pos, target; flow, share (of the effect), edit, direct; effect, gap (as a share of the
        effect), closed.
        """
        values = {"flow": self.flow, "share": self.flow / self.effect, "edit": self.edit, "direct": self.direct}
        values |= {"effect": self.effect, "gap": self.gap_share, "closed": self.closed}
        return self._table("component", self.labels, values)

    def top(self, k: int = 10) -> pd.DataFrame:
        """The k components of the largest absolute flow for each prompt, position and target, without open effects.

        Raises:
            ValueError: Every effect is open.
        """
        frame: Any = self.to_dataframe()
        frame = frame[frame["closed"]]
        if frame.empty:
            raise ValueError(self._still_open())
        return largest(frame, k)

    def by_position_dataframe(self) -> pd.DataFrame:
        """One row per component, prompt, position, target and position of the write.

        Columns: component, batch, pos, target, write_pos (among the prompt's real tokens), token (there), flow, closed.

        Raises:
            ValueError: Positions were not kept.
        """
        if self.by_position is None or self.prompt_tokens is None:
            raise ValueError("Flows by position are kept on request; pass by_position=True to tl_jets.flow.")
        is_real = self.prompt_tokens >= 0
        real = is_real[None, :, :, None].expand_as(self.by_position)
        cells = real.nonzero()
        b, p, t, w = cells.T[1:]
        index = self._index("component", self.labels, cells[:, :4])
        index |= {
            "write_pos": (is_real.cumsum(-1) - 1)[b, p, w].tolist(),
            "token": [self.token_names[int(i)] for i in self.prompt_tokens[b, p, w]],
            "flow": self.by_position[real].tolist(),
        }
        return pd.DataFrame(index | {"closed": self.closed[b, p, t].tolist()})

    def cuts(self) -> pd.DataFrame:
        """The certificate: at each stream, what it carries and what is edited later, less the effect.

        One row per stage, prompt, position and target, from the last: stage, batch, pos, target, carried, edited_later, gap
        (of all stages from here on, in the target's unit), nodes.
        """
        gap = self.gap.flip(0).cumsum(0).flip(0)
        later = self.effect + gap - self.carried
        nodes = torch.tensor(self.nodes, device=gap.device)[:, None, None, None]
        values = {"carried": self.carried, "edited_later": later, "gap": gap, "nodes": nodes}
        return self._table("stage", self.stages, values).iloc[::-1].reset_index(drop=True)

    def agreement(self) -> pd.DataFrame:
        """Flows against path patching, one row per prompt, position and target.

        Columns: batch, pos, target, mediators, spearman (rank correlation) and relative_error (sum of absolute errors over
        sum of absolute true values), against the mean of both mediations of `check`.

        Raises:
            ValueError: The flow was not checked.
        """
        if self.check is None:
            raise ValueError("Agreement is with path patching; this flow was not checked. Pass check=20, say.")
        from scipy.stats import spearmanr  # a second, which most calls do not need

        rows = []
        for cell, own in self.check.groupby(["batch", "pos", "target"], sort=False):
            found, true = own["flow"].to_numpy(), own["mediated"].to_numpy()
            error = float(np.abs(found - true).sum() / np.abs(true).sum())
            rank = float(spearmanr(found, true)[0]) if len(own) > 1 else float("nan")  # type: ignore[arg-type]
            named = dict(zip(["batch", "pos", "target"], cell, strict=True))  # type: ignore[call-overload]
            rows.append({**named, "mediators": len(own), "spearman": rank, "relative_error": error})
        return pd.DataFrame(rows)
