"""Tables of paths and components, from the data of `tl-jets paths --json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from tl_jets.cli.terminal.parts import answer_line, heading, legend, new_table, titled
from tl_jets.core.decoder import in_unit
from tl_jets.core.numerals import number, signed
from tl_jets.paths.graph import count_text

VERDICT_STYLES = {"confirmed": "bold", "partly": "", "refuted": "dim"}


def tables(data: Mapping[str, Any], *, top: int) -> list[RenderableType]:
    """Heading, paths, components, legend."""
    found: list[RenderableType] = [heading("paths", asked(data)), _paths(data)]
    if data["components"] is not None:
        found.append(_components(data["components"], top, data["unit"]))
    return [*found, legend(explained(data))]


def asked(data: Mapping[str, Any]) -> dict[str, str | Text]:
    """The request, and the model's answer."""
    answer, target = data["answer"], data["target"]
    rows: dict[str, str | Text] = {"model": data["model"], "prompt": data["prompt"]}
    rows["answer"] = answer_line(answer["token"], data["read"]["token"], data["position"])
    if target["id"] != answer["id"]:
        rows["target"] = Text.assemble((target["token"], "bold"), ", whose logit is explained")
    return rows


def _paths(data: Mapping[str, Any]) -> RenderableType:
    """One path per row, with its ablation if there is one; sums at the bottom."""
    is_ablated = data["ablation"] is not None
    table = new_table()
    table.add_column("effect", justify="right", no_wrap=True)
    if is_ablated:
        table.add_column("ablation", justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
    table.add_column("its own best", max_width=14)
    table.add_column("path")
    for row in data["paths"]:
        cells = [signed(row["effect"])]
        if is_ablated:
            verdict = row.get("verdict", "n/a")
            cells += [signed(row.get("path_ablation")), Text(verdict, style=VERDICT_STYLES.get(verdict, ""))]
        best = Text(row["top"]["token"], style="bold" if row["is_answer"] else "")
        table.add_row(*cells, best, Text(row["path"]))
    table.add_section()
    blank = ["", ""] if is_ablated else []
    table.add_row(signed(data["effect_of_shown"]), *blank, "", f"these {len(data['paths'])}")
    table.add_row(signed(data["effect_of_rest"]), *blank, "", rest(data))
    table.add_row(
        signed(data["target"]["logit"]),
        *blank,
        "",
        f"the model: the logit of {data['target']['token']}{in_unit(data['unit'])}",
    )
    return titled(title(data), table, *notes(data))


def rest(data: Mapping[str, Any]) -> str:
    """Describe the part of the logit that the shown paths leave."""
    parts = [f"{count_text(data['n_paths'] - len(data['paths']))} other paths"]
    parts += ["what the filters left out"] if data["filters"] else []
    parts += ["the remainder"] if data["linearize"] == "jet" else []
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def title(data: Mapping[str, Any]) -> str:
    """Title of the table of paths."""
    kind = "detached" if data["linearize"] == "detached" else f"order-{data['order']} jet"
    how = "" if data["is_exhaustive"] else " (beam search)"
    asked_for = " that the filters keep" if data["filters"] else ""
    how += in_unit(data["unit"])
    return f"The {len(data['paths'])} largest of {count_text(data['n_paths'])} {kind} paths{asked_for}, by {data['rank']}{how}"


def notes(data: Mapping[str, Any]) -> list[str]:
    """Notes below the table of paths."""
    found = []
    if data["linearize"] == "jet":
        copies = sum(row["is_answer"] for row in data["paths"])
        found.append(f"{copies} of {len(data['paths'])} paths decode to the model's own answer")
        for stream, remainder in list(data["remainders"].items())[-2:-1]:
            found.append(f"remainder of all paths at {stream}, relative to the stream: {number(remainder)}")
    if data["ablation"] is not None:
        for name, summary in (("these", data["ablation"]["shown"]), ("random", data["ablation"]["random"])):
            if summary is None:
                found.append(f"no random paths to compare with: {data['ablation']['why_none']}")
                continue
            counts = ", ".join(f"{summary[kind]} {kind}" for kind in VERDICT_STYLES)
            correlation = signed(summary["rank_correlation"])
            found.append(f"{name} {summary['n']}: {counts}; rank correlation {correlation}")
    return found


def _components(components: Mapping[str, Any], top: int, unit: str) -> RenderableType:
    """One component per row: the sum of all paths through it, with its zero ablation."""
    table = new_table()
    table.add_column("component")
    table.add_column("paths", justify="right")
    table.add_column("effect", justify="right")
    table.add_column("zero ablation", justify="right")
    table.add_column("KL", justify="right")
    table.add_column("best token of the sum")
    rows = components["rows"]
    for row in rows[:top]:
        cells = [count_text(row["n_paths"]), signed(row["effect"]), signed(row["zero_ablation"]), number(row["kl"])]
        table.add_row(Text(row["component"]), *cells, Text(row["top"]["token"]))
    note = f"rank correlation of effect and zero ablation: {signed(components['rank_correlation'])}"
    more = [f"{len(rows) - top} more, all smaller: --top, --json"] if len(rows) > top else []
    return titled(f"All detached paths through each component{in_unit(unit)}", table, *more, note)


def explained(data: Mapping[str, Any]) -> dict[str, str]:
    """The legend of the tables."""
    rows = {
        "effect": "What a path adds to the token's logit beyond the mean of the vocabulary (all effects sum to the model's), "
        "with norm scales, attention patterns and gates frozen at this prompt.",
        "path": "A source (embed, or the constant of a step), then the steps that it passes through; ln_final is the final "
        "norm. A step that is not named is passed by.",
    }
    if data["linearize"] == "jet":
        rows["effect"] = (
            "What a path adds to the token's logit beyond the mean of the vocabulary. A jet of order 1 or more carries the "
            "model's own stream into every path, so that most paths decode to its answer whatever they pass through."
        )
    if data["ablation"] is not None:
        rows["ablation"] = (
            "How far the logit falls if what arrives along this path is taken away, and everything responds. confirmed: "
            "within a factor of two of the effect; refuted: less than a tenth, or of the other sign. Random paths of "
            "comparable effect are the control."
        )
    else:
        rows["control"] = "Whether the model would miss a path is another question, which --ablate asks it."
    if data["components"] is not None:
        rows["zero ablation"] = (
            "How far the logit falls if all that the component writes becomes zero (KL: how far the whole answer moves, in "
            "nats). A component's paths overlap with those of others: their effects do not sum to the model."
        )
    if data["is_softcapped"]:
        rows["softcap"] = "Effects and ablations are of logits before the model's final softcap; KL is after it."
    return rows
