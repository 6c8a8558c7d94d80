"""What a user passes as input: every kind gives the ids and the mask of each prompt alone, or is refused by what it is."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import zoo

import tl_jets as tj
from tl_jets.adapters.inputs import _infer_padding

SPECS = [spec for spec in zoo.available(["gpt2", "llama"]) if spec.processing == "raw"]
PROMPTS = ["w5 w17 w8 w30", "w9", "w11 w40 w3"]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


def build(spec) -> Any:
    """Float32: in float64 the checkpoints' own masks give NaN behind left padding."""
    return zoo.build(spec, torch.float32)


def alone(net: tj.ResidualNetwork) -> torch.Tensor:
    """KL of every real token, prompt by prompt [layer, order, token]."""
    lenses = [tj.iterative_jet_lens(net, prompt) for prompt in PROMPTS]
    return torch.cat([lens.measures.kl[:, :, 0] for lens in lenses], dim=-1)


def _finite(values: torch.Tensor) -> torch.Tensor:
    return values[:, :, torch.isfinite(values[-1, 0])]


# Padding


@each_spec
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_to_tokens_is_not_counted(spec, side):
    model = build(spec)
    net = tj.ResidualNetwork(model)
    tokens = model.to_tokens(PROMPTS, padding_side=side)
    counts = "4 leading and 0" if side == "left" else "0 leading and 4"
    with pytest.warns(
        UserWarning, match=rf"\(id 2\), which is also EOS: {counts} trailing .*, 0 for real. Pass attention_mask="
    ):
        lens = tj.iterative_jet_lens(net, tokens)
    torch.testing.assert_close(_finite(lens.measures.kl), alone(net), rtol=1e-4, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        every = tj.iterative_jet_lens(net, tokens, attention_mask=torch.ones_like(tokens))
    assert torch.isfinite(every.measures.kl).all()


BOS, EOS, PAD = 1, 2, 0
# pad, bos, eos; rows; which are real; whether it is said
CASES: dict[str, tuple[tuple[int, int, int], list[list[int]], list[list[int]], bool]] = {
    "a pad token of its own, right": ((0, 1, 2), [[5, 6, 0, 0], [5, 6, 7, 0]], [[1, 1, 0, 0], [1, 1, 1, 0]], False),
    "a pad token of its own, left": ((0, 1, 2), [[0, 0, 1, 6], [0, 1, 7, 8]], [[0, 0, 1, 1], [0, 1, 1, 1]], False),
    "in the middle": ((0, 1, 2), [[5, 0, 0, 6]], [[1, 1, 1, 1]], False),
    "EOS at every end": ((2, 1, 2), [[1, 5, 6, 2], [1, 5, 2, 2]], [[1, 1, 1, 1], [1, 1, 1, 0]], True),
    "one EOS": ((2, 1, 2), [[1, 5, 6, 2]], [[1, 1, 1, 1]], False),
    "one EOS, one not": ((2, 1, 2), [[1, 5, 6, 2], [1, 5, 6, 7]], [[1, 1, 1, 0], [1, 1, 1, 1]], True),
    "EOS, left": ((2, 1, 2), [[2, 2, 1, 6], [1, 5, 6, 7]], [[0, 0, 1, 1], [1, 1, 1, 1]], True),
    "BOS is pad, right": ((2, 2, 2), [[2, 5, 2, 2], [2, 5, 6, 7]], [[1, 1, 0, 0], [1, 1, 1, 1]], True),
    "BOS is pad, left": ((2, 2, 2), [[2, 2, 2, 5], [2, 5, 6, 7]], [[0, 0, 1, 1], [1, 1, 1, 1]], True),
    "BOS is pad, no padding": ((2, 2, 2), [[2, 5, 6], [2, 7, 8]], [[1, 1, 1], [1, 1, 1]], False),
    "BOS is pad, left without BOS": ((2, 2, 2), [[2, 2, 5, 6], [3, 5, 6, 7]], [[0, 0, 1, 1], [1, 1, 1, 1]], True),
    "a lone BOS": ((2, 2, 2), [[2, 5, 6], [3, 7, 8]], [[1, 1, 1], [1, 1, 1]], True),
    "two BOS": ((2, 2, 2), [[2, 2, 5, 6]], [[1, 1, 1, 1]], True),
    "single tokens": ((0, 1, 2), [[0], [5]], [[1], [1]], False),
    "nothing else": ((0, 1, 2), [[0, 0], [0, 0]], [[1, 1], [1, 1]], False),
}


@pytest.mark.parametrize(("ids", "rows", "real", "is_said"), CASES.values(), ids=CASES)
def test_which_pad_tokens_are_padding(ids, rows, real, is_said):
    pad, bos, eos = ids
    tokenizer = SimpleNamespace(pad_token_id=pad, bos_token_id=bos, eos_token_id=eos, decode=str)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = _infer_padding(tokenizer, torch.tensor(rows))
    assert found.long().tolist() == real
    assert len(said) == is_said
    assert bool(_infer_padding(None, torch.tensor(rows)).all())


def test_a_row_of_padding_among_prompts_is_refused():
    tokenizer = SimpleNamespace(pad_token_id=0)
    with pytest.raises(ValueError, match=r"rows \[1\] are nothing but the pad token 0"):
        _infer_padding(tokenizer, torch.tensor([[5, 6], [0, 0]]))


# Kinds

KINDS: dict[str, Any] = {
    "texts": lambda model: PROMPTS,
    "a tuple of texts": lambda model: tuple(PROMPTS),
    "a series of texts": lambda model: pd.Series(PROMPTS),
    "NumPy strings": lambda model: np.array(PROMPTS),
    "rows of ids": lambda model: [model.to_tokens(prompt)[0].tolist() for prompt in PROMPTS],
    "a series of rows": lambda model: pd.Series([model.to_tokens(prompt)[0].numpy() for prompt in PROMPTS]),
    "rows of tensors": lambda model: [model.to_tokens(prompt)[0] for prompt in PROMPTS],
    "what to_tokens returns": lambda model: [model.to_tokens(prompt) for prompt in PROMPTS],
    "ragged encodings": lambda model: model.tokenizer(PROMPTS),
    "an encoding": lambda model: model.tokenizer(PROMPTS, padding=True, return_tensors="pt"),
    "a dict": lambda model: dict(model.tokenizer(PROMPTS, padding=True, padding_side="right")),
    "tokenize": lambda model: tj.ResidualNetwork(model).tokenize(PROMPTS),
}


@each_spec
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_each_prompt_alone(spec, kind):
    model = build(spec)
    net = tj.ResidualNetwork(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trace = net.trace(KINDS[kind](model))
    assert trace.valid.long().tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]
    own = torch.cat([net.trace(prompt)["final_post"][0] for prompt in PROMPTS])
    torch.testing.assert_close(trace["final_post"][trace.valid], own, rtol=1e-4, atol=1e-5)
    hooks = tj.interventions.patch_hooks(net, "0_mlp", KINDS[kind](model))
    assert hooks[0][0] == "blocks.0.hook_mlp_out"


MESSAGE = {"role": "user", "content": "w5"}
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "chat messages": (
        [MESSAGE],
        TypeError,
        r"got chat messages.*apply_chat_template\(messages, tokenize=False\).*prepend_bos=False",
    ),
    "several chats": ([[MESSAGE], [MESSAGE]], TypeError, "got chat messages"),
    "a message": (MESSAGE, TypeError, "got chat messages"),
    "another dict": ({"text": "w5"}, TypeError, r"must hold input_ids, .*got one of \['text'\]"),
    "a list of dicts": ([{"input_ids": [3]}], TypeError, "got a list of dicts"),
    "a frame": (pd.DataFrame({"a": ["w5"]}), TypeError, r"got pandas\..*DataFrame"),
    "a generator": ((prompt for prompt in PROMPTS), TypeError, "got generator"),
    "bytes": (b"w5", TypeError, "got bytes"),
    "nothing": (None, TypeError, "got None"),
    "text and ids": (["w5", 3], TypeError, "must all be text; item 1 is 3"),
    "missing text": (pd.Series(["w5", float("nan")]), TypeError, "must all be text; item 1 is nan"),
    "real numbers": (np.array([[3.0, 4.0]]), TypeError, "must be integers .*got dtype torch.float"),
    "a mask": (torch.tensor([[True, False]]), TypeError, "must be integers .*got dtype torch.bool"),
    "no values": (torch.zeros(1, 3, dtype=torch.long, device="meta"), ValueError, "on the meta device"),
    "a huge id": ([2**70], TypeError, "no array of ids"),
    "a negative id": ([3, -1], ValueError, r"must lie in 0\.\.60; got -1\.\.3"),
    "a lone surrogate": ("w5 \ud800", ValueError, r"UTF-8; got a lone surrogate, '\\ud800', at character 3"),
    "no prompt": ([], ValueError, "at least one prompt"),
    "an empty row": ([[3], []], ValueError, r"got a row of shape \(0,\)"),
}


@each_spec
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_read_is_refused_by_what_it_is(spec, kind):
    given, error, message = REFUSED[kind]
    with pytest.raises(error, match=message):
        tj.ResidualNetwork(build(spec)).trace(given)


@each_spec
def test_two_masks_are_refused(spec):
    net = tj.ResidualNetwork(build(spec))
    encoding = net.tokenize(PROMPTS)
    with pytest.raises(ValueError, match="already holds its attention_mask"):
        net.trace(encoding, attention_mask=encoding["attention_mask"])


# Ids beyond the embedding, and BOS


@each_spec
def test_ids_beyond_the_embedding_are_named_before_the_model_runs(spec):
    model = zoo.fresh(spec, torch.float32)
    model.tokenizer.add_tokens(["<tool>"])
    net = tj.ResidualNetwork(model)
    for read in (tj.iterative_jet_lens, tj.path_sums, tj.detached_jacobian, tj.ablation_effect):
        with pytest.raises(
            ValueError, match=r"0\.\.60, the rows of the embedding; the tokenizer makes '.*<tool>' \(id 61\)"
        ):
            read(net, "w5 <tool> w7")
    # Padding is never read: an id of its own that has no embedding does no harm.
    model.tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert model.tokenizer.pad_token_id == 62
    tokens = model.tokenizer(PROMPTS, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    for given in (PROMPTS, tokens):
        assert net.trace(given).valid.sum(1).tolist() == [5, 2, 4]


@each_spec
def test_text_that_begins_with_bos_gets_no_other(spec):
    model = build(spec)
    net = tj.ResidualNetwork(model)
    with pytest.warns(
        UserWarning, match=r"1 of 2 prompts begin with 2 BOS tokens: .*'<s>'.*tokenize\(text, prepend_bos=False\)"
    ):
        trace = net.trace(["w9", "<s> w5 w7"])
    assert trace.tokens[1].tolist() == [1, 1, 5, 7]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        once = net.tokenize("<s> w5 w7", prepend_bos=False)
        assert once["input_ids"].tolist() == [[1, 5, 7]]
        assert net.tokenize("<s> w5 w7", prepend_bos=True)["input_ids"].tolist() == [[1, 1, 5, 7]]
        own, wanted = tj.iterative_jet_lens(net, once), tj.iterative_jet_lens(net, "w5 w7")
    assert torch.equal(own.measures.kl, wanted.measures.kl)


def test_plain_callables_read_no_text():
    net = tj.ResidualNetwork(
        tj.CallableModel(torch.sin, [{"a": torch.sin}], tj.Decoder(tj.Norm("none"), torch.eye(3), torch.zeros(3)))
    )
    with pytest.raises(ValueError, match="Text needs a model with a tokenizer"):
        net.tokenize("w5")


# Models


def test_a_hugging_face_model_is_told_how_to_be_wrapped():
    model = zoo.build(zoo.ModelSpec("llama", "bridge", "raw")).original_model
    message = r"got transformers\..*LlamaForCausalLM. Wrap it first: TransformerBridge.boot_transformers\('.*', hf_model=model\)"
    with pytest.raises(TypeError, match=message):
        tj.ResidualNetwork(model)
    with pytest.raises(TypeError, match=message), tj.detached(model):
        pass
    with pytest.raises(
        TypeError, match=r"got builtins.str. Load it first: TransformerBridge.boot_transformers\('gpt2'\)"
    ):
        tj.ResidualNetwork("gpt2")
    with pytest.raises(
        TypeError, match=r"got torch\..*OptimizedModule. Pass the model that was compiled.*model\._orig_mod"
    ):
        tj.ResidualNetwork(torch.compile(zoo.build(zoo.available(["llama"])[0])))


# N-grams, orders, steps, targets


@each_spec
def test_ids_that_no_tokenizer_knows_can_be_left_out_of_ngrams(spec, monkeypatch):
    model = build(spec)
    vocabulary = {f"w{i}": i for i in (3, 8, 9, 60, 61)}
    monkeypatch.setattr(model.tokenizer, "get_vocab", lambda: vocabulary)
    monkeypatch.setattr(model.tokenizer, "decode", lambda ids: "")
    net = tj.ResidualNetwork(model)
    known = net.known_tokens
    assert known.tolist() == [3, 8, 9, 60]
    table = tj.jet_bigrams(net, rows=known, columns=known, top_k=16, progress=False)
    assert sorted(table.ids.tolist()) == [[i, j] for i in known.tolist() for j in known.tolist()]
    assert table.names[60] == "w60"


ASKED: dict[str, Any] = {
    "lens": lambda net: tj.iterative_jet_lens(net, "w5", order=1001),
    "joint": lambda net: tj.joint_jet_lens(net, "w5", order=10**30),
    "expansion": lambda net: tj.jet_expand(net, "1_mlp", centers=["embed"], order=10**6),
    "paths": lambda net: tj.exponential_expansion(net, 10**6),
    "jet": lambda net: tj.calculus.jet(torch.sin, torch.zeros(2), torch.ones(2), 10**9),
    "norm": lambda net: tj.calculus.norm_jet(tj.Norm("none"), torch.ones(2), torch.ones(2), 10**9),
}


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
def test_huge_orders_are_refused(ask):
    with pytest.raises(ValueError, match="order must be at most 1000; got 10"):
        ask(tj.ResidualNetwork(build(SPECS[0])))


@pytest.mark.usefixtures("as_users_run_it")
def test_one_line_each():
    net = tj.ResidualNetwork(build(SPECS[0]))
    with pytest.raises(ValueError, match="at least one step or path; got none"):
        tj.ablation_effect(net, "w5", [])
    with pytest.raises(ValueError, match="at least one prompt"):
        tj.ablation_effect(net, [])
    with pytest.raises(ValueError, match="d_vocab = 61, got 1000"):
        tj.iterative_jet_lens(net, "w5", top_k=1000)
    for read in (tj.iterative_jet_lens, tj.joint_jet_lens, tj.paths.interactions, tj.path_sums):
        with pytest.raises(ValueError, match=r"A target must be text .* got a lone surrogate"):
            read(net, "w5", targets=["\ud800"])
