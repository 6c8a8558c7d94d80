"""What both lenses share: their input, the scan of its logits, and the fields of their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_jets.calculus import CenterScale, norm_jet
from tl_jets.core.averages import Averaged
from tl_jets.core.frozen_network import Linearize
from tl_jets.core.lens_logits import Control, Mixture, MixtureScan, scan_mixture
from tl_jets.core.measures import MEASURES, Measures, Plane, geometry_in_plane
from tl_jets.core.model_marks import model_mark
from tl_jets.core.network import ResidualNetwork, trace_of
from tl_jets.core.protocol import FINAL_STREAM
from tl_jets.core.results import Result
from tl_jets.core.selection import Rows, TargetInput, model_logits, read_targets
from tl_jets.core.sinks import Sinks
from tl_jets.core.tokens import token_names
from tl_jets.core.trace import Trace


@dataclass(frozen=True, eq=False)
class LensInput:
    """One input of a lens: its trace, the real positions that are read, and the targets."""

    trace: Trace
    rows: Rows
    target_ids: Tensor | None
    target_names: list[str | int] | None

    @classmethod
    def of(
        cls,
        network: ResidualNetwork,
        text_or_tokens: Any,
        positions: Any,
        targets: TargetInput | None,
        attention_mask: Tensor | None,
        cache: Any,
    ) -> LensInput:
        """Run or read the model; arguments as those of the lenses."""
        trace = trace_of(network, text_or_tokens, attention_mask, cache)
        rows = Rows.of(trace, positions)
        return cls(trace, rows, *read_targets(network, targets, rows))

    @cached_property
    def variate(self) -> Float[Tensor, "row d_model"]:
        """The final stream, float64."""
        return self.rows.take(self.trace[FINAL_STREAM]).double()

    def streams(self, labels: Sequence[str]) -> Float[Tensor, "layer row d_model"]:
        """Streams at the rows, float64."""
        return torch.stack([self.rows.take(self.trace[label]) for label in labels]).double()

    @cached_property
    def shared(self) -> Float[Tensor, "row d_model"]:
        """The final stream as the norm sees it, times the norm's weight: the model's own answer in every jet."""
        norm = self.trace.decoder.norm
        return norm.scale(norm.center(self.variate))

    @cached_property
    def sinks(self) -> Sinks:
        """The attention sinks among the rows."""
        return Sinks.of(self.trace, self.rows)

    @cached_property
    def gamma(self) -> Float[Tensor, " row"]:
        """Coefficient of `shared` in the model's own logits."""
        return norm_jet(self.trace.decoder.norm, self.variate, self.variate, 0).alpha[0]

    def scan(
        self,
        own: Float[Tensor, "layer row d_model"],
        alpha: Float[Tensor, "layer order row"],
        beta: Float[Tensor, "layer order row"],
        control: tuple[Tensor, Tensor, Tensor] | None = None,
        final: int | None = None,
        **options: Any,
    ) -> MixtureScan:
        """Read alpha U own + beta U shared in the dtype of the model; `control` as in `Control`, `final` as in `Mixture`."""
        decoder, dtype = self.trace.decoder, self.trace[FINAL_STREAM].dtype
        mixed = [values.to(dtype) for values in (own, self.shared, alpha, beta, self.gamma)]
        random = None if control is None else Control(*(values.to(dtype) for values in control))
        given = model_logits(self.trace, self.rows)
        mixture = Mixture(*mixed, bias=decoder.norm.bias, final=final)
        return scan_mixture(decoder, mixture, control=random, model_logits=given, **options)

    def measured(
        self, scan: MixtureScan, plane: Plane, random: Tensor | None, alpha: Tensor, beta: Tensor
    ) -> tuple[Tensor, Measures | None, Measures | None]:
        """The borrowed share of jets in a plane, their measures if they were read, and those of the first control."""
        found = geometry_in_plane(self.trace.decoder, plane, random, alpha, beta, self.gamma)
        borrowed = [self.rows.spread(values.pop("borrowed_share")) for values in found]
        own = None if scan.kl is None else Measures.of(self.rows, found[0], scan, self.sinks)
        control = None if scan.control is None else Measures.of(self.rows, found[1], scan.control, self.sinks, 0)
        return borrowed[0], own, control

    def fields(self, scan: MixtureScan, cells: Any, target_ids: Tensor | None) -> dict[str, Any]:
        """The fields of a `LensResult` that a scan's `cells` give."""
        spread, network = self.rows.spread, self.trace.network
        found = {
            "tokens": self.rows.at(self.trace.tokens),
            "top_ids": spread(scan.top.indices[cells], -2, -1),
            "own_top_ids": None if scan.own_top1 is None else spread(scan.own_top1[cells], fill=-1),
            "model_top_ids": spread(scan.model.top.indices[:, 0], fill=-1),
            "target_ids": target_ids,
        }
        ids = [values for values in found.values() if values is not None]
        return found | {
            "positions": self.rows.positions,
            "valid": self.rows.keep,
            "sinks": self.sinks,
            "full_values": spread(scan.top.values[cells], -2),
            "own_values": spread(scan.own_values[cells], -2),
            "unit": self.trace.decoder.unit,
            "model": model_mark(network, self.trace.recording.hook_state),
            "n_layers": network.n_layers,
            "token_names": token_names(network.tokenizer, ids),
        }


def _measure(name: str) -> property:
    """A measure of a lens by its own name."""
    return property(lambda lens: getattr(lens._measured(name, lens.measures), name), doc=f"`measures.{name}`.")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LensResult(Averaged, Result):
    """Base of the results of both lenses, whose docstrings say what the fields are.

    Each measure is also an attribute: `lens.kl`.
    """

    labels: list[str]
    positions: list[int] | Int[Tensor, "batch pos"]
    tokens: Int[Tensor, "batch pos"]
    valid: Bool[Tensor, "batch pos"]
    center_scale: CenterScale
    linearize: Linearize
    borrowed_share: Float[Tensor, "*cells batch pos"]
    top_ids: Int[Tensor, "*cells batch pos k"]
    full_values: Float[Tensor, "*cells batch pos k"]
    own_values: Float[Tensor, "*cells batch pos k"]
    own_top_ids: Int[Tensor, "*cells batch pos"] | None
    model_top_ids: Int[Tensor, "batch pos"]
    measures: Measures | None
    control: Measures | None
    target_ids: Int[Tensor, "batch pos target"] | None
    target_names: list[str | int] | None
    unit: str
    token_names: dict[int, str]
    sinks: Sinks | None = None
    n_layers: int | None = None
    model: str | None = None
    seed: int | None = None

    remainder_norm, cosine, centered_cosine, kl, top1_agreement = map(_measure, MEASURES)

    @property
    def borrowed(self) -> Bool[Tensor, "*cells batch pos"]:
        """Cells whose best token is not the own part's, but comes from the model's own answer."""
        return (self.top_ids[..., 0] != self._measured("borrowed", self.own_top_ids)) & self.valid

    def _measured(self, name: str, values: Any) -> Any:
        if values is None:  # no ValueError, so that hasattr says no
            raise AttributeError(f"{name} needs a lens run with measures=True; this one was run without.")
        return values

    def _names(self, tokenizer: Any, *more: Tensor) -> Mapping[int, str]:
        """Texts of the result's ids; those of a given tokenizer, with `more` ids, if there is one."""
        if tokenizer is None:
            return self.token_names
        targets = [] if self.target_ids is None else [self.target_ids]
        return token_names(tokenizer, [self.top_ids, self.model_top_ids, self.tokens, *targets, *more])


def table(columns: Mapping[str, Any]) -> pd.DataFrame:
    """A DataFrame of columns, lists or tensors."""
    return pd.DataFrame({k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in columns.items()})
