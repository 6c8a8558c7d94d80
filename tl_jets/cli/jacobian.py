"""`tl-jets jacobian`: the model as an exact linear map at one prompt, and each token's contribution to the answer."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from tl_jets.cli.report import Report, Table
from tl_jets.cli.session import Read, UsageError, one_line, read, steps
from tl_jets.cli.texts import legend
from tl_jets.core.attribution import centered
from tl_jets.core.decoder import in_unit
from tl_jets.core.linear_map import SingularVectors
from tl_jets.core.numerals import number, signed
from tl_jets.detached_map import DetachedJacobian, detached_jacobian
from tl_jets.detached_map.composed_jacobian import LOGITS
from tl_jets.views import detached_tokens

# Of a longer prompt, only this many largest tokens are shown without --all.
SHOWN = 12


def report(options: argparse.Namespace) -> Report:
    """The linear map of one prompt."""
    if options.target is not None and options.output != LOGITS:
        raise UsageError(f"--target is a logit; it needs --output {LOGITS}, got --output {options.output}")
    with steps(5) as step:
        asked = read(options, "sublayer", step)
        network, trace = asked.network, asked.trace
        if options.top_k > network.decoder.d_vocab:
            raise UsageError(f"--top-k must be at most {network.decoder.d_vocab}, the vocabulary; got {options.top_k}")
        answer, target = asked.answer, asked.given(options.target)
        if options.output == LOGITS and target is None:
            target = answer
        step("linear map")
        J = detached_jacobian(network, trace, output=options.output, wrt=options.wrt, positions=asked.position)
        step("contributions")
        data: dict[str, Any] = asked.header(options) | {"answer": asked.token(answer)}
        data |= {"target": None if target is None else asked.token(target)}
        data |= _contributions(J, asked, target, options.top_k)
        if options.svd:
            step("singular values")
            data["svd"] = _singular(J, asked, J.svd(options.svd, seed=options.seed), options.top_k)
    out_pos, width, pos, d_model = data["shape"]
    rows = asked.asked(options.model, data["answer"], data["target"])
    rows["map"] = f"{J.wrt} [{pos}, {d_model}] -> {J.output} [{out_pos}, {width}]"
    rows["error"] = f"{J.reconstruction_error:.0e}, relative; ordinary Jacobian: {number(J.ordinary_error)}"
    keys = ["error", *([] if target is None else ["effect"]), "share", "raises most"]
    keys += [*(["value"] if options.svd else []), *(["softcap"] if data["is_softcapped"] else [])]
    whole, directions = _token_table(data, len(data["tokens"])), [_singular_table(data["svd"])] if options.svd else []
    tables = [whole if options.all else _token_table(data, SHOWN), *directions]
    page: dict[str, Any] = {"on_page": [whole, *directions], "views": lambda: [detached_tokens(J)]}
    names, verdict = legend("jacobian", *keys), _verdict(data)
    return Report(data, rows, tables, names, verdict=verdict, further=_further(data), **page)


def _verdict(data: dict[str, Any]) -> list[str]:
    """How exact the map is, and which token gives most, in words."""
    misses = f"it misses {data['reconstruction_error']:.0e} of the output; the ordinary Jacobian"
    found = [f"Frozen at this prompt the model is a linear map: {misses}, the control, {data['ordinary_error']:.0%}."]
    measure = "share" if data["target"] is None else "effect"
    most, *others = sorted(data["tokens"], key=lambda row: -abs(row[measure]))
    total = sum(abs(row[measure]) for row in data["tokens"]) or 1.0
    of = "the output" if data["target"] is None else f"the centered logit of {data['target']['token']}"
    said = f"{most['token']} (position {most['pos']}) gives most to {of}: {abs(most[measure]) / total:.0%} of all sizes"
    following = f"; then {others[0]['token']}, {abs(others[0][measure]) / total:.0%}" if others else ""
    return [*found, f"{said}{following}. What the model would do without a token is another question."]


def _further(data: dict[str, Any]) -> list[str]:
    """What to run next."""
    more = "--target TOKEN; " if data["target"] is not None else ""
    return [
        f"--all: every token of a long prompt; --explain: what the numbers mean; {more}--json, --html FILE",
        "--output 2_pre: the map to a stream; --wrt 3_mid --output 3_mlp_out: of one MLP; --svd 10",
        "tl-jets flow --corrupted TEXT: what changes with another token; tl-jets paths: by component",
    ]


@torch.no_grad()
def _contributions(J: DetachedJacobian, asked: Read, target: int | None, top_k: int) -> dict[str, Any]:
    """Each token's contribution as plain values; `effect` is on the target's logit (None without a target)."""
    value, bias = J.value[0, 0].double(), J.bias[0, 0].double()
    parts = J.contributions[0, :, 0].double()
    squared = value.square().sum()

    def record(part: Tensor) -> dict[str, Any]:
        effect = None if target is None else float(centered(part, torch.tensor([target], device=part.device)))
        return {"effect": effect, "norm": float(part.norm()), "share": float(part @ value / squared)}

    best = J.top_tokens(top_k).indices[0, :, 0].tolist()
    tokens = [
        {"pos": pos, **asked.token(token), **record(part)}
        | {"top": [asked.token(raised) for raised in best[pos]] if bool(part.any()) else []}
        for pos, (token, part) in enumerate(zip(J.tokens[0].tolist(), parts, strict=True))
    ]
    return {
        "output": J.output,
        "wrt": J.wrt,
        "shape": [*J.map.out_shape[1:], *J.map.in_shape[1:]],
        "is_softcapped": asked.trace.decoder.transform is not None,
        "unit": asked.trace.decoder.unit,
        "reconstruction_error": J.reconstruction_error,
        "ordinary_error": J.ordinary_error,
        "tokens": tokens,
        "bias": record(bias),
        "sum": record(parts.sum(0) + bias),
        "value": record(value),
        "svd": None,
    }


@torch.no_grad()
def _singular(J: DetachedJacobian, asked: Read, vectors: SingularVectors, top_k: int) -> list[dict[str, Any]]:
    """Singular values, tokens raised by output directions, and embeddings nearest to input directions.

    Input directions are read at the position where they are longest. `reads` is None if they are not embeddings: those
    of a later stream, or of a model that normalizes its embeddings.
    """
    raised = J.decode_left(vectors, top_k).indices[:, 0].tolist()
    lengths = vectors.right.norm(dim=-1)
    nearest, reason = None, f"directions of {J.wrt} are not those of embeddings"
    if J.wrt == "embed":
        try:
            nearest = J.decode_right(vectors, top_k).indices
        except ValueError as error:
            reason = one_line(error)
    values = vectors.values.tolist()
    rows = []
    for i, value in enumerate(values):
        pos = int(lengths[i].argmax())
        row: dict[str, Any] = {"value": value, "relative": value / values[0] if values[0] else None}
        row["raises"] = [asked.token(token) for token in raised[i]]
        row |= {"pos": pos, "part_at_pos": float((lengths[i, pos] / lengths[i].norm()).square())}
        row["at"] = asked.token(int(J.tokens[0, pos]))
        row["reads"] = None if nearest is None else [asked.token(token) for token in nearest[i, pos].tolist()]
        row |= {"why_not_read": reason} if nearest is None else {}
        rows.append(row)
    return rows


def _token_table(data: dict[str, Any], most: int) -> Table:
    """The largest tokens, one a row; others, bias and sum below."""
    target = data["target"]
    measure = "share" if target is None else "effect"
    largest = sorted(data["tokens"], key=lambda row: -abs(row[measure]))
    shown = {row["pos"] for row in largest[:most]}

    def row(name: str, part: dict[str, Any]) -> dict[str, Any]:
        effect = {} if target is None else {"effect": signed(part["effect"])}
        first = {"pos": part.get("pos"), "token": name}
        return first | effect | {"share": f"{part['share']:.1%}", "norm": part.get("norm")}

    rows = [
        row(part["token"], part) | {"raises most": [token["token"] for token in part["top"]]}
        for part in data["tokens"]
        if part["pos"] in shown
    ]
    sums = [row(name, data[name]) for name in ("bias", "sum")]
    others = largest[most:]
    if others:
        total = {name: sum(part[name] or 0 for part in others) for name in ("effect", "share")}
        sums.insert(0, row(f"{len(others)} others", total))
    of = data["output"] if target is None else f"the centered logit of {target['token']}{in_unit(data['unit'])}"
    return Table(f"What each token gives to {of}", rows, sums)


def _singular_table(found: list[dict[str, Any]]) -> Table:
    """One singular value a row: output direction, input direction and its position."""
    rows = []
    for row in found:
        cells = {"value": row["value"], "relative": row["relative"]}
        cells["output raises"] = [token["token"] for token in row["raises"]]
        cells["input mostly at"] = f"{row['pos']} {row['at']['token']} ({row['part_at_pos']:.0%})"
        if row["reads"] is not None:
            cells["nearest embeddings"] = [token["token"] for token in row["reads"]]
        rows.append(cells)
    why = [row["why_not_read"] for row in found[:1] if "why_not_read" in row]
    notes = [f"input directions are not read as tokens: {reason}" for reason in why]
    return Table(f"The {len(found)} largest singular values of J", rows, notes=notes)
