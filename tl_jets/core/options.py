"""Validates options that are integers or one of a few words.

Example:
    >>> check_integers(1, top_k=3)
    >>> check_integers(1, top_k=2.5)
    Traceback (most recent call last):
    TypeError: top_k must be an integer >= 1; got 2.5.
    >>> check_choice("per", "column", ("global", "row"))
    Traceback (most recent call last):
    ValueError: per must be one of ('global', 'row'); got 'column'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from numbers import Integral
from typing import Any, TypeVar, cast

from tl_jets.core.caller import warn_caller

# Choices that an error names.
MOST_SHOWN = 12

Function = TypeVar("Function", bound=Callable[..., Any])


def check_integers(least: int, /, **given: Any) -> None:
    """Raise TypeError for an option that is not an integer (True and 2.0 are not), ValueError for one below `least`."""
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be an integer >= {least}; got {value!r}.")
        if value < least:
            raise ValueError(f"{name} must be an integer >= {least}; got {value}.")


def check_choice(name: str, value: Any, known: Sequence[Any]) -> None:
    """Raise ValueError for an option that is not one of its values; the message names the first twelve."""
    if not any(value is choice or (_compares(value) and _compares(choice) and value == choice) for choice in known):
        more = f", ... ({len(known)} in all)" if len(known) > MOST_SHOWN else ""
        raise ValueError(f"{name} must be one of {tuple(known[:MOST_SHOWN])}{more}; got {value!r}.")


def _compares(value: Any) -> bool:
    """Text and integers are compared, and nothing else: True is not 1."""
    return isinstance(value, str | Integral) and not isinstance(value, bool)


def renamed(**names: str | None) -> Callable[[Function], Function]:
    """A decorator for keywords, old=new: old ones work for one release, with a DeprecationWarning; None: without effect."""

    def decorate(function: Function) -> Function:
        @wraps(function)
        def called(*args: Any, **given: Any) -> Any:
            for old, new in names.items():
                if old in given:
                    now = "no longer needs" if new is None else f"takes {new}= in place of"
                    text = f"{function.__name__} {now} {old}=, which the next release will refuse."
                    warn_caller(text, DeprecationWarning)
                    value = given.pop(old)
                    if new is not None and new in given:
                        raise TypeError(
                            f"{new} and {old} are the same option of {function.__name__}; pass {new} alone."
                        )
                    given |= {} if new is None else {new: value}
            return function(*args, **given)

        return cast(Function, called)

    return decorate
