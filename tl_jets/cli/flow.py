"""`tl-jets flow`: the effect of an ablation, or of another prompt, on the answer, through every component."""

from __future__ import annotations

import argparse
import re
import warnings
from typing import Any

from torch import Tensor

from tl_jets.cli.prompt_files import read_prompts
from tl_jets.cli.report import Report, Table
from tl_jets.cli.session import Read, UsageError, ablated_positions, read, steps
from tl_jets.cli.texts import legend
from tl_jets.core.decoder import in_unit
from tl_jets.core.numerals import number, signed
from tl_jets.core.protocol import FINAL_STREAM
from tl_jets.core.selection import Rows
from tl_jets.core.sinks import Sinks
from tl_jets.core.tokens import visible
from tl_jets.core.trace import Trace
from tl_jets.flows import Flow, JointFlow, flow, joint_flow
from tl_jets.flows.secants import MOST_NODES
from tl_jets.flows.two_runs import TwoRuns
from tl_jets.interventions.hooks import ablation_hooks
from tl_jets.paths.cancellation import LARGE
from tl_jets.views import flow_heatmap, flow_page

# Options of one kind of intervention, with the kinds that have them.
OWN = {
    "nodes": ("ablate", "corrupted"),
    "keep_bos": ("ablate", "joint"),
    "reference": ("ablate", "joint"),
    "check": ("ablate", "corrupted"),
    "controls": ("joint",),
}
# What `Flow` warns of is in the verdict.
OPEN = r"\d+ of \d+ effects stay open"


def report(options: argparse.Namespace) -> Report:
    """The flow of one intervention in one prompt."""
    kind = _kind(options)
    with steps(3) as step:
        asked = read(options, options.granularity, step)
        answer, target, against = asked.answer, asked.given(options.target), asked.given(options.against)
        step("flow")
        if options.measure == "centered":
            target = answer if target is None else target
        given = {"targets": target, "against": against, "measure": options.measure, "positions": asked.position}
        acts, ablation = _intervention(options, kind, asked)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", OPEN, UserWarning)
            if kind == "joint":
                found: Flow | JointFlow = _joint(options, asked, ablation, given)
                assert found.final is not None, "it was just run"
                ablated = found.final[:, 0]
            else:
                runs = TwoRuns(asked.network, asked.trace, acts)
                found, ablated = _flow(options, asked, runs, given), runs.other[FINAL_STREAM][:, asked.position]
    said, other = (None if token is None else asked.token(token) for token in (target, against))
    what = "KL(clean || intervened)"
    if said is not None and options.measure != "kl":
        what = f"the centered logit of {said['token']}"
    if said is not None and other is not None:
        what = f"the logit of {said['token']} less that of {other['token']}"
    done = _done(options, kind)
    data = asked.header(options) | {"intervention": done, "granularity": options.granularity}
    data |= {"answer": asked.token(answer), "target": said, "measure": found.measure, "unit": found.unit}
    data |= {"against": other, "effect": float(found.effect), "is_closed": bool(found.closed)}
    data |= {"is_softcapped": asked.trace.decoder.transform is not None, "readings": None}
    if target is not None and against is None:
        data["readings"] = _readings(asked, ablated, target)
    rows = asked.asked(options.model, data["answer"], said) | {"intervention": done}
    last = ["effect"] if options.measure == "centered" else []
    last += ["softcap"] if data["is_softcapped"] and last else []
    if isinstance(found, JointFlow):
        return _of_joint(found, data, rows, what, last, options.top)
    sink = kind == "ablate" and not options.keep_bos and _first_is_sink(asked)
    return _of_flow(found, data, rows, what, last, options.top, sink)


def _kind(options: argparse.Namespace) -> str:
    """The kind of the intervention; UsageError for none or several, or for options of another kind."""
    kinds = [name for name in ("ablate", "corrupted", "joint") if getattr(options, name) is not None]
    if len(kinds) != 1:
        got = " and ".join(f"--{name}" for name in kinds) or "none"
        raise UsageError(f"one of --ablate, --corrupted and --joint says what is done to the model; got {got}")
    for name, kinds_of in OWN.items():
        if getattr(options, name) and kinds[0] not in kinds_of:
            of = " or ".join(f"--{own}" for own in kinds_of)
            raise UsageError(f"--{name.replace('_', '-')} goes with {of}, not with --{kinds[0]}")
    is_zero = options.mode == "zero"
    if is_zero != (options.reference is None) or not (is_zero or kinds[0] != "corrupted"):
        raise UsageError(
            f"--mode mean and resample, of an ablation, need --reference FILE, and zero none; got --mode {options.mode}"
        )
    return kinds[0]


def _done(options: argparse.Namespace, kind: str) -> str:
    """The intervention in words."""
    if kind == "corrupted":
        return f"the prompt {options.corrupted!r}"
    where = "all positions but the first" if options.keep_bos else "all positions"
    return f"{options.mode} ablation of {', '.join(getattr(options, kind))} at {where}"


def _intervention(options: argparse.Namespace, kind: str, asked: Read) -> tuple[Any, dict[str, Any]]:
    """Hooks of an ablation with its mode, reference and seed; or the trace of another prompt."""

    def traced(prompts: Any) -> Trace:
        return asked.network.trace(asked.network.tokenize(prompts, prepend_bos=options.prepend_bos))

    if kind == "corrupted":
        return traced(options.corrupted), {}
    reference = None if options.reference is None else traced(read_prompts(options.reference)[0])
    ablation = {"mode": options.mode, "reference": reference, "seed": options.seed}
    positions = ablated_positions(options, asked)
    return ablation_hooks(asked.network, getattr(options, kind), positions=positions, **ablation), ablation


def _readings(asked: Read, intervened: Tensor, target: int) -> dict[str, list[float]]:
    """The target's logit and probability: the model's own in the clean run, and those of an intervened last stream."""
    decoder = asked.trace.decoder
    own = asked.trace.logits[0, asked.position]  # type: ignore[index]
    logits = [each.double() for each in (own, decoder.transformed(decoder.logits(decoder.norm(intervened)))[0])]
    probabilities = [float(each.softmax(-1)[target]) for each in logits]
    return {"logit": [float(each[target]) for each in logits], "probability": probabilities}


def _read(readings: dict[str, list[float]] | None) -> str:
    """The readings in words."""
    if readings is None:
        return ""
    (before, after), (p, q) = readings["logit"], readings["probability"]
    return f" Its logit goes from {number(before)} to {number(after)}, its probability from {p:.1%} to {q:.1%}."


def _flow(options: argparse.Namespace, asked: Read, runs: TwoRuns, given: dict[str, Any]) -> Flow:
    given |= {} if options.nodes is None else {"nodes": options.nodes}
    given |= {name: getattr(options, name) for name in ("check", "seed", "granularity")}
    return flow(asked.network, asked.trace, runs, by_position=True, **given)


def _joint(options: argparse.Namespace, asked: Read, ablation: dict[str, Any], given: dict[str, Any]) -> JointFlow:
    given |= {} if options.controls is None else {"controls": options.controls}
    positions = ablated_positions(options, asked)
    return joint_flow(asked.network, asked.trace, options.joint, ablated_positions=positions, **ablation, **given)


def _first_is_sink(asked: Read) -> bool:
    """Whether the first position is BOS or has an outlying stream."""
    return bool(Sinks.of(asked.trace, Rows.of(asked.trace, 0)).mask)


def _of_flow(
    found: Flow, data: dict[str, Any], asked: dict[str, str], names: str, last: list[str], top: int, sink: bool
) -> Report:
    components = _components(found)
    gap, clean, place = float(found.gap_share), float(found.clean), ["batch", "pos", "target"]
    data |= {"clean": clean, "gap": gap, "tolerance": found.tolerance, "passes": found.passes}
    data |= {"cancellation": float(found.cancellation), "components": components, "check": None}
    data["cuts"] = found.cuts().drop(columns=place).to_dict("records")
    if found.check is not None:
        data["check"] = found.agreement().iloc[0, 3:].to_dict()
        data["check"]["rows"] = found.check.drop(columns=place).to_dict("records")
    verdict = [f"{_capital(names)} moves by {signed(data['effect'])}, from {number(clean)}{in_unit(found.unit)}."]
    verdict[0] += _read(data["readings"])
    cost = f"gap {100 * gap:.2g}% of the effect, up to {max(found.nodes)} nodes, {found.passes:.1f} passes"
    if not data["is_closed"]:
        ways = ["more --nodes"] if max(found.nodes) < MOST_NODES else []
        ways += ["--keep-bos"] if sink else []
        milder = f"{', '.join(ways)}, or a smaller intervention" if ways else "a smaller one"
        verdict.append(f"OPEN: {cost}, above {found.tolerance:.0%}: flows explain nothing here. Try {milder}.")
        explained, tables = legend("flow", "gap", "path patching", *last), [_cut_table(data["cuts"])]
        return Report(data, asked, tables, explained, verdict=verdict, further=["--explain: what the numbers mean"])
    verdict.append(f"Closed: {cost}. {_checked(data['check'])}")
    if data["cancellation"] > LARGE:
        times = f"the sizes of the direct ones add up to {number(data['cancellation'])} times the effect"
        verdict.append(f"Its parts cancel: {times}, so that single flows are no shares of it.")
    table = _flow_table(found, components, data["check"], top, sink)
    tables = [table, *([_check_table(data["check"]["rows"])] if data["check"] else [])]
    shares = [] if data["cancellation"] > LARGE else ["share"]
    keys = ["flow", *shares, "direct", "largest at", "gap", "path patching", *last]
    page: dict[str, Any] = {"on_page": tables, "views": lambda: [flow_page(found), flow_heatmap(found)]}
    return Report(data, asked, [table], legend("flow", *keys), verdict=verdict, further=_further(data), **page)


def _further(data: dict[str, Any]) -> list[str]:
    """What to run next."""
    largest = sorted(data["components"], key=lambda row: -abs(row["flow"]))[:3]
    names = " ".join(re.sub("_out$", "", row["component"]) for row in largest if row["component"] != "embed")
    check = "" if data["check"] else "--check 5: path patch the largest, and random ones; "
    return [
        f"{check}--granularity head; --target TOKEN; --json, --html FILE",
        f"tl-jets flow --joint {names}: what these do together, beside random sets",
        "--explain: what the numbers mean; tl-jets explore --ablate ...: the same on a page, with edges",
    ]


def _components(found: Flow) -> list[dict[str, Any]]:
    """Every component that changed, in the order of the network."""
    frame: Any = found.to_dataframe()[["component", "flow", "share", "edit", "direct"]]
    places: Any = found.by_position_dataframe()
    rows = []
    for row in frame.to_dict("records"):
        own = places[places["component"] == row["component"]][["write_pos", "token", "flow"]].to_numpy()
        rows.append(row | {"by_position": [{"pos": p, "token": visible(t), "flow": v} for p, t, v in own]})
    return rows


def _checked(check: dict[str, Any] | None) -> str:
    if check is None:
        return "Not checked by path patching: --check 5."
    rank, error = number(check["spearman"]), number(check["relative_error"])
    return f"Path patching of {check['mediators']:.0f} mediators: Spearman {rank}, relative error {error}."


def _flow_table(
    found: Flow, components: list[dict[str, Any]], check: dict[str, Any] | None, top: int, sink: bool
) -> Table:
    """The components of the largest flow, one a row."""
    patched = {} if check is None else {row["component"]: row for row in check["rows"]}
    rows = []
    for part in sorted(components, key=lambda row: -abs(row["flow"])):
        place = max(part["by_position"], key=lambda at: abs(at["flow"]))
        edited = abs(part["edit"]) > 1e-3 * abs(part["flow"])
        row = {"component": f"{part['component']}{' (edited)' if edited else ''}", "flow": signed(part["flow"])}
        row |= {} if float(found.cancellation) > LARGE else {"share": f"{part['share']:+.0%}"}
        row |= {"direct": signed(part["direct"])}
        if check is not None:
            own = patched.get(part["component"], {})
            row |= {end: signed(own[end]) if own else None for end in ("restored", "moved")}
        rows.append(row | {"largest at": f"{place['pos']} {place['token']} {signed(place['flow'])}"})
    notes = ["the first position is an attention sink, and is ablated, too: --keep-bos leaves it"] if sink else []
    sums = [{"component": f"all {len(rows)}", "direct": signed(found.effect)}]
    title = f"The components of the largest flow{in_unit(found.unit)}"
    return Table(title, rows, sums, notes, top=top, more="components, all smaller: --top, --json, --html")


def _check_table(rows: list[dict[str, Any]]) -> Table:
    shown = [{k: v if k == "component" else signed(v) for k, v in row.items()} for row in rows]
    return Table("Path patching, one component at a time", shown)


def _cut_table(cuts: list[dict[str, Any]]) -> Table:
    """Where the gap of an open effect is."""
    shown = [
        {"read from": row["stage"], "carried": signed(row["carried"]), "gap": signed(row["gap"]), "nodes": row["nodes"]}
        for i, row in enumerate(cuts)
        if i % max(1, len(cuts) // 12) == 0 or i == len(cuts) - 1
    ]
    return Table("Where it opens: gap of all stages from here to the end", shown)


def _of_joint(
    found: JointFlow, data: dict[str, Any], asked: dict[str, str], names: str, last: list[str], top: int
) -> Report:
    effect, gap = data["effect"], float(found.gap / found.effect)
    frame: Any = found.to_dataframe()[["component", "share", "single", "gradient"]]
    rows = frame.to_dict("records")
    control = [float(value) for value in found.control]
    data |= {"gap": gap, "tolerance": found.tolerance, "nodes": found.nodes, "components": rows}
    sets = zip(found.control_labels, control, strict=True)
    data["controls"] = [{"components": own, "effect": value} for own, value in sets]
    alone, read = sum(row["single"] for row in rows), _read(data["readings"])
    together = f"{_capital(names)} moves by {signed(effect)}{in_unit(found.unit)} together"
    verdict = [
        f"{together}, by {signed(alone)} one by one in sum.{read}",
        "No random sets to compare with: --controls 6.",
    ]
    if control:
        mean, worst = signed(sum(control) / len(control)), signed(max(control, key=abs))
        verdict[1] = f"{len(control)} random sets of the same layers: {mean} in the mean, {worst} at most."
    cost = f"gap {100 * abs(gap):.2g}% of the effect, {found.nodes} nodes"
    if not data["is_closed"]:
        explains = f"above {found.tolerance:.1%}: shares explain nothing. Ablate fewer, or --keep-bos."
        verdict.append(f"OPEN: {cost}, {explains}")
        return Report(data, asked, [], legend("flow", "gap", "alone", *last), verdict=verdict)
    verdict.append(f"Closed: {cost}.")
    table = _joint_table(found, rows, top)
    explained = legend("flow", "share|joint", "alone", "gradient", *last)
    further = ["--explain: what the numbers mean; --top N, --json; tl-jets flow --ablate ...: what they pass through"]
    return Report(data, asked, [table], explained, verdict=verdict, further=further)


def _joint_table(found: JointFlow, rows: list[dict[str, Any]], top: int) -> Table:
    effect = float(found.effect)
    shown = [
        {"component": row["component"], "share": signed(row["share"]), "of the effect": f"{row['share'] / effect:+.0%}"}
        | {"alone": signed(row["single"]), "gradient": signed(row["gradient"])}
        for row in sorted(rows, key=lambda row: -abs(row["share"]))
    ]
    keys = {"share": "share", "alone": "single", "gradient": "gradient"}
    total = {"component": "sum"} | {name: signed(sum(row[key] for row in rows)) for name, key in keys.items()}
    return Table(f"Components ablated together{in_unit(found.unit)}", shown, [total], top=top)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
