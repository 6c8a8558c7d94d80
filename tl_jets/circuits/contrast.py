r"""What a clean run says more than a corrupted one, part by part: the same exact sum in both, subtracted.

Both runs write the logit difference m of two tokens as a sum over the same parts, with the norm scales, attention patterns
and gates of their own run frozen, so that

.. math::
    m(\text{clean}) - m(\text{corrupted}) = \sum_p \left(\text{effect}_p(\text{clean}) - \text{effect}_p(\text{corrupted})\right) .

===============  ===================================================================================  ===================
by               parts                                                                                their differences
===============  ===================================================================================  ===================
``write``        what each source and step writes (direct logit attribution)                          sum to m's
``token``        what a stream, `at`, holds at each position                                          sum to m's
``write_token``  the same, by source and write                                                        sum to m's
``source``       all paths from an embedding or bias (`path_sums`)                                    sum to m's
``length``       all paths with so many writes (`path_lengths`)                                       sum to m's
``path``         single paths, the largest of either run                                              leave `remainder`
``component``    all paths through a step (`path_sums`)                                               overlap
``layer``        the order-k jet lens of each stream (`iterative_jet_lens`): what it says of m        are no parts
===============  ===================================================================================  ===================

A part's difference mixes what it received with how the two runs read it: each run has its own scales and patterns. By
``token`` and ``write_token`` both have a number. Frozen, each run's network is affine from any stream h = sum_m x_m on, with g
the gradient of m at that stream,

.. math::
    m(\text{run}) = \sum_t \sum_m \langle g_t, x_{m,t} \rangle + \text{constants of later steps} ,

and the changes of inputs and of maps are symmetric in the runs and exact:

.. math::
    \langle g, x \rangle - \langle g', x' \rangle
      = \underbrace{\langle \tfrac{g + g'}{2}, x - x' \rangle}_{\text{from\_input}}
      + \underbrace{\langle g - g', \tfrac{x + x'}{2} \rangle}_{\text{from\_map}} .

Source: Golden, arXiv 2505.24293 (the detached map); the split is ours. Cost: freezing both runs, and a
backward pass of each.

Example:
    >>> import tl_jets as tj
    >>> clean, corrupted = "This function is available on Unix and", "This module is deprecated since version and"
    >>> found = contrast(tj.load_tinydocs(), clean, corrupted, by="write")
    >>> found
    Contrast(10 parts by write; <clean answer> - <corrupted answer>: 2.08 clean, -0.874 corrupted)
    >>> bool(found.remainder.abs().max() < 1e-4)
    True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.circuits.pairs import Pair, PairResult
from tl_jets.core.changes import one_look
from tl_jets.core.frozen_network import FrozenNetwork
from tl_jets.core.labels import LabelInput
from tl_jets.core.notebook import SHOWN_ROWS, dataframe_html
from tl_jets.core.options import check_choice, check_integers
from tl_jets.core.path import Path
from tl_jets.core.protocol import BIAS, DECODER_STEP, FINAL_STREAM, frozen_biases, some
from tl_jets.core.selection import TargetInput
from tl_jets.core.tokens import token_names, visible
from tl_jets.core.trace import Trace
from tl_jets.lenses import iterative_jet_lens, joint_jet_lens
from tl_jets.paths.circuit import Circuit
from tl_jets.paths.evaluation import along, read_path
from tl_jets.paths.expansion import exponential_expansion
from tl_jets.paths.statistics import path_lengths, path_sums

By = Literal["write", "token", "write_token", "source", "length", "path", "component", "layer"]
# Value and gradient of a term of the logit difference, both [batch, pos, d_model].
Term = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Contrast(PairResult):
    """Effects of parts on a logit difference in a clean and a corrupted run. Axes: [part, batch].

    Targets and their unit as in `PairResult`.

    Attributes:
        labels: The parts, aligned to the part axis; paths by the size of their differences.
        by: What the parts are.
        clean: Effects in the clean run, in `unit`.
        corrupted: Effects in the corrupted run.
        clean_total: The logit difference of the clean run.
        corrupted_total: That of the corrupted run.
        at: By token: the stream.
        from_input: By token: the part of `difference` from the other input, through the mean of both runs' maps.
        from_map: By token: the part from the other map, of the mean of both inputs.
    """

    labels: list[str]
    by: By
    clean: Float[Tensor, "part batch"]
    corrupted: Float[Tensor, "part batch"]
    clean_total: Float[Tensor, " batch"]
    corrupted_total: Float[Tensor, " batch"]
    at: str | None = None
    from_input: Float[Tensor, "part batch"] | None = None
    from_map: Float[Tensor, "part batch"] | None = None

    def __repr__(self) -> str:
        return (
            f"Contrast({len(self.labels)} parts by {self.by}; {self._difference_name}: "
            f"{float(self.clean_total.mean()):.3g} clean, {float(self.corrupted_total.mean()):.3g} corrupted)"
        )

    def _body(self) -> str:
        table = self.to_dataframe()
        order = table.difference.abs().sort_values(ascending=False, kind="stable").index[:SHOWN_ROWS]
        return dataframe_html(table.loc[order], total=len(table), whole="to_dataframe()")

    @property
    def difference(self) -> Float[Tensor, "part batch"]:
        """Clean less corrupted."""
        return self.clean - self.corrupted

    @property
    def remainder(self) -> Float[Tensor, " batch"]:
        """The difference of the two runs, less that of all parts: rounding where they sum to it (see the module)."""
        return self.clean_total - self.corrupted_total - self.difference.sum(0)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per part, averaged over prompts: the part (named as `by`), clean, corrupted, difference, and its two parts."""
        names = ["clean", "corrupted", "difference"]
        if self.from_input is not None:
            names += ["from_input", "from_map"]
        columns = {name: getattr(self, name).mean(-1).tolist() for name in names}
        return pd.DataFrame({self.by: self.labels, **columns})

    def to_circuit(self, k: int | None = None) -> Circuit:
        """The edges of the k paths whose mean differences are largest."""
        if self.by != "path":
            raise ValueError(f"A circuit is made of a contrast by 'path'; got one by {self.by!r}.")
        return Circuit.of_paths(self.labels[:k], self.difference.mean(-1).tolist()[:k])


@one_look()
def contrast(
    model: Any,
    clean: Any,
    corrupted: Any,
    *,
    by: By = "component",
    targets: TargetInput | None = None,
    position: int = -1,
    top: int = 128,
    order: int = 1,
    at: LabelInput | None = None,
    attention_mask: Tensor | None = None,
) -> Contrast:
    """A `Contrast`: what each part adds to a logit difference in a clean run, and in a corrupted one.

    Args:
        model: A TransformerLens model, or a `ResidualNetwork` (whose granularity says what a step is).
        clean: A prompt, a list of prompts, token ids [batch, pos], or a `Trace`.
        corrupted: As many prompts, of the same lengths in tokens.
        by: What the parts are (see the module).
        targets: Two tokens, or two a prompt: the logit of the first less that of the second is split. None for the clean and the
            corrupted prompt's answers.
        position: Where it is read, among each prompt's real tokens.
        top: For `"path"`: the number of largest paths of each run that are compared, ranked by their effects on the two tokens. A
            path that neither run has among them has a smaller effect in both.
        order: For `"layer"`: that of the lens's jets.
        at: For `"token"` and `"write_token"`: the stream whose positions (and writes) are the parts; None for the first.
        attention_mask: Passed to the model (left padding needs it).

    Raises:
        ValueError: Inputs of different lengths or padding, bad targets or options.
        NotImplementedError: A model that cannot be frozen.

    Cost: that of the tool of the module's table for each run. Example: in the docstring of `tl_jets.circuits.contrast`.
    """
    check_choice("by", by, get_args(By))
    check_integers(1, top=top)
    pair = Pair.of(model, clean, corrupted, targets, position, attention_mask)
    if by in ("token", "write_token"):
        return _by_token(pair, by, at)
    if at is not None:
        raise ValueError(
            f"`at` is the stream of a contrast by 'token' or 'write_token'; got at={at!r} by {by!r}. Leave it out."
        )
    traces = (pair.clean, pair.corrupted)
    if by == "path":
        ids = pair.target_ids[:, None]
        expansion = exponential_expansion(pair.network, linearize="detached", top=top, rank="effect", targets=ids)
        labels = list(dict.fromkeys(label for trace in traces for label in expansion(trace, positions=position).labels))
        parts = [dict(zip(labels, _path_effects(pair, trace, labels), strict=True)) for trace in traces]
    else:
        parts = [_parts(pair, trace, by, position, order) for trace in traces]
    labels = list(dict.fromkeys(label for own in parts for label in own))
    nothing = torch.zeros_like(pair.direction[:, 0])
    found = [torch.stack([own.get(label, nothing) for label in labels]) for own in parts]
    if by == "path":
        best = (found[0] - found[1]).mean(-1).abs().argsort(descending=True, stable=True).tolist()
        labels, found = [labels[i] for i in best], [values[best] for values in found]
    return Contrast(labels=labels, by=by, clean=found[0], corrupted=found[1], **_ends(pair))


def _ends(pair: Pair) -> dict[str, Any]:
    """The logit differences of the two runs, and what the result says of them."""
    clean, corrupted = (pair.difference(trace[FINAL_STREAM]).detach() for trace in (pair.clean, pair.corrupted))
    return {"clean_total": clean, "corrupted_total": corrupted, **pair.header}


def _by_token(pair: Pair, by: Any, at: LabelInput | None) -> Contrast:
    """The contrast of what a stream holds at every position."""
    streams = pair.network.streams
    stream = streams[0] if at is None else pair.network.label(at)
    if stream not in streams:
        raise ValueError(f"`at` must be a stream of the network, {some(streams)}; got {at!r}.")
    parts = parts_of_cut(pair, stream, by == "write_token")
    names = ("clean", "corrupted", "from_input", "from_map")
    values = dict(zip(names, torch.stack(list(parts.values()), 1), strict=True))
    return Contrast(labels=list(parts), by=by, at=stream, **values, **_ends(pair))


def _parts(pair: Pair, trace: Trace, by: Any, position: int, order: int) -> dict[str, Float[Tensor, " batch"]]:
    """The effect of every part on the logit difference in one run."""
    options: dict[str, Any] = {"targets": pair.target_ids[:, None], "positions": position}
    network = pair.network
    if by == "layer":
        lens = iterative_jet_lens(network, trace, order=order, incl_mid=True, **options)
        assert lens.target_logits is not None
        labels, effects = lens.labels, lens.target_logits[:, -1]
    elif by == "write":
        joint = joint_jet_lens(network, trace, linearize="detached", granularity=network.granularity, **options)
        labels, effects = joint.labels, joint.effects
    else:
        sums = (
            path_lengths(network, trace, **options) if by == "length" else path_sums(network, trace, by=by, **options)
        )
        labels, effects = sums.labels, sums.effects
    values = (effects[..., 0, 0] - effects[..., 0, 1]).double()
    return dict(zip(labels, values, strict=True))


@torch.no_grad()
def _path_effects(pair: Pair, trace: Trace, labels: Sequence[str]) -> Float[Tensor, "path batch"]:
    """The effects of detached paths in one run; a prefix that several share is evaluated once."""
    with torch.enable_grad():
        frozen = FrozenNetwork.of(trace)
    nothing, constant = torch.zeros_like(trace[FINAL_STREAM]), Path(DECODER_STEP + BIAS)
    read = [(constant, []) if label == str(constant) else read_path(trace, label) for label in labels]
    sent, paths = along(read, lambda source: frozen.sources.get(source, nothing), frozen.writes), [x for x, _ in read]
    effects = pair.said(frozen.decode(torch.stack([sent[path] for path in paths]), pair.rows)[:, :, 0])
    if constant in sent:  # of the decoder: the norm's bias and the unembedding's
        effects[paths.index(constant)] = pair.said(pair.rows.at(sent[constant])[:, 0]) + pair.direction[:, -1]
    return effects


@torch.no_grad()
def parts_of_cut(pair: Pair, stream: str, is_by_write: bool) -> dict[str, Float[Tensor, "measure batch"]]:
    """Clean, corrupted, from_input and from_map of every part at a stream: of positions, or of writes at positions."""
    (held, clean), (_, corrupted) = (_terms(pair, trace, stream) for trace in (pair.clean, pair.corrupted))
    nothing = torch.zeros_like(pair.clean[stream])
    effects: dict[str, Tensor] = {}
    for label in dict.fromkeys([*clean, *corrupted]):
        one, other = (terms.get(label, (nothing, nothing)) for terms in (clean, corrupted))
        effects[label] = _split(*one, *other)
    places, names = _places(pair)
    found: dict[str, Tensor] = {}
    for label in held:
        by_place = _by_place(effects[label], pair.clean.valid, places)
        for name, values in zip(names, by_place.unbind(-1), strict=True):
            key = f"{label} @ {name}" if is_by_write else name
            found[key] = found.get(key, 0) + values
    for label in [label for label in effects if label not in held] if is_by_write else []:
        found[label] = effects[label].sum(-1)
    constant = torch.stack([pair.said(_norm_bias(pair)) + pair.direction[:, -1]] * 2)
    found[DECODER_STEP + BIAS if is_by_write else "bias"] = torch.cat([constant, torch.zeros_like(constant)])
    if not is_by_write:
        found["bias"] = found["bias"] + sum(own.sum(-1) for label, own in effects.items() if label not in held)
    return found


def _terms(pair: Pair, trace: Trace, stream: str) -> tuple[list[str], dict[str, Term]]:
    """Labels of what the stream is the sum of, and all terms of a run's logit difference, with constants of later steps."""
    network = trace.network
    with torch.enable_grad():
        frozen = FrozenNetwork.of(trace)
    start = network.streams.index(stream)
    functional = pair.direction[None, :, None, :-1].to(trace[stream])
    gradient = frozen.decode_transpose(functional, pair.rows)[:, 0]
    constants: dict[str, Term] = {}
    for stage, labels in zip(
        reversed(frozen.stages[start:]), reversed(frozen_biases(network.stages)[start:]), strict=True
    ):
        for label, steps in labels:
            constants[label] = stage.constants[steps].sum(0), gradient[0]
        gradient = gradient + stage.pulled_back(gradient, [True] * len(stage.stage.steps))
    held = {label: trace[label] for label in network.sources}
    for stage in network.stages[:start]:
        held |= dict(zip((step.write for step in stage.steps), trace.writes(stage), strict=True))
    return list(held), {label: (value, gradient[0]) for label, value in held.items()} | constants


def _split(x: Tensor, g: Tensor, other_x: Tensor, other_g: Tensor) -> Float[Tensor, "measure batch pos"]:
    """Clean, corrupted, from_input and from_map of a term, float64."""
    x, g, other_x, other_g = (values.double() for values in (x, g, other_x, other_g))
    clean, corrupted = (g * x).sum(-1), (other_g * other_x).sum(-1)
    from_input = ((g + other_g) * (x - other_x)).sum(-1) / 2
    from_map = ((g - other_g) * (x + other_x)).sum(-1) / 2
    return torch.stack([clean, corrupted, from_input, from_map])


def _norm_bias(pair: Pair) -> Float[Tensor, "batch d_model"]:
    """The final norm's bias as the unembedding reads it."""
    bias = pair.clean.decoder.norm.bias
    like = torch.zeros_like(pair.direction[:, :-1])
    return like if bias is None else like + bias


def _places(pair: Pair) -> tuple[Tensor, list[str]]:
    """Position of every cell among its prompt's real tokens, and names of positions: of one prompt, with its tokens."""
    valid = pair.clean.valid
    places = (valid.cumsum(1) - 1).clamp_min(0)
    count = int(places.max()) + 1
    if len(valid) > 1:
        return places, [str(place) for place in range(count)]
    rows = [trace.tokens[valid].tolist() for trace in (pair.clean, pair.corrupted)]
    texts = token_names(pair.network.tokenizer, [pair.clean.tokens, pair.corrupted.tokens])
    pairs = [list(dict.fromkeys(visible(texts[token]) for token in own)) for own in zip(*rows, strict=True)]
    return places, [f"{place} {'|'.join(own)}" for place, own in enumerate(pairs)]


def _by_place(values: Float[Tensor, "measure batch pos"], valid: Tensor, places: Tensor) -> Tensor:
    """Values by position among real tokens [measure, batch, place]."""
    found = values.new_zeros(*values.shape[:-1], int(places.max()) + 1)
    return found.scatter_add(-1, places.expand_as(values), values.masked_fill(~valid, 0))
