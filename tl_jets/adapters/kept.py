"""What belongs to a model and is kept with it while it lives: a bare model then costs what a kept network costs.

Nothing here refers to the model itself, so that keeping it does not keep the model alive.
"""

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
    """What was found out about a model, by the state of its weights and hooks.

    Attributes:
        lock: Held by a thread while it has hooks on the model or evaluates its modules.
        watches: Numbers of the states of its weights: outside of the blocks, then by block.
        checked: Heads and neurons that were compared with the model.
        replays: Stages, and the decoder, that were compared with the model.
        decoder: The state of the weights outside of the blocks, and the decoder read then, with its metrics.
    """

    lock: Any = field(default_factory=threading.RLock)
    watches: list[Watch] = field(default_factory=list)
    checked: set[Hashable] = field(default_factory=set)
    replays: set[Hashable] = field(default_factory=set)
    decoder: tuple[int, Decoder] | None = None


_KEPT: WeakKeyDictionary[Any, Kept] = WeakKeyDictionary()


def kept_of(model: Any) -> Kept:
    """What is kept of a TransformerLens model."""
    kept = _KEPT.setdefault(model, Kept())
    kept.watches += [Watch() for _ in range(1 + len(model.blocks) - len(kept.watches))]
    return kept
