r"""Jets of the final norm at many centers: components of the joint lens, or random centers like them.

.. math::
    e_i = J^k \gamma_{L+1}(x_i)(h_L) = \alpha_i \, (w * x_i) + \beta_i \, (w * h_L) + c_i \cdot \text{bias} .

Detached, all alpha are that of h_L, beta is 0, and the norm's bias is a center of its own.

Source: Chen et al., *Jet Expansions of Residual Computation*, section 4; norms as in `tl_jets.calculus.norms`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.calculus import CenterScale, norm_jet
from tl_jets.calculus import center_scale as center_scale_factors
from tl_jets.core.attribution import directions
from tl_jets.core.decoder import Decoder
from tl_jets.core.frozen_network import frozen_norm
from tl_jets.core.lens_logits import refuse_overflow
from tl_jets.core.measures import random_directions, split_along
from tl_jets.core.protocol import State
from tl_jets.core.selection import Rows
from tl_jets.core.structure import Structure
from tl_jets.core.trace import Trace

# Coefficients whose jets are far from the largest float32, and their products from the largest float64.
MOST = 1e30


@dataclass(frozen=True, eq=False)
class Centers:
    """Jets of the final norm at many centers, at real positions only.

    Attributes:
        jets: e_i = J^k norm(x_i)(h_L), float64.
        alpha: Coefficients of w * x_i.
        beta: Coefficients of w * h_L.
        rho: Radius ratios.
        constants: Multiple of the norm's bias and of b_U in each jet.
        state: State of the hooks and weights that the jets were computed with.
    """

    network: Structure
    rows: Rows
    jets: Float[Tensor, "center row d_model"]
    alpha: Float[Tensor, "center row"]
    beta: Float[Tensor, "center row"]
    rho: Float[Tensor, "center row"]
    constants: Float[Tensor, " center"]
    state: State

    @property
    def decoder(self) -> Decoder:
        """The decoder of the jets; raises ValueError once its weights have changed."""
        return self.network.decoder_at(self.state)

    @classmethod
    def of(cls, trace: Trace, rows: Rows, values: Tensor, variate: Tensor, order: int, scale: CenterScale) -> Centers:
        """Jets of an order at centers [center, row, d_model], rescaled by `scale`."""
        norm, values = trace.decoder.norm, values.double()
        variate = variate.double().expand_as(values)
        factors = center_scale_factors(norm, values, variate, scale)
        series = norm_jet(norm, values * factors[..., None], variate, order)
        largest = torch.maximum(series.alpha.abs(), series.beta.abs()).flatten(1).amax(1)
        refuse_overflow((largest < MOST).tolist())
        jets, constants = series.value(order), values.new_ones(len(values))
        alpha, state = series.alpha[-1] * factors, trace.recording.hook_state
        return cls(trace.network, rows, jets, alpha, series.beta[-1], series.rho, constants, state)

    @classmethod
    def detached(cls, trace: Trace, rows: Rows, values: Tensor, variate: Tensor) -> Centers:
        """The frozen final norm at many centers; the last one, zero, stands for its constant."""
        norm, values = trace.decoder.norm, values.double()
        linear = frozen_norm(norm, values, variate.double().expand_as(values))
        constants = values.new_zeros(len(values))
        constants[-1] = 1
        alpha, beta = linear.alpha[0] * (1 - constants)[:, None], linear.beta[0]
        state = trace.recording.hook_state
        found = cls(trace.network, rows, values, alpha, beta, linear.rho, constants, state)
        return replace(found, jets=found._with_constants(norm.scale(alpha[..., None] * linear.center)))

    def _with_constants(self, linear: Tensor) -> Tensor:
        """Add each center's multiple of the norm's bias to the linear part of its jet."""
        bias = self.decoder.norm.bias
        return linear if bias is None else linear + self.constants[:, None, None] * bias

    def randomized(self, values: Tensor, variate: Tensor, seed: int) -> Centers:
        """Jets at random centers of the same norms and angles to the final stream, thus the same alpha, beta, rho."""
        norm = self.decoder.norm
        plane = split_along(norm, values, variate)
        jets = random_directions(norm, variate, values.shape[:1], self.rows.places, seed)
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
