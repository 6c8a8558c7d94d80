r"""A transformer as a residual network of plain callables: stages, writes, streams, labels, traces.

A residual network (Chen et al., eq. 1-4) is

.. math::
    h_0 = \eta(z), \qquad h_l = h_{l-1} + \gamma_l(h_{l-1}), \qquad
    \text{logits} = U \gamma_{L+1}(h_L) + b_U .

Here it is a sequence of **stages**. A stage is the set of **writes** that read the same **stream**: a sequential
block is two stages of one write, a parallel block (Pythia, GPT-J) is one stage of two, and at head granularity every
head of an attention layer is a write of its own. A write is what a step *adds*; it never contains the identity.

===============  ==============================  =====================================================
symbol           name here                       label
===============  ==============================  =====================================================
h_l              stream                          ``3_pre``, ``3_mid``, ``final_post``
gamma_l          step                            ``3_attn``, ``3_mlp``, ``3_block``, ``L3H2``, ``3_attn_bias``
gamma_l(h)       write                           step + ``_out`` (``3_mlp_out``; ``3_attn_bias`` is its own write)
part of an MLP   neuron, and what is without     ``L3N17``, ``3_mlp_bias``; with chosen neurons the others, ``3_mlp_rest``
eta(z)           sources                         ``embed``, ``pos_embed``
                 edit of a stream by a hook      ``edit:blocks.3.hook_resid_pre``
===============  ==============================  =====================================================

This module knows no TransformerLens: a *view* (see `ModelView`) tells it what it must know about a model.
`tl_jets.adapters` holds the views of TransformerLens models; `CallableModel` is the view of plain functions.

Example:
    >>> import torch
    >>> from tl_jets.calculus import Norm
    >>> from tl_jets.core.decoder import Decoder
    >>> _ = torch.manual_seed(0)
    >>> W = torch.randn(2, 4, 4)
    >>> model = CallableModel(
    ...     embed=torch.nn.Embedding(5, 4),
    ...     stages=[{"0_block": lambda x: x @ W[0]}, {"1_block": lambda x: torch.tanh(x @ W[1])}],
    ...     decoder=Decoder(norm=Norm("RMS"), W_U=torch.randn(4, 5), b_U=torch.zeros(5)),
    ... )
    >>> trace = ResidualNetwork(model).trace(torch.tensor([[0, 3, 1]]))
    >>> bool(torch.allclose(trace["final_post"], trace["embed"] + trace["0_block_out"] + trace["1_block_out"]))
    True
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_jets.calculus.modes import refuse_autocast
from tl_jets.core.decoder import Decoder
from tl_jets.core.protocol import (
    DECODER_STEP,
    FINAL_STREAM,
    GRANULARITIES,
    Granularity,
    ModelView,
    Recording,
    Stage,
    State,
    Step,
    some,
)
from tl_jets.core.trace import Trace, check_decoder

# Modules whose `view(model)` returns the view of a model of their kind, or None; loaded when a model is first given.
ADAPTERS = ["tl_jets.adapters"]


class ResidualNetwork:
    """A model as a sequence of stages, with a decoder; it owns what is computed once per model.

    The model is never changed. Keep the object and pass it instead of the model where a function is called often:
    the self-check and the metric of the unembedding are then computed once, and again where weights were changed, in whatever
    way, or others took their place (`tl_jets.core.changes` says how that is noticed).

    Args:
        model: A `TransformerBridge`, a `HookedTransformer`, a `CallableModel`, or a network (returned at another
            granularity, sharing the view).
        granularity: `"block"` (one write a block), `"sublayer"` (attention and MLP) or `"head"` (every head, the
            attention bias, and the MLP).
        neurons: Neurons (`"L3N17"`) that are steps of their own, beside `3_mlp_rest`, the other neurons of the layer and its
            bias. Traces know every neuron's write without this.

    Raises:
        TypeError: The model is of no known kind.
        NotImplementedError: The model is known and has no residual stream of a decoder (encoder-decoders), or a quantized
            unembedding. State-space blocks, routed experts and quantized weights are refused where a step of theirs is needed on
            another stream than its own; streams, and what lenses make of them, are there.
        ValueError: Unknown granularity or neurons, neurons of blocks, or a model in training mode.

    Source:
        Chen et al., *Jet Expansions of Residual Computation*, eq. 1-4.
    """

    def __init__(self, model: Any, granularity: Granularity = "sublayer", neurons: str | Sequence[str] = ()):
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {GRANULARITIES}; got {granularity!r}.")
        self.granularity: Granularity = granularity
        self.view: ModelView = model.view if isinstance(model, ResidualNetwork) else _view(model)
        self._checked: set[Hashable] = model._checked if isinstance(model, ResidualNetwork) else set()
        if isinstance(model, ResidualNetwork):
            self.view.follow(everywhere=False)
        self.neurons = tuple(dict.fromkeys([neurons] if isinstance(neurons, str) else neurons))
        self.stages = self._with_neurons(self.view.stages(granularity))
        self._step_of = {step.label: step for stage in self.stages for step in stage.steps}

    def __repr__(self) -> str:
        return (
            f"ResidualNetwork({self.view.name}, granularity={self.granularity!r}: {len(self.stages)} stages, "
            f"{len(self.steps)} writes, d_model={self.decoder.W_U.shape[0]}, d_vocab={self.decoder.W_U.shape[1]})"
        )

    @property
    def decoder(self) -> Decoder:
        """Final norm and unembedding, as the model last had them: at a trace, or when it was passed as a network."""
        return self.view.decoder

    def decoder_at(self, state: State) -> Decoder:
        """The decoder, for what was made with the weights of a state of the model, as `hook_state` says it.

        Raises:
            ValueError: Weights outside of the model's blocks were changed since, or `torch.autocast` is active.
        """
        refuse_autocast(self.decoder.W_U.device)
        now, then = self.view.hook_state(-1), state[:1]
        if [weights for _, weights in now] != [weights for _, weights in then]:
            raise ValueError(
                "What a trace gave is decoded with the weights with which it was made; those of the final norm, the unembedding "
                "or the embedding have changed since. Trace again."
            )
        return self.decoder

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps, in the order of the network; the decoder's `ln_final` is not one of them."""
        return tuple(self._step_of.values())

    @property
    def streams(self) -> tuple[str, ...]:
        """Labels of all streams, `0_pre` to `final_post`."""
        return (*(stage.stream for stage in self.stages), FINAL_STREAM)

    @property
    def sources(self) -> tuple[str, ...]:
        """Labels of what the first stream is the sum of: `embed`, and `pos_embed` where positions are added to it."""
        return self.view.sources

    @property
    def components(self) -> tuple[str, ...]:
        """Labels of everything that the last stream is the sum of, edits by hooks apart: sources, then writes."""
        return (*self.sources, *(step.write for step in self.steps))

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label that a trace can be indexed with, edits by hooks apart."""
        own = [*self.components, *self.streams]
        finer = [label for stage in self.view.stages("sublayer") for label in (stage.stream, *_writes(stage))]
        return tuple(dict.fromkeys(own + finer))

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        return self.view.tokenizer

    @property
    def known_tokens(self) -> Int[Tensor, " token"]:
        """Ids that the tokenizer knows, for `rows` and `columns` of n-grams: embeddings often have more rows than that.

        Raises:
            ValueError: The model has no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("Tokens are known to a tokenizer; the model has none. Pass ids.")
        d_vocab = self.decoder.d_vocab
        return torch.tensor(sorted({token for token in self.tokenizer.get_vocab().values() if token < d_vocab}))

    @classmethod
    def of(cls, model: Any, granularity: Granularity | None = None) -> ResidualNetwork:
        """The network of what a user passed: itself, if it is one, unless another granularity is asked for.

        Args:
            model: A model or a network.
            granularity: Of the network; None for its own, and the constructor's default for a model.

        Returns:
            The network passed, or a new one, which shares the view of a network.

        Raises:
            TypeError: As the constructor, which says more: no known kind of model.
            NotImplementedError: As the constructor: a known kind that is not supported.
            ValueError: As the constructor: an unknown granularity, or a model in training mode.
        """
        network = model if isinstance(model, cls) else cls(model)
        network.view.follow(everywhere=False)
        return network if granularity is None else network.at(granularity)

    def at(self, granularity: Granularity) -> ResidualNetwork:
        """The same model at another granularity; the view, what it has computed and, below blocks, neurons are shared."""
        if granularity == self.granularity:
            return self
        return ResidualNetwork(self, granularity, () if granularity == "block" else self.neurons)

    def __contains__(self, label: object) -> bool:
        """Whether a trace can be indexed with a label, edits by hooks apart: one of `labels`, or the write of a neuron."""
        if label in self.labels:
            return True
        try:
            step = self.view.fine_step(str(label))
        except (ValueError, NotImplementedError):  # a layer has fewer neurons, or none that can be read
            return False
        return step is not None and step.write == label

    def part(self, step: Step) -> Stage:
        """The stage that holds nothing but a neuron or the bias of an MLP, of the stream that the MLP reads."""
        for stage in self.view.stages("sublayer"):
            if any(candidate.label == f"{step.layer}_mlp" for candidate in stage.steps):
                return Stage(stage.stream, (step,))
        raise ValueError(f"A neuron is of a layer that has an MLP; got {step.label!r}.")

    def _with_neurons(self, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        """Stages whose MLPs are split into the chosen neurons and the rest."""
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

    def shares_model(self, other: ResidualNetwork) -> bool:
        """Whether two networks are of the same model object, so that a trace of one serves the other."""
        return getattr(self.view, "model", self.view) is getattr(other.view, "model", other.view)

    def stage(self, label: str) -> Stage:
        """The stage that a step (`3_mlp`), its write (`3_mlp_out`) or its stream (`3_mid`) names."""
        for stage in self.stages:
            if label == stage.stream or any(label in (step.label, step.write) for step in stage.steps):
                return stage
        raise ValueError(
            f"A stage is named by one of its steps or by the stream that it reads; got {label!r}. At granularity "
            f"{self.granularity!r} the steps are {some(self._step_of)} and the decoder is {DECODER_STEP!r}."
        )

    def next_stream(self, stage: Stage) -> str:
        """Label of the stream that a stage produces."""
        return self.streams[self.stages.index(stage) + 1]

    def tokenize(self, text: str | Sequence[str], *, prepend_bos: bool | None = None) -> dict[str, Tensor]:
        """Token ids and attention mask of text, which every function takes in the place of the text.

        Args:
            text: A prompt or a list of prompts.
            prepend_bos: Whether the model's BOS is put before each; None for the model's default. False for text that begins
                with it, as a chat template writes it.

        Returns:
            `input_ids` [batch, pos], padded on the right, and `attention_mask` [batch, pos], 1 for tokens and 0 for padding.

        Raises:
            ValueError: No prompt, an empty one, or a model without a tokenizer.
            TypeError: Not text.

        Example:
            >>> from tl_jets.pretrained import load_tinydocs
            >>> network = ResidualNetwork(load_tinydocs())
            >>> network.tokenize(["is available", "is available on"], prepend_bos=False)["attention_mask"].tolist()
            [[1, 1, 0], [1, 1, 1]]
        """
        tokens, valid = self.view.tokenize(text, prepend_bos)
        return {"input_ids": tokens, "attention_mask": valid.long()}

    def trace(
        self,
        text_or_tokens: Any,
        *,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        cache: Any = None,
    ) -> Trace:
        """Run the model once on one input and return its streams and writes.

        Args:
            text_or_tokens: A prompt, a list of prompts (padded on the right, where a causal model cannot see it), token
                ids [batch, pos] or [pos], a list of ids of each prompt, or what a tokenizer or `tokenize` returns
                (`input_ids` and `attention_mask`).
            attention_mask: 1 for tokens, 0 for padding, passed to the model. Without one, pad tokens at the ends of rows of ids
                are taken for padding, with a warning where the tokenizer pads with its EOS or BOS.
            cache: A ready TransformerLens `ActivationCache` of the same input, made under the hooks that are active now: its
                streams are used, and the model runs only when a step is evaluated elsewhere. Tokens, mask and hooks are
                compared up to what the first attention writes, hooks on later layers when their steps are evaluated.

        Returns:
            A `Trace`. Evaluate it while the hooks that were active are still active.

        Raises:
            ValueError: Empty or too long input, tokens outside the vocabulary, a cache that lacks streams or is of another
                input, a model in training mode; or the streams do not add up to the model, or the decoder does not reproduce the
                logits (the message says where).

        Cost:
            One forward pass; with a cache an embedding and the first attention.
        """
        refuse_autocast(self.decoder.W_U.device)
        trace = Trace(self, self.view.record(text_or_tokens, attention_mask, cache))
        check_decoder(trace)
        return trace


class CallableModel:
    """A residual network given by plain functions, without TransformerLens.

    Args:
        embed: Input -> first stream [batch, pos, d_model]; or a mapping of source labels to such functions.
        stages: One mapping a stage: step label -> function of the stream. Functions of one mapping read the same
            stream.
        decoder: Final norm and unembedding.
        name: What `repr` calls the model.

    Raises:
        ValueError: Two steps of the same label.
    """

    tokenizer = None

    def __init__(
        self,
        embed: Callable[[Tensor], Tensor] | Mapping[str, Callable[[Tensor], Tensor]],
        stages: Sequence[Mapping[str, Callable[[Tensor], Tensor]]],
        decoder: Decoder,
        name: str = "callables",
    ):
        self.embeds = dict(embed) if isinstance(embed, Mapping) else {"embed": embed}
        self.gammas = tuple(dict(stage) for stage in stages)
        self.decoder = decoder
        self.name = name
        self.sources = tuple(self.embeds)
        labels = [label for stage in self.gammas for label in stage]
        if len(set(labels)) != len(labels):
            raise ValueError(f"Step labels must be unique; got {labels}. Rename one.")

    def stages(self, granularity: Granularity) -> tuple[Stage, ...]:
        """The given stages; plain functions have one granularity only."""
        del granularity
        return tuple(
            Stage(f"{layer}_pre", tuple(Step(label, layer, "callable") for label in stage))
            for layer, stage in enumerate(self.gammas)
        )

    def fine_step(self, label: str) -> Step | None:
        """Plain functions have no neurons."""
        del label

    def tokenize(self, text: Any, prepend_bos: bool | None) -> tuple[Tensor, Tensor]:
        """Plain functions read no text."""
        del text, prepend_bos
        raise ValueError("Text needs a model with a tokenizer; plain callables have none. Pass what `embed` takes.")

    def record(self, text_or_tokens: Any, attention_mask: Tensor | None, cache: Any) -> Recording:
        """Evaluate the network on one input (a tensor that `embed` takes)."""
        if attention_mask is not None or cache is not None:
            raise ValueError("A network of plain callables takes neither attention_mask nor cache; leave them out.")
        with torch.no_grad():
            sources = {label: embed(text_or_tokens) for label, embed in self.embeds.items()}
            stream = torch.stack(list(sources.values())).sum(0)
            streams, writes = {}, {}
            for layer, stage in enumerate(self.gammas):
                streams[f"{layer}_pre"] = stream
                outs = {f"{label}_out": gamma(stream) for label, gamma in stage.items()}
                writes.update(outs)
                stream = stream + torch.stack(list(outs.values())).sum(0)
            streams[FINAL_STREAM] = stream
            logits = self.decoder.logits(self.decoder.norm(stream))
            if self.decoder.transform is not None:
                logits = self.decoder.transform(logits)
        valid = torch.ones(stream.shape[:2], dtype=torch.bool, device=stream.device)
        return Recording(text_or_tokens, valid, sources, streams, writes, logits=logits)

    def writes(self, recording: Recording, stage: Stage, stream: Tensor) -> Tensor:
        """The stage's writes at any stream, stacked."""
        del recording
        gammas = self.gammas[stage.steps[0].layer]
        return torch.stack([gammas[step.label](stream) for step in stage.steps])

    def hook_state(self, layer: int | None = None) -> State:
        """Plain functions carry no hooks."""
        del layer
        return ()

    def follow(self, *, everywhere: bool = True) -> State:
        """Nothing is kept of plain functions."""
        del everywhere
        return ()


def _view(model: Any) -> ModelView:
    if isinstance(model, ModelView):
        return model
    for adapter in ADAPTERS:
        view = import_module(adapter).view(model)
        if view is not None:
            return view
    raise TypeError(unknown_model(model))


def unknown_model(model: Any) -> str:
    """Why a model is refused that is of no known kind, and what to make of it."""
    kind = type(model)
    roots = {base.__module__.split(".")[0] for base in kind.__mro__}
    remedy = ""
    if isinstance(model, str):
        remedy = f" Load it first: TransformerBridge.boot_transformers({model!r})."
    elif "transformers" in roots and isinstance(model, torch.nn.Module):
        name = getattr(getattr(model, "config", None), "_name_or_path", "") or "its name on the hub"
        remedy = f" Wrap it first: TransformerBridge.boot_transformers({name!r}, hf_model=model)."
    return (
        f"A model must be a TransformerLens TransformerBridge or HookedTransformer, a tl_jets.CallableModel or a "
        f"tl_jets.ResidualNetwork; got {kind.__module__}.{kind.__qualname__}.{remedy}"
    )


def _writes(stage: Stage) -> tuple[str, ...]:
    return tuple(step.write for step in stage.steps)
