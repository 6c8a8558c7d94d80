"""Common base of both lenses' results: measures by name."""

from __future__ import annotations

from torch import Tensor

from tl_jets.core.measures import MEASURES, Measures
from tl_jets.core.results import Result


class LensResult(Result):
    """Base of frozen dataclasses of tensors, one of which is `measures`."""

    measures: Measures | None

    def __getattr__(self, name: str) -> Tensor:
        """A measure by name: `lens.kl`, `lens.cosine`, ..."""
        if name not in (*MEASURES, "borrowed"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")
        if self.measures is None:  # no ValueError, so that hasattr says no
            raise AttributeError(f"{name} needs a lens run with measures=True; this one was run without.")
        return getattr(self.measures, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *MEASURES})
