"""Induction from the weights beside attention on repeated random tokens. Not collected by the default run.

Run as a script: `TL_JETS_SMOLLM2=FOLDER python tests/benchmarks/bench_induction.py`. For each induction head: how often the scores
of a previous-token head's writes rank the place after the earlier current token first among a prompt's places, for every
earlier head as the previous-token head; whether tokens with larger scores get more attention, beside shuffled tokens; and the
best of the table. SmolLM2-135M takes about four minutes on one thread.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from bench_head_scores import load
from scipy.stats import spearmanr
from torch import Tensor

import tl_jets as tj
from tl_jets.core.attribution import directions
from tl_jets.ngrams import VocabularyStreams, induction_table
from tl_jets.ngrams.head_maps import HeadReader, decoded_writes

PREVIOUS, INDUCTION = (16, 0), [(18, 6), (17, 4)]
PROMPTS, LENGTH, SHUFFLES = 8, 32, 1000


def repeated(network: tj.ResidualNetwork, seed: int) -> tuple[Any, Tensor, int]:
    """A run on random tokens, repeated once after BOS; the tokens, and the place of the first."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, network.decoder.d_vocab, (PROMPTS, LENGTH), generator=draw)
    bos = torch.full((PROMPTS, 1), network.tokenizer.bos_token_id)
    prompt = torch.cat([bos, tokens, tokens], 1)
    return network.trace(prompt, attention_mask=torch.ones_like(prompt)), tokens, 1


def observed_attention(trace: Any, layer: int, head: int, first: int) -> Tensor:
    """Attention of the second copy to the places after the tokens of the first: [prompt, query, token before the key]."""
    pattern = trace["pattern", layer][:, head].double()
    return pattern[:, first + LENGTH : first + 2 * LENGTH - 1, first + 1 : first + LENGTH]


def observed_copying(trace: Any, layer: int, head: int, first: int) -> Tensor:
    """What the head adds to the centered logit of the next token of the second copy, at the run's own final scale."""
    network = trace.network.at("head")
    write = trace.on(network)[f"L{layer}H{head}_out"].double()
    norm, final = trace.decoder.norm, trace["final_post"].double()
    scaled = norm.scale(norm.center(write) * torch.rsqrt(norm.center(final).square().mean(-1, keepdim=True) + norm.eps))
    aims = directions(trace.decoder, trace.tokens)[..., :-1].to(scaled)
    places = torch.arange(first + LENGTH, first + 2 * LENGTH - 1)
    return (scaled[:, places] * aims[:, places + 1]).sum(-1)


class Scores:
    """Scores of an induction head, with any earlier heads before its keys."""

    def __init__(self, network: tj.ResidualNetwork, layer: int, head: int, streams: list[str], before: list[str]):
        self.own, self.layer, self.head = f"L{layer}H{head}", layer, head
        paths = [f"{x} > {own}" for x in streams for own in (self.own, *(f"{y} > {self.own}" for y in before))]
        self.reader = HeadReader(network, layer, VocabularyStreams(network, paths))
        self.qk_scores = self.reader.scores(LENGTH - 1)

    def attention(self, tokens: Tensor, stream: str, before: str) -> Tensor:
        """Scores [prompt, query, token before the key]; the last token is no query, and no key's."""
        reads = {"query": f"{stream} > {self.own}", "key": f"{stream} > {before} > {self.own}"}
        reads = {role: path.removeprefix("direct > ") for role, path in reads.items()}
        vectors = self.reader.vectors(tokens[:, :-1].flatten(), [self.head], reads)
        query, key = (
            x[0].view(PROMPTS, LENGTH - 1, -1).double() for x in (vectors.query, self.qk_scores.keys(vectors.key))
        )
        return query @ key.mT

    def copying(self, tokens: Tensor, stream: str) -> Tensor:
        """Log-probability of each token but the first after its own value."""
        paths = {"value": f"{stream} > {self.own}".removeprefix("direct > ")}
        token = tokens[:, 1:].flatten()
        logits = decoded_writes(self.reader, self.head, self.reader.vectors(token, [self.head], paths).value[0])
        found = logits.exact(torch.arange(len(token))).log_softmax(-1)
        return found.gather(1, token[:, None])[:, 0].view(PROMPTS, -1)


def first_places(scores: Tensor) -> float:
    """Share of queries whose best key is the one after the same token."""
    return float((scores.argmax(-1) == torch.arange(scores.shape[1])).double().mean())


def correlation(ours: Tensor, theirs: Tensor) -> str:
    """Rank correlation, and the upper end of the central 95% of shuffles."""
    draw, ours, theirs = np.random.default_rng(0), ours.flatten().numpy(), theirs.flatten().numpy()
    shuffled = [spearmanr(draw.permutation(ours), theirs).statistic for _ in range(SHUFFLES)]
    return f"{spearmanr(ours, theirs).statistic:.2f} (shuffled up to {np.quantile(shuffled, 0.975):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    network = tj.ResidualNetwork(load()).at("sublayer")
    trace, tokens, first = repeated(network, arguments.seed)
    previous = "L{}H{}".format(*PREVIOUS)
    for layer, head in INDUCTION:
        seen = observed_attention(trace, layer, head, first)
        print(
            f"\nL{layer}H{head}: attention {seen.diagonal(dim1=1, dim2=2).mean():.2f}; first {first_places(seen):.3f}"
        )
        others = [f"L{x}H{y}" for x in range(layer) for y in range(network.view.cfg.n_heads)]
        found = Scores(network, layer, head, ["direct", "effective", "mlps"], others)
        for stream in ("direct", "effective", "mlps"):
            scores = found.attention(tokens, stream, previous)
            own = scores.log_softmax(-1).diagonal(dim1=1, dim2=2)
            print(f"{stream}, {previous}: first {first_places(scores):.3f}, attention {own.exp().mean():.2f}", end="; ")
            print(f"attention of tokens {correlation(own, seen.diagonal(dim1=1, dim2=2))}", end="; ")
            copied, raised = found.copying(tokens, stream), observed_copying(trace, layer, head, first)
            print(f"copying {correlation(copied, raised)}", flush=True)
        shares = {name: first_places(found.attention(tokens, "effective", name)) for name in others}
        best = sorted(shares, key=lambda name: -shares[name])[:5]
        print(f"best of {len(others)}, effective: {', '.join(f'{name} {shares[name]:.3f}' for name in best)}")
        print(f"median {np.median(list(shares.values())):.3f}, chance {1 / (LENGTH - 1):.3f}", flush=True)
        for stream in ("effective",):
            every = network.decoder.d_vocab
            table = induction_table(network, PREVIOUS, (layer, head), stream=stream, top_k=10, distance=LENGTH - 1)
            print(table)
            own = induction_table(network, PREVIOUS, (layer, head), top_k=every, distance=LENGTH - 1, columns=[0])
            likely = own.parts["attention"].exp()
            print(
                f"attention among all {every:,}: mean {likely.mean():.2f}, above one half {(likely > 0.5).double().mean():.2f}"
            )


if __name__ == "__main__":
    main()
