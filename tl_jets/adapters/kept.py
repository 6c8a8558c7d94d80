"""Values kept with a model while it lives, so that bare models cost as much as kept networks."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from tl_jets.core.changes import Watch
from tl_jets.core.decoder import Decoder


@dataclass(eq=False)
class Kept:
    """Values computed from a model, by the state of its weights and hooks; must not reference the model.

    Attributes:
        lock: Held by a thread while it has hooks on the model or evaluates its modules.
        watches: Watches of its weights: outside the blocks, then by block.
        checked: Heads and neurons that were compared with the model.
        replays: Stages, and the decoder, that were compared with the model.
        decoder: State of the weights outside the blocks, and the decoder read then, with its metrics.
    """

    lock: Any = field(default_factory=threading.RLock)
    watches: list[Watch] = field(default_factory=list)
    checked: set[Hashable] = field(default_factory=set)
    replays: set[Hashable] = field(default_factory=set)
    decoder: tuple[int, Decoder] | None = None


_KEPT: WeakKeyDictionary[Any, Kept] = WeakKeyDictionary()


def kept_of(model: Any) -> Kept:
    """The kept values of a TransformerLens model."""
    kept = _KEPT.setdefault(model, Kept())
    kept.watches += [Watch() for _ in range(1 + len(model.blocks) - len(kept.watches))]
    return kept
