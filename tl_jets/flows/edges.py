r"""Flows on edges: what a component sends to each later reader, and the circuit that carries most of it.

A reader r of a stage gives back the covector S_r' g, of its own part of the stage's secant map alone, so that

.. math::
    \text{flow}_{m \to r} = \langle S_r^\top g, dw_m \rangle, \qquad
    \text{flow}_m = \sum_r \text{flow}_{m \to r}, \qquad
    \text{flow}_m - \text{edit}_m = \sum_{m'} \text{flow}_{m' \to m} .

What a component sends to all readers is its flow, exactly; what it receives from all writes is its flow without what the
intervention itself writes there, up to the error of the nodes: its **gap**. A head receives through its queries, keys and
values (`L1H2_q`, `L1H2_k`, `L1H2_v`). The direct edges to `ln_final` are `direct`.

**The smallest circuit.** With edges (or components) in the order of their absolute flow, the first whose absolute flows add up
to 90% of those of all: no fewer do. Components in series carry one effect again and again, and each time counts.

Source: Syed et al. 2023 and Hanna et al. 2024 (attribution on edges); Chen et al. (arXiv 2410.06024), Lemma 1.

Example:
    >>> import tl_jets as tj
    >>> model = tj.load_tinydocs()
    >>> clean, corrupted = "This function is available on Unix and", "This function is available on Windows and"
    >>> found = tj.flow(model, clean, corrupted, targets=" Unix", against=" Windows", granularity="head", edges=True)
    >>> found.edges(top=4)[["writer", "reader"]].values.tolist()
    [['L1H0', 'ln_final'], ['embed', '0_mlp'], ['L2H3', 'ln_final'], ['0_mlp', 'L2H3_v']]
    >>> found.to_circuit(0.5)
    Circuit(22 edges of 10 nodes)
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tl_jets.core.options import check_choice, check_integers
from tl_jets.core.protocol import DECODER_STEP
from tl_jets.paths.circuit import Circuit, node_of

Level = Literal["edge", "node"]


def writers_of(flow: Any) -> list[str]:
    """The components as circuits name them, by step: `L1H2`."""
    return [label.removesuffix("_out") for label in flow.labels]


def edge_flow_of(flow: Any) -> tuple[list[str], Tensor]:
    """Readers, and the flows [reader, writer, batch, pos, target]; ValueError if they were not asked for."""
    if flow.readers is None or flow.edge_flow is None:
        raise ValueError("Flows are divided over edges if that is asked for; here it was not. Pass edges=True to flow.")
    return flow.readers, flow.edge_flow


def edge_table(flow: Any, top: int | None) -> pd.DataFrame:
    """`Flow.edges`."""
    if top is not None:
        check_integers(1, top=top)
    readers, values = edge_flow_of(flow)
    if not bool(flow.closed.any()):
        raise ValueError(still_open(flow))
    cells = ((values != 0) & flow.closed).nonzero()
    r, w, b, p, t = cells.T
    columns = flow._index("writer", writers_of(flow), cells[:, 1:])
    columns = {"writer": columns.pop("writer"), "reader": [readers[i] for i in r.tolist()], **columns}
    chosen = values[r, w, b, p, t]
    frame = pd.DataFrame(columns | {"flow": chosen.tolist(), "share": (chosen / flow.effect[b, p, t]).tolist()})
    if top is None:
        return frame
    order = np.argsort(-np.abs(np.asarray(frame["flow"])), kind="stable")
    return frame.iloc[order].groupby(["batch", "pos", "target"], sort=False).head(top).reset_index(drop=True)


def balance_of(flow: Any) -> tuple[list[str], dict[str, Tensor]]:
    """Components, those that only read, and `ln_final`; what each receives, edits and passes on [component, ...], and its gap."""
    readers, values = edge_flow_of(flow)
    nodes = list(dict.fromkeys([*writers_of(flow), *map(node_of, readers)]))
    place = torch.tensor([nodes.index(node_of(reader)) for reader in readers], device=values.device)
    empty = values.new_zeros(len(nodes), *values.shape[2:])
    received, edit, passed = empty.index_add(0, place, values.sum(1)), empty.clone(), empty.clone()
    edit[: len(flow.labels)], passed[: len(flow.labels)] = flow.edit, flow.flow
    passed[nodes.index(DECODER_STEP)] = flow.effect
    return nodes, {"received": received, "edit": edit, "flow": passed, "gap": received + edit - passed}


def graph_of(flow: Any, target: int) -> Any:
    """`Flow.graph`."""
    import networkx

    graph = networkx.DiGraph()
    nodes, values = balance_of(flow)
    for i, node in enumerate(nodes):
        graph.add_node(node, **{name: float(_mean(flow, values[name], target)[i]) for name in ("flow", "edit")})
    for writer, reader, value in _mean_edges(flow, target):
        node = node_of(reader)
        if not graph.has_edge(writer, node):
            graph.add_edge(writer, node, flow=0.0)
        edge = graph.edges[writer, node]
        edge["flow"] += value
        if node != reader:
            edge[reader[-1]] = value
    return graph


def circuit_of(flow: Any, share: float, level: Level, target: int) -> Circuit:
    """`Flow.to_circuit`."""
    check_choice("level", level, get_args(Level))
    if not 0 < share <= 1:
        raise ValueError(f"share is a share of the absolute flow, above 0 and at most 1; got {share!r}.")
    edges = _mean_edges(flow, target)
    if level == "edge":
        sizes = torch.tensor([abs(value) for _, _, value in edges], dtype=torch.float64, device="cpu")
        return Circuit.of_edges(edges[i] for i in _fewest(sizes, share))
    writers = writers_of(flow)
    inside = {writers[i] for i in _fewest(_mean(flow, flow.flow, target).abs(), share)}
    return Circuit.of_edges(e for e in edges if e[0] in inside and node_of(e[1]) in {*inside, DECODER_STEP})


def still_open(flow: Any) -> str:
    """Error message for flows that explain nothing."""
    return (
        f"Flows explain an effect if their gap is at most {flow.tolerance:.2%} of it; here it is "
        f"{flow.gap_share.min():.2%} or more. Take nodes='auto', or a smaller intervention."
    )


def _fewest(sizes: Tensor, share: float) -> list[int]:
    """The fewest places whose sizes add up to a share of all, largest first."""
    order = sizes.argsort(descending=True, stable=True)
    before = sizes[order].cumsum(0) - sizes[order]
    return order[before < share * sizes.sum()].tolist()


def _mean(flow: Any, values: Tensor, target: int) -> Tensor:
    """Values [..., batch, pos, target] of one target, averaged over prompts and positions; ValueError where one is open."""
    if not -len(flow.target_names) <= target < len(flow.target_names):
        raise ValueError(f"target is the index of one of the targets {flow.target_names}; got {target}.")
    if not bool(flow.closed[..., target].all()):
        raise ValueError(still_open(flow))
    return values[..., target].mean((-1, -2))


def _mean_edges(flow: Any, target: int) -> list[tuple[str, str, float]]:
    """(writer, reader, mean flow) of all edges, without those whose flow is 0."""
    (readers, values), writers = edge_flow_of(flow), writers_of(flow)
    means = _mean(flow, values, target)
    return [(writers[w], readers[r], float(means[r, w])) for r, w in means.nonzero().tolist()]
