"""A language model as an exact linear map at one prompt: what every token gives, in which directions, and steering with it.

    python demos/detached_map.py

1. the map and the ordinary Jacobian of the same forward pass: how much of the output each gives back;
2. what every token of the prompt gives to the answer: parts of its logit that sum to it;
3. the strongest directions of the map to the last stream, decoded: what it writes, and what of the last token it reads;
4. layer by layer: stable rank (how many directions carry the map), and the way of the first one to the last layer's;
5. the map of another prompt, mixed in at the last layer: steering.
"""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from tl_jets import (
    DetachedJacobian,
    ResidualNetwork,
    detached_jacobian,
    detached_spectra,
    load_tinydocs,
    steering_hooks,
)
from tl_jets.core.tokens import token_text, visible

PROMPT = "If the file does not exist, an error is"
STEER = "This function is available on Unix and"


def main() -> None:
    """Print the tables, then check what they say."""
    model = load_tinydocs(dtype=torch.float64)  # where exactness shows
    network = ResidualNetwork(model)
    logits = detached_jacobian(network, PROMPT, output="logits")
    stream = detached_jacobian(network, PROMPT, output="final_post")
    own = model(PROMPT)[0, -1]  # its own pass casts to float32 in places
    steering, answers = steered(network, model)
    tables = exactness(logits, stream), contributions(logits), directions(stream), layers(network), steering
    Console(width=110).print(*tables)
    assert all(J.reconstruction_error < 1e-12 and J.ordinary_error > 0.1 for J in (logits, stream))
    assert torch.allclose((logits.contributions.sum(1) + logits.bias)[0, 0], own, rtol=1e-4, atol=1e-4), "parts sum up"
    assert answers[0] == says(network, own), "no strength changes nothing"
    assert answers[0] != answers[-1], "with all of it the other prompt's map answers"


def says(network: ResidualNetwork, logits: Tensor, k: int = 1) -> str:
    """The best tokens of logits."""
    return " ".join(visible(token_text(network.tokenizer, token)) for token in logits.topk(k).indices.tolist())


def table_of(title: str, *columns: str) -> Table:
    """An empty table; columns that begin with a capital are words, the others numbers."""
    headers = [Column(column, justify="left" if column[0].isupper() else "right") for column in columns]
    return Table(*headers, title=title, title_justify="left")


def exactness(*maps: DetachedJacobian) -> Table:
    """How far J e + bias is from the model's own output."""
    table = table_of("1. relative error of J e + bias", "Output", "frozen", "ordinary")
    for J in maps:
        table.add_row(J.output, f"{J.reconstruction_error:.0e}", f"{J.ordinary_error:.2f}")
    return table


def contributions(J: DetachedJacobian) -> Table:
    """Parts of the answer's logit over the mean of all logits."""
    network, parts = J.trace.network, torch.cat([J.contributions[0, :, 0], J.bias[0]])
    effects = parts[:, int(J.value[0, 0].argmax())] - parts.mean(-1)
    title = f"2. logit of {says(network, J.value[0, 0])!r} over the mean, after {PROMPT!r}"
    table = table_of(title, "Token", "its part", "share of all logits", "Raises most")
    for label, effect, part in zip([*J.labels, "bias"], effects, parts, strict=True):
        share = float(part @ J.value[0, 0] / J.value[0, 0].square().sum())
        table.add_row(label, f"{effect:+.2f}", f"{share:.0%}", says(network, part, 3) if part.any() else "")
    table.add_row("all", f"{effects.sum():+.2f}", "100%", says(network, parts.sum(0), 3))
    return table


def directions(J: DetachedJacobian) -> Table:
    """The leading singular vectors, decoded on both sides."""
    found, network = J.svd(4), J.trace.network
    written, read = J.decode_left(found, 5).indices[:, 0], J.decode_right(found, 1).indices[:, -1]
    table = table_of("3. strongest directions of the map to the last stream", "value", "Writes", "Reads, at the end")
    for value, *ids in zip(found.values, *torch.cat([written, read], 1).T.tolist(), strict=True):
        *words, source = (visible(token_text(network.tokenizer, token)) for token in ids)
        table.add_row(f"{value:.2f}", " ".join(words), source)
    return table


def layers(network: ResidualNetwork) -> Table:
    """Stable ranks of the maps from the embeddings to every layer, and how near their directions are to the last ones."""
    spectra = detached_spectra(network, PROMPT, k=8)
    path = spectra.projection_path(n=1).set_index("output")
    title = f"4. maps up to every layer; 8 random directions would share {spectra.chance:.0%} with the last ones"
    table = table_of(title, "Stream", "stable rank", "8 directions shared", "first one's cosine", "Says")
    for i, output in enumerate(spectra.outputs):
        if not output.endswith("_out"):
            rank, shared = f"{spectra.stable_rank[i]:.1f}", f"{spectra.overlap()[i]:.0%}"
            table.add_row(output, rank, shared, f"{path.onto_0[output]:+.2f}", visible(str(path.top_token[output])))
    return table


def steered(network: ResidualNetwork, model: Any) -> tuple[Table, list[str]]:
    """The answers with the last stream mixed with what the other prompt's map makes of this one, and how the text goes on."""
    table, answers = table_of(f"5. steered with the map of {STEER!r}", "strength", "Answers", "Goes on"), []
    tokens = model.to_tokens(PROMPT)
    for strength in (0.0, 0.3, 0.6, 1.0):
        hooks = steering_hooks(network, STEER, output=-1, strength=strength)
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1]
        with model.hooks(fwd_hooks=hooks):
            # Without a cache: TransformerLens ignores its own with transformers 5.24.
            options = {"use_past_kv_cache": False, "stop_at_eos": False, "verbose": False}
            text = model.generate(tokens, max_new_tokens=10, do_sample=False, **options)
        goes_on = visible(model.tokenizer.decode(text[0, tokens.shape[1] :]))
        table.add_row(f"{strength:.1f}", says(network, logits, 4), goes_on)
        answers.append(says(network, logits))
    return table, answers


if __name__ == "__main__":
    main()
