"""Lenses as data and as a page: the numbers are the lenses', and no token becomes markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import torch
import zoo

from tl_jets import ResidualNetwork, iterative_jet_lens, joint_jet_lens
from tl_jets.tokens import token_text, visible
from tl_jets.views import lens_data, lens_page

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"',
    "'",
    "\\",
    "\u2028",
    "\u202eabc",
    "",
]


@pytest.fixture(scope="module")
def lenses():
    spec = next(spec for spec in zoo.available(zoo.CORE) if spec.name == "llama")
    network = ResidualNetwork(zoo.build(spec), "block")
    trace = network.trace(["a b c d", "a b"])
    return iterative_jet_lens(network, trace, order=2), joint_jet_lens(network, trace, order=1)


class Page(HTMLParser):
    """The elements, attributes and scripts of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "onerror", "onload")]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script" and self.scripts:
            self.scripts[-1] += data


def test_data_is_what_the_lenses_say(lenses):
    iterative, joint = lenses
    data = json.loads(json.dumps(lens_data(iterative, joint, model="m", prompt="p"), allow_nan=False))
    name = lambda token: visible(token_text(iterative.tokenizer, int(token)))  # noqa: E731
    layer, order, batch, pos = 1, 2, 0, -1
    found = data["iterative"]
    assert found["labels"] == iterative.labels and found["orders"] == [0, 1, 2]
    assert data["tokens"][0] == [name(token) for token in iterative.tokens[0]]
    assert data["answer"][batch][pos] == name(iterative.model_top_ids[batch, pos])
    assert found["top_tokens"][layer][order][batch][pos] == [
        name(t) for t in iterative.top_ids[layer, order, batch, pos]
    ]
    for mine, lens in ((found["measures"], iterative.measures), (found["control"], iterative.control)):
        for measure, values in lens.items():
            wanted = float(values[layer, order, batch, pos])
            assert mine[measure][layer][order][batch][pos] == pytest.approx(wanted, rel=1e-5)
    assert data["joint"]["weights"][2][0][1] == pytest.approx(float(joint.weights[2, 0, 1]), rel=1e-5)
    for kind in ("measures", "uniform", "control"):
        assert data["joint"][kind]["kl"][0][1] == pytest.approx(float(getattr(joint, kind).kl[0, 1]), rel=1e-5)


def test_padding_is_none(lenses):
    iterative, joint = lenses
    data = lens_data(iterative, joint)
    padding = (~iterative.valid).nonzero().tolist()
    assert padding
    for batch, pos in padding:
        assert data["iterative"]["measures"]["kl"][0][1][batch][pos] is None
        assert data["answer"][batch][pos] == "?"


def test_lenses_of_other_tokens_or_without_controls_are_refused(lenses):
    iterative, _ = lenses
    network = ResidualNetwork(zoo.build(zoo.available(zoo.CORE)[0]), "block")
    other = joint_jet_lens(network, torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="Both lenses must be of the same tokens"):
        lens_data(iterative, other)
    bare = iterative_jet_lens(network, torch.zeros(1, 3, dtype=torch.long), seed=None)
    with pytest.raises(ValueError, match="measures and a seed"):
        lens_data(bare, other)


def test_a_page_holds_its_data_and_asks_for_nothing(lenses):
    data = lens_data(*lenses, model="m", prompt="p & <q>")
    text = lens_page(data)
    page = Page(text)
    assert page.addresses == []
    assert page.tags.count("script") == 2 and "link" not in page.tags and "img" not in page.tags
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert json.loads(page.scripts[0]) == data
    assert "p &amp; &lt;q&gt;" in text and "{{" not in text


@pytest.mark.parametrize("token", HOSTILE)
def test_tokens_stay_text(lenses, token):
    data = lens_data(*lenses, prompt=token, model=token)
    data["tokens"] = [[token] * len(row) for row in data["tokens"]]
    data["iterative"]["top_tokens"][0][0][0][0][0] = token
    text = lens_page(data)
    page = Page(text)
    assert page.tags.count("script") == 2 and "img" not in page.tags and page.addresses == []
    assert json.loads(page.scripts[0]) == data
    assert "innerHTML" not in page.scripts[1]
