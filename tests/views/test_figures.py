"""Figures: the numbers on their axes are those of the results, and tokens are text."""

from __future__ import annotations

import builtins
import io
import itertools
import math
import warnings
from dataclasses import replace

import color_vision
import pytest
import torch
import zoo

import tl_jets as tj
from tl_jets.core.tokens import visible
from tl_jets.views import figures
from tl_jets.views.figures import axes

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


@pytest.fixture(scope="module")
def iterative(network, trace):
    return tj.iterative_jet_lens(network, trace, order=2)


@pytest.fixture(scope="module")
def joint(network, trace):
    return tj.joint_jet_lens(network, trace)


def drawn(figure):
    """Draw it, and let no warning through: a figure that draws badly fails here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO(), format="png")  # not canvas.draw(), which does nothing once pyplot has let go of it
    return figure


def words(ax, n_columns):
    """The texts of a table's cells, by row."""
    texts = [text.get_text() for text in ax.texts]
    return [texts[start : start + n_columns] for start in range(0, len(texts), n_columns)]


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_a_joint_table_is_the_lens(joint):
    ax, bar = drawn(figures.lens_table(joint)).axes
    n = int(joint.valid[0].sum())
    found = joint.contributions(places=range(n))
    (image,) = ax.images
    assert torch.allclose(torch.tensor(image.get_array().data), found.values[..., 0])
    low, high = image.get_clim()
    assert -low == high == pytest.approx(float(found.values.abs().max()))  # zero in the middle
    name = lambda token: visible(zoo.text_of(joint, int(token)))  # noqa: E731
    shown = words(ax, n)
    assert shown[:-1] == [[name(token) for token in row] for row in found.indices[..., 0]]
    assert shown[-1] == [name(token) for token in joint.model_top_ids[0, :n]]
    labels = [
        f"{label}  {weight:.2f}" for label, weight in zip(joint.labels, joint.weights[:, 0, 1:n].mean(1), strict=True)
    ]
    assert ticks(ax.yaxis) == [*labels, "model"]
    assert ticks(ax.xaxis) == [f"{name(token)}\n{p}" for p, token in enumerate(joint.tokens[0, :n])]
    assert bar.get_ylabel() == "added to the logit of its token (centered)"


def test_the_largest_components_of_a_prompt(joint):
    ax, _ = drawn(figures.lens_table(joint, top=2, prompt=1, positions=[1])).axes
    largest = joint.weights[:, 1, 1].topk(2).indices.sort().values.tolist()
    assert [label.split("  ")[0] for label in ticks(ax.yaxis)] == [*(joint.labels[i] for i in largest), "model"]
    assert torch.allclose(
        torch.tensor(ax.images[0].get_array().data), joint.contributions(prompt=1, places=[1]).values[largest, ..., 0]
    )


@pytest.mark.parametrize("order", [0, 2])
def test_an_iterative_table_is_the_lens(iterative, order):
    ax, bar = drawn(figures.lens_table(iterative, order=order)).axes
    n = int(iterative.valid[0].sum())
    assert torch.allclose(torch.tensor(ax.images[0].get_array().data), iterative.kl[:, order, 0, :n])
    shown = words(ax, n)
    for i in range(len(iterative.labels)):
        for p in range(n):
            name = visible(zoo.text_of(iterative, int(iterative.top_ids[i, order, 0, p, 0])))
            assert shown[i][p] == (f"[{name}]" if iterative.borrowed[i, order, 0, p] else name)
    assert ticks(ax.yaxis) == [*iterative.labels, "model"] and "nats" in bar.get_ylabel()
    assert order == 0 or iterative.borrowed[:, order].any()


def test_words_are_legible_on_their_cells(joint):
    ax, _ = drawn(figures.lens_table(joint)).axes
    (image,) = ax.images

    def luminance(color):
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3])
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    for text in ax.texts[: image.get_array().size]:
        j, i = (round(x) for x in text.get_position())
        cell = luminance(image.cmap(image.norm(image.get_array()[i, j])))
        low, high = sorted([cell, luminance(matplotlib.colors.to_rgb(text.get_color()))])
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_a_lens_without_measures_has_no_colors(network, trace, iterative):
    bare = tj.iterative_jet_lens(network, trace, measures=False)
    figure = drawn(figures.lens_table(bare, order=1))
    assert len(figure.axes) == 1 and not figure.axes[0].images
    assert words(figure.axes[0], 5)[0][0] == visible(zoo.text_of(bare, int(bare.top_ids[0, 1, 0, 0, 0])))
    with pytest.raises(ValueError, match="needs them; this lens was run without"):
        figures.measures(bare)


def counted(lens):
    """Positions that averages are over: not BOS."""
    return lens.valid & (lens.tokens != 1)


def test_measures_stand_beside_their_controls(iterative):
    names = ["centered_cosine", "kl"]
    figure = drawn(figures.measures(iterative, names=names))
    for ax, name in zip(figure.axes, names, strict=True):
        assert len(ax.lines) == 2 * len(iterative.orders)
        for k in range(len(iterative.orders)):
            for line, kind in zip(ax.lines[2 * k : 2 * k + 2], (iterative.measures, iterative.control), strict=True):
                wanted = getattr(kind, name)[:, k][:, counted(iterative)].mean(1)
                kept = torch.tensor([not math.isnan(y) for y in line.get_ydata()])
                assert torch.allclose(torch.tensor(line.get_ydata(), dtype=wanted.dtype)[kept], wanted[kept])
                assert bool(kept.all()) or (ax.get_yscale() == "log" and float(wanted[~kept].max()) < 1e-6)
            assert (ax.lines[2 * k].get_linestyle(), ax.lines[2 * k + 1].get_linestyle()) == ("-", "--")
            assert ax.lines[2 * k].get_color() == ax.lines[2 * k + 1].get_color()
        assert ticks(ax.xaxis) == iterative.labels
    legend = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
    assert legend == ["order 0", "order 1", "order 2", "control"]


def test_measures_against_the_order(iterative):
    ax, *_ = drawn(figures.measures(iterative, names=["cosine"], against="order")).axes
    assert [line.get_label() for line in ax.lines[::2]] == iterative.labels and ticks(ax.xaxis) == ["0", "1", "2"]
    for i, line in enumerate(ax.lines[::2]):
        wanted = iterative.cosine[i][:, counted(iterative)].mean(1)
        assert torch.allclose(torch.tensor(line.get_ydata()), wanted)


def test_measures_without_a_control_and_of_a_joint_lens(network, trace, joint):
    alone = tj.iterative_jet_lens(network, trace, order=1, seed=None)
    assert all(len(ax.lines) == 2 for ax in drawn(figures.measures(alone)).axes)
    ax, *_ = drawn(figures.measures(joint, names=["kl"])).axes
    kinds = (joint.measures, joint.uniform, joint.control, joint.control_uniform)
    assert [bar.get_height() for bar in ax.patches] == pytest.approx(
        [float(kind.kl[counted(joint)].mean()) for kind in kinds]
    )
    assert ticks(ax.xaxis) == ["weighted", "uniform", "control", "control\nuniform"]
    assert len({bar.get_facecolor() for bar in ax.patches}) == 4


def test_the_caller_sets_scale_and_legend(iterative):
    from matplotlib.figure import Figure

    panels = Figure().subplots(1, 2, sharey=True)
    for ax in panels:
        drawn(figures.measures(iterative, names=["kl"], against="order", ax=ax, log=True, legend=False))
        assert ax.get_yscale() == "log" and ax.get_legend() is None and ticks(ax.xaxis) == ["0", "1", "2"]
    (ax,) = drawn(figures.measures(iterative, names=["kl"], log=False)).axes
    assert ax.get_yscale() == "linear" and ax.get_legend() is not None
    assert list(ax.lines[0].get_ydata()) == pytest.approx(iterative.kl[:, 0][:, counted(iterative)].mean(1).tolist())
    figures.measures(iterative, names=["kl"], log=False, ax=panels[0])
    assert panels[0].get_yscale() == "linear"
    panels[0].set_yscale("log")  # the axes' own scale, too, is the caller's
    close = replace(iterative, measures=iterative.measures.map(torch.ones_like), control=None)
    figures.measures(close, names=["remainder_norm"], ax=panels[0])
    assert panels[0].get_yscale() == "log"
    ax, other = drawn(figures.measures(iterative, names=["cosine", "kl"], log=True)).axes
    assert (ax.get_yscale(), other.get_yscale()) == ("linear", "log")


def test_a_logarithmic_axis_leaves_out_what_is_zero(iterative):
    assert iterative.labels[-1] == "final_post" and float(iterative.kl[-1].nan_to_num().max()) < 1e-6
    solid = lambda ax: [line.get_label() for line in ax.lines if line.get_label() != "control"]  # noqa: E731
    kl, cosine = drawn(figures.measures(iterative, names=["kl", "cosine"], against="order", log=True)).axes
    assert solid(kl) == iterative.labels[:-1] and len(kl.lines) == 2 * len(solid(kl))
    named = {text.get_text(): line for text, line in zip(*_legend(cosine), strict=True)}
    assert list(named) == [*iterative.labels, "control"] == [*solid(cosine), "control"]  # all that any panel shows
    for line in kl.lines[::2]:  # of the same color everywhere
        assert line.get_color() == named[line.get_label()].get_color()
    (kl,) = drawn(figures.measures(iterative, names=["kl"], against="order", log=True)).axes
    assert [text.get_text() for text in _legend(kl)[0]] == [*iterative.labels[:-1], "control"]
    (kl,) = drawn(figures.measures(iterative, names=["kl"], against="order", log=False)).axes
    assert solid(kl) == iterative.labels


def _legend(ax):
    return ax.get_legend().get_texts(), ax.get_legend().get_lines()


def test_dose_responses(network, trace):
    jet = tj.ablation_effect(network, trace, ["0_mlp", "1_attn"], order=2, doses=[0.25, 0.5])
    ax, *_ = drawn(figures.dose_responses(jet, steps=["1_attn"])).axes
    first, second, truth = ax.lines
    assert [line.get_label() for line in ax.lines] == ["order 1", "order 2", "truth"]
    assert truth.get_xdata().tolist() == [0, 0.25, 0.5, 1]
    assert truth.get_ydata().tolist() == pytest.approx(
        [0, *jet.truth[:, 1].mean((1, 2, 3)).tolist(), float(jet.centered[1].mean())]
    )
    assert first.get_ydata()[-1] == pytest.approx(float(jet.coefficients[0, 1].mean()))
    assert second.get_ydata()[25] == pytest.approx(
        float((jet.coefficients[0, 1] / 2 + jet.coefficients[1, 1] / 4).mean())
    )
    assert "1_attn" in ax.get_title("left") and "centered" not in ax.get_ylabel()
    assert len(figures.dose_responses(jet, top=2).axes) == 2
    with pytest.raises(ValueError, match="steps must be of '0_mlp', '1_attn'; got"):
        figures.dose_responses(jet, steps=["L0H1"])


def test_path_shares(network, trace):
    sums = tj.path_sums(network, trace)
    ax, *_ = drawn(figures.path_shares(sums, measure="effect", top=4)).axes
    cells = sums.effect[:, sums.valid & ~sums.sinks.mask]
    order = cells.mean(1).abs().argsort(descending=True)[:4].tolist()
    assert ticks(ax.yaxis) == [sums.labels[i] for i in order]
    assert [bar.get_width() for bar in ax.patches] == pytest.approx(cells[order].mean(1).tolist())
    colors = {matplotlib.colors.to_hex(bar.get_facecolor()): bar.get_width() > 0 for bar in ax.patches}
    assert list(colors.values()) in ([True], [False], [True, False], [False, True])  # a color a sign
    assert "4 largest of" in ax.get_title(loc="left") and "logits" in ax.get_xlabel()
    lengths = tj.path_lengths(network, trace)
    ax, *_ = drawn(figures.path_shares(lengths)).axes
    assert ticks(ax.yaxis) == lengths.labels
    widths = [bar.get_width() for bar in ax.patches]
    shares = lengths.share[:, lengths.valid & ~lengths.sinks.mask]
    assert widths == pytest.approx(shares.mean(1).tolist()) and sum(widths) == pytest.approx(1)
    one = tj.exponential_expansion(network, linearize="detached")(trace, positions=1)
    ax, *_ = drawn(figures.path_shares(one, top=3)).axes
    assert len(ax.patches) == 3


def test_bands_are_the_intervals_over_prompts(network):
    prompts = ["a b c d", "a b", "c d a", "b b d", "d c", "a d"]
    iterative, joint = tj.iterative_jet_lens(network, prompts, order=2), tj.joint_jet_lens(network, prompts)
    table = iterative.average(spread=True).query("order == 1")
    ax, *_ = drawn(figures.measures(iterative, names=["cosine"])).axes
    assert len(ax.collections) == 2 * len(iterative.orders)
    outline = ax.collections[2].get_paths()[0].vertices[:, 1]
    assert outline.min() == pytest.approx(table["cosine_low"].min())
    assert outline.max() == pytest.approx(table["cosine_high"].max())
    spread = joint.average(spread=True)
    ax, *_ = drawn(figures.measures(joint, names=["kl"])).axes
    ends = [[segment[0, 1], segment[1, 1]] for segment in ax.collections[0].get_segments()]
    assert torch.allclose(torch.tensor(ends), torch.tensor(spread[["kl_low", "kl_high"]].to_numpy()))
    few = tj.iterative_jet_lens(network, prompts[:5], order=1)
    assert not drawn(figures.measures(few, names=["cosine"])).axes[0].collections  # five prompts have no interval


@pytest.mark.parametrize("n_layers", [3, 30, 80])
def test_names_of_ticks_do_not_overlap(n_layers):
    """Slanted names stand apart by more than their height, on a panel of the size of those of `measures`."""
    figure, (ax,) = axes.new_panels(None, 1, (3.1, 2.5))
    ax.plot(range(n_layers), range(n_layers))
    axes.name_ticks(ax, [f"{i}_pre" for i in range(n_layers)])
    drawn(figure)
    places = [label.get_window_extent() for label in ax.get_xticklabels()]
    apart = (places[1].x1 - places[0].x1) * math.sin(math.radians(40))
    assert len(places) > 2 and apart > figure.dpi * axes.SMALL / 72


def test_attributions_add_up_and_stand_beside_ablations(model, network, trace):
    joint = tj.joint_jet_lens(network, trace, linearize="detached", targets=["w5", "w7"])
    ablations = tj.ablation_effect(network, trace, targets=["w7"], positions=[-2, -1])
    (ax,) = drawn(figures.attributions(joint, ablations, cell=(0, 3, 1), top=4)).axes
    effects = joint.effects[:, 0, 3, 1]
    widths = [bar.get_width() for bar in ax.patches]
    order = effects.abs().argsort(descending=True)[:4].tolist()
    assert ticks(ax.yaxis) == [*(joint.labels[i] for i in order), f"{len(effects) - 4} others"]
    assert widths[:4] == pytest.approx(effects[order].tolist()) and sum(widths) == pytest.approx(float(effects.sum()))
    logits = model(trace.tokens[:1])[0, 3].double()
    token = int(joint.target_ids[0, 3, 1])
    assert sum(widths) == pytest.approx(float(logits[token] - logits.mean()), abs=1e-4)  # by the model itself
    diamonds = next(line for line in ax.lines if line.get_marker() == "D")
    marks = {joint.labels[order[int(i)]]: x for x, i in zip(*diamonds.get_data(), strict=True) if i < 4}
    for label, lost in marks.items():
        hooked = model.run_with_hooks(
            trace.tokens[:1], fwd_hooks=tj.ablation_hooks(network, label.removesuffix("_out"))
        )[0, 3].double()
        assert lost == pytest.approx(float(logits[token] - logits.mean() - hooked[token] + hooked.mean()), abs=1e-4)
    assert marks and "w7" in ax.get_xlabel()
    with pytest.raises(ValueError, match="cell must be indices of prompt, read position and target within"):
        figures.attributions(joint, cell=(0, 9, 0))
    with pytest.raises(ValueError, match="cell must be at a real position"):
        figures.attributions(joint, cell=(1, 0 if not bool(joint.valid[1, 0]) else -1, 0))
    with pytest.raises(ValueError, match=r"none is of ' ?w7' at position 1 of prompt 0"):
        figures.attributions(joint, ablations, cell=(0, 1, 1))


def test_directions_are_decoded(network):
    found = tj.detached_spectra(network, "a b c", k=3)
    ax, bar = drawn(figures.directions(found, vectors=2, words=3)).axes
    frame = found.to_dataframe(k=3).query("vector < 2")
    wanted = [" ".join(visible(word) for word in row) for row in frame["top_tokens"]]
    assert [text.get_text() for text in ax.texts] == wanted and ticks(ax.yaxis) == found.outputs
    assert ax.images[0].get_array().ravel().tolist() == pytest.approx(frame["relative"].tolist())
    assert bar.get_ylim() == (0, 1)
    with pytest.raises(ValueError, match="a loaded result is without"):
        figures.directions(replace(found, trace=None))


def test_learning_curves(network):
    pairs = [(3, 5), (5, 3), (7, 9)]
    found = tj.studies.track(
        {0: network, 10: network, 100: network}, pairs=pairs, reference="last", n=5, progress=False
    )
    found = replace(found, scores=torch.randn(3, 3).double(), hit_ratio=torch.tensor([0.2, 0.4, 1.0]).double())
    hits, scores = drawn(figures.learning_curves(found, pairs=found.pairs[1:])).axes
    assert (
        list(hits.lines[0].get_xdata()) == [0, 10, 100] and list(hits.lines[0].get_ydata()) == found.hit_ratio.tolist()
    )
    assert [line.get_label() for line in scores.lines] == [*found.pairs[1:], "mean of all 3"]
    for line, wanted in zip(scores.lines, [*found.scores.T[1:], found.scores.mean(1)], strict=True):
        assert list(line.get_ydata()) == pytest.approx(wanted.tolist())
    named = replace(found, checkpoints=["a", "b", "$c"], n=0)
    (only,) = drawn(figures.learning_curves(named)).axes
    assert ticks(only.xaxis) == ["a", "b", "$c"] and len(only.lines) == 4
    with pytest.raises(ValueError, match="pairs must be among those that were tracked"):
        figures.learning_curves(found, pairs=["no such"])


def test_learning_curves_of_several_paths(network):
    given = {"pairs": [(3, 5), (5, 3), (7, 9)], "reference": "last", "n": 5, "progress": False}
    tracks = tj.studies.track_by_path({0: network, 10: network, 100: network}, **given)
    assert len(tracks) > 2
    for i, path in enumerate(tracks):
        drawn_ = {"scores": torch.randn(3, 3).double(), "hit_ratio": torch.rand(3).double()}
        tracks[path] = replace(tracks[path], **drawn_, hit_control=torch.rand(3, 4 if i else 0).double())
    names = tracks["mlps"].pairs
    groups = {"some": names[:2], "$a_{1$": names[2:]}
    hits, *scores = drawn(figures.learning_curves(tracks, pairs=groups, log=True)).axes
    solid = [line for line in hits.lines if line.get_linestyle() == "-"]
    dashed = [line for line in hits.lines if line.get_linestyle() == "--"]
    assert [line.get_label() for line in solid] == list(tracks)
    for line, track in zip(solid, tracks.values(), strict=True):
        assert list(line.get_ydata()) == pytest.approx(track.hit_ratio.tolist())
    assert [line.get_color() for line in dashed] == [line.get_color() for line in solid[1:]]
    for line, track in zip(dashed, list(tracks.values())[1:], strict=True):
        assert list(line.get_ydata()) == pytest.approx(track.hit_control.mean(1).tolist())
    assert [text.get_text() for text in hits.get_legend().get_texts()] == [*tracks, "control"]
    for panel, (name, group) in zip(scores, groups.items(), strict=True):
        assert panel.get_title(loc="left") == name and [line.get_label() for line in panel.lines] == list(tracks)
        for line, track in zip(panel.lines, tracks.values(), strict=True):
            assert list(line.get_ydata()) == pytest.approx(
                track.scores[:, [names.index(x) for x in group]].mean(1).tolist()
            )
    # Zero has a place, and steps that double are apart by the same.
    at = hits.transData.transform([(x, 0) for x in (0, 10, 100, 1000)])[:, 0]
    assert at[0] < at[1] and at[2] - at[1] == pytest.approx(at[3] - at[2])
    many = {f"path {i}": tracks["mlps"] for i in range(14)}
    drawn_, *_ = drawn(figures.learning_curves(many)).axes
    assert len({(line.get_color(), line.get_marker()) for line in drawn_.lines if line.get_marker() != "None"}) == 14
    for wrong in (
        {"mlps": replace(tracks["mlps"], checkpoints=["a", "b", "c"])},
        replace(tracks["mlps"], checkpoints=[-1, 0, 1]),
    ):
        with pytest.raises(ValueError, match="On a logarithmic scale checkpoints must be numbers from 0 up"):
            figures.learning_curves(wrong, log=True)
    with pytest.raises(ValueError, match="at least one path; got none"):
        figures.learning_curves({})


def test_spectra(network):
    found = tj.detached_spectra(network, "a b c", k=3)
    size, rank, share = drawn(figures.spectra(found)).axes
    assert [list(line.get_ydata()) for line in size.lines] == found.values.tolist()
    assert list(rank.lines[0].get_ydata()) == found.stable_rank.tolist()
    shown = [list(line.get_ydata()) for line in share.lines]
    assert shown[:2] == [found.explained.tolist(), found.explained_own.tolist()] and shown[2] == [found.chance] * 2


def test_tokens_are_no_formulas(iterative, joint, network, trace):
    class Formulas:
        def decode(self, ids):
            return "$a_{1$" * len(ids)

    hostile = Formulas()
    sums = tj.path_sums(network, trace)
    sums = replace(zoo.renamed_tokens(sums, hostile), target_names=["$a_{1$"], labels=["$a_{1$"] * len(sums.labels))
    for figure in (
        figures.lens_table(zoo.renamed_tokens(joint, hostile)),
        figures.lens_table(zoo.renamed_tokens(iterative, hostile)),
        figures.path_shares(sums, measure="effect"),
        figures.lens_table(replace(joint, labels=["$a_{1$"] * len(joint.labels))),
        figures.measures(
            replace(iterative, labels=[f"$a_{{{i}$" for i in range(len(iterative.labels))]), against="order"
        ),
    ):
        drawn(figure)  # a broken formula would raise


def test_colors_are_told_apart_by_every_kind_of_color_vision():
    assert color_vision.lab("#ff0000", "normal") == pytest.approx([53.24, 80.09, 67.20], abs=0.01)  # as tables have it
    for kind in color_vision.KINDS:  # gray stays gray
        assert color_vision.lab("#808080", kind) == pytest.approx([53.585, 0, 0], abs=0.01)
    for red, green in (("#ff0000", "#008000"), ("#d62728", "#2ca02c"), ("#a94442", "#3c763d")):
        assert color_vision.distance(red, green) < 12, "what must not pass does not"
    assert min(itertools.starmap(color_vision.distance, itertools.combinations(axes.COLORS, 2))) > 15
    low, below, middle, above, high = axes.BELOW_TO_ABOVE
    assert color_vision.distance(low, high) > 60 and color_vision.distance(below, above) > 60
    assert min(color_vision.distance(middle, color) for color in (low, below, above, high)) > 25


def test_given_axes_are_drawn_on_and_pyplot_holds_nothing(iterative, network, trace):
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    before = plt.get_fignums()
    own = Figure()
    ax = own.subplots()
    assert figures.measures(iterative, names=["kl"], ax=ax) is own and ax.lines
    assert figures.path_shares(tj.path_sums(network, trace), ax=own.add_subplot()) is own
    figures.lens_table(iterative)
    assert plt.get_fignums() == before  # else a notebook shows them twice
    with pytest.raises(ValueError, match="for a single one"):
        figures.measures(iterative, ax=ax)


def test_without_matplotlib_one_sentence_says_so(iterative, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'^Figures need matplotlib, .*: pip install "tl-jets\[plots\]"\.$'):
        figures.measures(iterative)


def test_scores_of_heads_are_those_of_the_result(network):
    found = tj.studies.head_scores(network, layers=[1], length=4, n_tokens=9, observe=1, progress=False)
    panels = [panel for panel in drawn(figures.head_scores(found)).axes if panel.get_title(loc="left")]
    grids = [found.copied, found.previous_token, *found.observed.values()]
    assert len(panels) == len(grids) == 5
    for panel, grid in zip(panels, grids, strict=True):
        assert torch.allclose(torch.tensor(panel.images[0].get_array().data), grid)
        low, high = panel.images[0].get_clim()
        assert low <= float(grid.min()) and float(grid.abs().max()) <= high + 1e-12
        assert ticks(panel.yaxis) == ["1"] and panel.get_xlabel() == "head"
