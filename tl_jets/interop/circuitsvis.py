"""Results in circuitsvis' views, self-contained and safe.

A view is drawn from the table of a result (`to_dataframe()`): values by token of a prompt, one series per layer,
component, path or output position. It is one HTML fragment with circuitsvis' own script inside a sandboxed frame, which
asks no network and reaches nothing outside itself; circuitsvis' `_repr_html_` probes the internet, and puts tokens into
the page as HTML.

Example:
    >>> import tl_jets as tj
    >>> lens = tj.iterative_jet_lens(tj.load_tinydocs(), "This function is available on Unix and")
    >>> view = tj.to_circuitsvis(lens, measure="kl", order=0)
    >>> view.title
    'kl by layer, order 0'
    >>> view  # shown in a notebook; view.save("lens.html") writes a page
    View('kl by layer, order 0', ... kB)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import pandas as pd
import torch
from torch import Tensor

from tl_jets.core.labels import is_label
from tl_jets.core.options import check_choice
from tl_jets.core.selection import positions_of
from tl_jets.core.trace import Trace
from tl_jets.interop.attention_views import attention_view
from tl_jets.interop.frames import framed, inert, inert_names
from tl_jets.interop.values_by_token import series_table, sink_places
from tl_jets.jets.cache import JetCache
from tl_jets.lenses.iterative import IterativeJetLens
from tl_jets.ngrams.tables import NgramTable
from tl_jets.views.flow_cells import SINK
from tl_jets.views.pages import View

CircuitsView = Literal[
    "colored_tokens_multi",
    "colored_tokens",
    "topk_tokens",
    "text_neuron_activations",
    "attention_heads",
    "attention_patterns",
    "token_log_probs",
]


def to_circuitsvis(
    result: Any,
    view: CircuitsView | None = None,
    *,
    measure: str | None = None,
    labels: str | int | Sequence[str | int] | None = None,
    order: int | None = None,
    target: str | int | None = None,
    prompt: int = 0,
    top_k: int = 10,
    height: int | None = None,
    trace: Trace | None = None,
) -> View:
    """A result as a circuitsvis view: `.html`, `.save(file)`, or the last line of a notebook cell.

    Values by token mark attention sinks by a dagger; the range of colors is that of the other tokens.

    Args:
        result: A result whose `to_dataframe()` has values by token: a lens, path statistics, a `JetCache`, a detached
            Jacobian; a `Flow` by position. A list or dict of detached Jacobians is a map per entry. Or a `Trace`, whose
            attention patterns are drawn, or a table of skip-trigrams.
        view: `"colored_tokens_multi"` (a button per series), `"colored_tokens"` (one series), `"topk_tokens"` (largest and
            smallest tokens of each series), `"text_neuron_activations"` (a list of series), `"attention_heads"` (detached
            Jacobians: share of each input token in each output position; a trace: the patterns of a layer's heads;
            skip-trigrams: attention of their pairs), `"attention_patterns"` (the same without negative values, one head at
            a time), `"token_log_probs"` (a decoded
            `JetCache`: the sum of its terms, or one; an iterative lens with its `trace`). None is the first that fits.
        measure: Column of the table that is drawn: `"kl"`, `"effect"`, `"share"`, ...; None for the first of `effect`,
            `share`, `kl`, `logit`, `norm` that is there.
        labels: Layers, components, paths or output positions to draw; None for all. `"token_log_probs"`: a path, or the
            layer of a lens; a trace: the number of a layer, or heads (`["L0H3", "L2H1"]`).
        order: Order of an iterative lens; None for its highest.
        target: Target of effects, one of the result's `target_names`; None for the first.
        prompt: Index of the prompt.
        top_k: Number of tokens in `"topk_tokens"` and `"token_log_probs"`; of skip-trigrams from the table's top.
        height: Height of the frame in pixels; None for what the view needs.
        trace: Of the lens' prompts, for its `"token_log_probs"`.

    Returns:
        A `View` of about 1.4 MB, nearly all of it circuitsvis' script. Colors of signed values are symmetric around 0, and
        shared by all series.

    Raises:
        TypeError: The result has no table of values by token.
        ValueError: There is no such view, measure, label, order, target or prompt; the message names those that there are.

    Cost:
        That of the table; `"token_log_probs"`: d_vocab logits per position.
    """
    check_choice("view", view, (*get_args(CircuitsView), None))
    is_map = view is None and type(result) in (Trace, NgramTable, dict, list, tuple)
    if is_map or view == "attention_heads" or view == "attention_patterns":
        return attention_view(view or "attention_heads", result, labels, prompt, top_k, height)
    if view == "token_log_probs":
        return _token_log_probs(result, labels, order, trace, prompt, top_k, height)
    table, *words = series_table(result, measure, labels, order, target, prompt)
    places = [pos for pos, _ in table.columns]
    sinks = sink_places(result, prompt) & set(places)
    is_sink = [pos in sinks and len(sinks) < len(places) for pos in places]
    return _token_values(view, table, words, is_sink, prompt, top_k, height)


def _token_values(
    view: CircuitsView | None,
    table: pd.DataFrame,
    words: list[str],
    is_sink: list[bool],
    prompt: int,
    top_k: int,
    height: int | None,
) -> View:
    """A `series_table` as one of the views of values by token; colors are symmetric around 0 if there are signs."""
    values = torch.tensor(table.to_numpy(dtype=float), device="cpu").nan_to_num()  # [series, pos]
    tokens = [inert(token) + SINK * sink for (_, token), sink in zip(table.columns, is_sink, strict=True)]
    names, (series, measure, about) = [inert(str(label)) for label in table.index], words
    title = f"{measure} by {series.replace('out_pos', 'output position')}{about}"
    props: dict[str, Any]
    if view == "topk_tokens":
        props = _topk_tokens(values, tokens, names, series, measure, prompt, top_k)
        return framed(title, "TopkTokens", props, height or 420)
    if view == "text_neuron_activations":
        props = {"tokens": tokens, "activations": values.T[:, None].tolist(), "firstDimensionName": "Measure"}
        props |= {"secondDimensionName": series, "firstDimensionLabels": [measure], "secondDimensionLabels": names}
        return framed(title, "TextNeuronActivations", props, height or 220)
    bound = max(float(values[:, ~torch.tensor(is_sink, device="cpu")].abs().max()), 1e-7)
    is_signed = bool((values < 0).any())
    if view == "colored_tokens":
        if len(names) != 1:
            raise ValueError(f"colored_tokens draws one of the {series}s {names[:12]}; pass labels=...")
        props = {"tokens": tokens, "values": values[0], "minValue": -bound if is_signed else 0.0, "maxValue": bound}
        return framed(f"{title}: {names[0]}", "ColoredTokens", props, height or 120)
    low = [-bound if is_signed else -1e-7] * len(names)
    props = {"tokens": tokens, "values": values.T, "labels": names, "positiveBounds": [bound] * len(names)}
    return framed(title, "ColoredTokensMulti", props | {"negativeBounds": low}, height or 220 + 24 * len(names))


def _topk_tokens(
    values: Tensor, tokens: list[str], names: list[str], series: str, measure: str, prompt: int, top_k: int
) -> dict[str, Any]:
    """The largest and smallest tokens of every series, as circuitsvis takes them."""
    k = min(top_k, len(tokens))
    props: dict[str, Any] = {"tokens": [tokens], "firstDimensionName": series, "thirdDimensionName": measure}
    props |= {"firstDimensionLabels": names, "sampleLabels": [f"prompt {prompt}"]}
    for name, found in (("topk", values.topk(k, 1)), ("bottomk", values.topk(k, 1, largest=False))):
        for what, part in (("Vals", found.values), ("Idxs", found.indices)):
            rows = part.tolist() if name == "topk" else part.flip(1).tolist()
            props[f"{name}{what}"] = [[[[x] for x in row] for row in rows]]
    return props


def _token_log_probs(
    result: Any, labels: Any, order: int | None, trace: Trace | None, prompt: int, top_k: int, height: int | None
) -> View:
    """Log-probabilities at every position but the last, of a cache's terms, their sum, or a layer of a lens."""
    if isinstance(result, IterativeJetLens):
        what, log_probs, trace = _of_lens(result, labels, order, trace, prompt)
    elif isinstance(result, JetCache) and result.is_decoded and result.truth.ndim == 3:
        if labels is not None:
            check_choice("labels", labels, result.labels)
        check_choice("prompt", prompt, range(len(result.tokens)))
        trace = result.traced("Log-probabilities")
        log_probs = trace.decoder.transformed(result.logits(labels)[prompt][result.valid[prompt]]).log_softmax(-1)
        what = "the sum of all terms" if labels is None else str(labels)
    else:
        raise TypeError(
            f"token_log_probs needs a JetCache of the decoder [batch, pos, d_model], as jet_expand(model, 'ln_final', ...) gives, "
            f"or an iterative lens; got {type(result).__name__}."
        )
    # The last position has no next token.
    tokens, log_probs = result.tokens[prompt][result.valid[prompt]].to(log_probs.device), log_probs[:-1]
    best = log_probs.topk(min(top_k, log_probs.shape[-1]), -1)
    own = log_probs.gather(-1, tokens[1:, None])
    text = inert_names(trace.network.tokenizer, [tokens, best.indices])
    props = {
        "prompt": [text[token] for token in tokens.tolist()],
        "topKLogProbs": best.values,
        "topKTokens": [[text[token] for token in row] for row in best.indices.tolist()],
        "correctTokenRank": (log_probs > own).sum(-1),
        "correctTokenLogProb": own[:, 0],
    }
    return framed(f"Log-probabilities (nats) of {what}", "TokenLogProbs", props, height or 120 + 36 * top_k)


def _of_lens(
    lens: IterativeJetLens, label: Any, order: int | None, trace: Trace | None, prompt: int
) -> tuple[str, Tensor, Trace]:
    """Name, log-probabilities [pos, d_vocab] and trace of a layer of a lens that was read at consecutive positions."""
    if trace is None or not is_label(label):
        raise ValueError(
            f"token_log_probs of a lens needs a layer and a trace of its prompts: labels={lens.labels[-1]!r}, "
            f"trace=network.trace(prompts); got labels={label!r}, and {'no' if trace is None else 'a'} trace."
        )
    check_choice("prompt", prompt, range(len(lens.tokens)))
    real = lens.valid[prompt]
    places = [place for place, kept in zip(positions_of(lens.positions, prompt), real.tolist(), strict=True) if kept]
    if places != list(range(places[0], places[0] + len(places))):
        raise ValueError(
            f"The next token must be read, too; this lens is of positions {places}. Run it at all positions."
        )
    order = lens.orders[-1] if order is None else order
    check_choice("order", order, lens.orders)
    return f"{label}, order {order}", lens.log_probs(label, order, trace=trace)[prompt][real], trace
