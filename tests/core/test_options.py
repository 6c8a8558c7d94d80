"""Closed choices and whole numbers of the public functions: what is none of them is refused by its name, before anything runs.

Without the tests' run-time type checks, as users call it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
import zoo

import tl_jets as tj
from tl_jets import studies, views
from tl_jets.calculus import center_scale
from tl_jets.core.options import check_choice
from tl_jets.ngrams import trigram_scores

Call = Callable[..., Any]


@cache
def network() -> tj.ResidualNetwork:
    return tj.ResidualNetwork(zoo.build(zoo.available(["llama"])[0]))


@cache
def trace() -> Any:
    return network().trace(zoo.tokens(network().view.model))  # type: ignore[attr-defined]


@cache
def bigrams() -> tj.ngrams.NgramTable:
    return tj.jet_bigrams(network(), "mlps", top_k=30, progress=False)


@cache
def trigrams() -> tj.ngrams.NgramTable:
    return tj.jet_trigrams(network(), 0, 0, top_k=5, progress=False)


@cache
def counts() -> tj.ngrams.NgramTable:
    return studies.ngram_counts(list(range(20)) * 3, n=2)


@cache
def detached() -> Any:
    return tj.detached_jacobian(network(), trace(), positions=-1)


def dictionary():
    W_dec = torch.eye(network().decoder.d_model, dtype=torch.float64)[:3]
    return SimpleNamespace(W_dec=W_dec, encode=lambda x: x @ W_dec.T)


CHECKED: dict[str, Any] = {"n_random": 1, "bootstrap": 10, "top_k": 3}

# Of each function that takes closed choices: a call of it that is right, but for the choice.
CALLS: dict[str, tuple[Call, tuple[str, ...]]] = {
    "ResidualNetwork": (lambda **o: tj.ResidualNetwork(network().view.model, **o), ("granularity",)),  # type: ignore[attr-defined]
    "ResidualNetwork.at": (lambda granularity: network().at(granularity), ("granularity",)),
    "ablation_effect": (lambda **o: tj.ablation_effect(network(), trace(), "0_mlp", **o), ("mode",)),
    "ablation_hooks": (lambda **o: tj.ablation_hooks(network(), "0_mlp", **o), ("mode",)),
    "circuit_faithfulness": (
        lambda **o: tj.circuit_faithfulness(network(), trace(), trace(), ["embed > 0_mlp"], **o),
        ("level",),
    ),
    "contrast": (lambda **o: tj.contrast(network(), trace(), trace(), **o), ("by",)),
    "first_order_effects": (lambda **o: tj.first_order_effects(network(), trace(), "0_mlp", **o), ("mode",)),
    "flow": (lambda **o: tj.flow(network(), trace(), trace(), **o), ("measure", "granularity", "nodes")),
    "joint_flow": (lambda **o: tj.joint_flow(network(), trace(), ["0_mlp"], controls=0, **o), ("mode", "measure")),
    "detached_spectra": (lambda **o: tj.detached_spectra(network(), trace(), k=2, **o), ("maps",)),
    "exponential_expansion": (
        lambda **o: tj.exponential_expansion(network(), top=2, **o),
        ("linearize", "rank", "center_scale"),
    ),
    "interactions": (
        lambda **o: tj.paths.interactions(network(), trace(), **o),
        ("granularity", "weights", "center_scale"),
    ),
    "iterative_jet_lens": (
        lambda **o: tj.iterative_jet_lens(network(), trace(), **o),
        ("center_scale", "linearize"),
    ),
    "joint_jet_lens": (
        lambda **o: tj.joint_jet_lens(network(), trace(), **o),
        ("granularity", "weights", "objective", "center_scale", "linearize"),
    ),
    "jet_expand": (
        lambda **o: tj.jet_expand(network(), "ln_final", centers=["embed"], **o),
        ("weights", "objective", "center_scale", "linearize"),
    ),
    "reorganized_expansion": (
        lambda **o: tj.paths.reorganized_expansion(network(), "0_mlp", centers=["embed"], **o),
        ("weights", "center_scale"),
    ),
    "jet_bigrams": (lambda **o: tj.jet_bigrams(network(), **o), ("per", "score", "screen")),
    "jet_bigrams_by_path": (
        lambda **o: tj.ngrams.jet_bigrams_by_path(network(), **o),
        ("paths", "per", "score", "screen"),
    ),
    "jet_trigrams": (lambda **o: tj.jet_trigrams(network(), 0, 0, **o), ("normalize",)),
    "trigram_scores": (lambda **o: trigram_scores(network(), 0, 0, [[1, 2, 3]], **o), ("normalize",)),
    "load_tinydocs": (lambda **o: tj.load_tinydocs(**o), ("model_class",)),
    "load_tinycode": (lambda **o: tj.load_tinycode(**o), ("model_class",)),
    "path_sums": (lambda **o: tj.path_sums(network(), trace(), **o), ("by",)),
    "PathCache.statistics": (
        lambda **o: tj.exponential_expansion(network(), linearize="detached", max_length=1)(trace()).statistics(**o),
        ("by",),
    ),
    "Norm": (lambda kind: tj.Norm(kind), ("kind",)),
    "center_scale": (
        lambda **o: center_scale(tj.Norm("RMS"), *torch.ones(2, 3).unbind(), **{"mode": "match", **o}),
        ("mode", "obtuse"),
    ),
    "track": (lambda **o: studies.track({1: network()}, n=3, **o), ("reference",)),
    "track_by_path": (lambda **o: studies.track_by_path({1: network()}, n=3, **o), ("reference",)),
    "ablation_check": (
        lambda **o: studies.ablation_check(network(), "0_mlp", **CHECKED, **o),
        ("mode", "logit"),
    ),
    "bootstrap_interval": (lambda **o: studies.bootstrap_interval(torch.rand(9).double(), **o), ("reduce",)),
    "mass": (lambda **o: studies.mass(network(), [[1, 2]], **o), ("reduce",)),
    "mass_change": (
        lambda **o: studies.mass_change({"a": network(), "b": network()}, {"x": [[1, 2]]}, **o),
        ("reduce",),
    ),
    "diff": (lambda **o: studies.diff(network(), network(), **o), ("change",)),
    "search": (lambda **o: studies.search(network(), [1], **{n: [v] for n, v in o.items()}), ("kinds",)),
    "head_scores": (lambda **o: studies.head_scores(network(), length=2, n_tokens=2, **o), ("stream",)),
    "ngram_counts": (lambda **o: studies.ngram_counts([1, 2, 3, 4], n=2, **o), ("score",)),
    "pair_scores": (lambda **o: studies.pair_scores(network(), [[1, 2]], **o), ("score",)),
    "detached_tokens": (lambda **o: views.detached_tokens(detached(), **o), ("by",)),
    "to_circuitsvis": (lambda **o: tj.to_circuitsvis(tj.path_sums(network(), trace()), **o), ("view",)),
    "trigram_heatmap": (lambda **o: views.trigram_heatmap(network(), trigrams(), **o), ("axes",)),
    "with_dictionary": (lambda **o: tj.with_dictionary(network(), "0_mlp_out", dictionary(), 0, **o), ("encodes",)),
}


def choices(hint: Any) -> bool:
    return get_origin(hint) is Literal or any(choices(part) for part in get_args(hint))


def test_every_closed_choice_is_tried():
    for module in (tj, studies, views):
        for name in module.__all__:
            function = getattr(module, name)
            if inspect.isfunction(function):
                hints = get_type_hints(inspect.unwrap(function))
                found = {option for option, hint in hints.items() if option != "return" and choices(hint)}
                assert found <= set(CALLS[name][1] if name in CALLS else ()), name


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in CALLS for option in CALLS[name][1]])
@pytest.mark.parametrize("value", ["first", 3.5], ids=str)
def test_a_choice_is_one_of_its_values(name, option, value, as_users_run_it):
    with pytest.raises((ValueError, TypeError)) as caught:
        CALLS[name][0](**{option: value})
    assert option in str(caught.value)
    assert repr(value) in str(caught.value) or (option, value) == ("weights", 3.5)


# Whole numbers: calls as above, and the least that each option may be.
COUNTED: dict[str, tuple[Call, dict[str, int]]] = {
    "iterative_jet_lens": (
        lambda **o: tj.iterative_jet_lens(network(), trace(), **o),
        {"order": 0, "top_k": 1, "seed": 0, "chunk_size": 1},
    ),
    "joint_jet_lens": (
        lambda **o: tj.joint_jet_lens(network(), trace(), **o),
        {"order": 0, "top_k": 1, "seed": 0},
    ),
    "jet_expand": (lambda **o: tj.jet_expand(network(), "ln_final", centers=["embed"], **o), {"order": 0}),
    "exponential_expansion": (
        lambda **o: tj.exponential_expansion(network(), **o),
        {"order": 0, "max_length": 0, "top": 1, "max_paths": 1},
    ),
    "reorganized_expansion": (
        lambda **o: tj.paths.reorganized_expansion(network(), "0_mlp", centers=["embed"], **o),
        {"max_centers": 1},
    ),
    "interactions": (lambda **o: tj.paths.interactions(network(), trace(), **o), {"seed": 0}),
    "jet_bigrams": (lambda **o: tj.jet_bigrams(network(), **o), {"top_k": 1, "chunk_size": 1}),
    "bigram_log_normalizers": (lambda **o: tj.ngrams.bigram_log_normalizers(network(), **o), {"chunk_size": 1}),
    "jet_trigrams": (
        lambda **o: tj.jet_trigrams(network(), **{"layer": 0, "head": 0} | o),
        {"layer": 0, "top_k": 1, "distance": 1},
    ),
    "LinearMap.svd": (lambda **o: detached().svd(**{"k": 2} | o), {"k": 1, "prompt": 0, "seed": 0}),
    "LinearMap.materialize": (lambda **o: detached().materialize(**o), {"chunk_size": 1}),
    "LinearMap.apply": (lambda **o: detached().apply(torch.ones_like(detached().map.point), **o), {"chunk_size": 1}),
    "detached_spectra": (
        lambda **o: tj.detached_spectra(network(), zoo.tokens(network().view.model)[:1], **o),
        {"k": 1},
    ),
    "track": (
        lambda **o: studies.track({1: network()}, **{"n": 3, "reference": bigrams()} | o),
        {"n": 1, "controls": 0, "seed": 0},
    ),
    "hit_ratio": (lambda **o: studies.hit_ratio(bigrams(), bigrams(), **o), {"n": 1}),
    "mass": (lambda **o: studies.mass(network(), [[1, 2]], **o), {"controls": 0, "seed": 0, "bootstrap": 0}),
    "mass_change": (
        lambda **o: studies.mass_change({"a": network(), "b": network()}, {"x": [[1, 2]]}, **o),
        {"controls": 0, "seed": 0, "bootstrap": 0, "contexts": 1},
    ),
    "search": (
        lambda **o: studies.search(network(), [1], layers=[0], **o),
        {"n_tokens": 1, "controls": 0, "top_k": 1, "seed": 0},
    ),
    "diff": (lambda **o: studies.diff(network(), network(), **o), {"top_k": 1}),
    "head_scores": (
        lambda **o: studies.head_scores(network(), **{"length": 2, "n_tokens": 2, **o}),
        {"length": 2, "n_tokens": 2, "observe": 0, "seed": 0},
    ),
    "bootstrap_interval": (
        lambda **o: studies.bootstrap_interval(torch.rand(9).double(), **o),
        {"resamples": 0, "seed": 0},
    ),
    "ngram_counts": (lambda **o: studies.ngram_counts([1, 2, 1, 2, 1], **o), {"n": 1, "min_count": 1}),
    "unigram_probabilities": (lambda **o: studies.unigram_probabilities([1, 0], **{"d_vocab": 5} | o), {"d_vocab": 1}),
    "ablation_check": (
        lambda **o: studies.ablation_check(network(), "0_mlp", **CHECKED | o),
        {"top_k": 1, "n_random": 1, "bootstrap": 0, "seed": 0},
    ),
    "roles": (lambda **o: studies.roles(network(), **o), {"n": 1}),
    "side_by_side": (lambda **o: tj.ngrams.side_by_side({"a": bigrams()}, **o), {"k": 0}),
    "jet": (lambda **o: tj.calculus.jet(torch.sin, torch.zeros(1), torch.ones(1), **{"order": 1} | o), {"order": 0}),
}


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in COUNTED for option in COUNTED[name][1]])
def test_a_whole_number_is_one(name, option, as_users_run_it):
    call, least = COUNTED[name][0], COUNTED[name][1][option]
    for value in (least + 1.5, float(least + 1), True, "3", least - 1):
        with pytest.raises((TypeError, ValueError)) as caught:
            call(**{option: value})
        assert option in str(caught.value) and repr(value) in str(caught.value), value
    call(**{option: least + 1})


def test_choices_are_compared_as_text_or_integers_and_the_first_twelve_are_named():
    check_choice("layer", 399, range(400))
    check_choice("layer", np.int64(7), range(8))
    check_choice("screen", None, ("auto", None))
    for value, known in ((True, (0, 1)), (1, (True, False)), (1.0, (0, 1)), (torch.tensor(1), (0, 1)), ("1", (0, 1))):
        with pytest.raises(ValueError, match="layer must be one of"):
            check_choice("layer", value, known)
    with pytest.raises(ValueError, match=r"layer must be one of \(0, .*, 11\), \.\.\. \(30 in all\); got 30\."):
        check_choice("layer", 30, list(range(30)))
