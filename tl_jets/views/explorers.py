"""One page to explore a prompt: what each layer says, what components give to the answer, and what an intervention does.

A grid of layers (rows) and tokens (columns) holds the best token of every stream. A cell is chosen by pointer or arrow
keys; beside the grid stand its best tokens with their control, the rank of the model's answer at every layer, the exact
contributions of components to that answer, and the bi-grams of the token. A `Flow` adds what an intervention does through
every component. The page is one file that asks no network; its charts are drawn by Observable Plot, which it contains.

`explorer` computes what it shows; `lens_page` and `flow_page` show ready results, and are parts of `page` like other views.

Example:
    >>> import tl_jets as tj
    >>> page = explorer(tj.load_tinydocs(), "This function is available on Unix and")
    >>> page
    Explorer('This function is available on Unix and', ... kB)
    >>> page.save("page.html").name  # doctest: +SKIP
    'page.html'
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from tl_jets.core.markup import text
from tl_jets.core.measures import Measures
from tl_jets.core.network import ResidualNetwork, trace_of
from tl_jets.core.selection import positions_of
from tl_jets.core.tokens import visible
from tl_jets.flows.results import Flow
from tl_jets.lenses import IterativeJetLens, JointJetLens, iterative_jet_lens, joint_jet_lens
from tl_jets.ngrams import jet_bigrams
from tl_jets.views.pages import View, json_in_page, rounded

# Best tokens of a cell, bi-grams of a token, and best tokens of a component.
TOP_K, CENTER_TOP_K = 5, 3
HEIGHT = 900
# Edges of a flow that are drawn, the largest ones.
EDGES = 60
# Fields of the lenses that the data hold.
SHARED = ("labels", "linearize", "center_scale", "rho", "alpha", "beta", "borrowed_share", "borrowed", "top_ids")
SHARED += ("measures", "control", "target_ids")
ITERATIVE = ("orders", "full_values", "own_values", "target_ranks", "target_logits")
JOINT = ("order", "objective", "weights", "gap", "effective_rank", "effects", "uniform", "control_uniform")


@dataclass(frozen=True, eq=False, repr=False)
class Explorer(View):
    """A part of a page that is clicked through; a notebook shows it in a sandboxed frame, `save` writes it to a file.

    Attributes:
        data: What it shows: plain lists, numbers and texts.
    """

    data: dict[str, Any] = field(default_factory=dict, repr=False)
    scripts: ClassVar[tuple[str, ...]] = ("vendor/d3.min.js", "vendor/plot.umd.min.js", "templates/explorer.js")

    @classmethod
    def of(cls, title: str, data: dict[str, Any]) -> Explorer:
        """The part that shows these data."""
        script = f'<script type="application/json">{json_in_page(data)}</script>'
        without = "<noscript>This part is drawn by a script that the page contains; nothing is loaded from elsewhere.</noscript>"
        return cls(title, f'<div class="explorer">{script}{without}</div>', data)

    def _section(self) -> str:
        style = f"width:100%;height:{HEIGHT}px;border:0;resize:vertical;overflow:auto"
        page = f'title="tl-jets" style="{style}" srcdoc="{text(self.page())}"'
        return f'<section><iframe sandbox="allow-scripts" {page}></iframe></section>'

    def _in_page(self) -> str:
        return super()._section()


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
    parts = joint_jet_lens(network, trace, linearize="detached", top_k=CENTER_TOP_K)
    names = lens.token_names
    if title is None:
        title = text_or_tokens if isinstance(text_or_tokens, str) else "".join(map(names.__getitem__, prompt))
    found = lens_page(lens, parts, model=name or lens.model or "", prompt=title)
    bi = None if bigrams is None else _bigrams(network, bigrams, lens.tokens)
    return Explorer.of(title, found.data | {"bigrams": bi, "flow": None if flow is None else _flow(flow)})


def lens_page(
    iterative: IterativeJetLens,
    joint: JointJetLens,
    *,
    model: str = "",
    prompt: str | None = None,
    shown: int | None = None,
) -> Explorer:
    """Ready lenses of the same input as a page to explore, of any linearization, with several prompts one after another.

    Args:
        iterative: With measures and a control; its targets are ranked.
        joint: Its weights, or its effects if it is detached.
        model: Name of the model.
        prompt: Title: the text of the input, if it was one.
        shown: Index of the position that is shown first; None for the last.

    Raises:
        ValueError: As `lens_data`.

    Example:
        >>> import tl_jets as tj
        >>> model, prompt = tj.load_tinydocs(), "This function is available on Unix and"
        >>> lenses = tj.iterative_jet_lens(model, prompt, order=2), tj.joint_jet_lens(model, prompt)
        >>> document = tj.views.page("Unix", tj.views.lens_page(*lenses), lenses[0].average())
        >>> document.count('<div class="explorer">'), document.count("<iframe")
        (1, 0)
    """
    data = lens_data(iterative, joint, model=model, prompt=prompt)
    return Explorer.of(prompt or model or "Lenses", data | ({} if shown is None else {"shown": shown}))


def flow_page(flow: Flow) -> Explorer:
    """What an intervention does through every component, as a part of a page; of the first of several prompts."""
    return Explorer.of("What the intervention does, and through which components", {"flow": _flow(flow)})


def lens_data(
    iterative: IterativeJetLens, joint: JointJetLens, *, model: str = "", prompt: str | None = None
) -> dict[str, Any]:
    """Both lenses of the same input as nested JSON-ready lists; NaN and infinity become None.

    Args:
        iterative: Axes [layer, order, batch, pos]; tokens also k.
        joint: Axes [center, batch, pos].
        model: Name of the model.
        prompt: Text of the input, if it was one.

    Returns:
        `model`, `prompt`, `tokens` [batch][pos], `answer` [batch][pos] (the model's best token), `sinks` [batch][pos]
        (positions that averages leave out), `unit` (of logits and effects), `iterative` and `joint`, with the lenses' own
        names. Spaces in tokens are written as `·`.

    Raises:
        ValueError: The lenses are of different tokens, or the iterative lens has no measures or control.
    """
    if iterative.tokens.shape != joint.tokens.shape or bool((iterative.tokens != joint.tokens).any()):
        raise ValueError(
            f"Both lenses must be of the same tokens; got {list(iterative.tokens.shape)} and {list(joint.tokens.shape)}. "
            "Run them on the same trace, at the same positions."
        )
    if iterative.measures is None or iterative.control is None:
        raise ValueError("Measures are shown beside their controls; run the iterative lens with measures and a seed.")
    centers = joint.center_top_tokens(joint.top_ids.shape[-1]).indices
    names = {**iterative.token_names, **joint.texts(centers)}

    def texts(ids: Tensor | None) -> Any:
        return None if ids is None else _nested(ids.tolist(), lambda token: visible(names.get(token)))

    def own(lens: IterativeJetLens | JointJetLens, axes: list[str], fields: tuple[str, ...]) -> dict[str, Any]:
        found = {"axes": axes, "targets": texts(lens.target_ids), "top_tokens": texts(lens.top_ids)}
        return found | {name: _plain(getattr(lens, name)) for name in (*SHARED, *fields)}

    return {
        "tl_jets": version("tl-jets"),
        "model": model,
        "prompt": prompt,
        "positions": torch.as_tensor(iterative.positions, device="cpu").tolist(),
        "tokens": texts(iterative.tokens),
        "answer": texts(iterative.model_top_ids),
        "sinks": None if iterative.sinks is None else iterative.sinks.mask.tolist(),
        "unit": iterative.unit,
        "iterative": own(iterative, ["layer", "order", "batch", "pos"], ITERATIVE),
        "joint": own(joint, ["center", "batch", "pos"], JOINT) | {"center_top_tokens": texts(centers)},
    }


def _check_flow(flow: Flow, prompt: list[int]) -> None:
    """The flow must be of the page's prompt, as far as its positions tell."""
    positions = positions_of(flow.positions, 0)
    is_one = len(flow.tokens) == 1 and max(positions) < len(prompt)
    if not is_one or flow.tokens[0].tolist() != [prompt[p] for p in positions]:
        raise ValueError(
            f"flow must be of the prompt of the page; got one of {len(flow.tokens)} prompts, with tokens "
            f"{flow.tokens[0].tolist()} at positions {positions}. Compute it for this prompt alone."
        )


def _bigrams(network: ResidualNetwork, path: str, tokens: Tensor) -> dict[str, Any]:
    """Second tokens and their scores after every token [batch][pos]."""
    ids, own = tokens.tolist(), "mlps" if path == "auto" else path
    try:
        table = jet_bigrams(network, own, rows=tokens[tokens >= 0].unique().tolist(), per="row", top_k=TOP_K)
    except (ValueError, NotImplementedError) as error:
        if path != "auto":
            raise
        return {"rows": [], "left_out": str(error)}
    rows: dict[int, list[Any]] = {}
    for (first, second), score in zip(table.ids.tolist(), table.scores.tolist(), strict=True):
        rows.setdefault(first, []).append([visible(table.names.get(second)), rounded(score)])
    found = [[rows.get(i, []) for i in row] for row in ids]
    return {"path": table.path, "score": table.settings["score"], "rows": found}


def _flow(flow: Flow) -> dict[str, Any]:
    """Flows of each target: components, and the certificate."""
    first = flow.to_dataframe().query("component == @flow.labels[0] and batch == 0")  # a row per position and target
    n_targets = len(flow.target_names)
    cells = product(range(len(first) // n_targets), range(n_targets))
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
        for (p, t), position, target in zip(cells, first["pos"], first["target"], strict=True)
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


def _plain(value: Any) -> Any:
    """A field of a lens as plain values, with rounded numbers."""
    if isinstance(value, Measures):
        return {name: _plain(values) for name, values in value.items()}
    return _nested(value.tolist() if isinstance(value, Tensor) else value, rounded)


def _nested(values: Any, change: Callable[[Any], Any]) -> Any:
    return [_nested(value, change) for value in values] if isinstance(values, list) else change(values)
