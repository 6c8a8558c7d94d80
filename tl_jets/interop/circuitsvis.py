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

import html
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import pandas as pd
import torch
from circuitsvis.utils.render import render_local
from torch import Tensor

from tl_jets.core.labels import is_label
from tl_jets.core.options import check_choice
from tl_jets.core.selection import ANSWER, positions_of
from tl_jets.core.tokens import token_names
from tl_jets.core.trace import Trace
from tl_jets.detached_map.jacobian import DetachedJacobian
from tl_jets.interop.values_by_token import is_number, values_by_token
from tl_jets.jets.cache import JetCache
from tl_jets.lenses.iterative import IterativeJetLens
from tl_jets.ngrams.tables import NgramTable
from tl_jets.views.pages import View

CircuitsView = Literal[
    "colored_tokens_multi",
    "colored_tokens",
    "topk_tokens",
    "text_neuron_activations",
    "attention_heads",
    "token_log_probs",
]
# What the rows of one token are told apart by, in tables of results: the first column that is there.
SERIES = ("layer", "center", "component", "path", "length", "source", "out_pos", "step")
# What is drawn if no measure is named: the first column that is there.
DEFAULT_MEASURES = ("effect", "share", "kl", "logit", "norm")
# Nothing but the frame's own text: no request, no frame, no form.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; font-src data:"
WORD_JOINER = "\u2060"


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

    Args:
        result: A result whose `to_dataframe()` has values by token: a lens, path statistics, a `JetCache`, a detached
            Jacobian; a `Flow` by position. A list or dict of detached Jacobians is a map per entry. Or a `Trace`, whose
            attention patterns are drawn, or a table of skip-trigrams.
        view: `"colored_tokens_multi"` (a button per series), `"colored_tokens"` (one series), `"topk_tokens"` (largest and
            smallest tokens of each series), `"text_neuron_activations"` (a list of series), `"attention_heads"` (detached
            Jacobians: share of each input token in each output position; a trace: the patterns of a layer's heads;
            skip-trigrams: attention of their pairs), `"token_log_probs"` (a decoded
            `JetCache`: the sum of its terms, or one; an iterative lens with its `trace`). None is the first that fits.
        measure: Column of the table that is drawn: `"kl"`, `"effect"`, `"share"`, ...; None for the first of `effect`,
            `share`, `kl`, `logit`, `norm` that is there.
        labels: Layers, components, paths or output positions to draw; None for all. `"token_log_probs"`: a path, or the
            layer of a lens; a trace: the number of a layer.
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
    if view == "attention_heads" or (view is None and type(result) in (Trace, NgramTable, dict, list, tuple)):
        return _attention(result, labels, prompt, top_k, height)
    if view == "token_log_probs":
        return _token_log_probs(result, labels, order, trace, prompt, top_k, height)
    table = _table(result, measure, labels, order, target, prompt)
    return _token_values(view, *table, prompt, top_k, height)


def _attention(result: Any, labels: Any, prompt: int, top_k: int, height: int | None) -> View:
    """Maps from tokens to tokens: patterns of a trace, skip-trigrams, or shares of detached Jacobians."""
    if isinstance(result, Trace):
        return _patterns(result, labels, prompt, height)
    if isinstance(result, NgramTable):
        return _skip_trigrams(result, labels, top_k, height)
    return _jacobians(result, labels, prompt, height)


def _token_values(
    view: CircuitsView | None,
    table: pd.DataFrame,
    series: str,
    measure: str,
    about: str,
    prompt: int,
    top_k: int,
    height: int | None,
) -> View:
    """A `_table` as one of the views of values by token."""
    values = torch.tensor(table.to_numpy(dtype=float), device="cpu").nan_to_num()  # [series, pos]
    tokens, names = [_inert(token) for _, token in table.columns], [_inert(str(label)) for label in table.index]
    title = f"{measure} by {series.replace('out_pos', 'output position')}{about}"
    if view == "topk_tokens":
        return _framed(
            title, "TopkTokens", _topk_tokens(values, tokens, names, series, measure, prompt, top_k), height or 420
        )
    if view == "text_neuron_activations":
        props = {"tokens": tokens, "activations": values.T[:, None].tolist(), "firstDimensionName": "Measure"}
        props |= {"secondDimensionName": series, "firstDimensionLabels": [measure], "secondDimensionLabels": names}
        return _framed(title, "TextNeuronActivations", props, height or 220)
    return _colored_tokens(view, title, series, values, tokens, names, height)


def _colored_tokens(
    view: CircuitsView | None,
    title: str,
    series: str,
    values: Tensor,
    tokens: list[str],
    names: list[str],
    height: int | None,
) -> View:
    """Tokens colored by a series, or by several with a button for each; colors are symmetric around 0 if there are signs."""
    bound = max(float(values.abs().max()), 1e-7)
    is_signed = bool((values < 0).any())
    if view == "colored_tokens":
        if len(names) != 1:
            raise ValueError(f"colored_tokens draws one of the {series}s {names[:12]}; pass labels=...")
        props = {"tokens": tokens, "values": values[0], "minValue": -bound if is_signed else 0.0, "maxValue": bound}
        return _framed(f"{title}: {names[0]}", "ColoredTokens", props, height or 120)
    low = [-bound if is_signed else -1e-7] * len(names)
    props = {"tokens": tokens, "values": values.T, "labels": names, "positiveBounds": [bound] * len(names)}
    return _framed(title, "ColoredTokensMulti", props | {"negativeBounds": low}, height or 220 + 24 * len(names))


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


def _table(
    result: Any, measure: str | None, labels: Any, order: int | None, target: str | int | None, prompt: int
) -> tuple[pd.DataFrame, str, str, str]:
    """The values [series, (pos, token)] of one measure and prompt; the names of series and measure; the rest in words."""
    found: Any = values_by_token(result)
    series = next((name for name in SERIES if name in found), None)
    if series is None or "token" not in found or "pos" not in found:
        raise TypeError(
            f"A circuitsvis view needs a result with values by token: a lens, path statistics, a JetCache, or a detached "
            f"Jacobian; got {type(result).__name__}."
        )
    after_token = list(found.columns)[list(found.columns).index("token") + 1 :]
    numbers = [name for name in after_token if is_number(found[name])]
    drawn = next((name for name in DEFAULT_MEASURES if name in numbers), numbers[0]) if measure is None else measure
    check_choice("measure", drawn, numbers)
    if "rank" in found:
        found = found[found["rank"] == 0]
    about = ""
    for name, wanted in (("order", order), ("target", target)):
        if name not in found:
            if wanted is not None:
                raise ValueError(f"This result has no {name}s; got {name}={wanted!r}. Leave it out.")
            continue
        # The answer as a target is another token at each position: targets are told apart by their place.
        there = sorted(set(found["order"])) if name == "order" else list(result.target_names)
        wanted = there[-1 if name == "order" else 0] if wanted is None else wanted
        check_choice(name, wanted, there)
        place = found["order"] if name == "order" else found.groupby([series, "batch", "pos"], sort=False).cumcount()
        found = found[place == (wanted if name == "order" else there.index(wanted))]
        if name == "order" or drawn == "effect":
            about += f", {name} " + ("the model's own best token" if wanted == ANSWER else str(wanted))
    check_choice("prompt", prompt, sorted(set(found["batch"])))
    found = found[(found["batch"] == prompt) & found["pos"].notna()]
    found = found.assign(place=list(zip(found["pos"].astype(int), found["token"], strict=True)))
    table = found.pivot(index=series, columns="place", values=drawn)
    table = table.reindex(list(dict.fromkeys(found[series])))[sorted(table.columns)]
    if labels is not None:
        wanted_labels = [labels] if isinstance(labels, str | int) else list(labels)
        for label in wanted_labels:
            check_choice("labels", label, list(table.index))
        table = table.loc[wanted_labels]
    return table, series, drawn, about


def _jacobians(result: Any, labels: Any, prompt: int, height: int | None) -> View:
    """Share of every input token in every output position, a map per Jacobian."""
    maps = result if type(result) in (dict, list, tuple) else [result]
    named = (
        maps
        if isinstance(maps, dict)
        else {f"{x.wrt} to {x.output}": x for x in maps if isinstance(x, DetachedJacobian)}
    )
    if not named or not all(isinstance(x, DetachedJacobian) for x in named.values()) or len(named) != len(maps):
        raise TypeError(
            "attention_heads needs a DetachedJacobian, or a list or dict of some with different names; or a Trace, or a "
            f"table of skip-trigrams; got {type(result).__name__}."
        )
    if labels is not None:
        raise ValueError("attention_heads draws all output positions; leave labels out, or pass fewer maps.")
    tables = [_table(x, "share", None, None, None, prompt)[0] for x in named.values()]
    places = list(tables[0].columns)
    if any(list(table.columns) != places for table in tables):
        raise ValueError("Maps that are drawn together must be of the same prompt; these have different tokens.")
    shares = torch.zeros(len(tables), len(places), len(places), dtype=torch.float64, device="cpu")
    rows = {pos: i for i, (pos, _) in enumerate(places)}
    for i, table in enumerate(tables):
        shares[i, [rows[pos] for pos in table.index]] = torch.tensor(
            table.to_numpy(dtype=float), device="cpu"
        ).nan_to_num()
    bound = float(shares.abs().max())
    props = {
        "attention": shares,
        "attentionHeadNames": [_inert(name) for name in named],
        "tokens": [_inert(token) for _, token in places],
        "minValue": -bound,
        "maxValue": bound,
        "maskUpperTri": False,
    }
    return _framed(
        "Share of each input token (across) in each output position (down)", "AttentionHeads", props, height or 640
    )


def _patterns(trace: Trace, layer: Any, prompt: int, height: int | None) -> View:
    """Attention patterns of all heads of a layer, as the model has them at this input: what detached maps hold fixed."""
    layers = range(trace.network.n_layers)
    if isinstance(layer, bool) or not isinstance(layer, int) or layer not in layers:
        raise ValueError(
            f"A trace is drawn by layer: pass labels={layers[-1]}, one of 0..{layers[-1]}; got labels={layer!r}."
        )
    check_choice("prompt", prompt, range(len(trace.tokens)))
    real = trace.valid[prompt]
    maps = trace["pattern", layer][prompt][:, real][:, :, real]
    tokens = trace.tokens[prompt][real]
    text = _names(trace.network.tokenizer, [tokens])
    props: dict[str, Any] = {"attention": maps, "tokens": [text[token] for token in tokens.tolist()]}
    title = f"Attention patterns of layer {layer}: query tokens down, key tokens across"
    props |= {"attentionHeadNames": [f"L{layer}H{head}" for head in range(len(maps))], "maskUpperTri": False}
    return _framed(title, "AttentionHeads", props | {"minValue": -1.0, "maxValue": 1.0}, height or 640)


def _skip_trigrams(table: NgramTable, labels: Any, top_k: int, height: int | None) -> View:
    """Attention of the key and query pairs of a table's best skip-trigrams; other pairs are blank."""
    if table.settings.get("ngram") != "skip-trigram" or labels is not None:
        raise TypeError(
            f"attention_heads needs skip-trigrams of one head, as jet_trigrams gives, without labels; got a table of "
            f"{table.settings.get('ngram', 'n-grams')} and labels={labels!r}."
        )
    best = table[:top_k]
    keys, queries = best.ids[:, 0].tolist(), best.ids[:, 1].tolist()
    tokens = list(dict.fromkeys([*keys, *queries]))
    attention = best.parts["attention"].double()
    is_raw = table.settings["normalize"] == "none"
    maps = torch.zeros(1, len(tokens), len(tokens), dtype=torch.float64, device=attention.device)
    rows, columns = ([tokens.index(token) for token in own] for own in (queries, keys))
    maps[0, rows, columns] = attention if is_raw else attention.exp()
    bound = float(maps.abs().max())  # attention over a vocabulary is far below 1
    props = {"attention": maps, "tokens": [_inert(table.names[token]) for token in tokens]}
    props |= {"attentionHeadNames": [_inert(table.path)], "minValue": -bound, "maxValue": bound, "maskUpperTri": False}
    what = "scores" if is_raw else "attention"
    title = (
        f"{table.path}: {what} of the pairs in the {len(best)} best skip-trigrams, query down, key across; others blank"
    )
    return _framed(title, "AttentionHeads", props, height or 640)


def _token_log_probs(
    result: Any, labels: Any, order: int | None, trace: Trace | None, prompt: int, top_k: int, height: int | None
) -> View:
    """Log-probabilities at every position but the last, of a cache's terms, their sum, or a layer of a lens."""
    if isinstance(result, IterativeJetLens):
        return _of_lens(result, labels, order, trace, prompt, top_k, height)
    if not isinstance(result, JetCache) or not result.is_decoded or result.truth.ndim != 3:
        raise TypeError(
            f"token_log_probs needs a JetCache of the decoder [batch, pos, d_model], as jet_expand(model, 'ln_final', ...) gives, "
            f"or an iterative lens; got {type(result).__name__}."
        )
    if labels is not None:
        check_choice("labels", labels, result.labels)
    check_choice("prompt", prompt, range(len(result.tokens)))
    real, own = result.valid[prompt], result.traced("Log-probabilities")
    log_probs = own.decoder.transformed(result.logits(labels)[prompt][real]).log_softmax(-1)
    what = "the sum of all terms" if labels is None else str(labels)
    return _log_probs(what, log_probs, result.tokens[prompt][real], own, top_k, height)


def _of_lens(
    lens: IterativeJetLens,
    label: Any,
    order: int | None,
    trace: Trace | None,
    prompt: int,
    top_k: int,
    height: int | None,
) -> View:
    """Log-probabilities of a layer of a lens that was read at consecutive positions."""
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
    log_probs = lens.log_probs(label, order, trace=trace)[prompt][real]
    return _log_probs(f"{label}, order {order}", log_probs, lens.tokens[prompt][real], trace, top_k, height)


def _log_probs(what: str, log_probs: Tensor, tokens: Tensor, trace: Trace, top_k: int, height: int | None) -> View:
    """Log-probabilities [pos, d_vocab] of next tokens; those of the last position have none."""
    log_probs, tokens = log_probs[:-1], tokens.to(log_probs.device)
    best = log_probs.topk(min(top_k, log_probs.shape[-1]), -1)
    own = log_probs.gather(-1, tokens[1:, None])
    text = _names(trace.network.tokenizer, [tokens, best.indices])
    props = {
        "prompt": [text[token] for token in tokens.tolist()],
        "topKLogProbs": best.values,
        "topKTokens": [[text[token] for token in row] for row in best.indices.tolist()],
        "correctTokenRank": (log_probs > own).sum(-1),
        "correctTokenLogProb": own[:, 0],
    }
    return _framed(f"Log-probabilities (nats) of {what}", "TokenLogProbs", props, height or 120 + 36 * top_k)


def _names(tokenizer: Any, ids: list[Tensor]) -> dict[int, str]:
    return {token: _inert(name) for token, name in token_names(tokenizer, ids).items()}


def _inert(text: str) -> str:
    """Text that is the same on the screen, and neither HTML, nor an entity, nor the end of a script.

    A word joiner, which has no width, follows every `<` and `&`: HTML then reads them as themselves. circuitsvis shows
    tokens as HTML in some places and as text in others, so that escaping would be seen.
    """
    return "".join(letter + WORD_JOINER if letter in "<&" else letter for letter in text)


def _framed(title: str, element: str, props: Mapping[str, Any], height: int) -> View:
    """A circuitsvis element in a sandboxed frame without network."""
    drawn = render_local(element, **{name: _plain(value) for name, value in props.items()})
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    page = f'<!doctype html><html><head><meta charset="utf-8">{policy}</head><body>{drawn}</body></html>'
    style = f"width:100%;height:{int(height)}px;border:0;resize:vertical;overflow:auto;background:white"
    frame = f'<iframe sandbox="allow-scripts" title="{html.escape(title)}" style="{style}" srcdoc="{html.escape(page)}"></iframe>'
    return View(title, frame)


def _plain(value: Any) -> Any:
    return value.detach().cpu().tolist() if isinstance(value, Tensor) else value
