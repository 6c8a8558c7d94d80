"""One page to explore a prompt: what each layer says, what components give to the answer, and what an intervention does.

A grid of layers (rows) and tokens (columns) holds the best token of every stream. A cell is chosen by pointer or arrow
keys; beside the grid stand its best tokens with their control, the rank of the model's answer at every layer, the exact
contributions of components to that answer, and the bi-grams of the token. A `Flow` adds what an intervention does through
every component. The page is one file that asks no network; its charts are drawn by Observable Plot, which it contains.

Example:
    >>> import tl_jets as tj
    >>> page = explorer(tj.load_tinydocs(), "This function is available on Unix and")
    >>> page
    Explorer('This function is available on Unix and', ... kB)
    >>> page.save("page.html").name  # doctest: +SKIP
    'page.html'
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from itertools import product
from typing import Any

import torch
from torch import Tensor

from tl_jets.core.network import ResidualNetwork, trace_of
from tl_jets.core.selection import positions_of
from tl_jets.core.tokens import visible
from tl_jets.flows.results import Flow
from tl_jets.lenses import IterativeJetLens, JointJetLens, iterative_jet_lens, joint_jet_lens
from tl_jets.ngrams import jet_bigrams
from tl_jets.views.pages import View, filled, json_in_page, rounded

# Best tokens of a cell, and bi-grams of a token.
TOP_K = 5
HEIGHT = 900
# Edges of a flow that are drawn, the largest ones.
EDGES = 60


@dataclass(frozen=True, eq=False, repr=False)
class Explorer(View):
    """The page of `explorer`: shown in a sandboxed frame by a notebook, written to a file by `save`.

    Attributes:
        document: The whole page.
        data: What it shows: plain lists, numbers and texts.
    """

    document: str = field(default="", repr=False)
    data: dict[str, Any] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        return f"Explorer({self.title!r}, {len(self.document.encode()) / 1000:.1f} kB)"

    def page(self) -> str:
        """The page as a complete HTML document that loads no other file."""
        return self.document


def explorer(
    model: Any,
    text_or_tokens: Any,
    *,
    order: int = 1,
    bigrams: str | None = "auto",
    flow: Flow | None = None,
    title: str | None = None,
    name: str | None = None,
) -> Explorer:
    """A page to explore one prompt.

    Args:
        model: A TransformerLens model, or a `ResidualNetwork`.
        text_or_tokens: One prompt, its ids, or a trace of it.
        order: Highest order of the lens; the page chooses among 0 (the logit lens) and this one.
        bigrams: Path of the bi-grams of each token, as in `jet_bigrams`; `"auto"` is `"mlps"`, or the reason why the model has no
            such table (no MLPs, hooks on streams); None for none.
        flow: What an intervention on this prompt does, from `tl_jets.flow`; with `edges=True` its largest edges are drawn.
        title: Title of the page; None for the prompt.
        name: Name of the model below it.

    Returns:
        An `Explorer`: the last line of a notebook cell shows it, `.save("prompt.html")` writes it.

    Raises:
        ValueError: Several prompts; a flow of another prompt; a path of bi-grams that the model does not have.

    Cost: an iterative lens with its control and the ranks of the answers, direct attribution at every position, and V
    d_model multiply-adds a token for its bi-grams. About 1 MB, half of it Observable Plot.

    Example: in the docstring of `tl_jets.views.explorers`.
    """
    network = ResidualNetwork.of(model)
    trace = trace_of(network, text_or_tokens)
    if len(trace.tokens) != 1:
        raise ValueError(f"A page explores one prompt; got {len(trace.tokens)}. Make a page of each.")
    prompt = trace.tokens[trace.valid].tolist()
    if flow is not None:
        _check_flow(flow, prompt)
    assert trace.logits is not None, "it ran the model"
    answers = trace.logits.argmax(-1)[..., None]
    lens = iterative_jet_lens(network, trace, order=order, targets=answers, top_k=TOP_K)
    parts = joint_jet_lens(network, trace, linearize="detached", top_k=1)
    tokens = {**lens.token_names, **parts.token_names}
    data: dict[str, Any] = {
        "tl_jets": version("tl-jets"),
        "model": name or lens.model or "",
        "title": title
        or (text_or_tokens if isinstance(text_or_tokens, str) else "".join(map(tokens.__getitem__, prompt))),
        "d_vocab": network.decoder.d_vocab,
        "lens": _lens(lens),
        "attribution": {"labels": parts.labels, "unit": parts.unit, "effects": _plain(_effects(parts))},
        "bigrams": None if bigrams is None else _bigrams(network, bigrams, prompt, tokens),
        "flow": None if flow is None else _flow(flow),
    }
    data["names"] = {token: visible(text) for token, text in tokens.items()}
    return _page(data)


def _check_flow(flow: Flow, prompt: list[int]) -> None:
    """The flow must be of the page's prompt, as far as its positions tell."""
    positions = positions_of(flow.positions, 0)
    if (
        len(flow.tokens) != 1
        or max(positions) >= len(prompt)
        or flow.tokens[0].tolist() != [prompt[p] for p in positions]
    ):
        raise ValueError(
            f"flow must be of the prompt of the page; got one of {len(flow.tokens)} prompts, with tokens "
            f"{flow.tokens[0].tolist()} at positions {positions}. Compute it for this prompt alone."
        )


def _page(data: dict[str, Any]) -> Explorer:
    """The page of its data."""
    scripts = "\n".join(
        files("tl_jets").joinpath(f"views/vendor/{name}").read_text(encoding="utf-8")
        for name in ("d3.min.js", "plot.umd.min.js")
    )
    title = data["title"]
    document = filled("explorer.html", title=html.escape(f"tl-jets: {title}"), data=json_in_page(data), scripts=scripts)
    style = f"width:100%;height:{HEIGHT}px;border:0;resize:vertical;overflow:auto"
    frame = (
        f'<iframe sandbox="allow-scripts" title="tl-jets" style="{style}" srcdoc="{html.escape(document)}"></iframe>'
    )
    return Explorer(title, frame, document, data)


def _lens(lens: IterativeJetLens) -> dict[str, Any]:
    """Cells of the lowest and the highest order, [layer][order][pos]."""
    orders = sorted({0, len(lens.orders) - 1})
    ranks = lens.target_ranks
    assert lens.control is not None
    assert ranks is not None
    cells = {"kl": lens.kl, "control_kl": lens.control.kl, "borrowed": lens.borrowed, "share": lens.borrowed_share}
    cells |= {"ids": lens.top_ids, "values": lens.full_values, "rank": ranks[..., 0]}
    sinks = torch.zeros_like(lens.valid) if lens.sinks is None else lens.sinks.mask
    real = lens.valid[0]
    return {
        "labels": lens.labels,
        "orders": [lens.orders[i] for i in orders],
        "tokens": lens.tokens[0, real].tolist(),
        "answers": lens.model_top_ids[0, real].tolist(),
        "sinks": sinks[0, real].tolist(),
        "unit": lens.unit,
        "rho": _plain(lens.rho[:, 0, real]),
        **{key: _plain(values[:, orders, 0][:, :, real]) for key, values in cells.items()},
    }


def _effects(parts: JointJetLens) -> Tensor:
    """What components add to the answer [center, pos]."""
    assert parts.effects is not None
    return parts.effects[:, 0, parts.valid[0], 0]


def _bigrams(network: ResidualNetwork, path: str, prompt: list[int], names: dict[int, str]) -> dict[str, Any]:
    """Second tokens and their scores, by first token; adds to the names of tokens."""
    try:
        own = "mlps" if path == "auto" else path
        table = jet_bigrams(network, own, rows=sorted(set(prompt)), per="row", top_k=TOP_K)
    except (ValueError, NotImplementedError) as error:
        if path != "auto":
            raise
        return {"rows": {}, "left_out": str(error)}
    names.update(table.names)
    rows: dict[int, list[Any]] = {}
    for (first, second), score in zip(table.ids.tolist(), table.scores.tolist(), strict=True):
        rows.setdefault(first, []).append([second, rounded(score)])
    return {"path": table.path, "score": table.settings["score"], "rows": rows}


def _flow(flow: Flow) -> dict[str, Any]:
    """Flows of each target: components, and the certificate."""
    first = flow.to_dataframe().query("component == @flow.labels[0]")  # a row per position and target
    n_targets = len(flow.target_names)
    effects = [
        {
            "position": position,
            "target": target,
            "effect": rounded(float(flow.effect[0, p, t])),
            "gap": rounded(float(flow.gap_share[0, p, t])),
            "closed": bool(flow.closed[0, p, t]),
            **{key: _plain(getattr(flow, key)[:, 0, p, t]) for key in ("flow", "edit", "direct")},
            "edges": _edges(flow, p, t),
        }
        for (p, t), position, target in zip(
            product(range(len(first) // n_targets), range(n_targets)), first["pos"], first["target"], strict=True
        )
    ]
    return {"labels": flow.labels, "unit": flow.unit, "measure": flow.measure, "effects": effects}


def _edges(flow: Flow, p: int, t: int) -> list[list[Any]] | None:
    """The largest edges of a target, as writer, reader and flow, those of a head's queries, keys and values added up."""
    if flow.edge_flow is None or flow.readers is None:
        return None
    steps = [re.sub(r"_[qkv]$", "", reader) for reader in flow.readers]
    names = list(dict.fromkeys(steps))
    index = torch.tensor([names.index(step) for step in steps], device=flow.edge_flow.device)
    own = flow.edge_flow[..., 0, p, t]
    sums = own.new_zeros(len(names), own.shape[1]).index_add(0, index, own)
    largest = sums.abs().flatten().argsort(descending=True)[:EDGES].tolist()
    cells = [divmod(cell, sums.shape[1]) for cell in largest]
    return [[flow.labels[w], names[r], rounded(float(sums[r, w]))] for r, w in cells if float(sums[r, w])]


def _plain(values: Tensor) -> Any:
    """A tensor as nested lists of rounded numbers, None where there is none."""
    if values.ndim == 1:
        return [rounded(value) for value in values.tolist()]
    return [_plain(row) for row in values]
