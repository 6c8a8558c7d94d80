"""Rules of convolutions, average pooling, and operations applied order by order.

An operation that is jointly linear in its floating-point operands applies to the coefficients of each order, with plain
operands replaced by zero above order 0. A convolution is a product of its input and its weight, at
(k + 1)(k + 2) / 2 convolutions if both are series.

Example:
    >>> from tl_jets.calculus import Series
    >>> x = Series.line(torch.ones(1, 1, 4), torch.ones(1, 1, 4), order=1)
    >>> torch.nn.functional.conv1d(x, torch.ones(1, 1, 2)).coefficients.flatten()
    tensor([2., 2., 2., 2., 2., 2.])
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from tl_jets.calculus.rules_structure import lift, terms_of
from tl_jets.calculus.series import RULES, Series, rule

aten = torch.ops.aten


def order_by_order(operation: OpOverload, *args: Any, **kwargs: Any) -> Series:
    """Apply an operation that is jointly linear in its floating-point operands."""
    terms = terms_of(*args, *kwargs.values())

    def coefficient(x: Any, order: int) -> Any:
        if isinstance(x, Series):
            return x.coefficients[order]
        return torch.zeros_like(x) if order and isinstance(x, Tensor) and x.is_floating_point() else x

    found = [
        operation(*(coefficient(x, n) for x in args), **{name: coefficient(x, n) for name, x in kwargs.items()})
        for n in range(terms)
    ]
    return Series(torch.stack(found))


_ORDER_BY_ORDER = [
    aten.avg_pool2d.default,
    aten.avg_pool3d.default,
    aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool3d.default,
    aten._upsample_bilinear2d_aa.default,
    aten._upsample_bicubic2d_aa.default,
    aten.masked_select.default,
    aten.masked_scatter.default,
    aten.put.default,
    aten.diagonal_scatter.default,
]
RULES.update({operation: partial(order_by_order, operation) for operation in _ORDER_BY_ORDER})


_LINEAR_REDUCTIONS = {aten.scatter_reduce.two: ("sum", "mean"), aten.index_reduce.default: ("mean",)}


def scatter_reduce(
    operation: OpOverload, x: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Series:
    """Scatter or add slices with sums or means; the other reductions raise."""
    kinds = _LINEAR_REDUCTIONS[operation]
    if reduce not in kinds:
        raise NotImplementedError(
            f"{operation.overloadpacket.__name__} has a Taylor rule for {' and '.join(map(repr, kinds))}; got {reduce!r}. "
            "Write it with amax, amin or prod."
        )
    return order_by_order(operation, x, dim, index, src, reduce, include_self=include_self)


RULES.update({operation: partial(scatter_reduce, operation) for operation in _LINEAR_REDUCTIONS})


@rule(aten.as_strided.default)
def as_strided(x: Series, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None) -> Series:
    """A strided view that starts at the tensor's first element."""
    if storage_offset:
        raise NotImplementedError(
            f"as_strided on a Series starts at its first element; got storage_offset={storage_offset}. Slice it first."
        )
    u = x.coefficients
    return Series(u.as_strided((u.shape[0], *size), (u.stride(0), *stride)))


@rule(aten.convolution.default)
def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Series:
    """The convolution, plain or transposed, plus the bias."""
    terms = terms_of(x, weight, bias)

    def convolve(a: Tensor, b: Tensor) -> Tensor:
        return aten.convolution(a, b, None, *options)

    if isinstance(x, Series) and isinstance(weight, Series):
        u, w = x.coefficients, weight.coefficients
        products = [[convolve(u[i], w[n - i]) for i in range(n + 1)] for n in range(terms)]
        out = torch.stack([torch.stack(same).sum(0) for same in products])
    elif isinstance(x, Series):
        rows = convolve(x.coefficients.flatten(0, 1), weight)
        out = rows.view(terms, -1, *rows.shape[1:])
    elif isinstance(weight, Series):
        out = torch.stack([convolve(x, one) for one in weight.coefficients])
    else:
        out = lift(convolve(x, weight), terms)
    if bias is not None:
        out += lift(bias, terms).view(terms, 1, -1, *(1,) * (out.ndim - 3))
    return Series(out)


@rule(aten._embedding_bag_forward_only.default)
def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[Any, ...]:
    """Sums or means of rows of a table that is a series."""
    if mode == 2 or per_sample_weights is not None:
        raise NotImplementedError(
            "embedding_bag on a Series has modes 'sum' and 'mean' without per_sample_weights. Write it with embedding."
        )
    options = (offsets, scale_grad_by_freq, mode, sparse, None, include_last_offset, padding_idx)
    assert isinstance(weight, Series)
    found = [aten._embedding_bag_forward_only(one, indices, *options) for one in weight.coefficients]
    return Series(torch.stack([one[0] for one in found])), *found[0][1:]
