r"""Freeze norm scales, attention patterns and gates inside a running computation, without changing its values.

Inside `frozen()` every nonlinearity of a transformer is a linear map of its input, with coefficients fixed at the
current point, so that its value and its derivative J agree: f(x) = J x + bias.

===========================  =============================  ==============================================
operation                    written as                     frozen part
===========================  =============================  ==============================================
norm                         x * s(x)                       the scale s
attention                    softmax(q k') v                the pattern softmax(q k')
activation act(x)            x * (act(x) / x)               the slope act(x) / x; act'(0) at x = 0
gated activation act(g) * u  act(g) * u                     act(g)
===========================  =============================  ==============================================

Each PyTorch call is intercepted:

- softmax, rsqrt, sqrt, norm, exp, sigmoid, reciprocals and all denominators are detached;
- fused norms and activations keep their value y and get the derivative of the frozen map, y + (lin - lin.detach());
- the output of an activation is a gate, and is detached, where it multiplies a differentiated tensor of its shape. So
  is a factor (tanh, erf, sigmoid) of its own argument: `0.5 * x * (1 + tanh(...))` is the frozen slope times x;
- comparisons (`x > threshold`) and the choice of the largest entries (`topk`) are those of the running point.

`frozen(record=tape)` stores the coefficients; `frozen(replay=tape)` applies them at another point. The replayed
computation *is* the frozen map, and its value at zero is the bias. Callers must check that a model came out affine
(`tl_jets.detached_map` does).

Source: Golden, *Equivalent Linear Mappings of Large Language Models* (arXiv 2505.24293), section 3.

Example:
    >>> x = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
    >>> with frozen():
    ...     y = torch.nn.functional.gelu(x)
    >>> torch.equal(y, torch.nn.functional.gelu(x))
    True
    >>> slope = torch.autograd.grad(y.sum(), x)[0]
    >>> bool(torch.allclose(slope * x, y))
    True
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from tl_jets.calculus.modes import is_in_place, name_of
from tl_jets.calculus.series import Series

# The role of a tensor: a multiplicative factor, or the output of an activation.
_Role = Literal["factor", "activation"]
_Tape = list[tuple[str, Any]]
_Rule = Callable[["_Frozen", Callable[..., Any], Any, dict[str, Any]], Any]


class _Frozen(TorchFunctionMode):
    """The mode behind `frozen`."""

    def __init__(self, record: _Tape | None, replay: _Tape | None):
        super().__init__()
        self.record = record
        self.replay = None if replay is None else iter(replay)
        self.roles: Any = WeakIdKeyDictionary()

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(name_of(func))
        if rule is None:
            return func(*args, **kwargs)
        if not args:
            args, kwargs = _positional(kwargs)
        tensors = [item for item in args if isinstance(item, Tensor)]
        if any(isinstance(item, Series) for item in tensors) or not any(item.is_floating_point() for item in tensors):
            return func(*args, **kwargs)
        return rule(self, func, args, kwargs)

    def kept(self, name: str, value: Callable[[], Any], like: Tensor | None = None) -> Any:
        """A frozen coefficient, computed now or read from the recorded computation."""
        if self.replay is None:
            found = value()
            if self.record is not None:
                self.record.append((name, _copied(found)))
            return found
        recorded, found = next(self.replay, ("the end", None))
        if recorded != name or (like is not None and cast(Tensor, found).shape != like.shape):
            raise RuntimeError(
                f"A replay must make the recorded calls in their order, on tensors of the recorded shapes; it came to "
                f"{name!r} where {recorded!r} was recorded. Replay the same function on an input of the same shape."
            )
        return _copied(found)

    def role(self, x: Any) -> _Role | None:
        return self.roles.get(x) if isinstance(x, Tensor) else None

    def mark(self, x: Any, role: _Role | None) -> Any:
        if role is not None and isinstance(x, Tensor):
            self.roles[x] = role
        return x


def _copied(value: Any) -> Any:
    """A copy of a coefficient, which a hook may change in place."""
    return value.clone() if isinstance(value, Tensor) else value


def frozen(*, record: _Tape | None = None, replay: _Tape | None = None) -> TorchFunctionMode:
    """A context in which norm scales, attention patterns and gates are constants for every derivative.

    Values are bit-equal to those outside. Supports reverse and forward differentiation and `torch.func`, composes with
    `full_precision` in either order, and ignores Taylor series.

    Args:
        record: A list to which the frozen coefficients are appended, in call order. Record under autograd: gates are
            detected only where tensors are differentiated.
        replay: A recorded list. The same calls on other tensors of the same shapes use its coefficients.

    Raises:
        ValueError: Both are given.
        RuntimeError: The replayed calls differ from the recorded ones.

    Example:
        >>> tape, x = [], torch.tensor([3.0, 4.0], requires_grad=True)
        >>> norm = torch.nn.RMSNorm(2)
        >>> with frozen(record=tape):
        ...     y = norm(x)
        >>> with frozen(replay=tape):
        ...     twice = norm(2 * x)
        >>> bool(torch.allclose(twice, 2 * y))
        True
    """
    if record is not None and replay is not None:
        raise ValueError("A computation is recorded or replayed; got both. Use two contexts.")
    return _Frozen(record, replay)


def _positional(kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Rewrite `softmax(input=x, dim=-1)` as `softmax(x, dim=-1)`."""
    for name in ("input", "self", "query"):
        if name in kwargs:
            return (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}
    return (), kwargs


def _is_live(x: Tensor) -> bool:
    """Whether x is being differentiated by any transform; a model's parameters do not count."""
    if isinstance(x, torch.nn.Parameter):
        return False
    if x.requires_grad:
        return True
    if forward_ad._current_level >= 0 and x.is_floating_point() and forward_ad.unpack_dual(x).tangent is not None:
        return True
    return is_functorch_wrapped_tensor(x) and _is_live(get_unwrapped(x))


def _straight_through(value: Tensor, linear: Tensor) -> Tensor:
    """`value`, with the derivative of `linear`."""
    return value.detach() + (linear - linear.detach())


def _in_place(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> bool:
    return is_in_place(name_of(func)) or kwargs.get("inplace") is True or any(item is True for item in args[1:])


def _value(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Tensor:
    """The result of a call as a constant; an in-place call writes to a copy."""
    x = args[0].detach()
    x = x.clone() if _in_place(func, args, kwargs) else x
    return func(x, *args[1:], **kwargs).detach()


def _given_back(func: Callable[..., Any], args: Any, kwargs: dict[str, Any], result: Tensor) -> Tensor:
    """The result, copied into the first argument if the call is in place."""
    return args[0].copy_(result) if _in_place(func, args, kwargs) else result


# Rules --------------------------------------------------------------------------------------------------------------


def _detach(mode: _Frozen, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Make a scale, pattern or factor constant."""
    result = mode.kept(name_of(func), lambda: _value(func, args, kwargs))
    return mode.mark(_given_back(func, args, kwargs, result), "factor")


def _activation(
    mode: _Frozen, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], role: _Role = "activation"
) -> Any:
    """Replace a function with f(0) = 0 by x times the constant f(x) / x."""
    x = args[0]
    value = None if mode.replay is not None else _value(func, args, kwargs)

    def slope() -> Tensor:
        assert value is not None
        here = x.detach()
        # Slightly below zero, where the slope of ReLU is PyTorch's derivative at zero.
        beside = torch.full((1,), -16 * torch.finfo(here.dtype).tiny, dtype=here.dtype, device=here.device)
        at_zero = func(beside.clone(), *args[1:], **kwargs) / beside
        return torch.where(here.abs() < beside.abs(), at_zero, value / here)

    linear = x * mode.kept(name_of(func), slope, like=x)
    result = linear if value is None else _straight_through(value, linear)
    return mode.mark(_given_back(func, args, kwargs, result), role)


def _clamp(mode: _Frozen, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Treat a clamp to numbers around zero as an activation; leave other clamps unchanged."""
    bounds = [*args[1:], *kwargs.values()]
    low = kwargs.get("min", args[1] if len(args) > 1 else None)
    high = kwargs.get("max", args[2] if len(args) > 2 else None)
    if any(isinstance(bound, Tensor) for bound in bounds) or not (low or 0) <= 0 <= (high or 0):
        return func(*args, **kwargs)
    return _activation(mode, func, args, kwargs)


def _fused_norm(mode: _Frozen, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Tensor:
    """Make the scale of `layer_norm` or `rms_norm` constant."""
    centers = name_of(func) == "layer_norm"
    names = ("input", "normalized_shape", "weight", *(("bias",) if centers else ()), "eps")
    given = dict(zip(names, args, strict=False)) | kwargs
    x, weight, bias = given["input"], given.get("weight"), given.get("bias")
    eps = given.get("eps", 1e-5 if centers else None)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    dims = list(range(-len(list(given["normalized_shape"])), 0))
    x = x - x.mean(dims, keepdim=True) if centers else x
    linear = x * mode.kept(name_of(func), lambda: torch.rsqrt(x.detach().pow(2).mean(dims, keepdim=True) + eps))
    linear = linear if weight is None else linear * weight
    linear = linear if bias is None else linear + bias
    return linear if mode.replay is not None else _straight_through(func(*args, **kwargs), linear)


def _attention(mode: _Frozen, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    def attend(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
        return func(*mode.kept(name_of(func), lambda: (query.detach(), key.detach())), *rest, **options)

    return attend(*args, **kwargs)


def _divide(mode: _Frozen, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Make a denominator constant."""
    denominator = args[1] if len(args) > 1 else kwargs["other"]
    if not isinstance(denominator, Tensor):
        return mode.mark(func(*args, **kwargs), mode.role(args[0]))
    gate = mode.role(denominator) is not None and denominator.shape == args[0].shape
    constant = mode.kept(name_of(func), denominator.detach, like=denominator)
    result = func(args[0], constant, *args[2:], **{key: value for key, value in kwargs.items() if key != "other"})
    return mode.mark(result, mode.role(args[0]) or ("activation" if gate else None))


def _multiply(mode: _Frozen, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Make a gate or factor constant where it multiplies a differentiated tensor of its shape."""
    if len(args) < 2:
        args, kwargs = (args[0], kwargs["other"]), {key: value for key, value in kwargs.items() if key != "other"}
    left, right = args[:2]
    roles = mode.role(left), mode.role(right)
    if not any(roles) or not isinstance(left, Tensor) or not isinstance(right, Tensor) or left.shape != right.shape:
        result = func(*args, **kwargs)
        for role, item in zip(roles, (left, right), strict=True):
            if role is not None and item.shape == result.shape:
                return mode.mark(result, role)
        return result
    # Prefer a factor to an activation; of two alike freeze the right one, so a square keeps half of its derivative.
    index = 0 if roles[1] is None or (roles[0] == "factor" and roles[1] == "activation") else 1
    tagged, partner = args[index], args[1 - index]
    constant = mode.kept(name_of(func), lambda: tagged.detach() if _is_live(partner) else None)
    if constant is None:
        return mode.mark(func(*args, **kwargs), mode.role(tagged))
    if _in_place(func, args, kwargs):
        result = left.copy_(constant * partner)
    else:
        result = func(*((constant, partner) if index == 0 else (partner, constant)), *args[2:], **kwargs)
    role: _Role | None = "activation" if roles[index] == "factor" or left is right else None
    if _in_place(func, args, kwargs):
        mode.roles.pop(result, None)
    return mode.mark(result, role)


def _power(mode: _Frozen, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Treat roots as scales, and the square of an activation as an activation."""
    exponent = args[1] if len(args) > 1 else kwargs.get("exponent", 2)
    if isinstance(exponent, Tensor):
        exponent = exponent.item() if exponent.ndim == 0 else None
    if exponent in (0.5, -0.5, -1):
        return _detach(mode, func, args, kwargs)
    if exponent == 2 and mode.role(args[0]) == "activation" and not _in_place(func, args, kwargs):
        linear = args[0] * mode.kept(name_of(func), args[0].detach)
        result = linear if mode.replay is not None else _straight_through(func(*args, **kwargs), linear)
        return mode.mark(result, "activation")
    return func(*args, **kwargs)


def _carry(mode: _Frozen, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Pass the role of a tensor on to its sum with a number, its copy, view or cast."""
    result = func(*args, **kwargs)
    if isinstance(result, Tensor):
        parts = [item for item in (*args, *kwargs.values()) if isinstance(item, Tensor) and item.is_floating_point()]
        same = [item for item in parts if item.numel() == result.numel()]
        if len(same) == 1:
            mode.mark(result, mode.role(same[0]))
        elif _in_place(func, args, kwargs):
            mode.roles.pop(result, None)
    return result


def _mask(mode: _Frozen, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Make a comparison constant."""
    return mode.kept(name_of(func), lambda: func(*args, **kwargs))


def _largest(mode: _Frozen, func: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Make the choice of the largest entries constant."""
    indices = mode.kept(name_of(func), lambda: func(x.detach(), *args, **kwargs).indices)
    dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
    return torch.return_types.topk((x.gather(dim, indices), indices))


def _table(**rules: tuple[_Rule, str]) -> dict[str, _Rule]:
    return {name: rule for rule, names in rules.values() for name in names.split()}


_RULES: dict[str, _Rule] = _table(
    constants=(
        _detach,
        "softmax _softmax special_softmax rsqrt rsqrt_ sqrt sqrt_ norm linalg_norm linalg_vector_norm vector_norm std "
        "exp exp_ special_exp2 exp2 sigmoid sigmoid_ special_expit softplus hardsigmoid logsigmoid reciprocal "
        "reciprocal_ __rdiv__ __rtruediv__",
    ),
    # Factors of GELU until they are multiplied; otherwise activations or softcaps.
    factors=(partial(_activation, role="factor"), "tanh tanh_ erf erf_ special_erf"),
    activations=(
        _activation,
        "gelu gelu_ silu silu_ mish mish_ relu relu_ relu6 relu6_ leaky_relu leaky_relu_ elu elu_ selu selu_ celu celu_ "
        "hardswish hardswish_ hardtanh hardtanh_ softsign tanhshrink",
    ),
    clamps=(_clamp, "clamp clamp_ clip clip_"),
    norms=(_fused_norm, "layer_norm rms_norm"),
    attention=(_attention, "scaled_dot_product_attention"),
    quotients=(_divide, "div div_ divide divide_ true_divide true_divide_ __truediv__ __itruediv__"),
    products=(_multiply, "mul mul_ multiply multiply_ __mul__ __rmul__ __imul__"),
    masks=(_mask, "gt lt ge le greater less greater_equal less_equal __gt__ __lt__ __ge__ __le__"),
    choices=(lambda mode, func, args, kwargs: _largest(mode, func, *args, **kwargs), "topk"),
    powers=(_power, "pow pow_ __pow__ __ipow__ square float_power"),
    copies=(
        _carry,
        "add add_ __add__ __radd__ __iadd__ sub subtract sub_ __sub__ __rsub__ __isub__ rsub neg __neg__ clone contiguous "
        "to type type_as float double half bfloat16 view reshape flatten unflatten squeeze unsqueeze transpose permute "
        "dropout nan_to_num masked_fill where",
    ),
)
