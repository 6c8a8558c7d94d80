"""Maps from tokens to tokens in circuitsvis' `attention_heads` and `attention_patterns`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tl_jets.core.options import check_choice
from tl_jets.core.trace import Trace
from tl_jets.detached_map.jacobian import DetachedJacobian
from tl_jets.interop.frames import framed, inert, inert_names
from tl_jets.interop.values_by_token import series_table
from tl_jets.ngrams.tables import NgramTable
from tl_jets.views.pages import View


def attention_view(view: str, result: Any, labels: Any, prompt: int, top_k: int, height: int | None) -> View:
    """Maps from tokens to tokens: patterns of a trace, skip-trigrams, or shares of detached Jacobians."""
    if isinstance(result, Trace):
        maps = _patterns(result, labels, prompt)
    elif isinstance(result, NgramTable):
        maps = _skip_trigrams(result, labels, top_k)
    else:
        maps = _jacobians(result, labels, prompt)
    if view == "attention_heads":
        props = {"attention": maps.values, "tokens": maps.tokens, "attentionHeadNames": maps.names}
        props |= {"minValue": -maps.bound, "maxValue": maps.bound, "maskUpperTri": False}
        return framed(maps.title, "AttentionHeads", props, height or 640)
    if bool((maps.values < 0).any()):
        raise ValueError("attention_patterns has no color for negative values, which are here; use 'attention_heads'.")
    names = ", ".join(maps.names)
    shown = {"attention": maps.values / maps.bound, "tokens": maps.tokens}
    title = f"{maps.title}; heads 0.. are {names}" + ("" if maps.bound == 1 else f"; 1 is {maps.bound:.2g}")
    return framed(title, "AttentionPatterns", shown, height or 640)


@dataclass(frozen=True)
class _Maps:
    """Values [map, out, in] with a name for each map, and the largest size that colors show."""

    title: str
    values: Tensor
    tokens: list[str]
    names: list[str]
    bound: float


def _jacobians(result: Any, labels: Any, prompt: int) -> _Maps:
    """Share of every input token in every output position, a map per Jacobian."""
    maps = result if type(result) in (dict, list, tuple) else [result]
    named: Any = maps
    if not isinstance(maps, dict):
        named = {f"{x.wrt} to {x.output}": x for x in maps if isinstance(x, DetachedJacobian)}
    if not named or not all(isinstance(x, DetachedJacobian) for x in named.values()) or len(named) != len(maps):
        raise TypeError(
            "attention_heads needs a DetachedJacobian, or a list or dict of some with different names; or a Trace, or a "
            f"table of skip-trigrams; got {type(result).__name__}."
        )
    if labels is not None:
        raise ValueError("attention_heads draws all output positions; leave labels out, or pass fewer maps.")
    tables = [series_table(x, "share", None, None, None, prompt)[0] for x in named.values()]
    places = list(tables[0].columns)
    if any(list(table.columns) != places for table in tables):
        raise ValueError("Maps that are drawn together must be of the same prompt; these have different tokens.")
    shares = torch.zeros(len(tables), len(places), len(places), dtype=torch.float64, device="cpu")
    rows = {pos: i for i, (pos, _) in enumerate(places)}
    for i, table in enumerate(tables):
        share = torch.tensor(table.to_numpy(dtype=float), device="cpu").nan_to_num()
        shares[i, [rows[pos] for pos in table.index]] = share
    title, tokens = "Share of each input token (across) in each output position (down)", [inert(t) for _, t in places]
    return _Maps(title, shares, tokens, [inert(name) for name in named], float(shares.abs().max()))


def _patterns(trace: Trace, labels: Any, prompt: int) -> _Maps:
    """Attention patterns of a layer's heads, or of given heads, as the model has them at this input."""
    heads = _heads(trace, labels)
    check_choice("prompt", prompt, range(len(trace.tokens)))
    real = trace.valid[prompt]
    by_layer = {layer: trace["pattern", layer][prompt][:, real][:, :, real] for layer, _ in heads}
    chosen = [(layer, head) for layer, own in heads for head in (range(len(by_layer[layer])) if own is None else [own])]
    for layer, head in chosen:
        check_choice("a head of `labels`", head, range(len(by_layer[layer])))
    tokens = trace.tokens[prompt][real]
    text = inert_names(trace.network.tokenizer, [tokens])
    what = f"layer {labels}" if isinstance(labels, int) else "some heads"
    title = f"Attention patterns of {what}: query tokens down, key tokens across"
    patterns = torch.stack([by_layer[layer][head] for layer, head in chosen])
    names = [f"L{layer}H{head}" for layer, head in chosen]
    return _Maps(title, patterns, [text[token] for token in tokens.tolist()], names, 1.0)


def _heads(trace: Trace, labels: Any) -> list[tuple[int, int | None]]:
    """(layer, head) of `labels`; a layer's number is all its heads, None."""
    layers, named = range(trace.network.n_layers), [labels] if isinstance(labels, str) else labels
    if isinstance(labels, int) and not isinstance(labels, bool) and labels in layers:
        return [(labels, None)]
    found = [re.fullmatch(r"L(\d+)H(\d+)", str(label)) for label in (named if isinstance(named, list | tuple) else [])]
    if not found or not all(own and int(own[1]) in layers for own in found):
        raise ValueError(
            f"A trace is drawn by layer or by head: pass labels={layers[-1]}, one of 0..{layers[-1]}, or "
            f"labels=['L{layers[-1]}H0']; got labels={labels!r}."
        )
    return [(int(own[1]), int(own[2])) for own in found if own]


def _skip_trigrams(table: NgramTable, labels: Any, top_k: int) -> _Maps:
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
    what = "scores" if is_raw else "attention"
    title = (
        f"{table.path}: {what} of the pairs in the {len(best)} best skip-trigrams, query down, key across; others blank"
    )
    names = [inert(table.names[token]) for token in tokens]
    return _Maps(title, maps, names, [inert(table.path)], float(maps.abs().max()))  # a vocabulary's are far below 1
