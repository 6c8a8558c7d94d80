"""The structure of a residual network at a granularity: stages, steps and labels. Nothing here runs the model."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from importlib import import_module
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from tl_jets.calculus.modes import refuse_autocast
from tl_jets.core.decoder import Decoder
from tl_jets.core.labels import LabelInput, read_label
from tl_jets.core.options import check_choice
from tl_jets.core.protocol import (
    DECODER_STEP,
    FINAL_STREAM,
    GRANULARITIES,
    Granularity,
    ModelView,
    Stage,
    State,
    Step,
    some,
)

# Modules whose `view(model)` returns the view of a model, or None; loaded with the first model.
ADAPTERS = ["tl_jets.adapters"]

Network = TypeVar("Network", bound="Structure")


class Structure:
    """A model as a sequence of stages on one stream, with a decoder: `ResidualNetwork` without traces."""

    def __init__(self, model: Any, granularity: Granularity = "sublayer", neurons: str | Sequence[str] = ()):
        check_choice("granularity", granularity, GRANULARITIES)
        self.granularity: Granularity = granularity
        self.view: ModelView = model.view if isinstance(model, Structure) else _view(model)
        self.checks: set[Hashable] = getattr(model if isinstance(model, Structure) else self.view, "checks", set())
        if isinstance(model, Structure):
            self.view.follow(everywhere=False)
        self.neurons = tuple(dict.fromkeys([neurons] if isinstance(neurons, str) else neurons))
        self._n_layers = getattr(self.view, "n_layers", 0) or len(self.view.stages("block"))
        self.stages = self._with_neurons(self.view.stages(granularity))
        self._step_of = {step.label: step for stage in self.stages for step in stage.steps}

    def __repr__(self) -> str:
        return (
            f"ResidualNetwork({self.view.name}, granularity={self.granularity!r}: {len(self.stages)} stages, "
            f"{len(self.steps)} writes, d_model={self.decoder.W_U.shape[0]}, d_vocab={self.decoder.W_U.shape[1]})"
        )

    @property
    def decoder(self) -> Decoder:
        """Final norm and unembedding, as last read: at a trace, or when the network was passed to a function."""
        return self.view.decoder

    def decoder_at(self, state: State) -> Decoder:
        """The decoder; raises ValueError if weights outside the blocks changed since `state`, or under autocast."""
        refuse_autocast(self.decoder.W_U.device)
        now, then = self.view.hook_state(-1), state[:1]
        if [weights for _, weights in now] != [weights for _, weights in then]:
            raise ValueError(
                "A trace must be decoded with the weights with which it was made; those of the final norm, the unembedding "
                "or the embedding have changed since. Trace again."
            )
        return self.decoder

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps in the order of the network, without the decoder's `ln_final`."""
        return tuple(self._step_of.values())

    @property
    def streams(self) -> tuple[str, ...]:
        """Labels of all streams, `0_pre` to `final_post`."""
        return (*(stage.stream for stage in self.stages), FINAL_STREAM)

    @property
    def sources(self) -> tuple[str, ...]:
        """Labels of the terms of the first stream: `embed`, and `pos_embed` if positions are added to it."""
        return self.view.sources

    @property
    def components(self) -> tuple[str, ...]:
        """Labels of the terms of the last stream, without edits by hooks: sources, then writes."""
        return (*self.sources, *(step.write for step in self.steps))

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label that a trace can be indexed with, without edits by hooks."""
        own = [*self.components, *self.streams]
        finer = [label for stage in self.view.stages("sublayer") for label in (stage.stream, *_writes(stage))]
        return tuple(dict.fromkeys(own + finer))

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self._n_layers

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        return self.view.tokenizer

    @property
    def known_tokens(self) -> Int[Tensor, " token"]:
        """Ids that the tokenizer knows (embeddings often have more rows); raises ValueError without a tokenizer."""
        if self.tokenizer is None:
            raise ValueError("Tokens are known to a tokenizer; the model has none. Pass ids.")
        d_vocab = self.decoder.d_vocab
        return torch.tensor(
            sorted({token for token in self.tokenizer.get_vocab().values() if token < d_vocab}), device="cpu"
        )

    def at(self: Network, granularity: Granularity) -> Network:
        """The same model at another granularity; shares the view, its values and, below blocks, the neurons."""
        if granularity == self.granularity:
            return self
        return type(self)(self, granularity, () if granularity == "block" else self.neurons)

    def label(self, label: LabelInput) -> str:
        """The label that a name of TransformerLens means: `label(("mlp_out", -1))`; raises what `read_label` raises."""
        return read_label(label, self._n_layers)

    def __contains__(self, label: object) -> bool:
        """Whether a trace can be indexed with a label: one of `labels`, or the write of a neuron."""
        if not isinstance(label, (str, tuple)):
            return False
        try:
            name = self.label(label)
            step = None if name in self.labels else self.view.fine_step(name)
        except (ValueError, NotImplementedError):  # no such layer or neuron, or none that can be read
            return False
        return name in self.labels or (step is not None and step.write == name)

    def part(self, step: Step) -> Stage:
        """A stage with only a neuron or the bias of an MLP, on the MLP's stream."""
        for stage in self.view.stages("sublayer"):
            if any(candidate.label == f"{step.layer}_mlp" for candidate in stage.steps):
                return Stage(stage.stream, (step,))
        raise ValueError(f"A neuron's label must name a layer that has an MLP; got {step.label!r}.")

    def _with_neurons(self, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        """Stages whose MLPs are split into the selected neurons and the rest."""
        chosen: dict[str, list[Step]] = {}
        for label in self.neurons:
            step = self.view.fine_step(label)
            if step is None or step.kind != "neuron" or step.label != label or self.granularity == "block":
                raise ValueError(
                    f"neurons must be labels such as 'L0N17' of a model with MLPs, at granularity 'sublayer' or 'head'; got "
                    f"{label!r} at {self.granularity!r}."
                )
            chosen.setdefault(f"{step.layer}_mlp", []).append(step)

        def split(step: Step) -> tuple[Step, ...]:
            rest = Step(f"{step.label}_rest", step.layer, "mlp_rest")
            return (*chosen[step.label], rest) if step.label in chosen else (step,)

        return tuple(Stage(stage.stream, tuple(s for step in stage.steps for s in split(step))) for stage in stages)

    def shares_model(self, other: Structure) -> bool:
        """Whether traces of this network serve another: of the same model object, and of no dictionaries but this one's."""
        own, its = (getattr(network.view, "dictionaries", ()) for network in (self, other))
        models = [getattr(network.view, "model", network.view) for network in (self, other)]
        return models[0] is models[1] and its in ((), own)

    def stage(self, label: LabelInput) -> Stage:
        """The stage named by a step (`3_mlp`), its write (`3_mlp_out`) or its stream (`3_mid`)."""
        label = self.label(label)
        for stage in self.stages:
            if label == stage.stream or any(label in (step.label, step.write) for step in stage.steps):
                return stage
        raise ValueError(
            f"A stage is named by one of its steps or by the stream that it reads; got {label!r}. At granularity "
            f"{self.granularity!r} the steps are {some(self._step_of, near=label)} and the decoder is {DECODER_STEP!r}."
        )

    def next_stream(self, stage: Stage) -> str:
        """Label of the stream that a stage produces."""
        return self.streams[self.stages.index(stage) + 1]


def _view(model: Any) -> ModelView:
    if isinstance(model, ModelView):
        return model
    for adapter in ADAPTERS:
        view = import_module(adapter).view(model)
        if view is not None:
            return view
    raise TypeError(unknown_model(model))


def unknown_model(model: Any) -> str:
    """Error message for an unknown kind of model, with a remedy."""
    kind = type(model)
    roots = {base.__module__.split(".")[0] for base in kind.__mro__}
    remedy = ""
    if isinstance(model, str):
        remedy = f" Load it first: TransformerBridge.boot_transformers({model!r})."
    elif hasattr(model, "_orig_mod"):
        remedy = " Pass the model that was compiled, not what torch.compile returned: model._orig_mod."
    elif "transformers" in roots and isinstance(model, torch.nn.Module):
        name = getattr(getattr(model, "config", None), "_name_or_path", "") or "its name on the hub"
        remedy = f" Wrap it first: TransformerBridge.boot_transformers({name!r}, hf_model=model)."
    return (
        f"A model must be a TransformerLens TransformerBridge or HookedTransformer, a tl_jets.CallableModel or a "
        f"tl_jets.ResidualNetwork; got {kind.__module__}.{kind.__qualname__}.{remedy}"
    )


def _writes(stage: Stage) -> tuple[str, ...]:
    return tuple(step.write for step in stage.steps)
