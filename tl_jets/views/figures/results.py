"""Figures of paths, of n-grams over checkpoints, and of detached maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tl_jets.core.options import check_choice, check_integers
from tl_jets.core.protocol import some
from tl_jets.core.tokens import visible
from tl_jets.detached_map import DetachedSpectra
from tl_jets.interventions.ablation_jets import AblationJet
from tl_jets.paths.cache import PathCache
from tl_jets.paths.statistics import MEASURES, PathStatistics
from tl_jets.studies import Track
from tl_jets.views.figures.axes import (
    COLORS,
    MARKERS,
    SMALL,
    depth_color,
    draw_cells,
    name_axes,
    name_ticks,
    named_bars,
    new_panels,
    short_legend,
)
from tl_jets.views.names import largest_first, shown_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def path_shares(
    paths: PathStatistics | PathCache, *, measure: str = "share", top: int | None = 20, ax: Axes | None = None
) -> Figure:
    """Bars of mean contributions of paths over positions, with standard deviations, largest first.

    Attention sinks (`statistics.sinks`) are left out, as in `PathStatistics.average`, unless nothing else is there.

    Args:
        paths: Statistics by path, component, source, or length (bars stay in order), or a whole `PathCache`.
        measure: `"share"` (of the model's logits), `"effect"` (on the first target's logit), `"norm"` or `"cosine"`.
        top: Number of bars; None for all.
        ax: Axes to draw on; None for a new figure.

    Raises:
        ValueError: Unknown measure, or top is below 1.

    Example:
        >>> import tl_jets as tj
        >>> sums = tj.path_lengths(tj.load_tinydocs(), "This function is available on Unix and")
        >>> len(path_shares(sums).axes[0].patches)
        9
    """
    statistics = paths.statistics() if isinstance(paths, PathCache) else paths
    check_choice("measure", measure, MEASURES)
    cells = getattr(statistics, measure)[:, statistics.counted].double()
    means = cells.nanmean(1)
    order = largest_first(means, top)
    if statistics.by == "length":
        order = list(range(len(order)))
    values = means[order].tolist()
    spread = cells[order].std(1).tolist() if cells.shape[1] > 1 else None
    figure, (ax,) = new_panels(ax, 1, (5.5, 0.24 * len(order) + 0.9))
    ends = None if spread is None else [(x - d, x + d) for x, d in zip(values, spread, strict=True)]
    named_bars(ax, [statistics.labels[i] for i in order], values, intervals=ends)
    unit = f"effect on {statistics.target_names[0]} ({statistics.unit})"
    what = {"share": "share of the model's logits", "effect": unit}.get(measure, measure)
    by = "" if statistics.by == "path" else f" by {statistics.by}"
    name_axes(
        ax,
        f"Paths{by}: {shown_of(len(order), len(means))}",
        x=what,
        y="number of writes" if statistics.by == "length" else "",
    )
    return figure


def dose_responses(
    jet: AblationJet, *, steps: Sequence[str] | None = None, top: int = 3, ax: Axes | None = None
) -> Figure:
    """Effects along the dose of ablations, a panel each: series of every order against the truth, means over all cells.

    Args:
        jet: What `ablation_effect` gives with an `order`; its `doses` are the points of the truth, beside 0 and 1.
        steps: Labels of the ablations to draw; None for those with the largest effects.
        top: Number of panels, if `steps` is None.
        ax: Axes to draw on, of a single ablation; None for a new figure.

    Raises:
        ValueError: Unknown or no steps, or several on given axes.

    Example:
        >>> import tl_jets as tj
        >>> prompt = "This function is available on Unix and"
        >>> jet = tj.ablation_effect(tj.load_tinydocs(), prompt, ["3_mlp", "L2H1"], order=2, doses=[0.5])
        >>> [line.get_label() for line in dose_responses(jet, steps=["3_mlp"]).axes[0].lines]
        ['order 1', 'order 2', 'truth']
    """
    found = [jet.labels[i] for i in largest_first(jet.centered.flatten(1).mean(1), top)]
    chosen = found if steps is None else list(steps)
    unknown = [step for step in chosen if step not in jet.labels]
    if unknown:
        raise ValueError(f"steps must be of {some(jet.labels)}; got {unknown}.")
    figure, axes = new_panels(ax, len(chosen), (3.0, 2.6))
    grid = [i / 50 for i in range(51)]
    for step, panel in zip(chosen, axes, strict=True):
        i = jet.labels.index(step)
        for order in range(1, jet.order + 1):
            curve = [float(jet.series(dose, order)[i].mean()) for dose in grid]
            panel.plot(grid, curve, color=COLORS[(order - 1) % len(COLORS)], lw=1.2, label=f"order {order}")
        truth = [0.0, *jet.truth[:, i].flatten(1).mean(1).tolist(), float(jet.centered[i].mean())]
        panel.plot([0.0, *jet.doses, 1.0], truth, color="0.15", ls="none", marker="o", ms=4, label="truth")
        top_value = max(map(abs, truth)) or 1.0
        panel.set_ylim(-2 * top_value, 2 * top_value)  # a diverging series leaves the panel
        converges = "" if bool(jet.converges[i].all()) else ": does not converge"
        name_axes(panel, f"{step}{converges}", x="dose")
    name_axes(axes[0], y=f"effect on {jet.target_names[0]} ({jet.unit})")
    short_legend(axes[0], axes[0].lines)
    return figure


def learning_curves(
    track: Track | Mapping[str, Track],
    *,
    pairs: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    log: bool = False,
) -> Figure:
    """Hit ratios with their controls, and log-probabilities of the tracked bi-grams, over checkpoints.

    Args:
        track: Result of `tl_jets.studies.track` (one path) or `track_by_path` (several).
        pairs: One path: bi-grams with lines of their own beside the mean of all; None for the first six. Several paths:
            bi-grams that each path's mean is taken over; None for all. A mapping of groups gives a panel each.
        log: Logarithmic scale of numeric checkpoints that includes zero, for steps that double.

    Returns:
        A panel of hit ratios if there is a reference (dashed: shuffled), and panels of log-probabilities (nats).

    Raises:
        ValueError: Unknown bi-gram, no path, or a logarithmic scale for checkpoints that are not numbers from 0 up.

    Source: Chen et al., arXiv 2410.06024, section 5.2.

    Example:
        >>> import tl_jets as tj
        >>> model = tj.load_tinydocs()
        >>> track = tj.studies.track({0: model, 1: model}, pairs=[(" more", " than")])
        >>> [line.get_label() for line in learning_curves(track).axes[0].lines]
        ['·more ·than', 'mean of all 1']
    """
    is_one = isinstance(track, Track)
    tracks = {track.path: track} if isinstance(track, Track) else dict(track)
    if not tracks:
        raise ValueError("learning_curves draws the tracks of at least one path; got none.")
    first = next(iter(tracks.values()))
    title = f"path {first.path}" if is_one else "by path"
    if pairs is None:
        pairs = first.pairs[: len(COLORS)] if is_one else first.pairs
    groups = _groups(first, pairs if isinstance(pairs, Mapping) else {title: pairs})
    numeric = all(isinstance(name, (int, float)) for name in first.checkpoints)
    x: list[Any] = list(first.checkpoints) if numeric else list(range(len(first.checkpoints)))
    if log and not (numeric and min(x) >= 0 and max(x) > 0):
        raise ValueError(f"On a logarithmic scale checkpoints must be numbers from 0 up; got {first.checkpoints[:12]}.")
    figure, panels = new_panels(None, (first.n > 0) + len(groups), (4.2, 2.8))
    if first.n:
        _hit_ratios(panels[0], x, {"hit ratio": first} if is_one else tracks)
        name_axes(panels[0], title)
    for panel, (name, group) in zip(panels[first.n > 0 :], groups.items(), strict=True):
        if is_one:
            _curves(panel, x, {first.pairs[i]: first.scores[:, i] for i in group})
            panel.plot(x, first.scores.mean(1).tolist(), color="0.1", lw=2, label=f"mean of all {len(first.pairs):,}")
        else:
            _curves(panel, x, {path: each.scores[:, group].mean(1) for path, each in tracks.items()})
        name_axes(panel, name, y="log-probability (nats)")
        short_legend(panel, panel.lines, most=len(panel.lines))
    for panel in panels:
        _checkpoint_axis(panel, x, log, [] if numeric else [str(name) for name in first.checkpoints])
    return figure


def _checkpoint_axis(panel: Axes, x: list[Any], log: bool, names: list[str]) -> None:
    """Scale and name the horizontal axis."""
    if log:
        panel.set_xscale("symlog", linthresh=min(step for step in x if step > 0), linscale=0.3)
    if names:
        panel.set_xticks(x, names, rotation=30, ha="right", parse_math=False)
    name_axes(panel, x="checkpoint")


def _groups(track: Track, pairs: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """Places of each group's bi-grams among those that were tracked; none if none were."""
    unknown = [pair for group in pairs.values() for pair in group if pair not in track.pairs]
    if unknown:
        raise ValueError(f"pairs must be among those that were tracked, {track.pairs[:12]}; got {unknown}.")
    groups = pairs.items() if track.pairs else ()
    return {name: [track.pairs.index(pair) for pair in group] for name, group in groups}


def _hit_ratios(panel: Axes, x: list[Any], tracks: Mapping[str, Track]) -> None:
    """Draw hit ratios by label, and the means of their controls (dashed)."""
    _curves(panel, x, {label: track.hit_ratio for label, track in tracks.items()})
    lines = list(panel.lines)
    for line, track in zip(lines, tracks.values(), strict=True):
        if track.hit_control.shape[1]:
            panel.plot(x, track.hit_control.mean(1).tolist(), ls="--", lw=1, color=line.get_color(), label="control")
    short_legend(panel, lines, panel.lines[len(lines) :][:1], most=len(lines))
    panel.set_ylim(bottom=-0.03 * panel.get_ylim()[1])
    name_axes(panel, y=f"share of the reference's {next(iter(tracks.values())).n:,} best")


def _curves(panel: Axes, x: list[Any], curves: Mapping[str, Tensor]) -> None:
    """Draw lines over checkpoints by label; six colors and six markers give 36 distinct lines."""
    for i, (label, values) in enumerate(curves.items()):
        marker = MARKERS[(i + i // len(COLORS)) % len(MARKERS)]
        panel.plot(x, values.tolist(), lw=1.2, ms=4, color=COLORS[i % len(COLORS)], marker=marker, label=label)


def spectra(spectra: DetachedSpectra) -> Figure:
    """Detached maps layer by layer: singular values, stable ranks, and what their directions explain.

    Args:
        spectra: Result of `tl_jets.detached_spectra`.

    Returns:
        The figure, of three panels: largest singular values of every map, from the first (dark) to the last (bright);
        stable ranks; shares of the final stream and of the map's own write inside its left directions, with the share
        inside as many random directions (dashed).

    Source: Golden, arXiv 2505.24293, figures 3 and 4; explained shares are ours.

    Example:
        >>> import tl_jets as tj
        >>> found = tj.detached_spectra(tj.load_tinydocs(), "available on", k=2, maps=[("embed", "1_pre"), ("embed", "2_pre")])
        >>> [len(panel.lines) for panel in spectra(found).axes]
        [2, 1, 3]
    """
    figure, (left, middle, right) = new_panels(None, 3, (3.3, 2.9))
    n_maps, k = spectra.values.shape
    labels, whose = _maps(spectra)
    for i, values in enumerate(spectra.values.tolist()):
        left.plot(range(1, k + 1), values, color=depth_color(i, n_maps), lw=1.2, marker=".", label=labels[i])
    positive = [value for value in spectra.values.flatten().tolist() if value > 0]
    if positive and max(positive) > 10 * min(positive):
        left.set_yscale("log")
    left.set_ylim(top=left.get_ylim()[1] * (8 if left.get_yscale() == "log" else 1.5))  # room for the legend
    short_legend(left, left.lines)
    name_axes(left, "size", x="singular value")
    # Maps alternate between streams and writes: a line would zigzag.
    middle.plot(range(n_maps), spectra.stable_rank.tolist(), color=COLORS[0], marker="o", ms=5, ls="none")
    name_axes(middle, "stable rank")
    middle.set_ylim(bottom=0)
    for values, label, color, marker in (
        (spectra.explained, "of the final stream", COLORS[0], "o"),
        (spectra.explained_own, "of its own write", COLORS[1], "s"),
    ):
        right.plot(range(n_maps), values.tolist(), color=color, marker=marker, ms=5, ls="none", label=label)
    right.axhline(spectra.chance, color="0.4", ls="--", lw=1, label=f"{k} random directions")
    name_axes(right, f"share inside the {k} left directions")
    right.set_ylim(0, 1.5)  # room for the legend
    right.set_yticks([0, 0.5, 1])
    short_legend(right, right.lines)
    for panel in (middle, right):
        name_ticks(panel, labels)
    figure.suptitle(f"Detached {whose}, position {spectra.position}", fontsize=SMALL + 2, x=0.01, ha="left")
    return figure


def directions(spectra: DetachedSpectra, *, vectors: int = 3, words: int = 2) -> Figure:
    """What the leading left directions of every map say: the tokens that each raises most, colored by singular value.

    Args:
        spectra: Result of `tl_jets.detached_spectra`.
        vectors: Number of directions of each map, largest first.
        words: Number of tokens of each direction.

    Raises:
        ValueError: The result was loaded, and has no model that decodes (`with_model`), or a number is below 1.

    Source: Golden, arXiv 2505.24293, tables of decoded singular vectors.

    Example:
        >>> import tl_jets as tj
        >>> found = tj.detached_spectra(tj.load_tinydocs(), "available on", k=2, maps=[("embed", "1_pre"), ("embed", "2_pre")])
        >>> len(directions(found, vectors=2).axes[0].texts)
        4
    """
    check_integers(1, vectors=vectors, words=words)
    frame = spectra.to_dataframe(k=words)
    frame = frame[frame["vector"] < vectors]
    if frame["top_tokens"].isna().any():
        raise ValueError(
            "Directions are decoded by the model; a loaded result is without. Take with_model(model, prompt)."
        )
    rows = [own for _, own in frame.groupby(["wrt", "output"], sort=False)]
    texts = [[" ".join(visible(str(word)) for word in found) for found in own["top_tokens"]] for own in rows]
    width = max(len(text) for row in texts for text in row)
    figure, (ax,) = new_panels(None, 1, ((0.085 * width + 0.3) * len(texts[0]) + 2.2, 0.27 * len(rows) + 0.8))
    draw_cells(
        ax, texts, [own["relative"].tolist() for own in rows], diverging=True, bar="singular value, of the largest"
    )
    figure.axes[-1].set_ylim(0, 1)  # singular values have no sign
    labels, whose = _maps(spectra)
    ax.set_yticks(range(len(rows)), labels, fontsize=SMALL, parse_math=False)
    ax.set_xticks(range(len(texts[0])), [str(i) for i in range(len(texts[0]))], fontsize=SMALL)
    ax.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    name_axes(ax, f"Directions of detached {whose}, position {spectra.position}")
    return figure


def _maps(spectra: DetachedSpectra) -> tuple[list[str], str]:
    """Names of the maps, and what they are maps of, in words."""
    shared = len(set(spectra.wrt)) == 1
    return (spectra.outputs, f"maps from {spectra.wrt[0]}") if shared else (spectra.labels, "maps")
