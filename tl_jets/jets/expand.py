r"""Algorithm 1: expand a stage of the network at several centers.

With h the true stream that the stage reads, centers x_1..x_N and weights w on the simplex (Lemma 1),

.. math::
    \gamma(h) = \sum_i w_i \, J^k \gamma(x_i)(h) + \text{remainder}, \qquad
    \text{remainder} = O\bigl(\max_i w_i \lVert x_i - h \rVert^{k+1}\bigr) .

The terms of a stage are the jets w_i J^k gamma(x_i)(h) and the identity terms: x_i for k >= 1 (eq. 9), w_i x_i for
k = 0 (footnote 2). The decoder `ln_final` has no identity; each of its terms carries w_i b_U.

**Detached** (``linearize="detached"``): with norm scales, attention patterns and gates frozen at the true streams, a stage
is affine, gamma(h) = A h + b. Its terms need no weights and no order: x_i and A x_i for every center, and b as its own
term (`3_mlp_bias`, `3_attn_bias`). The remainder is the same map of h - sum x_i, zero if the centers sum to the stream. At
the decoder A is the final norm with the scale of h_L, direct logit attribution; b_U is part of `ln_final_bias`. The
order-0 jet of x_i is that attribution times a factor per position,

.. math::
    J^0 \gamma_{L+1}(x_i) - \text{bias} = \frac{\mathrm{rms}(h_L)}{\mathrm{rms}(x_i)} \, A x_i ,

with rms = sqrt(mean(x^2) + eps), after centering for LayerNorm: on stories260K 1.5 to 16 for its components.

==========  ===========================================================
symbol      name here
==========  ===========================================================
x_i         `centers[i]`
h           `trace[stage.stream]`, the variate
k           `order`
w_i         `weights`
gamma       `trace.stage_function(stage)`; `network.decoder.norm`
==========  ===========================================================

Source: Chen et al., *Jet Expansions of Residual Computation*, Algorithm 1, Lemma 1, eq. 6-9; Golden, arXiv 2505.24293,
for detached terms. Cost: about k + 1 evaluations of an inner stage per center; detached, two evaluations and a fraction
of one per center; closed forms for the decoder.

Example:
    The two-block example of the paper, four distinct paths:

    >>> import torch
    >>> from tl_jets import CallableModel, Decoder, Norm, ResidualNetwork
    >>> _ = torch.manual_seed(0)
    >>> W = torch.randn(2, 4, 4, dtype=torch.float64)
    >>> network = ResidualNetwork(CallableModel(
    ...     embed=torch.nn.Embedding(5, 4, dtype=torch.float64),
    ...     stages=[{"0_block": lambda x: torch.tanh(x @ W[0])}, {"1_block": lambda x: torch.tanh(x @ W[1])}],
    ...     decoder=Decoder(norm=Norm("RMS"), W_U=torch.randn(4, 5).double(), b_U=torch.zeros(5).double()),
    ... ))
    >>> first = jet_expand(network, "0_block", centers=["embed"], order=1)
    >>> second = jet_expand(network, "1_block", centers=first, order=1)
    >>> for term in second.terms:
    ...     print(term)
    embed
    embed > 0_block
    embed > 1_block
    embed > 0_block > 1_block

    Detached, with the centers that sum to the stream, the terms sum to what the model has there:

    >>> exact = jet_expand(network, "1_block", centers=["embed", "0_block_out"], linearize="detached")
    >>> terms = exact(torch.tensor([[0, 3, 1]]))
    >>> terms.labels[2:], terms.relative_remainder < 1e-14
    (['embed > 1_block', '0_block_out > 1_block', '1_block_bias'], True)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from tl_jets.calculus import CENTER_SCALES, CenterScale, jet, norm_jet, rescaled
from tl_jets.core.divergence import warn_of
from tl_jets.core.frozen_network import Linearize, affine_labels, affine_terms, check_detached, read_order
from tl_jets.core.labels import LabelInput, is_label
from tl_jets.core.network import ResidualNetwork, trace_of
from tl_jets.core.options import check_choice
from tl_jets.core.path import Path
from tl_jets.core.protocol import DECODER_STEP, FINAL_STREAM, Stage, some
from tl_jets.core.trace import Trace
from tl_jets.jets.accuracy import Check
from tl_jets.jets.cache import JetCache
from tl_jets.jets.centers import Center, Function, Label, Term
from tl_jets.jets.checks import check_terms
from tl_jets.jets.simplex import gram, simplex_qp
from tl_jets.jets.weights import OBJECTIVES, Objective, decoder_weights, read_weights


def jet_expand(
    model: Any,
    step: LabelInput,
    *,
    centers: Any,
    order: int | None = None,
    weights: Literal["uniform", "optimal"] | Sequence[float] | Tensor | None = None,
    objective: Objective = "centered_l2",
    center_scale: CenterScale = "none",
    linearize: Linearize = "jet",
) -> Expansion:
    """Expand the stage of `step`, or the decoder, at `centers` (Algorithm 1), without evaluating it.

    All writes that read the same stream are expanded together: `3_attn` of a parallel block includes `3_mlp`, `L3H2`
    includes the other heads.

    Args:
        model: A TransformerLens model, or a `ResidualNetwork` (which sets the granularity of the steps).
        step: A step (`3_mlp`, `L3H2`), its stream (`3_mid`), or `ln_final` for the decoder.
        centers: One or more of: a label of the trace (`"embed"`, `"0_attn_out"`, `"3_pre"`), a `Term` of another expansion
            (`exp["embed > 0_attn"]`), an `Expansion` (all its terms), a function from a `Trace` to [batch, pos, d_model].
            A mapping names functions.
        order: k >= 0; None is 1. At order 0 a term is gamma(x_i).
        weights: `"uniform"` (None), `"optimal"`, or numbers on the simplex, [center] or [center, batch, pos]; terms are
            differentiable in a tensor of weights.
        objective: What optimal weights minimize at the decoder: the norm of the remainder in logits, up to a constant per
            token (`"centered_l2"`) or not (`"l2"`, the paper's), or KL(model || expansion) (`"kl"`). Refused elsewhere;
            at an inner stage they minimize the norm of the remainder.
        center_scale: Rescale centers inside gamma: `"none"` (the paper's), `"match"` the variate's length, or
            `"orthogonal"`, with which a norm's Taylor series converges for every acute angle.
        linearize: `"jet"` (the paper's), or `"detached"`: terms of the frozen stage, linear in the centers, and its
            constant; without order, weights, center_scale and gradients. At the decoder: direct logit attribution.

    Returns:
        An `Expansion`: call it on a prompt, tokens or a trace to get a `JetCache`.

    Raises:
        ValueError: Unknown step, label or option, no centers or duplicate names, a bad order, weights off the simplex, or
            options of jets for detached terms.
        TypeError: A center or order of the wrong type.
        NotImplementedError: On evaluation, if a stage does not come out affine.

    Source: Chen et al., Algorithm 1; Golden, arXiv 2505.24293.
    """
    network = ResidualNetwork.of(model)
    step = network.label(step)
    stage = None if step in (DECODER_STEP, FINAL_STREAM) else network.stage(step)
    order = read_order(linearize, order, 1)
    check_choice("center_scale", center_scale, CENTER_SCALES)
    check_choice("objective", objective, OBJECTIVES)
    if linearize == "detached":
        check_detached(order=order, weights=weights, objective=objective, center_scale=center_scale)
    chosen = _chosen_centers(network, centers, affine_labels(stage)[1] if linearize == "detached" else [])
    given = _chosen_weights(weights, len(chosen))
    if objective != "centered_l2" and not (stage is None and isinstance(given, str) and given == "optimal"):
        raise ValueError(
            f"objective is what weights='optimal' minimize at the decoder, {DECODER_STEP!r}; got {objective!r} at {step!r} with "
            f"{given if isinstance(given, str) else 'given'} weights. Leave it out."
        )
    return Expansion(network, stage, chosen, order, given, objective, center_scale, linearize)


@dataclass(frozen=True, eq=False)
class Expansion:
    """A stage expanded at centers: a sum of functions of the input.

    Call it on a prompt, tokens or a `Trace` to get a `JetCache`; index it by path to get a `Term`.

    Attributes:
        network: The residual network.
        stage: The stage, or None for the decoder.
        centers: The centers.
        order: k; 0 for detached terms.
        weights: `"uniform"`, `"optimal"`, or a tensor.
        objective: What optimal weights minimize at the decoder.
        center_scale: How centers are rescaled inside gamma.
        linearize: `"jet"` or `"detached"`.
    """

    network: ResidualNetwork
    stage: Stage | None
    centers: tuple[Center, ...]
    order: int
    weights: str | Tensor
    objective: Objective = "centered_l2"
    center_scale: CenterScale = "none"
    linearize: Linearize = "jet"

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms: identity terms, then jets, then the constants of detached expansions."""
        paths = [center.path for center in self.centers] if self.stage is not None else []
        paths += [center.path.then(step) for step in self.steps for center in self.centers]
        return tuple(Term(path, self) for path in (*paths, *self.constants))

    @property
    def steps(self) -> tuple[str, ...]:
        """Labels of the expanded steps."""
        if self.linearize == "detached":
            return tuple(affine_labels(self.stage)[0])
        return (DECODER_STEP,) if self.stage is None else tuple(step.label for step in self.stage.steps)

    @property
    def constants(self) -> tuple[Path, ...]:
        """Detached, paths of the frozen stage's output at zero: `3_mlp_bias`, `ln_final_bias`."""
        return tuple(map(Path, affine_labels(self.stage)[1])) if self.linearize == "detached" else ()

    @property
    def kind(self) -> str:
        """`order 1`, or `detached`."""
        return self.linearize if self.linearize == "detached" else f"order {self.order}"

    @property
    def stream(self) -> str:
        """Label of the stream that the stage reads."""
        return FINAL_STREAM if self.stage is None else self.stage.stream

    def __len__(self) -> int:
        return len(self.terms)

    def __getitem__(self, path: Any) -> Term:
        for term in self.terms:
            if str(term.path) == str(path):
                return term
        raise ValueError(
            f"A term is named by its path; got {str(path)!r}. The terms are {[str(term) for term in self.terms][:12]}."
        )

    def __repr__(self) -> str:
        return (
            f"Expansion({', '.join(self.steps[:3])} of {self.network.view.name} at {len(self.centers)} centers, {self.kind}, "
            f"{len(self)} terms)"
        )

    def __call__(self, text_or_tokens: Any, *, attention_mask: Tensor | None = None, cache: Any = None) -> JetCache:
        """Evaluate on a prompt, tokens, or a `Trace` (options as in `ResidualNetwork.trace`)."""
        trace = trace_of(self.network, text_or_tokens, attention_mask, cache)
        found = self.evaluate(text_or_tokens if isinstance(text_or_tokens, Trace) else trace)
        if self.linearize == "jet" and self.order >= 1:
            self._warn(found)
        return found

    @torch.no_grad()
    def _warn(self, found: JetCache) -> None:
        """Warn if the remainder is larger than the true output."""
        left = found.truth - sum(found.terms.values(), torch.zeros_like(found.truth))
        remainder = float(left[found.valid].norm() / found.truth[found.valid].norm())
        if remainder > 1:
            norm, variate = found.trace.decoder.norm, found.trace[self.stream][found.valid]
            values = torch.stack([center.evaluate(found.trace)[found.valid] for center in self.centers])
            scaled = rescaled(norm, values, variate, self.center_scale)
            rho = norm_jet(norm, scaled, variate.expand_as(values), 0).rho
            warn_of(", ".join(self.steps[:3]), self.order, remainder, self.center_scale, float(rho.max()))

    def evaluate(self, trace: Trace) -> JetCache:
        """Evaluate on a trace, once per trace."""
        if self not in trace.evaluated:
            found = self._evaluate(trace if trace.network is self.network else trace.on(self.network))
            # A value that references its key would keep it alive.
            trace.evaluated[self] = replace(found, expansion=cast(Expansion, weakref.proxy(self)))
        return replace(trace.evaluated[self], expansion=self)

    def check(self, cache: JetCache) -> Check:
        """The result of `cache.check()` for a cache of this expansion."""
        return check_terms(cache)

    def _evaluate(self, trace: Trace) -> JetCache:
        values = torch.stack([center.evaluate(trace) for center in self.centers])
        if self.stage is None:
            truth, identity = trace.decoder.norm(trace[FINAL_STREAM]), torch.zeros_like(values[:1])
        else:
            truth = trace[self.stream] + trace.writes(self.stage).sum(0)
            identity = values
        if self.linearize == "detached":
            linear, constants = affine_terms(trace, self.stage, values)
            parts = [*([] if self.stage is None else values), *linear.flatten(0, 1), *constants]
            # 1 for every center; at the decoder the multiples of b_U, 0 and for the constant 1.
            given = [float(self.stage is not None)] * len(self.centers) + ([1.0] if self.stage is None else [])
            weights, solution = truth.new_tensor(given)[:, None, None].expand(-1, *truth.shape[:2]), None
        else:
            jets = self._jets(trace, values)
            weights, solution = self._weights(trace, jets.sum(0), identity, truth)
            scale = weights[..., None].to(jets.dtype)
            parts = [] if self.stage is None else list(values if self.order >= 1 else scale * values)
            parts += [term for jets_of_step in jets for term in scale * jets_of_step]
        terms = dict(zip([str(term) for term in self.terms], parts, strict=True))
        if self.stage is not None:
            edits = trace.edits(self.network.next_stream(self.stage))
            terms, truth = {**terms, **edits}, truth + sum(edits.values(), torch.zeros_like(truth))
        return JetCache.of(self, trace, terms, weights=weights, truth=truth, solution=solution)

    def _jets(self, trace: Trace, values: Tensor) -> Tensor:
        """Unweighted J^k gamma(x_i)(h), [step, center, batch, pos, d_model]."""
        # Keep one set of centers per names: new terms of other expansions replace the earlier ones.
        key = ("jets", self.stage, tuple(str(center.path) for center in self.centers), self.order, self.center_scale)
        centers, jets = trace.memo.get(key, (None, None))
        if centers == self.centers:
            return jets
        norm, variate = trace.decoder.norm, trace[self.stream]
        with torch.no_grad():
            values = rescaled(norm, values, variate, self.center_scale)
            if self.stage is None:
                jets = norm_jet(norm, values, variate.expand_as(values), self.order).value(self.order)[None]
            else:
                gammas = trace.stage_function(self.stage)
                jets = torch.stack([jet(gammas, center, variate, self.order).value for center in values], 1)
        trace.memo[key] = self.centers, jets
        return jets

    def _weights(self, trace: Trace, jets: Tensor, identity: Tensor, truth: Tensor) -> tuple[Tensor, Any]:
        """Weights [center, batch, pos], and the solution if they are optimal."""
        n, shape = len(self.centers), truth.shape[:2]
        if isinstance(self.weights, Tensor):
            weights = self.weights.to(truth.device)
            if weights.ndim == 1:
                weights = weights[:, None, None].expand(n, *shape)
            if weights.shape != (n, *shape):
                raise ValueError(
                    f"weights must have shape [center] or [center, batch, pos] = {(n, *shape)}; got "
                    f"{tuple(self.weights.shape)}."
                )
            return weights, None
        if self.weights == "uniform":
            return torch.full((n, *shape), 1 / n, dtype=truth.dtype, device=truth.device), None
        with torch.no_grad():
            if self.stage is None:
                solution = decoder_weights(trace.decoder, jets, truth, self.objective)
            else:
                parts = jets if self.order else jets + identity
                target = truth - identity.sum(0) if self.order else truth
                parts, target = parts.double(), target.double()
                metric = torch.eye(parts.shape[-1], dtype=parts.dtype, device=parts.device)
                solution = simplex_qp(gram(parts - target, metric), target.square().sum(-1))
        return solution.weights.movedim(-1, 0).to(truth.dtype), solution


def _chosen_centers(network: ResidualNetwork, centers: Any, constants: list[str]) -> tuple[Center, ...]:
    """The centers of an expansion, whose names and those of its constants differ."""
    chosen = tuple(_read_centers(network, centers))
    if not chosen:
        raise ValueError("An expansion needs at least one center; got none. Pass a label such as 'embed'.")
    names = [str(center.path) for center in chosen]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Centers must have different names; got {twice} more than once.")
    taken = sorted(set(names).intersection(constants))
    if taken:
        raise ValueError(
            f"Centers and the constants of a frozen stage must have different names; {taken} are both. Constants of "
            f"earlier stages are terms of detached expansions of these."
        )
    return chosen


def _chosen_weights(weights: Any, n: int) -> str | Tensor:
    """The name of a choice of weights, or given weights of n centers."""
    if weights is None:
        return "uniform"
    if not isinstance(weights, str):
        return read_weights(weights, n)
    if weights not in ("uniform", "optimal"):
        raise ValueError(f"weights must be 'uniform', 'optimal' or numbers; got {weights!r}.")
    return weights


def _read_centers(network: ResidualNetwork, centers: Any) -> Iterable[Center]:
    if is_label(centers) or isinstance(centers, (Expansion, Term, Label, Function)) or callable(centers):
        centers = [centers]
    if isinstance(centers, Mapping):
        for name, function in centers.items():
            yield _read_function(name, function)
        return
    if not isinstance(centers, Iterable):
        raise TypeError(f"centers must be labels, terms, expansions or functions; got {type(centers).__name__}.")
    for center in centers:
        if isinstance(center, Expansion):
            yield from center.terms
        elif is_label(center):
            yield _read_label(network, network.label(center))
        elif isinstance(center, (Term, Label, Function)):
            yield center
        else:
            yield _read_function(getattr(center, "__name__", type(center).__name__), center)


def _read_function(name: str, function: Any) -> Function:
    if not isinstance(function, Callable):
        raise TypeError(
            f"A center must be a label, a term of an expansion, an expansion, or a function from a Trace to a tensor "
            f"[batch, pos, d_model]; {name!r} is a {type(function).__name__}."
        )
    return Function(name, function)


def _read_label(network: ResidualNetwork, label: str) -> Label:
    if label not in network and not label.startswith("edit:"):
        raise ValueError(
            f"A center's label must be a source, stream or write of the network, or a term of an expansion "
            f"(`expansion[{label!r}]`); got {label!r}. The labels are {some(network.labels)}."
        )
    return Label(label)
