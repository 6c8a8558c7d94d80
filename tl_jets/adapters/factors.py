"""The weights, slopes and patterns of a frozen sublayer as `tl_jets.core.factors` takes them.

Weights and centering of the norms before and after go to the matrices, the norms' scales to slopes and patterns. Slopes are
derivatives of `hook_post` by `hook_pre` (`hook_pre_linear` of a gated MLP) under `frozen`; patterns pass `hook_pattern`. Whoever
uses them compares them with the sublayer itself: hooks inside it, or an unusual architecture, are not seen here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tl_jets.adapters.blocks import Blocks, Sublayer
from tl_jets.adapters.parts import output_weights
from tl_jets.calculus import Norm, frozen
from tl_jets.core.factors import Factors


def factors(view: Blocks, calls: Any, layer: int, which: Sublayer, stream: Tensor) -> Factors | None:
    """The factors of a sublayer at a stream [1, pos, d_model]; None where a part is missing or has another shape."""
    pre, post = view.pre_norm(layer, which), view.post_norm(layer, which)
    found = (_of_attention if which == "attn" else _of_mlp)(view, calls, layer, stream)
    if found is None:
        return None
    first, middle, last, out = found
    if pre is not None:
        first, middle = pre.center(pre.scale(first.mT)).mT, middle * _scale(pre, stream, which, "read")
    if post is not None:
        last, middle = post.scale(post.center(last)), middle * _scale(post, out, which, "written")
    return Factors(first, middle, last * view.residual_scale(layer))


def _scale(norm: Norm, at: Tensor, which: Sublayer, side: str) -> Tensor | float:
    """A norm's scale at one prompt's values, by the positions of a middle factor that are read or written."""
    if norm.kind == "none":
        return 1.0
    scale = torch.rsqrt(norm.center(at)[0].pow(2).mean(-1) + norm.eps)
    if which == "mlp":
        return scale[:, None]
    return scale[:, None] if side == "read" else scale[:, None, None, None]


def _of_attention(view: Blocks, calls: Any, layer: int, stream: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """First, middle and last factor without norms, and what attention gives to a norm after it."""
    attn, grabbed = view.blocks[layer].attn, {}
    W_V, W_O = getattr(attn, "_W_V", None), getattr(attn, "W_O", None)
    W_V = W_V if isinstance(W_V, Tensor) else getattr(attn, "W_V", None)
    with torch.no_grad(), view.hooks([_grab(grabbed, f"blocks.{layer}.attn.hook_pattern")]):
        out = view.call_attn(calls, layer, stream)
    pattern = next(iter(grabbed.values()), None)
    weights = [weight for weight in (W_V, W_O) if isinstance(weight, Tensor) and weight.ndim == 3]
    if len(weights) < 2 or pattern is None or pattern.shape != (1, len(weights[1]), *2 * stream.shape[1:2]):
        return None
    W_V, W_O = (weight.detach().to(view.dtype) for weight in weights)
    if len(W_O) % len(W_V):
        return None
    middle = pattern[0].to(view.dtype).unflatten(0, (len(W_V), -1)).transpose(1, 2)[..., None]
    return W_V.transpose(0, 1).flatten(1), middle, W_O.flatten(0, 1), out


def _of_mlp(view: Blocks, calls: Any, layer: int, stream: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """First, middle and last factor without norms, and what the MLP gives to a norm after it."""
    W_in, grabbed = getattr(view.blocks[layer].mlp, "W_in", None), {}
    W_out, b_out = output_weights(view, layer)
    names = [f"blocks.{layer}.mlp.hook_{name}" for name in ("pre", "pre_linear", "post")]
    with torch.enable_grad(), frozen(), view.hooks([_grab(grabbed, name) for name in names if name in view.hook_dict]):
        view.call_mlp(calls, layer, stream.detach().clone().requires_grad_())
    post = grabbed.get(names[2])
    if W_in is None or post is None or not post.requires_grad or W_in.shape != W_out.mT.shape:
        return None
    before = [grabbed[name] for name in names[:2] if name in grabbed and grabbed[name].requires_grad]
    slopes = torch.autograd.grad(post, before, torch.ones_like(post), allow_unused=True)
    slopes = [slope for slope in slopes if slope is not None]
    shape = (stream.shape[1], len(W_out))  # some flatten the batch
    if len(slopes) != 1 or any(x.numel() != shape[0] * shape[1] for x in (post, *slopes)):
        return None
    post, slopes = (x.detach().to(view.dtype).reshape(shape) for x in (post, slopes[0]))
    return W_in.detach().to(view.dtype), slopes, W_out, (post @ W_out + b_out)[None]


def _grab(grabbed: dict[str, Tensor], name: str) -> tuple[str, Any]:
    def grab(tensor: Tensor, hook: Any) -> None:
        grabbed[name] = tensor

    return name, grab
