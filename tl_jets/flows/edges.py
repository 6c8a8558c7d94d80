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


class EdgeFlows:
    """Base of `Flow`: what it says of edges."""

    def edges(self: Any, top: int | None = None) -> pd.DataFrame:
        """Flows on edges, one row per edge, prompt, position and target, without open effects and flows that are 0.

        Columns: writer, reader (a step; the queries of a head, `L1H2_q`; `ln_final`), batch, pos, target; flow, share (of
        the effect).

        Args:
            top: How many of the largest absolute flow for each prompt, position and target, largest first; None for all.

        Raises:
            ValueError: Edges were not asked for, or every effect is open.
        """
        if top is not None:
            check_integers(1, top=top)
        readers, values = self._edge_flow()
        if not bool(self.closed.any()):
            raise ValueError(self._still_open())
        cells = ((values != 0) & self.closed).nonzero()
        r, w, b, p, t = cells.T
        columns = self._index("writer", self._writers, cells[:, 1:])
        columns = {"writer": columns.pop("writer"), "reader": [readers[i] for i in r.tolist()], **columns}
        chosen = values[r, w, b, p, t]
        frame = pd.DataFrame(columns | {"flow": chosen.tolist(), "share": (chosen / self.effect[b, p, t]).tolist()})
        return frame if top is None else largest(frame, top)

    def balance(self: Any) -> pd.DataFrame:
        """The certificate of edges: what every component receives, what is edited there, and what it passes on.

        One row per component (and `ln_final`, which passes on the effect), prompt, position and target. Columns: component,
        batch, pos, target, received, edit, flow, gap (received + edit - flow, in the target's unit).

        Raises:
            ValueError: Edges were not asked for.
        """
        return self._table("component", *self._balance())

    def graph(self: Any, target: int = 0) -> Any:
        """A `networkx.DiGraph` of the components and `ln_final`: nodes have `flow` and `edit`, edges `flow`.

        Edges into heads have `q`, `k` and `v`, too, where these are apart. Flows are means over prompts and positions.

        Args:
            target: The index of the target.

        Raises:
            ValueError: Edges were not asked for, or an effect is open.
        """
        import networkx

        graph = networkx.DiGraph()
        nodes, values = self._balance()
        means = {name: self._mean(values[name], target).tolist() for name in ("flow", "edit")}
        for i, node in enumerate(nodes):
            graph.add_node(node, **{name: own[i] for name, own in means.items()})
        for writer, reader, value in self._mean_edges(target):
            node = node_of(reader)
            if not graph.has_edge(writer, node):
                graph.add_edge(writer, node, flow=0.0)
            edge = graph.edges[writer, node]
            edge["flow"] += value
            if node != reader:
                edge[reader[-1]] = value
        return graph

    def to_circuit(self: Any, share: float = 0.9, *, level: Level = "edge", target: int = 0) -> Circuit:
        """The smallest `Circuit` that carries a share of the absolute flow, its edges scored by flow.

        Args:
            share: Of the sum of absolute flows (means over prompts and positions) over all edges, or components.
            level: `"edge"`: the fewest edges, largest first. `"node"`: the fewest components, and all edges between them and
                to `ln_final`.
            target: The index of the target.

        Raises:
            ValueError: Edges were not asked for, or an effect is open.
        """
        check_choice("level", level, get_args(Level))
        if not 0 < share <= 1:
            raise ValueError(f"share is a share of the absolute flow, above 0 and at most 1; got {share!r}.")
        edges = self._mean_edges(target)
        if level == "edge":
            sizes = torch.tensor([abs(value) for _, _, value in edges], dtype=torch.float64, device="cpu")
            return Circuit.of_edges(edges[i] for i in _fewest(sizes, share))
        inside = {self._writers[i] for i in _fewest(self._mean(self.flow, target).abs(), share)}
        return Circuit.of_edges(e for e in edges if e[0] in inside and node_of(e[1]) in {*inside, DECODER_STEP})

    @property
    def _writers(self: Any) -> list[str]:
        """The components as circuits name them, by step: `L1H2`."""
        return [label.removesuffix("_out") for label in self.labels]

    def _edge_flow(self: Any) -> tuple[list[str], Tensor]:
        """Readers, and the flows [reader, writer, batch, pos, target]; ValueError if they were not asked for."""
        if self.readers is None or self.edge_flow is None:
            raise ValueError(
                "Flows are divided over edges if that is asked for; here it was not. Pass edges=True to flow."
            )
        return self.readers, self.edge_flow

    def _balance(self: Any) -> tuple[list[str], dict[str, Tensor]]:
        """All components and `ln_final`; what each receives, edits and passes on, and its gap [component, ...]."""
        readers, values = self._edge_flow()
        nodes = list(dict.fromkeys([*self._writers, *map(node_of, readers)]))
        place = torch.tensor([nodes.index(node_of(reader)) for reader in readers], device=values.device)
        empty = values.new_zeros(len(nodes), *values.shape[2:])
        received, edit, passed = empty.index_add(0, place, values.sum(1)), empty.clone(), empty.clone()
        edit[: len(self.labels)], passed[: len(self.labels)] = self.edit, self.flow
        passed[nodes.index(DECODER_STEP)] = self.effect
        return nodes, {"received": received, "edit": edit, "flow": passed, "gap": received + edit - passed}

    def _still_open(self: Any) -> str:
        """Error message for flows that explain nothing."""
        return (
            f"Flows explain an effect if their gap is at most {self.tolerance:.2%} of it; here it is "
            f"{self.gap_share.min():.2%} or more. Take nodes='auto', or a smaller intervention."
        )

    def _mean(self: Any, values: Tensor, target: int) -> Tensor:
        """Values [..., batch, pos, target] of one target, averaged over prompts and positions; ValueError where one is open."""
        if not -len(self.target_names) <= target < len(self.target_names):
            raise ValueError(f"target is the index of one of the targets {self.target_names}; got {target}.")
        if not bool(self.closed[..., target].all()):
            raise ValueError(self._still_open())
        return values[..., target].mean((-1, -2))

    def _mean_edges(self: Any, target: int) -> list[tuple[str, str, float]]:
        """(writer, reader, mean flow) of all edges, without those whose flow is 0."""
        readers, values = self._edge_flow()
        means = self._mean(values, target)
        return [(self._writers[w], readers[r], float(means[r, w])) for r, w in means.nonzero().tolist()]


def largest(frame: pd.DataFrame, top: int) -> pd.DataFrame:
    """The rows of the largest absolute flow for each prompt, position and target, largest first."""
    order = np.argsort(-np.abs(np.asarray(frame["flow"])), kind="stable")
    return frame.iloc[order].groupby(["batch", "pos", "target"], sort=False).head(top).reset_index(drop=True)


def _fewest(sizes: Tensor, share: float) -> list[int]:
    """The fewest places whose sizes add up to a share of all, largest first."""
    order = sizes.argsort(descending=True, stable=True)
    before = sizes[order].cumsum(0) - sizes[order]
    return order[before < share * sizes.sum()].tolist()
