"""`answer_lens`: the iterative lens of the answers to many prompts, each beside another prompt's answer.

A layer that has read nothing of its prompt ranks the answer of another prompt as well as the prompt's own: what is common
(" the") is ranked high everywhere.

Example:
    >>> import tl_jets as tj
    >>> prompts = ["This function is available on Unix and", "If the file does not exist, an error is", "A list of"]
    >>> table = answer_lens(tj.load_tinydocs(), prompts, order=0).trajectories()
    >>> table.query("layer == '3_pre'")[["target", "rank_median", "leads"]].round(2).values.tolist()
    [['<answer>', 2.0, 0.33], ['<other answer>', 528.0, 0.0]]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tl_jets.core.changes import one_look
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.processes import Distributed
from tl_jets.core.prompts import over_prompts
from tl_jets.core.selection import ANSWER
from tl_jets.lenses.iterative import IterativeJetLens, iterative_jet_lens

OTHER_ANSWER = "<other answer>"


@one_look()
def answer_lens(
    model: Any,
    prompts: Any,
    answers: Sequence[str | int] | None = None,
    *,
    position: int = -1,
    max_bytes: int | None = None,
    distributed: Distributed = False,
    progress: bool = True,
    **options: Any,
) -> IterativeJetLens:
    """The iterative lens at one position of every prompt, which follows the prompt's answer and another prompt's.

    Its targets are `"<answer>"` and, as a control, `"<other answer>"`: the answer of the next prompt that has another one.
    `trajectories()` is their table.

    Args:
        model: A TransformerLens model, or a `ResidualNetwork`.
        prompts: Prompts, as in `over_prompts`.
        answers: A token of each prompt, string or id; None for the model's own best.
        position: The position to read, counted among each prompt's real tokens; -1 is the last.
        max_bytes: As in `over_prompts`.
        distributed: As in `over_prompts`.
        progress: As in `over_prompts`.
        options: Those of `iterative_jet_lens`: order, layers, linearize, ...

    Raises:
        ValueError: Answers that are not one token a prompt, or are all the same, so that there is no control.

    Cost: that of `iterative_jet_lens`; without answers a forward pass more.

    Example: in the docstring of `tl_jets.lenses.answers`.
    """
    network = ResidualNetwork.of(model)
    shared = {"max_bytes": max_bytes, "distributed": distributed, "progress": progress, "positions": position}
    if answers is None:
        last = over_prompts(iterative_jet_lens, network, prompts, layers=-1, measures=False, top_k=1, **shared)
        answers = last.model_top_ids[:, 0].tolist()
    pairs = [[own, other] for own, other in zip(answers, other_answers(answers), strict=True)]
    lens = over_prompts(iterative_jet_lens, network, prompts, targets=pairs, **shared, **options)
    return replace(lens, target_names=[ANSWER, OTHER_ANSWER])


def other_answers(answers: Sequence[str | int]) -> list[str | int]:
    """For every prompt, the answer of the next one that has another; ValueError if all are the same."""
    if len(set(answers)) < 2:
        raise ValueError(
            f"Answers need another prompt's answer as a control; all {len(answers)} are {answers[0]!r}. Add other prompts, or "
            "run over_prompts(iterative_jet_lens, ..., targets=...)."
        )
    found = []
    for i, own in enumerate(answers):
        found.append(next(other for other in [*answers[i:], *answers[:i]] if other != own))
    return found
