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

from collections.abc import Sequence
from numbers import Integral
from typing import Any

# Choices that an error names.
MOST_SHOWN = 12


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
