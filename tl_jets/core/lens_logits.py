r"""Tokens, measures and controls of many logit vectors, without holding all logits in memory.

The jet of a final norm mixes two vectors (`tl_jets.calculus.norms`): at every order :math:`k`, the additive logits of
layer :math:`l` at row :math:`r` (one position of one prompt) are

.. math::
    L_{lkr} = \alpha_{lkr} U^\top o_{lr} + \beta_{lkr} U^\top s_r + c, \qquad c = U^\top b + b_U,

and the model's own are :math:`T_r = \gamma_r U^\top s_r + c`. All orders share one product with :math:`U` per layer.
With :math:`p = \mathrm{softmax}(\tau(T))` and :math:`m = \max \tau(L)`,

.. math::
    \mathrm{KL}(p \,\|\, \mathrm{softmax}(\tau(L))) = \textstyle\sum p \log p - p \cdot (\tau(L) - m)
    + \log \sum \exp(\tau(L) - m) .

The **control** of a layer replaces :math:`o_{lr}` by :math:`a_{lr} s_r + q_{lr} n_r`, with one random direction
:math:`n_r` per row, of the same length and angle. Several draws of :math:`n_r` share the scan: a draw costs one more
row of the product, whatever the number of layers.

===================================  ==========================================
symbol                               name here
===================================  ==========================================
:math:`o_{lr}`, :math:`s_r`          `Mixture.own`, `Mixture.shared`
:math:`\alpha, \beta, \gamma`        `Mixture.alpha`, `.beta`, `.gamma`
:math:`b`, :math:`c`                 `Mixture.bias`, `constant`
:math:`n_r`, :math:`a`, :math:`q`    `Control.random`, `.along`, `.across`
:math:`\tau`                         `Decoder.transform`
===================================  ==========================================

Ties in top-k, top-1 and ranks go to the smallest token id. Accuracy: all parts of the KL use the same rounded logits,
so errors enter as :math:`(q - p) \cdot \delta` and vanish with the KL. Float32: 1e-4 relative, 1e-6 nats absolute;
float64: 1e-10. A KL below zero by rounding is returned as zero.

Cost: one product of `layer * row` states with `W_U`, plus about ten passes over `layer * order * row` logits in cache.
Memory: `chunk_size` rows of d_vocab logits, and a few MB.

Example:
    >>> import torch
    >>> from tl_jets.calculus import Norm
    >>> from tl_jets.core.decoder import Decoder
    >>> _ = torch.manual_seed(0)
    >>> decoder = Decoder(norm=Norm("none"), W_U=torch.randn(4, 50), b_U=torch.randn(50))
    >>> h = torch.randn(3, 2, 4)                                          # 3 layers, 2 positions
    >>> zeros, ones = torch.zeros(3, 1, 2), torch.ones(3, 1, 2)
    >>> lens = Mixture(own=h, shared=h[-1], alpha=ones, beta=zeros, gamma=torch.ones(2))   # the logit lens
    >>> scan = scan_mixture(decoder, lens, top_k=3)
    >>> bool((scan.top.indices[:, 0] == decoder.logits(h).topk(3).indices).all()), bool((scan.kl[-1] < 1e-6).all())
    (True, True)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_jets.core.decoder import Decoder
from tl_jets.core.logit_reader import CHUNK_SIZE, MAX_SETS, Reader, TopTokens, check_k, slices
from tl_jets.core.row_checks import check_all_rows, check_shape


@dataclass(frozen=True, eq=False)
class Mixture:
    """Logit vectors that are mixes of two: `alpha * own @ W_U + beta * shared @ W_U + constant`.

    Attributes:
        own: The layer's vector (the center, times the norm's weight).
        shared: The model's final state, times the norm's weight.
        alpha: Coefficient of `own`.
        beta: Coefficient of `shared`.
        gamma: Coefficient of `shared` in the model's own logits.
        bias: The norm's bias.
        final: Index of the layer that is the model itself at every order; it is not read again.
    """

    own: Float[Tensor, "layer row d_model"]
    shared: Float[Tensor, "row d_model"]
    alpha: Float[Tensor, "layer order row"]
    beta: Float[Tensor, "layer order row"]
    gamma: Float[Tensor, " row"]
    bias: Float[Tensor, " d_model"] | None = None
    final: int | None = None

    def __post_init__(self) -> None:
        if self.own.ndim != 3 or self.alpha.ndim != 3:
            raise ValueError(
                "own must be [layer, row, d_model] and alpha [layer, order, row], got shapes "
                f"{tuple(self.own.shape)} and {tuple(self.alpha.shape)}. Flatten batch and position into one row axis."
            )
        for name, given in self.rows().items():
            check_shape(name, *given)

    def rows(self) -> dict[str, tuple[Tensor, tuple[int, ...], str]]:
        """The tensors, with the shapes that they must have."""
        layer, order, row = self.alpha.shape
        d_model = self.own.shape[2]
        tensors = {
            "alpha": (self.alpha, (layer, order, row), "layer, order, row"),
            "shared": (self.shared, (row, d_model), "row, d_model"),
            "beta": (self.beta, (layer, order, row), "layer, order, row"),
            "gamma": (self.gamma, (row,), "row"),
            "own": (self.own, (layer, row, d_model), "layer, row, d_model"),
        }
        if self.bias is not None:
            tensors["bias"] = (self.bias, (d_model,), "d_model")
        return tensors

    def signs(self, control: Control | None) -> tuple[int, Bool[Tensor, "layer row"]]:
        """How many leading orders have no `shared` part, and where alpha is positive at all orders, on the CPU.

        Raises ValueError if the mixture or the control is not finite: all is read at once.
        """
        layer, order, row = self.alpha.shape
        flags = [(self.beta != 0).any(2).any(0), (self.alpha > 0).all(1).flatten()]
        try:
            read = check_all_rows(self.rows() | ({} if control is None else control.rows()), flags)
        except ValueError:
            refuse_overflow(self.alpha.isfinite().all(2).all(0).tolist())
            raise
        borrows = read[:order].tolist()
        return borrows.index(True) if any(borrows) else order, read[order:].view(layer, row)


def refuse_overflow(is_finite: list[bool]) -> None:
    """Raise ValueError that names the order, if order 0 is finite and a higher one is not."""
    if is_finite[:1] == [True] and not all(is_finite):
        first = is_finite.index(False)
        raise ValueError(
            f"order must be at most {first - 1} for this input: at order {first} the series overflows, as it diverges "
            "(rho > 1). Take a lower order, or center_scale='match' or 'orthogonal', whose series converge."
        ) from None


@dataclass(frozen=True, eq=False)
class Control:
    """Random centers for every layer and row: `along * shared + across * random` in place of `own`, for every draw."""

    random: Float[Tensor, "draw row d_model"]
    along: Float[Tensor, "layer row"]
    across: Float[Tensor, "layer row"]

    def __post_init__(self) -> None:
        if self.random.ndim != 3 or self.along.ndim != 2:
            raise ValueError(
                "random must be [draw, row, d_model] and along [layer, row], got shapes "
                f"{tuple(self.random.shape)} and {tuple(self.along.shape)}. One direction serves all layers of a row."
            )
        for name, tensor in self.rows().items():
            check_shape(name, *tensor)

    def rows(self) -> dict[str, tuple[Tensor, tuple[int, ...], str]]:
        """The tensors, with the shapes that they must have."""
        layer, row = self.along.shape
        return {
            "random": (self.random, (len(self.random), row, self.random.shape[2]), "draw, row, d_model"),
            "along": (self.along, (layer, row), "layer, row"),
            "across": (self.across, (layer, row), "layer, row"),
        }

    def check(self, mixture: Mixture, measures: bool) -> None:
        """Raise ValueError unless the control is one of the mixture, and measured."""
        if not measures:
            raise ValueError("A control is read by measures; got measures=False. Pass measures=True or no control.")
        layer, row, d_model = mixture.own.shape
        check_shape("control.random", self.random, (len(self.random), row, d_model), "draw, row, d_model")
        check_shape("control.along", self.along, (layer, row), "layer, row")

    def coefficients(self, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients of `random` and of `shared` in the control's logits, each [layer, order, row, 1]."""
        along, across = (x[:, None, :, None].to(alpha) for x in (self.along, self.across))
        return alpha * across, alpha * along + beta


@dataclass(frozen=True, eq=False)
class Readings:
    """Readings of logit vectors, None where not measured.

    `cells` are [layer, order, row], [row] for the model, [draw, layer, order, row] for the control.

    Attributes:
        top: The best tokens by additive logit [*cells, k].
        log_normalizer: log sum exp of the transformed logits [*cells].
        kl: KL(model || these logits) in nats, after the transform [*cells].
        top1_agreement: Whether the best token is the model's [*cells].
        target_logits: Additive logits of the targets [*cells, target].
        target_ranks: Ranks of the targets, 0 for the best token [*cells, target].
    """

    top: TopTokens
    log_normalizer: Float[Tensor, "*cells"] | None
    kl: Float[Tensor, "*cells"] | None
    top1_agreement: Bool[Tensor, "*cells"]
    target_logits: Float[Tensor, "*cells target"] | None
    target_ranks: Int[Tensor, "*cells target"] | None


@dataclass(frozen=True, eq=False)
class MixtureScan(Readings):
    """Readings of every layer, order and row of a `Mixture`, of the model, and of the control (one top token).

    Attributes:
        own_values: Logits of the tokens in `top` from the own part, `alpha * own @ W_U + constant`.
        own_top1: Best token of the own part; None if not measured.
    """

    own_values: Float[Tensor, "layer order row k"]
    own_top1: Int[Tensor, "layer order row"] | None
    model: Readings
    control: Readings | None


@torch.no_grad()
def scan_mixture(
    decoder: Decoder,
    mixture: Mixture,
    *,
    top_k: int = 5,
    targets: Int[Tensor, " row"] | Int[Tensor, "row target"] | None = None,
    measures: bool = True,
    control: Control | None = None,
    model_logits: Callable[[slice], Float[Tensor, "row d_vocab"]] | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> MixtureScan:
    """Read every layer, order and row of a mixture, in float32, or float64 if the states or the weights are.

    Args:
        decoder: The model's decoder.
        mixture: The logit vectors.
        top_k: Number of best tokens to keep.
        targets: Token ids whose logits and ranks to return [row] or [row, target].
        measures: Whether to compute log-normalizers, KL and the best token of the own part.
        control: The random center, or None. Needs `measures`.
        model_logits: The model's additive logits as a function of a slice of rows, if available.
        chunk_size: Rows of d_vocab logits held at once.

    Raises:
        ValueError: Shapes disagree, no token, a size out of range, or a control without measures.
    """
    decoder.check_states(mixture.own)
    check_k(top_k, decoder.d_vocab, chunk_size)
    targets = _checked_targets(targets, mixture.own.shape[1], decoder.d_vocab)
    if control is not None:
        control.check(mixture, measures)
    reader = Reader(decoder, decoder.compute_dtype(mixture.own), mixture.own.device, mixture.bias)
    cells, n_targets = tuple(mixture.alpha.shape), 0 if targets is None else targets.shape[1]
    store = reader.allocate(cells, top_k, n_targets, measures, own=True)
    model_store = reader.allocate((1, 1, cells[-1]), top_k, n_targets, measures)
    control_store = reader.allocate((0 if control is None else len(control.random), *cells), 1, 0, measures)
    # [layer, order, row, 1]: coefficients broadcast over the vocabulary.
    alpha, beta = (x.to(reader.dtype).unsqueeze(-1) for x in (mixture.alpha, mixture.beta))
    gamma = mixture.gamma.to(reader.dtype).view(1, -1, 1)
    lent = None if control is None else control.coefficients(alpha, beta)
    n_plain, is_positive = mixture.signs(control)
    for rows, constant, fixed, own_logits in _projections(reader, mixture, control, model_logits, chunk_size):
        row_targets = None if targets is None else targets[rows]
        model = reader.read_model((constant, gamma[:, rows], fixed[0]), row_targets, _view(model_store, 0, rows))
        if mixture.final is not None:
            _copy_model(model_store, store, control_store, mixture.final, rows)
        for layer, own in own_logits:
            mix = constant, alpha[layer, :, rows], own, beta[layer, :, rows], fixed[0]
            reader.read(mix, row_targets, model, _view(store, layer, rows), n_plain, is_positive[layer, rows])
            for draw, random in enumerate(fixed[1:]):
                assert lent is not None, "random directions are those of a control"
                mix = constant, lent[0][layer, :, rows], random, lent[1][layer, :, rows], fixed[0]
                reader.read(mix, None, model, _view(control_store, (draw, layer), rows))
    return MixtureScan(
        own_values=store["own_values"],
        own_top1=store.get("own_top1"),
        model=_readings(reader, *[{name: x[0, 0] for name, x in model_store.items()}] * 2),
        control=None if control is None else _readings(reader, control_store, model_store),
        **vars(_readings(reader, store, model_store)),
    )


def _projections(
    reader: Reader,
    mixture: Mixture,
    control: Control | None,
    model_logits: Callable[[slice], Tensor] | None,
    chunk_size: int,
) -> Iterator[tuple[slice, Tensor, list[Tensor], Iterator[tuple[int, Tensor]]]]:
    """Yield (rows, constant, [shared, *random], layers) in one shared buffer: consume layers before the next item."""
    n_layers, n_rows, _ = mixture.own.shape
    layers = [i for i in range(n_layers) if i != mixture.final]
    decoder, d_vocab = reader.decoder, reader.decoder.d_vocab
    drawn = [] if control is None else list(control.random)
    n_fixed = 1 + len(drawn)
    # One more set of rows holds the model's distribution.
    per_set = max(1, min(n_rows, chunk_size // min(len(layers) + n_fixed + 1, MAX_SETS + len(drawn))))
    groups = [layers[group] for group in slices(len(layers), max(1, chunk_size // per_set - 1 - n_fixed))]
    # `shared`, the constant, then the random directions and the layers.
    buffer = reader.buffer((max(map(len, groups)) + n_fixed) * per_set + 1)
    bias = torch.zeros_like(mixture.shared[:1]) if mixture.bias is None else mixture.bias.unsqueeze(0)
    b_U = decoder.constant(None, reader.dtype)

    def project(first: int, *states: Tensor) -> Tensor:
        flat = torch.cat(states)
        into = buffer[first : first + len(flat)]
        decoder.project(flat, into[:, :d_vocab])
        return into

    def following(rows: slice, first: int, head: Tensor) -> Iterator[tuple[int, Tensor]]:
        yield from zip(groups[0], head, strict=True)
        for group in groups[1:]:
            into = project(first, *(mixture.own[layer, rows] for layer in group))
            yield from zip(group, into.view(-1, *head.shape[1:]), strict=True)

    for rows in slices(n_rows, per_set):
        count = rows.stop - rows.start
        states = [*(random[rows] for random in drawn), *(mixture.own[layer, rows] for layer in groups[0])]
        buffer[:, d_vocab:] = 0
        project(*([count] if model_logits else [0, mixture.shared[rows]]), bias, *states)
        shared, constant = buffer[:count], buffer[count]
        constant[:d_vocab] += b_U
        constant[d_vocab:] = reader.lowest
        if model_logits is not None:
            torch.sub(model_logits(rows), constant[:d_vocab], out=shared[:, :d_vocab])
            shared /= mixture.gamma[rows, None].to(reader.dtype)
        rest = buffer[count + 1 : count + 1 + len(states) * count].view(len(states), count, reader.width)
        fixed = [shared, *rest[: n_fixed - 1]]
        yield rows, constant, fixed, following(rows, 1 + n_fixed * count, rest[n_fixed - 1 :])


def _view(store: dict[str, Tensor], layer: int | tuple[int, int], rows: slice) -> dict[str, Tensor]:
    """Views [order, row, ...] of the results of some rows of a layer, of the control of a (draw, layer)."""
    return {name: x[layer][:, rows] for name, x in store.items()}


def _copy_model(
    model: dict[str, Tensor], store: dict[str, Tensor], control: dict[str, Tensor], final: int, rows: slice
) -> None:
    """The readings of the layer that is the model itself, whose random centers are, too; its own part is all of it."""
    own = {"own_values": model["values"], "own_top1": model["indices"][..., 0]}
    for name, values in store.items():
        values[final][:, rows] = {**own, **model}[name][0, :, rows]
    for name, values in control.items():
        best = model[name][0, :, rows]
        values[:, final, :, rows] = best if best.ndim == 2 else best[..., :1]


def _readings(reader: Reader, store: dict[str, Tensor], model: dict[str, Tensor]) -> Readings:
    """Measures from the sums over the vocabulary, in binary logarithms. `model` broadcasts over [layer, order]."""
    log_normalizer = kl = None
    if "total" in store:
        log_total = store["total"].log2()
        negative_entropy = model["expected"] - model["total"].log2()
        kl = ((negative_entropy - store["expected"] + log_total).clamp_min(0) / reader.log2_e).to(reader.dtype)
        log_normalizer = ((store["shift"] + log_total) / reader.log2_e).to(reader.dtype)
    return Readings(
        top=TopTokens(store["values"], store["indices"]),
        log_normalizer=log_normalizer,
        kl=kl,
        top1_agreement=store["indices"][..., 0] == model["indices"][..., 0],
        target_logits=store.get("target_logits"),
        target_ranks=store.get("target_ranks"),
    )


def _checked_targets(targets: Tensor | None, n_rows: int, d_vocab: int) -> Tensor | None:
    if targets is None:
        return None
    if targets.ndim == 1:
        targets = targets.unsqueeze(1)
    if targets.ndim != 2 or len(targets) != n_rows or targets.dtype.is_floating_point:
        raise ValueError(
            f"targets must be token ids [row] or [row, target] with {n_rows} rows, got {targets.dtype} of shape "
            f"{tuple(targets.shape)}. Flatten batch and position into one row axis."
        )
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < d_vocab:
        raise ValueError(
            f"targets must be token ids from 0 to {d_vocab - 1}, got values from {int(targets.min())} to "
            f"{int(targets.max())}. Replace ids that mean padding."
        )
    return targets.long()
