"""Figures of paths, of n-grams over checkpoints, and of detached maps.

Example:
    See `tl_jets.views.figures`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tl_jets.detached_map import DetachedSpectra
from tl_jets.expansion.path_cache import PathCache
from tl_jets.expansion.path_statistics import MEASURES, PathStatistics
from tl_jets.studies import Track
from tl_jets.views.figures.axes import (
    COLORS,
    MARKERS,
    SMALL,
    depth_color,
    name_ticks,
    new_axes,
    new_panels,
    plain,
    short_legend,
)
from tl_jets.views.names import check_measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def path_shares(
    paths: PathStatistics | PathCache, *, measure: str = "share", top: int | None = 20, ax: Axes | None = None
) -> Figure:
    """How much paths (or sums of them) give, averaged over all real positions: bars, the largest first.

    Args:
        paths: Statistics by path, length, component or source, or a whole `PathCache`, whose statistics by path are taken. By
            length bars stay in the order of lengths.
        measure: `"share"` (of the model's logits), `"effect"` (on the first target's logit), `"norm"` or `"cosine"`.
        top: How many; None for all.
        ax: Axes to draw on; None for a new figure.

    Returns:
        The figure: means, orange above zero and blue below, with the standard deviation over positions where there are several.

    Raises:
        ValueError: There is no such measure, or top is below 1.
        ImportError: matplotlib is not installed.

    Cost:
        None for statistics.

    Example:
        >>> import tl_jets as tj
        >>> sums = tj.path_lengths(tj.load_tinydocs(), "This function is available on Unix and")
        >>> len(path_shares(sums).axes[0].patches)
        9
    """
    statistics = paths.statistics() if isinstance(paths, PathCache) else paths
    check_measure(measure, MEASURES)
    if top is not None and top < 1:
        raise ValueError(f"top must be 1 or more, or None for all; got {top}.")
    cells = getattr(statistics, measure)[:, statistics.valid].double()
    means = cells.nanmean(1)
    order = range(len(means))
    if statistics.by != "length":
        order = means.abs().argsort(descending=True, stable=True).tolist()
    order = list(order)[:top]
    values = means[order].tolist()
    spread = cells[order].std(1).tolist() if cells.shape[1] > 1 else None
    figure, ax = new_axes(ax, (5.5, 0.24 * len(order) + 0.9))
    colors = [COLORS[1] if value >= 0 else COLORS[0] for value in values]
    ax.barh(range(len(order)), values, xerr=spread, color=colors, height=0.7, error_kw={"lw": 0.8, "ecolor": "0.35"})
    ax.set_yticks(range(len(order)), [statistics.labels[i] for i in order], fontsize=SMALL, parse_math=False)
    ax.set_ylim(len(order) - 0.4, -0.6)
    ax.axvline(0, color="0.3", lw=0.8)
    what = {"share": "share of the model's logits", "effect": f"effect on {statistics.target_names[0]} (logits)"}
    ax.set_xlabel(what.get(measure, measure), fontsize=SMALL + 1, parse_math=False)
    if statistics.by == "length":
        ax.set_ylabel("number of writes", fontsize=SMALL + 1)
    hidden = f"the {len(order)} largest of {len(means):,}" if len(order) < len(means) else f"all {len(means):,}"
    ax.set_title(
        f"Paths{'' if statistics.by == 'path' else ' by ' + statistics.by}: {hidden}", fontsize=SMALL + 2, loc="left"
    )
    plain(ax)
    return figure


def learning_curves(track: Track, *, pairs: Sequence[str] | None = None) -> Figure:
    """Bi-grams over checkpoints: the hit ratio, and scores of given ones, which were tracked.

    Args:
        track: What `tl_jets.studies.track` found.
        pairs: Which of its bi-grams (as it names them) have lines of their own; None for the first six. Their mean over all
            is drawn, too.

    Returns:
        The figure: a panel for the hit ratio if there is a reference, one for the log-probabilities if there are bi-grams.
        Checkpoints that are numbers are on a scale of numbers.

    Raises:
        ValueError: There is no such bi-gram.
        ImportError: matplotlib is not installed.

    Source:
        Chen et al., arXiv 2410.06024, section 5.2.

    Cost:
        None.

    Example:
        >>> import tl_jets as tj
        >>> model = tj.load_tinydocs()
        >>> track = tj.studies.track({0: model, 1: model}, pairs=[(" more", " than")])
        >>> [line.get_label() for line in learning_curves(track).axes[0].lines]
        ['·more ·than', 'mean of all 1']
    """
    shown = list(track.pairs[: len(COLORS)] if pairs is None else pairs)
    unknown = [pair for pair in shown if pair not in track.pairs]
    if unknown:
        raise ValueError(f"pairs must be among those that were tracked, {track.pairs[:12]}; got {unknown}.")
    n_panels = (track.n > 0) + bool(track.pairs)
    figure, panels = new_panels(None, n_panels, (4.2, 2.8))
    numeric = all(isinstance(name, (int, float)) for name in track.checkpoints)
    x: list[Any] = list(track.checkpoints) if numeric else list(range(len(track.checkpoints)))
    if track.n:
        panel = panels[0]
        panel.plot(x, track.hit_ratio.tolist(), color=COLORS[0], marker="o", ms=4, label="hit ratio")
        panel.set_ylim(-0.03, 1.03)
        panel.set_ylabel(f"share of the reference's {track.n:,} best", fontsize=SMALL + 1)
    if track.pairs:
        panel = panels[-1]
        for i, pair in enumerate(shown):
            scores = track.scores[:, track.pairs.index(pair)].tolist()
            style: Any = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
            panel.plot(x, scores, lw=1.2, ms=4, label=pair, **style)
        mean = track.scores.mean(1).tolist()
        panel.plot(x, mean, color="0.1", lw=2, label=f"mean of all {len(track.pairs):,}")
        panel.set_ylabel("log-probability (nats)", fontsize=SMALL + 1)
        short_legend(panel, panel.lines, most=len(panel.lines))
    for panel in panels:
        if not numeric:
            panel.set_xticks(x, [str(name) for name in track.checkpoints], rotation=30, ha="right", parse_math=False)
        panel.set_xlabel("checkpoint", fontsize=SMALL + 1)
        panel.set_title(f"path {track.path}", fontsize=SMALL + 1, loc="left", parse_math=False)
        plain(panel)
    return figure


def spectra(spectra: DetachedSpectra) -> Figure:
    """Detached maps layer by layer: singular values, stable ranks, and what their directions explain.

    Args:
        spectra: What `tl_jets.detached_spectra` found.

    Returns:
        The figure, of three panels: the largest singular values of every map, from the first (dark) to the last (bright); stable
        ranks; the shares of the final stream and of the map's own write inside its left directions, with that of as many
        random directions (dashed).

    Raises:
        ImportError: matplotlib is not installed.

    Source:
        Golden, arXiv 2505.24293, figures 3 and 4; explained shares are ours.

    Cost:
        None.

    Example:
        >>> import tl_jets as tj
        >>> found = tj.detached_spectra(tj.load_tinydocs(), "available on", k=2, maps=[("embed", "1_pre"), ("embed", "2_pre")])
        >>> [len(panel.lines) for panel in spectra(found).axes]
        [2, 1, 3]
    """
    figure, (left, middle, right) = new_panels(None, 3, (3.3, 2.9))
    n_maps, k = spectra.values.shape
    shared = len(set(spectra.wrt)) == 1
    labels = spectra.outputs if shared else spectra.labels
    for i, values in enumerate(spectra.values.tolist()):
        left.plot(range(1, k + 1), values, color=depth_color(i, n_maps), lw=1.2, marker=".", label=labels[i])
    positive = [value for value in spectra.values.flatten().tolist() if value > 0]
    if positive and max(positive) > 10 * min(positive):
        left.set_yscale("log")
    short_legend(left, left.lines)
    left.set_xlabel("singular value", fontsize=SMALL + 1)
    left.set_title("size", fontsize=SMALL + 1, loc="left")
    # Maps are streams and writes in turn: a line through both would zigzag.
    middle.plot(range(n_maps), spectra.stable_rank.tolist(), color=COLORS[0], marker="o", ms=5, ls="none")
    middle.set_title("stable rank", fontsize=SMALL + 1, loc="left")
    middle.set_ylim(bottom=0)
    for values, label, color, marker in (
        (spectra.explained, "of the final stream", COLORS[0], "o"),
        (spectra.explained_own, "of its own write", COLORS[1], "s"),
    ):
        right.plot(range(n_maps), values.tolist(), color=color, marker=marker, ms=5, ls="none", label=label)
    right.axhline(spectra.chance, color="0.4", ls="--", lw=1, label=f"{k} random directions")
    right.set_title(f"share inside the {k} left directions", fontsize=SMALL + 1, loc="left")
    right.set_ylim(0, 1.5)  # room for the legend
    right.set_yticks([0, 0.5, 1])
    short_legend(right, right.lines)
    for panel in (middle, right):
        name_ticks(panel, labels)
    for panel in (left, middle, right):
        plain(panel)
    whose = f"maps from {spectra.wrt[0]}" if shared else "maps"
    figure.suptitle(f"Detached {whose}, position {spectra.position}", fontsize=SMALL + 2, x=0.01, ha="left")
    return figure
