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
import json
import math
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from tl_jets.core.measures import Measures
from tl_jets.core.tokens import visible
from tl_jets.lenses import IterativeJetLens, JointJetLens
from tl_jets.views.pages import filled

# Significant digits of numbers in pages and files.
DIGITS = 6


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
        `model`, `prompt`, `tokens` [batch][pos], `answer` [batch][pos] (the model's best token), `unit` (of logits and
        effects), `iterative` and `joint`, with the lenses' own names. Spaces in tokens are written as `·`.

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
    centers = joint.center_top_tokens(joint.top_ids.shape[-1])
    texts = _Texts({**iterative.token_names, **joint.texts(centers.indices)})
    return {
        "tl_jets": version("tl-jets"),
        "model": model,
        "prompt": prompt,
        "positions": torch.as_tensor(iterative.positions, device="cpu").tolist(),
        "tokens": texts(iterative.tokens),
        "answer": texts(iterative.model_top_ids),
        "unit": iterative.unit,
        "iterative": {
            "axes": ["layer", "order", "batch", "pos"],
            "labels": list(iterative.labels),
            "orders": list(iterative.orders),
            "linearize": iterative.linearize,
            "center_scale": iterative.center_scale,
            "rho": _numbers(iterative.rho),
            "alpha": _numbers(iterative.alpha),
            "beta": _numbers(iterative.beta),
            "borrowed_share": _numbers(iterative.borrowed_share),
            "borrowed": iterative.borrowed.tolist(),
            "top_ids": iterative.top_ids.tolist(),
            "top_tokens": texts(iterative.top_ids),
            "full_values": _numbers(iterative.full_values),
            "own_values": _numbers(iterative.own_values),
            "measures": _measures(iterative.measures),
            "control": _measures(iterative.control),
        },
        "joint": {
            "axes": ["center", "batch", "pos"],
            "labels": list(joint.labels),
            "order": joint.order,
            "linearize": joint.linearize,
            "objective": joint.objective,
            "center_scale": joint.center_scale,
            "weights": _numbers(joint.weights),
            "gap": None if joint.gap is None else _numbers(joint.gap),
            "effective_rank": None if joint.effective_rank is None else joint.effective_rank.tolist(),
            "rho": _numbers(joint.rho),
            "alpha": _numbers(joint.alpha),
            "beta": _numbers(joint.beta),
            "target_ids": joint.target_ids.tolist(),
            "targets": texts(joint.target_ids),
            "effects": _numbers(joint.effects),
            "borrowed_share": _numbers(joint.borrowed_share),
            "borrowed": joint.borrowed.tolist(),
            "center_top_tokens": texts(centers.indices),
            "top_ids": joint.top_ids.tolist(),
            "top_tokens": texts(joint.top_ids),
            "measures": _measures(joint.measures),
            "uniform": _measures(joint.uniform),
            "control": _measures(joint.control),
            "control_uniform": _measures(joint.control_uniform),
        },
    }


def lens_page(data: dict[str, Any]) -> str:
    """A self-contained HTML page of the result of `lens_data`: choose a token to see its two lenses."""
    # Only "<" can end a script element; "&" and the line separators are escaped for older browsers.
    safe = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}
    text = json.dumps(data, allow_nan=False, ensure_ascii=True).translate(safe)
    title = f"tl-jets lens: {data.get('prompt') or data.get('model') or ''}"
    return filled("lens.html", title=html.escape(title), data=text)


class _Texts:
    """Convert ids to nested lists of visible texts."""

    def __init__(self, names: dict[int, str]):
        self.names = names

    def __call__(self, ids: Tensor) -> Any:
        def nested(values: Any) -> Any:
            return [nested(value) for value in values] if isinstance(values, list) else visible(self.names.get(values))

        return nested(ids.tolist())


def _measures(measures: Measures) -> dict[str, Any]:
    return {name: _numbers(values) for name, values in measures.items()}


def _numbers(values: Tensor) -> Any:
    def nested(value: Any) -> Any:
        if isinstance(value, list):
            return [nested(item) for item in value]
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None

    return nested(values.tolist())
