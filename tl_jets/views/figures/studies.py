"""Figures of studies: masses of n-grams and their changes, roles, promoters of tokens, sketches, scores of heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tl_jets.core.options import check_choice, check_integers
from tl_jets.views.figures.axes import COLORS, SMALL, draw_cells, name_axes, named_bars, new_panels, small_legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tl_jets.studies import HeadScores, Mass, MassChange, Promoters, Roles, Sketch

WIDTH, BAR = 4.6, 0.24  # inches


def masses(found: Mass | Mapping[str, Mass], *, log: bool = False, ax: Axes | None = None) -> Figure:
    """Masses of lists as bars with 95% intervals; in gray the central 95% of shuffled lists.

    Args:
        found: A result of `tl_jets.studies.mass`, or several by name: of paths, of lists.
        log: Whether the axis is logarithmic.
        ax: Axes to draw on; None for a new figure.

    Raises:
        ValueError: There is no mass, or the masses are of different kinds (`weight`, `reduce`).

    Example:
        >>> import tl_jets as tj
        >>> pairs = [(" more", " than"), (" such", " as"), (" has", " been")]
        >>> found = {path: tj.studies.mass(tj.load_tinydocs(), pairs, path=path) for path in ("direct", "mlps")}
        >>> len(masses(found).axes[0].patches)
        2
    """
    named = dict(found) if isinstance(found, Mapping) else {found.path: found}
    kinds = {(each.reduce, each.weight) for each in named.values()}
    if len(kinds) != 1:
        raise ValueError(f"Masses of one figure must be of one kind, one at least; got {sorted(kinds)}.")
    ((reduce, weight),) = kinds
    figure, (ax,) = new_panels(ax, 1, (WIDTH, BAR * len(named) + 0.9))
    values = [each.value for each in named.values()]
    named_bars(ax, list(named), values, intervals=[each.interval for each in named.values()], colors=COLORS[0])
    _controls(ax, [each.control_interval for each in named.values()], COLORS[1], "shuffled lists", 0.0)
    if log:
        ax.set_xscale("log")
    name_axes(ax, x=f"{reduce} of {weight}")
    small_legend(ax, loc="best")
    return figure


def mass_changes(found: MassChange, *, model: str | None = None) -> Figure:
    """Changes of masses as bars with paired 95% intervals, beside the central 95% of each kind of control list.

    Args:
        found: Result of `tl_jets.studies.mass_change`.
        model: Model whose changes are drawn; None for the last.

    Returns:
        A panel of bi-grams, and one of words of one token, as there are: their sizes are not to be compared.

    Raises:
        ValueError: Unknown model.

    Example:
        >>> import tl_jets as tj
        >>> models = {"docs": tj.load_tinydocs(), "code": tj.load_tinycode()}
        >>> found = tj.studies.mass_change(models, {"prose": [(" more", " than"), (" such", " as")]}, controls=5)
        >>> [panel.get_title(loc="left") for panel in mass_changes(found).axes]
        ['bi-grams: code less docs']
    """
    check_choice("model", model, [None, *found.models[1:]])
    model = model or found.models[-1]
    frame = found.to_dataframe()
    frame = frame[frame["model"] == model]
    kinds = list(dict.fromkeys(frame["kind"]))
    figure, panels = new_panels(None, len(kinds), (WIDTH, 0.42 * max(frame["kind"].value_counts()) + 1.1))
    for panel, kind in zip(panels, kinds, strict=True):
        own = frame[frame["kind"] == kind]
        names = [f"{name} ({size})" for name, size in zip(own["list"], own["size"], strict=True)]
        named_bars(panel, names, own["change"].tolist(), intervals=list(zip(own["low"], own["high"], strict=True)))
        for place, control in enumerate(found.controls):
            ends = list(zip(own[f"{control}_low"], own[f"{control}_high"], strict=True))
            _controls(panel, ends, COLORS[2 + place], control.replace("_", " "), 0.25 * (place - 1))
        title, change = f"{kind}: {model} less {found.models[0]}", f"change of the {found.reduce}, path {found.path}"
        name_axes(panel, title, x=change)
    small_legend(panels[0], loc="best")
    return figure


def roles(found: Roles, *, ax: Axes | None = None) -> Figure:
    """Shares of best bi-grams that paths have in common, as a table; a text's, if counts were given.

    Args:
        found: Result of `tl_jets.studies.roles`.
        ax: Axes to draw on; None for a new figure.

    Example:
        >>> import tl_jets as tj
        >>> figure = roles(tj.studies.roles(tj.load_tinydocs(), n=20, progress=False))
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['direct', '0_mlp', '1_mlp', '2_mlp', '3_mlp', 'mlps']
    """
    n = len(found.labels)
    few = n <= 16  # numbers that can be read
    figure, (ax,) = new_panels(ax, 1, (min(0.5 * n + 1.6, 9.0), min(0.32 * n + 1.0, 7.5)))
    values = found.overlap.tolist()
    # A table and itself have no color: they would hide the others.
    shown = [[0.0 if i == j else value for j, value in enumerate(row)] for i, row in enumerate(values)]
    texts = [[f"{value:.2f}" if few and i != j else "" for j, value in enumerate(row)] for i, row in enumerate(values)]
    draw_cells(ax, texts, shown, diverging=True, bar="share of bi-grams in common")
    ax.images[0].colorbar.ax.set_ylim(0.0, ax.images[0].get_clim()[1])  # type: ignore[union-attr]
    ax.set_yticks(range(n), found.labels, fontsize=SMALL, parse_math=False)
    ax.set_xticks(range(n), found.labels, fontsize=SMALL, rotation=90, parse_math=False)
    name_axes(ax, f"The {found.n} best bi-grams of each path")
    return figure


def promoters(found: Promoters, *, top: int = 10) -> Figure:
    """The components of each kind with the largest scores, beside their own scores of control sets.

    Args:
        found: Result of `tl_jets.studies.search`.
        top: Number of components of each kind.

    Returns:
        A panel per kind; gray lines are the central 95% of control sets, filled bars those whose `chance` is below 5%.

    Raises:
        ValueError: top is below 1.

    Example:
        >>> import tl_jets as tj
        >>> found = tj.studies.search(tj.load_tinydocs(), [" file", " files"], controls=20, progress=False)
        >>> [len(panel.patches) for panel in promoters(found, top=5).axes]
        [5, 4, 5]
    """
    check_integers(1, top=top)
    frames = {kind: found.top(top, kind) for kind in found.counts}  # type: ignore[arg-type]
    figure, panels = new_panels(None, len(frames), (3.1, BAR * max(map(len, frames.values())) + 0.9))
    for panel, (kind, frame) in zip(panels, frames.items(), strict=True):
        named_bars(panel, frame["component"].tolist(), frame["score"].tolist())
        for bar, chance in zip(panel.patches, frame["chance"], strict=True):
            bar.set_alpha(1.0 if chance < 0.05 else 0.35)
        ends = list(zip(frame["control_low"], frame["control_high"], strict=True))
        _controls(panel, ends, "0.25", "control sets", 0.0)
        name_axes(panel, f"{found.counts[kind]:,} {kind}s", x="effect in own units")
    small_legend(panels[-1], loc="best")
    return figure


def sketch(found: Sketch, *, top: int = 12) -> Figure:
    """Perplexity on the held-out text and KL to the model of every predictor, and the weights of components.

    Args:
        found: Result of `tl_jets.studies.sketch`.
        top: Number of components, largest weights first.

    Raises:
        ValueError: top is below 1.

    Example:
        >>> import tl_jets as tj
        >>> model = tj.load_tinydocs()
        >>> texts = model.to_tokens(["Return the number of bytes.", "Raise an error if not."])[:, :6]
        >>> found = tj.studies.sketch(model, texts[:1], texts[1:], paths=["direct", "mlps"], layers=[], progress=False)
        >>> [panel.get_xlabel() for panel in sketch(found).axes]
        ['perplexity', 'KL from the model (nats)', 'weight']
    """
    check_integers(1, top=top)
    frame, weights = found.to_dataframe(), found.weights_dataframe()
    weights = weights.sort_values("weight", ascending=False, kind="stable").head(top)
    figure, panels = new_panels(None, 3, (3.4, BAR * max(len(frame), len(weights)) + 0.9))
    colors = ["0.3" if name == "model" else COLORS[0] if name == "sketch" else "0.7" for name in frame["predictor"]]
    names, shuffled = frame["predictor"].tolist(), weights["shuffled"].tolist()
    named_bars(panels[0], names, frame["perplexity"].tolist(), colors=colors)
    panels[0].set_xscale("log")
    named_bars(panels[1], [""] * len(names), frame["kl"].tolist(), colors=colors)
    named_bars(panels[2], weights["component"].tolist(), weights["weight"].tolist(), colors=COLORS[0])
    panels[2].plot(shuffled, range(len(weights)), "D", ms=4, mfc="none", mec="0.3", label="shuffled tokens")
    for panel, name in zip(panels, ("perplexity", "KL from the model (nats)", "weight"), strict=True):
        name_axes(panel, x=name)
    small_legend(panels[2], loc="lower right")
    return figure


def head_scores(scores: HeadScores) -> Figure:
    """Scores of every head, one panel each of layers by heads: first from the weights, then what was observed.

    Args:
        scores: Result of `tl_jets.studies.head_scores`.

    Returns:
        The figure; titles of scores from the weights have the mean of their control in brackets.

    Example:
        >>> import tl_jets as tj
        >>> found = tj.studies.head_scores(tj.load_tinydocs(), n_tokens=64, length=8, progress=False)
        >>> [panel.get_title(loc="left") for panel in head_scores(found).axes[:1]]
        ['copied (control 0.01)']
    """
    grids = {
        f"copied (control {float(scores.copied_control.mean()):.2f})": scores.copied,
        f"previous token (control {scores.previous_token_control:.2f})": scores.previous_token,
    }
    grids |= {f"observed: {name.replace('_', ' ')}": grid for name, grid in scores.observed.items()}
    figure, panels = new_panels(None, len(grids), (2.6, 3.4))
    for panel, (title, grid) in zip(panels, grids.items(), strict=True):
        # Copying in a run is in logits and has both signs; the others are shares.
        size = float(grid.abs().max()) or 1.0
        signed = bool((grid < 0).any())
        colors = {"cmap": "RdBu_r" if signed else "cividis", "vmin": -size if signed else 0.0, "vmax": size}
        image = panel.imshow(grid.tolist(), aspect="auto", interpolation="nearest", **colors)
        figure.colorbar(image, ax=panel, shrink=0.7).ax.tick_params(labelsize=SMALL)
        step = -(-len(scores.layers) // 16)
        panel.set_yticks(range(0, len(scores.layers), step), [str(layer) for layer in scores.layers[::step]])
        name_axes(panel, title, x="head", y="layer" if panel is panels[0] else "")
    return figure


def _controls(ax: Axes, ends: list[tuple[float, float]], color: str, label: str, shift: float) -> None:
    """Horizontal lines of control intervals across the bars, `shift` of a bar's place lower; none of NaN."""
    known = [(i + shift, low, high) for i, (low, high) in enumerate(ends) if low == low]
    for i, low, high in known:
        ax.plot([low, high], [i, i], color=color, lw=2.2, marker="|", ms=5, label=label if i == known[0][0] else None)
