r"""Jets of an ablation: the Taylor series of its effect on the answer, along its dose.

At dose t the write w of a step is moved by t toward what the ablation makes of it, and all later steps respond:

.. math::
    w_t = w + t \, (\text{ablated} - w), \qquad
    F(t) - F(0) = c_1 t + c_2 t^2 + \dots, \qquad c_j = F^{(j)}(0) / j! ,

with F the centered logit of a target. c_1 is attribution patching; higher orders say how nonlinear the effect is, and
|c_{k+1}| how wrong order k may be. The jets are those of the model itself, by Taylor arithmetic on its own modules.

*Read before use*: the truth costs less than its series, and stands beside it. On SmolLM2-135M (1,280 ablations of sublayers and
heads, `tests/benchmarks/bench_ablation_jets.py FOLDER`) the series of orders 1 to 4 are within 10% of the effect in 18%, 51%, 64%
and 67%. Their median error falls from 0.13 to 0.02, 0.008 and 0.004 logits, the largest grows from 28 to 650,000: early and large
components diverge. `converges` asks the truth, too, and holds for 9%, 39%, 54% and 60%. The coefficients alone tell less: where
2 |c_{k+1}| is below 10% of the effect, the series is within 10% in 86%, 95%, 96% and 97%; where |c_{k+1}| < |c_1|, in 27%, 61%,
76% and 82%. 2 |c_{k+1}| bounds 76% to 90% of the errors.

Source: Chen et al., *Jet Expansions of Residual Computation*, eq. 6-7, for the whole model; Nanda 2023, *Attribution
Patching*, for order 1.

Example:
    >>> import tl_jets as tj
    >>> model, prompt = tj.load_tinydocs(), "This function is available on Unix and"
    >>> jet = tj.ablation_effect(model, prompt, ["3_mlp", "L2H1"], order=4, doses=[0.5])
    >>> jet
    AblationJet(2 ablations, zero; order 4, 2 of 2 converge; 1 prompts at [7]; of ['<answer>'])
    >>> bool(((jet.series() - jet.centered).abs() < 0.1).all())
    True
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_jets.calculus.jet import jet
from tl_jets.calculus.norms import check_order
from tl_jets.core.attribution import directions
from tl_jets.core.protocol import FINAL_STREAM, relative_error
from tl_jets.core.selection import Rows
from tl_jets.core.trace import Trace
from tl_jets.interventions.effects import AblationEffect
from tl_jets.interventions.places import Hooks
from tl_jets.interventions.replays import (
    NotReplayedError,
    can_replay,
    final_streams,
    first_stage,
    hooked_stream,
    last_streams,
    stack_size,
)

# The share of an effect that the errors of a series that converges have at most.
CONVERGED = 0.1


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class AblationJet(AblationEffect):
    """An `AblationEffect` with the Taylor series of `centered` along the dose of each ablation.

    Attributes:
        coefficients: c_1 .. c_{k+1}; the last is not in the series, and gives `error_estimate`.
        doses: The doses of `truth`.
        truth: True changes of centered logits at these doses.
    """

    coefficients: Float[Tensor, "term ablation batch pos target"]
    doses: list[float]
    truth: Float[Tensor, "dose ablation batch pos target"]

    @property
    def order(self) -> int:
        """The order k of the series."""
        return len(self.coefficients) - 1

    def series(self, dose: float | int = 1.0, order: int | None = None) -> Float[Tensor, "ablation batch pos target"]:
        """The series of `centered` at a dose, of an order up to `order` (None: all)."""
        order = self.order if order is None else order
        if not 1 <= order <= self.order:
            raise ValueError(f"order must be 1..{self.order}, the order of this series; got {order}.")
        return sum(self.coefficients[j] * dose ** (j + 1) for j in range(order))  # type: ignore[return-value]

    @property
    def error_estimate(self) -> Float[Tensor, "ablation batch pos target"]:
        """2 |c_{k+1}|, in logits: it bounds about 80% of the errors of `series()`, no more."""
        return 2 * self.coefficients[-1].abs()

    @property
    def converges(self) -> Bool[Tensor, "ablation batch pos target"]:
        """Whether `series()` gives the effect within 10%: by its error estimate, and in truth at dose 1 and at `doses`."""
        ends = [(1.0, self.centered), *zip(self.doses, self.truth, strict=True)]
        errors = [self.error_estimate, *((self.series(dose) - truth).abs() for dose, truth in ends)]
        return torch.stack(errors).amax(0) <= CONVERGED * self.centered.abs()

    def _of_series(self) -> str:
        return f"; order {self.order}, {int(self.converges.sum())} of {self.converges.numel()} converge"

    def _columns(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """Those of `AblationEffect`, then series, error_estimate, and converges (the share of cells)."""
        index, columns = super()._columns()
        own = {"series": self.series(), "error_estimate": self.error_estimate, "converges": self.converges.double()}
        return index, columns | {name: values.mean(-1) for name, values in own.items()}

    def to_dataframe(self, tokenizer: Any = None) -> pd.DataFrame:
        """Those rows of `AblationEffect`, with c_1 .. c_k, series, error_estimate and converges."""
        table = super().to_dataframe(tokenizer)
        columns = {f"c_{j + 1}": self.coefficients[j] for j in range(self.order)}
        columns |= {"series": self.series(), "error_estimate": self.error_estimate, "converges": self.converges}
        return table.assign(**{name: values.flatten().tolist() for name, values in columns.items()})

    def dose_response(self) -> pd.DataFrame:
        """True effects and series of every order at `doses` and 1, averaged over prompts, positions and targets.

        Columns: step, dose, truth, then order_1 .. order_k.
        """
        rows = []
        for i, label in enumerate(self.labels):
            for dose, truth in zip([*self.doses, 1.0], [*self.truth[:, i], self.centered[i]], strict=True):
                series = {f"order_{k}": float(self.series(dose, k)[i].mean()) for k in range(1, self.order + 1)}
                rows.append({"step": label, "dose": dose, "truth": float(truth.mean()), **series})
        return pd.DataFrame(rows)


def check_doses(order: int | None, doses: Sequence[float | int]) -> None:
    """Raise ValueError for an order below 1, or doses that are not from 0 to 1 or have no series."""
    if order is None and len(doses):
        raise ValueError(
            f"doses are of the series of an effect; got {list(doses)} without an order. Pass order=3, say."
        )
    if order is not None:
        check_order(order)
        if order < 1 or not all(math.isfinite(dose) and 0 <= dose <= 1 for dose in doses):
            raise ValueError(
                f"A series has an order of 1 or more, and doses are 0 to 1; got order {order}, doses {list(doses)}."
            )


def jets_of(
    trace: Trace,
    runs: list[Hooks],
    ids: Int[Tensor, "batch pos target"],
    rows: Rows,
    order: int,
    doses: Sequence[float | int],
) -> tuple[Float[Tensor, "term ablation batch pos target"], Float[Tensor, "dose ablation batch pos target"]]:
    """c_1 .. c_{order + 1} of every run's centered logits, and the true changes at some doses; runs by `first_stage`."""
    read = centered_of(trace, ids, rows)
    clean, point = read(trace[FINAL_STREAM][None]), trace[FINAL_STREAM].new_zeros(())

    def series(stack: list[Hooks], streams: Any) -> Tensor:
        def effect(dose: Tensor) -> Tensor:
            return read(streams([at_dose(hooks, dose) for hooks in stack])) - clean

        found = jet(effect, point, point + 1, order + 1).coefficients
        if not relative_error(clean + found[:1], clean) <= 16 * trace.recording.accuracy:
            raise NotReplayedError  # at dose 0 every run is the clean one
        return found[1:]

    def one_by_one(stack: list[Hooks]) -> Tensor:
        return torch.stack([hooked_stream(trace, hooks) for hooks in stack])

    size, found = max(1, stack_size(trace) // (order + 2)), []
    is_stacked = can_replay(trace, first_stage(trace, runs[0]))
    for start in range(0, len(runs), size):
        stack = runs[start : start + size]
        try:
            found.append(series(stack, partial(final_streams, trace) if is_stacked else one_by_one))
        except NotReplayedError:
            is_stacked = False
            found.append(series(stack, one_by_one))
    curves = [torch.cat(list(map(read, last_streams(trace, [at_dose(run, dose) for run in runs])))) for dose in doses]
    coefficients = torch.cat(found, 1).double()
    truth = torch.stack([(curve - clean).double() for curve in curves]) if curves else coefficients[:0]
    return coefficients, truth


def at_dose(hooks: Hooks, dose: Any) -> Hooks:
    """Hooks that move a write by a share `dose` of what the given ones change; a vector has one dose for each prompt."""

    def moved(edit: Any, write: Tensor, hook: Any = None) -> Tensor:
        is_vector = isinstance(dose, Tensor) and dose.ndim == 1
        own = dose.to(write).view(-1, *[1] * (write.ndim - 1)) if is_vector else dose
        return write + own * (edit(write, hook) - write)

    return [(name, partial(moved, edit)) for name, edit in hooks]


def dose_gradients(
    trace: Trace, each: Sequence[Hooks], dose: float, value: Callable[[Tensor], Float[Tensor, "batch pos target"]]
) -> Float[Tensor, "ablation batch pos target"]:
    """Derivatives of a value of the last stream by the doses of single ablations, with all at one dose; float64."""
    shape, device = (len(each), len(trace.tokens)), trace.tokens.device
    with torch.inference_mode(False), torch.enable_grad():
        doses = torch.full(shape, dose, dtype=torch.float64, device=device, requires_grad=True)
        hooks = [hook for hooks, own in zip(each, doses, strict=True) for hook in at_dose(hooks, own)]
        found = value(hooked_stream(trace, hooks))
        cells = found.flatten(1).sum(0)
        last = len(cells) - 1
        gradients = [torch.autograd.grad(cell, doses, retain_graph=i < last)[0] for i, cell in enumerate(cells)]
    return torch.stack(gradients, -1).unflatten(-1, found.shape[1:])


def centered_of(trace: Trace, ids: Int[Tensor, "batch pos target"], rows: Rows) -> Callable[[Tensor], Tensor]:
    """Centered logits of targets, but for b_U, from last streams: [run, batch, pos, d_model] -> [run, batch, pos, target]."""
    decoder = trace.decoder
    columns = directions(decoder, ids)[..., :-1].to(trace[FINAL_STREAM])
    return lambda finals: (decoder.norm(rows.at(finals, 1))[..., None, :] * columns).sum(-1)
