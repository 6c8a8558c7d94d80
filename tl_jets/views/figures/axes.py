"""Shared matplotlib code: axes, colors, legends, and tables of text cells; matplotlib is imported on first use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tl_jets.core.markup import largest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008), without black and yellow; one marker for each.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
BELOW_TO_ABOVE = ("#1c66a8", "#6fb0e0", "#ffffff", "#f5a34a", "#9c4f00")
NEAR_TO_FAR = ("#3182c4", "#6fb0e0", "#ffffff")
SMALL = 8  # points
FAR = 10.0  # nats; values counted from 0 have no color beyond this


def pyplot() -> Any:
    """matplotlib.pyplot, imported on first use; ImportError with a remedy if it is not installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('Figures need matplotlib, which is not installed: pip install "tl-jets[plots]".') from error
    return plt


def new_panels(ax: Axes | None, n: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """N plain axes side by side, each of this size in inches, or the given one; ValueError if it is to hold several."""
    plt = pyplot()
    if n < 1 or (ax is not None and n > 1):
        raise ValueError(f"A figure has a panel at least, and ax= is for a single one; {n} panels are asked for.")
    if ax is None:
        figure, axes = plt.subplots(1, n, figsize=(n * size[0], size[1]), layout="constrained", squeeze=False)
        # Closed, because pyplot shows its open figures at the end of a cell: the returned one would appear twice.
        plt.close(figure)
    else:
        figure, axes = ax.figure, [[ax]]  # type: ignore[assignment]
    for panel in axes[0]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=SMALL)
    return figure, list(axes[0])  # type: ignore[return-value]


def name_axes(ax: Axes, title: str = "", *, x: str = "", y: str = "") -> None:
    """Title, and names of the axes, where given; legible, and not read as mathematics."""
    style: Any = {"fontsize": SMALL + 1, "parse_math": False}
    if title:
        ax.set_title(legible(title), loc="left", **style)
    if x:
        ax.set_xlabel(legible(x), **style)
    if y:
        ax.set_ylabel(legible(y), **style)


def small_legend(ax: Axes, **options: Any) -> None:
    """A small legend of what is labelled, if anything is."""
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize=SMALL - 1, frameon=False, **options)


def legible(text: str) -> str:
    r"""Text with characters that the figure's fonts lack as escapes, such as `\u65e5`.

    To see them, put a font that has them into `matplotlib.rcParams["font.family"]`: `["DejaVu Sans", "Noto Sans CJK JP"]`.
    """
    if text.isascii():
        return text
    import matplotlib
    from matplotlib import font_manager

    families = [font_manager.FontProperties(family=[name]) for name in matplotlib.rcParams["font.family"]]
    fonts = [font_manager.get_font(font_manager.findfont(family)) for family in families]
    drawn = (c.isascii() or any(font.get_char_index(ord(c)) for font in fonts) for c in text)
    return "".join(
        c if is_drawn else c.encode("unicode_escape").decode() for c, is_drawn in zip(text, drawn, strict=True)
    )


def color_map(colors: Sequence[str]) -> Any:
    """A color map between these colors."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("tl_jets", colors)


def depth_color(index: int, n: int) -> Any:
    """The color of one of n layers, from dark to bright."""
    import matplotlib

    return matplotlib.colormaps["cividis"](0.92 * index / max(n - 1, 1))


def short_legend(
    ax: Axes, lines: Sequence[Any], extra: Sequence[Any] = (), *, most: int = 6, outside: bool = False
) -> None:
    """A legend of lines: of more than `most`, only the first, middle and last; then the `extra` ones."""
    lines = list(lines) if len(lines) <= most else [lines[0], lines[len(lines) // 2], lines[-1]]
    place: Any = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if outside else {}
    for entry in ax.legend(handles=[*lines, *extra], fontsize=SMALL - 1, frameon=False, **place).get_texts():
        entry.set_parse_math(False)
        entry.set_text(legible(entry.get_text()))


def sign_colors(values: Sequence[float]) -> list[str]:
    """Orange from zero up, blue below."""
    return [COLORS[1] if value >= 0 else COLORS[0] for value in values]


def named_bars(
    ax: Axes,
    names: Sequence[str],
    values: Sequence[float],
    *,
    colors: Any = None,
    intervals: Sequence[tuple[float, float]] | None = None,
    **style: Any,
) -> Any:
    """Horizontal bars, the first on top, with their names and intervals (none of NaN); colors of the sign by default."""
    spread: Any = None
    if intervals is not None:
        spread = [[max(value - low, 0.0) for value, (low, _) in zip(values, intervals, strict=True)]]
        spread += [[max(high - value, 0.0) for value, (_, high) in zip(values, intervals, strict=True)]]
    errors = {"xerr": spread, "error_kw": {"lw": 0.8, "ecolor": "0.35"}}
    colors = sign_colors(values) if colors is None else colors
    bars = ax.barh(range(len(values)), values, color=colors, height=0.7, **errors, **style)
    name_rows(ax, names)
    return bars


def name_rows(ax: Axes, names: Sequence[str]) -> None:
    """Names of horizontal bars, the first on top, and a line at zero."""
    ax.set_yticks(range(len(names)), [legible(name) for name in names], fontsize=SMALL, parse_math=False)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.axvline(0, color="0.3", lw=0.8)


def name_ticks(ax: Axes, names: Sequence[str], most: int = 12) -> None:
    """Slanted names along the horizontal axis; every n-th if there are too many."""
    step = -(-len(names) // most)
    places = range(0, len(names), step)
    shown = [names[i] for i in places]
    ax.set_xticks(list(places), shown, rotation=40, ha="right", rotation_mode="anchor", parse_math=False)


def draw_cells(
    ax: Axes, texts: list[list[str]], values: list[list[float]] | None, *, diverging: bool, bar: str
) -> None:
    """Draw a table of texts on colored cells, with a color bar.

    Args:
        ax: Axes to draw on.
        texts: One list per row; rows beyond those of `values` have no color.
        values: Values of the colors; None for no colors.
        diverging: Whether colors diverge at zero, or start at 0 (blue).
        bar: Label of the color bar.
    """
    from matplotlib.colors import Normalize, PowerNorm

    n_rows, n_columns = len(texts), len(texts[0])
    colors: dict[tuple[int, int], Any] = {}
    if values is not None:
        top = largest(value for row in values for value in row)
        cmap = color_map(BELOW_TO_ABOVE if diverging else NEAR_TO_FAR)
        norm = Normalize(-top, top) if diverging else PowerNorm(0.5, 0.0, min(top, FAR), clip=True)
        image = ax.imshow(values, cmap=cmap, norm=norm, aspect="auto", interpolation="nearest")
        shown = ax.figure.colorbar(
            image, ax=ax, pad=0.01, aspect=30, extend="neither" if diverging or top <= FAR else "max"
        )
        shown.set_label(bar, fontsize=SMALL)
        shown.ax.tick_params(labelsize=SMALL - 1)
        shown.outline.set_visible(False)
        colors = {(i, j): cmap(norm(value)) for i, row in enumerate(values) for j, value in enumerate(row)}
    ax.set_xlim(-0.5, n_columns - 0.5)
    ax.set_ylim(n_rows - 0.5, -0.5)
    for i, row in enumerate(texts):
        for j, word in enumerate(row):
            ink = _ink(colors.get((i, j), (1.0, 1.0, 1.0, 1.0)))
            ax.text(
                j, i, legible(word), ha="center", va="center", fontsize=SMALL, color=ink, parse_math=False, clip_on=True
            )
    for spine in ax.spines.values():
        spine.set_visible(False)


def _ink(color: Sequence[float]) -> str:
    """Black or white, whichever has the higher contrast on a color (WCAG relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "white"
