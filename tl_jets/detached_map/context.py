"""A context in which norm scales, attention patterns and gates are constants for derivatives, checked to be affine.

Example:
    >>> import torch
    >>> from tl_jets import CallableModel, Decoder, Norm
    >>> decoder = Decoder(Norm("none"), torch.eye(3), torch.zeros(3))
    >>> model = CallableModel(torch.nn.Embedding(5, 3), [{"0_mlp": torch.nn.functional.silu}], decoder)
    >>> x = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
    >>> with detached(model):
    ...     y = torch.nn.functional.silu(x)
    >>> (slope,) = torch.autograd.grad(y.sum(), x)
    >>> bool(torch.allclose(slope * x, y))
    True
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tl_jets.adapters.callables import CallableModel
from tl_jets.calculus import frozen, full_precision
from tl_jets.calculus.modes import refuse_autocast
from tl_jets.core.frozen_network import freeze, not_affine, rounding
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.structure import unknown_model


@contextmanager
def detached(model: Any) -> Iterator[None]:
    """Freeze norm scales, attention patterns and gates of the model's forward pass, for derivatives taken of it.

    Outputs stay bit-equal. Gradients, `torch.func` transforms and hooks see an affine function of the residual stream;
    a softcap is frozen as a factor, too. The user's hooks stay active. Every PyTorch computation in the block is
    frozen; derivatives may be taken after it. On entry a forward pass on four tokens, without the user's hooks, checks
    that the model is affine: the derivative times the first stream, plus the frozen map at zero, must be the output.

    Args:
        model: A TransformerLens model, or a `ResidualNetwork`; plain callables are frozen without the check.

    Raises:
        NotImplementedError: The model is not affine when frozen, or not supported.
        TypeError: The model is of an unknown kind.
        ValueError: The model is in training mode.

    Source: Golden, arXiv 2505.24293 (v3), sections 2.2 and 2.3.
    """
    inner = model.view if isinstance(model, ResidualNetwork) else model
    if not isinstance(inner, CallableModel):
        _check_affine(getattr(inner, "model", inner) if isinstance(model, ResidualNetwork) else inner)
    with frozen():
        yield


def _check_affine(model: Any) -> None:
    """Check v'output = (J'v)'x + v'bias for a random v, with x the first stream."""
    from tl_jets.adapters.blocks import kept_of
    from tl_jets.adapters.reading import refuse_unsupported, unreplayable

    if not hasattr(model, "hook_dict") or not hasattr(model, "cfg"):
        raise TypeError(unknown_model(model))
    refuse_unsupported(model)
    for layer in range(len(model.blocks)):
        reason = unreplayable(model, layer)
        if reason is not None:
            raise NotImplementedError(
                f"Every block must be one that can be frozen; block {layer} of {type(model).__name__} is not: {reason}. Direct "
                f"attribution freezes the final norm only: jet_expand(model, 'ln_final', ..., linearize='detached')."
            )
    refuse_autocast(next(model.parameters()).device)
    generator = torch.Generator().manual_seed(0)
    length = min(4, getattr(model.cfg, "n_ctx", None) or 4)
    tokens = torch.randint(model.cfg.d_vocab, (1, length), generator=generator, device="cpu").to(
        next(model.parameters()).device
    )
    first: list[Tensor] = []

    def output(change: Callable[[Tensor], Tensor]) -> Tensor:
        with model.hooks([("blocks.0.hook_resid_pre", lambda stream, hook: change(stream))]):
            return model(tokens, return_type="logits")

    with kept_of(model).lock, torch.inference_mode(False), _without_hooks(model), full_precision():
        with torch.no_grad():
            output(lambda stream: first.append(stream.clone()) or stream)
        linear, at = freeze(lambda x: output(lambda stream: x), first[0])
        probe = torch.randn(linear.value.shape, generator=generator, dtype=torch.float64, device="cpu").to(linear.value)
        gradient = linear.apply_transpose(probe)
        # Last, so that tensors kept by the model's components hold no graph.
        bias = at(torch.zeros_like(first[0]))
    parts = [gradient * first[0], probe * bias, -probe * linear.value.detach()]
    size = sum(float(part.double().square().sum()) for part in parts) ** 0.5
    error = abs(sum(float(part.double().sum()) for part in parts)) / size
    if not error <= rounding(linear.value.dtype):
        raise NotImplementedError(not_affine(type(model).__name__, model, error))


@contextmanager
def _without_hooks(model: Any) -> Iterator[None]:
    """The model without the user's hooks, which may expect their own input or count their calls."""
    points = list({id(point): point for point in model.hook_dict.values()}.values())
    kept = [(point, name, getattr(point, name)) for point in points for name in ("_forward_hooks", "_backward_hooks")]
    try:
        for point, name, hooks in kept:
            setattr(point, name, type(hooks)())
        yield
    finally:
        for point, name, hooks in kept:
            setattr(point, name, hooks)
