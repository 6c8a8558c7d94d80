"""Keep a model's arithmetic as precise as its inputs, and differentiable to any order.

Models lower precision on purpose: float64 models may take softmax in float32. Inside `full_precision()`

- no cast lowers the precision of a floating-point tensor: `x.float()` on float64, `softmax(dtype=torch.float32)` and
  `x.to(torch.bfloat16)` keep the dtype of x;
- no arithmetic runs below float32: half-precision operands are promoted;
- operands of mixed precision are cast to the highest one where PyTorch would refuse (`F.linear`, `matmul`);
- under forward differentiation and for series, `F.scaled_dot_product_attention` is computed as matrix products and a
  softmax (the fused kernels have no forward derivative, pytorch#98164); under nested forward differentiation,
  `F.layer_norm` is computed by its formula (its second-order forward derivative is wrong, pytorch#196700).

Float32 models give bit-equal results. Cost: 5 to 10 microseconds per PyTorch call, and promoted copies of half-precision
weights at each use.

Example:
    >>> x = torch.zeros(2, dtype=torch.float64)
    >>> with full_precision():
    ...     print(torch.softmax(x, -1, dtype=torch.float32).dtype)
    torch.float64
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from tl_jets.calculus.series import Series

_LOW = (torch.float16, torch.bfloat16)
_BITS = {torch.float16: 16, torch.bfloat16: 16, torch.float32: 32, torch.float64: 64}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Functions without arithmetic: their results are promoted where they enter arithmetic.
_NO_ARITHMETIC = _names(
    "__get__ __set__ __getitem__ __len__ __repr__ __format__ __deepcopy__ __reduce_ex__ __hash__ __setstate__ size dim "
    "stride numel nelement element_size data_ptr storage_offset untyped_storage is_contiguous is_floating_point "
    "is_complex is_nonzero requires_grad_ register_hook detach detach_ view view_as reshape permute transpose t "
    "unsqueeze squeeze expand expand_as flatten unflatten select narrow chunk split tensor_split unbind movedim "
    "swapaxes contiguous embedding"
)
# Functions in which PyTorch refuses operands of mixed precision, or silently lowers one.
_MEETS_AT_HIGHEST = _names(
    "matmul __matmul__ __rmatmul__ mm bmm mv dot addmm addbmm baddbmm addmv linear bilinear einsum layer_norm "
    "native_layer_norm rms_norm group_norm scaled_dot_product_attention lerp conv1d"
)
_TO_ANOTHER = _names("to type_as")
_CASTS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}


class _FullPrecision(TorchFunctionMode):
    """The mode behind `full_precision`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        if name in _NO_ARITHMETIC:
            return func(*args, **kwargs)
        half, dtype = _look(args)
        if kwargs:
            half_too, dtype_too = _look(kwargs.values())
            half, dtype = half or half_too, dtype or dtype_too
        if half:
            # An in-place operation must write to its target, not to a promoted copy.
            kept = 1 if is_in_place(name) else 0
            args = (*args[:kept], *(_cast(item, _promote) for item in args[kept:]))
            kwargs = {key: _cast(item, _promote) if key != "out" else item for key, item in kwargs.items()}
        if name in _CASTS and isinstance(args[0], Tensor):
            return args[0] if _bits(args[0]) >= max(_bits_of(_CASTS[name]), 32) else args[0].float()
        if dtype or name in _TO_ANOTHER:
            args, kwargs = _without_lowering(name, args, kwargs)
        if name in _MEETS_AT_HIGHEST:
            args, kwargs = _at_one_precision(args, kwargs)
            if name == "scaled_dot_product_attention" and _is_differentiated(args, kwargs):
                return _attention(*args, **kwargs)
            if name == "layer_norm" and _is_nested_forward(args[0] if args else kwargs["input"]):
                return _layer_norm(*args, **kwargs)
        return func(*args, **kwargs)


def full_precision() -> TorchFunctionMode:
    """A context in which no tensor loses precision to a cast and every operation has its derivatives.

    Use it around the forward pass as well as around the jets of its parts, so that masks and rotary tables have the same
    precision. Results are at least float32, float64 if the inputs are. It may be nested.

    Example:
        >>> weight = torch.ones(2, 2, dtype=torch.bfloat16)
        >>> with full_precision():
        ...     print(F.linear(torch.ones(2), weight).dtype)
        torch.float32
    """
    return _FullPrecision()


@cache
def name_of(func: Callable[..., Any]) -> str:
    """The name of a PyTorch function or method."""
    return getattr(func, "__name__", "")


def is_in_place(name: str) -> bool:
    """Whether a function of this name writes to its first argument."""
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or name.startswith("__i")


def _look(items: Iterable[Any]) -> tuple[bool, bool]:
    """Whether the arguments contain a half-precision tensor, and whether they contain a dtype."""
    half = dtype = False
    for item in items:
        if isinstance(item, Tensor):
            half = half or item.dtype in _LOW
        elif isinstance(item, torch.dtype):
            dtype = True
        elif isinstance(item, list | tuple):
            half = half or _look(item)[0]
    return half, dtype


def _cast(item: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`change` applied to the floating-point tensors of an argument, also inside lists."""
    if isinstance(item, Tensor):
        return change(item) if item.is_floating_point() else item
    return type(item)(_cast(one, change) for one in item) if type(item) in (list, tuple) else item


def _promote(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _LOW else x


def _bits_of(dtype: torch.dtype) -> int:
    return _BITS.get(dtype, 0)


def _bits(x: Any) -> int:
    return _bits_of(x.dtype) if isinstance(x, Tensor) else 0


def _without_lowering(name: str, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Raise dtype arguments to the precision of the tensor that they apply to, and to float32 at least."""
    source = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("input")
    floor = max(32, _bits(source))

    def keep(item: Any) -> Any:
        if not isinstance(item, torch.dtype) or not 0 < _bits_of(item) < floor:
            return item
        return torch.float32 if floor == 32 else torch.float64

    if any(isinstance(item, torch.dtype) for item in args):
        args = tuple(keep(item) for item in args)
    if isinstance(kwargs.get("dtype"), torch.dtype):
        kwargs = {**kwargs, "dtype": keep(kwargs["dtype"])}
    other = args[1] if name in _TO_ANOTHER and len(args) > 1 else None
    if isinstance(source, Tensor) and isinstance(other, Tensor) and 0 < _bits(other) < floor <= _bits(source):
        # Move to the other tensor's device, at this one's precision.
        args = (source, other.to(source.dtype), *args[2:])
    return args, kwargs


def _at_one_precision(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Cast all floating-point operands to the widest dtype among them."""
    found: set[torch.dtype] = set()

    def see(x: Tensor) -> Tensor:
        found.add(x.dtype)
        return x

    for item in (*args, *kwargs.values()):
        _cast(item, see)
    if len(found) < 2:
        return args, kwargs
    widest = max(found, key=_bits_of)

    def widen(x: Tensor) -> Tensor:
        return x.to(widest)

    return tuple(_cast(item, widen) for item in args), {key: _cast(item, widen) for key, item in kwargs.items()}


def _is_nested_forward(x: Tensor) -> bool:
    """Whether x is inside a transform of torch.func."""
    return not isinstance(x, Series) and is_functorch_wrapped_tensor(x)


def _is_differentiated(args: Any, kwargs: dict[str, Any]) -> bool:
    tensors = [item for item in (*args, *kwargs.values()) if isinstance(item, Tensor)]
    return forward_ad._current_level >= 0 or any(isinstance(x, Series) or _is_nested_forward(x) for x in tensors)


def _layer_norm(
    input: Tensor,
    normalized_shape: Iterable[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias."""
    dims = list(range(-len(list(normalized_shape)), 0))
    deviation = input - input.mean(dims, keepdim=True)
    out = deviation * torch.rsqrt(deviation.pow(2).mean(dims, keepdim=True) + eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(query key' scale + mask) value."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return F.dropout(scores.softmax(-1), dropout_p) @ value


def refuse_autocast(device: torch.device) -> None:
    """Raise ValueError if `torch.autocast` is active on `device`: it would change the precision of jets."""
    if torch.is_autocast_enabled(device.type):
        raise ValueError(
            f"A model is read in its own precision (half precision in float32); torch.autocast is active on {device.type} and "
            f"would round within it. Leave the block, or enter torch.autocast({device.type!r}, enabled=False) around the call."
        )
