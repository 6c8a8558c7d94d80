"""Flow against EAP-IG, conductance, attribution patching and direct attribution; the truth is path patching.

Run as a script: `python tests/benchmarks/bench_flow.py [MODEL ...]`, where a model is `tinydocs`, `stories`, `gpt2` (random
weights; LayerNorm, biases), or the folder of SmolLM2-135M that `tests/real/get_model.py` makes; or `pytest
tests/benchmarks/bench_flow.py`, for the ratio of times alone. It prints the tables of the guide on flow, in Markdown.

A case is a component's write set to zero, at all positions but the first (mild), or at all (hard: an attention sink moves).
Mediators are all components after it. The effect that one mediates is measured from both ends: **restored** (in the ablated
run its write of the clean run), **moved** (in the clean run its write of the ablated run), and their **mean**. Scores are
Spearman's rank correlation and the sum of absolute errors over the sum of absolute true effects. Every method gets the model,
the tokens and the ablation; seconds are CPU time of one thread, methods taking turns in one process. The rivals are written
here, on TransformerLens hooks and autograd; their backward passes end at the ablated component.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from scipy.stats import spearmanr
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import tl_jets as tj
from tl_jets.flows.two_runs import TwoRuns
from tl_jets.pretrained import load_model

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import zoo

EIFFEL, JAPAN = "The Eiffel Tower is in the city of", "The capital of Japan is"
MARY = "When Mary and John went to the store, John gave a drink to"
DOCS = ["This function is available on Unix and", "If the file does not exist, an error is", "Return the number of"]
STORIES = [
    "Once upon a time, there was a little girl named",
    "Lily and her mom went to the",
    "Tim saw a big dog in the",
]
MILD = [
    *[(EIFFEL, name) for name in ("11_mlp", "8_mlp", "5_mlp", "20_mlp", "14_attn")],
    *[(JAPAN, name) for name in ("8_mlp", "11_mlp", "17_attn")],
    *[(MARY, name) for name in ("8_mlp", "4_attn", "17_mlp", "20_attn")],
]
HARD = [
    *[(EIFFEL, name) for name in ("11_mlp", "8_mlp", "5_mlp", "20_mlp", "1_attn")],
    *[(JAPAN, name) for name in ("8_mlp", "11_mlp", "1_attn")],
    *[(MARY, name) for name in ("8_mlp", "11_mlp")],
]
VARIABLE = "The variable foo_barrel is set. Later the function reads foo_bar"
SECRET = "The secret code is zebra lantern. Please remember: the secret code is zebra"
SMALL = ("tinydocs", "stories", "gpt2")
INDUCTION = ["L17H3", "L17H4", "L17H5", "L18H6", "L18H7", "L20H6", "L23H2", "L23H7"]


@dataclass(frozen=True)
class Site:
    """Where a component writes: a hook, and a head's index for heads."""

    label: str
    hook: str
    stage: int
    head: int | None = None

    def of(self, value: Tensor) -> Tensor:
        """The component's part of the hook's value."""
        return value if self.head is None else value[:, :, self.head]


class Case:
    """A component of a model ablated on one prompt, and plain runs of it."""

    found: tj.Flow

    def __init__(self, network: tj.ResidualNetwork, prompt: str, component: str, first: int):
        self.network, self.model = network, network.view.model
        self.tokens = self.model.to_tokens(prompt)
        self.name, self.first = f"{prompt[:16]}…, {component}", first
        every = sites(network)
        self.site = next(site for site in every if site.label == component)
        self.mediators = [site for site in every if site.stage > self.site.stage]
        positions = range(first, self.tokens.shape[1])
        self.hooks = tj.ablation_hooks(network, component, positions=list(positions))  # one: (hook name, edit)
        with torch.no_grad():
            self.answer = int(self.model(self.tokens)[0, -1].argmax())

    def target(self, logits: Tensor) -> Tensor:
        """The centered logit of the clean run's best token, at the last position [batch]."""
        return logits[:, -1, self.answer] - logits[:, -1].mean(-1)

    def run(
        self, dose: float, *, gradients: bool = False, edit: Callable[..., Tensor] | None = None, batch: int = 1
    ) -> Any:
        """Target, writes by hook, and gradients by hook, at a dose of the ablation; `edit(write, hook name)` goes last."""
        writes: dict[str, Tensor] = {}

        def at(write: Tensor, hook: Any, name: str) -> Tensor:
            if name == self.site.hook:
                write = (write + dose * (self.hooks[0][1](write, hook) - write)).requires_grad_(gradients)
            write = write if edit is None else edit(write, name)
            writes[name] = write
            return write

        names = dict.fromkeys([self.site.hook, *(site.hook for site in self.mediators)])
        hooks = [(name, lambda write, hook, name=name: at(write, hook, name)) for name in names]
        with torch.set_grad_enabled(gradients):
            value = self.target(self.model.run_with_hooks(self.tokens.repeat(batch, 1), fwd_hooks=hooks))
        found = torch.autograd.grad(value, list(writes.values())) if gradients else ()
        return value.detach(), {n: w.detach() for n, w in writes.items()}, dict(zip(writes, found, strict=False))

    def products(self, gradients: dict[str, Tensor], changes: dict[str, Tensor]) -> np.ndarray:
        """Gradient times change, by mediator and, last, by the ablated component."""
        every = [*self.mediators, self.site]
        return np.array([float((s.of(gradients[s.hook]) * s.of(changes[s.hook])).sum()) for s in every])

    @cached_property
    def effect(self) -> float:
        """The ablation's effect on the target."""
        return float(self.run(1.0)[0] - self.run(0.0)[0])

    @cached_property
    def truth(self) -> dict[str, np.ndarray]:
        """What each mediator mediates; mediator i is patched in row i of a batch."""

        def patched(dose: float, source: dict[str, Tensor]) -> np.ndarray:
            def edit(write: Tensor, name: str) -> Tensor:
                write = write.clone()
                for row, site in enumerate(self.mediators):
                    if site.hook == name:
                        site.of(write[row : row + 1]).copy_(site.of(source[name]))
                return write

            return self.run(dose, edit=edit, batch=len(self.mediators))[0].double().numpy()

        clean, ablated = self.run(0.0), self.run(1.0)
        restored = float(ablated[0]) - patched(1.0, clean[1])
        moved = patched(0.0, ablated[1]) - float(clean[0])
        return {"restored": restored, "moved": moved, "mean": (restored + moved) / 2}


def sites(network: tj.ResidualNetwork) -> list[Site]:
    """Where each sublayer or head writes."""
    found = []
    for index, stage in enumerate(network.stages):
        for step in stage.steps:
            if step.kind == "head":
                found.append(Site(step.label, f"blocks.{step.layer}.attn.hook_z", index, step.head))
            elif step.kind in ("attn", "mlp"):
                found.append(Site(step.label, f"blocks.{step.layer}.hook_{step.kind}_out", index))
    return found


def flow(case: Case, nodes: Any = "auto") -> np.ndarray:
    """Flow by mediator; the case keeps the result of `"auto"`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*stay open.*")
        found = tj.flow(case.network, case.tokens, case.hooks, nodes=nodes)
    by_label = dict(zip(found.labels, found.flow[:, 0, 0, 0].tolist(), strict=True))
    if nodes == "auto":
        case.found = found
    return np.array([by_label.get(f"{site.label}_out", 0.0) for site in case.mediators])


def eap_ig(case: Case, steps: int = 5) -> np.ndarray:
    """EAP-IG on nodes: the mean gradient along the ablation, times the whole change of the write."""
    clean, ablated = (case.run(dose)[1] for dose in (0.0, 1.0))
    mean = {name: torch.zeros_like(write) for name, write in clean.items()}
    for step in range(steps):
        for name, gradient in case.run((step + 0.5) / steps, gradients=True)[2].items():
            mean[name] += gradient / steps
    return case.products(mean, {name: ablated[name] - clean[name] for name in clean})[:-1]


def conductance(case: Case, steps: int = 5) -> np.ndarray:
    """The integral of gradient times d(write)/dt along the ablation: midpoints, and the change of the write in each cell."""
    before, total = case.run(0.0)[1], np.zeros(len(case.mediators) + 1)
    for step in range(steps):
        gradients = case.run((step + 0.5) / steps, gradients=True)[2]
        after = case.run((step + 1) / steps)[1]
        total += case.products(gradients, {name: after[name] - before[name] for name in after})
        before = after
    return total[:-1]


def attribution_patching(case: Case) -> np.ndarray:
    """The gradient of the clean run, times the change."""
    _, clean, gradients = case.run(0.0, gradients=True)
    ablated = case.run(1.0)[1]
    return case.products(gradients, {name: ablated[name] - clean[name] for name in clean})[:-1]


def direct_attribution(case: Case) -> np.ndarray:
    """What the change of the write adds to the target through the clean run's final norm, with its scale constant."""
    clean, last = case.network.trace(case.tokens), f"blocks.{case.network.n_layers - 1}.hook_resid_post"
    stream = clean["final_post"].clone().requires_grad_(True)
    with tj.detached(case.network), torch.enable_grad():
        value = case.target(case.model.run_with_hooks(case.tokens, fwd_hooks=[(last, lambda write, hook: stream)]))
        gradient = torch.autograd.grad(value, stream)[0]
    with case.model.hooks(fwd_hooks=case.hooks):
        ablated = case.network.trace(case.tokens)
        after = [ablated[f"{site.label}_out"] for site in case.mediators]
    before = [clean[f"{site.label}_out"] for site in case.mediators]
    return np.array([float((gradient * (b - a)).sum()) for a, b in zip(before, after, strict=True)])


def length_of_change(case: Case) -> np.ndarray:
    """The control: how far the write moves, whatever the target is."""
    clean, ablated = (case.run(dose)[1] for dose in (0.0, 1.0))
    return np.array(
        [float((site.of(ablated[site.hook]) - site.of(clean[site.hook])).norm()) for site in case.mediators]
    )


METHODS: dict[str, Callable[[Case], np.ndarray]] = {
    "flow": flow,
    "flow, K = 1": lambda case: flow(case, 1),
    "flow, K = 3": lambda case: flow(case, 3),
    "EAP-IG, 5 steps": eap_ig,
    "conductance, 5 steps": conductance,
    "attribution patching": attribution_patching,
    "direct attribution": direct_attribution,
    "length of the change (control)": length_of_change,
}
RIVAL = "EAP-IG, 5 steps"
# A part of a flow's time: both traced passes, and the hooked one that repeats the intervention.
RUNS = "the runs of a flow alone"


def score(found: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Rank correlation, and relative L1 error."""
    return float(spearmanr(found, true)[0]), float(np.abs(found - true).sum() / np.abs(true).sum())


def measured(cases: list[Case], rounds: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every case with its flow's certificate; every method in every case with scores and the median of its seconds."""
    certificates, scores = [], []
    flow(cases[0])  # what is checked once a model is not counted
    for case in cases:
        values, seconds = {}, {name: [] for name in [*METHODS, RUNS]}
        for _ in range(rounds):
            for name, method in METHODS.items():
                start = time.process_time()
                values[name] = method(case)
                seconds[name].append(time.process_time() - start)
            start = time.process_time()
            TwoRuns(case.network, case.network.trace(case.tokens), case.hooks)
            seconds[RUNS].append(time.process_time() - start)
        found = case.found
        row = {"case": case.name, "mediators": len(case.mediators), "effect": case.effect}
        row |= {"sum": float(found.edit.sum()), "gap": float(found.gap_share), "closed": bool(found.closed)}
        certificates.append(row | {"passes": found.passes, "most nodes": max(found.nodes)})
        for name in METHODS:
            row = {"method": name, "case": case.name, "seconds": float(np.median(seconds[name]))}
            for kind, true in case.truth.items():
                row[f"{kind} rho"], row[f"{kind} L1"] = score(values[name], true)
            scores.append(row)
        scores.append({"method": RUNS, "case": case.name, "seconds": float(np.median(seconds[RUNS]))})
        print(certificates[-1], *scores[-len(METHODS) - 1 :], sep="\n", file=sys.stderr, flush=True)
    return pd.DataFrame(certificates), pd.DataFrame(scores)


def print_tables(title: str, cases: list[Case], rounds: int) -> None:
    """Certificates case by case, and means over the cases of every method."""
    certificates, scores = measured(cases, rounds)
    closed, below = certificates["closed"].sum(), (certificates["gap"] < 0.05).sum()
    print(
        f"\n\n**{title}**: {closed} of {len(cases)} closed below 1%, {below} below 5%; "
        f"{certificates['passes'].median():.1f} passes (median), {certificates['passes'].max():.1f} (most)\n"
    )
    print("| case | mediators | effect | sum of flow | gap | passes | most nodes |\n|---|---|---|---|---|---|---|")
    for row in certificates.to_dict("records"):
        print(
            f"| `{row['case']}` | {row['mediators']} | {row['effect']:.4f} | {row['sum']:.4f} | {row['gap']:.2%} | "
            f"{row['passes']:.1f} | {row['most nodes']} |"
        )
    means = scores.drop(columns="case").groupby("method", sort=False).mean()
    print(
        "\n| Spearman / relative L1 error against | mean of both | restored | moved | seconds a case | times EAP-IG |"
    )
    print("|---|---|---|---|---|---|")
    for name, row in means.iterrows():
        kinds = ("mean", "restored", "moved")
        cells = ["" if name == RUNS else f"{row[f'{kind} rho']:.3f} / {row[f'{kind} L1']:.2f}" for kind in kinds]
        print(
            f"| {name} | {' | '.join(cells)} | {row['seconds']:.3f} | {row['seconds'] / means['seconds'][RIVAL]:.2f} |"
        )


def random_gpt2() -> TransformerBridge:
    """A GPT-2 of 6 layers with random weights, gains and biases, and the embedded model's tokenizer."""
    config = transformers.GPT2Config(
        vocab_size=4096, n_positions=64, n_embd=96, n_layer=6, n_head=4, attn_implementation="eager"
    )
    hf = transformers.GPT2LMHeadModel(config)
    hf.config.architectures = ["GPT2LMHeadModel"]
    zoo.randomize(hf, 0)
    tokenizer = tj.load_tinydocs().tokenizer
    return TransformerBridge.boot_transformers("random-gpt2", hf_model=hf.eval(), tokenizer=tokenizer, device="cpu")


def small_cases(network: tj.ResidualNetwork, prompts: list[str], first: int, count: int = 12) -> list[Case]:
    """Heads and MLPs of the first half of the layers, drawn at random (seed 0), on each of the prompts in turn."""
    early = [site.label for site in sites(network) if site.stage < len(network.stages) // 2]
    drawn = np.random.default_rng(0).permutation(early).tolist()
    return [Case(network, prompts[i % len(prompts)], drawn[i % len(drawn)], first) for i in range(count)]


def network_of(name: str) -> tj.ResidualNetwork:
    """The model of a name or a folder: sublayers of SmolLM2, heads and MLPs of the small ones."""
    loaders: dict[str, Callable[[], Any]] = {"tinydocs": tj.load_tinydocs, "gpt2": random_gpt2}
    loaders["stories"] = lambda: zoo.load_stories("bridge")
    is_small = name in loaders
    model = loaders[name]() if is_small else load_model(name)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return tj.ResidualNetwork(model, "head" if is_small else "sublayer")


def cases_of(name: str, network: tj.ResidualNetwork, first: int) -> list[Case]:
    """The mild cases (first = 1) or the hard ones (first = 0) of a model."""
    if name in SMALL:
        return small_cases(network, STORIES if name == "stories" else DOCS, first)
    return [Case(network, prompt, component, first) for prompt, component in (MILD if first else HARD)]


def print_joint(name: str, network: tj.ResidualNetwork) -> None:
    """Joint flow of heads: the induction heads of SmolLM2 (the last prompt repeats nothing), random ones of the small models."""
    heads = [step.label for step in network.at("head").steps if step.kind == "head"]
    drawn, prompts = np.random.default_rng(0).permutation(heads)[:4].tolist(), STORIES if name == "stories" else DOCS
    if name not in SMALL:
        drawn, prompts = INDUCTION, [VARIABLE, SECRET, EIFFEL]
    print(
        f"\n| {', '.join(drawn)} | joint effect | sum of shares | error | nodes | one by one | gradient | random sets, largest |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for prompt in prompts:
        found = tj.joint_flow(network, prompt, drawn)
        error, control = abs(float(found.gap / found.effect)), float(found.control.abs().max())
        sums = [float(values.sum()) for values in (found.effect, found.share)]
        others = [float(values.sum()) for values in (found.single, found.gradient)]
        print(
            f"| `{prompt}` | {sums[0]:.3f} | {sums[1]:.3f} | {error:.1e} | {found.nodes} | "
            f"{others[0]:.3f} | {others[1]:.3f} | {control:.3f} |",
            flush=True,
        )
        print(found.to_dataframe()[["component", "share", "single", "gradient"]].round(2).to_string(), file=sys.stderr)


def test_flow_against_eap_ig(ratio: Callable[..., None]) -> None:
    """One mild case of the embedded model; the goal is half of EAP-IG's time."""
    case = small_cases(network_of("tinydocs"), DOCS, 1)[0]
    ratio(lambda: flow(case), lambda: eap_ig(case), 0.5)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(SMALL))
    parser.add_argument("--rounds", type=int, default=3, help="times that every method is timed in a case")
    parser.add_argument("--cases", type=int, default=None, help="only the first so many of each table")
    parser.add_argument("--only", choices=["mild", "hard", "joint"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.models:
        network = network_of(name)
        for kind, first in (("mild", 1), ("hard", 0)):
            if arguments.only in (None, kind):
                cases = cases_of(name, network, first)[: arguments.cases]
                where = "the first position kept" if first else "all positions"
                print_tables(f"{name}, {kind} ({where})", cases, arguments.rounds)
        if arguments.only in (None, "joint"):
            print_joint(name, network)


if __name__ == "__main__":
    main()
