r"""The decoder of a model: final norm, unembedding, the model's own last transform, and the geometry of its logits.

A model ends in

.. math::
    \text{logits} = \tau\bigl(a \, (U^\top \gamma_{L+1}(h_L) + b_U)\bigr),

with the final norm :math:`\gamma_{L+1}`, a logit scale a (Granite, Cohere; 1 for most models) and an elementwise increasing
:math:`\tau` that bends (Gemma 2's softcap; most models have none). What comes before :math:`\tau` is additive: the logits of a
sum of states are the sum of their logits. So the two are kept apart. **Additive logits** are those before :math:`\tau`, the
scale included: the model's own wherever it has no softcap. Probabilities, KL, top-1 and ranks are after it.

A term of an expansion carries a multiple :math:`s` of :math:`b_U`. With :math:`\tilde x = (x, s)` and
:math:`\tilde U = a [U; b_U]` its logits are :math:`\tilde U^\top \tilde x`, and lengths and angles between logit vectors
need no vocabulary-sized tensor:

.. math::
    \langle \tilde U^\top \tilde x, \tilde U^\top \tilde y \rangle = \tilde x^\top G \tilde y, \qquad
    G = \tilde U \tilde U^\top .

Centered over the vocabulary (the softmax does not see a constant), :math:`G_c = G - V \bar u \bar u^\top` with
:math:`\bar u` the mean column of :math:`\tilde U`. We compute :math:`G_c` first, from centered columns, then add the mean
back: the subtraction would cancel digits where logits share a large offset (GPT-2: about -100).

==============================  ================================
symbol                          name here
==============================  ================================
:math:`U`, :math:`b_U`          `W_U` [d_model, d_vocab], `b_U`
:math:`\gamma_{L+1}`            `norm`
a                               `logit_scale`
:math:`\tau`                    `transform`
:math:`s`                       `bias_weight`
:math:`G`, :math:`G_c`          `metric(centered).gram`
:math:`V`                       `d_vocab`
==============================  ================================

Source: Chen et al. (arXiv 2410.06024), eq. 3, and the footnotes on decoding terms. Cost: both metrics together are about
d_model^2 * d_vocab multiply-adds in float64, once per decoder (a few forward passes of GPT-2 small).

Example:
    >>> import torch
    >>> from tl_jets.calculus import Norm
    >>> _ = torch.manual_seed(0)
    >>> decoder = Decoder(norm=Norm("LN"), W_U=torch.randn(4, 7), b_U=torch.randn(7))
    >>> x, y = torch.randn(2, 4)
    >>> metric = decoder.metric(centered=False)
    >>> by_hand = torch.cosine_similarity(decoder.logits(x), decoder.logits(y), dim=-1)
    >>> bool(torch.isclose(metric.cosine(x, y).float(), by_hand))
    True
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from scipy.linalg import get_blas_funcs
from torch import Tensor

from tl_jets.calculus import Norm
from tl_jets.calculus.modes import refuse_autocast
from tl_jets.core.changes import Watch

# Columns of the vocabulary converted at a time where the weights need another dtype: about 32 MB of them.
CONVERTED_ELEMENTS = 2**22
LOGITS_UNIT, SOFTCAP_UNIT = "logits", "logits before the softcap"
# Rows of the Gram matrix computed at a time: only the panels on and below the diagonal, so about half of the product.
PANEL = 192


@dataclass(frozen=True, eq=False)
class Metric:
    """Inner products of logit vectors, computed from d_model-sized vectors.

    A logit vector is `logit_scale * (x @ W_U + bias_weight * b_U)`. With `centered`, its mean over the vocabulary is
    taken off first.

    Attributes:
        gram: G or G_c in float64; its last row and column belong to `b_U`. Shape [d_model + 1, d_model + 1].
        centered: Whether logits are centered over the vocabulary.
        mean: sqrt(V) times the mean column: G = G_c + mean mean'. Shape [d_model + 1].
    """

    gram: Float[Tensor, "d_model_and_bias d_model_and_bias"]
    centered: bool
    mean: Float[Tensor, " d_model_and_bias"]

    def augment(
        self, states: Float[Tensor, "*rows d_model"], bias_weight: float | Float[Tensor, "*#rows"] = 0.0
    ) -> Float[Tensor, "*rows d_model_and_bias"]:
        """Append the multiple of `b_U` to normalised states, in float64.

        Args:
            states: What is multiplied by `W_U`. Shape [*rows, d_model].
            bias_weight: The multiple of `b_U` that each carries: a number, or one per row. Shape [*rows].

        Returns:
            Shape [*rows, d_model + 1], float64.

        Raises:
            ValueError: If `states` does not have the metric's d_model.
        """
        d_model = self.gram.shape[0] - 1
        if states.shape[-1] != d_model:
            raise ValueError(
                f"States must have d_model = {d_model} as their last dimension, got shape {tuple(states.shape)}. "
                "Pass what the unembedding reads, not logits."
            )
        weight = torch.as_tensor(bias_weight, dtype=torch.float64, device=states.device)
        return torch.cat([states.double(), weight.expand(states.shape[:-1]).unsqueeze(-1)], dim=-1)

    def inner(
        self,
        x: Float[Tensor, "*#rows d_model"],
        y: Float[Tensor, "*#rows d_model"],
        x_bias: float | Float[Tensor, "*#rows"] = 1.0,
        y_bias: float | Float[Tensor, "*#rows"] = 1.0,
    ) -> Float[Tensor, "*rows"]:
        """Inner product of the logit vectors of `x` and `y`.

        Args:
            x: Normalised states. Shape [*rows, d_model].
            y: Normalised states, broadcast against `x`. Shape [*rows, d_model].
            x_bias: The multiple of `b_U` in the logits of `x`: a number, or one per row.
            y_bias: Likewise for `y`.

        Returns:
            In logits squared. Shape [*rows], float64.
        """
        return ((self.augment(x, x_bias) @ self.gram) * self.augment(y, y_bias)).sum(-1)

    def norm(
        self, x: Float[Tensor, "*rows d_model"], bias_weight: float | Float[Tensor, "*#rows"] = 1.0
    ) -> Float[Tensor, "*rows"]:
        """Euclidean length of the logit vector of `x`. For a difference pass the difference, with the bias weights' too.

        Args:
            x: Normalised states. Shape [*rows, d_model].
            bias_weight: The multiple of `b_U` in the logits: a number, or one per row.

        Returns:
            In logits. Shape [*rows], float64.
        """
        # Rounding can leave a null vector slightly below zero.
        return self.inner(x, x, bias_weight, bias_weight).clamp_min(0).sqrt()

    def cosine(
        self,
        x: Float[Tensor, "*#rows d_model"],
        y: Float[Tensor, "*#rows d_model"],
        x_bias: float | Float[Tensor, "*#rows"] = 1.0,
        y_bias: float | Float[Tensor, "*#rows"] = 1.0,
    ) -> Float[Tensor, "*rows"]:
        """Cosine of the angle between the logit vectors of `x` and `y`; NaN where one of them is zero.

        Args:
            x: Normalised states. Shape [*rows, d_model].
            y: Normalised states, broadcast against `x`. Shape [*rows, d_model].
            x_bias: The multiple of `b_U` in the logits of `x`: a number, or one per row.
            y_bias: Likewise for `y`.

        Returns:
            Between -1 and 1. Shape [*rows], float64.
        """
        cosine = self.inner(x, y, x_bias, y_bias) / (self.norm(x, x_bias) * self.norm(y, y_bias))
        return cosine.clamp(-1, 1)


@dataclass(frozen=True, eq=False)
class Decoder:
    """How a model turns its last stream into logits: `transform(logit_scale * (norm(h) @ W_U + b_U))`.

    Attributes:
        norm: The final norm; `Norm("none")` without one.
        W_U: The unembedding, contiguous or a transposed view. Shape [d_model, d_vocab].
        b_U: Its bias. Shape [d_vocab].
        transform: The model's own softcap, elementwise and strictly increasing; None without one. One that only multiplies
            is taken into `logit_scale`, and is None then.
        logit_scale: What logits are multiplied by, and W_U and b_U are not yet.

    Raises:
        ValueError: If the shapes of `W_U` and `b_U` do not fit together.
    """

    norm: Norm
    W_U: Float[Tensor, "d_model d_vocab"] = field(repr=False)
    b_U: Float[Tensor, " d_vocab"] = field(repr=False)  # noqa: N815
    transform: Callable[[Tensor], Tensor] | None = None
    logit_scale: float = 1.0
    # By the state of the weights that they are of: the last one only.
    _metrics: dict[int, tuple[Metric, Metric]] = field(default_factory=dict, init=False, repr=False)
    _watch: Watch = field(default_factory=Watch, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.W_U.ndim != 2 or self.b_U.ndim != 1 or self.W_U.shape[1] != self.b_U.shape[0]:
            raise ValueError(
                "W_U must be [d_model, d_vocab] and b_U [d_vocab], got shapes "
                f"{tuple(self.W_U.shape)} and {tuple(self.b_U.shape)}. A Linear's weight is [d_vocab, d_model]: pass its "
                ".T; pass zeros for a model without an unembedding bias."
            )
        factor = None if self.transform is None else self._factor(self.transform)
        if factor is not None:
            object.__setattr__(self, "transform", None)
            object.__setattr__(self, "logit_scale", self.logit_scale * factor)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.W_U.shape[0]

    @property
    def d_vocab(self) -> int:
        """Size of the vocabulary."""
        return self.W_U.shape[1]

    @property
    def unit(self) -> str:
        """What additive logits, and all that is a part of them, are measured in: logits, or logits before the softcap."""
        return LOGITS_UNIT if self.transform is None else SOFTCAP_UNIT

    def logits(
        self, states: Float[Tensor, "*rows d_model"], bias_weight: float | Float[Tensor, "*#rows"] = 1.0
    ) -> Float[Tensor, "*rows d_vocab"]:
        """Additive logits of normalised states: `logit_scale * (states @ W_U + bias_weight * b_U)`. Differentiable.

        Args:
            states: What the unembedding reads: outputs of the final norm, or terms of its expansion. Shape
                [*rows, d_model].
            bias_weight: The multiple of `b_U` that each carries: a number, or one per row. Shape [*rows].

        Returns:
            Additive logits, in the dtype of `compute_dtype(states)`. Shape [*rows, d_vocab].

        Raises:
            ValueError: If `states` does not have the decoder's d_model.
        """
        self.check_states(states)
        refuse_autocast(self.W_U.device)
        dtype = self.compute_dtype(states)
        rows = self.scaled(states.to(dtype)).reshape(
            -1, self.d_model
        )  # rows: a batched product can be five times slower
        b_U = self.scaled(self.b_U.to(dtype))
        if self.W_U.dtype != dtype:
            logits = torch.cat([rows @ columns for _, columns in self.columns(dtype)], dim=-1)
        elif isinstance(bias_weight, (int, float)):
            logits = torch.addmm(b_U, rows, self.W_U, beta=bias_weight)
            return logits.reshape(*states.shape[:-1], self.d_vocab)
        else:
            logits = rows @ self.W_U
        weight = torch.as_tensor(bias_weight, dtype=dtype, device=states.device).unsqueeze(-1)
        return logits.reshape(*states.shape[:-1], self.d_vocab) + weight * b_U

    def project(self, states: Float[Tensor, "row d_model"], out: Float[Tensor, "row d_vocab"]) -> None:
        """Write `logit_scale * states @ W_U` to `out`, whose dtype is computed in. Never copies `W_U` as a whole.

        Args:
            states: Shape [row, d_model].
            out: Shape [row, d_vocab]; its rows may be padded (a view of a wider buffer).
        """
        refuse_autocast(self.W_U.device)
        states = self.scaled(states.to(out.dtype))
        if self.W_U.dtype == out.dtype:
            torch.mm(states, self.W_U, out=out)
            return
        for start, columns in self.columns(out.dtype):
            torch.mm(states, columns, out=out[:, start : start + columns.shape[1]])

    def constant(self, bias: Float[Tensor, " d_model"] | None, dtype: torch.dtype) -> Float[Tensor, " d_vocab"]:
        """What the biases of the norm and of the unembedding add to every logit vector: `logit_scale * (bias @ W_U + b_U)`.

        Args:
            bias: The final norm's bias; None without one, or to leave it out. Shape [d_model].
            dtype: To compute in.

        Returns:
            Logits. Shape [d_vocab].
        """
        constant = self.scaled(self.b_U.to(dtype, copy=True))
        if bias is not None and bias.any():
            product = torch.empty(1, self.d_vocab, dtype=dtype, device=self.W_U.device)
            self.project(bias.unsqueeze(0), product)
            constant += product[0]
        return constant

    def transformed(self, logits: Float[Tensor, "*cells d_vocab"]) -> Float[Tensor, "*cells d_vocab"]:
        """The model's own logits of additive ones: after `transform`."""
        return logits if self.transform is None else self.transform(logits).to(logits.dtype)

    def scaled(self, values: Tensor) -> Tensor:
        """Values times `logit_scale`; themselves where that is 1."""
        return values if self.logit_scale == 1 else values * self.logit_scale

    def columns(self, dtype: torch.dtype):
        """Yield (first token id, columns of `W_U` as they are, in `dtype`) in chunks, so that no whole copy is made."""
        width = max(1, CONVERTED_ELEMENTS // self.d_model)
        for start in range(0, self.d_vocab, width):
            yield start, self.W_U[:, start : start + width].to(dtype)

    def compute_dtype(self, states: Tensor) -> torch.dtype:
        """Float64 if the states or the weights are, else float32: half-precision models are read in float32."""
        return torch.promote_types(torch.promote_types(states.dtype, self.W_U.dtype), torch.float32)

    def check_states(self, states: Tensor) -> None:
        """Raise ValueError unless the last dimension of `states` is d_model."""
        if states.ndim == 0 or states.shape[-1] != self.d_model:
            raise ValueError(
                f"States must have d_model = {self.d_model} as their last dimension, got shape {tuple(states.shape)}. "
                "Pass what the unembedding reads (after the final norm), not logits."
            )

    def _factor(self, transform: Callable[[Tensor], Tensor]) -> float | None:
        """The factor that a transform multiplies logits with; None if it is not a factor (a softcap)."""
        probe = torch.linspace(-100, 100, self.d_vocab + 1, dtype=torch.float64, device=self.W_U.device)[1:]
        with torch.no_grad():
            mapped = transform(probe.clone()).double()
        scale = float(mapped[-1] / probe[-1])
        return scale if torch.allclose(mapped, scale * probe, rtol=1e-6, atol=0) else None

    def metric(self, centered: bool) -> Metric:
        """The metric of logit vectors, computed at the first call and kept until `W_U` or `b_U` is changed.

        Args:
            centered: Take the mean over the vocabulary off each logit vector: lengths and angles then ignore the
                constant that the softmax ignores.

        Returns:
            The metric, in float64 on the device of `W_U`.
        """
        now = self._watch.number([self.W_U, self.b_U])
        if now not in self._metrics:
            self._metrics.clear()
            self._metrics[now] = self._both_metrics()
        return self._metrics[now][int(centered)]

    def _both_metrics(self) -> tuple[Metric, Metric]:
        with torch.no_grad():
            # By chunks: `mean(dtype=...)` would convert all of W_U at once.
            total = sum(columns.sum(1) for _, columns in self.columns(torch.float64))
            mean = (
                torch.cat([torch.as_tensor(total, device=self.W_U.device), self.b_U.double().sum().unsqueeze(0)])
                / self.d_vocab
            )
            gram = torch.zeros(self.d_model + 1, self.d_model + 1, dtype=torch.float64, device=self.W_U.device)
            for chunk in self._centered_columns(mean):
                _add_gram(gram, chunk)
            gram = self.scaled(self.scaled(gram.tril() + gram.tril(-1).T))
            mean = self.scaled(mean * self.d_vocab**0.5)
            return Metric(gram + torch.outer(mean, mean), False, mean), Metric(gram, True, mean)

    def _centered_columns(self, mean: Tensor) -> Iterator[Float[Tensor, "d_model_and_bias columns"]]:
        """Columns of [W_U; b_U] less their mean, in float64 and in chunks, in one reused buffer."""
        size = self.d_model + 1
        width = max(PANEL, CONVERTED_ELEMENTS // size)
        buffer = torch.empty(size * min(width, self.d_vocab), dtype=torch.float64, device=self.W_U.device)
        tied = self.W_U.stride(0) < self.W_U.stride(1)
        for start in range(0, self.d_vocab, width):
            stop = min(start + width, self.d_vocab)
            # Laid out as W_U is: a copy that transposes takes as long as the product.
            chunk = buffer[: size * (stop - start)]
            chunk = chunk.view(stop - start, size).T if tied else chunk.view(size, stop - start)
            chunk[:-1] = self.W_U[:, start:stop]
            chunk[-1] = self.b_U[start:stop]
            chunk -= mean.unsqueeze(1)
            yield chunk


def in_unit(unit: str) -> str:
    """How a unit is written behind what is measured in it: plain logits need no word."""
    return "" if unit == LOGITS_UNIT else f", in {unit}"


def _add_gram(gram: Tensor, columns: Tensor) -> None:
    """Add `columns @ columns.T` to the lower triangle of `gram`, in place: half the work of the whole product."""
    if gram.device.type == "cpu":
        # BLAS reads Fortran's order, in which the upper triangle of the transpose is the lower one here.
        array = columns.numpy()
        array, transposed = (array, 0) if array.flags.f_contiguous else (array.T, 1)
        syrk: Any = get_blas_funcs("syrk", dtype="float64")
        syrk(1.0, array, trans=transposed, beta=1.0, c=gram.numpy().T, overwrite_c=1)
        return
    for row in range(0, len(gram), PANEL):
        gram[row:, row : row + PANEL].addmm_(columns[row:], columns[row : row + PANEL].T)
