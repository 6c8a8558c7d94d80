r"""Lenses beside the jet lens, with its measures and its control: translators move each stream, the model's own decoder reads.

.. math::
    \text{lens}_l = U \, \gamma_{L+1}(T_l(h_l)),

T_l is trained (tuned lens), an average Jacobian (Jacobian lens), or any function; the identity is the logit lens. Orders
above 0 are jets of the final norm at T_l(h_l), as in `tl_jets.lenses.iterative`.

**The control** is the jet lens' own: a random stream of the layer's length and angle to the final stream, here moved by the
same translator. So it has what a translator says whatever the layer holds, its bias above all.

Example:
    >>> import pandas as pd
    >>> import tl_jets as tj
    >>> network = tj.ResidualNetwork(tj.load_tinydocs())
    >>> train = network.trace("The following example shows how to use the function")
    >>> bias = (train["final_post"] - train["3_pre"]).mean((0, 1))
    >>> prompt = "This function is available on Unix and"
    >>> shifted = translated_lens(network, prompt, {("resid_pre", 3): lambda stream: stream + bias}, name="a mean")
    >>> plain = tj.iterative_jet_lens(network, prompt, order=0)["3_pre"]
    >>> table = pd.concat([plain.average().assign(lens="logit lens"), shifted.average()])
    >>> print(table[["lens", "layer", "kl", "control_kl"]].round(2).to_string(index=False))
          lens layer   kl  control_kl
    logit lens 3_pre 1.08        0.90
        a mean 3_pre 0.50        1.86
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.calculus.norms import check_order
from tl_jets.core.changes import one_look
from tl_jets.core.logit_reader import CHUNK_SIZE
from tl_jets.core.measures import random_directions, split_along
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.protocol import FINAL_STREAM
from tl_jets.core.selection import TargetInput, check_options
from tl_jets.lenses.iterative import IterativeJetLens, read_lens
from tl_jets.lenses.results import LensInput
from tl_jets.lenses.translators import Translator, read_translators


@one_look()
def translated_lens(
    model: Any,
    text_or_tokens: Any,
    translators: Any,
    *,
    name: str | None = None,
    order: int = 0,
    positions: int | Sequence[int] | None = None,
    targets: TargetInput | None = None,
    top_k: int = 5,
    measures: bool = True,
    seed: int | None = 0,
    attention_mask: Tensor | None = None,
    cache: Any = None,
    chunk_size: int = CHUNK_SIZE,
) -> IterativeJetLens:
    """A tuned lens, a Jacobian lens, or one of your own as an `IterativeJetLens`: the same measures, control and tables.

    Args:
        model: A TransformerLens model, or a `ResidualNetwork`, which shares computations between calls.
        text_or_tokens: A prompt, a list of prompts, token ids [batch, pos], or a `Trace`.
        translators: A TransformerLens `JacobianLens`; a `TunedLens` of the package tuned-lens, or the folder in which it was saved;
            or functions from streams [row, d_model] to estimates of the final stream [row, d_model], by stream: `{("resid_pre",
            3): f}`.
        name: Name of the lens in tables; None for the object's.
        order: Highest order of the jet of the final norm at the translated stream; 0 is the lens as it is defined.
        positions: Positions to read among each prompt's real tokens, -1 its last; None for all.
        targets: Tokens to follow, as in `iterative_jet_lens`.
        top_k: Number of best tokens per cell.
        measures: Whether to compute measures and their controls.
        seed: Seed of the control, whose directions all layers and prompts share; None for no control.
        attention_mask: Passed to the model (left padding needs it).
        cache: A ready `ActivationCache` of the same input.
        chunk_size: Rows of d_vocab logits held at once.

    Raises:
        TypeError: Translators of another kind.
        ValueError: A lens of another model, or of raw weights where the model's are processed; a translator that returns
            another shape or numbers that are not finite; bad positions, targets or input.

    Source: Belrose et al., arXiv 2303.08112; Gurnee et al. 2026. Cost: as `iterative_jet_lens`, twice with a control.

    Example: in the docstring of `tl_jets.lenses.translated`.
    """
    check_options("none", top_k, chunk_size)
    check_order(order)
    network = ResidualNetwork.of(model)
    kind, maps = read_translators(network, translators)
    inputs = LensInput.of(network, text_or_tokens, positions, targets, attention_mask, cache)
    options: dict[str, Any] = {"top_k": top_k, "measures": measures, "chunk_size": chunk_size}
    with torch.no_grad():
        streams = inputs.streams(list(maps))
        moved = _translated(inputs, maps, streams)
        found = read_lens(inputs, list(maps), moved, order, "none", "jet", [], options)
        if measures and seed is not None:
            random = _translated(inputs, maps, _random_streams(inputs, streams, seed))
            bare, options = replace(inputs, target_ids=None), options | {"top_k": 1}
            control = read_lens(bare, list(maps), random, order, "none", "jet", [], options).measures
            found = replace(found, control=control)
    return replace(found, seed=None if seed is None else int(seed), translator=kind if name is None else name)


def _translated(
    inputs: LensInput, maps: dict[str, Translator], streams: Float[Tensor, "layer row d_model"]
) -> Float[Tensor, "layer row d_model"]:
    """Every layer's streams after its translator, float64."""
    found = []
    for (label, translator), stream in zip(maps.items(), streams.to(inputs.trace[FINAL_STREAM].dtype), strict=True):
        moved = translator(stream)
        is_finite = bool(moved.isfinite().all())
        if moved.shape != stream.shape or not is_finite:
            raise ValueError(
                f"A translator must return finite estimates of the final stream, {list(stream.shape)} here; that of {label} "
                f"returned {list(moved.shape)}{'' if is_finite else ', not all finite'}. Leave the final norm and the unembedding "
                f"out, which are the model's own."
            )
        found.append(moved.double())
    return torch.stack(found)


def _random_streams(inputs: LensInput, streams: Float[Tensor, "layer row d_model"], seed: int) -> Tensor:
    """The streams with a random vector of the same length in place of what is orthogonal to the final stream."""
    norm = inputs.trace.decoder.norm
    plane = split_along(norm, streams, inputs.variate)
    random = random_directions(norm, inputs.variate, (), inputs.rows.places, seed)
    return streams - plane.orthogonal + plane.across[..., None] * random
