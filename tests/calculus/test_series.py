"""Every rule against Cauchy's integral formula, at orders 0 to 6, on curves with all coefficients random."""

import math
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from oracles import contour_coefficients, erf, layer_norm, nested_jvp_coefficients, relative_error, rms_norm
from oracles import softmax as plain_softmax
from torch import Tensor

from tl_jets.calculus import Series
from tl_jets.calculus.rules_structure import lift
from tl_jets.calculus.series import RULES, rule

aten = torch.ops.aten
TABLE = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "supported_functions.py"))
HIGHEST = 6
TOLERANCE = 1e-10
SHAPE = (2, 3, 4)


@dataclass(frozen=True)
class Case:
    """A function of a series, and a formula for it in complex arithmetic (the function itself, if it takes complex)."""

    name: str
    f: Callable
    formula: Callable | None = None
    low: float = -1.0
    high: float = 1.0
    shape: tuple[int, ...] = SHAPE


def fixed(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def curve_for(case: Case, order: int = HIGHEST) -> Tensor:
    generator = torch.Generator().manual_seed(len(case.name) + 31)
    coefficients = 0.4 * torch.randn(order + 1, *case.shape, generator=generator, dtype=torch.float64)
    value = torch.rand(case.shape, generator=generator, dtype=torch.float64)
    coefficients[0] = case.low + (case.high - case.low) * value
    return coefficients


W, V, M = fixed(4, 5), fixed(4), fixed(2, 4, 3)
POSITIVE = W.abs() + 0.5
MASK = fixed(3, 4) > 0
CAUSAL = torch.ones(4, 4, dtype=torch.bool).tril()
IDS = torch.tensor([2, 0, 2])


def frozen(choose: Callable[[Tensor], Tensor], yes: Callable, no: Callable) -> Callable:
    """A piecewise function whose branch is chosen by the real part, which the small contour does not change."""
    return lambda z: torch.where(choose(z.real), yes(z), no(z))


def by(selector: Callable[[Tensor], Tensor], dim: int) -> Callable:
    """Elements along `dim` picked by an index computed from the real part."""
    return lambda z: torch.gather(z, dim, selector(z.real))


def zero(z: Tensor) -> Tensor:
    return torch.zeros_like(z)


def softplus(z: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(z))


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


def var(z: Tensor, dims: tuple[int, ...], correction: float = 1, keepdim: bool = False) -> Tensor:
    deviation = z - z.mean(dims, keepdim=True)
    count = math.prod(z.shape[dim] for dim in dims)
    return (deviation * deviation).sum(dims, keepdim=keepdim) / (count - correction)


def gelu_new(z: Tensor) -> Tensor:
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z * z * z)))


def inplace(operation: Callable[[Tensor], object]) -> Callable:
    """A function that writes into a copy of its argument, as hooks do."""

    def f(z: Tensor) -> Tensor:
        z = z.clone()
        operation(z)
        return z

    return f


def setitem(index: object, value: object) -> Callable:
    def operation(z: Tensor) -> None:
        new = value(z) if callable(value) else value
        z[index] = new.to(z.dtype) if isinstance(new, Tensor) else new

    return inplace(operation)


SHAPES = [
    Case("view", lambda x: x.view(6, 4)),
    Case("view_infer", lambda x: x.view(-1, 2)),
    Case("reshape_copy", lambda x: x.transpose(0, 2).reshape(8, 3)),
    Case("flatten", lambda x: x.flatten()),
    Case("unsafe_view", lambda x: aten._unsafe_view(x, [3, 8])),
    Case("permute", lambda x: x.permute(2, 0, 1)),
    Case("permute_negative", lambda x: x.permute(-1, 0, -2)),
    Case("transpose", lambda x: x.transpose(-1, 0)),
    Case("t", lambda x: x[0].t()),
    Case("mT", lambda x: x.mT),
    Case("unsqueeze", lambda x: x.unsqueeze(1)),
    Case("unsqueeze_last", lambda x: x.unsqueeze(-1)),
    Case("unsqueeze_first", lambda x: x.unsqueeze(-4)),
    Case("squeeze", lambda x: x.squeeze(), shape=(1, 3, 1)),
    Case("squeeze_dim", lambda x: x.squeeze(0).squeeze(-1), shape=(1, 3, 1)),
    Case("squeeze_not", lambda x: x.squeeze(1), shape=(1, 3, 1)),
    Case("squeeze_dims", lambda x: x.squeeze((0, 2)), shape=(1, 3, 1)),
    Case("squeeze_scalar", lambda x: x.squeeze(), shape=()),
    Case("expand", lambda x: x[:, :1].expand(2, 5, 4)),
    Case("expand_new_axes", lambda x: x[0, 0].expand(3, 2, -1)),
    Case("expand_as", lambda x: x[:, :1].expand_as(x) * x),
    Case("repeat", lambda x: x.repeat(2, 1, 1, 3)),
    Case("repeat_interleave", lambda x: x.repeat_interleave(2, dim=1)),
    Case("flip", lambda x: x.flip(0, -1)),
    Case("roll", lambda x: x.roll(1, -1)),
    Case("roll_flat", lambda x: x.roll(3)),
    Case("roll_two", lambda x: x.roll((1, 2), (0, -1))),
    Case("unfold", lambda x: x.unfold(-1, 2, 1)),
    Case("diagonal", lambda x: x.diagonal(0, 0, 2)),
    Case("movedim", lambda x: x.movedim(0, -1)),
    Case("contiguous", lambda x: x.mT.contiguous()),
    Case("clone", lambda x: x.clone()),
    Case("detach", lambda x: x.detach()),
    Case("alias", lambda x: aten.alias(x)),
    Case("pad", lambda x: F.pad(x, (1, 0, 0, 2))),
    Case("pad_value", lambda x: F.pad(x, (1, -1), value=3.0)),
    Case("rearrange", lambda x: rearrange(x, "a b c -> c (b a)")),
    Case("reduce", lambda x: reduce(x, "a b c -> b", "mean"), lambda z: z.mean((0, 2))),
    Case("split", lambda x: torch.cat([p * (i + 1) for i, p in enumerate(x.split(3, -1))], -1)),
    Case("split_sizes", lambda x: x.split([1, 3], -1)[1]),
    Case("chunk", lambda x: x.chunk(2, -1)[1]),
    Case("unbind", lambda x: x.unbind(-2)[1]),
    Case("iterate", lambda x: sum(row for row in x)),
    Case("slice", lambda x: x[:, 1:, ::2]),
    Case("select", lambda x: x[..., 1]),
    Case("select_negative", lambda x: x.select(-2, -1)),
    Case("cat", lambda x: torch.cat([x, x * 2], -1)),
    Case("cat_plain", lambda x: torch.cat([torch.ones(2, 1, 4, dtype=x.dtype), x], 1)),
    Case("cat_empty", lambda x: torch.cat([x.new_zeros(0), x], 1)),
    Case("stack", lambda x: torch.stack([x, -x], -1)),
    Case("stack_plain", lambda x: torch.stack([x[0], M[0].T.to(x.dtype)])),
    Case("tril", lambda x: x.tril()),
    Case("triu", lambda x: x.triu(1)),
    Case("index_list", lambda x: x[:, [0, 2, 0]]),
    Case("index_two", lambda x: x[:, IDS, IDS]),
    Case("index_gap", lambda x: x[torch.tensor([0, 1]), :, torch.tensor([3, 0])]),
    Case("index_mask", lambda x: x[:, MASK]),
    Case("index_scalar_tensor", lambda x: x[:, torch.tensor(1)]),
    Case("index_select", lambda x: x.index_select(-2, IDS)),
    Case("gather", lambda x: x.gather(-1, torch.tensor([[[0, 3], [1, 1], [2, 0]]] * 2))),
    Case("take_along_dim", lambda x: x.take_along_dim(torch.tensor([[[1], [0], [2]]]), -1)),
    Case("scatter", lambda x: x.scatter(-1, torch.zeros(2, 3, 1, dtype=torch.long), x[..., :1] * 2)),
    Case("scatter_plain", lambda x: x.scatter(1, torch.zeros(2, 1, 4, dtype=torch.long), M.mT[:, :1].to(x.dtype))),
    Case("scatter_add", lambda x: x.scatter_add(-1, torch.ones(2, 3, 4, dtype=torch.long), x)),
    Case("scatter_value", lambda x: x.scatter(-1, torch.zeros(2, 3, 1, dtype=torch.long), 5.0)),
    Case("index_add", lambda x: x.index_add(1, IDS, x, alpha=2)),
    Case("index_add_plain", lambda x: torch.zeros(2, 3, 4, dtype=x.dtype).index_add(1, IDS, x)),
    Case("embedding", lambda x: F.embedding(IDS, x[0]), lambda z: z[0][IDS]),
    Case("where", lambda x: torch.where(MASK, x, x * x)),
    Case("where_plain", lambda x: torch.where(MASK, x, V.to(x.dtype))),
    Case("where_plain_first", lambda x: torch.where(MASK, V.to(x.dtype), x)),
    Case("where_number", lambda x: torch.where(MASK, x, 2.0)),
    Case("where_broadcast", lambda x: torch.where(MASK.unsqueeze(1).unsqueeze(1), x[:, :1], x[0, 0])),
    Case("masked_fill", lambda x: x.masked_fill(MASK, -2.0)),
    Case("masked_fill_tensor", lambda x: x.masked_fill(MASK, torch.tensor(3.0, dtype=x.dtype))),
    Case("masked_fill_series", lambda x: x.masked_fill(MASK, x[0, 0, 0])),
    Case("to_float64", lambda x: x.to("cpu", torch.float64) * 1, lambda z: z),
    Case("zeros_like", lambda x: torch.zeros_like(x)),
    Case("ones_like", lambda x: torch.ones_like(x) + x),
    Case("new_full", lambda x: x.new_full((2,), 3.0)),
]
ARITHMETIC = [
    Case("add", lambda x: x + x * x),
    Case("add_alpha", lambda x: torch.add(x, x * x, alpha=3)),
    Case("add_plain", lambda x: x + V),
    Case("add_plain_alpha", lambda x: torch.add(x, V, alpha=-2)),
    Case("add_plain_first", lambda x: torch.add(V.to(x.dtype), x, alpha=-2)),
    Case("add_broadcast", lambda x: x[0, 0] + M.mT),
    Case("add_number", lambda x: 1 + x),
    Case("sub", lambda x: x - x * x),
    Case("sub_plain", lambda x: V - x),
    Case("rsub_number", lambda x: 1.5 - x),
    Case("rsub", lambda x: torch.rsub(x, V.to(x.dtype), alpha=2)),
    Case("neg", lambda x: -x),
    Case("mul", lambda x: x * (x + 1)),
    Case("mul_self", lambda x: x * x),
    Case("mul_plain", lambda x: x * V),
    Case("mul_more_axes", lambda x: x[0] * M.mT),
    Case("mul_broadcast", lambda x: x[..., :1] * x[0]),
    Case("mul_broadcast_reversed", lambda x: x[0] * x[..., :1].unsqueeze(0)),
    Case("mul_number", lambda x: 3 * x),
    Case("mul_mask", lambda x: x * MASK),
    Case("square", lambda x: x.square(), lambda z: z * z),
    Case("div", lambda x: x / (x * x + 2)),
    Case("div_broadcast", lambda x: x / (x[..., :1] + 3)),
    Case("div_broadcast_wide", lambda x: x[..., :1] / (x + 3)),
    Case("div_plain", lambda x: x / POSITIVE[:, 0]),
    Case("div_number", lambda x: x / 3),
    Case("div_of_plain", lambda x: V / (x + 3)),
    Case("div_of_number", lambda x: 2 / (x + 3)),
    Case("reciprocal", lambda x: x.reciprocal(), low=0.5, high=2),
    Case("addcmul", lambda x: torch.addcmul(x, x, x + 1, value=2), lambda z: z + 2 * z * (z + 1)),
    Case("addcdiv", lambda x: torch.addcdiv(x, x, x + 3, value=2), lambda z: z + 2 * z / (z + 3)),
    Case("lerp", lambda x: torch.lerp(x, x * x, 0.3), lambda z: z + 0.3 * (z * z - z)),
    Case("lerp_tensor", lambda x: torch.lerp(V.expand(2, 3, 4), x, x), lambda z: V + z * (z - V)),
    Case("mm", lambda x: x[0] @ x[1].T),
    Case("mm_plain", lambda x: x[0] @ W.to(x.dtype)),
    Case("mm_plain_first", lambda x: W.T.to(x.dtype) @ x[0].T),
    Case("bmm", lambda x: torch.bmm(x, x.mT)),
    Case("bmm_plain", lambda x: torch.bmm(x, M.to(x.dtype))),
    Case("bmm_one_plain", lambda x: torch.bmm(x[:1], M[:1].to(x.dtype))),
    Case("bmm_plain_first", lambda x: torch.bmm(M.to(x.dtype), x)),
    Case("bmm_transposed", lambda x: torch.bmm(x.permute(1, 0, 2), x.permute(1, 2, 0))),
    Case("matmul", lambda x: x @ W.to(x.dtype)),
    Case("matmul_broadcast", lambda x: x.unsqueeze(1) @ M.to(x.dtype)),
    Case("matmul_vector", lambda x: x @ V.to(x.dtype)),
    Case("matmul_vector_first", lambda x: x[0, :, 0] @ x[1]),
    Case("mv", lambda x: torch.mv(x[0], x[1, 0])),
    Case("mv_plain", lambda x: torch.mv(W.T.to(x.dtype), x[1, 0])),
    Case("dot", lambda x: torch.dot(x[0, 0], x[1, 0])),
    Case("dot_plain", lambda x: torch.dot(V.to(x.dtype), x[1, 0])),
    Case("outer", lambda x: torch.outer(x[0, 0], x[1, 0])),
    Case("addmm", lambda x: torch.addmm(x[0, :, :3], x[0], x[1].T, beta=2, alpha=3)),
    Case("addmm_plain", lambda x: torch.addmm(W[0].to(x.dtype), x[0], W.to(x.dtype))),
    Case("addmm_only_bias", lambda x: torch.addmm(x[0], M[0].T[:, :3].to(x.dtype), x.new_ones(3, 4), beta=2, alpha=3)),
    Case("addmm_bias_alone", lambda x: torch.addmm(x[0], M[0].mT.to(x.dtype), M[0, :, :1].expand(4, 4).to(x.dtype))),
    Case("baddbmm", lambda x: torch.baddbmm(x[:, :, :3], x, x.mT, beta=2, alpha=3)),
    Case("baddbmm_plain", lambda x: torch.baddbmm(M.mT[..., :3].to(x.dtype), x, M.to(x.dtype))),
    Case("baddbmm_bias_alone", lambda x: torch.baddbmm(x[:, :, :3], M.mT.to(x.dtype), M.to(x.dtype))),
    Case("addmv", lambda x: torch.addmv(x[0, :, 0], x[1], V.to(x.dtype), beta=2)),
    Case("addmv_bias_alone", lambda x: torch.addmv(x[0, :, 0], M[0].T.to(x.dtype), V.to(x.dtype), beta=2, alpha=3)),
    Case("linear", lambda x: F.linear(x, W.T.to(x.dtype), W[0].to(x.dtype))),
    Case("linear_no_bias", lambda x: F.linear(x, W.T.to(x.dtype))),
    Case("linear_strided", lambda x: F.linear(x.transpose(0, 1), W.T.to(x.dtype), W[0].to(x.dtype))),
    Case("einsum", lambda x: torch.einsum("abc,adc->abd", x, x)),
    Case("einsum_plain", lambda x: torch.einsum("abc,acd,e->edab", x, M.to(x.dtype), V.to(x.dtype))),
    Case("sum", lambda x: x.sum()),
    Case("sum_dim", lambda x: x.sum(-1)),
    Case("sum_dims", lambda x: x.sum((0, -1), keepdim=True)),
    Case("sum_scalar", lambda x: x.sum(), shape=()),
    Case("sum_scalar_dim", lambda x: x.sum(-1), shape=()),
    Case("mean", lambda x: x.mean()),
    Case("mean_dim", lambda x: x.mean((0, 1))),
    Case("mean_keepdim", lambda x: x.mean(-1, keepdim=True)),
    Case("mean_scalar", lambda x: x.mean(0), shape=()),
    Case("cumsum", lambda x: x.cumsum(-2)),
    Case("cumsum_scalar", lambda x: x.cumsum(0), shape=()),
    Case("var", lambda x: x.var(-1), lambda z: var(z, (-1,))),
    Case("var_all", lambda x: x.var(), lambda z: var(z, (0, 1, 2))),
    Case("var_biased", lambda x: x.var((0, 1), correction=0, keepdim=True), lambda z: var(z, (0, 1), 0, True)),
    Case("var_mean", lambda x: torch.add(*torch.var_mean(x, -1)), lambda z: var(z, (-1,)) + z.mean(-1)),
    Case("std", lambda x: (x * 5).std(-1, unbiased=False), lambda z: torch.sqrt(var(z * 5, (-1,), 0)), high=3),
    Case("norm", lambda x: x.norm(dim=-1), lambda z: torch.sqrt((z * z).sum(-1)), low=0.5),
    Case("norm_all", lambda x: torch.linalg.vector_norm(x), lambda z: torch.sqrt((z * z).sum()), low=0.5),
    Case("norm_keepdim", lambda x: x.norm(dim=0, keepdim=True), lambda z: (z * z).sum(0, True).sqrt(), low=0.5),
]
POWERS = {2: (-1, 1), 3: (-1, 1), 0: (-1, 1), 1: (-1, 1), 7: (-1, 1), -1: (0.5, 2), -3: (1, 2)}
POWERS |= {1.5: (0.5, 2), -0.7: (0.5, 2), 0.5: (0.5, 2)}
NONLINEAR = [
    *(Case(f"pow_{r}", lambda x, r=r: x**r, lambda z, r=r: z**r, low, high) for r, (low, high) in POWERS.items()),
    Case("pow_of_number", lambda x: 3.0**x, lambda z: torch.exp(z * math.log(3))),
    Case("pow_of_series", lambda x: (x + 2) ** x, lambda z: torch.exp(z * torch.log(z + 2))),
    Case("pow_plain_exponent", lambda x: (x + 2) ** V, lambda z: torch.exp(V * torch.log(z + 2))),
    Case("pow_one_element", lambda x: x ** torch.tensor(3.0), lambda z: z * z * z),
    Case("sqrt", torch.sqrt, low=0.5, high=2),
    Case("rsqrt", torch.rsqrt, lambda z: 1 / torch.sqrt(z), low=0.5, high=2),
    Case("exp", torch.exp),
    Case("exp2", torch.exp2, lambda z: torch.exp(z * math.log(2))),
    Case("expm1", torch.expm1, lambda z: torch.exp(z) - 1),
    Case("log", torch.log, low=0.5, high=2),
    Case("log2", torch.log2, lambda z: torch.log(z) / math.log(2), low=0.5, high=2),
    Case("log10", torch.log10, lambda z: torch.log(z) / math.log(10), low=0.5, high=2),
    Case("log1p", torch.log1p, lambda z: torch.log(1 + z), low=-0.4, high=1),
    Case("sin", torch.sin),
    Case("cos", torch.cos),
    Case("erf", torch.erf, erf),
    Case("erfc", torch.erfc, lambda z: 1 - erf(z)),
    Case("tanh", torch.tanh),
    Case("sigmoid", torch.sigmoid, sigmoid, low=-4, high=4),
    Case("silu", F.silu, lambda z: z * sigmoid(z), low=-4, high=4),
    Case("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x), lambda z: z * sigmoid(1.702 * z)),
    Case("gelu", F.gelu, lambda z: z * (1 + erf(z / math.sqrt(2))) / 2, low=-2, high=2),
    Case("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"), gelu_new, low=-2, high=2),
    Case("gelu_new", gelu_new, low=-2, high=2),
    Case("softplus", F.softplus, softplus),
    Case("softplus_beta", lambda x: F.softplus(x, 3.0, 20.0), lambda z: softplus(3 * z) / 3),
    Case("softplus_threshold", lambda x: F.softplus(x, 1.0, 0.0), frozen(lambda r: r > 0, lambda z: z, softplus)),
    Case("mish", lambda x: x * torch.tanh(F.softplus(x)), lambda z: z * torch.tanh(softplus(z))),
    Case("logsigmoid", F.logsigmoid, lambda z: -softplus(-z)),
    Case("logaddexp", lambda x: torch.logaddexp(x, x * x), lambda z: torch.log(torch.exp(z) + torch.exp(z * z))),
    Case("softmax", lambda x: x.softmax(-1), plain_softmax),
    Case("softmax_first", lambda x: x.softmax(0), lambda z: plain_softmax(z, 0)),
    Case("softmax_middle", lambda x: F.softmax(x, dim=-2), lambda z: plain_softmax(z, 1)),
    Case("softmax_shifted", lambda x: (x + 1e4).softmax(-1), plain_softmax),
    Case("softmax_scalar", lambda x: x.softmax(0), lambda z: z / z, shape=()),
    Case("safe_softmax", lambda x: aten._safe_softmax(x, -1), plain_softmax),
    Case("log_softmax", lambda x: x.log_softmax(1), lambda z: torch.log(plain_softmax(z, 1))),
    Case("logsumexp", lambda x: x.logsumexp(-1), lambda z: torch.log(torch.exp(z).sum(-1))),
    Case("logsumexp_axes", lambda x: x.logsumexp((0, 2)), lambda z: torch.log(torch.exp(z).sum((0, 2)))),
    Case("logsumexp_keepdim", lambda x: x.logsumexp((0, 1), True), lambda z: torch.exp(z).sum((0, 1), True).log()),
    Case("layer_norm", lambda x: F.layer_norm(x, (4,), V, W[:, 0], 0.1), lambda z: layer_norm(z, V, W[:, 0], 0.1)),
    Case("layer_norm_plain", lambda x: F.layer_norm(x, (4,), eps=0.3), lambda z: layer_norm(z, eps=0.3)),
    Case(
        "layer_norm_axes",
        lambda x: F.layer_norm(x, (3, 4), eps=0.3),
        lambda z: layer_norm(z.flatten(1), eps=0.3).view(2, 3, 4),
    ),
    Case("layer_norm_mean", lambda x: torch.native_layer_norm(x, [4], None, None, 0.3)[1], lambda z: z.mean(-1, True)),
    Case("rms_norm", lambda x: F.rms_norm(x, (4,), V, 0.3), lambda z: rms_norm(z, V, eps=0.3)),
    Case("rms_norm_fused", lambda x: aten._fused_rms_norm(x, [4], V, 0.3)[0], lambda z: rms_norm(z, V, eps=0.3)),
    Case(
        "attention",
        lambda x: F.scaled_dot_product_attention(x, x * 2, x + 1),
        lambda z: plain_softmax(z @ (2 * z).mT / 2) @ (z + 1),
    ),
    Case(
        "attention_fused",
        lambda x: F.scaled_dot_product_attention(x[None], (x * 2)[None], (x + 1)[None]),
        lambda z: (plain_softmax(z @ (2 * z).mT / 2) @ (z + 1))[None],
    ),
]
PIECEWISE = [
    Case("abs", torch.abs, frozen(lambda r: r > 0, lambda z: z, lambda z: -z)),
    Case("relu", F.relu, frozen(lambda r: r > 0, lambda z: z, zero)),
    Case("relu_squared", lambda x: F.relu(x).square(), frozen(lambda r: r > 0, lambda z: z * z, zero)),
    Case("leaky_relu", lambda x: F.leaky_relu(x, 0.2), frozen(lambda r: r > 0, lambda z: z, lambda z: 0.2 * z)),
    Case("relu6", lambda x: F.relu6(x * 9), frozen(lambda r: r > 0, lambda z: 9 * z, zero), high=0.6),
    Case(
        "hardtanh",
        lambda x: F.hardtanh(x, -0.5, 0.25),
        lambda z: torch.where(z.real > 0.25, 0.25, torch.where(z.real < -0.5, -0.5, z)),
    ),
    Case(
        "clamp",
        lambda x: x.clamp(-0.5, 0.25),
        lambda z: torch.where(z.real > 0.25, 0.25, torch.where(z.real < -0.5, -0.5, z)),
    ),
    Case("clamp_min", lambda x: x.clamp(min=0.1), lambda z: torch.where(z.real > 0.1, z, 0.1)),
    Case("clamp_min_number", lambda x: torch.clamp_min(x, 0.1), lambda z: torch.where(z.real > 0.1, z, 0.1)),
    Case("clamp_max", lambda x: torch.clamp_max(x, 0.1), lambda z: torch.where(z.real < 0.1, z, 0.1)),
    Case("clamp_tensor", lambda x: x.clamp(V * 0.1, None), lambda z: torch.where(z.real > V * 0.1, z, V * 0.1)),
    Case("clamp_min_tensor", lambda x: torch.clamp_min(x, V), lambda z: torch.where(z.real > V, z, V.to(z.dtype))),
    Case("clamp_max_tensor", lambda x: torch.clamp_max(x, V), lambda z: torch.where(z.real < V, z, V.to(z.dtype))),
    Case("maximum", lambda x: torch.maximum(x, x[0, 0]), lambda z: torch.where(z.real >= z[0, 0].real, z, z[0, 0])),
    Case("minimum", lambda x: torch.minimum(V, x), lambda z: torch.where(z.real <= V, z, V.to(z.dtype))),
    Case("max_dim", lambda x: x.max(-1).values, lambda z: by(lambda r: r.argmax(-1, True), -1)(z)[..., 0]),
    Case("max_keepdim", lambda x: x.max(1, keepdim=True)[0], by(lambda r: r.argmax(1, True), 1)),
    Case("min_dim", lambda x: x.min(0).values, lambda z: by(lambda r: r.argmin(0, True), 0)(z)[0]),
    Case("max_all", lambda x: x.max(), lambda z: z.flatten()[z.real.argmax()]),
    Case("min_all", lambda x: x.min(), lambda z: z.flatten()[z.real.argmin()]),
    Case("max_scalar", lambda x: x.max(0).values, lambda z: z, shape=()),
    Case("amax", lambda x: x.amax(-1, keepdim=True), by(lambda r: r.argmax(-1, True), -1)),
    Case(
        "amax_axes",
        lambda x: x.amax((0, -1)),
        lambda z: torch.stack([row.flatten()[row.real.flatten().argmax()] for row in z.transpose(0, 1)]),
    ),
    Case("amin", lambda x: x.amin(1), lambda z: by(lambda r: r.argmin(1, True), 1)(z)[:, 0]),
    Case("nanmedian", lambda x: x.nanmedian(1).values, lambda z: by(lambda r: r.argsort(1)[:, 1:2], 1)(z)[:, 0]),
    Case("topk", lambda x: x.topk(2).values, by(lambda r: r.topk(2).indices, -1)),
    Case("sort", lambda x: x.sort(1, descending=True).values, by(lambda r: r.argsort(1, True), 1)),
    Case("clamp_", inplace(lambda z: z.clamp_(max=0.2)), lambda z: torch.where(z.real < 0.2, z, 0.2)),
    Case("relu_", inplace(F.relu_), frozen(lambda r: r > 0, lambda z: z, zero)),
    Case("nan_to_num", torch.nan_to_num, lambda z: z),
    Case("where_predicate", lambda x: torch.where(x > 0, x, x * x), frozen(lambda r: r > 0, lambda z: z, torch.square)),
]
HOOKS = [
    Case("zero_a_head", setitem((slice(None), slice(None), 2), 0)),
    Case("write_a_list", setitem((slice(None), [0, 2]), lambda z: z[:, :2] * z[:, 1:])),
    Case("write_plain", setitem((slice(None), 1), V)),
    Case("write_a_list_plain", setitem((slice(None), [0, 2]), V)),
    Case("write_with_a_gap", setitem(([0, 1], slice(None), [3, 0]), lambda z: z[:, :, 1] * z[:, :, 2])),
    Case("write_number_list", setitem((slice(None), [0, 2]), 3.0)),
    Case("write_mask", setitem((slice(None), MASK), lambda z: (z * z)[:, MASK])),
    Case("write_mask_plain", setitem((slice(None), MASK), 7.0)),
    Case("write_strided", setitem((..., slice(None, None, 2)), lambda z: z[..., 1::2] ** 2)),
    Case("write_row", setitem(0, lambda z: z[1])),
    Case("add_", inplace(lambda z: z.add_(z * z, alpha=2))),
    Case("add_number", inplace(lambda z: z.__iadd__(1))),
    Case("add_plain", inplace(lambda z: z.add_(V))),
    Case("sub_", inplace(lambda z: z.sub_(V))),
    Case("mul_", inplace(lambda z: z.mul_(z + 1))),
    Case("mul_slice", inplace(lambda z: z[:, 0].mul_(2))),
    Case("div_", inplace(lambda z: z.div_(z * z + 2))),
    Case("squeeze_", lambda x: x.clone().squeeze_(0).squeeze_(), shape=(1, 3, 1)),
    Case("transpose_", lambda x: x.clone().transpose_(0, 1).unsqueeze_(1)),
    Case("fill_", inplace(lambda z: z[..., 1].fill_(3.0))),
    Case("fill_tensor", inplace(lambda z: z[..., 1].fill_(torch.tensor(3.0, dtype=torch.float64)))),
    Case("zero_", inplace(lambda z: z[:, 1:].zero_())),
    Case("copy_", inplace(lambda z: z[:, 0].copy_(z[:, 1] * z[:, 2]))),
    Case("copy_plain", inplace(lambda z: z.copy_(V))),
    Case("masked_fill_", inplace(lambda z: z.masked_fill_(MASK, 2.0))),
    Case("index_put_accumulate", inplace(lambda z: z.index_put_((torch.tensor([0, 0]),), z[:1] * z, accumulate=True))),
    Case(
        "index_put_accumulate_plain",
        inplace(lambda z: z.index_put_((torch.tensor([0, 0]),), V.to(z.dtype).expand(2, 3, 4), accumulate=True)),
    ),
    Case("index_put", lambda x: x.index_put((torch.tensor([1]),), x[:1] * x[1:])),
    Case("copy", lambda x: aten.copy(x, x[0]), lambda z: z[0].expand(2, 3, 4)),
    Case("copy_into_plain_functional", lambda x: aten.copy(torch.zeros(2, 3, 4).double(), x), lambda z: z),
    Case("fill", lambda x: aten.fill(x, 2.0), lambda z: zero(z) + 2),
    Case("fill_by_tensor", lambda x: aten.fill(x, torch.tensor(2.0)), lambda z: zero(z) + 2),
    Case("write_into_zeros", lambda x: setitem((slice(None), 1), lambda z: x[:, 1] ** 2)(torch.zeros_like(x))),
    Case("rotate", lambda x: torch.cat([-x[..., 2:], x[..., :2]], -1) * V + x * W[:, 0]),
]
CASES = SHAPES + ARITHMETIC + NONLINEAR + PIECEWISE + HOOKS


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_at_every_order(case: Case):
    coefficients = curve_for(case)
    # Piecewise functions need a contour small enough that no element changes its branch.
    branches = case in PIECEWISE or case.name == "softplus_threshold"
    coefficients[1:] *= 0.02 if branches else 1.0
    formula = case.formula or case.f
    expected = contour_coefficients(formula, coefficients, HIGHEST, radius=0.2)
    if branches:
        # On so short a curve c_j is tiny: compare c_j / 0.02, the least power that every term carries.
        expected[1:] /= 0.02
    assert relative_error(case.f(coefficients[0].clone()), expected[0]) < TOLERANCE, "the formula is another function"
    for order in range(HIGHEST + 1):
        found = case.f(Series(coefficients[: order + 1].clone()))
        assert isinstance(found, Series)
        assert found.dtype == torch.float64
        assert found.shape == found.coefficients.shape[1:]
        assert found.stride() == found.coefficients.stride()[1:]
        numbers = found.coefficients.clone()
        if branches:
            numbers[1:] /= 0.02
        assert relative_error(numbers, expected[: order + 1]) < TOLERANCE


# Nested forward differentiation repeats the check with PyTorch's own derivatives, where they are right.
NESTED = [case for case in NONLINEAR + HOOKS if not case.name.startswith(("layer_norm", "rms_norm_fused", "attention"))]
NESTED = [case for case in NESTED if case.name in {"gelu", "gelu_tanh", "silu", "softmax", "log_softmax", "logsumexp"}]


@pytest.mark.parametrize("case", NESTED, ids=lambda case: case.name)
def test_agrees_with_nested_forward_differentiation(case: Case):
    coefficients = curve_for(case, order=1)
    expected = nested_jvp_coefficients(case.f, coefficients[0], coefficients[1], order=4)
    found = case.f(Series.line(coefficients[0], coefficients[1], order=4)).coefficients
    assert relative_error(found, expected) < TOLERANCE


@pytest.fixture
def recorded(monkeypatch):
    """The operations that reach the dispatcher while a test runs."""
    operations = set()
    original = Series.__torch_dispatch__.__func__

    def dispatch(cls, func, types, args=(), kwargs=None):
        operations.add(func)
        return original(cls, func, types, args, kwargs)

    monkeypatch.setattr(Series, "__torch_dispatch__", classmethod(dispatch))
    return operations


def test_every_rule_has_a_case(recorded):
    def run_all():
        for case in CASES:
            case.f(Series(curve_for(case, order=1)))
        for _, f in PREDICATES:
            f(Series(curve_for(CASES[0], order=1)))
        for call in TABLE["calls"]():
            TABLE["through"](call)
        for name in ("zeros_like", "ones_like", "empty_like"):
            test_constants_are_series(name)

    run_all()
    # Fused operations arrive whole there.
    with torch.inference_mode():
        run_all()
    functional_twins = {getattr(getattr(aten, f._schema.name[6:-1], None), f._overloadname, None) for f in recorded}
    # One of the names that PyTorch may take instead of another, depending on its version and on inference mode.
    aliases = {
        aten.add.Scalar,
        aten.sub.Scalar,
        aten.mul.Scalar,
        aten.div.Scalar,
        aten.square.default,
    }
    aliases |= {aten.reshape.default, aten.lift_fresh.default, aten._index_put_impl_.default, aten.squeeze.dims}
    missing = sorted(map(str, set(RULES) - recorded - functional_twins - aliases))
    assert not missing, " ".join(missing)


@pytest.mark.parametrize(
    "name",
    ["add.Scalar", "sub.Scalar", "mul.Scalar", "div.Scalar", "square.default", "lift_fresh.default"],
)
def test_the_rules_that_pytorch_seldom_calls(name):
    operation, overload = name.split(".")
    x = Series(curve_for(CASES[0], order=2))
    arguments = {"add": (2.0, 3.0), "sub": (2.0, 3.0), "mul": (2.0,), "div": (2.0,)}.get(operation, ())
    formulas = {"add": lambda z: z + 6, "sub": lambda z: z - 6, "mul": lambda z: 2 * z, "div": lambda z: z / 2}
    formulas |= {"square": lambda z: z * z, "lift_fresh": lambda z: z}
    found = RULES[getattr(getattr(aten, operation), overload)](x, *arguments)
    assert relative_error(found.coefficients, contour_coefficients(formulas[operation], x.coefficients, 2)) < TOLERANCE


def called(name: str, *arguments: object) -> tuple[str, Callable]:
    """A function of torch by name, and its call on x; the argument "x" stands for x itself."""
    function = getattr(torch, name)
    return name, lambda x: function(x, *(x * 2 if argument == "x" else argument for argument in arguments))


COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
PREDICATES = [
    *(called(name, 0.1) for name in COMPARISONS),
    *(called(name, "x") for name in (*COMPARISONS, "logical_and", "logical_or", "logical_xor", "equal")),
    *(called(name) for name in ("isnan", "isinf", "isposinf", "isneginf", "isfinite", "nonzero", "logical_not")),
    *(called(name) for name in ("signbit", "sign", "sgn", "floor", "ceil", "round", "trunc")),
    *(called(name) for name in ("argmax", "argmin", "any", "all", "count_nonzero")),
    *(called(name, -1) for name in ("argmax", "argmin", "any", "all", "count_nonzero")),
    *(called(name, (0, 1)) for name in ("any", "all", "count_nonzero")),
    ("argsort", lambda x: x.argsort(-1)),
    ("round_decimals", lambda x: x.round(decimals=1)),
    ("isclose", lambda x: torch.isclose(x, x * 1.5, rtol=1.0)),
    ("allclose", lambda x: torch.allclose(x, x + 1e-12)),
    ("to_bool", lambda x: x.bool()),
    ("to_long", lambda x: (x * 9).long()),
    ("zeros_like_mask", lambda x: torch.zeros_like(x, dtype=torch.bool)),
]


@pytest.mark.parametrize(("name", "f"), PREDICATES, ids=[name for name, _ in PREDICATES])
def test_predicates_look_at_the_value_and_are_plain(name, f):
    coefficients = curve_for(CASES[0], order=2)
    found, expected = f(Series(coefficients)), f(coefficients[0])
    assert not isinstance(found, Series)
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


@pytest.mark.parametrize("name", ["zeros_like", "ones_like", "empty_like"])
def test_constants_are_series(name):
    x = Series(curve_for(CASES[0], order=2))
    for found in (getattr(torch, name)(x), getattr(x, "new_" + name.removesuffix("_like"))((2, 3, 4))):
        assert isinstance(found, Series)
        assert torch.equal(found.coefficients[1:], torch.zeros(2, 2, 3, 4, dtype=torch.float64))
        assert found.dtype == x.dtype
    assert torch.equal(torch.full_like(x, 3.0).coefficients[0], torch.full((2, 3, 4), 3.0, dtype=torch.float64))
    assert torch.zeros_like(x, dtype=torch.float32).coefficients.dtype == torch.float32


KINKS = [torch.abs, F.relu, F.leaky_relu, F.hardtanh, F.relu6, lambda x: x.clamp(-1, 1), lambda x: x.clamp(max=0)]


@pytest.mark.parametrize("f", KINKS)
def test_kinks_follow_pytorch(f):
    x, v = torch.tensor([-1.0, 0.0, 1.0, 6.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = f(Series.line(x, v, order=2)).coefficients
    assert torch.equal(found[1], torch.func.jvp(f, (x,), (v,))[1])
    assert found[2].abs().max() == 0


@pytest.mark.parametrize("r", [2, 3, 5.0, 1, 0])
def test_integer_powers_at_zero(r):
    found = (Series.line(torch.zeros(1).double(), torch.ones(1).double(), order=5) ** r).coefficients.flatten()
    assert found.tolist() == [1.0 if n == r else 0.0 for n in range(6)]


@pytest.mark.parametrize("order", range(5))
def test_masks_of_minus_infinity_stay_finite(order):
    coefficients = curve_for(Case("scores", torch.exp, shape=(2, 4, 4)), order)
    x = Series(coefficients)
    allowed = CAUSAL.clone()
    expected = contour_coefficients(lambda z: _masked_softmax(z, allowed), coefficients, order)
    infinite = torch.tensor(-math.inf, dtype=torch.float64)
    mask = torch.zeros(4, 4, dtype=torch.float64).masked_fill(~allowed, -math.inf)
    lowest = torch.zeros(4, 4, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    for scores in (torch.where(allowed, x, infinite), x.masked_fill(~allowed, -math.inf), x + mask, x + lowest):
        assert relative_error(scores.softmax(-1).coefficients, expected) < TOLERANCE
        logs = torch.log(scores.log_softmax(-1).exp().sum(-1)).coefficients
        assert torch.isfinite(logs).all()
        total = contour_coefficients(lambda z: (torch.exp(z) * allowed).sum(-1).log(), coefficients, order)
        assert relative_error(scores.logsumexp(-1).coefficients, total) < TOLERANCE


def _masked_softmax(z: Tensor, allowed: Tensor) -> Tensor:
    weights = torch.exp(z) * allowed
    return weights / weights.sum(-1, keepdim=True)


def test_rows_that_are_masked_throughout_are_constant():
    x = Series(curve_for(Case("scores", torch.exp, shape=(2, 4, 4)), 3))
    allowed = CAUSAL.clone()
    allowed[0] = False
    scores = x.masked_fill(~allowed, -math.inf)
    pattern = scores.softmax(-1)
    assert torch.isnan(pattern.coefficients[0, :, 0]).all()
    assert torch.equal(pattern.coefficients[1:, :, 0], torch.zeros(3, 2, 4, dtype=torch.float64))
    scrubbed = torch.where(torch.isnan(pattern), torch.zeros_like(pattern), pattern)
    assert torch.isfinite(scrubbed.coefficients).all()
    assert torch.equal(scrubbed.coefficients, torch.nan_to_num(pattern).coefficients)
    assert torch.equal(scrubbed.coefficients, aten._safe_softmax(scores, -1).coefficients)
    total = scores.logsumexp(-1).coefficients[:, :, 0]
    assert (total[0] == -math.inf).all()
    assert (total[1:] == 0).all()


def test_softmax_of_large_scores_does_not_overflow():
    x = Series(curve_for(CASES[0], 3) + 1e3)
    assert torch.isfinite(x.softmax(-1).coefficients).all()


def test_views_share_storage_and_clones_do_not():
    x = Series(curve_for(CASES[0], order=2))
    before = x.coefficients.clone()
    copy = x.clone()
    copy.zero_()
    x.contiguous()
    assert torch.equal(x.coefficients, before)
    x[:, 1:].transpose(0, 1).unsqueeze(0)[0, 1, :, 3] = 9.0
    before[:, :, 2, 3] = 0
    before[0, :, 2, 3] = 9.0
    assert torch.equal(x.coefficients, before)


@pytest.mark.parametrize(
    "write",
    [
        lambda plain, x: plain.copy_(x),
        lambda plain, x: plain.add_(x),
        lambda plain, x: plain.__setitem__((slice(None), 1), x[:, 1]),
        lambda plain, x: plain.__setitem__((slice(None), [0, 1]), x[:, :2]),
        lambda plain, x: plain.masked_fill_(MASK, x[0, 0, 0]),
        lambda plain, x: plain.index_add_(1, IDS, x),
        lambda plain, x: plain.fill_(x[0, 0, 0]),
        lambda plain, x: torch.add(x, 1, out=plain),
        lambda plain, x: plain.remainder_(x),
    ],
)
def test_a_plain_tensor_takes_no_series(write):
    plain, x = torch.zeros(SHAPE, dtype=torch.float64), Series(curve_for(CASES[0], order=1))
    with pytest.raises(TypeError, match=r"only be written into a Series.*zeros_like"):
        write(plain, x)
    assert torch.equal(plain, torch.zeros(SHAPE, dtype=torch.float64))


@pytest.mark.parametrize("f", [torch.i0, lambda x: x.item(), torch.linalg.svdvals])
def test_an_operation_without_a_rule_is_named(f):
    with pytest.raises(NotImplementedError, match=r"aten\.(i0|_local_scalar_dense|_linalg_svd)\.default has none"):
        f(Series(torch.ones(2, 1, 1)))


def test_outputs_are_written_to_series_only():
    x = Series(curve_for(CASES[0], order=2))
    target, values, indices = torch.empty_like(x), x.new_empty(2, 3), torch.zeros(2, 3, dtype=torch.long)
    assert torch.mul(x, x, out=target) is target
    assert torch.equal(target.coefficients, (x * x).coefficients)
    torch.max(x, -1, out=(values, indices))
    assert torch.equal(values.coefficients, x.max(-1).values.coefficients)
    assert torch.equal(indices, x.coefficients[0].argmax(-1))


def test_an_axis_that_is_not_there_is_not_the_axis_of_orders():
    x = Series(curve_for(CASES[0], order=1))
    for f in (
        lambda: x.sum(-4),
        lambda: x.softmax(3),
        lambda: x.cumsum(-4),
        lambda: x.flip(-4),
        lambda: x.select(3, 0),
    ):
        with pytest.raises(IndexError):
            f()


def test_orders_must_agree():
    x, y = Series(torch.ones(2, 3)), Series(torch.ones(3, 3))
    for f in (torch.add, torch.mul, torch.div, torch.dot, torch.maximum, lambda a, b: torch.cat([a, b])):
        with pytest.raises(ValueError, match=r"orders \[1, 2\]"):
            f(x, y)


def test_dtypes_promote_as_for_plain_tensors():
    x = Series(torch.ones(2, 3))
    scalar = Series(torch.ones(2, dtype=torch.float64))
    vector = torch.ones(3, dtype=torch.float64)
    for f in (torch.add, torch.sub, torch.mul, torch.div):
        assert f(x, vector).dtype == torch.float64
        assert f(vector, x).dtype == torch.float64
        assert f(x, Series(torch.ones(2, 3, dtype=torch.float64))).dtype == torch.float64
        assert f(scalar, x).dtype == torch.float32
        assert f(x, scalar).dtype == torch.float32
        assert f(scalar, torch.ones(3)).dtype == torch.float32
    assert torch.where(torch.tensor([True, False, True]), x, vector).dtype == torch.float64
    exact = Series(curve_for(CASES[0], order=2))
    assert torch.equal(exact.to(torch.float32).coefficients, exact.coefficients.float())
    assert x.double().float().dtype == torch.float32


@pytest.mark.parametrize("case", ARITHMETIC + NONLINEAR, ids=lambda case: case.name)
def test_inference_mode_changes_nothing(case):
    coefficients = curve_for(case, order=2)
    expected = case.f(Series(coefficients)).coefficients
    with torch.inference_mode():
        assert torch.equal(case.f(Series(coefficients)).coefficients, expected)


def test_float32_is_kept():
    for case in (*SHAPES[:5], *NONLINEAR):
        if case.name in {"layer_norm", "rms_norm", "rms_norm_fused", "pow_plain_exponent", "to_float64"}:
            continue
        assert case.f(Series(curve_for(case, order=2).float())).coefficients.dtype == torch.float32, case.name


def test_a_line():
    center, direction = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 4.0])
    line = Series.line(center, direction, order=2)
    assert line.coefficients.tolist() == [[1, 2], [3, 4], [0, 0]]
    assert line.order == 2
    assert not line.coefficients.requires_grad
    assert repr(line) == "Series(order=2, shape=[2], dtype=torch.float32, device='cpu')"
    line.zero_()
    assert center.tolist() == [1, 2]
    assert Series.line(center, direction, order=0).coefficients.tolist() == [[1, 2]]


@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_no_series_is_refused():
    with pytest.raises(ValueError, match=r"order must be an integer >= 0; got -1"):
        Series.line(torch.ones(2), torch.ones(2), -1)
    with pytest.raises(ValueError, match=r"one shape; got \[2\] and \[3\]"):
        Series.line(torch.ones(2), torch.ones(3), 1)
    with pytest.raises(TypeError, match=r"series of series"):
        Series(Series(torch.ones(2, 3)))
    with pytest.raises(TypeError, match=r"floating point; got torch\.int64"):
        Series(torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"order >= 0; got \[\]"):
        Series(torch.tensor(1.0))


def test_a_rule_is_entered_once():
    for operation, name in ((aten.gelu.default, "gelu"), (aten.tanh.default, "one of a table")):
        known = RULES[operation]
        with pytest.raises(ValueError, match=f"has {name} already"):
            rule(operation)(lift)
        assert RULES[operation] is known


def shares(result: Tensor, source: Tensor) -> bool:
    return result.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()


REDUCTIONS = {
    **{f.__name__: f for f in (torch.sum, torch.mean, torch.amax, torch.amin, torch.max, torch.min, torch.clone)},
    **{
        f"{name} 0": lambda x, name=name: getattr(x, name)(0) for name in ("sum", "mean", "amax", "cumsum", "logsumexp")
    },
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_reduction_of_one_number_is_made_anew(name):
    """What is written into it is not written into what it was made of, as with plain tensors."""
    coefficients = fixed(4)
    x = Series(coefficients.clone())
    found = REDUCTIONS[name](x)
    assert torch.allclose(found.coefficients, coefficients, rtol=1e-14)
    found.mul_(3)
    assert torch.equal(x.coefficients, coefficients)


@pytest.mark.parametrize("case", ARITHMETIC + NONLINEAR + SHAPES, ids=lambda case: case.name)
def test_results_share_memory_where_those_of_plain_tensors_do(case):
    x = Series(curve_for(case, order=2))
    plain = x.coefficients[0].clone()
    try:
        expected = case.f(plain)
    except (RuntimeError, TypeError):
        pytest.skip("takes no plain tensor")
    found = case.f(x)
    if isinstance(expected, Tensor) and isinstance(found, Series) and not shares(expected, plain):
        assert not shares(found.coefficients, x.coefficients)


@pytest.mark.parametrize("name", ["sign_", "floor_", "ceil_", "round_", "trunc_"])
def test_a_step_function_in_place_is_constant(name):
    x = Series(curve_for(Case(name, lambda x: x, low=-3, high=3), order=3))
    coefficients = x.coefficients.clone()
    assert getattr(x, name)() is x
    assert torch.equal(x.coefficients[0], getattr(coefficients[0], name)())
    assert not x.coefficients[1:].any()
