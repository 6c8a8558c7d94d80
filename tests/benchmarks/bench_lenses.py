"""What the lenses, the weights and the jets cost: GPT-2 small with random weights, 12 layers, 32 tokens."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import zoo
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel

from tl_jets import ResidualNetwork, iterative_jet_lens, joint_jet_lens
from tl_jets.calculus import jet
from tl_jets.core.logit_reader import CHUNK_SIZE
from tl_jets.jets.weights import decoder_weights

N_TOKENS, D_MODEL, D_VOCAB = 32, 768, 50257


@functools.cache
def network() -> ResidualNetwork:
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config()).eval()
    model = TransformerBridge.boot_transformers("gpt2", hf_model=hf, tokenizer=zoo.tokenizer(), device="cpu")
    net = ResidualNetwork(model.eval().requires_grad_(False), "block")
    net.decoder.metric(centered=True)
    return net


@functools.cache
def tokens() -> torch.Tensor:
    return torch.randint(0, D_VOCAB, (1, N_TOKENS), generator=torch.Generator().manual_seed(0))


@functools.cache
def states() -> torch.Tensor:
    return torch.randn(13 * N_TOKENS, D_MODEL)


@torch.no_grad()
def forward() -> None:
    network().view.model(tokens())


@torch.no_grad()
def forward_and_product() -> None:
    forward()
    states() @ network().decoder.W_U


def test_iterative_lens_all_orders_top_k(ratio):
    ratio(lambda: iterative_jet_lens(network(), tokens(), order=3, measures=False), forward_and_product, 1.4)


def test_iterative_lens_every_measure(ratio):
    ratio(lambda: iterative_jet_lens(network(), tokens(), order=3, seed=None), forward_and_product, 1.8)


def test_iterative_lens_every_measure_and_control(ratio):
    ratio(lambda: iterative_jet_lens(network(), tokens(), order=3), forward_and_product, 2.4)


def test_iterative_lens_peak_memory(peak_memory):
    limit = CHUNK_SIZE * D_VOCAB * 4 / 1e6 + 64
    peak_memory(lambda: iterative_jet_lens(network(), tokens(), order=3), limit)


def test_joint_weights_alone(ratio):
    net, trace = network(), network().trace(tokens())
    values = torch.stack([trace[label] for label in net.components])[:, 0].double()
    truth = net.decoder.norm(trace["final_post"][0].double())
    jets = net.decoder.norm(values)
    ratio(lambda: decoder_weights(net, jets, truth, "centered_l2"), forward, 0.25)


def test_joint_lens_with_measures_and_control(ratio):
    ratio(lambda: joint_jet_lens(network(), tokens()), forward, 2.0)


def test_joint_kl_weights(ratio):
    net, trace = network(), network().trace(tokens())
    values = torch.stack([trace[label] for label in net.components])[:, 0]
    jets, truth = net.decoder.norm(values), net.decoder.norm(trace["final_post"][0])
    ratio(lambda: decoder_weights(net, jets, truth, "kl"), forward, 12.0, rounds=5)


def test_metric_once_per_network(ratio):
    ratio(lambda: replace(network().decoder).metric(centered=True), forward, 8.0, rounds=5)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("step", ["5_attn", "5_mlp"])
def test_jet_of_a_sublayer(ratio, step, order):
    trace = network().at("sublayer").trace(tokens())
    gamma, center, variate = trace.gamma(step), trace["2_pre"], trace[trace.network.stage(step).stream]

    @torch.no_grad()
    def forwards() -> None:
        for _ in range(order + 1):
            gamma(variate)

    ratio(lambda: jet(gamma, center, variate, order), forwards, 1.6, rounds=30)
