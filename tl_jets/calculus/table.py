"""The one table of rules: which function carries an aten operation over to truncated Taylor series.

A rule takes the arguments of its aten overload, of which at least one is a `Series`, and returns what the overload
returns. Modules `rules_*` fill the table when they are imported; `Series.__torch_dispatch__` reads it.

Cost: one dictionary look-up per operation.

Example:
    >>> import torch
    >>> import tl_jets.calculus
    >>> torch.ops.aten.tanh.default in RULES
    True
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch._ops import OpOverload

Rule = Callable[..., Any]
AnyRule = TypeVar("AnyRule", bound=Rule)

RULES: dict[OpOverload, Rule] = {}


def rule(*overloads: OpOverload) -> Callable[[AnyRule], AnyRule]:
    """Enter the decorated function into `RULES` for every overload named.

    Args:
        *overloads: aten overloads such as `torch.ops.aten.add.Tensor`.

    Returns:
        A decorator that gives the function back unchanged.

    Raises:
        ValueError: an overload has a rule already.
    """

    def enter(function: AnyRule) -> AnyRule:
        for overload in overloads:
            # A module that is reloaded, as in a notebook, enters its own rules again.
            if overload in RULES and RULES[overload].__qualname__ != function.__qualname__:
                raise ValueError(
                    f"an aten overload has one rule; {overload} has {RULES[overload].__qualname__} already. "
                    "Remove one of the two."
                )
            RULES[overload] = function
        return function

    return enter
