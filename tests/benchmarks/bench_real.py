"""What a user waits for on SmolLM2-135M (30 layers), against what they would use instead.

Run as a script: `python tests/benchmarks/bench_real.py FOLDER [--jobs NAME ...] [--rounds N]`, with the folder that
`tests/real/get_model.py` makes. It prints the table of the documentation's page on costs, in Markdown: CPU seconds of one thread,
medians over rounds in which job and baseline take turns, and the ratio of the two beside its goal. The baselines are written here,
in plain PyTorch and TransformerLens.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

import tl_jets as tj

PROMPT = "The Eiffel Tower is in the city of"
LOADING = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformer_lens.model_bridge import TransformerBridge
hf, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
TransformerBridge.boot_transformers(sys.argv[1], hf_model=hf, tokenizer=tokenizer, device="cpu")
"""


@dataclass(frozen=True)
class Job:
    """A call of the library, what is used instead, and the goal for the ratio of their times."""

    name: str
    against: str
    goal: float
    run: Callable[[], Any]
    baseline: Callable[[], Any]


class Models:
    """The model as TransformerLens and as Hugging Face have it."""

    def __init__(self, folder: str):
        self.folder = folder
        self.hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval().requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = TransformerBridge.boot_transformers(folder, hf_model=self.hf, tokenizer=tokenizer, device="cpu")
        self.network = tj.ResidualNetwork(self.model)
        self.W_U = self.hf.lm_head.weight.detach().T

    def tokens(self, count: int) -> Tensor:
        """The prompt, repeated to a number of tokens [1, count]."""
        ids = self.model.to_tokens(PROMPT, prepend_bos=False)
        return ids.repeat(1, -(-count // ids.shape[1]))[:, :count]

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        """TransformerLens' forward pass."""
        return self.model(tokens)

    @torch.no_grad()
    def cached_forward(self, tokens: Tensor) -> Any:
        """TransformerLens' forward pass with all activations."""
        return self.model.run_with_cache(tokens)[1]

    def detached_stream(self, tokens: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """The last position's final stream as a function of the embeddings, by hand, with norms, patterns and gates constant."""
        inner, length = self.hf.model, tokens.shape[1]
        embeddings = inner.embed_tokens(tokens)[0].detach()
        angles = inner.rotary_emb(embeddings[None], torch.arange(length)[None])
        cos, sin = (each[0, None] for each in angles)
        above = torch.ones(length, length, dtype=torch.bool).triu(1)

        def norm(layer: Any, x: Tensor) -> Tensor:
            return layer.weight * x * (x.pow(2).mean(-1, keepdim=True) + layer.variance_epsilon).rsqrt().detach()

        def heads(weight: Tensor, x: Tensor) -> Tensor:
            return (x @ weight.T).unflatten(-1, (-1, 64)).transpose(0, 1)

        def rotated(x: Tensor) -> Tensor:
            half = x.shape[-1] // 2
            return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

        def of(stream: Tensor) -> Tensor:
            for layer in inner.layers:
                attn, mlp, x = layer.self_attn, layer.mlp, norm(layer.input_layernorm, stream)
                q = rotated(heads(attn.q_proj.weight, x.detach()))
                k = rotated(heads(attn.k_proj.weight, x.detach())).repeat_interleave(3, 0)
                scores = (q @ k.mT / 8).masked_fill(above, -torch.inf)
                z = scores.softmax(-1) @ heads(attn.v_proj.weight, x).repeat_interleave(3, 0)
                stream = stream + z.transpose(0, 1).flatten(1) @ attn.o_proj.weight.T
                x = norm(layer.post_attention_layernorm, stream)
                gate = torch.nn.functional.silu(x @ mlp.gate_proj.weight.T).detach()
                stream = stream + (gate * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
            return stream[-1]

        return of, embeddings

    def dense_jacobian(self, tokens: Tensor) -> Tensor:
        """All of the detached map [d_model, pos, d_model] by PyTorch's vectorized Jacobian of `detached_stream`."""
        return torch.autograd.functional.jacobian(*self.detached_stream(tokens), vectorize=True)

    def many_forwards(self, tokens: Tensor, count: int) -> None:
        """One forward pass an intervention, as patching by hand runs them."""
        for _ in range(count):
            self.forward(tokens)


def lens_jobs(models: Models) -> Iterator[Job]:
    """Lenses and direct attribution."""
    network, twelve, forty_eight, long = models.network, models.tokens(12), models.tokens(48), models.tokens(1024)
    heads = network.at("head")
    states = torch.randn(31 * 48, models.W_U.shape[0], generator=torch.Generator().manual_seed(0))
    yield Job(
        "default lens of a bare model, 12 tokens, second time",
        "of a kept network",
        1.1,
        lambda: tj.iterative_jet_lens(models.model, twelve),
        lambda: tj.iterative_jet_lens(network, twelve),
    )
    yield Job(
        "lens, order 3, all measures and control, 48 tokens",
        "product of all its streams with W_U",
        2.0,
        lambda: tj.iterative_jet_lens(network, forty_eight, order=3),
        lambda: states @ models.W_U,
    )
    yield Job(
        "direct attribution by head, one of 1,024 positions",
        "forward pass",
        1.05,
        lambda: tj.joint_jet_lens(heads, long, linearize="detached", positions=-1),
        lambda: models.forward(long),
    )


def detached_jobs(models: Models) -> Iterator[Job]:
    """The detached map."""
    network, six, ten = models.network, models.tokens(6), models.tokens(10)
    found = tj.detached_jacobian(network, six, ordinary=False).materialize()[0, 0]
    torch.testing.assert_close(found, models.dense_jacobian(six), rtol=1e-3, atol=1e-3)
    yield Job(
        "all of the detached map, 6 tokens",
        "vectorized Jacobian",
        0.8,
        lambda: tj.detached_jacobian(network, six, ordinary=False).materialize(),
        lambda: models.dense_jacobian(six),
    )
    yield Job(
        "`svd(4)` of the detached map, 6 tokens",
        "vectorized Jacobian and its SVD",
        0.5,
        lambda: tj.detached_jacobian(network, six, ordinary=False).svd(4),
        lambda: torch.linalg.svd(models.dense_jacobian(six).flatten(1), full_matrices=False),
    )
    yield Job(
        "`detached_spectra`, 91 maps, 10 tokens",
        "one vectorized Jacobian",
        5.0,
        lambda: tj.detached_spectra(network, ten),
        lambda: models.dense_jacobian(ten),
    )


def expansion_jobs(models: Models) -> Iterator[Job]:
    """Jets of a component against PyTorch's own derivatives of it."""
    network, tokens = models.network, models.tokens(12)
    labels = ["embed", *(f"{layer}_mlp_out" for layer in range(0, 20, 5))]
    mlp, norm = models.hf.model.layers[20].mlp, models.hf.model.layers[20].post_attention_layernorm

    def gamma(x: Tensor) -> Tensor:
        return mlp(norm(x))

    @torch.no_grad()
    def by_hand(order: int) -> list[Tensor]:
        cache = models.cached_forward(tokens)
        variate = cache["blocks.20.hook_resid_mid"]
        centers = [cache["hook_embed"], *(cache[f"blocks.{layer}.hook_mlp_out"] for layer in range(0, 20, 5))]
        if order == 0:
            return [gamma(center) for center in centers]
        return [sum(torch.func.jvp(gamma, (center,), (variate - center,))) for center in centers]  # pyright: ignore

    for order in (0, 1):
        yield Job(
            f"`jet_expand` of an MLP at 5 centers, k = {order}, 12 tokens",
            "forward pass with a cache and the MLP at each" if order == 0 else "the same with `torch.func.jvp`",
            1.0,
            lambda order=order: tj.jet_expand(network, "20_mlp", centers=labels, order=order)(tokens),
            lambda order=order: by_hand(order),
        )


def ablation_jobs(models: Models) -> Iterator[Job]:
    """Ablations against one forward pass for each."""
    network, tokens = models.network, models.tokens(12)
    paths = [f"embed > {layer}_mlp > {layer + 2}_attn > {layer + 9}_mlp > ln_final" for layer in range(10)]
    yield Job(
        "`path_ablation` of 10 paths, 12 tokens",
        "10 forward passes",
        0.5,
        lambda: tj.path_ablation(network, tokens, paths),
        lambda: models.many_forwards(tokens, 10),
    )
    yield Job(
        "`ablation_effect` of 60 steps, 12 tokens",
        "60 forward passes",
        0.5,
        lambda: tj.ablation_effect(network, tokens),
        lambda: models.many_forwards(tokens, 60),
    )


def command_jobs(models: Models) -> Iterator[Job]:
    """The command, in a process of its own."""
    script = "import sys; from tl_jets.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "lens", "--prompt", PROMPT, "--model", models.folder]
    yield Job(
        "`tl-jets lens`",
        "a process that loads the model",
        1.2,
        lambda: subprocess.run(command, check=True, capture_output=True),
        lambda: subprocess.run([sys.executable, "-c", LOADING, models.folder], check=True, capture_output=True),
    )


JOBS = {
    "lens": lens_jobs,
    "detached": detached_jobs,
    "expand": expansion_jobs,
    "ablation": ablation_jobs,
    "command": command_jobs,
}


def cpu_seconds(function: Callable[[], Any]) -> float:
    """CPU time of one call, that of processes that it starts included."""

    def now() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    start = now()
    function()
    return now() - start


def measured(job: Job, rounds: int) -> str:
    """One row of the table; the first call of both is not counted."""
    times: dict[str, list[float]] = {"run": [], "baseline": []}
    for round_ in range(rounds + 1):
        for name, found in times.items():
            seconds = cpu_seconds(getattr(job, name))
            if round_:
                found.append(seconds)
    run, baseline = (statistics.median(found) for found in times.values())
    return f"| {job.name} | {run:.2f} | {job.against} | {baseline:.2f} | {run / baseline:.2f} | {job.goal:.2f} |"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="SmolLM2-135M, made by tests/real/get_model.py")
    parser.add_argument("--jobs", nargs="*", choices=JOBS, default=list(JOBS))
    parser.add_argument("--only", default="", help="rows whose name has this text")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = Models(arguments.folder)
    print("| job | seconds | against | seconds | ratio | goal |\n|---|---|---|---|---|---|", flush=True)
    for name in arguments.jobs:
        for job in JOBS[name](models):
            if arguments.only in job.name:
                print(measured(job, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
