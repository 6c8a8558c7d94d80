"""What masses, their changes and `search` say of SmolLM2-135M and of the embedded models. Not collected by the default run.

Run as a script: `TL_JETS_SMOLLM2=FOLDER python tests/benchmarks/bench_mass_changes.py`. It prints

- the masses of common phrases by path, with their rank among 41 lists, 40 of them shuffled;
- changes from SmolLM2 to a copy whose twelfth MLP writes nothing: 0 along `direct`, and 1/V along `12_mlp`, are the known answers;
- changes from tinydocs to tinycode;
- of four sets of tokens, the ten neurons of the largest scores, and what their ablation does to the mean centered logit of the set
  (mean size over positions of four prompts), beside ten random neurons of the same layers, five times.
"""

from __future__ import annotations

import os

import torch

import tl_jets as tj
from tl_jets.pretrained import load_model
from tl_jets.studies import mass, mass_change, search

PHRASES = [
    " such as",
    " more than",
    " has been",
    " according to",
    " rather than",
    " as well",
    " United States",
    " New York",
]
PHRASES += [" instead of", " in order", " at least", " due to"]
CITIES = [" Paris", " London", " Berlin", " Tokyo", " Madrid", " Rome"]
SETS = {
    "pronouns": [" he", " she", " him", " her", " his"],
    "numbers": [" two", " three", " four", " five", " six", " seven"],
    "months": [" January", " March", " April", " June", " October", " November"],
    "cities": CITIES,
}
PROSE = [" more than", " such as", " has been", " rather than", " as well", " the", " which", " this", " with"]
CODE = [" isinstance(", "self.", " is None", " not None", " raise ValueError", " else:", " def", " import", " return"]
PROMPTS = [
    "When Mary and John went to the store, John gave a drink to",
    "The first president of the United States was George",
    "In the year of the war there were three of them, and in May it was",
    "She was born in the city of",
]
COLUMNS = ["list", "kind", "size", "first", "mass", "change", "low", "high", "beyond"]
FEW = 10


@torch.no_grad()
def effect(model, tokens, neurons, wanted) -> float:
    """Mean size of the change of the set's mean centered logit if neurons (layer, index) are set to zero."""
    layers: dict[int, list[int]] = {}
    for layer, neuron in neurons:
        layers.setdefault(layer, []).append(neuron)

    def zero(own):
        def hook(x, hook):
            x[..., own] = 0
            return x

        return hook

    def read():
        logits = model(tokens, return_type="logits")[0].double()
        return (logits - logits.mean(-1, keepdim=True))[1:, wanted].mean(-1)

    before = read()
    with model.hooks([(f"blocks.{layer}.mlp.hook_post", zero(own)) for layer, own in layers.items()]):
        after = read()
    return float((after - before).abs().mean())


def causal(model, network) -> None:
    draw = torch.Generator().manual_seed(0)
    size = len(model.blocks[0].mlp.W_out)
    for name, words in SETS.items():
        found = search(network, words, kinds=["neuron"], top_k=FEW, progress=False)
        best = [(int(label[1:].split("N")[0]), int(label.split("N")[1])) for label in found.labels]
        others = [[(layer, int(torch.randint(0, size, (), generator=draw))) for layer, _ in best] for _ in range(5)]
        prompts = [model.to_tokens(prompt) for prompt in PROMPTS]
        own, *random = (
            sum(effect(model, tokens, neurons, found.tokens) for tokens in prompts) / len(prompts)
            for neurons in (best, *others)
        )
        scores = f"|score| {float(found.scores.abs().min()):.2f} to {float(found.scores.abs().max()):.2f}"
        chance = f"chance {float(found.chance.min()):.2f} to {float(found.chance.max()):.2f}"
        spread = f"random neurons {min(random):.3f} to {max(random):.3f}"
        print(f"{name:9} {scores}, {chance}; ablated: {own:.3f}, {spread}; {' '.join(found.labels[:4])}")


def main() -> None:
    torch.set_num_threads(1)
    folder = os.environ["TL_JETS_SMOLLM2"]
    model, copy = load_model(folder), load_model(folder)
    network = tj.ResidualNetwork(model)
    for path in ("direct", "0_mlp", "10_mlp", "20_mlp", "29_mlp", "mlps"):
        print(mass(network, PHRASES, path=path, controls=40))
    with torch.no_grad():
        copy.blocks[12].mlp.W_out.zero_()
    assert not copy.blocks[12].mlp.W_out.any(), "W_out is the weight itself"
    print(f"1/V = {1 / network.decoder.d_vocab:.4g}")
    for path in ("direct", "12_mlp", "mlps"):
        found = mass_change({"model": network, "ablated": copy}, {"phrases": PHRASES, "cities": CITIES}, path=path)
        print(path, found.to_dataframe()[COLUMNS].to_string(index=False, float_format="%.3g"), sep="\n")
    models = {"docs": tj.load_tinydocs(), "code": tj.load_tinycode()}
    for path in ("direct", "mlps"):
        found = mass_change(models, {"prose": PROSE, "code": CODE}, path=path)
        print(path, found.to_dataframe()[COLUMNS].to_string(index=False, float_format="%.3g"), sep="\n")
    causal(model, network)


if __name__ == "__main__":
    main()
