"""Circuits as the `Node` pairs of TransformerLens' `tools.analysis.attribution_patching`, and back.

TransformerLens has one node per head, MLP and embedding at every position, and a head's query, key and value as three readers.
An edge of ours that stands for several of its edges shares its score among them equally.

Example:
    >>> from transformer_lens.tools.analysis.attribution_patching import AttributionResult, Node
    >>> result = AttributionResult({Node("mlp_out", 5, layer=0): 1.5, Node("attn_head_out", 7, layer=1, head=2): -0.5})
    >>> from_transformer_lens(result).to_dataframe()
      writer    reader position  score
    0  0_mlp  ln_final        5    1.5
    1   L1H2  ln_final        7   -0.5
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from typing import Any, get_args

from tl_jets.core.network import ResidualNetwork
from tl_jets.core.protocol import BIAS, DECODER_STEP
from tl_jets.paths.circuit import Circuit

_WRITERS = {"embed": "embed", "attn_head_out": "L{layer}H{head}", "mlp_out": "{layer}_mlp"}
_READERS = {f"{kind}_input": f"L{{layer}}H{{head}}_{kind}" for kind in "qkv"}
_READERS |= {"mlp_in": "{layer}_mlp", "logits": DECODER_STEP}


def to_transformer_lens(circuit: Circuit, model: Any, length: int) -> list[tuple[Any, Any, float]]:
    """The edges as TransformerLens 4.3's (writer, reader, score), for its `faithfulness(circuit=...)`.

    Args:
        circuit: Of heads (or attention sublayers, which become all their heads) and MLPs.
        model: The model or network.
        length: Number of tokens of the prompt, without padding.

    Returns:
        Triples of two `Node` and a score. Constants of attention layers have no node, and no edge.

    Raises:
        NotImplementedError: Blocks, neurons, positional embeddings; TransformerLens 3.9, which has no edges.
        ValueError: A position outside the prompt.
    """
    from transformer_lens.tools.analysis.attribution_patching import Node, NodeKind

    network = ResidualNetwork.of(model).at("head")
    if "logits" not in get_args(NodeKind):
        raise NotImplementedError(
            "TransformerLens has nodes for the readers of edges from 4.3 on. Update TransformerLens."
        )
    heads: dict[int, list[Any]] = {}
    for step in network.steps:
        if step.kind == "head":
            heads.setdefault(step.layer, []).append(step.head)
    found = []
    for (writer, reader, score), position in zip(circuit.edges, circuit.positions, strict=True):
        if position is not None and not -length <= position < length:
            raise ValueError(f"Positions must lie in {-length}..{length - 1} for this prompt; got {position}.")
        ends = _ends(writer, heads, _WRITER_KINDS), _ends(reader, heads, _READER_KINDS)
        places = range(length) if position is None else [position % length]
        last = network.n_layers - 1
        pairs = [
            tuple(Node(position=place, **({"layer": last} if end["kind"] == "logits" else {}), **end) for end in both)
            for both, place in product(product(*ends), places)
        ]
        found += [(*pair, score / len(pairs)) for pair in pairs]
    return found


def from_transformer_lens(result: Any) -> Circuit:
    """TransformerLens' attribution result, or its edges, as a `Circuit` at granularity `"head"`, by position.

    Args:
        result: An `AttributionResult` of edges or, where it has none, of nodes (which become edges to `ln_final`); or a list of
            (writer, reader) or (writer, reader, score).
    """
    edges: Sequence[Any] = result if isinstance(result, list | tuple) else []
    if not isinstance(result, list | tuple):
        edges = [(*edge, score) for edge, score in getattr(result, "edge_scores", {}).items()]
        edges = edges or [(node, None, score) for node, score in result.node_scores.items()]
    found = [
        (
            _WRITERS[writer.kind].format(layer=writer.layer, head=writer.head),
            DECODER_STEP if reader is None else _READERS[reader.kind].format(layer=reader.layer, head=reader.head),
            float(score[0]) if score else 1.0,
        )
        for writer, reader, *score in edges
    ]
    return Circuit(found, [edge[0].position for edge in edges])


# Kinds of a head's nodes, of an MLP's, and of the first or last.
_WRITER_KINDS = (("attn_head_out",), "mlp_out", {"embed": "embed"})
_READER_KINDS = (("q_input", "k_input", "v_input"), "mlp_in", {DECODER_STEP: "logits"})


def _ends(
    label: str, heads: dict[int, list[Any]], kinds: tuple[tuple[str, ...], str, dict[str, str]]
) -> list[dict[str, Any]]:
    """The nodes that a label stands for, as arguments of `Node`; none for a constant of an attention layer."""
    of_head, of_mlp, of_ends = kinds
    if label in of_ends:
        return [{"kind": of_ends[label]}]
    if found := re.fullmatch(r"(\d+)_mlp(_bias)?", label):
        return [{"kind": of_mlp, "layer": int(found[1])}]
    if re.fullmatch(rf"\d+_attn{BIAS}", label):
        return []
    if found := re.fullmatch(r"(\d+)_attn|L(\d+)H(\d+)(_[qkv])?", label):
        layer = int(found[1] or found[2])
        own = heads[layer] if found[1] else [int(found[3])]
        inputs = [kind for kind in of_head if not found[4] or kind == f"{found[4][1]}_input"]
        return [{"kind": kind, "layer": layer, "head": head} for head in own for kind in inputs]
    raise NotImplementedError(
        f"TransformerLens' nodes are the embedding, heads, MLPs and the logits; {label!r} is none. Take a network of granularity "
        f"'head' or 'sublayer'."
    )
