"""Tables of the detached map, from the data of `tl-jets jacobian --json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from tl_jets.cli.terminal.parts import answer_line, heading, legend, new_table, titled, words
from tl_jets.core.decoder import in_unit
from tl_jets.core.numerals import number, signed

# Of a longer prompt, only this many largest tokens are shown.
SHOWN = 40


def tables(data: Mapping[str, Any]) -> list[RenderableType]:
    """Heading, tokens, singular values, legend."""
    found: list[RenderableType] = [heading("jacobian", asked(data)), _tokens(data)]
    if data["svd"]:
        found.append(_singular(data))
    return [*found, legend(explained(data))]


def asked(data: Mapping[str, Any]) -> dict[str, str | Text]:
    """The request, the model's answer, and the error of the map."""
    answer, target = data["answer"], data["target"]
    rows: dict[str, str | Text] = {"model": data["model"], "prompt": data["prompt"]}
    rows["answer"] = answer_line(answer["token"], data["read"]["token"], data["position"])
    if target is not None and target["id"] != answer["id"]:
        rows["target"] = Text.assemble((target["token"], "bold"), ", whose logit is explained")
    out_pos, width, pos, d_model = data["shape"]
    rows["map"] = f"{data['wrt']} [{pos}, {d_model}] -> {data['output']} [{out_pos}, {width}]"
    rows["error"] = (
        f"{data['reconstruction_error']:.0e} of the output is missing from J e + bias; ordinary Jacobian: "
        f"{number(data['ordinary_error'])}"
    )
    return rows


def _tokens(data: Mapping[str, Any]) -> RenderableType:
    """One token per row; bias and sum at the bottom."""
    has_effect = data["target"] is not None
    table = new_table()
    table.add_column("pos", justify="right")
    table.add_column("token", overflow="fold")
    if has_effect:
        table.add_column("effect", justify="right")
    table.add_column("share", justify="right")
    table.add_column("norm", justify="right")
    table.add_column("raises most", overflow="fold")

    def cells(row: Mapping[str, Any]) -> list[str]:
        effect = [signed(row["effect"])] if has_effect else []
        return [*effect, f"{row['share']:.1%}", number(row["norm"])]

    measure = "effect" if has_effect else "share"
    largest = sorted(data["tokens"], key=lambda row: -abs(row[measure]))
    shown = {row["pos"] for row in largest[:SHOWN]}
    for row in data["tokens"]:
        if row["pos"] in shown:
            raised = words([token["token"] for token in row["top"]])
            table.add_row(str(row["pos"]), Text(row["token"]), *cells(row), raised)
    others = largest[SHOWN:]
    if others:
        effect = [signed(sum(row["effect"] for row in others))] if has_effect else []
        share = f"{sum(row['share'] for row in others):.1%}"
        table.add_row("", f"{len(others)} others", *effect, share, "", "", style="dim")
    table.add_section()
    table.add_row("", "bias", *cells(data["bias"]), "")
    table.add_row("", "sum", *cells(data["sum"]), "")
    return titled(title(data), table)


def title(data: Mapping[str, Any]) -> str:
    """Title of the table of tokens."""
    of = data["output"] if data["target"] is None else f"the logit of {data['target']['token']}{in_unit(data['unit'])}"
    return f"What each token gives to {of}"


def _singular(data: Mapping[str, Any]) -> RenderableType:
    """One singular value per row: output direction, input direction and its position."""
    has_input = any(row["reads"] is not None for row in data["svd"])
    table = new_table()
    table.add_column("value", justify="right")
    table.add_column("relative", justify="right")
    table.add_column("output raises", overflow="fold")
    table.add_column("input mostly at", overflow="fold")
    if has_input:
        table.add_column("nearest embeddings", overflow="fold")
    for row in data["svd"]:
        raised = words([token["token"] for token in row["raises"]])
        at = Text(f"{row['pos']} {row['at']['token']} ({row['part_at_pos']:.0%})")
        read = [words([token["token"] for token in row["reads"]])] if row["reads"] is not None else []
        table.add_row(number(row["value"]), number(row["relative"]), raised, at, *read)
    notes = [] if has_input else [f"input directions are not read as tokens: {data['svd'][0]['why_not_read']}"]
    return titled(f"The {len(data['svd'])} largest singular values of J", table, *notes)


def explained(data: Mapping[str, Any]) -> dict[str, str]:
    """The legend of the tables."""
    rows = {
        "error": "J e + bias is the model's own output up to rounding; the bias is computed by itself. The ordinary Jacobian "
        "(of the model as it responds) is the control: it does not add up to the output.",
    }
    if data["target"] is not None:
        rows["effect"] = (
            "What the token gives to the logit beyond the mean of the vocabulary, with norm scales, attention patterns and "
            "gates frozen at this prompt. Tokens and bias sum to the model's."
        )
    rows["share"] = f"Of {data['output']}: the projection on it; shares sum to 100%. norm: length; parts may cancel."
    rows["raises most"] = "Best tokens of what the position gives, read by the final norm and the unembedding."
    if data["svd"]:
        rows["value"] = (
            "J makes the direction of the input so many times as long, and turns it into that of the output. (47%): the part "
            "of the direction that is at this position. At another prompt J is another map."
        )
    if data["is_softcapped"]:
        rows["softcap"] = "Logits are those before the model's final softcap."
    return rows
