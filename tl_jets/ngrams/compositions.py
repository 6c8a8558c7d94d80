"""What a head composes with: paths before its query, key and value, and after its output.

=====================================  ============================================================================
`compose`                              meaning
=====================================  ============================================================================
`"effective"`                          query, key and value read the embedding and the first MLP's write
`{"value": "0_mlp"}`                   an MLP before the values
`{"value": "L0H1"}`                    two heads in a row, a virtual attention head (V-composition)
`{"key": "L0H1"}`                      the key is what head L0H1 wrote of z1, with all its attention on z1 (K-composition)
`{"query": "L0H1"}`                    the query is what head L0H1 wrote of z2 (Q-composition)
`{"output": "3_mlp"}`                  an MLP (or a head, or several: `"L2H0 > 3_mlp"`) of the head's write
=====================================  ============================================================================

A path is read alone, with every norm at its own scale (`tl_jets.ngrams.streams`). Source: Elhage et al. 2021.

Example:
    >>> compose = Compositions.of({"key": "L0H1", "value": "0_mlp", "output": "3_mlp"})
    >>> compose.label(2, 3)
    '0_mlp > L2H3 > 3_mlp, key L0H1'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tl_jets.core.network import ResidualNetwork
from tl_jets.core.path import ARROW
from tl_jets.ngrams.float32 import full_float32
from tl_jets.ngrams.head_maps import HeadReader
from tl_jets.ngrams.low_rank_logits import LowRankLogits
from tl_jets.ngrams.streams import DIRECT, STREAM_ROWS, PathInput, VocabularyStreams, path_label

READS = ("query", "key", "value")
OUTPUT = "output"
Compose = PathInput | Mapping[str, PathInput]


@dataclass(frozen=True)
class Compositions:
    """Paths by role, without those that are the embedding."""

    paths: dict[str, str]

    @classmethod
    def of(cls, compose: Compose | None) -> Compositions:
        """Compositions that a user gave; ValueError for other roles."""
        given: Any = {} if compose is None else compose
        given = given if isinstance(given, Mapping) else dict.fromkeys(READS, given)
        wrong = [role for role in given if role not in (*READS, OUTPUT)]
        if wrong:
            raise ValueError(
                f"compose must give paths by role, {(*READS, OUTPUT)}; got {wrong}. Or one path for the first three."
            )
        paths = {role: path_label(path) for role, path in sorted(given.items())}
        return cls({role: path for role, path in paths.items() if path != DIRECT})

    def through(self, role: str, layer: int, head: int) -> str:
        """The path through a head of what it reads in a role; or of its value and on to the output."""
        before = self.paths.get("value" if role == OUTPUT else role)
        after = self.paths.get(OUTPUT) if role == OUTPUT else None
        return ARROW.join(step for step in (before, f"L{layer}H{head}", after) if step is not None)

    def label(self, layer: int, head: int) -> str:
        """The path of a head's table."""
        others = [f", {role} {self.paths[role]}" for role in ("query", "key") if role in self.paths]
        return self.through(OUTPUT, layer, head) + "".join(others)

    def reader(self, network: ResidualNetwork, layer: int, heads: list[int]) -> HeadReader:
        """A reader of a layer, with the streams of these paths."""
        roles = [(role, heads[0]) for role in READS if role in self.paths]
        roles += [(OUTPUT, head) for head in heads if OUTPUT in self.paths]
        labels = dict.fromkeys(self.through(role, layer, head) for role, head in roles)
        return HeadReader(network, layer, VocabularyStreams(network, list(labels)))

    def reads(self, layer: int, head: int) -> dict[str, str]:
        """The path that query, key and value read, through a head, where it is not the embedding."""
        return {role: self.through(role, layer, head) for role in READS if role in self.paths}

    @torch.no_grad()
    @full_float32()
    def outputs(self, reader: HeadReader, head: int) -> LowRankLogits:
        """The logits of what the steps of the output make of a head's writes."""
        streams, decoder = reader.streams, reader.network.decoder
        label, tokens = self.through(OUTPUT, reader.layer, head), torch.arange(reader.n_tokens, device=reader.device)
        states = torch.cat([streams.states(streams.embed(part), label) for part in tokens.split(STREAM_ROWS)])
        constant = decoder.constant(None, states.dtype)
        columns = decoder.scaled(decoder.W_U.to(states.dtype))
        return LowRankLogits(states, columns, constant if bool(constant.any()) else None, decoder.transform)
