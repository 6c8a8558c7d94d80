"""Lenses as rich tables, for a terminal."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tl_jets.lenses import IterativeJetLens, JointJetLens
from tl_jets.measures import MEASURES
from tl_jets.tokens import token_text, visible

BORROWED_STYLE = "dim italic"
OWN_STYLE = "bold"


def prompt_line(lens: IterativeJetLens, position: int, model: str) -> Text:
    """What was asked of which model, and its own answer."""
    read = _token(lens, lens.tokens[0, position])
    answer = _token(lens, lens.model_top_ids[0, position])
    return Text.assemble(
        ("tl-jets lens", "bold"),
        f"  {model}\nafter ",
        (read, "bold"),
        f" (position {lens.positions[position]}) the model says ",
        (answer, "bold"),
        "\n",
    )


def iterative_table(lens: IterativeJetLens, position: int, batch: int = 0) -> Table:
    """A layer a row, an order a column: best tokens, KL beside its control, and the borrowed share."""
    table = Table(
        title=f"Iterative jet lens (center_scale={lens.center_scale}): best tokens; KL to the model, control in brackets",
        caption="\\[token]: borrowed from the model's own final stream, the layer's own part says something else. "
        "b: borrowed share.",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("layer")
    table.add_column("rho", justify="right")
    for order in lens.orders:
        table.add_column(f"order {order}" + (" (logit lens)" if order == 0 else ""))
    tokens = lens.top_tokens()
    for i, label in enumerate(lens.labels):
        cells = []
        for k in range(len(lens.orders)):
            borrowed = bool(lens.borrowed[i, k, batch, position])
            words = tokens[label][k][batch][position]
            cell = Text(_marked(words[0], borrowed), style=BORROWED_STYLE if borrowed else OWN_STYLE)
            cell.append("".join(f" {visible(word)}" for word in words[1:]), style="dim")
            cell.append(f"\nKL {_number(lens.kl[i, k, batch, position])} ", style="not bold not italic")
            cell.append(f"({_number(_control(lens, 'kl')[i, k, batch, position])})", style="dim not italic")
            if k > 0:
                cell.append(f"  b {float(lens.borrowed_share[i, k, batch, position]):.2f}", style="not bold not italic")
            cells.append(cell)
        table.add_row(label, _number(lens.rho[i, batch, position]), *cells)
    return table


def joint_table(lens: JointJetLens, position: int, batch: int = 0) -> Table:
    """A component a row: weight, its own best token; the sum at the bottom."""
    gap = "" if lens.gap is None else f", gap {float(lens.gap[batch, position]):.0e}"
    table = Table(
        title=f"Joint jet lens, order {lens.order} ({lens.objective}{gap}): the logits as a weighted sum",
        title_justify="left",
    )
    table.add_column("component")
    table.add_column("weight", justify="right")
    table.add_column("")
    table.add_column("best tokens of its own jet")
    top = lens.center_top_tokens(lens.top_ids.shape[-1])
    for i, label in enumerate(lens.labels):
        weight = float(lens.weights[i, batch, position])
        words = [_token(lens, token) for token in top.indices[i, batch, position]]
        style = "dim" if weight < 1e-3 else ""
        table.add_row(label, f"{weight:.3f}", "\u2588" * round(20 * weight), Text(" ".join(words)), style=style)
    table.add_section()
    words = lens.top_tokens()[batch][position]
    total = Text(_marked(words[0], bool(lens.borrowed[batch, position])), style=OWN_STYLE)
    total.append("".join(f" {visible(word)}" for word in words[1:]), style="dim")
    table.add_row("sum", "1", "", total)
    return table


def average_table(iterative: IterativeJetLens, joint: JointJetLens) -> Table:
    """Measures over all positions of the prompt, each beside its control."""
    table = Table(
        title="Averages over the prompt's positions; in brackets the random-center control",
        title_justify="left",
    )
    table.add_column("expansion")
    for name in MEASURES:
        table.add_column(name, justify="right")
    own, control = iterative.measures, iterative.control
    if own is not None and control is not None:
        means, controls = own.mean(), control.mean()
        for i, label in enumerate(iterative.labels):
            for k, order in enumerate(iterative.orders):
                cells = [_beside(means[name][i, k], controls[name][i, k]) for name in MEASURES]
                table.add_row(f"{label}, order {order}", *cells)
        table.add_section()
    means, uniform, controls = joint.measures.mean(), joint.uniform.mean(), joint.control.mean()
    table.add_row(f"joint, {joint.objective} weights", *(_beside(means[name], controls[name]) for name in MEASURES))
    table.add_row("joint, uniform weights", *(Text(_number(uniform[name])) for name in MEASURES))
    return table


def _control(lens: IterativeJetLens, name: str) -> Any:
    return getattr(lens.control, name)


def _token(lens: Any, token: Any) -> str:
    return visible(token_text(lens.tokenizer, int(token)))


def _marked(word: str | None, borrowed: bool) -> str:
    return f"[{visible(word)}]" if borrowed else visible(word)


def _beside(value: Any, control: Any) -> Text:
    return Text.assemble(_number(value), (f" ({_number(control)})", "dim"))


def _number(value: Any) -> str:
    value = float(value)
    return escape(f"{value:.2f}" if abs(value) < 100 else f"{value:.0e}")
