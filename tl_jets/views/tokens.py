"""The prompt's tokens, colored: by layer for a lens, by path for path statistics, by position for a detached map.

One strip of tokens per row. Under each token stands its number; colors diverge at zero (orange above, blue below) or
show closeness to the model (bluer is closer). Hover shows the rest.

Example:
    >>> import tl_jets as tj
    >>> lens = tj.iterative_jet_lens(tj.load_tinydocs(), "This function is available on Unix and", order=1)
    >>> lens_tokens(lens, measure="centered_cosine").title
    'Iterative jet lens by token: centered cosine, order 1'
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import pandas as pd

from tl_jets.core.decoder import in_unit
from tl_jets.core.markup import cell, diverging, largest, rising, row_head, table, text, token
from tl_jets.core.measures import MEASURES
from tl_jets.core.numerals import number, precise
from tl_jets.core.options import check_choice
from tl_jets.core.selection import positions_of
from tl_jets.core.tokens import visible
from tl_jets.detached_map import DetachedJacobian
from tl_jets.lenses import IterativeJetLens
from tl_jets.paths.cache import PathCache
from tl_jets.paths.statistics import MEASURES as PATH_MEASURES
from tl_jets.paths.statistics import PathStatistics
from tl_jets.views.lens_tables import describe, measured, order_index
from tl_jets.views.names import MEASURE_NAMES, check_prompt, counted_of, largest_first, of_prompts, places_of
from tl_jets.views.pages import View

Contribution = Literal["share", "norm"]
_SIGNS = "Orange is above zero, blue below. "


def lens_tokens(
    lens: IterativeJetLens,
    *,
    measure: str = "kl",
    order: int | None = None,
    prompt: int = 0,
    positions: Sequence[int] | None = None,
) -> View:
    """The prompt's tokens, one strip per layer, colored by a measure of closeness, with its control in brackets.

    Args:
        lens: A lens run with measures.
        measure: `"kl"` (nats), `"cosine"`, `"centered_cosine"`, `"remainder_norm"` or `"top1_agreement"`.
        order: Order; None for the lens' highest.
        prompt: Index of the prompt.
        positions: Positions in the prompt, among those of the lens; None for all real ones.

    Raises:
        TypeError: It is not an iterative lens.
        ValueError: The lens has no measures, or measure, order, prompt or position are unknown.
    """
    if not isinstance(lens, IterativeJetLens):
        raise TypeError(
            f"Tokens are colored by layer, of an iterative lens; got {type(lens).__name__}. For a joint lens use lens_table."
        )
    check_choice("measure", measure, MEASURES)
    if lens.measures is None:
        raise ValueError("Tokens are colored by a measure; this lens was run without. Run it with measures=True.")
    places, k = places_of(lens, prompt, positions), order_index(lens, order)
    names = lens.token_names
    rows = []
    for i, label in enumerate(lens.labels):
        chips = []
        for p in places:
            at = (i, k, prompt, p)
            chips.append(_chip(names[int(lens.tokens[prompt, p])], *measured(lens, measure, at), describe(lens, at)))
        rows.append([row_head(text(label)), _strip(chips)])
    control = "No control: run the lens with a seed."
    control = control if lens.control is None else "In (round) brackets: a random center."
    title = f"Iterative jet lens by token: {MEASURE_NAMES[measure]}, order {lens.orders[k]}{of_prompts(lens, prompt)}"
    caption = f"What is read after each token, a layer a row; bluer is closer to the model. {control}"
    return View(title, table(["layer", "tokens"], rows, caption=caption))


def path_tokens(
    paths: PathStatistics | PathCache,
    *,
    measure: str = "effect",
    top: int | None = 12,
    prompt: int = 0,
    positions: Sequence[int] | None = None,
) -> View:
    """The prompt's tokens, one strip per path (or length, component or source), colored by its contribution.

    Args:
        paths: `PathStatistics`, or a whole `PathCache` (cost: a product with the unembedding).
        measure: `"effect"` (on the centered logit of the first target), `"share"`, `"norm"` or `"cosine"`.
        top: Number of parts to show, those with the largest mean absolute measure outside attention sinks; None for all in order.
        prompt: Index of the prompt.
        positions: Positions in the prompt, among those of the result; None for all real ones.

    Raises:
        ValueError: Unknown measure, prompt or position, or top is below 1.

    Example:
        >>> import tl_jets as tj
        >>> path_tokens(tj.path_sums(tj.load_tinydocs(), "is available on"), top=3).title
        'Paths by component: effect on <answer>, the 3 largest of 8'
    """
    statistics = paths.statistics() if isinstance(paths, PathCache) else paths
    check_choice("measure", measure, PATH_MEASURES)
    places = places_of(statistics, prompt, positions)
    values = getattr(statistics, measure)[:, prompt, places].double()
    counted = [places.index(place) for place in counted_of(statistics, prompt, places)]
    chosen = largest_first(values[:, counted].abs().nanmean(1), top)
    if len(chosen) == len(statistics.labels):
        chosen.sort()
    names = statistics.token_names
    scale = largest(value for i in chosen for value in values[i].tolist())
    rows = []
    for i in chosen:
        chips = []
        for value, p in zip(values[i].tolist(), places, strict=True):
            at = (i, prompt, p)
            lines = [f"{statistics.labels[i]}, position {positions_of(statistics.positions, prompt)[p]}"]
            lines += [f"{name} {precise(float(getattr(statistics, name)[at]))}" for name in ("norm", "cosine", "share")]
            targets = zip(statistics.target_ids[prompt, p].tolist(), statistics.effects[at].tolist(), strict=True)
            lines += [f"effect on {visible(names[target])} {precise(effect)}" for target, effect in targets]
            lines.append(f"best token {visible(names[int(statistics.top_ids[at])])}")
            read = names[int(statistics.tokens[prompt, p])]
            chips.append(_chip(read, _shown(measure, value), _color(measure, value, scale), "\n".join(lines)))
        rows.append([row_head(text(statistics.labels[i])), _strip(chips)])
    what = f"effect on {statistics.target_names[0]}{in_unit(statistics.unit)}" if measure == "effect" else measure
    some = "" if len(chosen) == len(statistics.labels) else f", the {len(chosen)} largest of {len(statistics.labels):,}"
    title = f"Paths by {statistics.by}: {what}{some}{of_prompts(statistics, prompt)}"
    signs = "" if measure == "norm" else _SIGNS
    caption = f"What each {statistics.by} gives after each token. {signs}Full color is {number(scale)}."
    return View(title, table([statistics.by, "tokens"], rows, caption=caption))


def detached_tokens(jacobian: DetachedJacobian, *, by: Contribution = "share", prompt: int = 0, k: int = 3) -> View:
    """The prompt's tokens, one strip per output position, colored by contribution in the detached map; the bias is last.

    Args:
        jacobian: A detached map.
        by: `"norm"` of the contribution, or `"share"`: the projection of J_t e_t on the output over the output's squared
            length (with the bias, shares sum to 1).
        prompt: Index of the prompt.
        k: Number of tokens that a contribution raises most, shown on hover.

    Raises:
        ValueError: Unknown kind of contribution, or prompt.

    Cost: two backward passes per position, once (`DetachedJacobian.contributions`).

    Example:
        >>> import tl_jets as tj
        >>> detached_tokens(tj.detached_jacobian(tj.load_tinydocs(), "is available on")).title
        'Detached map embed > final_post: share of each token'
    """
    check_choice("by", by, get_args(Contribution))
    check_prompt(jacobian, prompt)
    frame: Any = jacobian.to_dataframe(k=k)
    frame = frame[frame["batch"] == prompt]
    scale = largest(frame[by])
    rows = []
    for out_pos, group in frame.groupby("out_pos", sort=False):
        chips = []
        for row in group.itertuples(index=False):
            value, bias = getattr(row, by), bool(pd.isna(row.pos))
            lines = ["bias" if bias else f"position {int(row.pos)}"]
            lines.append(f"share {precise(row.share)}, norm {precise(row.norm)}")
            if row.top_tokens is not None:
                lines.append(f"raises {' '.join(visible(str(each)) for each in row.top_tokens)}")
            name = "bias" if bias else row.token
            chips.append(_chip(name, _shown(by, value), _color(by, value, scale), "\n".join(lines)))
        read = jacobian.token_names[int(jacobian.tokens[prompt, out_pos])]
        rows.append([row_head(f"{token(read)}<small>{out_pos}</small>"), _strip(chips)])
    what = f"shares, which sum to 1 with the bias. {_SIGNS}" if by == "share" else "lengths of the contributions. "
    caption = f"What each input token gives to the output at a position: {what}Full color is {number(scale)}."
    title = f"Detached map {jacobian.wrt} > {jacobian.output}: {by} of each token{of_prompts(jacobian, prompt)}"
    return View(title, table(["output at", "input tokens"], rows, caption=caption))


def _chip(name: str, below: str, color: str, hover: str) -> str:
    """One token with its number under it."""
    colored = color.replace('class="', 'class="chip ') if color else ' class="chip"'
    return cell(f"{token(name)}<small>{text(below)}</small>", colored, hover=hover, tag="span")


def _strip(chips: list[str]) -> str:
    return f'<td><div class="chips">{"".join(chips)}</div></td>'


def _shown(measure: str, value: float) -> str:
    """A number with its sign; norms have none."""
    shown = number(value)
    return f"+{shown}" if measure != "norm" and value > 1e-6 else shown


def _color(measure: str, value: float, scale: float) -> str:
    return rising(value / scale) if measure == "norm" else diverging(value, scale)
