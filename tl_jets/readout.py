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

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_jets.decoder import Decoder

# Vocabulary-sized rows held at once. Products of fewer rows with W_U are dominated by reading W_U.
CHUNK_SIZE = 320
# Width of the blocks whose maxima are compared before any token is: a multiple of every vector width.
BLOCK = 64
# Logits worked on at a time: what the caches of two cores hold, or enough to fill an accelerator.
SCRATCH_CPU, SCRATCH_DEVICE = 2**21, 2**25
LOG2_E = math.log2(math.e)
# Layers (and other sets of rows) that share a product with W_U.
MAX_SETS = 10


@dataclass(frozen=True, eq=False)
class TopTokens:
    """The best tokens of each logit vector, best first; ties by the smallest id.

    Attributes:
        values: Additive logits, or log-probabilities where asked for. Shape [*rows, k].
        indices: Token ids. Shape [*rows, k].
    """

    values: Float[Tensor, "*rows k"]
    indices: Int[Tensor, "*rows k"]


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
        _check("shared", self.shared, (row, d_model), "row, d_model")
        _check("alpha", self.alpha, (layer, order, row), "layer, order, row")
        _check("beta", self.beta, (layer, order, row), "layer, order, row")
        _check("gamma", self.gamma, (row,), "row")
        _check("own", self.own, (layer, row, d_model), "layer, row, d_model")
        if self.bias is not None:
            _check("bias", self.bias, (d_model,), "d_model")


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
        _check("random", self.random, (row, self.random.shape[1]), "row, d_model")
        _check("along", self.along, (layer, row), "layer, row")
        _check("across", self.across, (layer, row), "layer, row")


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
def top_tokens(
    decoder: Decoder,
    states: Float[Tensor, "*rows d_model"],
    bias_weight: float | Float[Tensor, "*#rows"] = 1.0,
    k: int = 5,
    *,
    log_probs: bool = False,
    chunk_size: int = CHUNK_SIZE,
) -> TopTokens:
    """The k best tokens of each state, in chunks.

    Args:
        decoder: The model's decoder.
        states: What the unembedding reads (after the final norm). Shape [*rows, d_model].
        bias_weight: The multiple of `b_U` that each carries: a number, or one per row. Shape [*rows].
        k: How many tokens.
        log_probs: Return log-probabilities (after the model's transform) in place of additive logits.
        chunk_size: Rows of d_vocab logits held at once.

    Returns:
        The best tokens. Shapes [*rows, k].

    Raises:
        ValueError: If `states` does not have the decoder's d_model, k is not in 1..d_vocab, chunk_size is not
            positive, or a state is not finite.
    """
    decoder.check_states(states)
    _check_sizes(k, decoder.d_vocab, chunk_size)
    _check("states", states, tuple(states.shape), "*rows, d_model")
    rows = states.shape[:-1]
    reader = _Reader(decoder, decoder.compute_dtype(states), states.device)
    flat = states.reshape(-1, decoder.d_model)
    weights = torch.as_tensor(bias_weight, dtype=reader.dtype, device=states.device).expand(rows).reshape(-1, 1)
    values = torch.empty(len(flat), k, dtype=reader.dtype, device=states.device)
    indices = torch.empty(len(flat), k, dtype=torch.long, device=states.device)
    bias = decoder.b_U.to(reader.dtype)
    buffer = reader.buffer(min(chunk_size, len(flat)))
    for chunk in _slices(len(flat), chunk_size):
        decoder.project(flat[chunk], buffer[: chunk.stop - chunk.start, : decoder.d_vocab])
        for part in _slices(chunk.stop - chunk.start, reader.scratch_rows):
            cells = slice(chunk.start + part.start, chunk.start + part.stop)
            logits = buffer[part]
            logits[:, : decoder.d_vocab].addcmul_(weights[cells], bias)
            reader.floor(logits)
            values[cells], indices[cells] = reader.top(logits, k)
            if log_probs:
                values[cells] = reader.transformed(values[cells])
                shift = reader.shift(logits, values[cells, 0])
                log_total = (shift + _total(logits.exp2_()).log2()) / reader.log2_e
                values[cells] -= log_total.to(reader.dtype).unsqueeze(-1)
    return TopTokens(values.reshape(*rows, k), indices.reshape(*rows, k))


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
    _check_sizes(top_k, decoder.d_vocab, chunk_size)
    if targets is not None:
        targets = _checked_targets(targets, mixture.own.shape[1], decoder.d_vocab)
    if control is not None:
        if not measures:
            raise ValueError(
                "A control is there for its measures, got measures=False. Pass measures=True or no control."
            )
        layer, row, d_model = mixture.own.shape
        _check("control.random", control.random, (row, d_model), "row, d_model")
        _check("control.along", control.along, (layer, row), "layer, row")

    reader = _Reader(decoder, decoder.compute_dtype(mixture.own), mixture.own.device)
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


class _Reader:
    """Reads logit vectors whose last axis is padded to a multiple of BLOCK; the padding never wins and weighs nothing."""

    def __init__(self, decoder: Decoder, dtype: torch.dtype, device: torch.device) -> None:
        self.decoder, self.dtype, self.device = decoder, dtype, device
        self.width = -(-decoder.d_vocab // BLOCK) * BLOCK
        limit = SCRATCH_CPU if device.type == "cpu" else SCRATCH_DEVICE
        self.scratch_rows = max(1, limit // self.width)
        self.scratch = self.mask = self.buffer(0)
        # Finite, so that zero times it is zero; small enough to survive a multiplication by log2(e).
        self.lowest = torch.finfo(dtype).min / 4
        # As the kernels round it: what is scaled by it is scaled back by the same number.
        self.log2_e = torch.tensor(LOG2_E, dtype=dtype).item()

    def buffer(self, rows: int) -> Tensor:
        """Rows of padded logits: uninitialised, with zeros in the padding."""
        buffer = torch.empty(rows, self.width, dtype=self.dtype, device=self.device)
        buffer[:, self.decoder.d_vocab :] = 0
        return buffer

    def floor(self, logits: Tensor) -> Tensor:
        """Put the padding below every token, in place."""
        if self.width > self.decoder.d_vocab:
            logits[..., self.decoder.d_vocab :] = self.lowest
        return logits

    def transformed(self, logits: Tensor) -> Tensor:
        """The logits after the model's own transform, if it has one."""
        return logits if self.decoder.transform is None else self.decoder.transform(logits)

    def allocate(
        self, cells: tuple[int, ...], k: int, n_targets: int, measures: bool, own_top1: bool = False
    ) -> dict[str, Tensor]:
        """Empty results; what `_readings` makes of them needs no vocabulary-sized tensor."""

        def empty(dtype: torch.dtype, *last: int) -> Tensor:
            return torch.empty(*cells, *last, dtype=dtype, device=self.device)

        store = {"values": empty(self.dtype, k), "indices": empty(torch.long, k)}
        if measures:
            store |= {name: empty(torch.float64) for name in ("shift", "expected", "total")}
        if n_targets:
            store |= {"target_logits": empty(self.dtype, n_targets), "target_ranks": empty(torch.long, n_targets)}
        if own_top1:
            store["own_top1"] = empty(torch.long)
        return store

    def read_model(
        self, mix: tuple[Tensor, Tensor, Tensor], targets: Tensor | None, store: dict[str, Tensor]
    ) -> Tensor:
        """Read the model's own logits, `constant + gamma * shared`. Returns their probabilities, zero in the padding."""
        constant, gamma, shared = mix
        probabilities = self.buffer(len(shared) if "total" in store else 0)
        for part in _slices(len(shared), self.scratch_rows):
            logits = self.mix(constant, gamma[:, part], shared[part])
            view = {name: x[:, part] for name, x in store.items()}
            top = self.read_top(logits, None if targets is None else targets[part], view)
            if "total" in store:
                view["shift"].copy_(self.shift(logits, top))
                chunk = torch.exp2(logits[0], out=probabilities[part])
                total = _total(chunk)
                chunk /= total.unsqueeze(-1).to(self.dtype)
                view["expected"].copy_(self.expectation(logits, chunk))
                view["total"].copy_(total)
        return probabilities

    def read(
        self,
        mix: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        targets: Tensor | None,
        probabilities: Tensor,
        store: dict[str, Tensor],
    ) -> None:
        """Read `constant + alpha * own + beta * shared`; results are views [order, row, ...] of the caller's tensors."""
        constant, alpha, own, beta, shared = mix
        # Order 0 of a jet borrows nothing: the leading orders without `shared` are their own part.
        borrows = (beta != 0).flatten(1).any(1).tolist()
        plain = borrows.index(True) if any(borrows) else len(borrows)
        for part in _slices(len(own), max(1, self.scratch_rows // len(alpha))):
            logits = self.mix(constant, alpha[:, part], own[part])
            view = {name: x[:, part] for name, x in store.items()}
            if plain < len(alpha):
                if "own_top1" in store:
                    view["own_top1"][plain:] = self.top1(logits[plain:])[1]
                logits[plain:].addcmul_(beta[plain:, part], shared[part])
            self.finish(logits, None if targets is None else targets[part], probabilities[part], view)
            if "own_top1" in store:
                view["own_top1"][:plain] = view["indices"][:plain, ..., 0]
            borrowed = shared[part].expand_as(logits).gather(-1, view["indices"])
            torch.addcmul(view["values"], beta[:, part], borrowed, value=-1, out=view["own_values"])

    def read_control(
        self, coefficients: Tensor, vectors: tuple[Tensor, ...], probabilities: Tensor, store: dict[str, Tensor]
    ) -> None:
        """Read mixes [cell, row, vector] of the constant [width] and other vectors [row, width].

        Many mixes of few vectors are a matrix product: half the time of elementwise operations.
        """
        basis = self.buffer(len(vectors))
        basis[0] = vectors[0]
        for row in range(coefficients.shape[1]):
            for i, vector in enumerate(vectors[1:], 1):
                basis[i] = vector[row]
            for part in _slices(len(coefficients), self.scratch_rows):
                logits = torch.mm(coefficients[part, row], basis, out=self.rows(part.stop - part.start))
                view = {name: x[part, row : row + 1] for name, x in store.items()}
                self.finish(logits.unsqueeze(1), None, probabilities[row : row + 1], view)

    def finish(self, logits: Tensor, targets: Tensor | None, probabilities: Tensor, store: dict[str, Tensor]) -> None:
        """Read [order, row, width] logits, overwriting them; `store` holds views [order, row, ...]."""
        top = self.read_top(logits, targets, store)
        if "total" in store:
            store["shift"].copy_(self.shift(logits, top))
            store["expected"].copy_(self.expectation(logits, probabilities))
            store["total"].copy_(_total(logits.exp2_()))

    def rows(self, count: int) -> Tensor:
        """Rows of the scratch."""
        if len(self.scratch) < count:
            self.scratch = self.buffer(count)
        return self.scratch[:count]

    def mix(self, constant: Tensor, coefficient: Tensor, logits: Tensor) -> Tensor:
        """`constant + coefficient * logits`, [order, row, 1] times [row, width], in the scratch."""
        orders, rows, _ = coefficient.shape
        scratch = self.rows(orders * rows).view(orders, rows, self.width)
        return torch.addcmul(constant, coefficient, logits, out=scratch)

    def read_top(self, logits: Tensor, targets: Tensor | None, store: dict[str, Tensor]) -> Tensor:
        """Store the best tokens, and the targets' logits and ranks. Returns the largest transformed logit of each."""
        values, indices = self.top(logits, store["indices"].shape[-1])
        store["values"].copy_(values)
        store["indices"].copy_(indices)
        if targets is not None:
            for i, target in enumerate(targets.unbind(1)):
                value = logits.gather(-1, target[None, :, None].expand(len(logits), -1, 1))
                store["target_logits"][..., i] = value.squeeze(-1)
                store["target_ranks"][..., i] = self.rank(logits, value, target)
        return self.transformed(values[..., 0])

    def top1(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The largest logit and its smallest id: `max` returns the first of equals."""
        blocks = logits.unflatten(-1, (-1, BLOCK))
        value, block = blocks.amax(-1).max(-1)
        position = blocks.gather(-2, block[..., None, None].expand(*block.shape, 1, BLOCK)).squeeze(-2).max(-1).indices
        return value, position.add_(block, alpha=BLOCK)

    def top(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits, by (value, smallest id): first the k best blocks, then their tokens."""
        if k == 1:
            value, token = self.top1(logits)
            return value.unsqueeze(-1), token.unsqueeze(-1)
        blocks = logits.unflatten(-1, (-1, BLOCK))
        if k * 2 > blocks.shape[-2]:
            return _first(logits, k)
        # Blocks are in the order of ids: k better blocks hold k better tokens, ties included.
        block = _first(blocks.amax(-1), k)[1].sort(-1).values
        tokens = blocks.gather(-2, block.unsqueeze(-1).expand(*block.shape, BLOCK)).flatten(-2)
        values, position = _first(tokens, k)
        return values, block.gather(-1, position // BLOCK) * BLOCK + position % BLOCK

    def rank(self, logits: Tensor, value: Tensor, target: Tensor) -> Tensor:
        """How many tokens come before `target` [row], whose logits are `value`: larger, or equal with a smaller id."""
        # Comparisons into floating point: on a CPU, sums of booleans take five times as long. Exact up to 2^24.
        if self.mask.shape != self.scratch.shape:
            self.mask = self.buffer(len(self.scratch))
        mask = self.mask[: logits.shape[0] * logits.shape[1]].view(logits.shape)
        larger = torch.gt(logits, value, out=mask).sum(-1).long()
        equal = torch.eq(logits, value, out=mask).sum(-1)
        for order, row in (equal > 1).nonzero().tolist():
            larger[order, row] += (logits[order, row, : target[row]] == value[order, row]).sum()
        return larger

    def shift(self, logits: Tensor, top: Tensor) -> Tensor:
        """Make of additive logits their binary logarithms, (transform(logits) - top) * log2(e), in place.

        Returns:
            top * log2(e) as it was rounded, in float64.
        """
        if self.decoder.transform is not None:
            logits.copy_(self.transformed(logits))
            self.floor(logits)
        shift = top * self.log2_e
        torch.add(-shift.unsqueeze(-1), logits, alpha=self.log2_e, out=logits)
        return shift.double()

    def expectation(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        """Expectation of [order, row, width] logits under [row, width] probabilities: [order, row], float64.

        In BLOCK pieces that are added in float64: one long dot product in float32 is off by 1e-5.
        """
        orders, rows, _ = logits.shape
        pieces = logits.view(orders, rows * BLOCK, -1).permute(1, 2, 0)
        return torch.bmm(probabilities.view(rows * BLOCK, 1, -1), pieces).view(rows, BLOCK, orders).double().sum(1).T


def _projections(
    reader: _Reader, mixture: Mixture, control: Control | None, chunk_size: int
) -> Iterator[tuple[slice, Tensor, list[Tensor], Iterator[tuple[int, Tensor]]]]:
    """Yield (rows, constant, [shared, random], layers), states times W_U in one buffer: consume layers before the next.

    A product costs about as much as 100 rows more for reading W_U: the norm's bias and what layers share ride along.
    """
    layers, n_rows, _ = mixture.own.shape
    decoder, d_vocab = reader.decoder, reader.decoder.d_vocab
    fixed = [mixture.shared] if control is None else [mixture.shared, control.random]
    # One more set of rows holds the model's distribution.
    per_set = max(1, min(n_rows, chunk_size // min(layers + len(fixed) + 1, MAX_SETS)))
    groups = list(_slices(layers, max(1, chunk_size // per_set - 1 - len(fixed))))
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

    for rows in _slices(n_rows, per_set):
        states = [x[rows] for x in fixed] + list(mixture.own[groups[0], rows])
        if rows.start == 0:
            head = project(0, bias, *states)[1:]
            constant[:d_vocab] += decoder.b_U
        else:
            head = project(1, *states)
        head = head.view(len(states), -1, reader.width)
        yield rows, constant, list(head[: len(fixed)]), following(rows, head[len(fixed) :])


def _first(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and positions of the k largest by (value, smallest position): `topk`, whose ties are in no order, mended."""
    top, position = values.topk(min(k + 1, values.shape[-1]))
    tied = (top[..., 1:] == top[..., :-1]).any(-1)
    top, position = top[..., :k].contiguous(), position[..., :k].contiguous()
    if tied.any():
        ordered, order = values[tied].sort(dim=-1, descending=True, stable=True)
        top[tied], position[tied] = ordered[..., :k], order[..., :k]
    return top, position


def _total(values: Tensor) -> Tensor:
    """Sum over the padded vocabulary: in BLOCK pieces that are added in float64."""
    return values.unflatten(-1, (BLOCK, -1)).sum(-1).double().sum(-1)


def _view(store: dict[str, Tensor], layer: int, rows: slice) -> dict[str, Tensor]:
    """Results of some rows of a layer, as views [order, row, ...]."""
    return {name: x[layer, :, rows] for name, x in store.items()}


def _readings(reader: _Reader, store: dict[str, Tensor], model: dict[str, Tensor]) -> Readings:
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


def _slices(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size`, as equal as can be, that cover `total`."""
    count = max(1, -(-total // size))
    for i in range(count):
        yield slice(total * i // count, total * (i + 1) // count)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], axes: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name} must be [{axes}] = {tuple(shape)} here, got shape {tuple(tensor.shape)}. "
            "Give every input the same layers, orders and rows (batch and position flattened)."
        )
    if not tensor.isfinite().all():
        count = int((~tensor.isfinite()).sum())
        raise ValueError(
            f"{name} must be finite, got {count} NaN or infinite values of {tensor.numel()}. Look for masked (padding) "
            "positions, an overflow in half precision, or a series evaluated at a zero center."
        )


def _check_sizes(k: int, d_vocab: int, chunk_size: int) -> None:
    if not 1 <= k <= d_vocab:
        raise ValueError(f"k must be between 1 and d_vocab = {d_vocab}, got {k}. Ask for fewer tokens.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}. It counts rows of d_vocab logits.")


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
