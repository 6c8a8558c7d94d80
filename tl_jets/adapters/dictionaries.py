"""`with_dictionary`: features of a sparse autoencoder or a transcoder as components, with what they leave over as `rest`.

With a(x) = encode(x) and decoder rows d_n, a write or a stream w is

    w = sum_n a_n d_n + rest,        n over the chosen features,

so that rest has the other features, the decoder's bias and the reconstruction error, and the sum is exact whatever the
dictionary. Of a write, each feature is a function of the stream that its step reads: a component of the joint lens, a step of
paths, a center of jets, a mediator of flow. Frozen, `encode` must be affine, as gates and activations of PyTorch are (ReLU,
thresholds, top-k). A stream is no write: the network then starts there, with the features and their rest as its sources.

Example:
    >>> import torch
    >>> import tl_jets as tj
    >>> from types import SimpleNamespace
    >>> _ = torch.manual_seed(0)
    >>> model, prompt = tj.load_tinydocs(), "This function is available on Unix and"
    >>> W = torch.randn(256, model.cfg.d_model) / 10
    >>> sae = SimpleNamespace(encode=lambda write: torch.relu(write @ W.T), W_dec=W)
    >>> network = with_dictionary(model, ("mlp_out", 3), sae, features=[5, 17])
    >>> [step.label for step in network.steps][-3:]
    ['3_mlp_F5', '3_mlp_F17', '3_mlp_rest']
    >>> joint = tj.joint_jet_lens(network, prompt, linearize="detached", positions=-1)
    >>> whole = tj.joint_jet_lens(model, prompt, linearize="detached", positions=-1)
    >>> bool(torch.isclose(joint.effects[-4:-1].sum(), whole["mlp_out", 3].sum(), atol=1e-4))
    True

Of a stream:
    >>> later = with_dictionary(model, ("resid_post", 2), sae, features=[5, 17])
    >>> later.components
    ('3_pre_F5', '3_pre_F17', '3_pre_rest', '3_attn_out', '3_mlp_out')
    >>> tj.path_sums(later, prompt, by="source").labels[:3]
    ['3_pre_F5', '3_pre_F17', '3_pre_rest']
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.adapters.base import TransformerLensView
from tl_jets.core.labels import LabelInput
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.options import check_choice
from tl_jets.core.protocol import FINAL_STREAM, Granularity, Recording, Stage, Step, some

Encodes = Literal["write", "stream"]


class Dictionary:
    """Chosen features of a dictionary, on one write or stream.

    Attributes:
        place: The step whose write is divided, or the label of the stream.
        source: What has `encode` and `W_dec`.
        features: Their numbers.
        encodes: Whether `encode` takes the write, or the stream that the step reads.
        labels: Labels of the features and of their rest.
    """

    def __init__(self, place: Step | str, source: Any, features: Sequence[int], encodes: Encodes):
        self.place, self.source, self.features, self.encodes = place, source, list(features), encodes
        name = place if isinstance(place, str) else place.label
        self.labels = [*(f"{name}_F{feature}" for feature in features), f"{name}_rest"]

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps that stand for that of the write; none for a stream."""
        if isinstance(self.place, str):
            return ()
        *features, rest = self.labels
        layer = self.place.layer
        return (*(Step(label, layer, "feature") for label in features), Step(rest, layer, "feature_rest"))

    def parts(self, whole: Tensor, stream: Tensor) -> Float[Tensor, "part batch pos d_model"]:
        """What every feature writes, and the rest of `whole`; `stream` is what the step reads, or the stream itself."""
        W_dec: Tensor = self.source.W_dec
        given = whole if self.encodes == "write" and self.steps else stream
        activations = self.source.encode(given.to(W_dec.dtype))
        if activations.shape != (*given.shape[:-1], len(W_dec)):
            raise ValueError(
                f"encode must return an activation for each of the {len(W_dec)} rows of W_dec, "
                f"{[*given.shape[:-1], len(W_dec)]} here; got {list(activations.shape)}."
            )
        rows = W_dec[self.features].to(whole.dtype)
        chosen = activations[..., self.features].to(whole.dtype)
        found = torch.stack([chosen[..., i, None] * row for i, row in enumerate(rows)])
        return torch.cat([found, (whole - found.sum(0))[None]])


class DictionaryView:
    """A view of a model whose writes, and the stream at which it starts, are divided by `dictionaries`."""

    def __init__(self, view: TransformerLensView, dictionaries: tuple[Dictionary, ...]):
        self.view, self.dictionaries = view, dictionaries
        self.divided = {own.place: own.steps for own in dictionaries if isinstance(own.place, Step)}
        self.start = next((own for own in dictionaries if not own.steps), None)

    def __getattr__(self, name: str) -> Any:
        if name == "view":  # before `__init__`: copies and pickles
            raise AttributeError(name)
        return getattr(self.view, name)

    @property
    def sources(self) -> tuple[str, ...]:
        """The embeddings, or the features of the first stream and their rest."""
        return self.view.sources if self.start is None else tuple(self.start.labels)

    def stages(self, granularity: Granularity) -> tuple[Stage, ...]:
        """The stages of the model from the first stream on, steps divided where they are whole."""
        stages = self.view.stages(granularity)
        if self.start is not None:
            later = [i for i, stage in enumerate(stages) if stage.stream == self.start.place]
            stages = stages[later[0] :] if later else ()
        return tuple(map(self._divided, stages))

    def _divided(self, stage: Stage) -> Stage:
        return Stage(stage.stream, tuple(part for step in stage.steps for part in self.divided.get(step, (step,))))

    def _whole(self, stage: Stage) -> Stage:
        """The stage with its steps undivided."""
        first = {steps[0]: step for step, steps in self.divided.items()}
        others = {part for steps in self.divided.values() for part in steps[1:]}
        return Stage(stage.stream, tuple(first.get(step, step) for step in stage.steps if step not in others))

    def fine_step(self, label: str) -> Step | None:
        """The neuron or MLP bias that a label names, of an MLP that is whole and in the network; or None."""
        step = self.view.fine_step(label)
        labels = {own.label for stage in self.stages("sublayer") for own in stage.steps}
        return step if step is not None and f"{step.layer}_mlp" in labels else None

    def inner_stage(self, label: Any) -> tuple[str, Stage] | None:
        """The hook inside a block that TransformerLens' name means, and the stage around it; or None."""
        found = self.view.inner_stage(label)
        if found is None:
            return None
        hook, stage = found[0], self._divided(found[1])
        if stage not in self.stages("sublayer"):
            raise NotImplementedError(f"{hook} is before the stream at which this network starts. Trace the model.")
        return hook, stage

    def inner(self, recording: Recording, hook: str, stage: Stage, stream: Tensor) -> Tensor:
        """The activation at a hook inside a block, with its stage evaluated at a stream."""
        return self.view.inner(recording, hook, self._whole(stage), stream)

    def writes(self, recording: Recording, stage: Stage, stream: Tensor) -> Tensor:
        """The stage's writes at any stream, in the order of its steps."""
        whole = self._whole(stage)
        found = self.view.writes(recording, whole, stream)
        if whole == stage:
            return found
        own = {dictionary.place: dictionary for dictionary in self.dictionaries}
        parts = [
            own[step].parts(write, stream) if step in own else write[None]
            for step, write in zip(whole.steps, found, strict=True)
        ]
        return torch.cat(parts)

    def record(self, *args: Any, **kwargs: Any) -> Recording:
        """Run the model once, and divide the writes and the first stream; edits of that stay apart from its rest."""
        found = self.view.record(*args, **kwargs)
        streams = {step: stage.stream for stage in self.view.stages("sublayer") for step in stage.steps}
        with torch.no_grad():
            for own in self.dictionaries:
                if isinstance(own.place, str):
                    stream = found.streams[own.place]
                    edits = found.edits.get(own.place, {}).values()
                    found.sources |= dict(zip(own.labels, own.parts(stream - sum(edits), stream), strict=True))
                else:
                    parts = own.parts(found.writes[own.place.write], found.streams[streams[own.place]])
                    found.writes |= dict(zip((step.write for step in own.steps), parts, strict=True))
        return found

    def recorded_writes(
        self, recording: Recording, stage: Stage, batch: Tensor, pos: Tensor, *, of_changes: bool = False
    ) -> Any:
        """The writes of a stage's heads in the recorded pass."""
        return self.view.recorded_writes(recording, self._whole(stage), batch, pos, of_changes=of_changes)


def with_dictionary(
    model: Any, label: LabelInput, dictionary: Any, features: int | Sequence[int], *, encodes: Encodes = "write"
) -> ResidualNetwork:
    """A `ResidualNetwork` in which features of a dictionary are components, beside the `rest` of what they are part of.

    Args:
        model: A TransformerLens model, or a `ResidualNetwork` without chosen neurons; one of this function takes further
            dictionaries.
        label: An attention or MLP write (`"3_mlp_out"`, `("attn_out", 3)`): features become steps. Or a stream
            (`("resid_pre", 3)`, `("resid_post", 3)`): the network starts there, and features become its sources.
        dictionary: Anything with `encode`, from [batch, pos, d_model] to activations [batch, pos, feature], and `W_dec` [feature,
            d_model], as SAELens' SAEs have. A feature writes its activation times its row: an SAE that scales its input
            must be folded first.
        features: The features that become components: `3_mlp_F17`, `3_pre_F17`. All others, the decoder's bias and the
            error are `3_mlp_rest`, `3_pre_rest`.
        encodes: What `encode` takes for a write: `"write"` itself (an SAE), or the `"stream"` that the step reads (a
            transcoder, with the norm before it within `encode`).

    Returns:
        The network. Its traces can be indexed with everything that the model wrote before its first stream, too.

    Raises:
        ValueError: No such write, stream or feature, features that repeat, a place that is divided already, or a network with
            chosen neurons.
        TypeError: A dictionary without `encode` or `W_dec`.
        NotImplementedError: A model of plain callables; `hook_resid_mid`.

    Cost: an `encode` at each evaluation of the step.

    Example: in the docstring of `tl_jets.adapters.dictionaries`.
    """
    check_choice("encodes", encodes, get_args(Encodes))
    network = ResidualNetwork.of(model)
    before = getattr(network.view, "dictionaries", ())
    view: Any = network.view.view if before else network.view  # type: ignore[attr-defined]
    if not isinstance(view, TransformerLensView):
        raise NotImplementedError("A dictionary is of a TransformerLens model; this network is of callables.")
    if network.neurons:
        raise ValueError(
            f"A network of a dictionary has no chosen neurons; got {list(network.neurons)}. Leave them out."
        )
    own = Dictionary(_place(network, label), dictionary, _features(network, dictionary, features), encodes)
    return ResidualNetwork(DictionaryView(view, (*before, own)), network.granularity)


def _features(network: ResidualNetwork, dictionary: Any, features: int | Sequence[int]) -> list[int]:
    """Numbers of features; raises TypeError and ValueError for what is no dictionary of the model's width."""
    W_dec, d_model = getattr(dictionary, "W_dec", None), network.decoder.d_model
    if not isinstance(W_dec, Tensor) or not callable(getattr(dictionary, "encode", None)):
        raise TypeError(f"A dictionary must have encode and W_dec; got {type(dictionary).__name__}.")
    chosen = [features] if isinstance(features, int) else [int(feature) for feature in features]
    good = bool(chosen) and all(0 <= feature < len(W_dec) for feature in chosen) and len(set(chosen)) == len(chosen)
    if W_dec.ndim != 2 or W_dec.shape[1] != d_model or not good:
        raise ValueError(
            f"features must be different rows of W_dec [feature, {d_model}]; got {chosen} of {list(W_dec.shape)}."
        )
    return chosen


def _place(network: ResidualNetwork, label: LabelInput) -> Step | str:
    """The step of a write, or the label of a stream at which blocks begin or end."""
    name, fine = network.label(label), network.at("sublayer")
    steps = {step.write: step for step in fine.steps if step.kind in ("attn", "mlp")}
    streams = [stream for stream in fine.streams if not stream.endswith("_mid")]
    if name.endswith("_mid"):
        raise NotImplementedError(
            f"A dictionary of a stream is of hook_resid_pre or hook_resid_post; got {label!r}, inside a block."
        )
    if name in streams:
        if getattr(network.view, "start", None) is not None:
            raise ValueError(f"A network starts at one stream, {streams[0]} here; got {label!r}.")
        layer = network.n_layers if name == FINAL_STREAM else int(name.split("_")[0])
        before = [own.labels for own in getattr(network.view, "dictionaries", ()) if own.place.layer < layer]
        if before:
            raise ValueError(f"A network that starts at {name} has nothing before it; {before[0]} are. Leave them out.")
        return name
    if name not in steps:
        raise ValueError(
            f"A dictionary divides the write of an attention or MLP, {some(steps)}, or a stream, {some(streams)}; got {label!r}."
        )
    if not any(step.write == name for step in network.steps):
        raise ValueError(
            f"At granularity {network.granularity!r} {name} is no single write. Take network.at('sublayer')."
        )
    return steps[name]
