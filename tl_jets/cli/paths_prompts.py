"""`tl-jets paths --prompts FILE`: which paths are large in many prompts, how much they hold and cancel, sums and ablations."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tl_jets.cli.largest_paths import CONSTANT, VERDICTS, explained, kind_of, largest_paths, rank_correlation
from tl_jets.cli.prompt_files import Prompts, prompt_text
from tl_jets.cli.report import Report, Table, header
from tl_jets.cli.session import Read, together
from tl_jets.core.decoder import in_unit
from tl_jets.core.intervals import FEWEST, bootstrap_interval, median_intervals
from tl_jets.core.numerals import number, signed
from tl_jets.core.processes import Processes
from tl_jets.core.prompts import over_prompts, read_rows
from tl_jets.interventions.ablation_effects import ablation_effect
from tl_jets.paths.cancellation import LARGE
from tl_jets.paths.graph import count_text
from tl_jets.paths.statistics import path_lengths, path_sums

# How many paths and components are shown.
PATHS, COMPONENTS = 8, 8
# Options of a single prompt, with their defaults.
SINGLE = {"prompt": None, "target": None}


def report(options: argparse.Namespace) -> Report:
    """The largest paths of every prompt of a file, and sums over all paths."""
    many = Prompts.of(options, SINGLE)
    by_prompt = _by_prompt(options, many)
    first = by_prompt[0]
    data = header("paths", model=options.model, prompts=options.prompts, rank=options.rank)
    data |= {"granularity": options.granularity, "position": options.position}
    data |= {name: first[name] for name in ("linearize", "order", "n_paths", "filters", "is_softcapped", "unit")}
    sums = _sums(options, many, [record["target"]["id"] for record in by_prompt])
    counted = sums.pop("counted", [True] * len(by_prompt))
    kept = [record for record, own in zip(by_prompt, counted, strict=True) if own]
    data |= {"overall": _overall(kept), "paths": _recurring(kept), "components": None, **sums, "by_prompt": by_prompt}
    tables = [_path_table(data, len(kept), options.top)]
    if data["components"] is not None:
        tables.append(_component_table(data, options.top))
    on_page, verdict = [*tables, _prompt_table(by_prompt)], _verdict(data, len(kept), options.top)
    names = explained(data, is_ablated=options.ablate)
    return Report(data, many.asked(options), tables, names, on_page=on_page, verdict=verdict)


def _by_prompt(options: argparse.Namespace, many: Prompts) -> list[dict[str, Any]]:
    """What `tl-jets paths` finds of each prompt alone; processes of torchrun divide the prompts."""
    processes, network = Processes.of(together()), many.network
    rows = read_rows(network, many.tokens)
    own = len(rows[processes.rank :: processes.size])
    with tqdm(total=own, unit="prompt", delay=1, leave=False, disable=None) as bar:

        def read(i: int) -> dict[str, Any]:
            trace = network.trace(rows[i][None])
            asked = Read(network, trace, many.texts[i], options.position % len(rows[i]))
            found = largest_paths(options, asked, None if many.answers is None else many.answers[i])
            bar.update()
            return {"prompt": many.texts[i], **found}

        return processes.map(read, range(len(rows)))


def _sums(options: argparse.Namespace, many: Prompts, targets: list[int]) -> dict[str, Any]:
    """Over all detached paths of every prompt: sums through components with zero ablations, and by length."""
    if options.linearize != "detached" or options.no_components:
        return {}
    shared = {"positions": options.position, "targets": [[target] for target in targets], "distributed": together()}
    sums = over_prompts(path_sums, many.network, many.tokens, **shared)
    lengths = over_prompts(path_lengths, many.network, many.tokens, **shared)
    zeroed = over_prompts(ablation_effect, many.network, many.tokens, **shared)
    counted = sums.counted[:, 0]
    falls = dict(zip(zeroed.labels, -zeroed.centered[:, counted, 0, 0], strict=True))
    losses = dict(zip(zeroed.labels, zeroed.kl[:, counted, 0], strict=True))
    effects = dict(zip(sums.labels, sums.effects[:, counted, 0, 0], strict=True))
    rows = []
    for label, effect in effects.items():
        row = {"component": label, **_spread("effect", effect), "raises": float((effect > 0).double().mean())}
        rows.append(row | _spread("zero_ablation", falls.get(label)) | _spread("kl", losses.get(label)))
    rows.sort(key=lambda row: -abs(row["effect"]))
    both = [label for label in effects if label in falls]
    pairs = ([(float(effects[label][b]), float(falls[label][b])) for label in both] for b in range(int(counted.sum())))
    correlations = [rank_correlation(own) for own in pairs]
    found = {"components": rows, "rank_correlation": _middle([x for x in correlations if x is not None])}
    found["cancellation_by_length"] = _middle(lengths.cancellation[counted, 0, 0].tolist())
    said = "" if sums.sinks is None else sums.sinks.said(sums.valid)
    return found | {"counted": counted.tolist(), "left_out": said}


def _spread(name: str, values: Tensor | None) -> dict[str, float | None]:
    """Mean over prompts, its 95% bootstrap interval (NaN below six), and the median."""
    names = (name, f"{name}_low", f"{name}_high", f"{name}_median")
    if values is None:
        return dict.fromkeys(names)
    values = values.double().cpu()
    ends = bootstrap_interval(values) if len(values) >= FEWEST else (float("nan"), float("nan"))
    found = float(values.mean()), *ends, float(values.quantile(0.5))
    return dict(zip(names, found, strict=True))


def _middle(values: Sequence[float]) -> dict[str, float]:
    """Median over prompts and its 95% interval (NaN below six)."""
    found = torch.tensor(values, dtype=torch.float64, device="cpu")
    low, high = median_intervals(found[None])[:, 0].tolist()
    return {"median": float(found.quantile(0.5)) if len(values) else float("nan"), "low": low, "high": high}


def _overall(by_prompt: list[dict[str, Any]]) -> dict[str, Any]:
    """How much of the answer the largest paths hold, how far these cancel, and how many their ablation confirms."""
    found: dict[str, Any] = {
        "held": _middle([record["effect_of_shown"] / record["target"]["logit"] for record in by_prompt]),
        "cancellation": _middle([record["cancellation"] for record in by_prompt]),
        "ablation": None,
    }
    ablations = [record["ablation"] for record in by_prompt if record["ablation"] is not None]
    if ablations:
        kinds = {kind: [each[kind] for each in ablations if each[kind] is not None] for kind in ("shown", "random")}
        found["ablation"] = {kind: _verdicts(each) if each else None for kind, each in kinds.items()}
        found["ablation"]["why_none"] = ablations[0]["why_none"]
    return found


def _verdicts(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of paths by verdict, with the 95% interval over prompts of those that are confirmed."""
    total = sum(each["n"] for each in summaries)
    shares = torch.tensor([each["confirmed"] / each["n"] for each in summaries], dtype=torch.float64, device="cpu")
    low, high = bootstrap_interval(shares)
    correlations = [each["rank_correlation"] for each in summaries if each["rank_correlation"] is not None]
    found = {kind: sum(each[kind] for each in summaries) / total for kind in (*VERDICTS, "by_chance")}
    return {"n": total, **found, "low": low, "high": high, "rank_correlation": _middle(correlations)}


def _recurring(by_prompt: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every path that is among the largest of a prompt: those of most prompts first, of as many those of larger effect."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in by_prompt:
        for path in record["paths"]:
            found.setdefault(path["path"], []).append(path)
    rows = []
    for label, own in found.items():
        effects = torch.tensor([path["effect"] for path in own], dtype=torch.float64, device="cpu")
        row = {"path": label, "prompts": len(own), **_spread("effect", effects)}
        row["raises"] = float((effects > 0).double().mean())
        tested = [path["verdict"] == "confirmed" for path in own if "verdict" in path]
        rows.append(row | ({"confirmed": sum(tested) / len(tested)} if tested else {}))
    return sorted(rows, key=lambda row: (-row["prompts"], -abs(row["effect"])))


def _verdict(data: dict[str, Any], n: int, top: int) -> list[str]:
    """How much the largest paths hold, how paths cancel, and what ablation says, in words."""
    overall = data["overall"]
    held = _of(overall["held"], ".0%")
    found = [f"The {top} largest paths hold {held} of the answer's logit: median of {n} prompts."]
    index = data.get("cancellation_by_length", overall["cancellation"])
    of = "All paths, by length," if "cancellation_by_length" in data else "The largest paths"
    does = "cancel" if index["median"] > LARGE else "hardly cancel"
    found.append(f"{of} {does}: sizes are {_of(index, '.3g')} times the size of their sum.")
    if overall["ablation"] is not None:
        shown = overall["ablation"]["shown"]
        interval = f"95%: {shown['low']:.0%} to {shown['high']:.0%}"
        found.append(
            f"Ablation confirms {shown['confirmed']:.0%} of them ({interval}); with falls shuffled {shown['by_chance']:.0%}."
        )
    return found


def _of(middle: dict[str, float], form: str) -> str:
    """A median with its interval."""
    interval = "" if middle["low"] != middle["low"] else f" (95%: {middle['low']:{form}} to {middle['high']:{form}})"
    return f"{middle['median']:{form}}{interval}"


def _interval(row: dict[str, Any], name: str) -> str:
    """The interval of a mean, empty if there is none."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if low is None or low != low else f"{signed(low)} to {signed(high)}"


def _path_table(data: dict[str, Any], n: int, top: int) -> Table:
    """The paths that are large in most prompts."""
    rows = []
    for row in data["paths"]:
        cells = {"in": f"{row['prompts'] / n:.0%}", "mean effect": signed(row["effect"])}
        cells |= {"95%": _interval(row, "effect"), "raises": f"{row['raises']:.0%}"}
        if data["overall"]["ablation"]:
            cells["confirmed"] = f"{row['confirmed']:.0%}" if "confirmed" in row else ""
        rows.append(cells | {"path": row["path"]})
    of = f"the {top} largest of {count_text(data['n_paths'])} {kind_of(data)} paths by {data['rank']}"
    title = f"Paths that most prompts have among {of}{in_unit(data['unit'])}"
    notes = ["in: share of prompts; effects, intervals and raises are over these prompts"]
    if data["overall"]["ablation"] is not None:
        for name, kind in (("the largest", "shown"), ("random paths", "random")):
            shares = data["overall"]["ablation"][kind]
            if shares is None:
                notes.append(f"no random paths to compare with: {data['overall']['ablation']['why_none']}")
                continue
            counts = ", ".join(f"{shares[each]:.0%} {each}" for each in VERDICTS)
            correlation = _of(shares["rank_correlation"], "+.2f")
            notes.append(f"{name}, {shares['n']:,}: {counts}; rank correlation with ablation {correlation}")
    return Table(title, rows, notes=notes, top=PATHS)


def _component_table(data: dict[str, Any], top: int) -> Table:
    """One component a row: the sum of all paths through it, with its zero ablation, over prompts."""
    rows = []
    for row in data["components"]:
        cells = {"component": row["component"], "mean effect": signed(row["effect"]), "95%": _interval(row, "effect")}
        cells |= {"median": signed(row["effect_median"]), "raises": f"{row['raises']:.0%}"}
        zeroed = row["zero_ablation"]
        cells |= {"fall, zeroed": "" if zeroed is None else signed(zeroed)}
        cells |= {"95% of it": _interval(row, "zero_ablation"), "KL": number(row["kl_median"])}
        rows.append(cells)
    notes = [f"rank correlation of effect and zero ablation in a prompt: {_of(data['rank_correlation'], '+.2f')}"]
    notes += ["KL: median over prompts, nats", *([data["left_out"]] if data["left_out"] else [])]
    title = f"All detached paths through each component{in_unit(data['unit'])}"
    return Table(title, rows, notes=notes, top=min(top, COMPONENTS), more="more, all smaller: --top, --json")


def _prompt_table(by_prompt: list[dict[str, Any]]) -> Table:
    """A row for every prompt."""
    rows = []
    for record in by_prompt:
        target = record["target"]
        row = {"prompt": prompt_text(record["prompt"]), "token": target["token"], "its logit": signed(target["logit"])}
        row |= {"held": f"{record['effect_of_shown'] / target['logit']:.0%}", "largest path": _first(record["paths"])}
        rows.append(row)
    return Table("Every prompt", rows)


def _first(paths: list[dict[str, Any]]) -> str:
    """The largest path that passes through something."""
    return next((path["path"] for path in paths if path["path"] != CONSTANT), "")
