"""Translators of residual streams to the final stream's basis, read from the objects of other tools without importing them.

==========================  ====================================================  ====================================
object                      translator of a layer                                 its stream
==========================  ====================================================  ====================================
`JacobianLens`              J_l h (TransformerLens 4.3, raw weights)              `blocks.l.hook_resid_post`
`TunedLens`, or its folder  h + A_l h + b_l (package tuned-lens, raw weights)     `blocks.l.hook_resid_pre`
a dict                      any function [row, d_model] -> [row, d_model]         its key
==========================  ====================================================  ====================================

Source: Gurnee et al. 2026 (Jacobian lens); Belrose et al., arXiv 2303.08112 (tuned lens).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl_jets.core.network import ResidualNetwork
from tl_jets.core.protocol import FINAL_STREAM, some

# Streams [row, d_model] of one layer -> estimates of the final stream.
Translator = Callable[[Tensor], Tensor]

# Unembeddings of the model and of the lens are the same up to the rounding of half precision.
SAME = 1e-2
# A row of W_E whose mean is this far below its length was centered.
CENTERED = 1e-5


def read_translators(network: ResidualNetwork, given: Any) -> tuple[str, dict[str, Translator]]:
    """The name of a lens and its translators by the stream that they read, in the order of the network.

    Raises:
        TypeError: An object of another kind, or a dict of others than functions.
        ValueError: A lens of another model or of raw weights, where the model's are processed; or no or unknown streams.
    """
    if hasattr(given, "jacobians") and hasattr(given, "validate_model"):
        given.validate_model(getattr(network.view, "model", None))
        found = {("resid_post", layer): _product(matrix) for layer, matrix in given.jacobians.items()}
        name = type(given).__name__
    elif hasattr(given, "layer_translators"):
        _check_raw(network, _is_same(given.unembed.unembedding.weight, network.decoder.W_U.T))
        found = {("resid_pre", layer): _residual(given[layer]) for layer in range(len(given.layer_translators))}
        name = type(given).__name__
    elif isinstance(given, str | Path):
        found, name = _of_folder(network, Path(given)), "TunedLens"
    elif isinstance(given, Mapping) and all(map(callable, given.values())):
        found, name = dict(given), "translated"
    else:
        raise TypeError(
            "Translators must be a JacobianLens, a TunedLens or its folder, or a dict of functions by stream, such as "
            f"{{('resid_pre', 3): f}}; got {type(given).__name__}."
        )
    known = network.at("sublayer").streams[:-1]
    by_label = {network.label(key): translator for key, translator in found.items()}
    unknown = [label for label in by_label if label not in known]
    if unknown or not by_label:
        raise ValueError(
            f"Translators are of streams before {FINAL_STREAM}, which needs none: {some(known)}; got {unknown or 'none'}."
        )
    return name, {label: by_label[label] for label in known if label in by_label}


def _of_folder(network: ResidualNetwork, folder: Path) -> dict[Any, Translator]:
    """The translators in a folder that `TunedLens.save` wrote."""
    config = json.loads((folder / "config.json").read_text())
    state = torch.load(folder / "params.pt", map_location="cpu", weights_only=True)
    if config.get("unembed_hash"):
        _check_raw(network, config["unembed_hash"] == _tuned_lens_hash(network.decoder.W_U.T))
    found = {}
    for layer in range(config["num_hidden_layers"]):
        weight = state[f"{layer}.weight"]
        linear = torch.nn.utils.skip_init(torch.nn.Linear, *weight.T.shape, bias=config["bias"], dtype=weight.dtype)
        linear.load_state_dict({key: state[f"{layer}.{key}"] for key in linear.state_dict()})
        found["resid_pre", layer] = _residual(linear)
    return found


def _product(matrix: Tensor) -> Translator:
    return lambda streams: streams @ matrix.T.to(streams)


def _residual(module: torch.nn.Module) -> Translator:
    """Stream + module(stream), in the module's dtype and on its device."""
    weight = next(module.parameters())
    return lambda streams: streams + module(streams.to(weight)).to(streams)


def _is_same(weight: Tensor, own: Tensor) -> bool:
    weight, own = weight.detach(), own.detach().to(weight.device)
    return weight.shape == own.shape and float((weight - own).norm()) <= SAME * float(own.norm())


def _tuned_lens_hash(weight: Tensor) -> str:
    """The package's hash of an unembedding [d_vocab, d_model]."""
    return hashlib.sha256(np.array_str(weight.detach().cpu().float().numpy(), precision=1).encode()).hexdigest()


def _check_raw(network: ResidualNetwork, is_same: bool) -> None:
    """Raise ValueError unless the model has the lens' unembedding, and its writes were not centered."""
    W_E = getattr(getattr(network.view, "model", None), "W_E", None)
    if W_E is not None and network.decoder.norm.kind == "LN":
        is_same = is_same and bool((W_E.mean(-1).abs() > CENTERED * W_E.norm(dim=-1)).any())
    if not is_same:
        raise ValueError(
            "A tuned lens reads the streams of the raw weights that it was trained on; this model's unembedding is another, or "
            "its weights were folded or centered. Boot the lens' model without processing its weights."
        )
