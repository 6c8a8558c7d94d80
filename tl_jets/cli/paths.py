"""`tl-jets paths`: the largest paths of a prediction, sums over paths, and their ablations."""

from __future__ import annotations

import argparse
from typing import Any

from tl_jets.cli import paths_prompts
from tl_jets.cli.arguments import MOST_PATHS, SHOWN_PATHS
from tl_jets.cli.largest_paths import VERDICTS, explained, kind_of, largest_paths, rank_correlation
from tl_jets.cli.report import Report, Table
from tl_jets.cli.session import Read, read, steps
from tl_jets.core.decoder import in_unit
from tl_jets.core.numerals import number, signed
from tl_jets.interventions.ablation_effects import ablation_effect
from tl_jets.paths.cancellation import LARGE
from tl_jets.paths.graph import count_text
from tl_jets.paths.statistics import PathStatistics, path_sums


def report(options: argparse.Namespace) -> Report:
    """The largest paths of one prompt; of many with `--prompts`."""
    shown = options.top or SHOWN_PATHS
    options.top = options.top or MOST_PATHS
    if options.prompts is not None:
        return paths_prompts.report(options)
    with steps(6) as step:
        asked = read(options, options.granularity, step)
        step("paths")
        data = asked.header(options) | {"rank": options.rank, "granularity": options.granularity}
        data |= largest_paths(options, asked, asked.given(options.target), step) | {"components": None}
        target = data["target"]["id"]
        if options.linearize == "detached" and not options.no_components:
            step("sums through components")
            sums = path_sums(asked.network, asked.trace, positions=asked.position, targets=[target])
            step("zero ablation")
            data["components"] = _components(asked, sums, target)
    tables = [_path_table(data, shown)]
    if data["components"] is not None:
        tables.append(_component_table(data["components"], shown, data["unit"]))
    asked_for = asked.asked(options.model, data["answer"], data["target"])
    on_page = [*tables, *([_control_table(data["control"])] if data["control"] else [])]
    names, verdict = explained(data, is_ablated=data["ablation"] is not None), _verdict(data)
    return Report(data, asked_for, tables, names, on_page=on_page, verdict=verdict, further=_further(data))


def _verdict(data: dict[str, Any]) -> list[str]:
    """How much the largest paths hold, and what ablation says of them, in words."""
    target, n, ablation = data["target"], len(data["paths"]), data["ablation"]
    total = f"{signed(target['logit'])}{in_unit(data['unit'])}, the centered logit of {target['token']}"
    kind = "paths" if data["linearize"] == "detached" else f"{kind_of(data)} paths"
    gives = f"{count_text(data['n_paths'])} {kind} give {signed(data['effect_of_shown'])}"
    found = [f"The {n} largest of {gives} of {total}."]
    if ablation is None:
        return [*found, "No path was ablated, so that these are what is sent, not what the model would miss: --ablate."]
    shown = ablation["shown"]
    found.append(
        f"Ablation confirms {shown['confirmed']} of {shown['n']} and refutes {shown['refuted']}; "
        f"shuffled falls would confirm {shown['by_chance']:.1f}."
    )
    return found


def _further(data: dict[str, Any]) -> list[str]:
    """What to run next."""
    first = "--ablate: take each path away, and as many random ones; " if data["ablation"] is None else ""
    return [
        f"{first}--top N, --json, --html FILE; --explain",
        "--through LABEL, --avoiding mlp, --max-length 2: paths of a kind; --granularity head; --target TOKEN",
        "tl-jets flow --ablate COMPONENT: what the model does without it; --prompts FILE: many prompts",
    ]


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


def _row(record: dict[str, Any]) -> dict[str, Any]:
    """Effect and ablation of a path."""
    row = {"effect": signed(record["effect"])}
    if "verdict" in record:
        row |= {"fall": signed(record["path_ablation"]), "verdict": record["verdict"]}
    return row


def _path_table(data: dict[str, Any], top: int) -> Table:
    """One path a row, with its ablation if there is one; sums below."""
    paths, target, is_jet = data["paths"], data["target"], data["linearize"] == "jet"
    rows = [_row(row) | {"its own best": row["top"]["token"], "path": row["path"]} for row in paths]
    rest = [f"{count_text(data['n_paths'] - len(paths))} other paths"]
    rest += ["those filtered out"] if data["filters"] else []
    rest += ["the remainder"] if is_jet else []
    sums = {
        f"these {len(paths)}": data["effect_of_shown"],
        " and ".join([", ".join(rest[:-1]), rest[-1]] if len(rest) > 1 else rest): data["effect_of_rest"],
        f"the model: the centered logit of {target['token']}{in_unit(data['unit'])}": target["logit"],
    }
    of = f"The {len(paths)} largest of {count_text(data['n_paths'])} {kind_of(data)} paths"
    of += " that the filters keep" if data["filters"] else ""
    title = f"{of}, by {data['rank']}{'' if data['is_exhaustive'] else ' (beam search)'}{in_unit(data['unit'])}"
    below = [{"effect": signed(effect), "path": name} for name, effect in sums.items()]
    return Table(title, rows, below, _notes(data), top=top, more="more, all smaller: --top, --json")


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
        counts += f" ({summary['by_chance']:.1f} by chance)"
        found.append(f"{name} {summary['n']}: {counts}; rank corr. {signed(summary['rank_correlation'])}")
    return found


def _control_table(control: list[dict[str, Any]]) -> Table:
    rows = [_row(row) | {"path": row["path"]} for row in control]
    return Table("The control: random paths of comparable effect", rows)


def _component_table(components: dict[str, Any], top: int, unit: str) -> Table:
    """One component a row: the sum of all paths through it, with its zero ablation."""
    rows = []
    for row in components["rows"]:
        cells = {"component": row["component"], "paths": count_text(row["n_paths"]), "effect": signed(row["effect"])}
        cells |= {"fall, zeroed": signed(row["zero_ablation"]), "KL": number(row["kl"])}
        rows.append(cells | {"best token of the sum": row["top"]["token"]})
    note = f"rank correlation of effect and zero ablation: {signed(components['rank_correlation'])}"
    title = f"All detached paths through each component{in_unit(unit)}"
    return Table(title, rows, notes=[note], top=top, more="more, all smaller: --top, --json")
