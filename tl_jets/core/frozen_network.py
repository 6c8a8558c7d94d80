r"""A residual network frozen at one input: every stage is an affine map of its stream.

With norm scales, attention patterns and gates held at the true streams (`tl_jets.calculus.frozen`), each step writes

.. math::
    \gamma_s(x) = A_s x + b_s, \qquad A_s h + b_s = \gamma_s(h) \text{ at the true stream } h ,

and the final norm is x -> D x + bias with its scale at the last stream. So the logits are a sum over all paths: a
source (embeddings, edits by hooks, the biases b_s) carried by products of A's and by D.

A_s x comes from the graph of one evaluation of the stage (`tl_jets.core.linear_map`), whose batched backward passes
take many vectors at once and run no module or hook; b_s comes from a pass of the frozen stage at zero. A_s h + b_s is
compared with the model's own write first: a model that cannot be frozen is refused.

==========  =================================================
symbol      name here
==========  =================================================
A_s         `FrozenStage.linear`
b_s         `FrozenStage.constants`; labels by `frozen_biases`
h           `trace[stage.stream]`
D           `FrozenNetwork.decode`, `frozen_norm`
==========  =================================================

Source: Golden, *Equivalent Linear Mappings of Large Language Models* (arXiv 2505.24293), section 3; Elhage et al. 2021.
Cost: two evaluations of every stage, whose graphs are kept while the object lives. A_s x of many vectors together costs
a fraction of an evaluation each (stories260K, 21 tokens: 0.06 ms against 1.7 to 3.5 ms).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tl_jets.calculus import Norm, NormJet, frozen, norm_jet
from tl_jets.calculus.norms import check_order
from tl_jets.core.linear_map import GraphMap, LinearMap
from tl_jets.core.options import check_choice
from tl_jets.core.protocol import BIAS, DECODER_STEP, FINAL_STREAM, Stage, frozen_biases
from tl_jets.core.selection import Rows
from tl_jets.core.trace import Trace

Linearize = Literal["jet", "detached"]
# Number of elements in a batch of streams.
CHUNK_ELEMENTS = 2**20
MAX_CHUNK = 128


def freeze(function: Callable[[Tensor], Tensor], point: Tensor) -> tuple[GraphMap, Callable[[Tensor], Tensor]]:
    """A function with norm scales, attention patterns and gates frozen at a point: its derivative, and its values elsewhere.

    Values that the function computes once per input must be computed before: they would be kept frozen.
    """
    tape: list[tuple[str, Any]] = []
    with torch.inference_mode(False), torch.enable_grad():
        leaf = point.detach().clone().requires_grad_()
        with frozen(record=tape):
            linear = GraphMap(leaf, function(leaf))

    def at(x: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad(), frozen(replay=tape):
            return function(x.detach().clone())

    return linear, at


def freeze_stacked(gammas: Callable[[Tensor], Tensor], point: Tensor) -> tuple[GraphMap, Callable[[Tensor], Tensor]]:
    """`freeze` of stacked writes [write, batch, pos, d_model]; the derivative gives them side by side."""
    linear, at = freeze(lambda x: rearrange(gammas(x), "write ... d_model -> ... (write d_model)"), point)
    width = point.shape[-1]
    return linear, lambda x: rearrange(at(x), "... (write d_model) -> write ... d_model", d_model=width)


@dataclass(frozen=True, eq=False)
class FrozenStage:
    """One stage as an affine map: `linear` gives all steps' writes, concatenated; `constants` are those at zero."""

    stage: Stage
    linear: LinearMap
    constants: Float[Tensor, "write batch pos d_model"]

    @classmethod
    def of(cls, trace: Trace, stage: Stage) -> FrozenStage:
        """Freeze one stage at its true stream.

        Raises:
            NotImplementedError: The stage is not affine when frozen; the message names it and the model.
            ValueError: The hooks on the model are not those of the trace.
        """
        found, error = _freeze(trace, stage)
        _check_affine(trace, {stage: error})
        return found

    def writes(self, values: Float[Tensor, "path batch pos d_model"]) -> Float[Tensor, "write path batch pos d_model"]:
        """A_s x of every step, for many x."""
        found = self.linear.apply(values, chunk_size=chunk_size(values[:1]))
        return rearrange(found, "... (write d_model) -> write ... d_model", write=len(self.stage.steps))

    def pulled_back(
        self, functionals: Float[Tensor, "many batch pos d_model"], taken: list[bool]
    ) -> Float[Tensor, "many batch pos d_model"]:
        """Pull functionals g of the writes back to the stream: the sum of A_s' g over the steps that are `taken`."""
        rows = torch.cat([functionals if take else torch.zeros_like(functionals) for take in taken], -1)
        return self.linear.apply_transpose(rows, chunk_size=chunk_size(functionals[:1]))


@dataclass(frozen=True, eq=False)
class FrozenNetwork:
    """A network frozen at one input: its stages as affine maps, and the final norm's frozen scale."""

    trace: Trace
    stages: tuple[FrozenStage, ...]
    final_scale: Float[Tensor, "batch pos 1"]
    constants: dict[str, Float[Tensor, "batch pos d_model"]]

    @classmethod
    def of(cls, trace: Trace) -> FrozenNetwork:
        """Freeze every stage of a trace's network; kept with the trace. Raises what `FrozenStage.of` raises."""
        key = ("frozen network", trace.network.stages)
        if key not in trace.memo:
            frozen = [_freeze(trace, stage) for stage in trace.network.stages]
            constants: dict[str, Tensor] = {}
            for (stage, _), labels in zip(frozen, frozen_biases(trace.network.stages), strict=True):
                constants |= {label: stage.constants[steps].sum(0) for label, steps in labels}
            is_real = trace.valid[..., None]
            matter = [((value != 0) & is_real).any() for value in constants.values()]
            matter = _check_affine(trace, {stage.stage: error for stage, error in frozen}, matter)
            constants = {label: constants[label] for label, matters in zip(constants, matter, strict=True) if matters}
            final = trace[FINAL_STREAM]
            scale = norm_jet(trace.decoder.norm, final, final, 0).alpha[0]
            trace.memo[key] = cls(trace, tuple(stage for stage, _ in frozen), scale[..., None], constants)
        return trace.memo[key]

    @cached_property
    def sources(self) -> dict[str, Float[Tensor, "batch pos d_model"]]:
        """All sources by label: embeddings, edits, biases. Constants that are zero at all real tokens are omitted."""
        trace, network = self.trace, self.trace.network
        found = {label: trace[label] for label in network.sources}
        for stream in network.streams:
            found |= trace.edits(stream)
        bias = trace.decoder.norm.bias
        if (bias is not None and bool(bias.any())) or trace.decoder.has_bias:
            like = torch.zeros_like(trace[FINAL_STREAM])
            found[DECODER_STEP + BIAS] = like if bias is None else like + bias
        return found | self.constants

    def kept(self, index: int, values: Tensor) -> Tensor:
        """The part of the values that bypasses a stage unchanged: all of it."""
        return values

    def writes(self, index: int, values: Float[Tensor, "path batch pos d_model"]) -> Tensor:
        """A_s x of every step of a stage, for many x [write, path, batch, pos, d_model]."""
        return self.stages[index].writes(values)

    def decode(
        self, values: Float[Tensor, "path batch pos d_model"], rows: Rows
    ) -> Float[Tensor, "path batch out_pos d_model"]:
        """D x at selected positions: the input of the unembedding from parts of the last stream, without biases."""
        norm = self.trace.decoder.norm
        return norm.scale(norm.center(rows.at(values, 1))) * rows.at(self.final_scale)

    def terms(
        self, values: Float[Tensor, "path batch pos d_model"], rows: Rows
    ) -> list[tuple[Float[Tensor, "path batch out_pos d_model"], float]]:
        """D x of every path, with bias weight 0: b_U is a path of its own."""
        return [(self.decode(values, rows), 0.0)]

    def decode_transpose(
        self, functionals: Float[Tensor, "many batch out_pos d_model"], rows: Rows
    ) -> Float[Tensor, "many out_pos batch pos d_model"]:
        """D' u for functionals u of the unembedding's input, each at one of the positions."""
        norm, final = self.trace.decoder.norm, self.trace[FINAL_STREAM]
        values = norm.center(norm.scale(functionals)) * rows.at(self.final_scale)
        found = final.new_zeros(*values.shape[:3], *final.shape[1:])
        batch, out_pos = torch.meshgrid(*map(torch.arange, rows.index.shape), indexing="ij")
        found[:, batch, out_pos, rows.index] = values
        return found.transpose(1, 2)


def frozen_norm(norm: Norm, center: Float[Tensor, "*rows d_model"], variate: Float[Tensor, "*rows d_model"]) -> NormJet:
    """The norm with its scale frozen at the variate, as a `NormJet`: `beta` is 0, `rho` and `tail_bound` are NaN."""
    scale = norm_jet(norm, variate, variate, 0)
    nothing = torch.full_like(scale.alpha, float("nan"))
    return replace(scale, center=norm.center(center.double()).to(center), rho=nothing[0], tail_bound=nothing)


def affine_terms(
    trace: Trace, stage: Stage | None, values: Float[Tensor, "center batch pos d_model"]
) -> tuple[Float[Tensor, "step center batch pos d_model"], Float[Tensor, "constant batch pos d_model"]]:
    """A_s x_i of every step of a frozen stage (None: the final norm), and its constants as in `affine_labels`."""
    if stage is None:
        norm, final = trace.decoder.norm, trace[FINAL_STREAM]
        linear = frozen_norm(replace(norm, bias=None), values, final.expand_as(values)).value()
        return linear[None], norm.add_bias(torch.zeros_like(final))[None]
    frozen_stage = FrozenStage.of(trace, stage)
    with torch.inference_mode(False):
        writes = frozen_stage.writes(values.detach().clone())
    reading = [index for index, step in enumerate(stage.steps) if step.kind != "attn_bias"]
    constants = [frozen_stage.constants[steps].sum(0) for _, steps in frozen_biases([stage])[0]]
    return writes[reading], torch.stack(constants)


def affine_labels(stage: Stage | None) -> tuple[list[str], list[str]]:
    """Labels of the steps of a frozen stage (None: the final norm), and of its constants."""
    if stage is None:
        return [DECODER_STEP], [DECODER_STEP + BIAS]
    reading = [step.label for step in stage.steps if step.kind != "attn_bias"]
    return reading, [label for label, _ in frozen_biases([stage])[0]]


def read_order(linearize: Linearize, order: Any, default: int) -> int:
    """The requested order, or the default; 0 for detached terms, which have no order."""
    check_choice("linearize", linearize, get_args(Linearize))
    if order is None:
        return 0 if linearize == "detached" else default
    check_order(order)
    return order


def check_detached(*, order: int, center_scale: str, weights: Any = None, objective: str = "centered_l2") -> None:
    """Raise ValueError for options without a meaning in the detached form."""
    given = {
        f"order={order}": (order > 0, "they are linear in the centers, so that there is no higher order"),
        "weights": (weights is not None, "they all carry 1: together they are the model as they are"),
        f"objective={objective!r}": (objective != "centered_l2", "they have no weights to optimize"),
        f"center_scale={center_scale!r}": (center_scale != "none", "a longer center only gives a longer term"),
    }
    for option, (is_given, reason) in given.items():
        if is_given:
            raise ValueError(
                f"Detached terms take no order above 0, weights, objective or center_scale; got {option}, but {reason}. Leave "
                f"it out, or use linearize='jet'."
            )


def chunk_size(like: Tensor) -> int:
    """How many streams of this size are evaluated at once: about a million numbers, and at least one stream."""
    return max(1, min(MAX_CHUNK, CHUNK_ELEMENTS // max(1, like.numel())))


@torch.inference_mode(False)
def _freeze(trace: Trace, stage: Stage) -> tuple[FrozenStage, Tensor]:
    """One stage as an affine map, and its relative error at the true stream, which is still to be checked."""
    gammas, stream = trace.stage_function(stage), trace[stage.stream]
    truth = trace.writes(stage).detach()
    if any(step.kind == "head" for step in stage.steps):
        with torch.no_grad():
            gammas(stream)  # a view's memo (heads at zero) must not be filled while frozen
    linear, at = freeze_stacked(gammas, stream)
    constants = at(torch.zeros_like(stream))
    found = FrozenStage(stage, linear, constants)
    written = found.writes(stream.detach()[None])[:, 0]
    with torch.no_grad():
        padding, error = ~trace.valid[..., None], written + constants - truth
        error, size, own = (x.detach().masked_fill(padding, 0).norm() for x in (error, stream, truth))
        return found, error / torch.maximum(size, own)


def _check_affine(trace: Trace, errors: dict[Stage, Tensor], more: Sequence[Tensor] = ()) -> list[float]:
    """Compare A_s h + b_s of stages with the model's own writes; returns `more`, read along with all errors."""
    read = [*errors.values(), *more]
    read = torch.stack([value.to(read[0]) for value in read]).tolist() if read else []
    for stage, error in zip(errors, read, strict=False):
        if not error <= max(rounding(trace[stage.stream].dtype), 10 * trace.recording.accuracy):
            view, labels = trace.network.view, ", ".join(step.label for step in stage.steps[:3])
            raise NotImplementedError(not_affine(f"{labels} of {view.name}", getattr(view, "model", None), error))
    return read[len(errors) :]


def rounding(dtype: torch.dtype) -> float:
    """Largest relative error of a frozen function due to rounding."""
    return 1e-10 if dtype is torch.float64 else 1e-4


def not_affine(what: str, model: Any, error: float) -> str:
    """The error message for a part of a model, or all of it, that is not affine when frozen."""
    cfg = getattr(model, "cfg", None)
    names = [getattr(cfg, name, None) for name in ("model_name", "original_architecture", "architecture")]
    called = ", ".join(str(name) for name in names if name) or "a custom model"
    return (
        f"A stage and a model must come out affine with norm scales, attention patterns and gates frozen; {what} ({called}) is "
        f"off by {error:.1e} (relative), so something in it multiplies what depends on the input and is none of the three, or "
        f"differentiates itself (torch.autograd.Function). It has no exact linear form: use linearize='jet' where there is a "
        f"choice, and report the model's name."
    )
