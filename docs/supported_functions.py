"""What jets go through: call some 400 functions and modules of PyTorch on a series, compare, and write the table.

    python docs/supported_functions.py

Each entry is a call as a user writes it; the first lower-case word in it that names an input is what the series runs
through. Coefficients of orders 0 to 4 are compared with a polynomial fitted to values of the very same call in float64
at points around the center, which knows nothing of Taylor arithmetic.
"""

# ruff: noqa: E501

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tl_jets.calculus import Series

PAGE = Path(__file__).parent / "pages" / "reference" / "functions.md"
ORDER = 4
TOLERANCE = 2e-5
# The version that the page is of.
TORCH = "2.13.0"
GROUPS = {
    "Elementwise": """
        torch.abs(x) | torch.acos(u) | torch.acosh(p) | torch.add(x, Y) | torch.addcdiv(x, Y, P) | torch.addcmul(x, Y, x)
        torch.asin(u) | torch.asinh(x) | torch.atan(x) | torch.atan2(x, Y) | torch.atan2(Y, x) | torch.atanh(u)
        torch.clamp(x, -0.4, 0.5) | torch.clip(x, -0.4, 0.5) | torch.copysign(x, Y) | torch.cos(x) | torch.cosh(x)
        torch.deg2rad(x) | torch.digamma(p) | torch.div(x, P) | torch.div(x, 0.31, rounding_mode="floor")
        torch.div(x, 0.31, rounding_mode="trunc") | torch.erf(x) | torch.erfc(x) | torch.erfinv(u) | torch.exp(x)
        torch.exp2(x) | torch.expm1(x) | torch.float_power(p, 1.7) | torch.float_power(x, 3) | torch.floor(x)
        torch.floor_divide(x, 0.31) | torch.fmax(x, Y) | torch.fmin(x, Y) | torch.fmod(x, 0.31) | torch.fmod(x, P)
        torch.frac(x) | torch.heaviside(x, Y) | torch.hypot(x, Y) | torch.i0(x) | torch.ldexp(x, IDS4) | torch.lerp(x, Y, 0.3)
        torch.lerp(Y, P, u) | torch.lgamma(p) | torch.log(p) | torch.log10(p) | torch.log1p(u) | torch.log2(p)
        torch.logaddexp(x, Y) | torch.logaddexp2(x, Y) | torch.logit(u) | torch.logit(u, 0.1) | torch.maximum(x, Y)
        torch.minimum(x, Y) | torch.mul(x, Y) | torch.multiply(x, x) | torch.mvlgamma(p + 2, 2) | torch.nan_to_num(x)
        torch.neg(x) | torch.negative(x) | torch.positive(x) | torch.polygamma(1, p) | torch.pow(p, 1.7)
        torch.pow(x, 3) | torch.pow(x, N) | torch.pow(P, x) | torch.pow(1.7, x) | torch.pow(p, x_like(p)) | torch.rad2deg(x)
        torch.reciprocal(p) | torch.relu(x) | torch.remainder(x, 0.31) | torch.remainder(x, P) | torch.round(x)
        torch.rsqrt(p) | torch.rsub(x, Y) | torch.sgn(x) | torch.sigmoid(x) | torch.sign(x) | torch.sin(x) | torch.sinc(x)
        torch.sinh(x) | torch.sqrt(p) | torch.square(x) | torch.sub(x, Y) | torch.subtract(x, Y) | torch.tan(x) | torch.tanh(x)
        torch.true_divide(x, P) | torch.trunc(x) | torch.fix(x) | torch.where(MASK, x, Y) | torch.xlogy(x, P) | torch.xlogy(Y, p) | torch.xlogy(0.3, p) | torch.xlogy(x, 0.3) | torch.remainder(0.31, p)
        torch.threshold(x, 0.1, 0.2) | torch.special.bessel_j0(x) | torch.special.digamma(p) | torch.special.entr(u)
        torch.special.erf(x) | torch.special.erfc(x) | torch.special.erfcx(x) | torch.special.erfinv(u) | torch.special.exp2(x)
        torch.special.expit(x) | torch.special.expm1(x) | torch.special.gammaln(p) | torch.special.i0(x)
        torch.special.i0e(x) | torch.special.i1(x) | torch.special.i1e(x) | torch.special.log1p(u)
        torch.special.log_ndtr(x) | torch.special.log_softmax(x, -1) | torch.special.logit(u) | torch.special.logsumexp(x, -1)
        torch.special.multigammaln(p + 2, 2) | torch.special.ndtr(x) | torch.special.ndtri(u) | torch.special.polygamma(2, p)
        torch.special.psi(p) | torch.special.sinc(x) | torch.special.softmax(x, -1) | torch.special.xlog1py(Y, u)
        torch.special.xlogy(x, P) | torch.special.xlog1py(0.3, u) | torch.special.xlog1py(x, 0.3) | torch.special.zeta(p + 1, P) | x % 0.31 | x // 0.31 | x ** 3 | 1.7 ** x | -x | abs(x) | 1 / p
        torch.igamma(P, p) | torch.nextafter(x, Y) | torch.real(x) | torch.conj(x) | torch.isfinite(x) * x""",
    "Activations": """
        F.celu(x, 0.7) | F.elu(x, 0.7) | F.gelu(x) | F.gelu(x, approximate="tanh") | F.glu(x) | F.hardshrink(x, 0.3)
        F.hardsigmoid(x * 3) | F.hardswish(x * 3) | F.hardtanh(x) | F.leaky_relu(x, 0.2) | F.log_softmax(x, -1)
        F.logsigmoid(x) | F.mish(x) | F.prelu(x, A3) | F.relu(x) | F.relu6(x * 9) | F.rrelu(x) | F.selu(x) | F.sigmoid(x)
        F.silu(x) | F.softmax(x, -1) | F.softmin(x, -1) | F.softplus(x) | F.softplus(x, 3, 2) | F.softshrink(x, 0.3)
        F.softsign(x) | F.tanh(x) | F.tanhshrink(x) | F.threshold(x, 0.1, 0.2) | F.normalize(x, dim=-1) | F.dropout(x, 0.5, False)
        F.gumbel_softmax(x) | nn.CELU()(x) | nn.ELU()(x) | nn.GELU()(x) | nn.GLU()(x) | nn.Hardshrink()(x)
        nn.Hardsigmoid()(x) | nn.Hardswish()(x) | nn.Hardtanh()(x) | nn.LeakyReLU()(x) | nn.LogSigmoid()(x)
        nn.LogSoftmax(-1)(x) | nn.Mish()(x) | nn.PReLU()(x) | nn.ReLU()(x) | nn.ReLU(inplace=True)(x * 1) | nn.ReLU6()(x)
        nn.RReLU()(x) | nn.SELU()(x) | nn.SiLU()(x) | nn.Sigmoid()(x) | nn.Softmax(-1)(x) | nn.Softmax2d()(image) | nn.Softmin(-1)(x)
        nn.Softplus()(x) | nn.Softshrink()(x) | nn.Softsign()(x) | nn.Tanh()(x) | nn.Tanhshrink()(x)
        nn.Threshold(0.1, 0.2)(x) | nn.Dropout()(x) | nn.AlphaDropout()(x) | nn.Identity()(x)""",
    "Reductions": """
        torch.all(x) * x | torch.amax(x, -1) | torch.amin(x, -1) | torch.aminmax(x)[0] | torch.cummax(x, -1)[0] | torch.cummin(x, 1)[0]
        torch.cumprod(x, -1) | torch.cumsum(x, 1) | torch.logcumsumexp(x, -1) | torch.logsumexp(x, -1) | torch.max(x)
        torch.max(x, 1)[0] | torch.mean(x, 1) | torch.median(x) | torch.median(x, -1)[0] | torch.min(x, 1)[0]
        torch.mode(x, -1)[0] | torch.nanmean(x, 1) | torch.nanmedian(x) | torch.nansum(x, -1) | torch.norm(x) | torch.norm(x, 1)
        torch.norm(x, 3, -1) | torch.norm(x, math.inf) | torch.prod(x) | torch.prod(x, 1) | torch.quantile(x, 0.3, -1)
        torch.nanquantile(x, 0.3, -1) | torch.std(x, -1) | torch.std_mean(x, -1)[0] | torch.sum(x, (0, 1)) | torch.var(x, 1)
        torch.var_mean(x, 1)[0] | torch.kthvalue(x, 2, -1)[0] | torch.sort(x, -1)[0] | torch.sort(x, stable=True)[0] | torch.msort(x)
        torch.topk(x, 2)[0] | torch.unique(x) | torch.dist(x, Y) | torch.dist(x, Y, 3) | torch.renorm(x, 2, 0, 0.5) | torch.trapezoid(x)
        torch.cumulative_trapezoid(x) | torch.diff(x) | torch.gradient(x, dim=1)[0] | torch.cov(m) | torch.corrcoef(m)
        torch.histc(x) | torch.bincount(IDS, s) | x.norm(dim=-1) | x.argsort(-1) * x | torch.trace(m[:, :3])""",
    "Shapes and indices": """
        torch.atleast_3d(m) | torch.block_diag(m, m) | torch.broadcast_to(s, (2, 3)) | torch.cat([x, Y]) | torch.chunk(x, 2, -1)[1]
        torch.column_stack([m, m]) | torch.combinations(s) | torch.cartesian_prod(s, s) | torch.concat([x, x]) | torch.diag(s)
        torch.diag_embed(x) | torch.diagflat(s) | torch.diagonal(x, 0, 1, 2) | torch.diagonal_scatter(m[:, :3], A3) | torch.dstack([x, x])
        torch.dsplit(x, 2)[1] | torch.empty_like(x).zero_() + x | torch.flatten(x) | torch.flip(x, [0]) | torch.fliplr(m) | torch.flipud(m)
        torch.gather(x, 2, IDS3) | torch.hsplit(x, 3)[1] | torch.hstack([x, x]) | torch.index_add(x, 1, IDS, Y) | torch.index_copy(x, 1, IDS1, x * 2)
        torch.index_fill(x, 1, IDS, 0.3) | torch.index_put(x, (IDS1[:2],), x * 2) | torch.index_reduce(x, 1, IDS1, x * 2, "mean")
        torch.index_select(x, 1, IDS) | torch.masked_fill(x, MASK, 0.3) | torch.masked_scatter(x, MASK, x * 2) | torch.masked_select(x, MASK)
        torch.meshgrid(s, s, indexing="ij")[0] | torch.moveaxis(x, 0, 1) | torch.movedim(x, 0, 1) | torch.narrow(x, 2, 1, 2)
        torch.permute(x, (2, 0, 1)) | torch.put(x, IDS1, A3) | torch.ravel(x) | torch.repeat_interleave(x, 2, 1) | torch.reshape(x, (6, 4))
        torch.roll(x, 1, 0) | torch.rot90(x) | torch.scatter(x, 2, IDS3, x * 2) | torch.scatter_add(x, 2, IDS3, x)
        torch.scatter_reduce(x, 2, IDS3, x, "sum") | torch.scatter_reduce(x, 2, IDS3, x, "amax") | torch.select(x, 1, 0)
        torch.select_scatter(x, M[:2], 1, 0) | torch.slice_scatter(x, x[:, :1] * 2, 1, 0, 1) | torch.split(x, 2, -1)[0] | torch.squeeze(x)
        torch.stack([x, x * 2]) | torch.swapaxes(x, 0, 1) | torch.swapdims(x, 0, 1) | torch.t(m) | torch.take(x, IDS)
        torch.take_along_dim(x, IDS3, 2) | torch.tensor_split(x, 2, -1)[0] | torch.tile(x, (2, 1)) | torch.transpose(x, 0, 1)
        torch.tril(m) | torch.triu(m) | torch.unbind(x)[0] | torch.unflatten(x, 2, (2, 2)) | torch.unsqueeze(x, 0) | torch.vsplit(x, 2)[0]
        torch.vstack([m, m]) | torch.as_strided(m, (2, 2), (1, 2)) | x.unfold(-1, 2, 1) | x.view(-1) | x.contiguous() | x.expand(2, 2, 3, 4)
        x.repeat(2, 1, 1) | x.to(torch.float64) | x.new_zeros(3) + x.sum()
        torch.vander(s) | torch.constant_pad_nd(x, (1, 1), 0.3) | torch.complex(x, Y).abs() | torch.stft(sequence[0], 4, return_complex=True).abs()
        torch.fft.fft(x).abs() | torch.fft.rfft(x).abs() | torch.view_as_complex(x.view(2, 3, 2, 2)).abs()
        torch.bucketize(x, V.sort()[0]) * x | torch.searchsorted(V.sort()[0], x) * x | torch.nonzero(x) * V[:3] + x.sum() | written(x) | torch.tensor_split(x, 3, 1)[2]""",
    "Matrix products": """
        torch.addbmm(A[0], a, a) | torch.addmm(A[0], a[0], a[1]) | torch.addmv(A[0, 0], a[0], a[1, 0]) | torch.addr(A[0], s, s) | torch.baddbmm(A, a, a)
        F.bilinear(m, m, BILINEAR, A3) | torch.bmm(a, a) | torch.cdist(x, Y) | torch.cdist(x, Y, 1.0) | torch.chain_matmul(a[0], a[1])
        torch.cross(x[..., :3], Y[..., :3], dim=-1) | torch.dot(s, s) | torch.einsum("bij,bkj->bik", x, x) | torch.ger(s, s) | torch.inner(x, x) | torch.kron(m, m)
        torch.linalg.multi_dot([a[0], a[1], a[0]]) | torch.matmul(x, W) | torch.mm(a[0], a[1]) | torch.mv(a[0], a[1, 0]) | torch.outer(s, s)
        torch.tensordot(x, Y, ([1, 2], [1, 2])) | torch.vdot(s, s) | torch.linalg.vecdot(x, Y) | F.linear(x, W.T) | F.cosine_similarity(x, Y, -1)
        F.pairwise_distance(x, Y) | F.pdist(m) | nn.Linear(4, 3)(x) | nn.Bilinear(4, 4, 3)(x, x) | nn.CosineSimilarity()(x, Y) | nn.PairwiseDistance()(x, Y)""",
    "Linear algebra": """
        torch.cholesky(symmetric(a)) | torch.cholesky_inverse(torch.linalg.cholesky(symmetric(a))) | torch.cholesky_solve(A, torch.linalg.cholesky(symmetric(a))) | torch.det(a)
        torch.inverse(a) | torch.linalg.cholesky(symmetric(a)) | torch.linalg.cond(a) | torch.linalg.det(a) | torch.linalg.eigh(symmetric(a))[0]
        torch.linalg.eigvals(a).abs() | torch.linalg.eigvalsh(symmetric(a)) | torch.linalg.inv(a) | torch.linalg.lstsq(a, A)[0] | torch.linalg.lu(a)[1]
        torch.linalg.lu_factor(a)[0] | torch.linalg.matrix_exp(a) | torch.linalg.matrix_norm(a) | torch.linalg.matrix_norm(a, 1) | torch.linalg.matrix_norm(a, 2) | torch.linalg.matrix_norm(a, "nuc")
        torch.linalg.matrix_power(a, 3) | torch.linalg.matrix_power(a, -2) | torch.linalg.norm(x) | torch.linalg.pinv(a) | torch.linalg.qr(a)[1] | torch.linalg.slogdet(a)[1]
        torch.linalg.solve(a, A) | torch.linalg.solve(A, a) | torch.linalg.solve(a, a.mT) | torch.linalg.solve_triangular(a, A, upper=True) | torch.linalg.svd(a)[1] | torch.linalg.svdvals(a)
        torch.linalg.vander(s) | torch.linalg.vector_norm(x, 3) | torch.linalg.vector_norm(x, 1) | torch.linalg.vector_norm(x, math.inf) | torch.logdet(symmetric(a)) | torch.lu_solve(A, *torch.linalg.lu_factor(a))
        torch.matrix_exp(a) | torch.matrix_power(a, 2) | torch.pinverse(a) | torch.slogdet(a)[1] | torch.triangular_solve(A, a)[0] | torch.linalg.householder_product(a, A3.expand(2, 3)) | torch.linalg.tensorsolve(a[0], A3)""",
    "Convolutions, pooling, vision": """
        F.conv1d(sequence, C1, A2) | F.conv2d(image, C2, A2, stride=2, padding=1) | F.conv2d(C2X, c2) | F.conv3d(volume, C3) | F.conv_transpose1d(sequence, C1T) | F.conv_transpose2d(image, C2T, A2, 2)
        nn.Conv1d(3, 4, 2)(sequence) | nn.Conv2d(3, 6, 3, groups=3)(image) | nn.Conv2d(3, 6, 3, padding="same", padding_mode="circular")(image) | nn.Conv3d(2, 2, 2)(volume) | nn.ConvTranspose1d(3, 2, 3)(sequence)
        nn.ConvTranspose2d(3, 2, 3, dilation=2)(image) | F.unfold(image, 2) | F.fold(m[None, :, :4].repeat(1, 4, 1), (3, 3), 2) | F.avg_pool1d(sequence, 2) | F.avg_pool2d(image, 2) | F.avg_pool3d(volume, 2) | F.max_pool1d(sequence, 2)
        F.max_pool2d(image, 2) | F.max_pool2d(image, 3, 2, 1) | F.max_pool3d(volume, 2) | F.lp_pool1d(sequence, 2, 2) | F.lp_pool2d(image.abs(), 3, 2) | F.adaptive_avg_pool1d(sequence, 3)
        F.adaptive_avg_pool2d(image, 4) | F.adaptive_avg_pool3d(volume, 2) | F.adaptive_max_pool1d(sequence, 3) | F.adaptive_max_pool2d(image, 4) | F.adaptive_max_pool3d(volume, 2) | F.max_unpool1d(sequence[..., :3], UNPOOL, 2)
        nn.AvgPool2d(2)(image) | nn.MaxPool1d(2)(sequence) | nn.MaxPool2d(2)(image) | nn.AdaptiveAvgPool1d(2)(sequence) | nn.AdaptiveMaxPool2d(2)(image) | nn.FractionalMaxPool2d(2, 3, _random_samples=HALF)(image)
        nn.LPPool1d(2, 2)(sequence) | F.interpolate(image, scale_factor=2) | F.interpolate(image, 9, mode="bilinear") | F.interpolate(image, 9, mode="bicubic") | F.interpolate(sequence, 5, mode="linear")
        F.interpolate(image, 4, mode="area") | F.interpolate(image, 4, mode="bilinear", antialias=True) | F.interpolate(image, 4, mode="bicubic", antialias=True) | F.interpolate(volume, 5, mode="trilinear") | nn.Upsample(scale_factor=2)(sequence)
        F.pad(x, (1, 1), value=0.3) | F.pad(sequence, (1, 2), "reflect") | F.pad(image, (1, 2, 1, 1), "replicate") | F.pad(image, (1, 2, 1, 1), "circular") | nn.ReflectionPad2d(1)(image) | nn.ReplicationPad1d(1)(sequence) | nn.ZeroPad2d(1)(image)
        nn.ConstantPad1d(1, 0.3)(sequence) | F.pixel_shuffle(image[:, :1].repeat(1, 4, 1, 1), 2) | F.pixel_unshuffle(image, 2) | F.channel_shuffle(image, 3) | F.grid_sample(image, GRID, align_corners=False)
        F.grid_sample(IMAGE, grid, align_corners=False) | F.affine_grid(theta, (2, 3, 4, 4), align_corners=False) | nn.Fold((3, 3), 2)(m[None, :, :4].repeat(1, 4, 1)) | nn.Unfold(2)(image) | nn.PixelShuffle(1)(image) | nn.ChannelShuffle(3)(image)""",
    "Normalization": """
        F.layer_norm(x, (4,), V, V) | F.rms_norm(x, (4,), V) | F.group_norm(image, 3, A3, A3) | F.group_norm(image, 1) | F.batch_norm(x, A3, P3, A3, A3) | F.batch_norm(image, None, None, A3, training=True)
        F.instance_norm(image) | F.instance_norm(image, A3, P3, use_input_stats=False) | F.local_response_norm(image, 2) | nn.LayerNorm(4)(x) | nn.RMSNorm(4)(x) | nn.GroupNorm(3, 3)(image) | nn.BatchNorm1d(3)(x)
        nn.BatchNorm2d(3)(image) | nn.InstanceNorm1d(3)(x) | nn.InstanceNorm2d(3)(image) | nn.LocalResponseNorm(2)(image) | nn.BatchNorm1d(3).train()(x) | nn.BatchNorm1d(3, track_running_stats=False)(x)
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))(x)""",
    "Attention, recurrence, embeddings": """
        F.scaled_dot_product_attention(x, x, x) | F.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True) | F.scaled_dot_product_attention(x, x, x, MASK33)
        nn.MultiheadAttention(4, 2, batch_first=True)(x, x, x)[0] | nn.MultiheadAttention(4, 2)(x, x, x)[0] | nn.MultiheadAttention(4, 2, batch_first=True)(x, x, x, need_weights=False)[0]
        nn.MultiheadAttention(4, 2, batch_first=True)(x, x, x, attn_mask=CAUSAL3, need_weights=False)[0] | nn.MultiheadAttention(4, 2, batch_first=True)(x, x, x, key_padding_mask=PADDING)[0] | nn.MultiheadAttention(4, 2, batch_first=True)(x, Y, Y)[0]
        nn.MultiheadAttention(4, 2, batch_first=True)(x, x, x, average_attn_weights=False)[1] | nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)(x) | nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, norm_first=True, activation="gelu")(x)
        nn.TransformerEncoderLayer(4, 2, 8)(x) | nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)(x, CAUSAL3) | nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)(x, src_key_padding_mask=PADDING) | nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2)(x)
        nn.TransformerDecoderLayer(4, 2, 8, batch_first=True)(x, Y) | nn.Transformer(4, 2, 1, 1, 8, batch_first=True)(x, Y) | nn.RNN(4, 3, batch_first=True)(x)[0] | nn.RNN(4, 3, 2, nonlinearity="relu")(x)[0] | nn.GRU(4, 3, batch_first=True)(x)[0]
        nn.GRU(4, 3, 2, bidirectional=True)(x)[0] | nn.LSTM(4, 3, batch_first=True)(x)[0] | nn.LSTM(4, 3, 2, bidirectional=True)(x)[0] | nn.LSTM(4, 3)(x)[1][1] | nn.LSTM(4, 3, proj_size=2)(x)[0] | nn.RNNCell(4, 3)(m) | nn.GRUCell(4, 3)(m) | nn.LSTMCell(4, 3)(m)[0]
        F.embedding(IDS, m) | F.embedding_bag(IDS[None], m) | nn.EmbeddingBag(3, 4)(IDS[None]) + s.sum()""",
    "Losses": """
        F.binary_cross_entropy(u, U) | F.binary_cross_entropy_with_logits(x, U) | F.cosine_embedding_loss(m, m * 2 + M, SIGNS) | F.cross_entropy(m, CLASSES) | F.cross_entropy(m, CLASSES, V.abs(), label_smoothing=0.1) | F.cross_entropy(x, IDS24, ignore_index=1)
        F.cross_entropy(m, M.softmax(-1)) | F.ctc_loss(x.log_softmax(-1), CTC, (2,) * 3, (1,) * 3) | F.gaussian_nll_loss(x, Y, P) | F.hinge_embedding_loss(x, SIGNS[:, None]) | F.huber_loss(x, Y, delta=0.5) | F.kl_div(x, U) | F.kl_div(x.log_softmax(-1), Y.log_softmax(-1), log_target=True)
        F.l1_loss(x, Y) | F.margin_ranking_loss(s, A3, SIGNS) | F.mse_loss(x, Y) | F.mse_loss(Y, x, reduction="sum") | F.multi_margin_loss(m, CLASSES) | F.multilabel_margin_loss(m, MULTILABEL) | F.multilabel_soft_margin_loss(m, U[0]) | F.nll_loss(m.log_softmax(-1), CLASSES)
        F.poisson_nll_loss(x, U) | F.smooth_l1_loss(x, Y) | F.soft_margin_loss(x, SIGNS[:, None]) | F.triplet_margin_loss(m, M, M * 2) | F.triplet_margin_with_distance_loss(m, M, M * 2) | nn.CrossEntropyLoss()(m, CLASSES) | nn.MSELoss()(x, Y) | nn.BCELoss()(u, U)
        nn.BCEWithLogitsLoss()(x, U) | nn.L1Loss()(x, Y) | nn.SmoothL1Loss()(x, Y) | nn.HuberLoss()(x, Y) | nn.KLDivLoss()(x, U) | nn.NLLLoss()(m, CLASSES) | nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2])(m, CLASSES)[1] | nn.MultiMarginLoss()(m, CLASSES)""",
    "Writes": """
        written(x) | torch.add(x, x, out=torch.empty_like(x)) | torch.matmul(x, W, out=x.new_empty(2, 3, 5)) | torch.max(x, 1, out=(x.new_empty(2, 4), IDS24 + 0))[0] | x.clone().add_(x) | x.clone().addcmul_(x, x) | x.clone().clamp_(-0.4, 0.5)
        x.clone().cumsum_(0) | x.clone().div_(P) | x.clone().exp_() | x.clone().fill_(0.3) + x | x.clone().index_add_(1, IDS, x) | x.clone().lerp_(Y, 0.3) | x.clone().masked_fill_(MASK, 0.3) | x.clone().mul_(x) | x.clone().pow_(2) | x.clone().relu_()
        x.clone().scatter_(2, IDS3, x) | x.clone().sub_(Y) | x.clone().tanh_() | x.clone().tril_() | x.clone().uniform_() | x.clone().zero_() + x | x.clone().remainder_(0.31) | F.elu_(x.clone()) | torch.empty_like(Y).copy_(x) | torch.add(x, x, out=torch.empty_like(Y))""",
}


def spread(*shape: int, low: float, step: float, seed: int) -> Tensor:
    """Numbers at equal distances in random order, so that no branch is near."""
    count = math.prod(shape)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return (low + step * order.double()).view(shape)


def drawn(*shape: int, seed: int) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Modules:
    """torch.nn, whose modules are made in float64 and evaluation mode, with random weights and biases."""

    utils = nn.utils

    def __getattr__(self, name: str) -> Callable[..., nn.Module]:
        """A module's constructor."""

        def build(*args: object, **options: object) -> nn.Module:
            module = getattr(nn, name)(*args, **options).double().eval()
            for parameter in module.parameters():
                parameter.data = 0.6 * torch.randn_like(parameter)
            return module

        return build


def written(x: Tensor) -> Tensor:
    """What hooks do: a part replaced, a list of places doubled."""
    x = x.clone()
    x[:, 0] = x[:, 1] * x[:, 2]
    x[:, [1, 2]] *= 2
    return x


def symmetric(a: Tensor) -> Tensor:
    """A positive definite matrix."""
    return a @ a.mT + torch.eye(a.shape[-1], dtype=a.dtype)


# What a series may run through, by name.
INPUTS = {
    "x": spread(2, 3, 4, low=-1.163, step=0.1, seed=1),
    "u": spread(2, 3, 4, low=0.31, step=0.018, seed=2),
    "p": spread(2, 3, 4, low=1.237, step=0.1, seed=3),
    "s": spread(3, low=-0.463, step=0.5, seed=4),
    "m": spread(3, 4, low=-0.963, step=0.19, seed=5),
    "a": drawn(2, 3, 3, seed=6) + 2 * torch.eye(3, dtype=torch.float64),
    "image": spread(2, 3, 6, 6, low=-5.413, step=0.05, seed=7),
    "sequence": spread(2, 3, 8, low=-1.163, step=0.05, seed=8),
    "volume": spread(1, 2, 4, 4, 4, low=-1.163, step=0.02, seed=9),
    "c2": drawn(2, 3, 2, 2, seed=10),
    "grid": spread(2, 2, 2, 2, low=-0.69, step=0.08, seed=11),
    "theta": drawn(2, 2, 3, seed=12),
}
CONSTANTS = {
    "Y": spread(2, 3, 4, low=-1.113, step=0.1, seed=21),
    "P": spread(2, 3, 4, low=0.71, step=0.09, seed=22),
    "U": spread(2, 3, 4, low=0.02, step=0.04, seed=23),
    "N": torch.arange(4.0, dtype=torch.float64),
    "V": drawn(4, seed=24),
    "W": drawn(4, 5, seed=25),
    "M": spread(3, 4, low=-1.1, step=0.2, seed=26),
    "A": drawn(2, 3, 3, seed=27) + 2 * torch.eye(3, dtype=torch.float64),
    "A2": drawn(2, seed=28),
    "A3": drawn(3, seed=29),
    "P3": drawn(3, seed=29).abs() + 0.5,
    "BILINEAR": drawn(3, 4, 4, seed=30),
    "C1": drawn(2, 3, 3, seed=31),
    "C2": drawn(2, 3, 2, 2, seed=32),
    "C2X": drawn(2, 3, 5, 5, seed=33),
    "C3": drawn(2, 2, 2, 2, 2, seed=34),
    "C1T": drawn(3, 2, 3, seed=35),
    "C2T": drawn(3, 2, 3, 3, seed=36),
    "IMAGE": drawn(2, 3, 4, 4, seed=37),
    "GRID": 0.4 * drawn(2, 4, 4, 2, seed=38),
    "HALF": torch.full((2, 3, 2), 0.4, dtype=torch.float64),
    "UNPOOL": torch.arange(0, 6, 2).expand(2, 3, 3),
    "MASK": drawn(3, 4, seed=39) > 0,
    "MASK33": torch.tensor([[True, False, True], [True, True, False], [False, True, True]]),
    "CAUSAL3": torch.triu(torch.ones(3, 3, dtype=torch.bool), 1),
    "PADDING": torch.tensor([[False, False, True], [False, False, False]]),
    "IDS": torch.tensor([2, 0, 2]),
    "IDS1": torch.tensor([1, 0, 2]),
    "IDS4": torch.tensor([1, 0, 2, -1]),
    "IDS3": torch.tensor([[[0, 3], [1, 2], [2, 0]]] * 2),
    "IDS24": torch.tensor([[0, 1, 2, 1], [2, 2, 1, 0]]),
    "CLASSES": torch.tensor([3, 0, 1]),
    "CTC": torch.tensor([[1], [2], [1]]),
    "SIGNS": torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64),
    "MULTILABEL": torch.tensor([[1, 0, -1, 2], [3, -1, 0, 0], [0, 1, 2, 3]]),
}
NAMES = {
    **CONSTANTS,
    "torch": torch,
    "F": F,
    "nn": Modules(),
    "math": math,
    "written": written,
    "symmetric": symmetric,
    "x_like": lambda x: x * 0.3 + 0.2,
}


def calls() -> dict[str, str]:
    """Every call, with its group."""
    return {
        call.strip(): group
        for group, text in GROUPS.items()
        for line in text.splitlines()
        for call in line.split(" | ")
        if call.strip()
    }


def function_of(call: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A call as a function of its input, with the same random weights each time, and a center for it."""
    name = next(word for word in re.findall(r"(?<![\w.\"])[a-z]\w*", call) if word in INPUTS)
    f = eval(f"lambda {name}: {call}", dict(NAMES))

    def seeded(value: Tensor) -> Tensor:
        torch.manual_seed(1)
        return f(value)

    return seeded, INPUTS[name]


def fitted(f: Callable[[Tensor], Tensor], center: Tensor, direction: Tensor, width: float, nodes: int = 13) -> Tensor:
    """Coefficients of t -> f(center + t direction) of the polynomial through its values at Chebyshev's nodes."""
    t = torch.cos(math.pi * (torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes)
    values = torch.stack([f(center + width * node * direction).detach() for node in t])
    powers = torch.linalg.vander(t)
    found = torch.linalg.solve(powers, values.reshape(nodes, -1).double())
    scale = width ** -torch.arange(nodes, dtype=torch.float64)
    return (found * scale.unsqueeze(1))[: ORDER + 1].view(ORDER + 1, *values.shape[1:])


@torch.no_grad()
def through(call: str) -> Tensor | str:
    """The coefficients that a call gives for a series, or why it is refused."""
    f, center = function_of(call)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = f(Series.line(center, direction_at(center), ORDER))
        except NotImplementedError as error:
            operation = re.search(r"rule; (?:aten|prims)\.(\S+?)\.\w+ has none", str(error))
            return f"`{operation[1]}` has no rule" if operation else str(error).split(".")[0]
        except TypeError as error:
            return "writes into a plain tensor" if "written into" in str(error) else str(error).splitlines()[0]
        except RuntimeError as error:
            return str(error).splitlines()[0].split(".")[0]
    if isinstance(found, Series):
        return found.coefficients
    # A function that is constant between its jumps, such as floor: a plain tensor.
    return torch.cat([found[None], found.new_zeros(ORDER, *found.shape)])


def direction_at(center: Tensor) -> Tensor:
    """Where the line through a center leads."""
    return 0.5 * torch.tanh(drawn(*center.shape, seed=50))


@torch.no_grad()
def difference(call: str, found: Tensor) -> float:
    """How far coefficients are from those of the fitted polynomial, of the width that suits the call best."""
    f, center = function_of(call)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fits = (fitted(f, center, direction_at(center), width) for width in (0.5, 0.2, 0.08, 0.03))
        return min(_error(found, fit) for fit in fits)


def _error(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape or not torch.isfinite(found).all() or not torch.isfinite(expected).all():
        return math.inf
    return max((a - b).abs().max().item() / (1 + b.abs().max().item()) for a, b in zip(found, expected, strict=True))


def page(refused: dict[str, str]) -> str:
    """The page of the reference, given why calls are refused."""
    groups = calls()
    lines = [
        "# What jets go through",
        "",
        f"{len(groups) - len(refused)} of {len(groups)} calls of PyTorch's functions and modules that were tried, each at",
        "orders 0 to 4 against a polynomial fitted to values of the same call. Modules are in evaluation mode. What is not",
        "listed may work as well: an operation without a rule of its own is taken apart as PyTorch does it. One that cannot",
        "be is refused with its name, and nothing is left out silently. Functions with branches (`relu`, `max`, `%`, `sort`)",
        "follow the branch of the center.",
        "",
        f"Generated with torch {TORCH} by `python docs/supported_functions.py`; a test keeps it in step.",
    ]
    for group in GROUPS:
        names = [_name(call) for call in groups if groups[call] == group and call not in refused]
        lines += ["", f"## {group}", "", ", ".join(f"`{name}`" for name in dict.fromkeys(names)) + "."]
        reasons = [
            f"| `{call.replace('|', ' ')}` | {refused[call]} |"
            for call in groups
            if groups[call] == group and call in refused
        ]
        lines += ["", "| refused | why |", "|---|---|", *reasons] if reasons else []
    return "\n".join(lines) + "\n"


def _name(call: str) -> str:
    found = re.match(r"(torch|F|nn)[\w.]*(?=\()", call)
    return found[0] if found else call


def main() -> int:
    """Try all calls and write the page; the exit status is 1 if a number is wrong."""
    results = {call: through(call) for call in calls()}
    wrong = {
        call: error
        for call, found in results.items()
        if isinstance(found, Tensor) and not (error := difference(call, found)) < TOLERANCE
    }
    for call, error in wrong.items():
        print(f"{call} differs from the fit by {error:.1e}.")
    PAGE.write_text(page({call: why for call, why in results.items() if isinstance(why, str)}), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
