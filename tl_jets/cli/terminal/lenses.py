"""Tables of both lenses."""

from __future__ import annotations

import io
import re

from rich.console import Group, RenderableType
from rich.text import Text
from torch import Tensor

from tl_jets.cli.terminal.parts import OWN_STYLE, Terminal, answer_line, new_table, titled
from tl_jets.cli.terminal.parts import heading as lines_of
from tl_jets.cli.terminal.parts import legend as entries
from tl_jets.core.decoder import LOGITS_UNIT, in_unit
from tl_jets.core.measures import MEASURES, Measures
from tl_jets.core.numerals import number, signed
from tl_jets.core.protocol import DECODER_STEP
from tl_jets.core.selection import ANSWER
from tl_jets.core.tokens import token_text, visible
from tl_jets.lenses import IterativeJetLens, JointJetLens

BORROWED_STYLE = "dim italic"
DIVERGENT_STYLE = "yellow"
BAR = "\u2588"
BAR_WIDTH = 20
PICTURE_WIDTH = 84
LABEL_WIDTH, ORDER_WIDTH = 11, 22
# Components below this weight share one row if there are more than MAX_ROWS.
SMALL_WEIGHT, MAX_ROWS = 1e-3, 20
CONSTANT = f"{DECODER_STEP}_bias"
TITLES = {
    "remainder_norm": "remainder",
    "cosine": "cosine",
    "centered_cosine": "centered cos",
    "kl": "KL",
    "top1_agreement": "top-1 %",
}

# The legend of the detached lenses.
DETACHED = {
    "detached": "The final norm keeps the scale that it has at the final stream, so that logits are sums: direct logit "
    "attribution. A layer's cell is what its stream so far gives to the model's logits; rho is n/a, as this is no series, "
    "and nothing is borrowed.",
    "effect": "What the component adds to the logit of the model's answer, or of a target, beyond the mean of the "
    "vocabulary. Effects sum to the model's own.",
    "KL (control)": "KL(model || lens) in nats, 0 is best. In round brackets: the same for one random vector of the same "
    "length and angle to the final stream; a KL no better is no evidence about the layer. One draw scatters by tens of "
    "percent: compare averages. The joint lens is exact (KL 0), and says nothing by that: its parts do.",
    "remainder": "Length of what is missing from the model's logits, relative to theirs. top-1 %: how often both have the "
    "same best token.",
    "not here": "What a component gives through later ones: `tl-jets paths`. What the model would lose without it: an "
    "ablation, `tl-jets paths --ablate`.",
}


def heading(lens: IterativeJetLens, position: int, model: str, prompt: str) -> Text:
    """The request, and the model's answer."""
    read, answer = _token(lens, lens.tokens[0, position]), _token(lens, lens.model_top_ids[0, position])
    rows = {"model": model, "prompt": prompt, "answer": answer_line(answer, read, lens.positions[position])}
    return lines_of("lens", rows)


def iterative_table(lens: IterativeJetLens, position: int, batch: int = 0, width: int = PICTURE_WIDTH) -> Group:
    """Layers by orders (as many as fit into `width`): best tokens, KL with its control, borrowed share."""
    table = new_table()
    table.add_column("layer\nrho", no_wrap=True)
    shown = lens.orders[: max(1, (width - LABEL_WIDTH) // ORDER_WIDTH)]
    for order in shown:
        if lens.linearize == "detached":
            lines = ("detached", "the stream's own part", "KL (control)")
        elif order == 0:
            lines = ("order 0", "logit lens", "KL (control)")
        else:
            lines = (f"order {order}", "KL (control)", "borrowed")
        table.add_column("\n".join(lines))
    borrowed, control = lens.borrowed[..., batch, position], _measured(lens.control)
    for i, label in enumerate(lens.labels):
        rho = float(lens.rho[i, batch, position])
        cells = [Text.assemble(label, "\n", (number(rho), DIVERGENT_STYLE if rho >= 1 else "dim"))]
        for k, order in enumerate(shown):
            cell = _answers(lens, lens.top_ids[i, k, batch, position], bool(borrowed[i, k]))
            cell.append_text(_beside("\n", lens.kl[i, k, batch, position], control.kl[i, k, batch, position]))
            if order > 0:
                cell.append(f" {float(lens.borrowed_share[i, k, batch, position]):.0%}")
                if float(lens.alpha[i, k, batch, position]) < 0:
                    cell.append(" -own", "dim")
            cells.append(cell)
        table.add_row(*cells)
    if len(shown) < len(lens.orders):
        table.caption = f"orders {shown[-1] + 1} to {lens.orders[-1]} need a wider terminal, --html or --json"
    how = "detached" if lens.linearize == "detached" else f"center_scale={lens.center_scale}"
    return titled(f"Iterative jet lens: what each layer's stream says ({how})", table)


def joint_table(lens: JointJetLens, position: int, batch: int = 0) -> Group:
    """One component per row: weight and best tokens; the sum with its KL, control and uniform weights at the bottom.

    Detached terms all have weight 1, so their `effects` on the answer or targets are shown instead.
    """
    table = new_table()
    table.add_column("component")
    effects = lens.effects[:, batch, position] if lens.linearize == "detached" else None
    if effects is None:
        table.add_column("weight", justify="right")
        table.add_column("", width=BAR_WIDTH)
    else:
        for name, target in zip(lens.target_names, lens.target_ids[batch, position], strict=True):
            table.add_column("effect" if name == ANSWER else Text(f"effect\n{_token(lens, target)}"), justify="right")
    table.add_column("its own best tokens")
    top = lens.center_top_tokens(lens.top_ids.shape[-1]).indices[:, batch, position]
    weights = lens.weights[:, batch, position].tolist()
    hidden = 0
    for i, (label, weight, ids) in enumerate(zip(lens.labels, weights, top, strict=True)):
        if effects is not None and label == CONSTANT and not effects[i].any():
            continue  # the model has no such constant
        if weight < SMALL_WEIGHT and len(lens.labels) > MAX_ROWS:
            hidden += 1
            continue
        words = Text(" ".join(_token(lens, token) for token in ids))
        style = "dim" if weight < SMALL_WEIGHT else ""
        values = [f"{weight:.3f}", BAR * round(BAR_WIDTH * weight)] if effects is None else map(signed, effects[i])
        table.add_row(Text(label), *values, words, style=style)
    if hidden:
        table.add_row(f"{hidden} others", f"< {SMALL_WEIGHT}", "", "", style="dim")
    table.add_section()
    total = _answers(lens, lens.top_ids[batch, position], bool(lens.borrowed[batch, position]))
    total.append_text(_beside("\nKL ", lens.kl[batch, position], lens.control.kl[batch, position]))
    if effects is not None:
        table.add_row("sum", *map(signed, effects.sum(0)), total)
        return titled(f"Joint jet lens, detached: what each component gives to the logits{in_unit(lens.unit)}", table)
    total.append(f"; uniform weights {number(lens.uniform.kl[batch, position])}")
    table.add_row("sum", f"{sum(weights):.3f}", "", total)
    gap = "" if lens.gap is None else f", gap {float(lens.gap[batch, position]):.0e}"
    return titled(f"Joint jet lens, order {lens.order}: the logits as a weighted sum ({lens.objective}{gap})", table)


def target_table(lens: IterativeJetLens, position: int, batch: int = 0) -> Group:
    """One layer per row, one target and order per column: rank and logit."""
    assert lens.target_ids is not None
    assert lens.target_logits is not None
    assert lens.target_ranks is not None
    table = new_table()
    table.add_column("layer")
    names = [_token(lens, token) for token in lens.target_ids[batch, position]]
    cells = [(t, k) for t in range(len(names)) for k in range(len(lens.orders))]
    for t, k in cells:
        order = "detached" if lens.linearize == "detached" else f"order {lens.orders[k]}"
        table.add_column(Text(f"{names[t]}\n{order}"), justify="right")
    for i, label in enumerate(lens.labels):
        places = [(i, k, batch, position, t) for t, k in cells]
        row = [f"{int(lens.target_ranks[at]) + 1:,} ({signed(lens.target_logits[at])})" for at in places]
        table.add_row(label, *row)
    return titled(f"Targets: rank, 1 is the best (logit{in_unit(lens.unit)})", table)


def average_table(iterative: IterativeJetLens, joint: JointJetLens) -> Group:
    """Measures averaged over the prompt's positions, with their controls."""
    table = new_table()
    table.add_column("layer")
    table.add_column("k", justify="right")
    for name in MEASURES:
        table.add_column(TITLES[name], justify="right")
    own, control = _measured(iterative.measures).mean(), _measured(iterative.control).mean()
    for i, label in enumerate(iterative.labels):
        for k, order in enumerate(iterative.orders):
            cells = [_measure(name, own[name][i, k], control[name][i, k]) for name in MEASURES]
            table.add_row(label if k == 0 else "", _order(iterative.linearize, order), *cells)
    table.add_section()
    sums = [("joint", joint.measures.mean(), joint.control.mean()), ("uniform", joint.uniform.mean(), None)]
    for label, measures, control in sums[: 1 if joint.linearize == "detached" else 2]:
        cells = [_measure(name, measures[name], None if control is None else control[name]) for name in MEASURES]
        table.add_row(label, _order(joint.linearize, joint.order), *cells)
    return titled("Averages over the prompt's positions, order k: measure (control)", table)


def legend(lens: IterativeJetLens) -> Group:
    """The legend of the tables."""
    softcap = {"softcap": "Logits and effects are before the model's final softcap; KL and ranks are its own."}
    softcap = {} if lens.unit == LOGITS_UNIT else softcap
    if lens.linearize == "detached":
        return entries(DETACHED | softcap)
    rows = softcap | {
        "order k": "The final norm's Taylor polynomial of degree k around the layer's stream, taken at the final stream, "
        "then unembedded. Order 0 is the logit lens. Of higher orders a part is the model's own final stream.",
        "[token]": "Borrowed: the answer comes from that part; what is the layer's own says something else.",
        "borrowed": "How much of the logits is that part, by length. -own: the layer's own reading is subtracted (alpha < 0), "
        "as it is at order 1 wherever the stream has grown much since.",
        "KL (control)": "KL(model || lens) in nats, 0 is best. In round brackets: the same for one random vector of the "
        "layer's length and angle to the final stream. It has that much of the answer and nothing else of the layer; a KL no "
        "better is no evidence about the layer. One draw scatters by tens of percent: compare averages.",
        "rho": "Distance from the layer's stream to the final one, in lengths of the layer's. At 1 or more the series "
        "diverges: higher orders then are no better than lower ones.",
        "joint": "Weights on the components, summing to 1, that bring the sum of their jets closest to the model's "
        "logits. Its control: random components of equal lengths and angles, weighted in the same way.",
        "remainder": "Length of what is missing from the model's logits, relative to theirs. top-1 %: how often both have the "
        "same best token.",
    }
    if lens.orders[-1] == 0:
        rows = {name: text for name, text in rows.items() if name not in ("[token]", "borrowed")}
    return entries(rows)


def picture(*parts: RenderableType) -> str:
    """The parts as a self-contained SVG, without external fonts."""
    console = Terminal(record=True, file=io.StringIO(), width=PICTURE_WIDTH)
    console.print(*parts)
    text = console.export_svg(title="tl-jets lens")
    return re.sub(r"@font-face\s*\{[^}]*\}\s*", "", text)


def _measured(measures: Measures | None) -> Measures:
    if measures is None:
        raise ValueError("A table shows measures; the lens was run without. Run it with measures=True.")
    return measures


def _token(lens: IterativeJetLens | JointJetLens, token: Tensor) -> str:
    return visible(token_text(lens.tokenizer, int(token)))


def _answers(lens: IterativeJetLens | JointJetLens, ids: Tensor, borrowed: bool) -> Text:
    """Best tokens; the first one is marked if borrowed."""
    first, *others = (_token(lens, token) for token in ids)
    answer = (f"[{first}]", BORROWED_STYLE) if borrowed else (first, OWN_STYLE)
    return Text.assemble(answer, *((f" {other}", "dim") for other in others))


def _beside(before: str, value: Tensor, control: Tensor) -> Text:
    return Text.assemble(before, number(value), (f" ({number(control)})", "dim"))


def _measure(name: str, value: Tensor, control: Tensor | None) -> Text:
    write = (lambda share: f"{100 * float(share):.0f}") if name == "top1_agreement" else number
    return Text.assemble(write(value), ("" if control is None else f" ({write(control)})", "dim"))


def _order(linearize: str, order: int) -> str:
    return "-" if linearize == "detached" else str(order)
