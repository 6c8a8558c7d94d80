"""Circuits of flow, EAP, EAP-IG and random ones of the same size on SmolLM2-135M: how much of a logit difference each recovers.

Run with `TL_JETS_SMOLLM2=FOLDER python tests/benchmarks/bench_flow_circuits.py sublayer` (or `head`, and numbers of some pairs).

Seven pairs of prompts that differ in one word. Edges are between sublayers (or heads, a head's queries, keys and values as
one edge), embedding and `ln_final`. Everything outside a circuit is that of the corrupted run (`circuit_faithfulness`): 1 is
the clean run's logit difference, 0 the corrupted one's. Sizes: numbers of edges and components, and the smallest set of
components that carries 90% of the absolute flow; the embedding is in all sets of components. `error` is the mean of
|1 - recovered|. Seconds are CPU time, of all threads: `OMP_NUM_THREADS=1`.
"""

from __future__ import annotations

import os
import random
import sys
import time
from typing import Any

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

import tl_jets as tj
from tl_jets.circuits.attribution_patching import attribution_patching
from tl_jets.circuits.faithfulness import circuit_faithfulness
from tl_jets.paths.circuit import Circuit

PAIRS = [
    ("The capital of France is", "The capital of Italy is", " Paris", " Rome"),
    ("The capital of Japan is", "The capital of China is", " Tokyo", " Beijing"),
    ("The opposite of hot is", "The opposite of big is", " cold", " small"),
    (
        "When Mary and John went to the store, John gave a drink to",
        "When Mary and John went to the store, Mary gave a drink to",
        " Mary",
        " John",
    ),
    ("The keys to the cabinet", "The key to the cabinet", " are", " is"),
    ("The doctor lost his keys. The nurse said that", "The doctor lost her keys. The nurse said that", " he", " she"),
    (
        "The secret code is zebra. Please remember: the secret code is",
        "The secret code is apple. Please remember: the secret code is",
        " zebra",
        " apple",
    ),
]
# Edges and components of circuits, by granularity.
EDGES, NODES = {"sublayer": [50, 200], "head": [100, 1000]}, {"sublayer": 10, "head": 30}
STEPS, DRAWS = 5, 2


def load(folder: str, granularity: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bridge = TransformerBridge.boot_transformers(folder, hf_model=model, tokenizer=tokenizer, device="cpu")
    return tj.ResidualNetwork(bridge, granularity)


def of_nodes(circuit: Circuit, count: int) -> Circuit:
    """The embedding and the other writers of the largest absolute score over all their readers."""
    total: dict[str, float] = {}
    for writer, _, score in circuit.edges:
        total[writer] = total.get(writer, 0.0) + score
    largest = sorted((w for w in total if w != "embed"), key=lambda w: -abs(total[w]))
    return Circuit.of_edges((writer, "ln_final") for writer in ["embed", *largest[: count - 1]])


def measured(network: Any, number: int) -> list[dict[str, Any]]:
    """Rows of one pair: level, size, circuit, recovered."""
    clean, corrupted, *targets = PAIRS[number]
    runs = [network.trace(text) for text in (clean, corrupted)]
    start = time.process_time()
    found = tj.flow(network, *runs, targets=targets[0], against=targets[1], edges=True)
    seconds = {0: time.process_time() - start}
    for steps in (1, STEPS):
        start = time.process_time()
        theirs = attribution_patching(network, *runs, targets=targets, integration_steps=steps)
        seconds[steps] = time.process_time() - start
    smallest = (
        len(found.to_circuit().edges),
        len(found.edges()),
        len(found.to_circuit(level="node").nodes),
        len(found.labels),
    )
    print(
        f"{number} {clean!r}: {found}\n  {seconds[0]:.1f} s: {seconds[0] / seconds[STEPS]:.2f} times EAP-IG,", end=" "
    )
    print(
        f"{seconds[0] / seconds[1]:.2f} times EAP; 90% of the flow: {smallest[0]:,} of {smallest[1]:,} edges (q, k and v"
    )
    print(f"  apart), {smallest[2]} of {smallest[3]} components", flush=True)
    ours = found.to_circuit(1.0).merged()
    rows: list[dict[str, Any]] = []

    def add(level: Any, name: str, size: Any, circuit: Circuit, **options: Any) -> None:
        """Rows of a circuit, and of those that `circuit_faithfulness` compares it with."""
        options = {"targets": targets, "seed": number, "random": 0, **options}
        table = circuit_faithfulness(network, *runs, circuit, level=level, **options).summary()
        kinds = {"circuit": name, "attribution": "EAP", "random": "random", "nothing": ""}
        for row in table[table["baseline"] == "corrupted"].to_dict("records"):
            own = {"circuit": kinds[row["circuit"]], "recovered": row["recovered"]}
            rows.append({"pair": number, "level": level, "size": size or int(row["k"]), **own})

    add("edge", "flow", None, ours, k=EDGES[network.granularity], random=DRAWS)
    add("edge", f"EAP-IG ({STEPS})", None, theirs, k=EDGES[network.granularity])
    draw, writers = random.Random(number), sorted({writer for writer, _, _ in theirs.edges} - {"embed"})
    fixed = NODES[network.granularity]
    for size, count in ((str(fixed), fixed), ("90%", smallest[2])):
        add("node", "flow", size, of_nodes(ours, count))
        add("node", f"EAP-IG ({STEPS})", size, of_nodes(theirs, count))
        for _ in range(DRAWS):
            drawn = ["embed", *draw.sample(writers, count - 1)]
            add("node", "random", size, Circuit.of_edges((writer, "ln_final") for writer in drawn))
    return rows


if __name__ == "__main__":
    network = load(os.environ["TL_JETS_SMOLLM2"], sys.argv[1])
    rows = [row for number in map(int, sys.argv[2:] or range(len(PAIRS))) for row in measured(network, number)]
    table = pd.DataFrame(rows).query("circuit != ''")
    table = table.groupby(["level", "size", "circuit", "pair"], sort=False)["recovered"].mean().unstack("pair")
    print(table.assign(mean=table.mean(axis=1), error=(1 - table).abs().mean(axis=1)).round(2).to_string())
