"""What jets say of a real model: thirty prompts, six questions, every number beside its control.

    python demos/findings.py [QUESTION ...] [--model MODEL] [--prompts FILE] [--every N]

Without MODEL (a local Hugging Face directory, or a model's name) the embedded model is taken; without FILE the thirty prompts of
`findings_prompts.txt`, five of a kind: facts, syntax, code, repetition, counting, other languages. The answer is the model's own
best token after the prompt, BOS is prepended as the model does it, and averages leave out BOS and attention sinks. Intervals are
95% bootstrap intervals over prompts. All draws have seed 0. With SmolLM2-135M a question takes two to
five minutes on one core, paths and ablations with `--every 5` (the first prompt of each kind).

- lenses: is what a layer says, at order 0 and 1, closer to the model than a random vector of its length and angle is?
- paths: how much of the answer do the largest paths hold, how far do paths cancel, does ablation confirm them?
- ablations: which attribution ranks components as zero ablation does?
- mediators: which attribution finds the components through which an ablation acts?
- ngrams: do the bi-grams of the weights follow those of a text, the docstrings of Python's standard library?
- directions: what do the strongest directions of the detached map write and read?
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ngram_studies import count, docstrings
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor
from what_predicts_ablation import rank_correlation

import tl_jets as tj
from tl_jets.core.intervals import bootstrap_interval, median_intervals
from tl_jets.interventions.path_ablations import verdict
from tl_jets.paths.cancellation import CancellationWarning
from tl_jets.pretrained import load_model
from tl_jets.studies import compare_with_counts

PROMPTS = Path(__file__).with_name("findings_prompts.txt")
TOP, ABLATED = (1, 5, 20), 20
# Every so many prompts in the two slowest tables, and the sublayers that are ablated in "mediators".
EVERY = 5
SITES = (0.15, 0.3)


def main() -> None:
    """Print the tables of the chosen questions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", help=f"of {', '.join(QUESTIONS)}; default: all")
    parser.add_argument("--model", help="a local Hugging Face directory, or a model's name; default: the embedded one")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="a file of one prompt a line")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="read only every Nth of the prompts")
    options = parser.parse_args()
    unknown = set(options.questions) - set(QUESTIONS)
    if unknown:
        parser.error(f"questions are {', '.join(QUESTIONS)}; got {', '.join(sorted(unknown))}")
    warnings.simplefilter("ignore", CancellationWarning)  # the table of paths says how much they cancel
    network = tj.ResidualNetwork(tj.load_tinydocs() if options.model is None else load_model(options.model))
    prompts = options.prompts.read_text(encoding="utf-8").splitlines()[:: options.every]
    console = Console(width=130)
    for name in options.questions or QUESTIONS:
        console.print(QUESTIONS[name](network, prompts), "")


def lenses(network: tj.ResidualNetwork, prompts: list[str]) -> Table:
    """KL of orders 0 and 1 less that of the random center, by layer; the borrowed share; ranks of the answer."""
    lens = tj.over_prompts(tj.iterative_jet_lens, network, prompts, order=1, top_k=1)
    assert lens.measures is not None
    assert lens.control is not None
    kept = lens.counted
    prompt_of = kept.nonzero()[:, 0]
    ranks = tj.answer_lens(network, prompts, order=0).trajectories().set_index(["target", "layer"])
    table = _table(
        f"KL less that of a random center, nats: {int(kept.sum())} positions of {len(prompts)} prompts, without sinks",
        "layer", "order 0", "order 1", "borrowed at 1", "answer's rank (0: best)", "of another prompt's answer",
    )  # fmt: skip
    better = {0: 0, 1: 0}
    for i, label in enumerate(lens.labels):
        row = [label]
        for k in (0, 1):
            excess = (lens.measures.kl - lens.control.kl)[i, k][kept].double()
            low, high = bootstrap_interval(excess, units=prompt_of)
            better[k] += high < 0
            row.append(f"{excess.mean():+.2f} [{low:+.2f}, {high:+.2f}]{' *' if high < 0 else ''}")
        row.append(f"{lens.borrowed_share[i, 1][kept].median():.0%}")
        own, other = ranks.loc[("<answer>", label)], ranks.loc[("<other answer>", label)]
        row.append(f"{own.rank_median:,.0f} [{own.rank_low:,.0f}, {own.rank_high:,.0f}]")
        row.append(f"{other.rank_median:,.0f}")
        table.add_row(*row)
    table.caption = (
        f"* the interval lies below 0: order 0 at {better[0]} layers, order 1 at {better[1]} of {len(lens.labels)}"
    )
    return table


def paths(network: tj.ResidualNetwork, prompts: list[str]) -> Table:
    """What the k largest detached paths hold of the answer's logit, how they cancel, and what their ablation says."""
    held: dict[int, list[float]] = {k: [] for k in TOP}
    sizes: dict[int, list[float]] = {k: [] for k in TOP}
    confirmed, chance, ranks, lengths = [], [], [], []
    for prompt in prompts:
        trace = network.trace(prompt)
        found = tj.exponential_expansion(network, linearize="detached", top=max(TOP), rank="effect")(
            trace, positions=-1
        )
        found = found.statistics()
        effects = found.effect[:, 0, 0]
        every = tj.path_lengths(network, trace, positions=-1)
        whole = float(every.effect.sum())
        lengths.append(float(every.cancellation))
        for k in TOP:
            held[k].append(float(effects[:k].sum()) / whole)
            sizes[k].append(float(effects[:k].abs().sum() / effects[:k].sum().abs()))
        chosen = [i for i, label in enumerate(found.labels[:ABLATED]) if label != "ln_final_bias"]
        ablated = tj.path_ablation(network, trace, [found.labels[i] for i in chosen])
        pairs = list(zip(effects[chosen].tolist(), (-ablated.centered[:, 0, 0, 0]).tolist(), strict=True))
        confirmed.append(sum(verdict(*pair) == "confirmed" for pair in pairs) / len(pairs))
        shuffled = [verdict(effect, fall) == "confirmed" for effect, _ in pairs for _, fall in pairs]
        chance.append(sum(shuffled) / len(shuffled))
        ranks.append(float(spearmanr(*zip(*pairs, strict=True))[0]))  # type: ignore[arg-type]
    table = _table(f"Detached paths to the answer, medians of {len(prompts)} prompts", "what", "value")
    for k in TOP:
        table.add_row(f"share of the logit that the {k} largest hold", _median(held[k], ".0%"))
    table.add_row("cancellation of all paths, by length", _median(lengths, ".3g"))
    table.add_row(f"cancellation of the {max(TOP)} largest", _median(sizes[max(TOP)], ".3g"))
    table.add_row(f"of the {ABLATED} largest, confirmed by path ablation (mean)", _mean(confirmed, ".0%"))
    table.add_row("the same with falls shuffled within a prompt (mean)", _mean(chance, ".0%"))
    table.add_row("rank correlation of effect and fall", _median(ranks, "+.2f"))
    return table


def ablations(network: tj.ResidualNetwork, prompts: list[str]) -> Table:
    """Rank correlations of attributions with zero ablations, over the components of a prompt."""
    steps = [step.label for step in network.steps if step.kind in ("attn", "mlp")]
    found: dict[str, list[list[float]]] = {}
    for i, prompt in enumerate(prompts):
        trace = network.trace(prompt)
        known, after = _attributions(network, trace, steps), list(range(1, trace.tokens.shape[1]))
        for column, where in enumerate((after, None)):
            truth: Any = tj.ablation_effect(
                network, trace, steps, ablated_positions=where, order=None if i % EVERY else 2
            )
            falls = -truth.centered[:, 0, 0, 0]
            first = tj.first_order_effects(network, trace, steps, ablated_positions=where)
            predicted = {"gradient x write (order 1)": -first.effect[:, 0, 0, 0], **known}
            if i % EVERY == 0:
                predicted["series of order 2 (every fifth prompt)"] = -truth.series()[:, 0, 0, 0]
            for name, values in predicted.items():
                found.setdefault(name, [[], []])[column].append(rank_correlation(values, falls))
    title = (
        f"Rank correlation with the fall of the answer's logit, {len(steps)} sublayers, mean of {len(prompts)} prompts"
    )
    table = _table(title, "attribution", "zero ablation but at the first position", "at all positions")
    for name, columns in found.items():
        table.add_row(name, *(_mean(values, "+.2f") for values in columns))
    return table


def _attributions(network: tj.ResidualNetwork, trace: tj.Trace, steps: list[str]) -> dict[str, Tensor]:
    """What is said of every step from the clean run alone [step]."""
    sums = tj.path_sums(network, trace, positions=-1)
    direct = tj.joint_jet_lens(network, trace, positions=-1, linearize="detached")
    joint = tj.joint_jet_lens(network, trace, positions=-1)
    writes = [f"{step}_out" for step in steps]
    return {
        "sum of all detached paths": torch.stack([sums.effect[sums.labels.index(step), 0, 0] for step in steps]),
        "direct attribution": torch.stack([direct.effects[direct.labels.index(label), 0, 0, 0] for label in writes]),
        "weight in the joint lens": torch.stack([joint.weights[joint.labels.index(label), 0, 0] for label in writes]),
        "length of the write (control)": torch.stack([trace[label][0, -1].norm() for label in writes]),
    }


def mediators(network: tj.ResidualNetwork, prompts: list[str]) -> Table:
    """Rank correlations of attributions with the effect that components mediate, of an early MLP's ablation."""
    found: dict[str, list[float]] = {}
    layers = sorted({int(share * network.n_layers) for share in SITES})
    chosen = prompts[::EVERY]
    for i, prompt in enumerate(chosen):
        layer = layers[i % len(layers)]
        trace = network.trace(prompt)
        hooks = tj.ablation_hooks(network, f"{layer}_mlp", positions=range(1, trace.tokens.shape[1]))
        flow = tj.flow(network, trace, hooks, check=6)
        assert flow.check is not None
        labels = list(flow.check["component"])
        with network.view.model.hooks(hooks):  # type: ignore[attr-defined]
            other = network.trace(prompt)
        moved = {label: other[label] - trace[label] for label in labels}
        gradients = _gradients(network, trace, labels, int(flow.target_ids))
        true = torch.tensor(flow.check["mediated"].to_numpy())
        index = [flow.labels.index(label) for label in labels]
        predicted = {
            "flow": flow.flow[index, 0, 0, 0],
            "gradient of the clean run x change": torch.stack([(gradients[m] * moved[m]).sum() for m in labels]),
            "direct effect of the change": flow.direct[index, 0, 0, 0],
            "length of the change (control)": torch.stack([moved[m].norm() for m in labels]),
        }
        for name, values in predicted.items():
            found.setdefault(name, []).append(rank_correlation(values.cpu(), true))
    title = f"Rank correlation with path patching: ablation of {' or '.join(f'{n}_mlp' for n in layers)}, {len(chosen)} prompts"
    table = _table(title, "attribution", "mean over prompts")
    for name, values in found.items():
        table.add_row(name, _mean(values, "+.2f"))
    return table


def _gradients(network: tj.ResidualNetwork, trace: tj.Trace, labels: list[str], answer: int) -> dict[str, Tensor]:
    """Gradient of the answer's centered logit at the writes of some sublayers [1, pos, d_model]."""
    model: Any = network.view.model  # type: ignore[attr-defined]
    added = {label: torch.zeros_like(trace[label], requires_grad=True) for label in labels}
    hooks = []
    for label in labels:
        layer, kind, _ = label.split("_")
        hooks.append((f"blocks.{layer}.hook_{kind}_out", lambda write, hook, label=label: write + added[label]))
    with torch.enable_grad(), model.hooks(hooks):
        logits = model(trace.tokens)[0, -1]
        found = torch.autograd.grad(logits[answer] - logits.mean(), list(added.values()))
    return dict(zip(labels, found, strict=True))


def ngrams(network: tj.ResidualNetwork, prompts: list[str]) -> Table:
    """Bi-grams of paths against those of the docstrings of Python's standard library."""
    counts = count(network, docstrings())
    found = compare_with_counts(network, counts, paths=["direct", "0_mlp", "mlps"], progress=False)
    frame = found.summary()
    title = f"The {found.n:,} most frequent of {counts.settings['total']:,} bi-grams of docstrings"
    table = _table(title, *frame.columns)
    for row in frame.itertuples(index=False):
        table.add_row(*map(str, row))
    return table


def directions(network: tj.ResidualNetwork, prompts: list[str]) -> Table:
    """Ranks of the answer in what the four strongest directions write, and what of the prompt they read."""
    maps = [tj.detached_jacobian(network, prompt) for prompt in prompts]
    answers = [int(network.trace(prompt).logits[0, -1].argmax()) for prompt in prompts]  # type: ignore[index]
    errors: list[float] = []
    rows: dict[str, list[float]] = {}
    for i, J in enumerate(maps):
        parts = torch.cat([J.contributions[0, :, 0], J.bias[0]])  # what J makes of each token, and the bias
        errors.append(float((parts.sum(0) - J.value[0, 0]).norm() / J.value.norm()))
        of_output = parts @ J.value[0, 0] / J.value.square().sum()
        rows.setdefault("share of the output from the first token", []).append(float(of_output[0]))
        rows.setdefault("share of the output from the last token", []).append(float(of_output[-2]))
        rows.setdefault("one token in so many (control)", []).append(1 / (len(parts) - 1))
        vectors = J.svd(4)
        other = answers[(i + len(maps) // 2) % len(maps)]
        random = torch.randn(vectors.right.shape, generator=torch.Generator().manual_seed(i), dtype=vectors.right.dtype)
        drawn = torch.cat([J.apply(each[None].to(J.value)) for each in random])
        written, by_chance = (_ranks(network, J, each, [answers[i], other]) for each in (vectors.left, drawn))
        rows.setdefault("best rank (0: best) of the answer in 4 output directions", []).append(written[0])
        rows.setdefault("the same of another prompt's answer (control)", []).append(written[1])
        rows.setdefault("the answer, in J of 4 random inputs (control)", []).append(by_chance[0])
        shares = vectors.right.norm(dim=-1).square()
        rows.setdefault("share of the strongest input direction at one position", []).append(float(shares[0].max()))
        place = shares.argmax(1)
        near = J.decode_right(vectors, 5).indices[torch.arange(4), place]
        own = J.tokens[0, place]
        rows.setdefault("nearest 5 embeddings have the position's own token", []).append(
            float((near == own[:, None]).any(1).double().mean())
        )
        rows.setdefault("nearest 5 embeddings have the next position's token (control)", []).append(
            float((near == J.tokens[0, (place + 1) % J.tokens.shape[1]][:, None]).any(1).double().mean())
        )
    table = _table(
        f"Four strongest directions of the detached map, medians or means of {len(maps)} prompts", "what", "value"
    )
    table.add_row("relative error of J e + bias", f"{max(errors):.0e}, largest")
    table.add_row(
        "the same of the ordinary Jacobian (control)", _median([J.ordinary_error or 0.0 for J in maps], ".2f")
    )
    for name, values in rows.items():
        rank = "rank" in name or "random inputs" in name or "another prompt" in name
        table.add_row(name, _median(values, ",.0f") if rank else _mean(values, ".0%") + " (mean)")
    return table


def _ranks(network: tj.ResidualNetwork, J: Any, states: Tensor, tokens: list[int]) -> list[float]:
    """The best rank (0 is first) of each token over output directions [k, 1, d_model], of either sign."""
    directions = J.directions
    logits = network.decoder.logits(directions.normalized(states[:, 0]), 0.0)
    both = torch.cat([logits, -logits])
    return [float((both > both[:, token, None]).sum(1).min()) for token in tokens]


def _table(title: str, *columns: Any) -> Table:
    """A table of the terminal whose first column is text."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(str(column), justify="right" if i else "left")
    return table


def _mean(values: list[float], form: str) -> str:
    """A mean with its interval over prompts."""
    found = torch.tensor(values, dtype=torch.float64)
    low, high = bootstrap_interval(found)
    return f"{found.mean():{form}} [{low:{form}}, {high:{form}}]"


def _median(values: list[float], form: str) -> str:
    """A median with its interval over prompts."""
    found = torch.tensor(values, dtype=torch.float64)
    low, high = median_intervals(found[None])[:, 0].tolist()
    return f"{found.quantile(0.5):{form}} [{low:{form}}, {high:{form}}]"


QUESTIONS: dict[str, Callable[[tj.ResidualNetwork, list[str]], Table]] = {
    "lenses": lenses,
    "paths": paths,
    "ablations": ablations,
    "mediators": mediators,
    "ngrams": ngrams,
    "directions": directions,
}

if __name__ == "__main__":
    main()
