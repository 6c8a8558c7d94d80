"""`tl-jets explore`: one page of a prompt, with layers, components, ranks, bi-grams, and what an ablation does."""

from __future__ import annotations

import argparse
import warnings

from tl_jets.cli.report import Report, header
from tl_jets.cli.session import UsageError, read, steps
from tl_jets.core.numerals import signed
from tl_jets.flows import flow
from tl_jets.interventions.hooks import ablation_hooks
from tl_jets.views import explorer


def report(options: argparse.Namespace) -> Report:
    """The page of one prompt."""
    with steps(3) as step:
        asked = read(options, "sublayer", step)
        found = None
        if options.ablate is not None:
            length = asked.trace.tokens.shape[1]
            if options.keep_bos and length == 1:
                raise UsageError("--keep-bos leaves the first position as it is; this prompt has no other")
            positions = list(range(1, length)) if options.keep_bos else None
            hooks = ablation_hooks(asked.network, options.ablate, positions=positions)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", r"\d+ of \d+ effects stay open", UserWarning)  # the page says so
                found = flow(asked.network, asked.trace, hooks, positions=asked.position, edges=True)
        elif options.keep_bos:
            raise UsageError("--keep-bos goes with --ablate")
        step("page")
        bigrams = None if options.bigrams == "none" else options.bigrams
        page = explorer(
            asked.network,
            asked.trace,
            order=options.order,
            bigrams=bigrams,
            flow=found,
            title=asked.prompt,
            name=options.model,
        )
    answer = asked.token(int(asked.trace.logits[0, asked.position].argmax()))  # type: ignore[index]
    rows = asked.asked(options.model, answer)
    if found is not None and options.ablate is not None:
        said = "" if bool(found.closed) else "; its flows are OPEN, and explain nothing"
        rows["ablation"] = (
            f"{', '.join(options.ablate)}: {signed(float(found.effect))} on the centered logit of {answer['token']}{said}"
        )
    rows["page"] = f"{options.html}, which opens offline in a browser"
    data = header("explore", model=options.model, prompt=asked.prompt) | page.data
    return Report(data, rows, (), {}, page=page.page)
