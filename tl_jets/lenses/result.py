"""What the results of both lenses share: measures by name, and moving to a device."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from tl_jets.measures import MEASURES, Measures
from tl_jets.notebook import Shown, View

Result = TypeVar("Result", bound="LensResult")


class LensResult(Shown):
    """A frozen dataclass of tensors, one of which is `measures`."""

    measures: Measures | None

    def __getattr__(self, name: str) -> Tensor:
        """`lens.kl`, `lens.cosine`, ...: the measures by name."""
        if name not in MEASURES:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")
        if self.measures is None:
            raise ValueError("The measures were not computed; run the lens with measures=True.")
        return getattr(self.measures, name)

    def _view(self) -> View:
        from tl_jets.views.lens_tables import lens_summary  # views are made of results, and drawn only when looked at

        return lens_summary(self)  # type: ignore[arg-type]

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *MEASURES})

    def to(self: Result, device: torch.device | str) -> Result:
        """The same on another device."""
        return self._mapped(lambda values: values.to(device), {field.name for field in fields(self)})  # type: ignore[arg-type]

    def _mapped(self: Result, change: Any, names: set[str]) -> Result:
        """With `change` applied to every tensor of the named fields."""
        found: dict[str, Any] = {}
        for name in names:
            value = getattr(self, name)
            if isinstance(value, Measures):
                found[name] = value.map(change)
            elif isinstance(value, Tensor):
                found[name] = change(value)
        return replace(self, **found)  # type: ignore[type-var]
