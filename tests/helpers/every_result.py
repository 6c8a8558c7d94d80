"""One result of every kind, of one small model: what is true of all results is tried on all of them."""

from __future__ import annotations

import warnings
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any

import pandas as pd
import torch
import zoo

import tl_jets as tj
from tl_jets.ngrams import untrained_tokens
from tl_jets.studies import (
    ablation_check,
    compare_with_counts,
    diff,
    head_scores,
    mass,
    mass_change,
    ngram_counts,
    roles,
    search,
    sketch,
    track,
)

# Only a base of others.
BASES = {"LensResult", "TargetResult", "FlowResult", "PairResult", "AblationResult"}


def classes_of(kind: Any) -> set[Any]:
    """The results among the subclasses of a class: those that are not only a base of others."""
    found = {kind} if hasattr(kind, "__dataclass_fields__") and kind.__name__ not in BASES else set()
    return found.union(*map(classes_of, kind.__subclasses__()))


def of_every_result() -> Any:
    """The model that `every_result` is of."""
    return next(spec for spec in zoo.available(["llama"]) if spec.processing == "raw")


@cache
def every_result() -> dict[type, Any]:
    """A result of every kind, by class, of two prompts where it is of prompts."""
    spec = of_every_result()
    network, other = (tj.ResidualNetwork(model) for model in (zoo.build(spec), zoo.fresh(spec, seed=1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = [*_of_prompts(network), *_of_pairs(network), *_of_n_grams(network, other)]
    return {type(result): result for result in made}


def _of_prompts(network: Any) -> list[Any]:
    trace = network.trace(["w3 w4 w5", "w6 w7 w8"])
    lens = tj.iterative_jet_lens(network, trace, targets=[4])
    centers = ["embed", "0_attn_out"]
    paths = tj.exponential_expansion(network, linearize="detached", max_length=1)(trace)
    J = tj.detached_jacobian(network, trace)
    made = [lens, lens.measures, lens.sinks, lens.verdict(), tj.joint_jet_lens(network, trace)]
    made += [tj.path_sums(network, trace), tj.paths.interactions(network, trace), paths, paths.to_circuit()]
    made += [tj.jet_expand(network, "0_mlp", centers=centers)(trace)]
    made += [tj.paths.reorganized_expansion(network, "0_mlp", centers=centers)(trace)]
    made += [tj.jet_expand(network, "ln_final", centers=centers, weights="optimal")(trace).solution]
    made += [trace - network.trace(["w3 w4 w9", "w6 w7 w8"])]
    made += [tj.ablation_effect(network, trace, "0_mlp", order=1), tj.first_order_effects(network, trace, "0_mlp")]
    made += [tj.ablation_effect(network, trace, ["0_mlp"]), J, J.svd(2), J.block_norms()]
    made += [tj.detached_spectra(network, "w3 w4 w5", k=2)]
    hooks = tj.ablation_hooks(network, "0_mlp")
    made += [tj.flow(network, trace, hooks, nodes=1, tolerance=1e9, check=1)]
    return [*made, tj.joint_flow(network, trace, ["0_mlp"], controls=0)]


def _of_pairs(network: Any) -> list[Any]:
    pair = network, ["w3 w4 w5", "w6 w7 w8"], ["w8 w4 w5", "w6 w3 w8"]
    made = [tj.contrast(*pair, targets=[4, 5]), tj.compare_patching(*pair, ["0_mlp"], targets=[4, 5])]
    return [*made, tj.circuit_faithfulness(*pair, ["embed > 0_mlp"], random=1, targets=[4, 5])]


def _of_n_grams(network: Any, other: Any) -> list[Any]:
    counts = ngram_counts([3, 4, 5, 3, 4, 6, 7, 4, 5], tokenizer=network.tokenizer)
    made = [tj.jet_bigrams(network, top_k=3), untrained_tokens(network), roles(network, n=3, progress=False)]
    made += [mass(network, [(3, 4), (5, 6)], controls=2), diff(network, other, top_k=3, progress=False)]
    made += [track({1: network, "end": other}, pairs=[(3, 4), (5, 6)], controls=2, progress=False)]
    made += [compare_with_counts(network, counts, n=3, controls=2, progress=False)]
    lists = {"words": ["w3 w4", "w5"], "pairs": [(5, 6)]}
    made += [mass_change({"a": network, "b": other}, lists, contexts=4, controls=2, progress=False)]
    texts = torch.tensor([[3, 4, 5, 6], [7, 4, 5, 3]])
    made += [head_scores(network, layers=[0], n_tokens=8, observe=1, length=6, progress=False)]
    made += [search(network, [4, 5], layers=[0], n_tokens=4, controls=2, top_k=3, progress=False)]
    made += [sketch(network, texts[:1], texts[1:], progress=False)]
    return [*made, ablation_check(network, "0_mlp", top_k=3, n_random=2)]


def same(found: Any, wanted: Any) -> bool:
    """Whether two results, or what they hold, are equal, NaN where NaN is; handles do not count."""
    if type(found) is not type(wanted):
        return False
    if isinstance(wanted, torch.Tensor):
        return found.dtype == wanted.dtype and torch.equal(found.nan_to_num(7), wanted.nan_to_num(7))
    if isinstance(wanted, pd.DataFrame):
        return found.equals(wanted)
    if is_dataclass(wanted):
        own = [field.name for field in fields(wanted) if not field.metadata.get("handle")]
        return all(same(getattr(found, name), getattr(wanted, name)) for name in own)
    if isinstance(wanted, dict):
        return list(found) == list(wanted) and all(same(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list | tuple):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    return found == wanted or (found != found and wanted != wanted)


def another(result: Any) -> Any:
    """The result with one of its tensors changed: what `same` must see."""
    for field in fields(result):
        value = getattr(result, field.name)
        if isinstance(value, torch.Tensor) and value.numel():
            return replace(result, **{field.name: ~value if value.dtype is torch.bool else value + 1})
    return None
