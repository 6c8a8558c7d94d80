"""What tables and figures share: names of measures, and the selection of prompts, positions and the largest parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_jets.core.logit_reader import TopTokens
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
    check_prompt(result, prompt)
    own = positions_of(result.positions, prompt)
    wanted = range(len(own)) if positions is None else [own.index(p) for p in positions if p in own]
    if positions is not None and len(wanted) < len(positions):
        raise ValueError(f"positions must be among those of the result, {own}; got {list(positions)}.")
    valid = result.valid[prompt].tolist()
    places = [place for place in wanted if valid[place]]
    if not places:
        raise ValueError(f"positions must hold a real token; those of prompt {prompt} are padding. Choose others.")
    return places if most is None else places[-most:]


def check_prompt(result: Any, prompt: int) -> None:
    """ValueError unless the result has such a prompt."""
    if not 0 <= prompt < len(result.tokens):
        raise ValueError(f"prompt must lie in 0..{len(result.tokens) - 1}, the prompts of the result; got {prompt}.")


def of_prompts(result: Any, prompt: int) -> str:
    """`, prompt 2 of 3`, if there are several."""
    return f", prompt {prompt + 1} of {len(result.tokens)}" if len(result.tokens) > 1 else ""


def counted_of(result: Any, prompt: int, places: list[int]) -> list[int]:
    """The places that are no attention sinks; all if there are no others."""
    return [place for place in places if bool(result.counted[prompt, place])] or places


def largest_first(values: Tensor, top: int | None) -> list[int]:
    """Indices of the largest absolute values; ValueError if top is below 1."""
    if top is not None and top < 1:
        raise ValueError(f"top must be 1 or more, or None for all; got {top}.")
    return values.abs().argsort(descending=True, stable=True).tolist()[:top]


def shown_of(shown: int, total: int) -> str:
    """`all 8`, or `the 3 largest of 1,024`."""
    return f"all {total:,}" if shown == total else f"the {shown} largest of {total:,}"


def best_of_components(
    lens: JointJetLens, prompt: int, places: list[int], top: int | None
) -> tuple[Float[Tensor, " center"], list[int], TopTokens]:
    """Mean weights of a joint lens without sinks, the components of the `top` largest, in order, and their best tokens."""
    weights = lens.weights[:, prompt, counted_of(lens, prompt, places)].mean(1)
    chosen = sorted(largest_first(weights, top))
    return weights, chosen, lens.contributions(1, prompt=prompt, places=places, labels=[lens.labels[i] for i in chosen])
