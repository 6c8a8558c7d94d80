"""The table of Taylor rules: one function per aten operation.

A rule takes the arguments of its aten overload, at least one of them a `Series`, and returns what the overload returns.
The `rules_*` modules fill the table on import; `Series.__torch_dispatch__` reads it.

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
    """Decorator that registers a function in `RULES` for aten overloads such as `torch.ops.aten.add.Tensor`, unchanged.

    Raises:
        ValueError: An overload already has a rule.
    """

    def enter(function: AnyRule) -> AnyRule:
        for overload in overloads:
            # A reloaded module, as in a notebook, may register its rules again.
            known = RULES.get(overload)
            name = getattr(known, "__qualname__", "one of a table")
            if known is not None and name != function.__qualname__:
                raise ValueError(
                    f"an aten overload has one rule; {overload} has {name} already. Remove one of the two."
                )
            RULES[overload] = function
        return function

    return enter
