"""Files of prompts: one a line, or JSON lines with a prompt and, in all of them or in none, its answer."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_jets.cli.arguments import UsageError, one_line
from tl_jets.cli.session import load_network, read_token, steps
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.tokens import visible

JSON_LINES = ".jsonl"
KEYS = {"prompt", "answer"}
# Characters of a prompt in a table.
WIDTH = 30


@dataclass(frozen=True)
class Prompts:
    """The prompts of a file in the tokens of a model, all of which have the position that was asked for.

    Attributes:
        network: The model.
        texts: The prompts.
        tokens: Their ids and mask (`ResidualNetwork.tokenize`).
        lengths: Number of tokens of each.
        answers: Ids of their answers; None if the file has none.
    """

    network: ResidualNetwork
    texts: list[str]
    tokens: Any
    lengths: list[int]
    answers: list[int] | None

    @classmethod
    def of(cls, options: argparse.Namespace, single: Mapping[str, Any]) -> Prompts:
        """Read the file and load the model; `single` are options of a single prompt with their defaults, which are refused."""
        for name, usual in single.items():
            if getattr(options, name) != usual:
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} is of a single prompt, and --prompts of many; leave one out")
        texts, given = read_prompts(options.prompts)
        with steps(1) as step:
            step("loading TransformerLens and the model")
            network = load_network(options.model, options.granularity)
        tokens = network.tokenize(texts, prepend_bos=options.prepend_bos)
        lengths = tokens["attention_mask"].sum(1).tolist()
        for line, length in enumerate(lengths, 1):
            if not -length <= options.position < length:
                raise UsageError(
                    f"--position must lie in every prompt; got {options.position}, and line {line} of {options.prompts!r} has "
                    f"{length} tokens"
                )
        answers = None if given is None else [_answer(network, options.prompts, *each) for each in enumerate(given, 1)]
        return cls(network, texts, tokens, lengths, answers)

    def asked(self, options: argparse.Namespace) -> dict[str, str]:
        """The request."""
        where = "last position" if options.position == -1 else f"position {options.position}"
        of = f"{len(self.texts)} of {options.prompts}, {min(self.lengths)} to {max(self.lengths)} tokens"
        answers = "the model's own" if self.answers is None else "of the file"
        return {"model": options.model, "prompts": f"{of}, read at the {where}", "answers": answers}


def prompt_text(prompt: str) -> str:
    """The end of a prompt, for a row of a table."""
    shown = visible(prompt).replace("\u00b7", " ")
    return shown if len(shown) <= WIDTH else f"\u2026{shown[-WIDTH + 1 :]}"


def read_prompts(file: str) -> tuple[list[str], list[str] | None]:
    """The prompts of a file, and their answers if it gives them; UsageError names the line that is wrong.

    A name that ends in `.jsonl` holds JSON lines, `{"prompt": ..., "answer": ...}`; others one prompt a line.
    """
    try:
        lines = Path(file).read_text("utf-8").split("\n")
    except OSError as error:
        raise UsageError(f"cannot read {file!r}: {one_line(error)}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file!r} must be UTF-8; it is not at byte {error.start}") from error
    lines = lines[:-1] if not lines[-1] else lines
    if not lines:
        raise UsageError(f"{file!r} must hold at least one prompt; it is empty")
    is_json = file.endswith(JSON_LINES)
    read = [_record(file, number, line) if is_json else {"prompt": line} for number, line in enumerate(lines, 1)]
    for number, record in enumerate(read, 1):
        if not record["prompt"].strip():
            raise UsageError(f"{file!r} must hold a prompt in every line; line {number} has none")
    given = ["answer" in record for record in read]
    if any(given) and not all(given):
        missing = given.index(False) + 1
        raise UsageError(f"{file!r} must give the answer of every prompt or of none; line {missing} has none")
    return [record["prompt"] for record in read], [record["answer"] for record in read] if all(given) else None


def _record(file: str, number: int, line: str) -> dict[str, Any]:
    """The object of a JSON line."""
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not {"prompt"} <= set(record) <= KEYS:
        raise UsageError(
            f'{file!r} must hold {{"prompt": ...}} or {{"prompt": ..., "answer": ...}} in every line; line {number} is '
            f"{line[:60]!r}"
        )
    for key, value in record.items():
        if not isinstance(value, str) or not value:
            raise UsageError(f"{file!r} must hold text; {key} of line {number} is {value!r}")
    return record


def _answer(network: ResidualNetwork, file: str, line: int, text: str) -> int:
    """The id of a line's answer."""
    try:
        return read_token(network, text)
    except UsageError as error:
        raise UsageError(f"the answer of line {line} of {file!r}: {error}") from error
