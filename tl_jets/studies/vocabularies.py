"""Check that two models, or a table and a model, share one vocabulary: that an id means the same token in both."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tl_jets.core.network import ResidualNetwork
from tl_jets.core.tokens import token_names
from tl_jets.ngrams.tables import NgramTable

# Number of a table's ids that are compared, evenly spaced.
SAMPLE = 1000


@dataclass(frozen=True)
class Vocabulary:
    """Size `d_vocab` of the output vocabulary, and ids of the tokenizer's entries; None without a tokenizer."""

    d_vocab: int
    ids: dict[str, int] | None = field(repr=False)

    @classmethod
    def of(cls, model: Any) -> Vocabulary:
        """The vocabulary of a model."""
        network = ResidualNetwork(model)
        tokenizer = network.tokenizer
        return cls(network.decoder.d_vocab, None if tokenizer is None else dict(tokenizer.get_vocab()))

    def check(self, other: Vocabulary, name: str = "the other model") -> None:
        """Raise ValueError unless another model's ids mean the same tokens."""
        if self.d_vocab != other.d_vocab:
            raise ValueError(
                f"Models must share one vocabulary; this one has {self.d_vocab} tokens, {name} {other.d_vocab}. Compare "
                "checkpoints of one tokenizer."
            )
        if (self.ids is None) != (other.ids is None):
            raise ValueError(
                f"Models must share one vocabulary, which their tokenizers tell; one of this and {name} has no tokenizer. "
                "Load both with it, or both without."
            )
        if self.ids is not None and other.ids is not None and self.ids != other.ids:
            different = {token for token, _ in self.ids.items() ^ other.ids.items()}
            raise ValueError(
                f"Models must share one vocabulary; {len(different)} entries of the tokenizers of this one and {name} differ, "
                f"such as {sorted(different)[:3]}. Compare checkpoints of one tokenizer."
            )


def check_table(table: NgramTable, network: ResidualNetwork) -> None:
    """Raise ValueError if ids of a table mean other texts in the model's vocabulary (not without a tokenizer)."""
    if network.tokenizer is None:
        return
    ids = table.ids.unique()
    own = token_names(network.tokenizer, [ids[:: -(-len(ids) // SAMPLE)]])
    # Spaces are stripped: texts may have been given without them.
    different = [token for token, text in own.items() if table.names[token].strip() not in (text.strip(), str(token))]
    if different:
        token = different[0]
        raise ValueError(
            f"A table must be of the model's vocabulary; {len(different)} of {len(own)} ids that were compared have another text "
            f"there, such as {token}: {table.names[token]!r}, and {own[token]!r} for the model. Make it with the model's tokenizer."
        )
