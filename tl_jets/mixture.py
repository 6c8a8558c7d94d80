r"""Vocabulary-sized work in bounded memory: the tokens, measures and controls of many logit vectors, never all at once.

The jet of a final norm is a mix of two vectors (Legendre polynomials, see `tl_jets.calculus.norms`): whatever the order
:math:`k`, the additive logits of layer :math:`l` at row :math:`r` (a row is one position of one prompt) are

.. math::
    L_{lkr} = \alpha_{lkr} U^\top o_{lr} + \beta_{lkr} U^\top s_r + c, \qquad c = U^\top b + b_U,

and the model's own are :math:`T_r = \gamma_r U^\top s_r + c`. So every order costs one product with :math:`U` a layer;
the rest is elementwise, on a scratch that stays in cache. With :math:`p = \mathrm{softmax}(\tau(T))` and
:math:`m = \max \tau(L)`,

.. math::
    \mathrm{KL}(p \,\|\, \mathrm{softmax}(\tau(L))) = \textstyle\sum p \log p - p \cdot (\tau(L) - m)
    + \log \sum \exp(\tau(L) - m) .

The **control** of a layer replaces :math:`o_{lr}` by :math:`a_{lr} s_r + q_{lr} n_r` with one random direction
:math:`n_r` a row, of the same length and angle: again a mix of two vectors, :math:`(\alpha a + \beta) U^\top s_r
+ \alpha q\, U^\top n_r + c`.

===================================  ==========================================
symbol                               name here
===================================  ==========================================
:math:`o_{lr}`, :math:`s_r`          `Mixture.own`, `Mixture.shared`
:math:`\alpha, \beta, \gamma`        `Mixture.alpha`, `.beta`, `.gamma`
:math:`b`, :math:`c`                 `Mixture.bias`, `constant`
:math:`n_r`, :math:`a`, :math:`q`    `Control.random`, `.along`, `.across`
:math:`\tau`                         `Decoder.transform`
===================================  ==========================================

Ties go to the smallest token id, everywhere: top-k, top-1, ranks.

Accuracy: `max` is taken off before anything is summed and the three parts of the KL come from the same rounded logits, so
errors enter as :math:`(q - p) \cdot \delta` and vanish with the KL itself. Float32: 1e-4 relative, 1e-6 nats absolute;
float64: 1e-10. A KL below zero by rounding is returned as zero.

Cost: one product of `layer * row` states with `W_U`, plus about ten passes over `layer * order * row` logits in cache.
Memory: `chunk_size` rows of d_vocab logits, and a few MB.

Example:
    >>> import torch
    >>> from tl_jets.calculus import Norm
    >>> from tl_jets.decoder import Decoder
    >>> _ = torch.manual_seed(0)
    >>> decoder = Decoder(norm=Norm("none"), W_U=torch.randn(4, 50), b_U=torch.randn(50))
    >>> h = torch.randn(3, 2, 4)                                          # 3 layers, 2 positions
    >>> zeros, ones = torch.zeros(3, 1, 2), torch.ones(3, 1, 2)
    >>> lens = Mixture(own=h, shared=h[-1], alpha=ones, beta=zeros, gamma=torch.ones(2))   # the logit lens
    >>> scan = scan_mixture(decoder, lens, top_k=3)
    >>> bool((scan.top.indices[:, 0] == decoder.logits(h).topk(3).indices).all())
    True
    >>> bool((scan.kl[-1] < 1e-6).all()), scan.top1_agreement[-1].tolist()     # the last layer is the model
    (True, [[True, True]])
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_jets.decoder import Decoder
from tl_jets.reader import CHUNK_SIZE, MAX_SETS, Reader, check_rows, check_sizes, slices
from tl_jets.readout import TopTokens


@dataclass(frozen=True, eq=False)
class Mixture:
    """Logit vectors that are mixes of two: `alpha * own @ W_U + beta * shared @ W_U + constant`.

    Attributes:
        own: What belongs to the layer (the center, times the norm's weight). Shape [layer, row, d_model].
        shared: The model's own final state, times the norm's weight. Shape [row, d_model].
        alpha: Coefficient of `own`. Shape [layer, order, row].
        beta: Coefficient of `shared`. Shape [layer, order, row].
        gamma: Coefficient of `shared` in the model's own logits. Shape [row].
        bias: The final norm's bias, None without one. Shape [d_model].

    Raises:
        ValueError: If the shapes disagree or a value is not finite.
    """

    own: Float[Tensor, "layer row d_model"]
    shared: Float[Tensor, "row d_model"]
    alpha: Float[Tensor, "layer order row"]
    beta: Float[Tensor, "layer order row"]
    gamma: Float[Tensor, " row"]
    bias: Float[Tensor, " d_model"] | None = None

    def __post_init__(self) -> None:
        if self.own.ndim != 3 or self.alpha.ndim != 3:
            raise ValueError(
                "own must be [layer, row, d_model] and alpha [layer, order, row], got shapes "
                f"{tuple(self.own.shape)} and {tuple(self.alpha.shape)}. Flatten batch and position into one row axis."
            )
        layer, row, d_model = self.own.shape
        order = self.alpha.shape[1]
        check_rows("shared", self.shared, (row, d_model), "row, d_model")
        check_rows("alpha", self.alpha, (layer, order, row), "layer, order, row")
        check_rows("beta", self.beta, (layer, order, row), "layer, order, row")
        check_rows("gamma", self.gamma, (row,), "row")
        check_rows("own", self.own, (layer, row, d_model), "layer, row, d_model")
        if self.bias is not None:
            check_rows("bias", self.bias, (d_model,), "d_model")


@dataclass(frozen=True, eq=False)
class Control:
    """A random center for every layer and row: `along * shared + across * random` in place of `own`.

    Attributes:
        random: One direction a row. Shape [row, d_model].
        along: Coefficient of `shared`. Shape [layer, row].
        across: Coefficient of `random`. Shape [layer, row].

    Raises:
        ValueError: If the shapes disagree or a value is not finite.
    """

    random: Float[Tensor, "row d_model"]
    along: Float[Tensor, "layer row"]
    across: Float[Tensor, "layer row"]

    def __post_init__(self) -> None:
        if self.random.ndim != 2 or self.along.ndim != 2:
            raise ValueError(
                "random must be [row, d_model] and along [layer, row], got shapes "
                f"{tuple(self.random.shape)} and {tuple(self.along.shape)}. One direction serves all layers of a row."
            )
        layer, row = self.along.shape
        check_rows("random", self.random, (row, self.random.shape[1]), "row, d_model")
        check_rows("along", self.along, (layer, row), "layer, row")
        check_rows("across", self.across, (layer, row), "layer, row")


@dataclass(frozen=True, eq=False)
class Readings:
    """What was read off a batch of logit vectors. The leading axes are [layer, order, row], or [row] for the model.

    Attributes:
        top: The best tokens by additive logit. Shape [*cells, k].
        log_normalizer: log sum exp of the logits, after the model's transform. Shape [*cells]; None if not measured.
        kl: KL(model || these logits) in nats, after the transform. Shape [*cells]; None if not measured.
        top1_agreement: Whether the best token is the model's. Shape [*cells].
        target_logits: Additive logits of the targets. Shape [*cells, target]; None without targets.
        target_ranks: Their ranks, 0 for the best token. Shape [*cells, target]; None without targets.
    """

    top: TopTokens
    log_normalizer: Float[Tensor, "*cells"] | None
    kl: Float[Tensor, "*cells"] | None
    top1_agreement: Bool[Tensor, "*cells"]
    target_logits: Float[Tensor, "*cells target"] | None
    target_ranks: Int[Tensor, "*cells target"] | None


@dataclass(frozen=True, eq=False)
class MixtureScan(Readings):
    """Readings of every layer, order and row of a `Mixture`, of the model, and of the control.

    Attributes:
        own_values: What the own part, `alpha * own @ W_U + constant`, gives the tokens in `top`. Shape [layer, order, row, k].
        own_top1: Best token of the own part. Shape [layer, order, row]; None if not measured.
        model: The same readings of the model's own logits, with [row] as leading axis.
        control: The same readings of the control; None without one. Its `top` holds one token.
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
    chunk_size: int = CHUNK_SIZE,
) -> MixtureScan:
    """Read every layer, order and row of a mixture in one pass over the layers.

    Args:
        decoder: The model's decoder.
        mixture: The logit vectors.
        top_k: How many of the best tokens to keep.
        targets: Token ids whose logits and ranks to return, one or several a row. Shape [row] or [row, target].
        measures: Compute log-normalisers, KL and the best token of the own part; else only top tokens and targets.
        control: The random center to measure beside; None for none. Needs `measures`.
        chunk_size: Rows of d_vocab logits held at once.

    Returns:
        The readings, in float32, or float64 if the states or the weights are.

    Raises:
        ValueError: If `own` does not have the decoder's d_model, shapes disagree, a target is not a token, top_k is not
            in 1..d_vocab, chunk_size is not positive, or a control is asked for without measures.
    """
    decoder.check_states(mixture.own)
    check_sizes(top_k, decoder.d_vocab, chunk_size)
    if targets is not None:
        targets = _checked_targets(targets, mixture.own.shape[1], decoder.d_vocab)
    if control is not None:
        if not measures:
            raise ValueError(
                "A control is there for its measures, got measures=False. Pass measures=True or no control."
            )
        layer, row, d_model = mixture.own.shape
        check_rows("control.random", control.random, (row, d_model), "row, d_model")
        check_rows("control.along", control.along, (layer, row), "layer, row")

    reader = Reader(decoder, decoder.compute_dtype(mixture.own), mixture.own.device)
    cells = mixture.alpha.shape
    n_targets = 0 if targets is None else targets.shape[1]
    store = reader.allocate(cells, top_k, n_targets, measures, own_top1=measures)
    store["own_values"] = torch.empty_like(store["values"])
    model_store = reader.allocate((1, 1, cells[2]), top_k, n_targets, measures)
    # All layers of a row mix the same vectors: to the reader they are so many orders of one layer.
    merged = (1, cells[0] * cells[1], cells[2])
    control_store = None if control is None else reader.allocate(merged, 1, 0, measures)
    # [layer, order, row, 1]: coefficients broadcast over the vocabulary.
    alpha, beta = (x.to(reader.dtype).unsqueeze(-1) for x in (mixture.alpha, mixture.beta))
    gamma = mixture.gamma.to(reader.dtype).view(1, -1, 1)
    for rows, constant, fixed, own_logits in _projections(reader, mixture, control, chunk_size):
        row_targets = None if targets is None else targets[rows]
        shared = fixed[0]
        model = reader.read_model((constant, gamma[:, rows], shared), row_targets, _view(model_store, 0, rows))
        for layer, own in own_logits:
            mix = constant, alpha[layer, :, rows], own, beta[layer, :, rows], shared
            reader.read(mix, row_targets, model, _view(store, layer, rows))
        if control is not None and control_store is not None:
            along, across = (x[:, None, rows].to(reader.dtype) for x in (control.along, control.across))
            borrowed, lent = alpha[:, :, rows, 0] * along + beta[:, :, rows, 0], alpha[:, :, rows, 0] * across
            coefficients = torch.stack([torch.ones_like(lent), borrowed, lent], dim=-1).flatten(0, 1)
            reader.read_control(coefficients, (constant, *fixed), model, _view(control_store, 0, rows))
    if control_store is not None:
        control_store = {name: x.view(*cells, *x.shape[3:]) for name, x in control_store.items()}
    return MixtureScan(
        own_values=store["own_values"],
        own_top1=store.get("own_top1"),
        model=_readings(reader, *[{name: x[0, 0] for name, x in model_store.items()}] * 2),
        control=None if control_store is None else _readings(reader, control_store, model_store),
        **vars(_readings(reader, store, model_store)),
    )


def _projections(
    reader: Reader, mixture: Mixture, control: Control | None, chunk_size: int
) -> Iterator[tuple[slice, Tensor, list[Tensor], Iterator[tuple[int, Tensor]]]]:
    """Yield (rows, constant, [shared, random], layers), states times W_U in one buffer: consume layers before the next.

    A product costs about as much as 100 rows more for reading W_U: the norm's bias and what layers share ride along.
    """
    layers, n_rows, _ = mixture.own.shape
    decoder, d_vocab = reader.decoder, reader.decoder.d_vocab
    fixed = [mixture.shared] if control is None else [mixture.shared, control.random]
    # One more set of rows holds the model's distribution.
    per_set = max(1, min(n_rows, chunk_size // min(layers + len(fixed) + 1, MAX_SETS)))
    groups = list(slices(layers, max(1, chunk_size // per_set - 1 - len(fixed))))
    size = max(group.stop - group.start for group in groups) + len(fixed)
    buffer = reader.buffer(size * per_set + 1)
    constant = buffer[0]
    constant[d_vocab:] = reader.lowest
    bias = torch.zeros_like(mixture.shared[:1]) if mixture.bias is None else mixture.bias.unsqueeze(0)

    def project(first: int, *states: Tensor) -> Tensor:
        flat = torch.cat(states)
        into = buffer[first : first + len(flat)]
        decoder.project(flat, into[:, :d_vocab])
        return into

    def following(rows: slice, head: Tensor) -> Iterator[tuple[int, Tensor]]:
        yield from enumerate(head)
        for group in groups[1:]:
            into = project(1 + len(fixed) * head.shape[1], *mixture.own[group, rows])
            yield from enumerate(into.view(-1, *head.shape[1:]), group.start)

    for rows in slices(n_rows, per_set):
        states = [x[rows] for x in fixed] + list(mixture.own[groups[0], rows])
        if rows.start == 0:
            head = project(0, bias, *states)[1:]
            constant[:d_vocab] += decoder.b_U
        else:
            head = project(1, *states)
        head = head.view(len(states), -1, reader.width)
        yield rows, constant, list(head[: len(fixed)]), following(rows, head[len(fixed) :])


def _view(store: dict[str, Tensor], layer: int, rows: slice) -> dict[str, Tensor]:
    """Results of some rows of a layer, as views [order, row, ...]."""
    return {name: x[layer, :, rows] for name, x in store.items()}


def _readings(reader: Reader, store: dict[str, Tensor], model: dict[str, Tensor]) -> Readings:
    """Measures from what was summed over the vocabulary, in binary logarithms. `model` broadcasts over [layer, order]."""
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


def _checked_targets(targets: Tensor, n_rows: int, d_vocab: int) -> Tensor:
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
