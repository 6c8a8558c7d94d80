"""`TraceValues`: the activations of one run, or the difference of two, as plain tensors without the model.

A `Trace` belongs to a running model and evaluates on request. `trace.freeze()` reads all its labels at once, and
`trace - other` is the difference of two runs of one shape: of a clean and a corrupted prompt, or of a run with and without
hooks. Both answer to the same names as a trace, move, save and load.

Example:
    >>> import tl_jets as tj
    >>> network = tj.ResidualNetwork(tj.load_tinydocs())
    >>> clean, other = (network.trace(f"This function is available on {word} and") for word in ("Unix", "Windows"))
    >>> change = other - clean
    >>> torch.equal(change["resid_post", 1], other["2_pre"] - clean["2_pre"])
    True
    >>> change.to_dataframe().query("label == '3_mlp_out'")[["pos", "token", "length"]].head(3).length.tolist()
    [0.0, 0.0, 0.0]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_jets.calculus import norm_jet
from tl_jets.core.labels import LabelInput, read_label
from tl_jets.core.model_marks import model_mark
from tl_jets.core.protocol import FINAL_STREAM, some
from tl_jets.core.results import Result, handle
from tl_jets.core.tokens import token_names

EDIT = "edit:"
FINAL_SCALE = "ln_final.hook_scale"


@dataclass(frozen=True, eq=False, repr=False)
class TraceValues(Result):
    """Activations by label [batch, pos, d_model]; index it by a trace's labels or TransformerLens' names.

    Attributes:
        values: Streams, writes, sources and edits by label.
        tokens: The input [batch, pos]; of a difference, that of the first run.
        valid: Real tokens, True, and padding, False [batch, pos].
        n_layers: Number of blocks.
        is_difference: Whether these are one run's values less another's.
        model: Name of the model, and a digest of its weights (`tl_jets.core.model_marks`).
        token_names: Texts of the ids.
        logits: The model's own output, or the difference of two; None if there was none.
        final_scale: The scale of the final norm, as in `ln_final.hook_scale`; None without a norm, and of a difference.
        network: The network of the (first) run; None in a loaded result.
    """

    values: dict[str, Float[Tensor, "batch pos d_model"]]
    tokens: Int[Tensor, "batch pos"]
    valid: Bool[Tensor, "batch pos"]
    n_layers: int
    is_difference: bool
    model: str
    token_names: dict[int, str]
    logits: Float[Tensor, "batch pos d_vocab"] | None = None
    final_scale: Float[Tensor, "batch pos 1"] | None = None
    network: Any = handle()

    @classmethod
    @torch.no_grad()
    def of(cls, trace: Any) -> TraceValues:
        """Copies of all labels of a `Trace`."""
        network = trace.network
        return cls(
            values={label: trace[label].detach().clone() for label in trace.labels},
            tokens=trace.tokens.clone(),
            valid=trace.valid.clone(),
            n_layers=network.n_layers,
            is_difference=False,
            model=model_mark(network, trace.recording.hook_state),
            token_names=token_names(network.tokenizer, [trace.tokens]),
            logits=None if trace.logits is None else trace.logits.detach().clone(),
            final_scale=final_scale(trace),
            network=network,
        )

    def __repr__(self) -> str:
        what = "difference of two runs of " if self.is_difference else ""
        return f"TraceValues({what}{self.model}, tokens {list(self.tokens.shape)}, {len(self.values)} labels)"

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label."""
        return tuple(self.values)

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def __contains__(self, label: object) -> bool:
        try:
            return read_label(label, self.n_layers) in self.values  # type: ignore[arg-type]
        except ValueError:
            return False

    def __getitem__(self, label: LabelInput) -> Float[Tensor, "batch pos d_model"]:
        name = read_label(label, self.n_layers)
        if name not in self.values:
            raise ValueError(
                f"A label must be one of {some(self.values, near=label)}; got {label!r}. Neurons, and what is "
                f"inside a block, are read from the traces themselves."
            )
        return self.values[name]

    def __sub__(self, other: Any) -> TraceValues:
        """These values less those of another `Trace` or `TraceValues`; an edit that one of them lacks counts as zero.

        Raises:
            ValueError: Other shapes, padding or labels, or a difference less something of another kind.
        """
        if not isinstance(other, TraceValues):
            freeze = getattr(other, "freeze", None)
            if freeze is None:
                return NotImplemented
            other = freeze()
        _check_alike(self, other)
        zero = torch.zeros_like(next(iter(self.values.values())))
        labels = dict.fromkeys([*self.values, *other.values])
        own, less = self.values, other.values
        logits = (
            None if self.logits is None or other.logits is None else self.logits - other.logits.to(self.logits.device)
        )
        return replace(
            self,
            values={k: own.get(k, zero) - less.get(k, zero).to(zero.device) for k in labels},
            is_difference=True,
            logits=logits,
            final_scale=None,
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row per label, prompt and real position: label, batch, pos (among real tokens), token, length (2-norm)."""
        lengths = torch.stack([value.double().norm(dim=-1) for value in self.values.values()])
        real = self.valid.expand(lengths.shape)
        i, b, p = real.nonzero().T
        index = {"label": [self.labels[label] for label in i], "batch": b.tolist()}
        index |= {"pos": (self.valid.cumsum(1) - 1)[b, p].tolist()}
        index["token"] = [self.token_names[int(token)] for token in self.tokens[b, p]]
        return pd.DataFrame(index | {"length": lengths[real].tolist()})


def final_scale(trace: Any) -> Float[Tensor, "batch pos 1"] | None:
    """What the final norm divides by, as TransformerLens caches it; None without a norm."""
    norm, final = trace.decoder.norm, trace[FINAL_STREAM]
    return None if norm.kind == "none" else 1 / norm_jet(norm, final, final, 0).alpha[0][..., None].to(final.dtype)


def _check_alike(one: TraceValues, other: TraceValues) -> None:
    """Raise ValueError unless two runs can be subtracted."""
    if one.valid.shape != other.valid.shape or not torch.equal(one.valid, other.valid.to(one.valid.device)):
        raise ValueError(
            f"Runs that are subtracted must have the same numbers of prompts and tokens, and the same padding; got "
            f"{one.valid.sum(1).tolist()} and {other.valid.sum(1).tolist()} tokens by prompt, in rows of {one.valid.shape[1]} and "
            f"{other.valid.shape[1]}. Choose prompts that have the same number of tokens."
        )
    differ = sorted(label for label in one.values.keys() ^ other.values.keys() if not label.startswith(EDIT))
    shapes = {value.shape for values in (one.values, other.values) for value in values.values()}
    if differ or len(shapes) > 1:
        raise ValueError(
            f"Runs that are subtracted must have the same labels and width; got {sorted(map(list, shapes))}, and only one of "
            f"them has {some(differ)}. Take the same model and granularity."
        )
