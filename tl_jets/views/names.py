"""Names of measures in views, and the selection of positions and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_jets.core.selection import positions_of
from tl_jets.lenses import JointJetLens

MEASURE_NAMES = {
    "remainder_norm": "remainder",
    "cosine": "cosine",
    "centered_cosine": "centered cosine",
    "kl": "KL (nats)",
    "top1_agreement": "top-1",
}


def places_of(result: Any, prompt: int, positions: Sequence[int] | None, most: int | None = None) -> list[int]:
    """Indices of real tokens along a result's pos axis; ValueError if there are none.

    Args:
        result: Has `positions`, `tokens` and `valid`.
        prompt: Index of the prompt.
        positions: Positions in the prompt; None for all.
        most: Keep only the last `most`.
    """
    n_prompts = len(result.tokens)
    if not 0 <= prompt < n_prompts:
        raise ValueError(f"prompt must lie in 0..{n_prompts - 1}, the prompts of the result; got {prompt}.")
    own = positions_of(result.positions, prompt)
    wanted = range(len(own)) if positions is None else [own.index(p) for p in positions if p in own]
    if positions is not None and len(wanted) < len(positions):
        raise ValueError(f"positions must be among those of the result, {own}; got {list(positions)}.")
    valid = result.valid[prompt].tolist()
    places = [place for place in wanted if valid[place]]
    if not places:
        raise ValueError(f"positions must hold a real token; those of prompt {prompt} are padding. Choose others.")
    return places if most is None else places[-most:]


def of_prompts(result: Any, prompt: int) -> str:
    """`, prompt 2 of 3`, if there are several."""
    return f", prompt {prompt + 1} of {len(result.tokens)}" if len(result.tokens) > 1 else ""


def counted_of(result: Any, prompt: int, places: list[int]) -> list[int]:
    """The places that are no attention sinks; all if there are no others."""
    return [place for place in places if bool(result.counted[prompt, place])] or places


def mean_weights(lens: JointJetLens, prompt: int, places: list[int]) -> Float[Tensor, " center"]:
    """Weights of a joint lens averaged over some positions of a prompt, without attention sinks unless all are sinks."""
    return lens.weights[:, prompt, counted_of(lens, prompt, places)].mean(1)
