"""The runner of all commands, and their first steps: load the model, read the prompt, find the requested token."""

from __future__ import annotations

import argparse
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tl_jets.cli.arguments import EMBEDDED, EMBEDDED_PROMPT, UsageError, one_line
from tl_jets.cli.outputs import STDOUT, output_files, write
from tl_jets.cli.report import header
from tl_jets.core.divergence import CancellationWarning, DivergenceWarning
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.protocol import some
from tl_jets.core.structure import Structure
from tl_jets.core.tokens import token_text, unescaped, visible
from tl_jets.core.trace import Trace
from tl_jets.pretrained import load_model, load_tinydocs


@dataclass(frozen=True)
class Read:
    """A prompt that a model has read, and the position that was asked for, counted from the start."""

    network: ResidualNetwork
    trace: Trace
    prompt: str
    position: int

    def token(self, token: int) -> dict[str, Any]:
        """A token for a file: its visible text and its id."""
        return {"token": visible(token_text(self.network.tokenizer, token)), "id": token}

    @property
    def answer(self) -> int:
        """What the model says at the position."""
        assert self.trace.logits is not None, "it ran the model"
        return int(self.trace.logits[0, self.position].argmax())

    def given(self, token: str | None) -> int | None:
        """The id of a token that an option names; None without the option."""
        return None if token is None else read_token(self.network, token)

    def header(self, options: argparse.Namespace) -> dict[str, Any]:
        """The first entries of the JSON file of one prompt."""
        place = {"position": self.position, "read": self.last}
        return header(options.command, model=options.model, prompt=self.prompt, **place)

    @property
    def last(self) -> dict[str, Any]:
        """The token at the position."""
        return self.token(int(self.trace.tokens[0, self.position]))

    def asked(self, model: str, answer: dict[str, Any], target: dict[str, Any] | None = None) -> dict[str, str]:
        """The request, and the model's answer."""
        said = f"{answer['token']}, what the model says after {self.last['token']} (position {self.position})"
        rows = {"model": model, "prompt": self.prompt, "answer": said}
        if target is not None and target["id"] != answer["id"]:
            rows["target"] = f"{target['token']}, whose logit is explained"
        return rows


def run(options: argparse.Namespace) -> None:
    """Run a command; write its files first, then print its tables unless a file is standard output.

    Of the processes that torchrun started, which divide `--prompts`, the first writes and prints.
    """
    files = output_files(options)
    with warnings.catch_warnings(), _processes() as is_first:
        warnings.simplefilter("ignore", DivergenceWarning)  # the tables show the remainders
        warnings.simplefilter("ignore", CancellationWarning)  # and how much paths cancel
        try:
            report = import_module(f"tl_jets.cli.{options.command}").report(options)
        except (ValueError, NotImplementedError) as error:
            raise UsageError(one_line(error)) from error
        if not is_first:
            return
        for kind, parts in (("json", report.json), ("html", report.html), ("svg", report.svg)):
            if kind in files:
                write(files[kind], parts())
    if STDOUT not in files.values():
        report.show(explain=options.explain or getattr(options, "all", False))


def together() -> bool:
    """Whether this process shares the prompts with others, which torchrun started."""
    return dist.is_available() and dist.is_initialized()


@contextmanager
def _processes() -> Iterator[bool]:
    """Join the processes that torchrun started, if it did; yields whether this is the first, which writes and prints."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield True
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def read_prompt(model: str, prompt: str | None) -> str:
    """The requested prompt, or the embedded model's own."""
    if prompt is None:
        if model != EMBEDDED:
            raise UsageError("a --model of your own needs a --prompt")
        return EMBEDDED_PROMPT
    if not prompt:
        raise UsageError("the prompt must not be empty")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the prompt must be UTF-8; got bytes that are not at character {error.start}") from error
    return prompt


def read(options: argparse.Namespace, granularity: Any, step: Callable[[str], None]) -> Read:
    """Load the model and run it on the prompt."""
    prompt = read_prompt(options.model, options.prompt)
    step("loading TransformerLens and the model")
    network = load_network(options.model, granularity)
    step("forward pass")
    trace = network.trace(network.tokenize(prompt, prepend_bos=options.prepend_bos))
    length = trace.tokens.shape[1]
    if not -length <= options.position < length:
        raise UsageError(f"--position must lie in {-length}..{length - 1} for this prompt; got {options.position}")
    return Read(network, trace, prompt, options.position % length)


def ablated_positions(options: argparse.Namespace, asked: Read) -> list[int] | None:
    """Where `--ablate` and `--joint` ablate: everywhere (None), or with `--keep-bos` at all positions but the first."""
    length = asked.trace.tokens.shape[1]
    if options.keep_bos and length == 1:
        raise UsageError("--keep-bos leaves the first position as it is; this prompt has no other")
    return list(range(1, length)) if options.keep_bos else None


@contextmanager
def steps(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on standard error, in a terminal only; call the yielded function when a step begins."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    quiet = not console.is_terminal
    # Downloads draw their own bars on standard error.
    with Progress(*columns, console=console, transient=True, disable=quiet, redirect_stderr=False) as progress:
        task = progress.add_task("", total=total)
        yield lambda name: progress.update(task, description=name, advance=1)


def load_network(name: str, granularity: Any) -> ResidualNetwork:
    """Load the model silently, as a residual network."""
    try:
        with _quiet():
            model = load_tinydocs() if name == EMBEDDED else load_model(name)
            return ResidualNetwork(model, granularity)
    except FileNotFoundError as error:
        raise UsageError(one_line(error)) from error
    except OSError as error:
        raise UsageError(
            f"cannot load model {name!r}: it is no local directory, and the hub did not give it ({one_line(error, 120)})"
        ) from error
    except Exception as error:  # any failure of a loader is one of the model
        raise UsageError(f"cannot load model {name!r}: {one_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the loader's log, warnings and weight-loading bar; the bar of a download stays."""
    from transformers.utils import logging as of_transformers

    bar, disabled = of_transformers.is_progress_bar_enabled(), logging.root.manager.disable
    of_transformers.disable_progress_bar()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if bar:
            of_transformers.enable_progress_bar()


def read_layers(given: list[str] | None, n_layers: int) -> list[int | str] | None:
    """Layers by number or label; `20:30` stands for the layers from 20 up to 30, without it, as in Python."""
    chosen: list[int | str] = []
    for text in given or []:
        ends = text.split(":")
        if len(ends) == 2 and all(not end or end.lstrip("-").isdecimal() for end in ends):
            start, stop, _ = slice(*(int(end) if end else None for end in ends)).indices(n_layers + 1)
            if start >= stop:
                raise UsageError(f"--layers {text} names no layer of 0..{n_layers}")
            chosen += range(start, stop)
        else:
            chosen.append(int(text) if text.lstrip("-").isdecimal() else text)
    return chosen or None


def read_token(network: Structure, given: str, n_tokens: int | None = None) -> int:
    """The id of a single token, given as its text, as in the tables, or as `id:317`.

    A text is tried as it is, then with `\u00b7` read as a space, then after a space; each with the tokenizer, then
    among the texts of the whole vocabulary (not every tokenizer re-encodes a decoded text).
    """
    if not given:
        raise UsageError("a token must not be empty; give its text, or its id, as id:317")
    tokenizer, d_vocab = network.tokenizer, n_tokens or network.decoder.d_vocab
    by_id = re.fullmatch(r"id:(\d+)", given)
    if by_id:
        token = int(by_id[1])
        if token >= d_vocab:
            raise UsageError(f"a token's id must lie in 0..{d_vocab - 1}; got {given!r}")
        return token
    if tokenizer is None:
        raise UsageError(f"the model has no tokenizer; give a token by its id, as id:317, not {given!r}")
    texts = list(dict.fromkeys((given, unescaped(given), f" {given}")))
    by_text: dict[str, list[int]] | None = None
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        if len(ids) == 1 and ids[0] < d_vocab and token_text(tokenizer, ids[0]) == text:
            return int(ids[0])
        if by_text is None:
            by_text = {}
            for token in range(d_vocab):
                by_text.setdefault(token_text(tokenizer, token), []).append(token)
        found = by_text.get(text, [])
        if len(found) == 1:
            return found[0]
        if found:
            raise UsageError(
                f"{len(found)} tokens read {visible(text)}; give one by its id: {some([f'id:{i}' for i in found])}"
            )
    parts = " ".join(visible(token_text(tokenizer, i)) for i in tokenizer(given, add_special_tokens=False)["input_ids"])
    raise UsageError(
        f"no single token reads {visible(given)!r}; it is {parts}. Give one token, with its leading space, or id:317"
    )
