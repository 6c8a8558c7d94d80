"""The largest paths of one prompt as plain records, with their ablations: what `tl-jets paths` shows of one or of many."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import pandas as pd
import torch

from tl_jets.cli.session import Read, UsageError
from tl_jets.cli.texts import legend
from tl_jets.core.attribution import additive_logits, centered
from tl_jets.core.path import Path
from tl_jets.core.protocol import DECODER_STEP
from tl_jets.interventions.path_ablations import path_ablation, verdict
from tl_jets.paths.cancellation import cancellation
from tl_jets.paths.expansion import PathExpansion, exponential_expansion
from tl_jets.paths.statistics import PathStatistics

# The decoder's own constant: a path through no step, which cannot be ablated.
CONSTANT = f"{DECODER_STEP}_bias"
# Random paths have at least this fraction of the smallest effect in the table.
LEAST_OF_CONTROL = 0.1
VERDICTS = ("confirmed", "partly", "refuted")


def target_of(asked: Read, given: int | None) -> dict[str, Any]:
    """The model's answer and the token to explain, which is the answer if none is given, with its centered additive logit."""
    logits = additive_logits(asked.trace, torch.tensor([[asked.position]], device=asked.trace.tokens.device))[0, 0]
    answer = int(logits.argmax())
    target = answer if given is None else given
    logit = float(centered(logits, torch.tensor([target], device=logits.device)))
    return {"answer": asked.token(answer), "target": asked.token(target) | {"logit": logit}}


def largest_paths(
    options: argparse.Namespace, asked: Read, given: int | None = None, step: Callable[[str], None] = lambda name: None
) -> dict[str, Any]:
    """The largest paths to the answer, or to the given token, and what their ablations say."""
    found = target_of(asked, given)
    target = found["target"]["id"]
    largest = {"top": options.top, "rank": options.rank, "targets": [target] if options.rank == "effect" else None}
    expansion = _expansion(options, asked, **largest)
    # Random paths are drawn from all of them; the largest come first.
    keeps_all = options.ablate and expansion.count <= options.max_paths
    asked_for = replace(expansion, top=options.max_paths) if keeps_all else expansion
    cache = asked_for(asked.trace, positions=asked.position)
    paths, expansion = cache.statistics(targets=[target]), cast(PathExpansion, cache.expansion)
    labels, drawn, why_none, falls = paths.labels[: options.top], {}, "", {}
    if options.ablate:
        step("path ablation")
        why_none = f"drawing them needs all {expansion.count:,} evaluated: --max-paths, --max-length"
        if keeps_all:
            drawn, why_none = _drawn(paths, expansion, options.top, options.seed)
        falls = _falls(asked, [*labels, *drawn], target)
    records = [_path(asked, paths, i, falls) for i in range(len(labels))]
    shown = sum(record["effect"] for record in records)
    found |= {
        "linearize": expansion.linearize,
        "order": expansion.order if expansion.linearize == "jet" else None,
        "n_paths": expansion.count,
        "filters": {name: value for name, value in expansion.filters.items() if value is not None},
        "is_exhaustive": cache.is_exhaustive,
        "is_softcapped": asked.trace.decoder.transform is not None,
        "unit": asked.trace.decoder.unit,
        "remainders": cache.remainders,
        "cancellation": float(cancellation(paths.effects[: options.top].flatten())),
        "effect_of_shown": shown,
        "effect_of_rest": found["target"]["logit"] - shown,
        "paths": records,
        "control": [_tested({"path": path, "effect": effect}, falls) for path, effect in drawn.items()],
        "ablation": None,
    }
    if falls:
        random = summary(found["control"]) if drawn else None
        found["ablation"] = {"shown": summary(records), "random": random, "why_none": why_none}
    return found


def kind_of(data: dict[str, Any]) -> str:
    """The kind of paths: `detached`, or `order-1 jet`."""
    return f"order-{data['order']} jet" if data["linearize"] == "jet" else "detached"


def explained(data: dict[str, Any], *, is_ablated: bool) -> dict[str, str]:
    """The entries of the legend that tables of paths and components need."""
    keys = ["effect|jet" if data["linearize"] == "jet" else "effect", "path", "fall" if is_ablated else "control"]
    keys += ["fall, zeroed"] if data["components"] else []
    return legend("paths", *keys, *(["softcap"] if data["is_softcapped"] else []))


def _expansion(options: argparse.Namespace, asked: Read, **largest: Any) -> PathExpansion:
    """The largest of the requested paths."""
    is_jet = options.linearize == "jet"
    if not is_jet and (options.order != 1 or options.center_scale != "none" or options.renormalize):
        of_jets = "--order, --center-scale and --renormalize are of jets, and these paths are detached"
        raise UsageError(f"{of_jets}: add --linearize jet")
    named = ("linearize", "through", "avoiding", "center_scale", "renormalize", "max_paths", "sources", "max_length")
    given: dict[str, Any] = {name: getattr(options, name) for name in named} | largest
    return exponential_expansion(asked.network, options.order if is_jet else None, **given)


def _drawn(every: PathStatistics, expansion: PathExpansion, top: int, seed: int) -> tuple[dict[str, float], str]:
    """Effects of as many random paths, of effects like the `top` first, as these are, or why there are none."""
    effects = dict(zip(every.labels, every.effect[:, 0, 0].tolist(), strict=True))
    shown = {path for path in every.labels[:top] if path != CONSTANT}
    least = LEAST_OF_CONTROL * min((abs(effects[path]) for path in shown), default=math.inf)
    others = [path for path in map(str, expansion) if path not in (*shown, CONSTANT) and abs(effects[path]) > least]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
    return {others[i]: effects[others[i]] for i in order[: len(shown)]}, "" if others else "no others are comparable"


def _falls(asked: Read, paths: list[str], target: int) -> dict[str, float]:
    """How far the target's logit falls without each path."""
    tested = [path for path in paths if path != CONSTANT]
    if not tested:
        return {}
    ablated = path_ablation(asked.network, asked.trace, tested, targets=[target], positions=asked.position)
    return dict(zip(ablated.labels, (-ablated.centered[:, 0, 0, 0]).tolist(), strict=True))


def _tested(record: dict[str, Any], falls: dict[str, float]) -> dict[str, Any]:
    """A path's record with its ablation and verdict, if it was ablated."""
    if record["path"] not in falls:
        return record
    fall = falls[record["path"]]
    return record | {"path_ablation": fall, "verdict": verdict(record["effect"], fall)}


def _path(asked: Read, paths: PathStatistics, i: int, falls: dict[str, float]) -> dict[str, Any]:
    label, at = paths.labels[i], (i, 0, 0)
    record = {"path": label, "n_writes": 0 if label == CONSTANT else Path.parse(label).length}
    record |= {name: float(getattr(paths, name)[at]) for name in ("effect", "norm", "cosine", "share")}
    record |= {"top": asked.token(int(paths.top_ids[at])), "is_answer": bool(paths.copies[at])}
    return _tested(record, falls)


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Number of ablated paths by verdict, confirmed ones to expect by chance, and the rank correlation with ablations.

    By chance: of the falls, shuffled among the paths, the expected number that confirms.
    """
    records = [record for record in records if "verdict" in record]
    counts = Counter(record["verdict"] for record in records)
    pairs = [(record["effect"], record["path_ablation"]) for record in records]
    shuffled = sum(verdict(effect, fall) == "confirmed" for effect, _ in pairs for _, fall in pairs)
    found = {"n": len(records), **{kind: counts[kind] for kind in VERDICTS}, "by_chance": shuffled / max(len(pairs), 1)}
    return found | {"rank_correlation": rank_correlation(pairs)}


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman correlation; None for fewer than three pairs, or constant values."""
    frame = pd.DataFrame(pairs)
    if len(pairs) < 3 or (frame.nunique() < 2).any():
        return None
    return float(frame[0].rank().corr(frame[1].rank()))
