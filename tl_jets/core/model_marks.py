"""`model_mark`: a short name of a model and its weights, by which results of two models are told apart.

It has the name of the model and a digest of a few values of every parameter. It is cheap (milliseconds, once per state of the
weights), does not cover hooks, and misses a change of single weights: `tl_jets.ngrams.fingerprint` covers all.
"""

from __future__ import annotations

import hashlib
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tl_jets.core.protocol import State
from tl_jets.core.structure import Structure

# Evenly spaced values of each parameter.
SAMPLES = 16

_MARKS: WeakKeyDictionary[Any, tuple[list[int], str]] = WeakKeyDictionary()


@torch.no_grad()
def model_mark(network: Structure, state: State | None = None) -> str:
    """Name and digest of a network's model, `TransformerBridge(gpt2) 3f2a90c1d4e5`, at a state of its weights (None: now).

    Example:
        >>> import tl_jets as tj
        >>> network = tj.ResidualNetwork(tj.load_tinydocs())
        >>> model_mark(network) == model_mark(network.at("block")), len(model_mark(network).split()[-1])
        (True, 12)
    """
    view = network.view
    weights = [number for _, number in (view.hook_state() if state is None else state)]
    kept = _MARKS.get(view)
    if kept is None or kept[0] != weights:
        kept = _MARKS[view] = weights, f"{view.name} {_digest(network)}"
    return kept[1]


def _digest(network: Structure) -> str:
    decoder, model = network.decoder, getattr(network.view, "model", None)
    tensors = [decoder.W_U, decoder.b_U, decoder.norm.weight, decoder.norm.bias]
    tensors += [] if model is None else list(model.parameters())
    total = hashlib.sha256()
    for tensor in (tensor for tensor in tensors if tensor is not None and tensor.numel()):
        total.update(f"{list(tensor.shape)} {tensor.dtype}".encode())
        total.update(_samples(tensor).tobytes())
    return total.hexdigest()[:12]


def _samples(tensor: Tensor) -> Any:
    """Some values in float64, read without a copy of the tensor."""
    size = tensor.numel()
    index = torch.arange(0, size, max(1, size // SAMPLES), device=tensor.device)
    return tensor.detach()[torch.unravel_index(index, tensor.shape)].double().cpu().numpy()
