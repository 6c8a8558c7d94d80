"""`tl-jets jacobian`: the model as an exact linear map at one prompt, and each token's contribution to the answer."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from tl_jets.cli.output import Output, header
from tl_jets.cli.pages import command_page, records, section
from tl_jets.cli.session import (
    UsageError,
    load_network,
    one_line,
    read_position,
    read_prompt,
    read_token,
    refusals,
    steps,
    token_record,
)
from tl_jets.cli.terminal import jacobian as terminal
from tl_jets.core.attribution import centered
from tl_jets.core.linear_map import SingularVectors
from tl_jets.core.notebook import View
from tl_jets.detached_map import DetachedJacobian, detached_jacobian
from tl_jets.detached_map.chain import LOGITS
from tl_jets.views import detached_tokens


def run(options: argparse.Namespace) -> None:
    """Print the linear map of one prompt."""
    prompt, output = read_prompt(options.model, options.prompt), Output.of(options)
    if options.target is not None and options.output != LOGITS:
        raise UsageError(f"--target is a logit; it needs --output {LOGITS}, got --output {options.output}")
    with steps(5) as step, refusals():
        step("loading TransformerLens and the model")
        network = load_network(options.model, "sublayer")
        step("forward pass")
        trace = network.trace(prompt)
        position = read_position(options.position, trace.tokens.shape[1])
        if options.top_k > network.decoder.d_vocab:
            raise UsageError(f"--top-k must be at most {network.decoder.d_vocab}, the vocabulary; got {options.top_k}")
        assert trace.logits is not None, "it ran the model"
        answer = int(trace.logits[0, position].argmax())
        target = None
        if options.output == LOGITS:
            target = answer if options.target is None else read_token(network, options.target)
        step("linear map")
        J = detached_jacobian(network, trace, output=options.output, wrt=options.wrt, positions=position)
        step("contributions")
        data = header("jacobian", model=options.model, prompt=prompt) | jacobian_data(J, answer, target, options.top_k)
        if options.svd:
            step("singular values")
            vectors = J.svd(options.svd, seed=options.seed)
            data["svd"] = singular_data(J, vectors, options.top_k)
    output.write_json(data)
    if "html" in output:
        parts = [detached_tokens(J), *_sections(data)]
        output.write("html", command_page("jacobian", terminal.asked(data), terminal.explained(data), *parts))
    output.print(*terminal.tables(data))


def _sections(data: dict[str, Any]) -> list[View]:
    """Tables of the HTML page."""
    columns = {
        "pos": "pos",
        "token": "read",
        "effect": "effect",
        "share": "share",
        "norm": "norm",
        "top": "raises most",
    }
    sums = [{"token": name} | data[name] for name in ("bias", "sum")]
    found = [section(terminal.title(data), records([*data["tokens"], *sums], columns))]
    if data["svd"]:
        columns = {"value": "value", "relative": "relative", "raises": "output raises", "pos": "input mostly at"}
        columns |= {"at": "read there", "part_at_pos": "part of it", "reads": "nearest embeddings"}
        found.append(section(f"The {len(data['svd'])} largest singular values of J", records(data["svd"], columns)))
    return found


@torch.no_grad()
def jacobian_data(J: DetachedJacobian, answer: int, target: int | None, top_k: int) -> dict[str, Any]:
    """Each token's contribution as plain values; `effect` is on the target's logit (None without a target)."""
    tokenizer = J.trace.network.tokenizer
    value, bias = J.value[0, 0].double(), J.bias[0, 0].double()
    parts = J.contributions[0, :, 0].double()
    squared = value.square().sum()

    def record(part: torch.Tensor) -> dict[str, Any]:
        effect = None if target is None else float(centered(part, torch.tensor([target], device=part.device)))
        return {"effect": effect, "norm": float(part.norm()), "share": float(part @ value / squared)}

    best = J.top_tokens(top_k).indices[0, :, 0].tolist()
    tokens = [
        {"pos": pos, **token_record(tokenizer, token), **record(part)}
        | {"top": [token_record(tokenizer, raised) for raised in best[pos]] if bool(part.any()) else []}
        for pos, (token, part) in enumerate(zip(J.tokens[0].tolist(), parts, strict=True))
    ]
    (position,) = J.positions
    return {
        "position": position,
        "read": token_record(tokenizer, int(J.tokens[0, position])),
        "answer": token_record(tokenizer, answer),
        "target": None if target is None else token_record(tokenizer, target),
        "output": J.output,
        "wrt": J.wrt,
        "shape": [*J.map.out_shape[1:], *J.map.in_shape[1:]],
        "is_softcapped": J.trace.decoder.transform is not None,
        "unit": J.trace.decoder.unit,
        "reconstruction_error": J.reconstruction_error,
        "ordinary_error": J.ordinary_error,
        "tokens": tokens,
        "bias": record(bias),
        "sum": record(parts.sum(0) + bias),
        "value": record(value),
        "svd": None,
    }


@torch.no_grad()
def singular_data(J: DetachedJacobian, vectors: SingularVectors, top_k: int) -> list[dict[str, Any]]:
    """Singular values, tokens raised by output directions, and embeddings nearest to input directions.

    Input directions are read at the position where they are longest. `reads` is None if they are not embeddings: those
    of a later stream, or of a model that normalizes its embeddings.
    """
    tokenizer = J.trace.network.tokenizer
    raised = J.decode_left(vectors, top_k).indices[:, 0].tolist()
    lengths = vectors.right.norm(dim=-1)
    nearest, reason = None, None
    if J.wrt == "embed":
        try:
            nearest = J.decode_right(vectors, top_k).indices
        except ValueError as error:
            reason = one_line(error)
    else:
        reason = f"directions of {J.wrt} are not those of embeddings"
    values = vectors.values.tolist()
    rows = []
    for i, value in enumerate(values):
        pos = int(lengths[i].argmax())
        row = {"value": value, "relative": value / values[0] if values[0] else None}
        row["raises"] = [token_record(tokenizer, token) for token in raised[i]]
        row |= {"pos": pos, "part_at_pos": float((lengths[i, pos] / lengths[i].norm()).square())}
        row["at"] = token_record(tokenizer, int(J.tokens[0, pos]))
        row["reads"] = None
        if nearest is not None:
            row["reads"] = [token_record(tokenizer, token) for token in nearest[i, pos].tolist()]
        rows.append(row | ({"why_not_read": reason} if reason else {}))
    return rows
