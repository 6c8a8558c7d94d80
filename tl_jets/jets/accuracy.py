"""`Check`: how far the terms of an expansion are from their recomputation."""

from __future__ import annotations

from dataclasses import dataclass

# Relative tolerance of a check; float32 models reach about 1e-6.
ACCURACY = 1e-4


@dataclass(frozen=True)
class Check:
    """Result of `JetCache.check`.

    Attributes:
        sum_error: Largest difference between `truth` and the model, relative to the model's largest value.
        slopes: For each center, the exponent with which the jet's error falls as the step shrinks; k + 1 for a jet of
            order k. None where the error is within rounding.
        order: k.
        term_error: Largest difference between a term and its recomputation, relative to the term's largest summand or to
            rounding; None if terms are not compared.
    """

    sum_error: float
    slopes: dict[str, float | None]
    order: int
    term_error: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the errors are below 1e-4 and every slope is above k + 1/2."""
        errors = [self.sum_error] if self.term_error is None else [self.sum_error, self.term_error]
        return all(error < ACCURACY for error in errors) and all(
            slope is None or slope > self.order + 0.5 for slope in self.slopes.values()
        )
