"""Views and figures of flows: their numbers are those of the results; open effects and attention sinks are marked."""

from __future__ import annotations

import io
import itertools
import warnings
from dataclasses import replace

import pytest
import torch

import tl_jets as tj
from tl_jets.core.numerals import signed
from tl_jets.views import figures
from tl_jets.views.figures import axes
from tl_jets.views.flow_cells import grids

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


@pytest.fixture(scope="module")
def flow(network):
    hooks = tj.ablation_hooks(network, "0_mlp")
    return tj.flow(network, ["w3 w4 w5 w6", "w6 w7 w8"], hooks, targets=[4, 5], by_position=True, tolerance=0.05)


@pytest.fixture(scope="module")
def joint(network):
    return tj.joint_flow(network, "w3 w4 w5 w6", ["L0H1", "1_mlp", "L2H0"], targets=5, controls=2)


def drawn(figure):
    """Draw it; a warning, of a missing glyph say, fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO(), format="png")
    return figure


def opened(result):
    return replace(result, tolerance=1e-30)


def test_grids_add_up_to_the_flows(network, flow):
    for cell in ((0, -1, 0), (1, 0, 1)):
        kinds = {grid.kind: grid for grid in grids(flow, cell)}
        assert set(kinds) == {"attn", "mlp"} and kinds["attn"].rows == kinds["mlp"].rows == ["0", "1", "2"]
        assert kinds["mlp"].values.shape == (3, int((flow.prompt_tokens[cell[:2]] >= 0).sum()))
        for label, value in zip(flow.labels, flow.flow[(slice(None), *cell)], strict=True):
            layer, kind = label.split("_")[:2]
            assert torch.allclose(kinds[kind].values[int(layer)].sum(), value), label
        assert not bool(kinds["attn"].values[0].any())  # it is before the ablation
    with pytest.raises(ValueError, match="within"):
        grids(flow, (2, 0, 0))
    heads = tj.flow(
        network, "w3 w4 w5 w6", tj.ablation_hooks(network, "0_mlp"), granularity="head", by_position=True, nodes=4
    )
    whole = tj.flow(network, "w3 w4 w5 w6", tj.ablation_hooks(network, "0_mlp"), by_position=True, nodes=4)
    for one, other in zip(grids(heads, (0, 0, 0)), grids(whole, (0, 0, 0)), strict=True):
        assert one.rows == other.rows and torch.allclose(one.values, other.values)


def test_a_table_and_a_heatmap_hold_the_flows(flow):
    cell = (1, 0, 1)
    view, positions = tj.views.flow_table(flow, cell=cell, top=3), tj.views.flow_heatmap(flow, cell=cell)
    values = flow.flow[(slice(None), *cell)]
    for i in values.abs().argsort(descending=True)[:3].tolist():
        assert flow.labels[i] in view.html and f">{signed(values[i])}<" in view.html
    assert view.html.count("<tr>") == 4 and "0_mlp_out (edited)" in tj.views.flow_table(flow, cell=cell, top=None).html
    for grid in grids(flow, cell):
        assert all(f">{signed(value)}<" in positions.html for value in grid.values.flatten().tolist())
    assert f"{float(flow.effect[cell]):+.3g}" in view.title
    assert "Flow by layer and position" in flow._repr_html_() and "of 4 effects" in flow._repr_html_()


def test_an_open_effect_shows_no_flow(flow, joint):
    for view in (tj.views.flow_table, tj.views.flow_heatmap):
        html = view(opened(flow)).html
        assert "OPEN: gap" in html and "<table" not in html
    assert "<table" not in opened(flow)._repr_html_() and "OPEN" in opened(flow)._repr_html_()
    assert "<table" not in opened(joint)._repr_html_() and "OPEN" in opened(joint)._repr_html_()
    for figure in (figures.flow_bars(opened(flow)), figures.joint_shares(opened(joint))):
        assert figure.axes[0].get_title(loc="left").startswith("OPEN: gap") and figure.axes[0].patches[0].get_hatch()
    assert "OPEN: gap" in figures.flow_heatmap(opened(flow)).get_suptitle()


def test_a_joint_table_holds_shares_and_controls(joint):
    html = joint._repr_html_()
    for i, label in enumerate(joint.labels):
        assert label in html and f">{signed(joint.share[i])}<" in html and f">{signed(joint.single[i])}<" in html
    assert f"2 random sets of the same layers: {signed(joint.control.mean())} in the mean".lower() in html.lower()


def test_bars_are_the_largest_flows_and_sinks_are_light(flow):
    values = flow.flow[:, 0, -1, 0]
    ax = drawn(figures.flow_bars(flow, top=4)).axes[0]
    order = values.abs().argsort(descending=True)[:4].tolist()
    assert [bar.get_width() for bar in ax.patches] == pytest.approx(values[order].tolist())
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [flow.labels[i] for i in order]
    assert ax.get_xlim()[0] == -ax.get_xlim()[1] and ax.patches[0].get_alpha() == 1
    at_sinks = replace(flow, prompt_sinks=torch.ones_like(flow.prompt_sinks))
    ax = figures.flow_bars(at_sinks, top=4).axes[0]
    assert ax.patches[0].get_alpha() < 1 and "light: at attention sinks" in ax.get_xlabel()
    with pytest.raises(ValueError, match="top must be 1 or more"):
        figures.flow_bars(flow, top=0)


def test_a_heatmap_has_the_flows_and_marks_sinks(flow):
    sink = replace(flow, prompt_sinks=torch.zeros_like(flow.prompt_sinks).index_fill(-1, torch.tensor([0]), True))
    figure = drawn(figures.flow_heatmap(sink))
    for panel, grid in zip(figure.axes, grids(flow, (0, -1, 0)), strict=False):
        assert torch.allclose(torch.tensor(panel.images[0].get_array().tolist()).double(), grid.values)
        assert [tick.get_text().endswith("\u2020") for tick in panel.get_xticklabels()] == [True, *[False] * 4]
    scales = {panel.images[0].get_clim() for panel in figure.axes[:2]}
    assert len(scales) == 1 and sum(scales.pop()) == 0


def test_joint_shares_stand_beside_singles(joint):
    ax = drawn(figures.joint_shares(joint)).axes[0]
    order = joint.share[:, 0, 0, 0].abs().argsort(descending=True).tolist()
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == pytest.approx([*joint.share[order, 0, 0, 0].tolist(), *joint.single[order, 0, 0, 0].tolist()])
    lines = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"]
    assert lines == pytest.approx((joint.control[:, 0, 0, 0] / 3).tolist())


def test_thirty_layers_and_any_script_are_legible(network):
    """No ticks overlap, and no glyph is missing."""
    labels = [f"{layer}_{kind}_out" for layer in range(30) for kind in ("attn", "mlp")]
    n, length = len(labels), 24
    texts = {i: text for i, text in enumerate(["\u65e5\u672c", "\U0001f600", " \u05e9\u05dc", "caf\u00e9"] * 6)}
    by_position = torch.randn(n, 1, 1, 1, length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = torch.arange(length).view(1, 1, -1)
    base = tj.flow(network, "w3 w4 w5 w6", tj.ablation_hooks(network, "0_mlp"), targets=4)
    parts = {name: by_position.sum(-1) for name in ("flow", "edit", "direct")}
    real = replace(
        base,
        **parts,
        labels=labels,
        by_position=by_position,
        prompt_tokens=tokens,
        prompt_sinks=tokens < 1,
        token_names=base.token_names | texts,
    )
    assert axes.legible("caf\u00e9 \u65e5") == "caf\u00e9 \\u65e5"
    for figure in (drawn(figures.flow_heatmap(real)), drawn(figures.flow_bars(real))):
        canvas = matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
        canvas.draw()
        for panel in figure.axes:
            for ticks in (panel.get_yticklabels(), panel.get_xticklabels()):
                boxes = [tick.get_window_extent(canvas.get_renderer()) for tick in ticks if tick.get_text()]
                pairs = itertools.pairwise(boxes)
                assert not any(one.overlaps(other) for one, other in pairs), panel.get_title(loc="left")


def test_a_graph_shows_the_largest_edges(network):
    hooks = tj.ablation_hooks(network, "0_mlp")
    found = tj.flow(network, ["w3 w4 w5 w6", "w6 w7 w8"], hooks, targets=[4, 5], edges=True, tolerance=0.05)
    (ax,) = drawn(figures.flow_graph(found, target=1, top=7)).axes
    table = found.edges()
    table = table[table["target"] == found.token_names[5]].groupby(["writer", "reader"])["flow"].mean()
    table = table.reindex(table.abs().sort_values(ascending=False).index)
    assert len(ax.patches) == 7
    widths = [patch.get_linewidth() for patch in ax.patches][::-1]  # the largest is drawn last
    sizes = table.abs().tolist()[:7]
    assert widths == pytest.approx([0.4 + 3.2 * size / sizes[0] for size in sizes])
    colors = [matplotlib.colors.to_hex(patch.get_edgecolor()).upper() for patch in ax.patches][::-1]
    assert colors == [axes.COLORS[1] if value > 0 else axes.COLORS[0] for value in table.tolist()[:7]]
    names = {text.get_text() for text in ax.texts}
    assert names == {node.removesuffix("_out") for edge in table.index[:7] for node in edge}
    edited = [line for line in ax.lines if line.get_markeredgewidth() > 0]
    assert len(edited) == 1  # where the intervention acts
    share = sum(sizes) / table.abs().sum()
    assert f"{share:.0%} of all" in ax.get_title(loc="left")
    heads = tj.flow(network, "w3 w4 w5 w6", hooks, granularity="head", edges=True, tolerance=0.05)
    (ax,) = drawn(figures.flow_graph(heads, top=60)).axes
    at = [tuple(float(x[0]) for x in line.get_data()) for line in ax.lines]
    assert len(set(at)) == len(at)  # heads of a layer stand apart
    with pytest.raises(ValueError, match="top must be an integer >= 1"):
        figures.flow_graph(found, top=0)
    with pytest.raises(ValueError, match="edges"):
        figures.flow_graph(tj.flow(network, "w3 w4 w5 w6", hooks, tolerance=0.05))
