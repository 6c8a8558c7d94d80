"""The detached map: all of it against PyTorch's Jacobian of the same model, and its truncated SVD against its size in memory.

Run with `pytest tests/benchmarks/bench_detached.py`: about two minutes on two cores.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from live_memory import peak_bytes
from overwritten import first_stream
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tl_jets import ResidualNetwork, detached_jacobian

PROMPT = "Once upon a time, there was a little girl named Lily. She loved to play"
D_MODEL, N_LAYERS, N_TOKENS, K = 2048, 4, 400, 8
M_MMAP_THRESHOLD = -3  # of malloc.h

# All of J: the last position's logits with respect to the first stream ----------------------------------------------


@functools.cache
def stories() -> tuple[ResidualNetwork, Tensor]:
    network = ResidualNetwork(zoo.load_stories("bridge"))
    return network, network.trace(PROMPT).tokens


def all_of_it() -> Tensor:
    """From the tokens on: trace, graph, bias, check, matrix."""
    network, tokens = stories()
    return detached_jacobian(network, tokens, output="logits", wrt="0_pre", ordinary=False).materialize()


def of_pytorch(vectorize: bool) -> Tensor:
    """The ordinary Jacobian of the model's own forward pass, which has the same shape."""
    network, tokens = stories()
    model = network.view.model
    with torch.no_grad():
        stream = first_stream(model, tokens)[1]
    last = lambda x: first_stream(model, tokens, x)[0][:, -1]  # noqa: E731
    return torch.autograd.functional.jacobian(last, stream, vectorize=vectorize)


needs_stories = pytest.mark.skipif(zoo.STORIES is None, reason="stories260K is not beside this checkout")


@needs_stories
def test_the_whole_map_against_pytorchs_jacobian(ratio):
    network, tokens = stories()
    ordinary = detached_jacobian(network, tokens, output="logits", wrt="0_pre").ordinary
    assert ordinary is not None
    torch.testing.assert_close(ordinary.materialize()[:, 0], of_pytorch(False)[:, :, 0], rtol=1e-3, atol=1e-4)
    ratio(all_of_it, lambda: of_pytorch(False), 0.1, rounds=3)


@needs_stories
def test_the_whole_map_against_pytorchs_vectorized_jacobian(ratio):
    ratio(all_of_it, lambda: of_pytorch(True), 1.0, rounds=5)


# Some of J: a truncated SVD of a map that is not held ---------------------------------------------------------------


@functools.cache
def wide() -> ResidualNetwork:
    """Llama's architecture, 4 layers of d_model 2048, random weights whose writes lie in few directions, as trained ones do."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=D_MODEL,
        intermediate_size=D_MODEL,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=N_TOKENS,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        hf.config.architectures = [type(hf).__name__]
        decay = 20 * torch.arange(1, D_MODEL + 1).pow(-1.0)[:, None]
        with torch.no_grad():
            for layer in hf.model.layers:
                layer.self_attn.o_proj.weight *= decay
                layer.mlp.down_proj.weight *= decay
    model = TransformerBridge.boot_transformers("tiny", hf_model=hf, tokenizer=zoo.tokenizer(), device="cpu")
    return ResidualNetwork(model.eval().requires_grad_(False))


class Resident:
    """The largest resident size of the process while the block runs, less that before, in bytes.

    The C library is asked to give freed blocks of a megabyte back at once, so that what it keeps is not counted.
    """

    def __enter__(self) -> Resident:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
        self.before, self.peak, self.done = self.now(), 0, threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.done.set()
        self.watcher.join()

    def watch(self) -> None:
        while not self.done.wait(0.001):
            self.peak = max(self.peak, self.now() - self.before)

    @staticmethod
    def now() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_memory_of_a_truncated_svd(capsys):
    """The last position's stream with respect to 400 embeddings, each of 2048 numbers: the matrix would take 6.25 GiB."""
    network = wide()
    tokens = torch.randint(3, 64, (1, N_TOKENS), generator=torch.Generator().manual_seed(0))
    size = D_MODEL * N_TOKENS * D_MODEL * 4

    def svd() -> Any:
        J = detached_jacobian(network, tokens, output="final_post", ordinary=False)
        assert J.map.n_bytes == size
        return J, J.svd(K)

    detached_jacobian(network, tokens[:, :8], ordinary=False).svd(1)  # what is loaded on first use
    start = time.perf_counter()
    with Resident() as resident:
        box: list[Any] = []
        live = peak_bytes(lambda: box.append(svd()))
    J, found = box[0]
    seconds = time.perf_counter() - start
    residual = J.apply_transpose(found.left[:, None]) - found.values.view(-1, 1, 1, 1) * found.right[:, None]
    error = float(residual.norm() / found.values.norm())
    with capsys.disabled():
        print(
            f"\n{found}: J'u = s v to {error:.1e}, {seconds:.0f} s; J {size / 1e6:.0f} MB, tensors alive {live / 1e6:.0f} MB "
            f"({size / live:.0f}x below), process {resident.peak / 1e6:.0f} MB more ({size / resident.peak:.0f}x below)"
        )
    assert error < 1e-5
    assert size / live > 20
