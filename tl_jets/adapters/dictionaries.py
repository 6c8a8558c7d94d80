"""`with_dictionary`: features of a sparse autoencoder or a transcoder as steps of their own, with what they leave over as `rest`.

With a(x) = encode(x) and decoder rows d_n, a write w is

    w = sum_n a_n d_n + rest,        n over the chosen features,

so that rest has the other features, the decoder's bias and the reconstruction error, and the sum is exact whatever the
dictionary. Each feature is a function of the stream that its step reads: a component of the joint lens, a step of paths, a center
of jets, a mediator of flow. Frozen, `encode` must be affine, as gates and activations of PyTorch are (ReLU, thresholds, top-k).

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
from tl_jets.core.protocol import Granularity, Recording, Stage, Step, some

Encodes = Literal["write", "stream"]


class Dictionary:
    """Chosen features of a dictionary, on one write.

    Attributes:
        step: The step whose write is divided.
        source: What has `encode` and `W_dec`.
        features: Their numbers.
        encodes: Whether `encode` takes the write, or the stream that the step reads.
    """

    def __init__(self, step: Step, source: Any, features: Sequence[int], encodes: Encodes):
        self.step, self.source, self.features, self.encodes = step, source, list(features), encodes
        parts = [Step(f"{step.label}_F{feature}", step.layer, "feature") for feature in features]
        self.steps = (*parts, Step(f"{step.label}_rest", step.layer, "feature_rest"))

    def parts(self, write: Tensor, stream: Tensor) -> Float[Tensor, "part batch pos d_model"]:
        """What every feature writes, and the rest."""
        W_dec: Tensor = self.source.W_dec
        given = write if self.encodes == "write" else stream
        activations = self.source.encode(given.to(W_dec.dtype))
        if activations.shape != (*given.shape[:-1], len(W_dec)):
            raise ValueError(
                f"encode must return an activation for each of the {len(W_dec)} rows of W_dec, "
                f"{[*given.shape[:-1], len(W_dec)]} here; got {list(activations.shape)}."
            )
        rows = W_dec[self.features].to(write.dtype)
        chosen = activations[..., self.features].to(write.dtype)
        found = torch.stack([chosen[..., i, None] * row for i, row in enumerate(rows)])
        return torch.cat([found, (write - found.sum(0))[None]])


class DictionaryView:
    """Mixin for a view of a model: divides one step into `dictionary.steps`."""

    dictionary: Dictionary

    def stages(self, granularity: Granularity) -> tuple[Stage, ...]:
        """The stages of the model, the step divided where it is one."""
        stages = super().stages(granularity)  # type: ignore[misc]
        return tuple(Stage(stage.stream, self._divided(stage.steps)) for stage in stages)

    def _divided(self, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        own = self.dictionary.step
        return tuple(part for step in steps for part in (self.dictionary.steps if step == own else (step,)))

    def _whole(self, stage: Stage) -> Stage:
        """The stage with its step undivided."""
        first, *others = self.dictionary.steps
        steps = [self.dictionary.step if step == first else step for step in stage.steps if step not in others]
        return Stage(stage.stream, tuple(steps))

    def writes(self, recording: Recording, stage: Stage, stream: Tensor) -> Tensor:
        """The stage's writes at any stream, in the order of its steps."""
        whole = self._whole(stage)
        found = super().writes(recording, whole, stream)  # type: ignore[misc]
        if whole == stage:
            return found
        at = whole.steps.index(self.dictionary.step)
        return torch.cat([found[:at], self.dictionary.parts(found[at], stream), found[at + 1 :]])

    def record(self, *args: Any, **kwargs: Any) -> Recording:
        """Run the model once, and divide the write."""
        found = super().record(*args, **kwargs)  # type: ignore[misc]
        own = self.dictionary
        stage = next(s for s in super().stages("sublayer") if own.step in s.steps)  # type: ignore[misc]
        with torch.no_grad():
            parts = own.parts(found.writes[own.step.write], found.streams[stage.stream])
        found.writes |= dict(zip((step.write for step in own.steps), parts, strict=True))
        return found

    def recorded_writes(self, recording: Recording, stage: Stage, batch: Tensor, pos: Tensor) -> Any:
        """The writes of a stage's heads in the recorded pass."""
        return super().recorded_writes(recording, self._whole(stage), batch, pos)  # type: ignore[misc]


def with_dictionary(
    model: Any, write: LabelInput, dictionary: Any, features: int | Sequence[int], *, encodes: Encodes = "write"
) -> ResidualNetwork:
    """A `ResidualNetwork` in which features of a dictionary are steps beside the `rest` of the write that they are part of.

    Args:
        model: A TransformerLens model, or a `ResidualNetwork` without chosen neurons.
        write: An attention or MLP write: `"3_mlp_out"`, `("attn_out", 3)`.
        dictionary: Anything with `encode`, from [batch, pos, d_model] to activations [batch, pos, feature], and `W_dec` [feature,
            d_model], as SAELens' SAEs have. A feature writes its activation times its row: an SAE that scales its input
            must be folded first.
        features: The features that become steps: `3_mlp_F17`. All others, the decoder's bias and the error are `3_mlp_rest`.
        encodes: What `encode` takes: `"write"` itself (an SAE), or the `"stream"` that the step reads (a transcoder, with the
            norm before it within `encode`).

    Raises:
        ValueError: No such write or feature, features that repeat, or a network with chosen neurons.
        TypeError: A dictionary without `encode` or `W_dec`.
        NotImplementedError: A model of plain callables.

    Cost: an `encode` at each evaluation of the step.

    Example: in the docstring of `tl_jets.adapters.dictionaries`.
    """
    check_choice("encodes", encodes, get_args(Encodes))
    network = ResidualNetwork.of(model)
    view, W_dec = network.view, getattr(dictionary, "W_dec", None)
    if not isinstance(view, TransformerLensView):
        raise NotImplementedError(
            "A dictionary divides a write of a TransformerLens model; this network is of callables."
        )
    if not isinstance(W_dec, Tensor) or not callable(getattr(dictionary, "encode", None)):
        raise TypeError(f"A dictionary must have encode and W_dec; got {type(dictionary).__name__}.")
    if network.neurons:
        raise ValueError(
            f"A network of a dictionary has no chosen neurons; got {list(network.neurons)}. Leave them out."
        )
    chosen = [features] if isinstance(features, int) else [int(feature) for feature in features]
    d_model = network.decoder.d_model
    good = bool(chosen) and all(0 <= feature < len(W_dec) for feature in chosen) and len(set(chosen)) == len(chosen)
    if W_dec.ndim != 2 or W_dec.shape[1] != d_model or not good:
        raise ValueError(
            f"features must be different rows of W_dec [feature, {d_model}]; got {chosen} of {list(W_dec.shape)}."
        )
    label = network.label(write)
    steps = {
        step.write: step for stage in view.stages("sublayer") for step in stage.steps if step.kind in ("attn", "mlp")
    }
    if label not in steps:
        raise ValueError(f"A dictionary divides the write of an attention or MLP, {some(steps)}; got {write!r}.")
    own = {"dictionary": Dictionary(steps[label], dictionary, chosen, encodes)}
    if not any(step.write == label for step in network.steps):
        raise ValueError(
            f"At granularity {network.granularity!r} {label} is no single write. Take network.at('sublayer')."
        )
    kind: Any = type(f"Dictionary{type(view).__name__}", (DictionaryView, type(view)), own)
    return ResidualNetwork(kind(view.model), network.granularity)
