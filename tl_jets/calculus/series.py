"""A tensor subclass that carries a truncated Taylor series along a line through PyTorch code.

For a function f, a point x and a direction v, f(x + t v) = c_0 + c_1 t + ... + c_k t^k + O(t^{k+1}) with
c_j = D^j f(x)[v, ..., v] / j! (Griewank & Walther 2008, *Evaluating Derivatives*, ch. 13). A `Series` has the shape,
dtype and device of f(x) and holds all c_j. Each aten operation is replaced by its rule in
`RULES`, which the `rules_*` modules fill on import, or decomposed by PyTorch into operations that have one.

| symbol | variable |
|---|---|
| k | `order` |
| c_0 .. c_k | `coefficients`, stacked along a new first axis |
| x, v | `center`, `direction` |

Cost: k + 1 times a linear operation, as one stacked operation; (k + 1)(k + 2) / 2 times a product of two series.

Example:
    >>> x = Series.line(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]), order=2)
    >>> (x * x).coefficients
    tensor([[1., 4.],
            [2., 0.],
            [1., 0.]])
"""

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch._decomp import decomposition_table
from torch._ops import OpOverload

from tl_jets.calculus.norms import check_order

Rule = Callable[..., Any]
AnyRule = TypeVar("AnyRule", bound=Rule)

# A rule takes the arguments of its aten overload, at least one of them a `Series`, and returns what the overload returns.
RULES: dict[OpOverload, Rule] = {}

_RECURRENT = {kind + cell for kind in ("rnn_tanh", "rnn_relu", "gru", "lstm") for cell in ("", "_cell")}
# PyTorch's decomposition of this is wrong if a row of targets ends before its last column (torch 2.13).
_ANOTHER_FUNCTION = {torch.ops.aten.multilabel_margin_loss_forward.default}
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


def rule(*overloads: OpOverload) -> Callable[[AnyRule], AnyRule]:
    """Decorator that registers a function in `RULES` for aten overloads such as `torch.ops.aten.add.Tensor`, unchanged.

    Raises:
        ValueError: An overload already has a rule.
    """

    def enter(function: AnyRule) -> AnyRule:
        for overload in overloads:
            # A reloaded module, as in a notebook, may register its rules again.
            known = RULES.get(overload)
            name = getattr(known, "__qualname__", "one of a table")
            if known is not None and name != function.__qualname__:
                raise ValueError(
                    f"an aten overload has one rule; {overload} has {name} already. Remove one of the two."
                )
            RULES[overload] = function
        return function

    return enter


class Series(Tensor):
    """A truncated Taylor series c_0 + c_1 t + ... + c_k t^k that behaves like the tensor c_0.

    Views share storage with their series, `clone` copies, and in-place operations write all coefficients, so hooks such as
    `x[:, :, 2] = 0` work. Comparisons and predicates act on c_0 and return plain tensors. An operation without a rule or
    decomposition raises NotImplementedError with its name; writing a series into a plain tensor raises TypeError.

    Attributes:
        coefficients: Taylor coefficients (with the 1/j!), `[order+1, *shape]`, floating point.

    Raises:
        TypeError: `coefficients` is not a plain floating-point tensor.
        ValueError: `coefficients` has no leading axis of length order + 1 >= 1.
    """

    coefficients: Float[Tensor, " terms *shape"]

    @staticmethod
    def __new__(cls, coefficients: Float[Tensor, " terms *shape"]) -> "Series":
        """Wrap coefficients, without a copy."""
        if isinstance(coefficients, Series) or not isinstance(coefficients, Tensor):
            raise TypeError(
                f"the coefficients of a Series are one plain tensor; got {type(coefficients).__name__}. "
                "Stack tensors along a new first axis; a series of series is not supported."
            )
        if not coefficients.is_floating_point():
            raise TypeError(
                f"a Series is of floating point; got {coefficients.dtype}. Cast to float32 or float64 first."
            )
        if coefficients.ndim == 0 or coefficients.shape[0] == 0:
            raise ValueError(
                f"coefficients have shape [order+1, *shape] with order >= 0; got {list(coefficients.shape)}. "
                "Stack c_0 .. c_order along a new first axis."
            )
        series = torch.Tensor._make_wrapper_subclass(
            cls,
            coefficients.shape[1:],
            strides=coefficients.stride()[1:],
            dtype=coefficients.dtype,
            device=coefficients.device,
        )
        series.coefficients = coefficients
        return series

    @classmethod
    def line(cls, center: Float[Tensor, "*shape"], direction: Float[Tensor, "*shape"], order: int) -> "Series":
        """The series of t -> center + t direction, in new storage: c_0 = center, c_1 = direction, zeros above.

        Args:
            center: the point x, `[*shape]`.
            direction: the direction v, `[*shape]`; dropped at order 0.
            order: highest power k.

        Raises:
            ValueError: `order` is negative or too large, or the shapes differ.

        Example:
            >>> Series.line(torch.zeros(2), torch.ones(2), order=3).coefficients.tolist()
            [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
        """
        check_order(order)
        if direction.shape != center.shape:
            raise ValueError(
                f"center and direction have one shape; got {list(center.shape)} and {list(direction.shape)}. "
                "Expand one of them first."
            )
        coefficients = center.detach().new_zeros((order + 1, *center.shape))
        coefficients[0] = center.detach()
        if order > 0:
            coefficients[1] = direction.detach()
        return cls(coefficients)

    @property
    def order(self) -> int:
        """Highest power of t kept."""
        return self.coefficients.shape[0] - 1

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """Order, shape, dtype and device."""
        return f"Series(order={self.order}, shape={list(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make the call without PyTorch's re-wrapping of plain results.

        Defining this also disables the fused evaluation paths of `nn.MultiheadAttention` and `nn.TransformerEncoderLayer`.
        Recurrent layers write into buffers made from their first hidden state, which must therefore be a series.
        """
        if getattr(func, "__name__", "") in _RECURRENT:
            args = _with_hidden_series(args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(
        cls, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Apply the rule of an aten operation."""
        return carry(func, args, kwargs or {})


def _with_hidden_series(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Make series of the states in (input, state, ...) or (input, batch sizes, state, ...)."""
    place = 2 if isinstance(args[1], Tensor) and not args[1].is_floating_point() else 1
    states = args[place] if isinstance(args[place], list | tuple) else [args[place]]
    weights = next((item for item in args if isinstance(item, list)), args)
    order = next(item.order for item in (args[0], *states, *weights) if isinstance(item, Series))
    lifted = [
        x if isinstance(x, Series) else Series(torch.stack([x, *(torch.zeros_like(x) for _ in range(order))]))
        for x in states
    ]
    return *args[:place], lifted if len(lifted) > 1 else lifted[0], *args[place + 1 :]


def carry(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply an operation to series by its rule, or by PyTorch's decomposition.

    Raises:
        NotImplementedError: There is neither.
        TypeError: A series would be written into a plain tensor.
    """
    found = RULES.get(func)
    if found is not None:
        return found(*args, **kwargs)
    if func._schema.name.endswith("_") or any(argument.is_out for argument in func._schema.arguments):
        return _write_back(func, args, kwargs)
    if func.has_kernel_for_dispatch_key(_COMPOSITE):
        # torch.inference_mode does not decompose composite operations.
        return func.decompose(*args, **kwargs)
    found = decomposition_table.get(func)
    if found is None or func in _ANOTHER_FUNCTION:
        _refuse(func)
    try:
        return found(*args, **kwargs)
    except _NoRuleError:
        _refuse(func)


class _NoRuleError(NotImplementedError):
    """An operation has no rule."""


def _refuse(func: OpOverload) -> NoReturn:
    raise _NoRuleError(
        f"every operation on a Series has a Taylor rule; {func} has none. Write the function with other operations, "
        "or add a rule with tl_jets.calculus.series.rule."
    )


def _write_back(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the functional variant of an in-place or `out=` operation and write its result into the target."""
    name = func._schema.name.removeprefix("aten::")
    outs = [argument.name for argument in func._schema.arguments if argument.is_out]
    twin = getattr(torch.ops.aten, name if outs else name[:-1], None)
    if twin is None:
        _refuse(func)
    if outs:
        targets = [kwargs.pop(out) for out in outs]
        results = twin(*args, **kwargs)
        for target, result in zip(targets, results if len(outs) > 1 else [results], strict=True):
            (writable(target, func) if isinstance(result, Series) else target).copy_(result)
        return tuple(targets) if len(outs) > 1 else targets[0]
    target = writable(args[0], func)
    result = twin(*args, **kwargs)
    if torch.Tag.inplace_view in func.tags:
        # `squeeze_` and the like must also change the shape of the wrapper.
        target.coefficients = result.coefficients
        with torch._C._DisableTorchDispatch():
            func(*args, **kwargs)
        return target
    return target.copy_(result)


def writable(target: Any, func: Any) -> Series:
    """The target of an in-place operation; raises TypeError unless it is a `Series`."""
    if not isinstance(target, Series):
        raise TypeError(
            f"a Series can only be written into a Series; {func} would write one into a plain tensor of shape "
            f"{list(target.shape)} and lose every coefficient but the first. Allocate the target from the series "
            "(torch.zeros_like(x), x.new_zeros(...), x.clone()) or use the out-of-place operation."
        )
    return target
