"""The model that comes with tl-jets, and what trains and measures it."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import zoo

from tl_jets.core.network import ResidualNetwork
from tl_jets.pretrained import TINYCODE, TINYDOCS, load_tinycode, load_tinydocs

ROOT = Path(__file__).parents[2]
WORLDS = ["bridge", "hooked"] if zoo.MAJOR < 4 else ["bridge"]
PROMPTS = [
    "Return the number of",
    "Changed in version 3.10: Added",
    "If the file does not exist, an",
    "The default value of this parameter is",
    "By default, the server listens on",
    "This function can be used to",
]
SENTENCES = [
    "Return a new list that contains all items of the given sequence.",
    "If the argument is omitted, the current directory is used.",
    "Raises a ValueError if the string cannot be converted to a number.",
    "The table must already exist, and the user must have the right to read it.",
    "This method is called when the connection to the server has been closed.",
    "By default, the index is built without locking out writes.",
    "The optional argument specifies the maximum number of bytes to read.",
    "A transaction that is rolled back leaves no changes in the database.",
    "Changed in version 3.8: The function now accepts a path-like object.",
    "Note that the order of the keys in the dictionary is not changed.",
]
ODD_TEXTS = [
    "",
    " ",
    "a\tb\r\n\n  c",
    "naïve — “quoted” …",
    "漢字 🙂 \u0000\u200b",
    "SELECT * FROM t WHERE a <> 'x';",
    "</ s>",
]


@pytest.fixture(scope="module")
def reference():
    """transformers' own model and tokenizer of the same directory."""
    model = transformers.LlamaForCausalLM.from_pretrained(TINYDOCS, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(TINYDOCS)


@pytest.fixture(scope="module", params=WORLDS)
def model(request):
    return load_tinydocs(model_class=request.param)


@pytest.fixture(scope="module")
def demo():
    """Imports a module of demos/tinydocs, whose modules import each other by bare names."""
    folder = str(ROOT / "demos" / "tinydocs")
    sys.path.insert(0, folder)
    yield importlib.import_module
    sys.path.remove(folder)
    for name in ("corpus", "kneser_ney", "train"):
        sys.modules.pop(name, None)


# --- the model ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_are_those_of_transformers(model, reference):
    original, tokenizer = reference
    assert not model.training
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        torch.testing.assert_close(model(prompt), original(ids).logits, atol=2e-5, rtol=2e-5)


@torch.no_grad()
@pytest.mark.skipif(len(WORLDS) < 2, reason="TransformerLens 4 has no HookedTransformer")
def test_both_classes_have_the_same_logits():
    bridge, hooked = (load_tinydocs(model_class=world, dtype=torch.float64) for world in WORLDS)
    assert bridge(PROMPTS[0]).dtype == hooked(PROMPTS[0]).dtype == torch.float64
    for prompt in PROMPTS:
        torch.testing.assert_close(bridge(prompt), hooked(prompt), atol=1e-5, rtol=1e-5)  # norms compute in float32


@pytest.mark.skipif(len(WORLDS) == 2, reason="TransformerLens 3 has HookedTransformer")
def test_hooked_is_refused_where_there_is_none():
    with pytest.raises(ImportError, match=r"needs a TransformerLens .* installed is .* use model_class"):
        load_tinydocs(model_class="hooked")


def test_an_unknown_class_is_refused(as_users_run_it):
    with pytest.raises(ValueError, match="'huggingface'; leave it out"):
        load_tinydocs(model_class="huggingface")  # type: ignore[arg-type]


def test_one_bos_and_no_more(model):
    bos = model.tokenizer.bos_token_id
    for prompt in PROMPTS:
        (ids,) = model.to_tokens(prompt).tolist()
        assert ids[0] == bos and ids.count(bos) == 1
        (without,) = model.to_tokens(prompt, prepend_bos=False).tolist()
        assert without == ids[1:]
        assert model.tokenizer(prompt).input_ids == ids
    batch = model.to_tokens(PROMPTS)
    assert (batch == bos).sum(dim=1).tolist() == [1] * len(PROMPTS)


@pytest.mark.parametrize("text", [*ODD_TEXTS, *SENTENCES[:2]])
def test_every_text_comes_back(reference, text):
    _, tokenizer = reference
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.unk_token_id not in ids


@torch.no_grad()
def test_it_has_learned_the_language_of_the_documentation(model):
    losses = [float(model(sentence, return_type="loss")) for sentence in SENTENCES]
    assert sum(losses) / len(losses) < 3.8  # a uniform guess: 8.3 nats
    shuffled = [" ".join(reversed(sentence.split())) for sentence in SENTENCES]
    backwards = [float(model(sentence, return_type="loss")) for sentence in shuffled]
    assert sum(backwards) > sum(losses) + 2.0 * len(losses)


@torch.no_grad()
def test_a_line_break_is_not_the_answer_to_everything(model):
    answers = [model.tokenizer.decode(model(prompt)[0, -1].argmax()) for prompt in PROMPTS]
    assert not any("\n" in answer for answer in answers)
    assert len(set(answers)) >= 4


def test_the_library_takes_it(model):
    trace = ResidualNetwork(model).trace(PROMPTS[0])
    torch.testing.assert_close(trace.logits, model(PROMPTS[0]), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("folder", "licences", "gain_at_least"), [(TINYDOCS, ["PSF", "PostgreSQL"], 1.0), (TINYCODE, ["PSF"], 0.9)]
)
def test_it_fits_into_six_megabytes_and_says_what_it_is(folder, licences, gain_at_least):
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 6_000_000
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (.+?) \| ([\d.]+) \|$", card, flags=re.MULTILINE))
    nats, baseline, gain = (float(rows[key]) for key in (folder.name, "Kneser-Ney bigrams", "gain"))
    assert gain == pytest.approx(baseline - nats, abs=2e-3)
    assert gain >= gain_at_least
    assert all(licence in card for licence in licences) and len(re.findall(r"\b[0-9a-f]{64}\b", card)) >= 2


@torch.no_grad()
@pytest.mark.parametrize("world", WORLDS)
def test_tinycode_is_tinydocs_that_has_read_python(model, world):
    code = load_tinycode(model_class=world)
    assert code.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    lines = [
        "    def __init__(self, name):\n        self.name = name",
        "for key, value in items.items():",
        "import os\nimport sys",
    ]
    gains = {
        kind: [float(model(text, return_type="loss") - code(text, return_type="loss")) for text in texts]
        for kind, texts in (("code", lines), ("prose", SENTENCES))
    }
    assert min(gains["code"]) > 1.0
    assert sum(gains["prose"]) < 0, "fine-tuning costs prose"


def test_loading_needs_no_network():
    program = (
        "import socket\n"
        "def refuse(*args, **kwargs): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from tl_jets.pretrained import load_tinydocs\n"
        "print(load_tinydocs()('Return the').shape)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("torch.Size([1, 3, 4096])\n")
    assert "%|" not in done.stderr  # no progress bar


# --- the baseline ---------------------------------------------------------------------------------------------------


def test_kneser_ney_by_hand(demo):
    """0 1 twice, 0 2, 1 0 and 2 1 once each: n_1 = 3, n_2 = 1, so Y = 3/5, D(1) = 3/5, and D(2) = 1/2 for want of n_3."""
    previous, following = np.array([0, 0, 0, 1, 2]), np.array([1, 1, 2, 0, 1])
    bigrams = demo("kneser_ney").KneserNey.fit(previous, following, d_vocab=3)
    assert bigrams.discounts == pytest.approx([0.6, 0.5, 0.5])
    assert bigrams.continuation == pytest.approx([1 / 4, 1 / 2, 1 / 4])  # t = 1, 2, 1; E = 1/2; h = 3/2
    expected = [[11 / 120, 82 / 120, 27 / 120], [0.4 + 0.15, 0.3, 0.15], [0.15, 0.4 + 0.3, 0.15]]
    assert bigrams.probabilities(np.arange(3)) == pytest.approx(np.array(expected))


def test_kneser_ney_sums_to_one_and_beats_what_it_is_made_of(demo):
    random = np.random.default_rng(3)
    table = random.dirichlet(np.full(40, 0.2), size=50)  # tokens 40 to 49 occur in the second place never
    previous = random.integers(0, 45, size=4000)  # 45 to 49 in the first place never
    following = np.array([random.choice(40, p=table[token]) for token in previous])
    bigrams = demo("kneser_ney").KneserNey.fit(previous[:3000], following[:3000], d_vocab=50)
    probabilities = bigrams.probabilities(np.arange(50))
    assert (probabilities > 0).all()
    assert probabilities.sum(axis=1) == pytest.approx(np.ones(50))
    assert probabilities[47] == pytest.approx(bigrams.continuation)
    assert (bigrams.discounts > 0).all() and (bigrams.discounts < [1, 2, 3]).all()
    unseen = previous[3000:], following[3000:]
    unigrams = np.bincount(following[:3000], minlength=50) + 0.5
    assert bigrams.log_probability(*unseen).mean() > np.log(unigrams / unigrams.sum())[unseen[1]].mean() + 0.5


def test_kneser_ney_wants_pairs(demo):
    with pytest.raises(ValueError, match=r"two integer arrays .* got \(3,\) and \(2,\); pass"):
        demo("kneser_ney").KneserNey.fit(np.arange(3), np.arange(2), d_vocab=5)


def test_kneser_ney_example(demo):
    assert doctest.testmod(demo("kneser_ney")) == (0, 3)


# --- corpus and training --------------------------------------------------------------------------------------------


def test_a_page_becomes_paragraphs_of_running_text(demo):
    page = """<html><head><title>T</title></head><body><nav><p>Not this, it only helps to navigate.</p></nav>
    <div class="body" role="main"><h1>A heading of more than five words, too</h1>
    <p>Call <code>f()</code>
       twice, and\u00a0see &ldquo;both&rdquo; results.<a class="headerlink" href="#x">¶</a></p>
    <pre>code = in_a + block + of + its + own</pre>
    <ul><li><p>An item with a paragraph within it.</p></li><li>Too short.</li></ul>
    <p>The text before a block:<br/>and <pre>x = y + z + more + and + more</pre> the text that comes after it.</p>
    <table><tr><td>A cell with bare text in it</td><td><p>A cell with a paragraph in it.</p></td></tr></table></div>
    <div class="sphinxsidebar"><p>Not this, it only helps to navigate.</p></div></body></html>"""
    assert demo("corpus").paragraphs(page) == [
        'Call f() twice, and see "both" results.',
        "An item with a paragraph within it.",
        "The text before a block: and",
        "the text that comes after it.",
        "A cell with a paragraph in it.",
    ]


def _text(train):
    """Four pages of 9 paragraphs of 3 to 300 tokens, and the tokens as lists."""
    random = np.random.default_rng(0)
    tokens, starts = [], []
    for _ in range(4):
        tokens.append(train.BOS)
        for length in random.integers(3, 300, size=9):
            starts.append(len(tokens))
            tokens += random.integers(10, 60, size=length).tolist()
        tokens.append(train.EOS)
    return train.Text(np.array(tokens), np.array(starts))


def test_held_out_windows_score_every_token_once(demo):
    train = demo("train")
    text = _text(train)
    inputs, targets = text.windows()
    assert inputs.shape == targets.shape and inputs.shape[1] == train.N_CTX
    assert targets[targets != train.IGNORED].tolist() == text.tokens[text.tokens != train.BOS].tolist()
    assert (inputs[:, 0] == train.BOS).all()
    scored = targets[:, :-1] != train.IGNORED
    assert (inputs[:, 1:][scored] == targets[:, :-1][scored]).all()


def test_a_killed_run_takes_the_same_steps(demo, tmp_path):
    train = demo("train")
    text = _text(train)
    recipe = train.Recipe(steps=4, more_steps=2, batch=2, n_layers=1, d_model=8, d_mlp=12, n_heads=2, seed=4)
    whole = train.train(recipe, text, tmp_path / "whole.pt", every=100)
    batch, made = train.Text.batch, []

    def killed(self, recipe, step):
        made.append(step)
        if len(made) == 6:
            raise KeyboardInterrupt
        return batch(self, recipe, step)

    train.Text.batch = killed
    try:
        with pytest.raises(KeyboardInterrupt):
            train.train(recipe, text, tmp_path / "part.pt", every=2)
        resumed = train.train(recipe, text, tmp_path / "part.pt", every=2)
    finally:
        train.Text.batch = batch
    assert made == [0, 1, 2, 3, 4, 5, 4, 5]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    with pytest.raises(ValueError, match="goes on with the recipe it began with"):
        train.train(replace(recipe, seed=5), text, tmp_path / "part.pt", every=2)


def test_what_prints_a_model_names_no_folder_of_this_machine(model):
    assert "(tinydocs)" in repr(ResidualNetwork(model)) and str(ROOT) not in repr(ResidualNetwork(model))
