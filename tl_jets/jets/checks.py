r"""Check the terms of an expansion by recomputing each in another way.

That terms and remainder sum to the model holds by definition and checks nothing.

==============  ==================================================================================================
measure         comparison
==============  ==================================================================================================
`term_error`    every term with the one its path names: x_i, w_i (c_0 + ... + c_k) at the center x_i, A x_i, a constant
`slopes`        these Taylor polynomials with gamma: at distance t from x_i their error must fall like t^(k+1)
`sum_error`     `truth`, which the terms approximate, with the model's own next stream, or its logits
==============  ==================================================================================================

Taylor polynomials come from Taylor arithmetic on the model's modules (`tl_jets.calculus.jet`), gamma near the center from
plain evaluation, the terms of the decoder from a closed form. Detached terms come from batched backward passes and are
compared with forward evaluations of the frozen stage, A x = gamma(x) - gamma(0); they have no slopes. Centers and weights
are not checked; `gap` certifies optimal weights.

Cost: one jet and two evaluations of the stage per center; detached, one evaluation per center and three more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tl_jets.calculus import jet, rescaled
from tl_jets.core.frozen_network import freeze_stacked
from tl_jets.core.protocol import BIAS, DECODER_STEP, FINAL_STREAM, frozen_biases, relative_error
from tl_jets.jets.accuracy import ACCURACY, Check
from tl_jets.jets.cache import JetCache

# Tolerance for terms near zero, in units of the last place of `truth`.
ROUNDING = 32
Gammas = Callable[[Tensor], Tensor]


# An expected term: its label, its weight [*cells], and its summands [summand, batch, pos, d_model].
_Expected = tuple[str, Tensor, Tensor]


@torch.no_grad()
def check_terms(cache: JetCache) -> Check:
    """Compare the cache of an `Expansion`, whole or sliced, with the model."""
    slopes: dict[str, float | None] = {}
    expected = _detached_terms(cache) if cache.expansion.linearize == "detached" else _jet_terms(cache, slopes)
    valid, truth = cache.valid, cache.truth[cache.valid]
    rounding = ROUNDING * torch.finfo(truth.dtype).eps / ACCURACY * truth.abs().max()
    errors = []
    for label, weight, summands in expected:
        own = (weight[..., None] * torch.stack([cache.here(summand) for summand in summands]))[:, valid]
        error = (cache[label][valid] - own.sum(0)).abs().max()
        errors.append(error / own.abs().max().clamp_min(rounding))
    worst = torch.stack(errors).nan_to_num(nan=torch.inf).max()
    return Check(_sum_error(cache), slopes, cache.expansion.order, float(worst))


def _sum_error(cache: JetCache) -> float:
    """Compare `truth` with the model's logits, or with its next stream."""
    trace, stage, found = cache.trace, cache.expansion.stage, cache.truth
    decoder = trace.decoder
    if stage is not None:
        own = trace[trace.network.next_stream(stage)]
    elif trace.logits is None:
        own = decoder.norm(trace[FINAL_STREAM])
    else:
        own, found = trace.logits, decoder.transformed(decoder.logits(found))
    return relative_error(found[cache.valid], cache.here(own)[cache.valid].to(found))


def _jet_terms(cache: JetCache, slopes: dict[str, float | None]) -> Iterator[_Expected]:
    """Centers and coefficients of Taylor polynomials; fills `slopes`."""
    expansion, trace = cache.expansion, cache.trace
    norm, stage, variate = trace.decoder.norm, expansion.stage, trace[expansion.stream]
    gammas, ones = _gammas(cache), torch.ones_like(cache.weights[0])
    for center, weight in zip(expansion.centers, cache.weights, strict=True):
        value = center.evaluate(trace)
        if stage is not None:
            yield str(center.path), ones if expansion.order else weight, value[None]
        point = rescaled(norm, value, variate, expansion.center_scale)
        coefficients = jet(gammas, point, variate, expansion.order).coefficients
        slopes[str(center.path)] = _slope(gammas, point, variate, coefficients, trace.valid)
        for index, step in enumerate(expansion.steps):
            yield str(center.path.then(step)), weight, coefficients[:, index]
    yield from _edits(cache)


def _detached_terms(cache: JetCache) -> Iterator[_Expected]:
    """Centers, and differences and constants of the frozen stage evaluated forward."""
    expansion, trace, ones = cache.expansion, cache.trace, torch.ones_like(cache.weights[0])
    gammas, stream = _gammas(cache), trace[expansion.stream]
    with torch.inference_mode(False):
        gammas(stream)  # values that a view computes once per input must not be frozen
    frozen_gammas = freeze_stacked(gammas, stream)[1]
    constants = frozen_gammas(torch.zeros_like(stream))
    labels = [(DECODER_STEP + BIAS, [0])]
    rows = {DECODER_STEP: 0}
    if expansion.stage is not None:
        labels = frozen_biases([expansion.stage])[0]
        rows = {step.label: row for row, step in enumerate(expansion.stage.steps)}
    for center in expansion.centers:
        value = center.evaluate(trace)
        if expansion.stage is not None:
            yield str(center.path), ones, value[None]
        writes = frozen_gammas(value)
        for step in expansion.steps:
            row = rows[step]
            yield str(center.path.then(step)), ones, torch.stack([writes[row], -constants[row]])
    for label, steps in labels:
        yield label, ones, constants[steps]
    yield from _edits(cache)


def _edits(cache: JetCache) -> Iterator[_Expected]:
    """What the user's hooks add to the stream that the stage produces."""
    trace, stage = cache.trace, cache.expansion.stage
    edits = {} if stage is None else trace.edits(trace.network.next_stream(stage))
    for label, edit in edits.items():
        yield label, torch.ones_like(cache.weights[0]), edit[None]


def _gammas(cache: JetCache) -> Gammas:
    """The stacked writes of the expansion's stage; at the decoder the final norm."""
    trace, stage = cache.trace, cache.expansion.stage
    if stage is not None:
        return trace.stage_function(stage)
    norm = trace.decoder.norm
    return lambda x: norm(x)[None]


def _slope(gammas: Gammas, center: Tensor, variate: Tensor, coefficients: Tensor, keep: Tensor) -> float | None:
    """Log-log slope of |gamma(x + t (h - x)) - sum_j c_j t^j| between two small t."""
    # A step that is small enough for the leading term to dominate, and large enough to be above rounding.
    eps, order = torch.finfo(center.dtype).eps, len(coefficients) - 1
    distance = float((variate - center).norm())
    if distance == 0:
        return None
    step = max(1e-4, (1e4 * eps) ** (1 / (order + 1))) * float(center.norm()) / distance
    errors = []
    for t in (step, step / 2):
        polynomial = sum(c * t**j for j, c in enumerate(coefficients))
        errors.append(float((gammas(center + t * (variate - center)) - polynomial)[..., keep, :].norm()))
    if errors[1] <= 64 * eps * float(coefficients[0][..., keep, :].norm()):
        return None
    return math.log2(errors[0] / errors[1])
