"""Every tool on every family that TransformerLens 4 builds from a tiny configuration: right, or refused by name.

Each cell of `docs/pages/supported_models.md` is made here: a tool is called for the first and the last block, and what it gives
is compared with what hooks on the model give, with overwritten streams, or with nested differentiation. A cell is "no" where
the library refuses with a sentence of its own. `python tests/adapters/test_families.py` writes the page's table anew.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
import zoo
from torch import Tensor

import tl_jets as tj
from tl_jets.calculus import frozen, full_precision
from tl_jets.ngrams.trigrams import trigram_parts

PAGE = Path(__file__).parents[2] / "docs" / "pages" / "supported_models.md"
NAMES = {
    "gpt2": "GPT-2",
    "gpt_neo": "GPT-Neo",
    "pythia": "Pythia (GPT-NeoX)",
    "gptj": "GPT-J",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen 2",
    "qwen3": "Qwen 3",
    "olmo": "OLMo",
    "olmo2": "OLMo 2",
    "gemma1": "Gemma 1",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "phi": "Phi",
    "phi3": "Phi-3",
    "opt": "OPT",
    "bloom": "Bloom",
    "cohere": "Cohere",
    "granite": "Granite",
} | {name: name for name in (*zoo.FAMILIES, *zoo.PARTLY)}
READ = ("embed", "resid_pre", "resid_post", "attn_out", "mlp_out", "hook_z", "mlp.hook_out", "attn.hook_out", "pattern")
pytestmark = pytest.mark.skipif(zoo.MAJOR < 4, reason="the page is of TransformerLens 4")


class Reference:
    """A model and what hooks say of it on one input; nothing here is of tl_jets but the precision of the forward pass."""

    def __init__(self, name: str):
        self.spec = zoo.ModelSpec(name, "bridge", "raw")
        self.model = zoo.fresh(self.spec)
        self.tokens = zoo.tokens(self.model, batch=2, pos=6)
        try:
            with torch.no_grad():
                self.model(self.tokens)
        except RuntimeError:  # XGLM fails in float64 within Hugging Face
            self.model = zoo.fresh(self.spec, torch.float32)
        self.tolerance = 1e-9 if self.model.W_U.dtype == torch.float64 else 2e-4
        self.values: dict[str, Tensor] = {}
        self.logits = self.run({}, self.values)
        self.network = tj.ResidualNetwork(self.model)
        self.trace = self.network.trace(self.tokens)

    def run(self, write: dict[str, Any], read: dict[str, Tensor] | None = None, tokens: Tensor | None = None) -> Tensor:
        """Logits of the whole model with hooks that write (tensors, or functions of the value), and what others read."""
        hooks: list = []
        for name, new in write.items():
            hooks.append((name, lambda value, hook, new=new: new(value.clone()) if callable(new) else new))
        if read is not None:
            names = [name for name in self.model.hook_dict if name.endswith(READ) and "rotary" not in name]
            hooks += [(name, functools.partial(_keep, read=read, name=name)) for name in names]
        with torch.no_grad(), full_precision(), self.model.hooks(hooks):
            return self.model(self.tokens if tokens is None else tokens, return_type="logits", use_cache=False)

    @property
    def n_layers(self) -> int:
        return len(self.model.blocks)

    def stream(self, layer: int, kind: str = "pre") -> Tensor:
        return self.values[f"blocks.{layer}.hook_resid_{kind}"]

    def decode(self, stream: Tensor) -> Tensor:
        """Final norm, unembedding and the model's own softcap or scale."""
        with torch.no_grad(), full_precision():
            logits = self.model.unembed(self.model.ln_final(stream))
            return self.model.adapter.apply_output_logits_transform(logits)

    def agree(self, found: Tensor, wanted: Tensor) -> None:
        assert oracles.relative_error(found, wanted) < self.tolerance

    def embed(self) -> Tensor:
        """Every token of the vocabulary alone, in the first stream without positions [token, 1, d_model]."""
        read: dict[str, Tensor] = {}
        self.run({}, read, torch.arange(zoo.D_VOCAB)[:, None])
        positions = read.get("hook_pos_embed") if "pos_embed" in self.network.sources else None
        first = read["blocks.0.hook_resid_pre"]
        return first if positions is None else first - positions


def _keep(value: Tensor, hook: Any, read: dict[str, Tensor], name: str) -> None:
    read[name] = value.detach() if isinstance(value, Tensor) else value


def scale_of(norm: Any, stream: Tensor) -> Callable[[Tensor], Tensor]:
    """A norm's frozen linear part D at a stream, from calls of the module alone: (N(h) - N(0)) / center(h) * center(x)."""
    with torch.no_grad(), full_precision():
        at_zero = norm(torch.zeros_like(stream))
        ignores_mean = torch.allclose(norm(stream + 1), norm(stream), atol=1e-6)
        center = (lambda x: x - x.mean(-1, keepdim=True)) if ignores_mean else (lambda x: x)
        factor = (norm(stream) - at_zero) / center(stream)
    return lambda x: factor * center(x)


def parts(reference: Reference) -> dict[str, Tensor]:
    """Everything that the last stream is the sum of, read off hooks: a block without attention is one write."""
    network, values = reference.network, reference.values
    positions = values["hook_pos_embed"].expand_as(reference.stream(0)) if "pos_embed" in network.sources else None
    first = reference.stream(0)
    found = {"embed": first} if positions is None else {"embed": first - positions, "pos_embed": positions}
    for step in network.steps:
        block = f"blocks.{step.layer}."
        if step.kind == "block":
            found[step.write] = values[block + "hook_resid_post"] - values[block + "hook_resid_pre"]
        else:
            found[step.write] = values[f"{block}hook_{step.kind}_out"]
    return found


# --- the tools ------------------------------------------------------------------------------------------------------


def lenses(reference: Reference, layer: int) -> None:
    """Iterative at order 0: the KL of the logit lens, by hand. Joint at order 0: the mean of the parts' own readings."""
    lens = tj.iterative_jet_lens(reference.model, reference.tokens, order=1, seed=None)
    own = reference.decode(reference.stream(layer)).log_softmax(-1)
    model = reference.logits.log_softmax(-1)
    reference.agree(lens.kl[lens.labels.index(f"{layer}_pre"), 0], (model.exp() * (model - own)).sum(-1))
    joint = tj.joint_jet_lens(reference.model, reference.tokens, granularity="sublayer", weights="uniform", top_k=3)
    terms = parts(reference)
    assert joint.labels == list(terms)
    logits = torch.stack([reference.decode(term) for term in terms.values()]).mean(0)
    if reference.network.decoder.transform is None:  # a softcap is no part of additive logits, a scale is
        reference.agree(joint.full_values, logits.gather(-1, joint.top_ids))


def attribution(reference: Reference, layer: int) -> None:
    """The final norm frozen at the true stream: D x of every part."""
    terms = parts(reference)
    cache = tj.jet_expand(reference.model, "ln_final", centers=list(terms), linearize="detached")(reference.trace)
    linear = scale_of(reference.model.ln_final, reference.stream(reference.n_layers - 1, "post"))
    for index, term in enumerate(terms.values()):
        reference.agree(list(cache.terms.values())[index], linear(term))


def jets(reference: Reference, layer: int, kind: str) -> None:
    """gamma elsewhere is the whole model's with an overwritten stream; its jet is that of nested differentiation."""
    trace, label = reference.trace, f"{layer}_{kind}"
    gamma, stage = trace.gamma(label), reference.network.stage(label)
    center = 0.7 * trace[stage.stream] + 0.3 * trace["embed"].roll(1, 0)
    read: dict[str, Tensor] = {}
    before, where = stage.stream.split("_")
    reference.run({f"blocks.{before}.hook_resid_{where}": center}, read)
    with torch.no_grad():
        reference.agree(gamma(center), read[f"blocks.{layer}.hook_{kind}_out"])
    expansion = tj.jet_expand(reference.model, label, centers=["embed"], order=2)
    cache = expansion(trace)
    term = cache.terms[str(expansion.terms[1 + [step.label for step in stage.steps].index(label)].path)]
    wanted = coefficients(gamma, trace["embed"], trace[stage.stream] - trace["embed"]).sum(0)
    # Bloom's own code rounds a constant of its GELU to eight digits.
    assert oracles.relative_error(term, wanted) < (1e-6 if reference.spec.name == "bloom" else reference.tolerance)


def coefficients(gamma: Callable[[Tensor], Tensor], center: Tensor, direction: Tensor) -> Tensor:
    """c_0, c_1, c_2 by nested differentiation; from values on a segment where the model's own code has no forward derivative."""
    try:
        with full_precision():
            return oracles.nested_jvp_coefficients(gamma, center, direction, 2)
    except RuntimeError:  # Bloom's autograd.Function
        nodes = torch.cos(torch.pi * (torch.arange(24, dtype=torch.float64) + 0.5) / 24)
        with torch.no_grad(), full_precision():
            values = torch.stack([gamma(center + 0.02 * t * direction) for t in nodes])
        powers = nodes[:, None] ** torch.arange(13)
        scaled = torch.linalg.lstsq(powers, values.flatten(1)).solution[:3] / 0.02 ** torch.arange(3)[:, None]
        return scaled.reshape(3, *center.shape)


def edits(reference: Reference, layer: int) -> None:
    """A write put back at its hook changes nothing; taken away there, the stream loses it, whole, with nothing else changed."""
    model, values = reference.model, reference.values
    for kind, other in (("attn", "mlp"), ("mlp", "attn")):
        label, own = f"{layer}_{kind}", reference.trace[f"{layer}_{kind}_out"]
        with torch.no_grad(), full_precision(), model.hooks(tj.interventions.patch_hooks(model, label, own)):
            reference.agree(model(reference.tokens, use_cache=False), reference.logits)
        read: dict[str, Tensor] = {}
        fixed = {name: values[name] for name in (f"blocks.{layer}.hook_{other}_out",)}
        with model.hooks(tj.ablation_hooks(model, label)):
            reference.run(fixed, read)
        reference.agree(read[f"blocks.{layer}.hook_resid_post"], reference.stream(layer, "post") - own)


def heads(reference: Reference, layer: int) -> None:
    """Head 1's write is what hook_z loses when it is set to its value at the zero stream; ablating it does that."""
    label, point = f"L{layer}H1", f"blocks.{layer}.attn.hook_z"
    found = reference.network.at("head").trace(reference.tokens)[f"{label}_out"]
    tj.joint_jet_lens(reference.model, reference.tokens, granularity="head", weights="uniform")
    at_zero: dict[str, Tensor] = {}
    reference.run({f"blocks.{layer}.hook_resid_pre": torch.zeros_like(reference.stream(layer))}, at_zero)
    without: dict[str, Tensor] = {}

    def constant(z: Tensor) -> Tensor:
        z[:, :, 1] = at_zero[point][:, :, 1]
        return z

    logits = reference.run({point: constant}, without)
    reference.agree(found, lost(reference, without, layer, "attn"))
    assert float((logits - reference.logits).abs().max()) > 1e-4
    with torch.no_grad(), full_precision(), reference.model.hooks(tj.ablation_hooks(reference.model, label)):
        reference.agree(reference.model(reference.tokens, use_cache=False), logits)


def neurons(reference: Reference, layer: int) -> None:
    """Neuron 3's write is what the MLP loses when hook_post is set to zero there."""
    found, without = reference.trace[f"L{layer}N3_out"], {}

    def zero(post: Tensor) -> Tensor:
        post[..., 3] = 0
        return post

    logits = reference.run({f"blocks.{layer}.mlp.hook_post": zero}, without)
    reference.agree(found, lost(reference, without, layer, "mlp"))
    with torch.no_grad(), full_precision(), reference.model.hooks(tj.ablation_hooks(reference.model, f"L{layer}N3")):
        reference.agree(reference.model(reference.tokens, use_cache=False), logits)


def lost(reference: Reference, without: dict[str, Tensor], layer: int, which: str) -> Tensor:
    """What a sublayer's write loses; under a norm after it, at the norm's own scale."""
    block = reference.model.blocks[layer]
    post = block._modules.get({"attn": "ln1_post", "mlp": "ln2_post"}[which])
    name = f"blocks.{layer}.hook_{which}_out" if post is None else f"blocks.{layer}.{which}.hook_out"
    change = reference.values[name] - without[name]
    return change if post is None else scale_of(post, reference.values[name])(change)


def detached_map(reference: Reference, layer: int) -> None:
    """Gradients of the model's own forward pass inside `detached`, and J of replays: J x + bias is the last stream."""
    model, tokens, end = reference.model, reference.tokens, reference.n_layers - 1
    J = tj.detached_jacobian(model, tokens, positions=None, wrt="0_pre", ordinary=False)
    point = reference.stream(0).clone().requires_grad_()
    box: list[Tensor] = []
    hooks = [("blocks.0.hook_resid_pre", lambda value, hook: point)]
    hooks += [(f"blocks.{end}.hook_resid_post", lambda value, hook: box.append(value) or None)]
    probe = torch.randn(point.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(point)
    with tj.detached(model), full_precision(), torch.enable_grad(), model.hooks(hooks):
        model(tokens, use_cache=False)
        (gradient,) = torch.autograd.grad(box[-1], point, probe)
    reference.agree(gradient, J.apply_transpose(probe))
    reference.agree(J.apply(point.detach()) + J.bias, reference.stream(end, "post"))


def bigrams(reference: Reference, layer: int) -> None:
    """Every pair by brute force: embeddings, alone, through the decoder."""
    table = tj.jet_bigrams(reference.model, "direct", top_k=5, progress=False)
    score = reference.decode(reference.embed())[:, 0].log_softmax(-1)
    wanted = score.flatten().topk(5)
    reference.agree(table.scores.to(score), wanted.values)


def trigrams(reference: Reference, layer: int) -> None:
    """Attention between two embedded tokens is the model's own pattern on them; what the head writes is decoded by hand."""
    triples = torch.tensor([[5, 9, 3], [17, 4, 40]])
    attention, log_prob = trigram_parts(reference.network, layer, 1, triples, normalize="pair")
    embed = reference.embed()[triples[:, :2], 0]
    read: dict[str, Tensor] = {}
    reference.run({f"blocks.{layer}.hook_resid_pre": embed}, read, triples[:, :2])
    pattern = read[f"blocks.{layer}.attn.hook_pattern"][:, 1, 1, 0].double()
    assert float((attention - pattern.log()).abs().max()) < max(1e-6, reference.tolerance)
    assert bool((log_prob < 0).all())


TOOLS: dict[str, Callable[[Reference, int], None]] = {
    "lenses": lenses,
    "direct attribution": attribution,
    "jets of attention": functools.partial(jets, kind="attn"),
    "jets of MLPs": functools.partial(jets, kind="mlp"),
    "ablation, patching": edits,
    "heads": heads,
    "neurons": neurons,
    "detached map, paths": detached_map,
    "bi-grams": bigrams,
    "skip-trigrams": trigrams,
}


OF_THE_MODEL = {"lenses", "direct attribution", "detached map, paths", "bi-grams"}


def cell(reference: Reference, tool: str) -> str:
    """`yes`, `no`, or `some blocks`: tools that are of one block are called for the first and for the last."""
    found, last_layer = set(), reference.n_layers - 1
    for layer in (last_layer,) if tool in OF_THE_MODEL else (0, last_layer):
        try:
            TOOLS[tool](reference, layer)
        except (NotImplementedError, ValueError) as error:
            last = error.__traceback__
            while last is not None and last.tb_next is not None:
                last = last.tb_next
            if last is None or "tl_jets" not in last.tb_frame.f_code.co_filename:
                raise
            found.add(False)
        else:
            found.add(True)
    return {(True,): "yes", (False,): "no"}.get(tuple(found), "some blocks")


def also_frozen(reference: Reference) -> str:
    """What the frozen forward pass holds beside norm scales, patterns and gates."""
    tape: list[tuple[str, Any]] = []
    point = reference.stream(0).clone().requires_grad_()
    hooks = [("blocks.0.hook_resid_pre", lambda value, hook: point)]
    with frozen(record=tape), torch.enable_grad(), full_precision(), reference.model.hooks(hooks):
        reference.model(reference.tokens, use_cache=False)
    found = ["clamps"] if {name.strip("_") for name, _ in tape} & {"clamp", "clip"} else []
    transform = reference.network.decoder.transform
    x = torch.linspace(-3, 3, zoo.D_VOCAB, dtype=point.dtype)
    if transform is not None and not torch.allclose(transform(2 * x), 2 * transform(x)):
        found.append("output softcap")
    return ", ".join(found)


@functools.cache
def row(name: str) -> str:
    """The line of the page's table for a family."""
    reference = Reference(name)
    cells = [cell(reference, tool) for tool in TOOLS]
    frozen_too = also_frozen(reference) if cells[list(TOOLS).index("detached map, paths")] == "yes" else ""
    return f"| {' | '.join([NAMES[name], *cells, frozen_too])} |"


def header() -> list[str]:
    columns = ["", *TOOLS, "also frozen"]
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]


@pytest.mark.usefixtures("as_users_run_it")  # type checks triple its time
@pytest.mark.parametrize("name", NAMES)
def test_every_tool_is_right_or_refuses_as_the_page_says(name):
    line = row(name)
    if name not in zoo.PARTLY and name not in ("opt", "bloom"):
        assert line.split("|")[2:-3] == [" yes "] * (len(TOOLS) - 1)
    assert line in PAGE.read_text().splitlines(), f"{PAGE.name} is stale; run python tests/adapters/test_families.py"


def test_the_page_has_these_families_and_no_others():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    start = lines.index(header()[0])
    assert lines[start + 1] == header()[1]
    assert [line.split("|")[1].strip() for line in lines[start + 2 : start + 2 + len(NAMES)]] == list(NAMES.values())


if __name__ == "__main__":
    page = PAGE.read_text().splitlines()
    begin = next(i for i, line in enumerate(page) if line.startswith(header()[0][:12]))
    stop = next((i for i in range(begin, len(page)) if not page[i].startswith("|")), len(page))
    found = header()
    for family in sys.argv[1:] or NAMES:
        found.append(row(family))
        print(found[-1], flush=True)
    if not sys.argv[1:]:
        PAGE.write_text("\n".join([*page[:begin], *found, *page[stop:]]) + "\n")
