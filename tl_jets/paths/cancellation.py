r"""How much the parts of a sum cancel, and a warning where a sum says little of its parts.

.. math::
    \text{cancellation} = \frac{\sum_i |e_i|}{|\sum_i e_i|} \ge 1 ,

with e_i the effects of parts that add up. At 1 all parts push the same way. At 37 (path lengths of SmolLM2-135M) every part
is much larger than what remains of it: which parts are named is then a matter of how the sum was split.

Example:
    >>> import torch
    >>> cancellation(torch.tensor([[2.0], [-1.0], [0.5]])).tolist()
    [2.3333332538604736]
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from tl_jets.core.caller import warn_caller
from tl_jets.core.divergence import CancellationWarning

# Parts whose cancellation is above this are said to cancel.
LARGE = 3.0


class Cancelling:
    """Base of results with effects of parts that add up, unless they are by component."""

    by: str
    effects: Tensor
    valid: Tensor

    @property
    def cancellation(self) -> Float[Tensor, "batch pos target"]:
        """Sum of the sizes of all effects over the size of their sum, 1 or more; NaN at padding and by component."""
        return cancellation(self.effects) * (math.nan if self.by == "component" else 1.0)

    @property
    def overall_cancellation(self) -> float:
        """The same of the first target at all real positions together: the sizes over the sizes of the sums, both summed."""
        effects = self.effects[..., 0][:, self.valid]
        return math.nan if self.by == "component" else float(effects.abs().sum() / effects.sum(0).abs().sum())

    def _cancel(self) -> str:
        """What a repr says: empty unless parts cancel."""
        index = self.overall_cancellation
        return f"; effects cancel: their sizes are {index:.3g} times their sum" if index > LARGE else ""

    def warn_of_cancellation(self) -> None:
        """Warn, at the caller outside tl_jets, if parts cancel."""
        if self.overall_cancellation > LARGE:
            text = (
                f"Effects by {self.by} cancel: their sizes add up to {self.overall_cancellation:.3g} times the size of their sum, "
                f"so that single ones say little of the answer. Compare with ablations (ablation_effect, path_ablation)."
            )
            warn_caller(text, CancellationWarning)


def cancellation(effects: Float[Tensor, " part *cells"]) -> Float[Tensor, "*cells"]:
    """Sum of the sizes of effects over the size of their sum; 1 or more, inf where the sum is 0."""
    return effects.abs().sum(0) / effects.sum(0).abs()
