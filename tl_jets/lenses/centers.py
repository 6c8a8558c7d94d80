r"""Jets of the final norm at many centers: components of the joint lens, or random centers like them.

.. math::
    e_i = J^k \gamma_{L+1}(x_i)(h_L) = \alpha_i \, (w * x_i) + \beta_i \, (w * h_L) + c_i \cdot \text{bias} .

Detached, all alpha are that of h_L, beta is 0, and the norm's bias is a center of its own.

Source: Chen et al., *Jet Expansions of Residual Computation*, section 4; norms as in `tl_jets.calculus.norms`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_jets.calculus import CenterScale, norm_jet
from tl_jets.calculus import center_scale as center_scale_factors
from tl_jets.core.attribution import directions
from tl_jets.core.decoder import Decoder
from tl_jets.core.free_memory import free_bytes
from tl_jets.core.frozen_network import Linearize, affine_labels, frozen_norm
from tl_jets.core.lens_logits import refuse_overflow
from tl_jets.core.logit_reader import CHUNK_SIZE, slices
from tl_jets.core.measures import random_directions, split_along
from tl_jets.core.protocol import FINAL_STREAM, State
from tl_jets.core.selection import Rows
from tl_jets.core.structure import Structure
from tl_jets.core.trace import Trace

# Coefficients whose jets are far from the largest float32, and their products from the largest float64.
MOST = 1e30
# Bytes of the components' vectors that are held at once (on a GPU a quarter of what is free), and how many float64
# vectors a component and position takes meanwhile, with optimal weights (16.1 were measured; detached 6.3).
TILE_BYTES, COPIES = 2**30, 16


@dataclass(frozen=True, eq=False)
class Centers:
    """Jets of the final norm at many centers, at real positions only.

    Attributes:
        places: The position of every row in its prompt, on the CPU.
        jets: e_i = J^k norm(x_i)(h_L), float64.
        alpha: Coefficients of w * x_i.
        beta: Coefficients of w * h_L.
        rho: Radius ratios.
        constants: Multiple of the norm's bias and of b_U in each jet.
        state: State of the hooks and weights that the jets were computed with.
        bounded: Whether the coefficients of each order are; None if detached. If not, the jets are NaN.
    """

    network: Structure
    places: Int[Tensor, " row"]
    jets: Float[Tensor, "center row d_model"]
    alpha: Float[Tensor, "center row"]
    beta: Float[Tensor, "center row"]
    rho: Float[Tensor, "center row"]
    constants: Float[Tensor, " center"]
    state: State
    bounded: Bool[Tensor, " order"] | None = None

    def refuse_overflow(self) -> None:
        """Raise ValueError that names the order, if a series overflows."""
        if self.bounded is not None:
            refuse_overflow(self.bounded.tolist())

    @property
    def decoder(self) -> Decoder:
        """The decoder of the jets; raises ValueError once its weights have changed."""
        return self.network.decoder_at(self.state)

    @classmethod
    def of(
        cls, trace: Trace, places: Tensor, values: Tensor, variate: Tensor, order: int, scale: CenterScale
    ) -> Centers:
        """Jets of an order at centers [center, row, d_model], rescaled by `scale`."""
        norm, values = trace.decoder.norm, values.double()
        variate = variate.double().expand_as(values)
        factors = center_scale_factors(norm, values, variate, scale)
        series = norm_jet(norm, values * factors[..., None], variate, order)
        largest = torch.maximum(series.alpha.abs(), series.beta.abs()).flatten(1).amax(1)
        bounded = largest < MOST
        # What follows refuses numbers that are not finite; a look of its own would wait for a device.
        jets, constants = torch.where(bounded.all(), series.value(order), torch.nan), values.new_ones(len(values))
        alpha, state = series.alpha[-1] * factors, trace.recording.hook_state
        return cls(trace.network, places, jets, alpha, series.beta[-1], series.rho, constants, state, bounded)

    @classmethod
    def detached(cls, trace: Trace, places: Tensor, values: Tensor, variate: Tensor, constants: Tensor) -> Centers:
        """The frozen final norm at many centers; a zero one stands for its constant, where `constants` is 1."""
        norm, values = trace.decoder.norm, values.double()
        linear = frozen_norm(norm, values, variate.double().expand_as(values))
        alpha, beta = linear.alpha[0] * (1 - constants)[:, None], linear.beta[0]
        state = trace.recording.hook_state
        found = cls(trace.network, places, values, alpha, beta, linear.rho, constants, state)
        return replace(found, jets=found._with_constants(norm.scale(alpha[..., None] * linear.center)))

    def _with_constants(self, linear: Tensor) -> Tensor:
        """Add each center's multiple of the norm's bias to the linear part of its jet."""
        bias = self.decoder.norm.bias
        return linear if bias is None else linear + self.constants[:, None, None] * bias

    def randomized(self, values: Tensor, variate: Tensor, seed: int) -> Centers:
        """Jets at random centers of the same norms and angles to the final stream, thus the same alpha, beta, rho."""
        norm = self.decoder.norm
        plane = split_along(norm, values, variate)
        jets = random_directions(norm, variate, values.shape[:1], self.places, seed)
        jets *= (self.alpha * plane.across)[..., None]
        jets += (self.alpha * plane.along + self.beta)[..., None] * plane.variate
        return replace(self, jets=self._with_constants(norm.scale(jets)))

    def effects(self, ids: Int[Tensor, "row target"]) -> Float[Tensor, "center row target"]:
        """Additive logits of targets minus the mean over the vocabulary, for every center's jet."""
        columns = directions(self.decoder, ids)
        products = torch.einsum("crd,rtd->crt", self.jets, columns[..., :-1])
        return products + self.constants[:, None, None] * columns[..., -1]

    @property
    def bias_weights(self) -> Float[Tensor, "center row"]:
        """The multiple of b_U in the logits of every jet."""
        return self.constants[:, None].expand(self.jets.shape[:-1])

    def sum(self, weights: Float[Tensor, "row center"]) -> Float[Tensor, "row d_model"]:
        """sum_i w_i e_i."""
        return torch.einsum("rn,nrd->rd", weights, self.jets)


@dataclass(frozen=True, eq=False)
class Components:
    """What a joint lens sums: its components, and their jets at a few rows at a time, so that memory is bounded.

    Attributes:
        trace: The run that they are read from.
        rows: The positions that are read.
        labels: Components; detached, `ln_final_bias` last.
        order: Order of the jets.
        center_scale: Length of the centers.
        linearize: `"jet"` or `"detached"`.
        kept: The jets of all rows, if they are few enough to be held.
    """

    trace: Trace
    rows: Rows
    labels: list[str]
    order: int
    center_scale: CenterScale
    linearize: Linearize
    kept: Centers | None = None

    @classmethod
    def of(
        cls, trace: Trace, rows: Rows, embeddings: bool, order: int, scale: CenterScale, linearize: Linearize
    ) -> Components:
        """The components of a trace, and what hooks added to its streams."""
        network = trace.network
        labels = [label for label in network.components if embeddings or label not in network.sources]
        labels += [label for stream in network.streams for label in trace.edits(stream)]
        labels += affine_labels(None)[1] if linearize == "detached" else []
        return cls(trace, rows, labels, order, scale, linearize)

    @cached_property
    def tiles(self) -> list[slice]:
        """Rows that are held at once."""
        row_bytes = 8 * COPIES * self.trace.decoder.d_model * len(self.labels)
        most = _tile_bytes(self.trace[FINAL_STREAM].device) // row_bytes
        return list(slices(len(self.rows.places), min(max(most, 1), CHUNK_SIZE)))

    def at(self, rows: slice | Tensor, labels: Sequence[str] | None = None) -> Centers:
        """The jets of some rows and components."""
        if self.kept is None:
            return self.evaluated(rows, labels)[0]
        chosen = slice(None) if labels is None else [self.labels.index(label) for label in labels]
        jets, alpha, beta, rho = (
            values[chosen][:, rows] for values in (self.kept.jets, self.kept.alpha, self.kept.beta, self.kept.rho)
        )
        places = self.kept.places[rows if isinstance(rows, slice) else rows.cpu()]
        constants = self.kept.constants[chosen]
        return replace(self.kept, places=places, jets=jets, alpha=alpha, beta=beta, rho=rho, constants=constants)

    def evaluated(
        self, rows: slice | Tensor, labels: Sequence[str] | None = None
    ) -> tuple[Centers, Float[Tensor, "center row d_model"], Float[Tensor, "row d_model"]]:
        """The jets of some rows and components, the components themselves, and the final stream."""
        labels, (batch, pos) = self.labels if labels is None else list(labels), self.rows.cells_of_rows
        constant = affine_labels(None)[1] if self.linearize == "detached" else []
        read = [label for label in labels if label not in constant]
        values = self.trace.components_at(read, batch[rows], pos[rows])
        variate = self.trace[FINAL_STREAM][batch[rows], pos[rows]]
        places = self.rows.places[rows if isinstance(rows, slice) else rows.cpu()]
        if self.linearize == "jet":
            return (
                Centers.of(self.trace, places, values, variate, self.order, self.center_scale),
                values,
                variate,
            )
        places_of_read = [i for i, label in enumerate(labels) if label not in constant]
        every = values.new_zeros(len(labels), *variate.shape)
        every[places_of_read] = values
        constants = torch.tensor([label in constant for label in labels], device=values.device).double()
        return Centers.detached(self.trace, places, every, variate, constants), every, variate


def _tile_bytes(device: torch.device) -> int:
    """Bytes that the components' vectors may take at once."""
    free = free_bytes(device) if device.type == "cuda" else None
    return TILE_BYTES if free is None else free // 4
