"""Lenses as data and as an HTML page, with the contents of the terminal's tables.

`lens_data` gives JSON-ready lists and numbers; `lens_page` puts them into one self-contained page that works offline,
with all tokens escaped.

Example:
    >>> page_of = lambda token: lens_page({"model": "m", "tokens": [[token]]})
    >>> "</script><script>" in page_of("</script><script>alert(1)</script>")
    False
"""

from __future__ import annotations

import html
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from tl_jets.core.measures import Measures
from tl_jets.core.tokens import visible
from tl_jets.lenses import IterativeJetLens, JointJetLens
from tl_jets.views.pages import filled, json_in_page, rounded

# Fields of the lenses that the data hold.
SHARED = ("labels", "linearize", "center_scale", "rho", "alpha", "beta", "borrowed_share", "borrowed", "top_ids")
SHARED += ("measures", "control")
ITERATIVE = ("orders", "full_values", "own_values")
JOINT = ("order", "objective", "weights", "gap", "effective_rank", "target_ids", "effects")
JOINT += ("uniform", "control_uniform")


def lens_data(
    iterative: IterativeJetLens, joint: JointJetLens, *, model: str = "", prompt: str | None = None
) -> dict[str, Any]:
    """Both lenses of the same input as nested JSON-ready lists; NaN and infinity become None.

    Args:
        iterative: Axes [layer, order, batch, pos]; tokens also k.
        joint: Axes [center, batch, pos].
        model: Name of the model.
        prompt: Text of the input, if it was one.

    Returns:
        `model`, `prompt`, `tokens` [batch][pos], `answer` [batch][pos] (the model's best token), `sinks` [batch][pos]
        (positions that averages leave out), `unit` (of logits and effects), `iterative` and `joint`, with the lenses' own
        names. Spaces in tokens are written as `·`.

    Raises:
        ValueError: The lenses are of different tokens, or the iterative lens has no measures or control.
    """
    if iterative.tokens.shape != joint.tokens.shape or bool((iterative.tokens != joint.tokens).any()):
        raise ValueError(
            f"Both lenses must be of the same tokens; got {list(iterative.tokens.shape)} and {list(joint.tokens.shape)}. "
            "Run them on the same trace, at the same positions."
        )
    if iterative.measures is None or iterative.control is None:
        raise ValueError("Measures are shown beside their controls; run the iterative lens with measures and a seed.")
    centers = joint.center_top_tokens(joint.top_ids.shape[-1]).indices
    names = {**iterative.token_names, **joint.texts(centers)}

    def texts(ids: Tensor) -> Any:
        return _nested(ids.tolist(), lambda token: visible(names.get(token)))

    return {
        "tl_jets": version("tl-jets"),
        "model": model,
        "prompt": prompt,
        "positions": torch.as_tensor(iterative.positions, device="cpu").tolist(),
        "tokens": texts(iterative.tokens),
        "answer": texts(iterative.model_top_ids),
        "sinks": None if iterative.sinks is None else iterative.sinks.mask.tolist(),
        "unit": iterative.unit,
        "iterative": {"axes": ["layer", "order", "batch", "pos"], "top_tokens": texts(iterative.top_ids)}
        | {name: _plain(getattr(iterative, name)) for name in (*SHARED, *ITERATIVE)},
        "joint": {
            "axes": ["center", "batch", "pos"],
            "targets": texts(joint.target_ids),
            "center_top_tokens": texts(centers),
            "top_tokens": texts(joint.top_ids),
        }
        | {name: _plain(getattr(joint, name)) for name in (*SHARED, *JOINT)},
    }


def lens_page(data: dict[str, Any]) -> str:
    """A self-contained HTML page of the result of `lens_data`: choose a token to see its two lenses."""
    title = f"tl-jets lens: {data.get('prompt') or data.get('model') or ''}"
    return filled("lens.html", title=html.escape(title), data=json_in_page(data))


def _plain(value: Any) -> Any:
    """A field of a lens as plain values, with rounded numbers."""
    if isinstance(value, Measures):
        return {name: _plain(values) for name, values in value.items()}
    return _nested(value.tolist() if isinstance(value, Tensor) else value, rounded)


def _nested(values: Any, change: Callable[[Any], Any]) -> Any:
    return [_nested(value, change) for value in values] if isinstance(values, list) else change(values)
