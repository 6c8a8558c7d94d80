"""Fingerprints of models: they identify the weights that a table was computed from.

The fingerprint is a sha256 over all parameters, buffers (rotary frequencies) and the decoder's tensors: name, shape,
dtype, the integer sum of the bit patterns, and `SAMPLES` evenly spaced entries of each; over the configuration's numbers
and switches (epsilons, rotary base, caps); and over which hook points carry hooks. A change of one bit of one weight
changes the sum, which does not depend on the device. It does not cover what a hook does, nor plain functions of a
`CallableModel`. Cost: one pass over the weights (GPT-2 small: about 0.1 s).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tl_jets.adapters.callables import CallableModel
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.protocol import State

SAMPLES = 1024
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Configuration entries that do not change what the model computes.
_NOT_THE_FUNCTION = {
    *("device", "n_devices", "seed", "model_name", "tokenizer_name", "tokenizer_prepends_bos", "default_prepend_bos"),
    *("init_mode", "init_weights", "initializer_range", "load_in_4bit", "from_checkpoint", "checkpoint_index"),
    *("checkpoint_label_type", "checkpoint_value", "n_params", "trust_remote_code", "use_hook_tokens"),
}

# By model: the state and configuration of which a fingerprint was computed.
_KNOWN: WeakKeyDictionary[Any, tuple[State, str, str]] = WeakKeyDictionary()


def known_fingerprint(network: ResidualNetwork, state: State | None) -> str:
    """The fingerprint at a state of the view's weights and hooks, computed once for it; None computes it anew.

    A state misses a change through `.data` of entries that are not compared (`tl_jets.core.changes`): tables that are saved
    or loaded need the fingerprint itself.
    """
    if state is None:
        return fingerprint(network)
    view: Any = network.view
    configuration = json.dumps(_configuration(view), sort_keys=True)
    known = _KNOWN.get(view.model)
    if known is None or known[:2] != (state, configuration):
        known = _KNOWN[view.model] = state, configuration, fingerprint(network)
    return known[2]


@torch.no_grad()
def fingerprint(model: Any) -> str:
    """The fingerprint of a model's weights and configuration, as 64 hexadecimal digits.

    Args:
        model: A model or a `ResidualNetwork`.

    Example:
        >>> import tl_jets as tj
        >>> model = tj.load_tinydocs()
        >>> fingerprint(model) == fingerprint(tj.ResidualNetwork(model)), len(fingerprint(model))
        (True, 64)
    """
    network = ResidualNetwork(model)
    total = hashlib.sha256(json.dumps(_configuration(network.view), sort_keys=True).encode())
    for name, tensor in _tensors(network):
        bits = tensor.detach()
        bits = torch.view_as_real(bits) if bits.is_complex() else bits
        bits = bits.view(_INTEGERS[bits.element_size()])
        bits = bits.T if not bits.is_contiguous() and bits.T.is_contiguous() else bits
        flat = bits.reshape(-1)
        samples = flat[:: max(1, -(-len(flat) // SAMPLES))].cpu()
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {int(bits.sum(dtype=torch.int64))}".encode())
        total.update(samples.contiguous().numpy().tobytes())
    return total.hexdigest()


def _tensors(network: ResidualNetwork) -> Iterator[tuple[str, Tensor]]:
    view: Any = network.view
    decoder, norm = network.decoder, network.decoder.norm
    own = {"W_U": decoder.W_U, "b_U": decoder.b_U, "norm.weight": norm.weight, "norm.bias": norm.bias}
    if decoder.logit_scale != 1:
        own["logit_scale"] = torch.tensor(decoder.logit_scale, dtype=torch.float64, device="cpu")
    if decoder.transform is not None:
        probe = torch.linspace(-100, 100, decoder.d_vocab, dtype=torch.float64, device=decoder.W_U.device)
        own["transform"] = decoder.transform(probe)
    yield from ((name, tensor) for name, tensor in own.items() if tensor is not None)
    if not isinstance(view, CallableModel):
        yield from sorted([*view.model.named_parameters(), *view.model.named_buffers()], key=lambda item: item[0])
        return
    for label, embed in view.embeds.items():
        if isinstance(embed, torch.nn.Module):
            yield from ((f"{label}.{name}", tensor) for name, tensor in embed.named_parameters())


def _configuration(view: Any) -> dict[str, Any]:
    if isinstance(view, CallableModel):
        return {"name": view.name, "stages": [list(stage) for stage in view.gammas]}
    options = {
        name: value
        for name, value in sorted(vars(view.cfg).items())
        if name not in _NOT_THE_FUNCTION and isinstance(value, (bool, int, float, str))
    }
    hooked = sorted(name for name, point in dict(view.model.hook_dict).items() if point.fwd_hooks)
    return {"model": type(view.model).__name__, "options": options, "hooks": hooked}
