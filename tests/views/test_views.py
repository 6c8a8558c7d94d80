"""Views, pages, and results in notebooks: the numbers are the results', and no token becomes markup."""

from __future__ import annotations

import html
import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files

import pandas as pd
import pytest
import torch
import zoo
from hostile import HOSTILE, HostileTokenizer

import tl_jets as tj
from tl_jets import ResidualNetwork, iterative_jet_lens, joint_jet_lens, views
from tl_jets.core.notebook import dataframe_html
from tl_jets.core.numerals import number
from tl_jets.core.tokens import visible
from tl_jets.views import Explorer, View, lens_data, lens_page, page


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
        self.attributes: set[str] = set()
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "onerror", "onload")]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script" and self.scripts:
            self.scripts[-1] += data


def test_data_is_what_the_lenses_say(lenses):
    iterative, joint = lenses
    data = json.loads(json.dumps(lens_data(iterative, joint, model="m", prompt="p"), allow_nan=False))
    name = lambda token: visible(zoo.text_of(iterative, int(token)))  # noqa: E731
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
    for name in ("alpha", "beta", "effects"):
        assert data["joint"][name][2][0][1] == pytest.approx(getattr(joint, name)[2, 0, 1].tolist(), rel=1e-5)
    assert data["joint"]["effective_rank"] == joint.effective_rank.tolist()
    assert data["joint"]["linearize"] == found["linearize"] == "jet"
    assert [data["joint"][each][0][3][0] for each in ("target_ids", "targets")] == [
        int(joint.model_top_ids[0, 3]),
        data["answer"][0][3],
    ]
    for kind in ("measures", "uniform", "control", "control_uniform"):
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
    made = lens_page(*lenses, model="m", prompt="p & <q>")
    text = made.page()
    page = Page(text)
    assert page.addresses == []
    assert page.tags.count("script") == 2 and "link" not in page.tags and "img" not in page.tags
    assert not re.search(r"https?:|//[a-z]|@import|url\(", made.html)
    assert json.loads(page.scripts[0]) == made.data == lens_data(*lenses, model="m", prompt="p & <q>")
    assert "<h1>p &amp; &lt;q&gt;</h1>" in text and "{{ " not in text


@pytest.mark.parametrize("token", HOSTILE)
def test_tokens_stay_text(lenses, token):
    data = lens_data(*lenses, prompt=token, model=token)
    data["tokens"] = [[token] * len(row) for row in data["tokens"]]
    data["iterative"]["top_tokens"][0][0][0][0][0] = token
    page = Page(Explorer.of(token, data).page())
    assert page.tags.count("script") == 2 and "img" not in page.tags and page.addresses == []
    assert json.loads(page.scripts[0]) == data
    drawing = (files("tl_jets") / "views/templates/explorer.js").read_text()
    assert drawing in page.scripts[1] and "innerHTML" not in drawing


# Views


class Cells(HTMLParser):
    """The cells of a fragment's tables: rows of (text, title, strength, class)."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: list[list[list[tuple[str, str, float | None, str]]]] = []
        self.chips: list[tuple[str, str, float | None, str]] = []
        self._open: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th") or (tag == "span" and "chip" in dict(attrs).get("class", "")):
            self._open.append((tag, dict(attrs), []))
        elif tag in ("small", "br"):
            for _, _, texts in self._open:
                texts.append("\n")

    def handle_data(self, data):
        for _, _, texts in self._open:
            texts.append(data)

    def handle_endtag(self, tag):
        if self._open and tag == self._open[-1][0]:
            _, attrs, texts = self._open.pop()
            style = re.fullmatch(r"--v:([\d.e-]+)", attrs.get("style", ""))
            cell = ("".join(texts), attrs.get("title", ""), float(style[1]) if style else None, attrs.get("class", ""))
            (self.chips if tag == "span" else self.tables[-1][-1]).append(cell)


def parsed(view: View) -> Cells:
    return Cells(view.html)


def close(shown: str, value: float) -> bool:
    """Whether a number on a page is this one, to the digits that are shown."""
    return shown == number(float(value)) and float(shown) == pytest.approx(float(value), rel=0.06, abs=0.0051)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((0.0, "0.00"), (3e-7, "0.00"), (1.234, "1.23"), (-9.876, "-9.88"), (12.34, "12.3"), (123.4, "123")),
        *((0.0012, "1.2e-3"), (-123456.0, "-1.2e5"), (float("nan"), "n/a"), (float("-inf"), "-\u221e")),
    ],
)
def test_numbers(value, shown):
    assert number(value) == shown


def test_a_lens_table_shows_the_lens(lenses):
    iterative, _ = lenses
    for order, measure in ((0, "kl"), (2, "cosine")):
        (rows,) = parsed(views.lens_table(iterative, order=order, measure=measure, prompt=1)).tables
        places = [p for p, real in enumerate(iterative.valid[1].tolist()) if real]
        assert 0 < len(places) < len(iterative.positions)  # the second prompt is shorter
        assert [row[0][0] for row in rows[1:]] == [*iterative.labels, "model"]
        for i in range(len(iterative.labels)):
            for cell, p in zip(rows[1 + i][1:], places, strict=True):
                best, numbers = cell[0].split("\n")
                name = visible(zoo.text_of(iterative, int(iterative.top_ids[i, order, 1, p, 0])))
                assert best == (f"[{name}]" if iterative.borrowed[i, order, 1, p] else name)
                own, control = re.fullmatch(r"(\S+) \((\S+)\)", numbers).groups()
                value = float(getattr(iterative.measures, measure)[i, order, 1, p])
                assert close(own, value) and close(control, float(getattr(iterative.control, measure)[i, order, 1, p]))
                kl = re.search(r"^KL \(nats\) (\S+) \(control (\S+)\)$", cell[1], re.M).groups()
                wanted = [float(measures.kl[i, order, 1, p]) for measures in (iterative.measures, iterative.control)]
                assert [float(each) for each in kl] == pytest.approx(wanted, rel=1e-3, abs=1e-6)
                assert 0 <= cell[2] <= 1 and (measure != "cosine" or cell[2] == pytest.approx(max(value, 0), abs=1e-3))


def test_a_cell_is_the_bluer_the_smaller_its_kl(lenses):
    iterative, _ = lenses
    (rows,) = parsed(views.lens_table(iterative, order=0)).tables
    cells = [(float(cell[0].split("\n")[1].split(" ")[0]), cell[2]) for row in rows[1:-1] for cell in row[1:]]
    cells.sort()
    assert len({kl for kl, _ in cells}) > 3
    assert all(a[1] >= b[1] for a, b in itertools.pairwise(cells)) and cells[0][1] > cells[-1][1]


def test_a_joint_table_shows_what_components_add(lenses, network):
    _, joint = lenses
    (rows,) = parsed(views.lens_table(joint)).tables
    decoder, centers = network.decoder, joint.centers.at(slice(None))
    logits = decoder.logits(centers.jets, 1.0)  # [center, row of both prompts, d_vocab]
    best_ids = logits.argmax(-1)
    logits = (logits - logits.mean(-1, keepdim=True)) * joint.weights[:, joint.valid][..., None]
    n = int(joint.valid[0].sum())
    largest = float(logits[:, :n].amax(-1).abs().max())
    for i, label in enumerate(joint.labels):
        head, *cells = rows[1 + i]
        mean = float(joint.weights[i, 0, 1:n].mean())  # without BOS
        assert head[0].split("\n")[0] == label and close(head[0].split("\n")[1], mean)
        for cell, row, best_id in zip(cells, logits[i, :n], best_ids[i, :n].tolist(), strict=True):
            best, value = cell[0].split("\n")
            assert best == visible(zoo.text_of(joint, best_id)) and close(value, float(row[best_id]))
            assert cell[2] == pytest.approx(float(row.max()) / largest, abs=2e-3) and cell[3] == "above"
    total = rows[1 + len(joint.labels)]
    kl, control = re.fullmatch(r"(\S+) \((\S+)\)", total[1][0].split("\n")[1]).groups()
    assert close(kl, float(joint.kl[0, 0])) and close(control, float(joint.control.kl[0, 0]))
    kinds = (joint.measures, joint.control, joint.uniform, joint.control_uniform)
    hover = re.fullmatch(r"KL \(nats\) (\S+) \(control (\S+)\)\nuniform weights (\S+) \(control (\S+)\)", total[1][1])
    assert [float(each) for each in hover.groups()] == pytest.approx([float(k.kl[0, 0]) for k in kinds], rel=1e-3)


def test_contributions_are_of_the_chosen_cells(lenses):
    _, joint = lenses
    whole, part = joint.contributions(2), joint.contributions(2, places=[-1, 1], labels=joint.labels[2:0:-1])
    assert torch.equal(part.indices, whole.indices[[2, 1]][:, [-1, 1]])
    assert torch.allclose(part.values, whole.values[[2, 1]][:, [-1, 1]])
    padded = joint.contributions(prompt=1)
    assert padded.values[:, ~joint.valid[1]].isnan().all() and (padded.indices[:, ~joint.valid[1]] == -1).all()


def test_only_the_largest_components_are_shown(lenses):
    _, joint = lenses
    (rows,) = parsed(views.lens_table(joint, top=2)).tables
    largest = joint.weights[:, 0].mean(1).topk(2).indices.sort().values.tolist()
    assert [row[0][0].split("\n")[0] for row in rows[1:3]] == [joint.labels[i] for i in largest] and len(rows) == 5


def test_top_tokens(lenses):
    iterative, joint = lenses
    (rows,) = parsed(views.top_tokens(iterative, position=1, k=3)).tables
    for i in range(len(iterative.labels)):
        for order in iterative.orders:
            lines = rows[1 + i][1 + order][0].split("\n")
            for line, token_id, value in zip(
                lines, iterative.top_ids[i, order, 0, 1, :3], iterative.full_values[i, order, 0, 1, :3], strict=False
            ):
                word, shown = line.rsplit(" ", 1)
                assert visible(zoo.text_of(iterative, int(token_id))) in (word, word[1:-1])
                assert close(shown, float(value))
    (rows,) = parsed(views.top_tokens(joint, k=4)).tables
    found = joint.contributions(4, places=[-1])
    for i in range(len(joint.labels)):
        assert close(rows[1 + i][1][0], float(joint.weights[i, 0, -1]))
        for cell, token_id, value in zip(rows[1 + i][2:], found.indices[i, 0], found.values[i, 0], strict=True):
            if abs(value) <= 1e-6:
                assert cell[0] == "\u2013"
                continue
            word, shown = cell[0].rsplit(" ", 1)
            assert word == visible(zoo.text_of(joint, int(token_id))) and close(shown, float(value))


def test_lens_tokens(lenses):
    iterative, _ = lenses
    found = parsed(views.lens_tokens(iterative, order=1, measure="remainder_norm"))
    chips = iter(found.chips)
    for i in range(len(iterative.labels)):
        for p in range(int(iterative.valid[0].sum())):
            text, hover, strength, _ = next(chips)
            value = float(iterative.remainder_norm[i, 1, 0, p])
            assert text.split("\n")[0] == visible(zoo.text_of(iterative, int(iterative.tokens[0, p])))
            assert close(text.split("\n")[1].split(" ")[0], value) and hover.startswith(iterative.labels[i])
            assert strength == pytest.approx(1 - min(value, 1), abs=1e-3)
    assert next(chips, None) is None


def test_components_that_add_nothing_name_no_tokens(lenses):
    joint = lenses[1]
    weights = joint.weights.clone()
    weights[0] = 0
    rows = views.top_tokens(replace(joint, weights=weights)).html.split("<tr>")
    (silent,) = [row for row in rows if f">{joint.labels[0]}</th>" in row]
    assert silent.count("\u2013") == joint.top_ids.shape[-1] and "<bdi>" not in silent


def test_lens_tokens_are_of_iterative_lenses(lenses, as_users_run_it):
    with pytest.raises(TypeError, match=r"of an iterative lens; got JointJetLens\. For a joint lens use lens_table"):
        views.lens_tokens(lenses[1])
    with pytest.raises(ValueError, match="A lens is indexed by its layers"):
        lenses[0][1:3]


def test_path_tokens(network, trace):
    sums = tj.path_sums(network, trace)
    found = parsed(views.path_tokens(sums, top=5, prompt=1))
    sizes = sums.effect[:, 1][:, (sums.valid & ~sums.sinks.mask)[1]].abs().mean(1)
    chosen = sizes.topk(5).indices.tolist()
    assert [row[0][0] for row in found.tables[0][1:]] == [sums.labels[i] for i in chosen]
    values = sums.effect[chosen, 1][:, sums.valid[1]]
    assert (values < 0).any() and (values > 0).any()
    for chip, value in zip(found.chips, values.flatten().tolist(), strict=True):
        assert float(chip[0].split("\n")[1]) == pytest.approx(value, rel=0.01, abs=5e-3)
        assert chip[3] == ("chip below" if value < 0 else "chip above")
        assert chip[2] == pytest.approx(abs(value) / float(values.abs().max()), abs=2e-3)
    every = tj.exponential_expansion(network, linearize="detached")(trace)
    assert views.path_tokens(every, top=1, measure="share").title.endswith(
        f"the 1 largest of {len(every)}, prompt 1 of 2"
    )


def test_detached_tokens(network):
    J = tj.detached_jacobian(network, "a b c", positions=[-2, -1])
    assert "detached_tokens" in J._repr_html_() and "_contributions" not in J.__dict__  # a look runs nothing
    frame = J.to_dataframe()
    for by in ("share", "norm"):
        chips = parsed(views.detached_tokens(J, by=by)).chips
        for chip, row in zip(chips, frame.itertuples(index=False), strict=True):
            assert float(chip[0].split("\n")[1]) == pytest.approx(getattr(row, by), rel=0.02, abs=5e-3)
            assert (chip[0].split("\n")[0] == "bias") == (row.top_tokens is None)
    assert "<table>" in J._repr_html_()


@pytest.mark.parametrize("normalize", ["vocab", "none"])
def test_trigram_heatmaps(network, normalize):
    table = tj.jet_trigrams(network, 1, 0, top_k=30, normalize=normalize, distance=2)
    ids = {visible(name): token for token, name in table.names.items()}
    firsts = [list(dict.fromkeys(table.ids[:, place].tolist()))[:4] for place in range(3)]
    shown = {}
    for axes in ("key_query", "key_output"):
        (rows,) = parsed(views.trigram_heatmap(network, table, axes=axes, size=4)).tables
        assert len(rows) == 1 + len(firsts[0])
        for row in rows[1:]:
            for head, cell in zip(rows[0][1:], row[1:], strict=True):
                shown[axes, ids[row[0][0]], ids[head[0]]] = float(cell[0])
    options = {"normalize": normalize, "distance": 2}
    for key in firsts[0]:
        for query in firsts[1]:
            for output in firsts[2]:
                (score,) = tj.ngrams.trigram_scores(network, 1, 0, [[key, query, output]], **options).tolist()
                total = shown["key_query", key, query] + shown["key_output", key, output]
                assert total == pytest.approx(score, abs=0.2, rel=0.02)
    view = views.trigram_heatmap(network, table, axes="query_output", size=4)
    (rows,) = parsed(view).tables
    for row in rows[1:]:
        for head, cell in zip(rows[0][1:], row[1:], strict=True):
            triple = [int(table.ids[0, 0]), ids[row[0][0]], ids[head[0]]]
            assert float(cell[0]) == pytest.approx(
                float(tj.ngrams.trigram_scores(network, 1, 0, [triple], **options)), rel=0.02
            )


def test_views_refuse(lenses, network, trace):
    iterative, joint = lenses
    table = tj.jet_trigrams(network, 1, 0, top_k=3)
    bare = replace(iterative, measures=None, control=None, own_top_ids=None)
    for message, call in {
        "prompt must lie in 0..1": lambda: views.lens_table(iterative, prompt=2),
        "positions must be among": lambda: views.lens_table(joint, positions=[99]),
        "those of prompt 1 are padding": lambda: views.lens_table(
            joint, prompt=1, positions=[p for p, real in enumerate(joint.valid[1].tolist()) if not real]
        ),
        "order must be one of": lambda: views.lens_table(iterative, order=7),
        "measure must be one of": lambda: views.lens_tokens(iterative, measure="loss"),
        "this lens was run without": lambda: views.lens_tokens(bare),
        "position must be among": lambda: views.top_tokens(iterative, position=-9),
        "k must lie in 1..5": lambda: views.top_tokens(iterative, k=6),
        "top must be 1 or more, or None for all": lambda: views.lens_table(joint, top=0),
        "top must be 1 or more": lambda: views.path_tokens(tj.path_sums(network, trace), top=0),
        "of the same model": lambda: views.trigram_heatmap(network, replace(table, fingerprint="other")),
        "of one head": lambda: views.trigram_heatmap(network, table[:0]),
        "which begins none": lambda: views.trigram_heatmap(network, table, axes="query_output", key="no such"),
        "one key is held fixed": lambda: views.trigram_heatmap(network, table, key=int(table.ids[0, 0])),
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    with pytest.raises(TypeError, match=r"Put text into a view of its own"):
        page("title", "text")


# Notebooks


@pytest.fixture(scope="module")
def results(network, trace, lenses):
    iterative, joint = lenses
    prompt = network.trace("a b c")
    bigrams = tj.jet_bigrams(network, "0_mlp", top_k=40, progress=False)
    pairs = [(int(a), int(b)) for a, b in bigrams.ids[:5].tolist()]
    paths = tj.exponential_expansion(network, linearize="detached")
    first = tj.jet_expand(network, "0_mlp", centers=["embed", "0_attn_out"], order=1)
    cache = tj.jet_expand(network, "1_attn", centers=first, order=1)(trace)
    whole = paths(trace)
    J = tj.detached_jacobian(network, prompt)
    studies, spec = tj.studies, next(spec for spec in zoo.available(zoo.CORE) if spec.name == "llama")
    other = zoo.fresh(spec, seed=1)
    return {
        "iterative": iterative,
        "iterative, no measures": iterative_jet_lens(network, trace, measures=False),
        "iterative, no control": iterative_jet_lens(network, trace, order=1, seed=None),
        "iterative, detached": iterative_jet_lens(network, trace, linearize="detached"),
        "iterative, one position": iterative_jet_lens(network, prompt, positions=-1),
        "joint": joint,
        "no tokenizer": zoo.renamed_tokens(iterative, None),
        "joint, no tokenizer": zoo.renamed_tokens(joint, None),
        "joint, detached": joint_jet_lens(network, trace, linearize="detached"),
        "joint, uniform": joint_jet_lens(network, trace, weights="uniform"),
        "measures": iterative.measures,
        "jet cache": cache,
        "jet cache, sliced": cache.apply_slice_to_batch_dim(0),
        "decoded cache": tj.jet_expand(network, "ln_final", centers=["embed", "0_attn_out"], order=0)(trace),
        "path cache": whole,
        "path cache, sliced": whole.apply_slice_to_batch_dim(1),
        "statistics": whole.statistics(),
        "sums": tj.path_sums(network, trace),
        "lengths": tj.path_lengths(network, trace),
        "jacobian": J,
        "block norms": J.block_norms(),
        "singular vectors": J.svd(3),
        "spectra": tj.detached_spectra(network, prompt, k=2),
        "bigrams": bigrams,
        "no bigrams": bigrams[:0],
        "trigrams": tj.jet_trigrams(network, 0, 0, top_k=5),
        "ablations": tj.ablation_effect(network, trace),
        "path ablations": tj.path_ablation(network, prompt, whole.labels[:3]),
        "interactions": tj.paths.interactions(network, prompt, center_scale="orthogonal"),
        "mass": studies.mass(network, pairs, controls=3),
        "diff": studies.diff(network, ResidualNetwork(other), top_k=5, progress=False),
        "track": studies.track({0: network, "end": network}, pairs=pairs, reference="last", n=5, progress=False),
        "roles": studies.roles(network, n=5, progress=False),
        "check": studies.ablation_check(network, "0_mlp", top_k=5, n_random=2),
    }


def test_results_render(results):
    for name, result in results.items():
        found = Page(result._repr_html_())
        shown = result._repr_html_()
        assert found.tags.count("script") == 1 and "img" not in found.tags, name
        assert type(result).__name__ in shown, name
        assert shown.count("<section>") == shown.count("</section>") == 1, name
        if name != "jacobian":
            assert Cells(shown).tables and Cells(shown).tables[0][0], name
    document = page("All of them", *results.values())
    assert document.count("<section>") == len(results) and document.count("<style>") == 1


def test_a_look_runs_no_model(results, monkeypatch):
    """Neither a forward pass nor a stage: what is shown was computed before."""
    import tl_jets.core.network
    import tl_jets.core.trace

    def refuse(*_, **__):
        raise AssertionError("the model was run")

    monkeypatch.setattr(torch.nn.Module, "__call__", refuse)
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    monkeypatch.setattr(tl_jets.core.network.ResidualNetwork, "trace", refuse)
    for name, result in results.items():
        if name != "jacobian" or "_contributions" not in result.__dict__:
            assert result._repr_html_()


def test_lenses_without_measures_or_control_say_so(results):
    bare, alone, detached = (
        results[f"iterative, {kind}"]._repr_html_() for kind in ("no measures", "no control", "detached")
    )
    assert "measures=True" in bare and "bluer" not in bare
    assert "No control" in alone and "bluer" in alone
    assert "detached" in detached
    assert "n/a" not in detached.split("<script>")[0].split("</style>")[1].replace("rho", "")


def test_a_lens_in_a_notebook_begins_with_its_verdict_and_the_layers_that_change():
    network = ResidualNetwork(deep_model())
    lens = tj.iterative_jet_lens(network, torch.tensor([[3, 1, 4, 1]]), order=1)
    shown = lens._repr_html_()
    assert all(line in html.unescape(shown) for line in lens.verdict().lines)
    assert "Shown: 12 of 21 layers" in shown
    for rows in Cells(shown).tables:
        labels = [row[0][0] for row in rows[1:]]
        assert len(labels) == 13 and labels[0] == "0_pre" and labels[-2:] == ["final_post", "model"]
    assert len(Cells(shown).tables) == 2


def deep_model():
    """Twenty random blocks."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(20, 8, 8, dtype=torch.float64, generator=generator)
    embedding = torch.randn(6, 8, dtype=torch.float64, generator=generator)
    W_U = torch.randn(8, 11, dtype=torch.float64, generator=generator)
    return tj.CallableModel(
        embed=lambda tokens: embedding[tokens],
        stages=[{f"{i}_mlp": lambda x, i=i: torch.tanh(x @ W[i])} for i in range(20)],
        decoder=tj.Decoder(tj.Norm("RMS"), W_U, torch.zeros(11, dtype=torch.float64)),
    )


def test_the_head_of_a_table_is_shown_and_the_rest_named():
    frame = pd.DataFrame(
        {"path": [f"a > {i}" for i in range(30)], "token": [" x"] * 30, "value": [i / 7 for i in range(30)]}
    )
    shown = dataframe_html(frame, rows=4, columns=2)
    (rows,) = Cells(shown).tables
    assert [[cell[0] for cell in row] for row in rows[1:]] == [[f"a > {i}", "\u00b7x"] for i in range(4)]
    assert "26 more rows and 1 more columns: to_dataframe()" in shown
    assert "more" not in dataframe_html(frame, rows=30)
    whole = pd.DataFrame(
        {"pos": [1.0, float("nan")], "n": [3, 4], "share": [0.5, 1.0], "best": [True, False], "none": [None, "x"]}
    )
    assert [[c[0] for c in row] for row in Cells(dataframe_html(whole)).tables[0][1:]] == [
        ["1", "3", "0.50", "True", ""],
        ["n/a", "4", "1.00", "False", "x"],
    ]


def test_a_page_joins_views_results_tables_figures_and_others(lenses, tmp_path):
    class Foreign:
        def _repr_html_(self):
            return "<em>foreign</em>"

    view = views.lens_table(lenses[0])
    joined = View.joined("Both", view, views.lens_table(lenses[1]))
    text = page("<T>", view, joined, lenses[1], lenses[0].average(), Foreign())
    assert text.count("<style>") == 1 and text.count("<script>") == 1 and text.count("<h1>&lt;T&gt;</h1>") == 1
    assert "<em>foreign</em>" in text and text.count(view.html) == 2
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"^\s*//.*$", "", text, flags=re.M))
    assert Page(text).addresses == []
    saved = view.save(tmp_path / "view.html")
    assert saved.read_text(encoding="utf-8") == view.page()
    assert view.page().count(view.title) == 2  # of the document, and its heading


def test_hostile_tokens_stay_text_in_views(lenses, network, trace):
    hostile = HostileTokenizer()
    iterative, joint = (zoo.renamed_tokens(lens, hostile) for lens in lenses)
    sums = tj.path_sums(network, trace)
    sums = replace(zoo.renamed_tokens(sums, hostile), target_names=[HOSTILE[1]], labels=HOSTILE[: len(sums.labels)])
    parts = [
        *(views.lens_table(iterative), views.lens_table(joint), views.lens_tokens(iterative), views.path_tokens(sums)),
        *(views.top_tokens(iterative), views.top_tokens(joint), iterative, joint, sums, iterative.to_dataframe()),
        View(HOSTILE[0], "<p></p>"),
    ]
    found = Page(page(HOSTILE[0], *parts))
    assert found.tags.count("script") == 1 and "img" not in found.tags and found.addresses == []
    assert not any(name.startswith("on") for name in found.attributes)
    shown = Cells(views.lens_table(iterative).html).tables[0]
    assert {cell[0].split("\n")[0].strip("[]") for cell in shown[-1][1:]} <= {visible(token) for token in HOSTILE}
    assert visible("\u202e") == "\\u202e" and visible("") == "\u2205"


def test_importing_is_light():
    """Neither matplotlib nor circuitsvis nor TransformerLens nor SciPy's statistics before they are needed."""
    code = (
        "import tl_jets, sys; tl_jets.views.lens_table, tl_jets.views.figures.measures;"
        "print([name for name in ('matplotlib', 'circuitsvis', 'transformer_lens', 'rich', 'scipy.stats') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
