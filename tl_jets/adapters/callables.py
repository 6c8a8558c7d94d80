"""Plain functions as a residual network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tl_jets.core.decoder import Decoder
from tl_jets.core.protocol import FINAL_STREAM, Granularity, Recording, Stage, State, Step


class CallableModel:
    """A residual network given by plain functions, without TransformerLens.

    Args:
        embed: Input -> first stream [batch, pos, d_model]; or a mapping of source labels to such functions.
        stages: One mapping per stage: step label -> function of the stage's stream.
        decoder: Final norm and unembedding.
        name: Name in `repr`.

    Raises:
        ValueError: Two steps have the same label.
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
        """The given stages, the same at every granularity."""
        return tuple(
            Stage(f"{layer}_pre", tuple(Step(label, layer, "callable") for label in stage))
            for layer, stage in enumerate(self.gammas)
        )

    def fine_step(self, label: str) -> Step | None:
        """Plain functions have no neurons."""

    def inner_stage(self, label: Any) -> tuple[str, Stage] | None:
        """Plain functions have no hooks inside."""

    def inner(self, recording: Recording, hook: str, stage: Stage, stream: Tensor) -> Tensor:
        """Plain functions have no hooks inside."""
        raise NotImplementedError("Plain callables have no hooks.")

    def tokenize(self, text: Any, prepend_bos: bool | None) -> tuple[Tensor, Tensor]:
        """Plain functions read no text."""
        raise ValueError("Text needs a model with a tokenizer; plain callables have none. Pass what `embed` takes.")

    def record(self, text_or_tokens: Any, attention_mask: Tensor | None, cache: Any, heads: bool = False) -> Recording:
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
        gammas = self.gammas[stage.steps[0].layer]
        return torch.stack([gammas[step.label](stream) for step in stage.steps])

    def factors(self, recording: Recording, stage: Stage, stream: Tensor) -> None:
        """Plain functions have no weights to read."""

    def recorded_writes(
        self, recording: Recording, stage: Stage, batch: Tensor, pos: Tensor, *, of_changes: bool = False
    ) -> None:
        """Plain functions have no heads; their writes are in the recording."""

    def hook_state(self, layer: int | None = None) -> State:
        """Plain functions carry no hooks."""
        return ()

    def follow(self, *, everywhere: bool = True) -> State:
        """Nothing is kept of plain functions."""
        return ()
