r"""The detached map of a difference of two runs: a logit difference, divided over what a stream holds at every position.

Frozen, each run's network is affine from any stream h = sum_m x_m on, with m(run) the logit difference and g the gradient of
m at that stream,

.. math::
    m(\text{run}) = \sum_t \sum_m \langle g_t, x_{m,t} \rangle + \text{constants of later steps} .

The two runs have other inputs and other maps (patterns, scales, gates). Both changes are symmetric in the runs and exact:

.. math::
    \langle g, x \rangle - \langle g', x' \rangle
      = \underbrace{\langle \tfrac{g + g'}{2}, x - x' \rangle}_{\text{from\_input}}
      + \underbrace{\langle g - g', \tfrac{x + x'}{2} \rangle}_{\text{from\_map}} .

Source: Golden, arXiv 2505.24293 (the detached map); the split is ours. Cost: freezing both runs, and a backward pass of each.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.circuits.pairs import Pair
from tl_jets.core.frozen_network import FrozenNetwork
from tl_jets.core.protocol import BIAS, DECODER_STEP, frozen_biases
from tl_jets.core.tokens import token_names, visible
from tl_jets.core.trace import Trace

# Value and gradient of a term of the logit difference, both [batch, pos, d_model].
Term = tuple[Tensor, Tensor]


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
