"""`over_prompts`: a tool over any number of prompts, in batches that fit in memory, as one result.

Prompts are sorted by length, so that a batch holds little padding, and put back in their order. A batch holds as many as
fit into `max_bytes`; a tool is taken to hold, a token of the padded batch,

    8 bytes * 8 * (d_model * (components + streams) + d_vocab) + bytes of a weight * heads * (2 layers + 8) * length

the latter for attention patterns [head, length, length]: a frozen network keeps two a layer, a pass holds some of one.
It is above what each of them was measured to take (`tests/core/test_prompts.py`). Processes that `torchrun` started
divide the batches (`tl_jets.core.processes`).

Example:
    >>> import tl_jets as tj
    >>> prompts = ["This function is available on Unix and", "If the file", "A list of"]
    >>> lens = over_prompts(tj.iterative_jet_lens, tj.load_tinydocs(), prompts, positions=-1, order=1)
    >>> lens.tokens.shape, lens.positions.flatten().tolist()
    (torch.Size([3, 1]), [7, 3, 3])
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from tl_jets.core.averages import Averaged
from tl_jets.core.concatenation import check_joinable, concat
from tl_jets.core.free_memory import check_fits, free_bytes
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.options import check_integers
from tl_jets.core.processes import Distributed, Processes
from tl_jets.core.results import Result
from tl_jets.core.structure import Structure

Kind = TypeVar("Kind", bound=Averaged)

# Copies in float64 of a token's components, streams and logits that a tool holds.
COPIES = 8
# Copies of one layer's attention patterns that a forward pass holds (stacked runs of ablations the most).
PATTERNS = 8
# Share of the free memory that a batch may take, and its bound where the free memory is unknown.
SHARE, UNKNOWN = 4, 2**30
# Options that belong to one batch of prompts.
OF_ONE_CALL = ("cache", "weights", "attention_mask")


def over_prompts(
    tool: Callable[..., Kind],
    model: Any,
    prompts: Any,
    *,
    max_bytes: int | None = None,
    distributed: Distributed = False,
    progress: bool = True,
    **options: Any,
) -> Kind:
    """What `tool(model, prompts, **options)` returns, computed in batches that fit in memory, on the CPU.

    Equal to one call, up to rounding; prompts are padded on the right, and resampled ablations draw within each batch.

    Args:
        tool: `iterative_jet_lens`, `joint_jet_lens`, `path_sums`, `path_lengths`, `ablation_effect`, or another function
            of a model and prompts whose results `concat` joins.
        model: A TransformerLens model, or a `ResidualNetwork`.
        prompts: A list of texts, a list of rows of ids (all real tokens), or what a tokenizer or
            `ResidualNetwork.tokenize` returns (`input_ids`, `attention_mask`).
        max_bytes: Memory of a batch, in bytes; None for a quarter of what is free on the model's device. A prompt that
            takes more is a batch of its own.
        distributed: True (or a process group): the processes that `torchrun` started divide the batches, and all return
            the whole.
        progress: Show a bar in a terminal.
        options: The tool's. `targets` may be one list a prompt, or ids [batch, pos, target] in the prompts' order.

    Raises:
        ValueError: No prompts, options of a single batch (`cache`, `weights` as numbers, `attention_mask`), or the
            whole result does not fit in memory; and what the tool raises.
        TypeError: Prompts of another kind, or results that `concat` does not join.

    Cost: that of the tool, whose fixed costs are paid once a batch; all results are held twice while they are joined.

    Example: in the docstring of `tl_jets.core.prompts`.
    """
    processes, call = Processes.of(distributed), _Call.of(tool, model, prompts, options)
    device, rows = call.network.decoder.W_U.device, call.rows
    free = min(processes.exchange(lambda: free_bytes(device) or SHARE * UNKNOWN)) // SHARE
    limit = free // (1 if device.type == "cuda" else processes.size) if max_bytes is None else max_bytes
    check_integers(1, max_bytes=limit)
    own_bytes = token_bytes(call.network, options.get("granularity"))
    batches = batches_of([len(row) for row in rows], limit / own_bytes, pattern_bytes(call.network) / own_bytes)
    processes.agree(call.description, lambda said: said)
    own = sum(map(len, batches[processes.rank :: processes.size]))
    with tqdm(total=own, unit="prompt", delay=1, leave=False, disable=None if progress else True) as bar:

        def read(batch: list[int]) -> Any:
            found = call(batch)
            # Longer prompts come first.
            n_bytes = 2 * len(rows) * -(-_size(found) // len(batch))
            check_fits(n_bytes, f"The result of {len(rows)} prompts", "Take fewer positions, layers or prompts.")
            bar.update(len(batch))
            return found

        return concat(processes.map(read, batches), rows=batches)


@dataclass(frozen=True, eq=False)
class _Call:
    """A tool on some of the prompts."""

    tool: Callable[..., Any]
    network: ResidualNetwork
    rows: list[Tensor]
    targets: Any
    options: dict[str, Any]

    @classmethod
    def of(cls, tool: Callable[..., Any], model: Any, prompts: Any, options: dict[str, Any]) -> _Call:
        """Read the prompts and check the options."""
        for name in OF_ONE_CALL:
            if not isinstance(options.get(name), str | None):
                raise ValueError(f"Options must hold for every batch; {name} belongs to one. Leave it out.")
        network = ResidualNetwork.of(model)
        rows = read_rows(network, prompts)
        targets: Any = options.get("targets")
        targets = targets.tolist() if callable(getattr(targets, "tolist", None)) else targets
        call = cls(tool, network, rows, targets, {k: v for k, v in options.items() if k != "targets"})
        if call.by_prompt and len(targets) != len(rows):
            raise ValueError(f"targets of single prompts must be one list a prompt, {len(rows)}; got {len(targets)}.")
        return call

    @property
    def by_prompt(self) -> bool:
        """Whether every prompt has its own targets."""
        return isinstance(self.targets, list | tuple) and isinstance(self.targets[0], list | tuple)

    def description(self) -> dict[str, Any]:
        """What must be equal in all processes."""
        said = repr([[row.tolist() for row in self.rows], self.targets])
        about = {"tool": self.tool.__name__, "model": self.network.view.name, "options": repr(self.options)}
        return about | {"prompts": hashlib.sha256(said.encode()).hexdigest()}

    def __call__(self, batch: Sequence[int]) -> Any:
        """The tool's result, on the CPU."""
        rows, options, targets = [self.rows[i] for i in batch], self.options, self.targets
        if self.by_prompt:
            targets = [targets[i] for i in batch]
            if isinstance(targets[0][0], list):  # ids [batch, pos, target]
                length = max(map(len, rows)) if options.get("positions") is None else None
                targets = torch.tensor(targets, device="cpu")[:, :length]
        if targets is not None:
            options = options | {"targets": targets}
        found = self.tool(self.network, _padded(rows), **options)
        check_joinable([found])
        if isinstance(targets, list) and self.by_prompt:
            # One prompt's targets would keep their names.
            found = replace(found, target_names=list(range(len(targets[0]))))
        return found.to("cpu")


def token_bytes(network: Structure, granularity: Any = None) -> int:
    """Bytes that a tool is taken to hold for every token of a batch (see the module)."""
    at, decoder = network if granularity is None else network.at(granularity), network.decoder
    vectors = len(at.components) + len(at.streams)
    return 8 * COPIES * (vectors * decoder.W_U.shape[0] + decoder.d_vocab)


def pattern_bytes(network: Structure) -> int:
    """Bytes that a tool is taken to hold of attention patterns, for every token and every token that it may attend to."""
    heads = getattr(getattr(network.view, "cfg", None), "n_heads", 0)
    return network.decoder.W_U.dtype.itemsize * heads * (2 * network.n_layers + PATTERNS)


def batches_of(lengths: Sequence[int], most: int | float, pattern: int | float = 0.0) -> list[list[int]]:
    """Indices of prompts, the longest first, in batches of at most `most` padded tokens, or of one prompt.

    A token counts as `1 + pattern * length`, for what grows with the square of the length.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    for i in order:
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and longest * (1 + pattern * longest) * (len(batches[-1]) + 1) <= most:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def read_rows(network: ResidualNetwork, prompts: Any) -> list[Tensor]:
    """The token ids of every prompt, without padding [pos]."""
    if isinstance(prompts, list | tuple) and all(isinstance(prompt, str) for prompt in prompts):
        prompts = network.tokenize(list(prompts))
    if isinstance(prompts, Mapping) and {"input_ids", "attention_mask"} <= set(prompts):
        ids, masks = (list(map(torch.as_tensor, prompts[name])) for name in ("input_ids", "attention_mask"))
        return [row[mask.bool()].cpu() for row, mask in zip(ids, masks, strict=True)]
    if not isinstance(prompts, list | tuple) or any(isinstance(prompt, str | int) for prompt in prompts):
        raise TypeError(
            "Prompts must be a list of texts, a list of rows of ids, or what a tokenizer returns (input_ids and "
            f"attention_mask); got {type(prompts).__name__}. Pass a tensor as list(tokens) if all its tokens are real."
        )
    return [torch.as_tensor(row).flatten().cpu() for row in prompts]


def _padded(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Ids and mask of a batch [batch, pos], padded on the right."""
    tokens = pad_sequence(list(rows), batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": tokens, "attention_mask": mask}


def _size(result: Any) -> int:
    """Bytes of a result's tensors."""
    values = [getattr(result, field.name) for field in fields(result) if not field.metadata.get("handle")]
    return sum(v.nbytes if isinstance(v, Tensor) else _size(v) if isinstance(v, Result) else 0 for v in values)
