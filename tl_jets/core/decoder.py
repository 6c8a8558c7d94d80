r"""The decoder of a model: final norm, unembedding, output transform, and the geometry of its logits.

A model ends in

.. math::
    \text{logits} = \tau\bigl(a \, (U^\top \gamma_{L+1}(h_L) + b_U)\bigr),

with the final norm :math:`\gamma_{L+1}`, a logit scale a (Granite, Cohere; 1 for most models) and an elementwise
increasing, nonlinear :math:`\tau` (Gemma 2's softcap; the identity for most models). **Additive logits** are those
before :math:`\tau`, with the scale: the additive logits of a sum of states are the sum of their additive logits.
Probabilities, KL, top-1 and ranks are taken after :math:`\tau`.

A term of an expansion carries a multiple :math:`s` of :math:`b_U`. With :math:`\tilde x = (x, s)` and
:math:`\tilde U = a [U; b_U]` its logits are :math:`\tilde U^\top \tilde x`, and lengths and angles between logit
vectors need no vocabulary-sized tensor:

.. math::
    \langle \tilde U^\top \tilde x, \tilde U^\top \tilde y \rangle = \tilde x^\top G \tilde y, \qquad
    G = \tilde U \tilde U^\top .

Centered over the vocabulary, :math:`G_c = G - V \bar u \bar u^\top` with :math:`\bar u` the mean column of
:math:`\tilde U`. :math:`G_c` is computed first, from centered columns, and the mean is added to get G: the subtraction
would lose digits where logits share a large offset (GPT-2: about -100).

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

Source: Chen et al. (arXiv 2410.06024), eq. 3, and the footnotes on decoding terms. Cost: both metrics together are
about d_model^2 * d_vocab multiply-adds in float64, once per decoder (a few forward passes of GPT-2 small).

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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.calculus import Norm
from tl_jets.calculus.modes import refuse_autocast
from tl_jets.core.changes import Watch
from tl_jets.core.free_memory import free_bytes
from tl_jets.core.metric import Gram, Metric, added, products

# Number of columns of W_U converted to another dtype at a time: about 32 MB.
CONVERTED_ELEMENTS = 2**22
# Rows for which converting takes as long as the product, and the number then converted at a time: what stays in cache.
FEW, FEW_ELEMENTS = 64, 2**18
# Part of a device's free memory that converted columns may take.
CONVERTED_SHARE = 8
LOGITS_UNIT, SOFTCAP_UNIT = "logits", "logits before the softcap"
# Inner products of up to d_model / FEW_VECTORS vectors are taken of their logits, which cost less than the metric.
FEW_VECTORS = 4
# Number of rows of the Gram matrix computed at a time, on and below the diagonal only.
PANEL = 192


@dataclass(frozen=True, eq=False)
class Decoder:
    """Maps the final stream to logits: `transform(logit_scale * (norm(h) @ W_U + b_U))`.

    Attributes:
        norm: The final norm; `Norm("none")` without one.
        W_U: The unembedding, contiguous or a transposed view [d_model, d_vocab].
        b_U: Its bias [d_vocab].
        transform: The softcap, elementwise and strictly increasing, or None. A transform that only multiplies is moved
            into `logit_scale`.
        logit_scale: Factor of the logits, not contained in W_U and b_U.

    Raises:
        ValueError: The shapes of `W_U` and `b_U` do not match.
    """

    norm: Norm
    W_U: Float[Tensor, "d_model d_vocab"] = field(repr=False)
    b_U: Float[Tensor, " d_vocab"] = field(repr=False)  # noqa: N815
    transform: Callable[[Tensor], Tensor] | None = None
    logit_scale: float = 1.0
    # By the state of the weights; only the last one is kept.
    _metrics: dict[int, tuple[Metric, Metric]] = field(default_factory=dict, init=False, repr=False)
    _means: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)
    # Number of vectors whose inner products were taken.
    _asked: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    _biases: dict[int, bool] = field(default_factory=dict, init=False, repr=False)
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
    def watched(self) -> tuple[Watch, tuple[list[Tensor], tuple[()]]]:
        """What tells whether the weights have changed, and the weights, as `tl_jets.core.changes.numbers` takes them."""
        return self._watch, ([self.W_U, self.b_U], ())

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.W_U.shape[0]

    @property
    def d_vocab(self) -> int:
        """Size of the vocabulary."""
        return self.W_U.shape[1]

    @property
    def has_bias(self) -> bool:
        """Whether `b_U` is not zero everywhere; computed once for the same weights."""
        now = self._now()
        if now not in self._biases:
            self._biases.clear()
            self._biases[now] = bool(self.b_U.any())
        return self._biases[now]

    @property
    def unit(self) -> str:
        """Unit of additive logits and of their parts: "logits", or "logits before the softcap"."""
        return LOGITS_UNIT if self.transform is None else SOFTCAP_UNIT

    def logits(
        self, states: Float[Tensor, "*rows d_model"], bias_weight: float | Float[Tensor, "*#rows"] = 1.0
    ) -> Float[Tensor, "*rows d_vocab"]:
        """Additive logits of normalized states: `logit_scale * (states @ W_U + bias_weight * b_U)`. Differentiable.

        Args:
            states: Outputs of the final norm, or terms of its expansion [*rows, d_model].
            bias_weight: Multiple of `b_U`: a number, or one per row [*rows].

        Returns:
            Logits [*rows, d_vocab], in the dtype `compute_dtype(states)`.

        Raises:
            ValueError: The width of `states` is not d_model.
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
        """Write `logit_scale * states @ W_U` to `out` in its dtype, without copying `W_U`."""
        refuse_autocast(self.W_U.device)
        states = self.scaled(states.to(out.dtype))
        if self.W_U.dtype == out.dtype:
            torch.mm(states, self.W_U, out=out)
            return
        for start, columns in self.columns(out.dtype, few=len(states) <= FEW):
            torch.mm(states, columns, out=out[:, start : start + columns.shape[1]])

    def constant(self, bias: Float[Tensor, " d_model"] | None, dtype: torch.dtype) -> Float[Tensor, " d_vocab"]:
        """Contribution of biases to all logits: `logit_scale * (bias @ W_U + b_U)`."""
        constant = self.scaled(self.b_U.to(dtype, copy=True))
        if bias is not None and bias.any():
            product = torch.empty(1, self.d_vocab, dtype=dtype, device=self.W_U.device)
            self.project(bias.unsqueeze(0), product)
            constant += product[0]
        return constant

    def transformed(self, logits: Float[Tensor, "*cells d_vocab"]) -> Float[Tensor, "*cells d_vocab"]:
        """The model's own logits from additive logits: after `transform`."""
        return logits if self.transform is None else self.transform(logits).to(logits.dtype)

    def scaled(self, values: Tensor) -> Tensor:
        """Values times `logit_scale`."""
        return values if self.logit_scale == 1 else values * self.logit_scale

    def columns(self, dtype: torch.dtype, *, few: bool = False):
        """Yield (first token id, columns of `W_U` in `dtype`, unscaled) in chunks, on a CPU small ones for `few` rows."""
        width = max(1, self._chunk(dtype, few) // self.d_model)
        for start in range(0, self.d_vocab, width):
            yield start, self.W_U[:, start : start + width].to(dtype)

    def converted(self, dtype: torch.dtype) -> Decoder:
        """This decoder with `W_U` in `dtype`, for many products; itself on a CPU, or where the device has no room."""
        if self.W_U.dtype == dtype or self.W_U.device.type == "cpu":
            return self
        if self.W_U.numel() > self._converted_elements(dtype):
            return self
        return replace(self, W_U=self.W_U.to(dtype))

    def _chunk(self, dtype: torch.dtype, few: bool) -> int:
        return FEW_ELEMENTS if few and self.W_U.device.type == "cpu" else self._converted_elements(dtype)

    def _converted_elements(self, dtype: torch.dtype) -> int:
        """How many numbers are converted at once: what stays in a CPU's cache, or a share of a device's free memory."""
        device = self.W_U.device
        free = None if device.type == "cpu" else free_bytes(device)
        return max(CONVERTED_ELEMENTS, (free or 0) // CONVERTED_SHARE // dtype.itemsize)

    def compute_dtype(self, states: Tensor) -> torch.dtype:
        """Float64 if the states or the weights are float64, else float32 (also for half-precision models)."""
        return torch.promote_types(torch.promote_types(states.dtype, self.W_U.dtype), torch.float32)

    def check_states(self, states: Tensor) -> None:
        """Raise ValueError unless the last dimension of `states` is d_model."""
        if states.ndim == 0 or states.shape[-1] != self.d_model:
            raise ValueError(
                f"States must have d_model = {self.d_model} as their last dimension, got shape {tuple(states.shape)}. "
                "Pass what the unembedding reads (after the final norm), not logits."
            )

    def _factor(self, transform: Callable[[Tensor], Tensor]) -> float | None:
        """The factor by which a transform multiplies logits; None if it is not linear (a softcap)."""
        probe = torch.linspace(-100, 100, self.d_vocab + 1, dtype=torch.float64, device=self.W_U.device)[1:]
        with torch.no_grad():
            mapped = transform(probe.clone()).double()
        scale = float(mapped[-1] / probe[-1])
        return scale if torch.allclose(mapped, scale * probe, rtol=1e-6, atol=0) else None

    def metric(self, centered: bool) -> Metric:
        """Metric of logit vectors in float64 on the device of `W_U`, kept until `W_U` or `b_U` changes.

        Args:
            centered: Subtract each logit vector's mean over the vocabulary, which the softmax ignores.
        """
        now = self._now()
        if now not in self._metrics:
            self._metrics.clear()
            self._metrics[now] = self._both_metrics(self._mean(now))
        return self._metrics[now][int(centered)]

    def grams(self, *vectors: Float[Tensor, "... d_model_and_bias"]) -> tuple[Gram, Gram]:
        """Inner products of the plain and of the centered logits of each two of some vectors (x, s), float64.

        Rows broadcast. Few vectors are read through their logits, until as many were asked for as pay for the metric.
        """
        now = self._now()
        mean, asked = self._mean(now), self._asked.pop(now, 0) + sum(len(v.flatten(0, -2)) for v in vectors)
        self._asked.clear()
        self._asked[now] = asked
        with torch.no_grad():
            if now in self._metrics or asked * FEW_VECTORS > self.d_model:
                gram = self.metric(centered=True).gram
                centered = products([v @ gram for v in vectors], vectors)
            else:
                centered = self._products_of_logits(mean, vectors)
            means = [v @ self.scaled(mean * self.d_vocab**0.5) for v in vectors]
        return added(centered, products(*[[x[..., None] for x in means]] * 2)), centered

    def _products_of_logits(self, mean: Tensor, vectors: Sequence[Tensor]) -> Gram:
        """Inner products of centered logits, by chunks of the vocabulary that stay in cache."""
        flat = self.scaled(torch.cat([v.flatten(0, -2) for v in vectors]))
        sizes, found = [len(v.flatten(0, -2)) for v in vectors], None
        for chunk in self._centered_columns(mean, few=True):
            parts = zip((flat @ chunk).split(sizes), vectors, strict=True)
            logits = [part.view(*v.shape[:-1], -1) for part, v in parts]
            more = products(logits, logits)
            found = more if found is None else added(found, more)
        assert found is not None
        return found

    def mean_column(self) -> Float[Tensor, " d_model_and_bias"]:
        """Mean over the vocabulary of the columns of [W_U; b_U], unscaled, in float64; kept until they change."""
        return self._mean(self._now())

    def _now(self) -> int:
        """The number of the state of the weights."""
        return self._watch.number([self.W_U, self.b_U])

    def _mean(self, now: int) -> Tensor:
        if now not in self._means:
            self._means.clear()
            with torch.no_grad():
                # In chunks: `mean(dtype=...)` would convert all of W_U at once.
                total = sum(columns.sum(1) for _, columns in self.columns(torch.float64, few=True))
                total = torch.as_tensor(total, device=self.W_U.device)
                self._means[now] = torch.cat([total, self.b_U.double().sum()[None]]) / self.d_vocab
        return self._means[now]

    def _both_metrics(self, mean: Tensor) -> tuple[Metric, Metric]:
        with torch.no_grad():
            gram = torch.zeros(self.d_model + 1, self.d_model + 1, dtype=torch.float64, device=self.W_U.device)
            for chunk in self._centered_columns(mean):
                add_gram(gram, chunk)
            gram = self.scaled(self.scaled(gram.tril() + gram.tril(-1).T))
            mean = self.scaled(mean * self.d_vocab**0.5)
            return Metric(gram + torch.outer(mean, mean), False, mean), Metric(gram, True, mean)

    def _centered_columns(
        self, mean: Tensor, *, few: bool = False
    ) -> Iterator[Float[Tensor, "d_model_and_bias columns"]]:
        """Columns of [W_U; b_U] minus their mean, in float64, in chunks that share one buffer; as `columns`."""
        size = self.d_model + 1
        width = max(PANEL, self._chunk(torch.float64, few) // size)
        buffer = torch.empty(size * min(width, self.d_vocab), dtype=torch.float64, device=self.W_U.device)
        tied = self.W_U.stride(0) < self.W_U.stride(1)
        for start in range(0, self.d_vocab, width):
            stop = min(start + width, self.d_vocab)
            # In the memory layout of W_U: a transposing copy is as slow as the product.
            chunk = buffer[: size * (stop - start)]
            chunk = chunk.view(stop - start, size).T if tied else chunk.view(size, stop - start)
            chunk[:-1] = self.W_U[:, start:stop]
            chunk[-1] = self.b_U[start:stop]
            chunk -= mean.unsqueeze(1)
            yield chunk


def exact_logits(decoder: Decoder, states: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
    """The model's own logits of some rows, in float64."""
    logits = torch.empty(len(states), decoder.d_vocab, dtype=torch.float64, device=states.device)
    decoder.project(states.double(), logits)
    return decoder.transformed(logits.add_(decoder.constant(None, torch.float64)))


def in_unit(unit: str) -> str:
    """Suffix that states a unit after a measured quantity; empty for plain logits."""
    return "" if unit == LOGITS_UNIT else f", in {unit}"


def add_gram(gram: Tensor, columns: Tensor) -> None:
    """Add `columns @ columns.T` to the lower triangle of `gram` in place, with half the work of the full product; float64."""
    for row in range(0, len(gram), PANEL):
        gram[row:, row : row + PANEL].addmm_(columns[row:], columns[row : row + PANEL].T)
