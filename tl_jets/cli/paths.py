"""`tl-jets paths`: the largest paths of a prediction, sums over paths, and their ablations."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
import torch

from tl_jets.cli.output import Output, header
from tl_jets.cli.pages import command_page, records, section
from tl_jets.cli.session import (
    UsageError,
    load_network,
    read_position,
    read_prompt,
    read_token,
    refusals,
    steps,
    token_record,
)
from tl_jets.cli.terminal import paths as terminal
from tl_jets.core.attribution import additive_logits, centered
from tl_jets.core.notebook import View
from tl_jets.core.path import Path
from tl_jets.core.protocol import DECODER_STEP
from tl_jets.core.trace import Trace
from tl_jets.interventions.ablation_effects import AblationEffect, ablation_effect
from tl_jets.interventions.path_ablations import path_ablation, verdict
from tl_jets.paths.cache import PathCache
from tl_jets.paths.expansion import PathExpansion, exponential_expansion
from tl_jets.paths.statistics import PathStatistics, path_sums

# The decoder's own constant: a path through no step, which cannot be ablated.
CONSTANT = f"{DECODER_STEP}_bias"
# Random paths have at least this fraction of the smallest effect in the table.
LEAST_OF_CONTROL = 0.1


@dataclass(frozen=True)
class Found:
    """Results for one prompt, position and target.

    Attributes:
        trace: The forward pass on the prompt.
        position: Where the answer is read.
        target: The token whose logit is explained.
        logit: Its additive logit, centered over the vocabulary.
        cache: The largest paths.
        paths: Their statistics.
        ablated: Path ablations of these and of the random ones; None without `--ablate`.
        drawn: Effects of the random paths by label.
        why_none: Why there are no random paths; empty if there are.
        components: Sums over all paths through each component; None if left out.
        zeroed: Zero ablations of the components.
    """

    trace: Trace
    position: int
    target: int
    logit: float
    cache: PathCache
    paths: PathStatistics
    ablated: AblationEffect | None
    drawn: dict[str, float]
    why_none: str
    components: PathStatistics | None
    zeroed: AblationEffect | None


def run(options: argparse.Namespace) -> None:
    """Print the largest paths of one prompt."""
    prompt, output = read_prompt(options.model, options.prompt), Output.of(options)
    with steps(6) as step, refusals():
        step("loading TransformerLens and the model")
        network = load_network(options.model, options.granularity)
        step("forward pass")
        trace = network.trace(prompt)
        position = read_position(options.position, trace.tokens.shape[1])
        answer, target, logit = _target(trace, position, options.target)
        step("paths")
        largest = {"top": options.top, "rank": options.rank, "targets": [target] if options.rank == "effect" else None}
        expansion = _expansion(options, network, options.sources, **largest)
        cache = expansion(trace, positions=position)
        paths = cache.statistics(targets=[target])
        ablated, drawn, why_none = None, {}, ""
        if options.ablate:
            step("path ablation")
            drawn, why_none = _drawn(options, cast(PathExpansion, cache.expansion), trace, position, target, paths)
            tested = [path for path in dict.fromkeys((*paths.labels, *drawn)) if path != CONSTANT]
            ablated = path_ablation(network, trace, tested, targets=[target], positions=position) if tested else None
        components, zeroed = None, None
        if options.linearize == "detached" and not options.no_components:
            step("sums through components")
            components = path_sums(network, trace, positions=position, targets=[target])
            step("zero ablation")
            zeroed = ablation_effect(network, trace, targets=[target], positions=position)
    found = Found(trace, position, target, logit, cache, paths, ablated, drawn, why_none, components, zeroed)
    asked = {"model": options.model, "prompt": prompt, "rank": options.rank, "granularity": options.granularity}
    data = header("paths", **asked) | paths_data(found, answer)
    output.write_json(data)
    if "html" in output:
        output.write("html", command_page("paths", terminal.asked(data), terminal.explained(data), *_sections(data)))
    output.print(*terminal.tables(data, top=options.top))


def _sections(data: dict[str, Any]) -> list[View]:
    """Tables of the HTML page."""
    columns = {"effect": "effect", "path_ablation": "path ablation", "verdict": "verdict"}
    columns |= {"norm": "norm", "share": "share", "top": "its own best", "path": "path"}
    rest = {"effect": data["effect_of_rest"], "path": terminal.rest(data)}
    total = {"effect": data["target"]["logit"], "path": "the model"}
    found = [section(terminal.title(data), records([*data["paths"], rest, total], columns), terminal.notes(data))]
    if data["control"]:
        names = {key: columns[key] for key in ("effect", "path_ablation", "verdict", "path")}
        found.append(section("The control: random paths of comparable effect", records(data["control"], names)))
    if data["components"] is not None:
        names = {"component": "component", "n_paths": "paths", "effect": "effect", "zero_ablation": "zero ablation"}
        names |= {"kl": "KL", "top": "best of the sum"}
        rows = data["components"]["rows"]
        found.append(section("All detached paths through each component", records(rows, names)))
    return found


def _target(trace: Trace, position: int, given: str | None) -> tuple[int, int, float]:
    """The model's answer, the token to explain, and its centered additive logit."""
    logits = additive_logits(trace, torch.tensor([[position]], device=trace.tokens.device))[0, 0]
    answer = int(logits.argmax())
    target = answer if given is None else read_token(trace.network, given)
    return answer, target, float(centered(logits, torch.tensor([target], device=logits.device)))


def _expansion(options: argparse.Namespace, network: Any, sources: list[str] | None, **largest: Any) -> PathExpansion:
    """The requested paths: the largest, or all of them."""
    is_jet = options.linearize == "jet"
    if not is_jet and (options.order != 1 or options.center_scale != "none" or options.renormalize):
        raise UsageError(
            "--order, --center-scale and --renormalize are of jets, and these paths are detached: add --linearize jet"
        )
    return exponential_expansion(
        network,
        options.order if is_jet else None,
        linearize=options.linearize,
        through=options.through,
        avoiding=options.avoiding,
        sources=sources,
        max_writes=options.max_writes,
        center_scale=options.center_scale,
        renormalize=options.renormalize,
        max_paths=options.max_paths,
        **largest,
    )


def _drawn(
    options: argparse.Namespace,
    expansion: PathExpansion,
    trace: Trace,
    position: int,
    target: int,
    largest: PathStatistics,
) -> tuple[dict[str, float], str]:
    """As many random paths of comparable effect as there are largest ones, or why there are none."""
    if expansion.count > options.max_paths:
        return {}, f"drawing them needs all {expansion.count:,} evaluated: --max-paths, --max-writes"
    # By name: otherwise constants that are zero here count against --max-paths.
    sources = [source.label for source in expansion.lattice.sources]
    every = _expansion(options, trace.network, sources)(trace, positions=position)
    every = every.statistics(targets=[target])
    effects = dict(zip(every.labels, every.effect[:, 0, 0].tolist(), strict=True))
    shown = {path for path in largest.labels if path != CONSTANT}
    least = LEAST_OF_CONTROL * min((abs(effects[path]) for path in shown), default=math.inf)
    others = [path for path in effects if path not in (*shown, CONSTANT) and abs(effects[path]) > least]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(options.seed), device="cpu").tolist()
    return {others[i]: effects[others[i]] for i in order[: len(shown)]}, "" if others else "no others are comparable"


def paths_data(found: Found, answer: int) -> dict[str, Any]:
    """All results as plain values."""
    tokenizer, expansion = found.trace.network.tokenizer, cast(PathExpansion, found.cache.expansion)
    falls = {}
    if found.ablated is not None:
        changes = found.ablated.centered[:, 0, 0, 0].tolist()
        falls = dict(zip(found.ablated.labels, (-change for change in changes), strict=True))
    records = [_path_record(found.paths, i, falls) for i in range(len(found.paths.labels))]
    controls = [
        {"path": path, "effect": effect, "path_ablation": falls[path], "verdict": verdict(effect, falls[path])}
        for path, effect in found.drawn.items()
    ]
    ablation = None
    if found.ablated is not None:
        ablation = {
            "shown": _summary([r for r in records if "path_ablation" in r]),
            "random": _summary(controls) if controls else None,
            "why_none": found.why_none,
        }
    shown = sum(record["effect"] for record in records)
    return {
        "position": found.position,
        "read": token_record(tokenizer, int(found.trace.tokens[0, found.position])),
        "answer": token_record(tokenizer, answer),
        "target": token_record(tokenizer, found.target) | {"logit": found.logit},
        "linearize": expansion.linearize,
        "order": expansion.order if expansion.linearize == "jet" else None,
        "n_paths": expansion.count,
        "filters": {name: value for name, value in expansion.filters.items() if value is not None},
        "is_exhaustive": found.cache.is_exhaustive,
        "is_softcapped": found.trace.decoder.transform is not None,
        "unit": found.trace.decoder.unit,
        "remainders": found.cache.remainders,
        "effect_of_shown": shown,
        "effect_of_rest": found.logit - shown,
        "paths": records,
        "ablation": ablation,
        "control": controls,
        "components": _components(found),
    }


def _path_record(statistics: PathStatistics, index: int, falls: dict[str, float]) -> dict[str, Any]:
    label, at = statistics.labels[index], (index, 0, 0)
    record = {"path": label, "n_writes": 0 if label == CONSTANT else Path.parse(label).n_writes}
    record |= {name: float(getattr(statistics, name)[at]) for name in ("effect", "norm", "cosine", "share")}
    record |= {"top": _top(statistics, index), "is_answer": bool(statistics.copies[at])}
    if label in falls:
        record |= {"path_ablation": falls[label], "verdict": verdict(record["effect"], falls[label])}
    return record


def _top(statistics: PathStatistics, index: int) -> dict[str, Any]:
    return token_record(statistics.tokenizer, int(statistics.top_ids[index, 0, 0]))


def _components(found: Found) -> dict[str, Any] | None:
    """Sums over paths, with zero ablations, largest effect first."""
    sums, zeroed = found.components, found.zeroed
    if sums is None or zeroed is None:
        return None
    falls = dict(zip(zeroed.labels, (-zeroed.centered[:, 0, 0, 0]).tolist(), strict=True))
    losses = dict(zip(zeroed.labels, zeroed.kl[:, 0, 0].tolist(), strict=True))
    rows = []
    for i, label in enumerate(sums.labels):
        row = {"component": label, "n_paths": sums.counts[i], "effect": float(sums.effect[i, 0, 0])}
        row |= {"share": float(sums.share[i, 0, 0]), "top": _top(sums, i)}
        rows.append(row | {"zero_ablation": falls.get(label), "kl": losses.get(label)})
    rows.sort(key=lambda row: -abs(row["effect"]))
    paired = [(row["effect"], row["zero_ablation"]) for row in rows if row["zero_ablation"] is not None]
    return {"rank_correlation": rank_correlation(paired), "rows": rows}


def _summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Number of paths by verdict, and the rank correlation of their effects and ablations."""
    counts = Counter(record["verdict"] for record in records)
    kinds = {kind: counts[kind] for kind in ("confirmed", "partly", "refuted")}
    pairs = [(record["effect"], record["path_ablation"]) for record in records]
    return {"n": len(records), **kinds, "rank_correlation": rank_correlation(pairs)}


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman correlation; None for fewer than three pairs, or constant values."""
    if len(pairs) < 3 or any(len(set(side)) < 2 for side in zip(*pairs, strict=True)):
        return None
    effects, falls = (pd.Series(side).rank() for side in zip(*pairs, strict=True))
    return float(np.corrcoef(effects, falls)[0, 1])
