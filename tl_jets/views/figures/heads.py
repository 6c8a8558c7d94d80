"""Figures of scores of heads: layers by heads, from the weights and observed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tl_jets.views.figures.axes import SMALL, new_panels, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tl_jets.studies import HeadScores


def head_scores(scores: HeadScores) -> Figure:
    """Scores of every head, one panel each of layers by heads: first from the weights, then what was observed.

    Args:
        scores: Result of `tl_jets.studies.head_scores`.

    Returns:
        The figure; titles of scores from the weights have the mean of their control in brackets.

    Raises:
        ImportError: matplotlib is not installed.

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
        panel.set_title(title, fontsize=SMALL + 1, loc="left")
        step = -(-len(scores.layers) // 16)
        panel.set_yticks(range(0, len(scores.layers), step), [str(layer) for layer in scores.layers[::step]])
        panel.set_xlabel("head", fontsize=SMALL + 1)
        plain(panel)
    panels[0].set_ylabel("layer", fontsize=SMALL + 1)
    return figure
