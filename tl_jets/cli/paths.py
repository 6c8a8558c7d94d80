"""`tl-jets paths`: the largest paths of a prediction, sums over paths, and their ablations."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import pandas as pd
import torch

from tl_jets.cli.report import Report, Table, header
from tl_jets.cli.session import Read, UsageError, read, read_token, steps
from tl_jets.cli.texts import legend
from tl_jets.core.attribution import additive_logits, centered
from tl_jets.core.decoder import in_unit
from tl_jets.core.numerals import number, signed
from tl_jets.core.path import Path
from tl_jets.core.protocol import DECODER_STEP
from tl_jets.interventions.ablation_effects import ablation_effect
from tl_jets.interventions.path_ablations import path_ablation, verdict
from tl_jets.paths.cancellation import LARGE
from tl_jets.paths.expansion import PathExpansion, exponential_expansion
from tl_jets.paths.graph import count_text
from tl_jets.paths.statistics import PathStatistics, path_sums

# The decoder's own constant: a path through no step, which cannot be ablated.
CONSTANT = f"{DECODER_STEP}_bias"
# Random paths have at least this fraction of the smallest effect in the table.
LEAST_OF_CONTROL = 0.1
VERDICTS = ("confirmed", "partly", "refuted")


def report(options: argparse.Namespace) -> Report:
    """The largest paths of one prompt."""
    with steps(6) as step:
        asked = read(options, options.granularity, step)
        step("paths")
        data = header("paths", model=options.model, prompt=asked.prompt, rank=options.rank)
        data |= {"granularity": options.granularity, "position": asked.position, "read": asked.last}
        target = _target(data, asked, options.target)
        largest = {"top": options.top, "rank": options.rank, "targets": [target] if options.rank == "effect" else None}
        cache = _expansion(options, asked, options.sources, **largest)(asked.trace, positions=asked.position)
        paths, expansion = cache.statistics(targets=[target]), cast(PathExpansion, cache.expansion)
        drawn, why_none, falls = {}, "", {}
        if options.ablate:
            step("path ablation")
            drawn, why_none = _drawn(options, expansion, asked, target, paths)
            falls = _falls(asked, list(dict.fromkeys((*paths.labels, *drawn))), target)
        records = [_path(asked, paths, i, falls) for i in range(len(paths.labels))]
        shown = sum(record["effect"] for record in records)
        data |= {
            "linearize": expansion.linearize,
            "order": expansion.order if expansion.linearize == "jet" else None,
            "n_paths": expansion.count,
            "filters": {name: value for name, value in expansion.filters.items() if value is not None},
            "is_exhaustive": cache.is_exhaustive,
            "is_softcapped": asked.trace.decoder.transform is not None,
            "unit": asked.trace.decoder.unit,
            "remainders": cache.remainders,
            "cancellation": paths.overall_cancellation,
            "effect_of_shown": shown,
            "effect_of_rest": data["target"]["logit"] - shown,
            "paths": records,
            "control": [_tested({"path": path, "effect": effect}, falls) for path, effect in drawn.items()],
            "ablation": None,
            "components": None,
        }
        if falls:
            random = _summary(data["control"]) if drawn else None
            data["ablation"] = {"shown": _summary(records), "random": random, "why_none": why_none}
        if options.linearize == "detached" and not options.no_components:
            step("sums through components")
            sums = path_sums(asked.network, asked.trace, positions=asked.position, targets=[target])
            step("zero ablation")
            data["components"] = _components(asked, sums, target)
    tables = [_path_table(data)]
    if data["components"] is not None:
        tables.append(_component_table(data["components"], options.top, data["unit"]))
    keys = ["effect" if options.linearize == "detached" else "effect|jet", "path"]
    keys += ["control" if data["ablation"] is None else "ablation"]
    keys += [*(["zero ablation"] if data["components"] else []), *(["softcap"] if data["is_softcapped"] else [])]
    asked_for = asked.asked(options.model, data["answer"], data["target"])
    on_page = [*tables, *([_control_table(data["control"])] if data["control"] else [])]
    return Report(data, asked_for, tables, legend("paths", *keys), on_page=on_page)


def _target(data: dict[str, Any], asked: Read, given: str | None) -> int:
    """The token to explain; adds it, its centered additive logit, and the model's answer to the data."""
    logits = additive_logits(asked.trace, torch.tensor([[asked.position]], device=asked.trace.tokens.device))[0, 0]
    answer = int(logits.argmax())
    target = answer if given is None else read_token(asked.network, given)
    logit = float(centered(logits, torch.tensor([target], device=logits.device)))
    data |= {"answer": asked.token(answer), "target": asked.token(target) | {"logit": logit}}
    return target


def _expansion(options: argparse.Namespace, asked: Read, sources: list[str] | None, **largest: Any) -> PathExpansion:
    """The requested paths: the largest, or all of them."""
    is_jet = options.linearize == "jet"
    if not is_jet and (options.order != 1 or options.center_scale != "none" or options.renormalize):
        raise UsageError(
            "--order, --center-scale and --renormalize are of jets, and these paths are detached: add --linearize jet"
        )
    named = ("linearize", "through", "avoiding", "center_scale", "renormalize", "max_paths")
    given: dict[str, Any] = {name: getattr(options, name) for name in named} | {"sources": sources} | largest
    given["max_length"] = options.max_length
    return exponential_expansion(asked.network, options.order if is_jet else None, **given)


def _drawn(
    options: argparse.Namespace, expansion: PathExpansion, asked: Read, target: int, largest: PathStatistics
) -> tuple[dict[str, float], str]:
    """Effects of as many random paths of comparable effect as there are largest ones, or why there are none."""
    if expansion.count > options.max_paths:
        return {}, f"drawing them needs all {expansion.count:,} evaluated: --max-paths, --max-length"
    # By name: otherwise constants that are zero here count against --max-paths.
    sources = [source.label for source in expansion.graph.sources]
    every = _expansion(options, asked, sources)(asked.trace, positions=asked.position).statistics(targets=[target])
    effects = dict(zip(every.labels, every.effect[:, 0, 0].tolist(), strict=True))
    shown = {path for path in largest.labels if path != CONSTANT}
    least = LEAST_OF_CONTROL * min((abs(effects[path]) for path in shown), default=math.inf)
    others = [path for path in effects if path not in (*shown, CONSTANT) and abs(effects[path]) > least]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(options.seed), device="cpu").tolist()
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


def _components(asked: Read, sums: PathStatistics, target: int) -> dict[str, Any]:
    """Sums over paths, with zero ablations, largest effect first."""
    zeroed = ablation_effect(asked.network, asked.trace, targets=[target], positions=asked.position)
    falls = dict(zip(zeroed.labels, (-zeroed.centered[:, 0, 0, 0]).tolist(), strict=True))
    losses = dict(zip(zeroed.labels, zeroed.kl[:, 0, 0].tolist(), strict=True))
    rows = []
    for i, label in enumerate(sums.labels):
        row = {"component": label, "n_paths": sums.counts[i], "effect": float(sums.effect[i, 0, 0])}
        row |= {"share": float(sums.share[i, 0, 0]), "top": asked.token(int(sums.top_ids[i, 0, 0]))}
        rows.append(row | {"zero_ablation": falls.get(label), "kl": losses.get(label)})
    rows.sort(key=lambda row: -abs(row["effect"]))
    paired = [(row["effect"], row["zero_ablation"]) for row in rows if row["zero_ablation"] is not None]
    return {"rank_correlation": rank_correlation(paired), "rows": rows}


def _summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Number of ablated paths by verdict, and the rank correlation of their effects and ablations."""
    records = [record for record in records if "verdict" in record]
    counts = Counter(record["verdict"] for record in records)
    pairs = [(record["effect"], record["path_ablation"]) for record in records]
    return {"n": len(records), **{kind: counts[kind] for kind in VERDICTS}, "rank_correlation": rank_correlation(pairs)}


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman correlation; None for fewer than three pairs, or constant values."""
    frame = pd.DataFrame(pairs)
    if len(pairs) < 3 or (frame.nunique() < 2).any():
        return None
    return float(frame[0].rank().corr(frame[1].rank()))


def _row(record: dict[str, Any]) -> dict[str, Any]:
    """Effect and ablation of a path."""
    row = {"effect": signed(record["effect"])}
    if "verdict" in record:
        row |= {"ablation": signed(record["path_ablation"]), "verdict": record["verdict"]}
    return row


def _path_table(data: dict[str, Any]) -> Table:
    """One path a row, with its ablation if there is one; sums below."""
    paths, target, is_jet = data["paths"], data["target"], data["linearize"] == "jet"
    rows = [_row(row) | {"its own best": row["top"]["token"], "path": row["path"]} for row in paths]
    rest = [f"{count_text(data['n_paths'] - len(paths))} other paths"]
    rest += ["what the filters left out"] if data["filters"] else []
    rest += ["the remainder"] if is_jet else []
    sums = {
        f"these {len(paths)}": data["effect_of_shown"],
        " and ".join([", ".join(rest[:-1]), rest[-1]] if len(rest) > 1 else rest): data["effect_of_rest"],
        f"the model: the logit of {target['token']}{in_unit(data['unit'])}": target["logit"],
    }
    kind = f"order-{data['order']} jet" if is_jet else "detached"
    of = f"The {len(paths)} largest of {count_text(data['n_paths'])} {kind} paths"
    of += " that the filters keep" if data["filters"] else ""
    title = f"{of}, by {data['rank']}{'' if data['is_exhaustive'] else ' (beam search)'}{in_unit(data['unit'])}"
    return Table(title, rows, [{"effect": signed(effect), "path": name} for name, effect in sums.items()], _notes(data))


def _notes(data: dict[str, Any]) -> list[str]:
    """Notes below the table of paths."""
    found, ablation = [], data["ablation"]
    if data["cancellation"] > LARGE:
        found.append(
            f"these paths cancel: their sizes add up to {number(data['cancellation'])} times the size of their sum"
        )
    if data["linearize"] == "jet":
        copies = sum(row["is_answer"] for row in data["paths"])
        found.append(f"{copies} of {len(data['paths'])} paths decode to the model's own answer")
        for stream, remainder in list(data["remainders"].items())[-2:-1]:
            found.append(f"remainder of all paths at {stream}, relative to the stream: {number(remainder)}")
    for name, kind in (("these", "shown"), ("random", "random")) if ablation else ():
        if (summary := ablation[kind]) is None:
            found.append(f"no random paths to compare with: {ablation['why_none']}")
            continue
        counts = ", ".join(f"{summary[kind]} {kind}" for kind in VERDICTS)
        found.append(f"{name} {summary['n']}: {counts}; rank correlation {signed(summary['rank_correlation'])}")
    return found


def _control_table(control: list[dict[str, Any]]) -> Table:
    rows = [_row(row) | {"path": row["path"]} for row in control]
    return Table("The control: random paths of comparable effect", rows)


def _component_table(components: dict[str, Any], top: int, unit: str) -> Table:
    """One component a row: the sum of all paths through it, with its zero ablation."""
    rows = []
    for row in components["rows"]:
        cells = {"component": row["component"], "paths": count_text(row["n_paths"]), "effect": signed(row["effect"])}
        cells |= {"zero ablation": signed(row["zero_ablation"]), "KL": number(row["kl"])}
        rows.append(cells | {"best token of the sum": row["top"]["token"]})
    note = f"rank correlation of effect and zero ablation: {signed(components['rank_correlation'])}"
    title = f"All detached paths through each component{in_unit(unit)}"
    return Table(title, rows, notes=[note], top=top, more="more, all smaller: --top, --json")
