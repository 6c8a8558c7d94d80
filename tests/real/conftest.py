"""The model of the real-model tier, twice: as the library reads it, and as Hugging Face runs it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from get_model import MAKER, MODEL
from transformers import AutoModelForCausalLM, AutoTokenizer

import tl_jets as tj
from tl_jets.pretrained import load_model

PROMPTS = [
    "The Eiffel Tower is in the city of",
    "When Mary and John went to the store, John gave a drink to",
    "The capital of Japan is the city of",
]


@pytest.fixture(scope="session")
def folder() -> Path:
    """Where SmolLM2-135M lies; the tier fails without it, and is skipped where nothing can make it."""
    found = Path(os.environ.get("TL_JETS_SMOLLM2", MODEL))
    if not (found / "tokenizer.json").exists():
        if found == MODEL and not MAKER.exists():
            pytest.skip(f"there is no {MAKER} beside this checkout to make SmolLM2 with")
        pytest.fail(f"SmolLM2 is not in {found}: run python tests/real/get_model.py, or set TL_JETS_SMOLLM2")
    return found


@pytest.fixture(scope="session")
def network(folder: Path) -> tj.ResidualNetwork:
    return tj.ResidualNetwork(load_model(str(folder)))


@pytest.fixture(scope="session")
def trace(network: tj.ResidualNetwork) -> Any:
    return network.trace(PROMPTS[0])


@pytest.fixture(scope="session")
def many(network: tj.ResidualNetwork) -> Any:
    return network.trace(PROMPTS)


class Reference:
    """Hugging Face's own model, which the library never sees."""

    def __init__(self, folder: Path):
        self.hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.layers, self.norm = self.hf.model.layers, self.hf.model.norm
        self.W_U = self.hf.lm_head.weight.detach().T.double()
        self.gain, self.eps = self.norm.weight.detach().double(), self.norm.variance_epsilon

    @torch.no_grad()
    def run(self, tokens: torch.Tensor, hooks: Any = ()) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Streams before every block and after the last, and logits, of one row of tokens; all in float64."""
        streams: list[torch.Tensor] = []
        handles = [
            layer.register_forward_pre_hook(lambda _, x: streams.append(x[0][0].double())) for layer in self.layers
        ]
        handles.append(self.norm.register_forward_pre_hook(lambda _, x: streams.append(x[0][0].double())))
        handles += [module.register_forward_hook(hook) for module, hook in hooks]
        try:
            logits = self.hf(tokens).logits[0].double()
        finally:
            for handle in handles:
                handle.remove()
        return streams, logits

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """RMSNorm by hand."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.gain


@pytest.fixture(scope="session")
def reference(folder: Path) -> Reference:
    return Reference(folder)
