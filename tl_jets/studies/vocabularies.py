"""Check that two models, or a table and a model, share one vocabulary: that an id means the same token in both."""

from __future__ import annotations

from typing import Any

from tl_jets.core.network import ResidualNetwork
from tl_jets.core.tokens import token_names
from tl_jets.ngrams.tables import NgramTable

# Size, and ids of the tokenizer's entries; None without a tokenizer.
Vocabulary = tuple[int, dict[str, int] | None]
# Number of a table's ids that are compared, evenly spaced.
SAMPLE = 1000


def vocabulary_of(model: Any) -> Vocabulary:
    """The size of a model's output vocabulary, and the ids of its tokenizer's entries."""
    network = ResidualNetwork(model)
    tokenizer = network.tokenizer
    return network.decoder.d_vocab, None if tokenizer is None else dict(tokenizer.get_vocab())


def check_vocabulary(own: Vocabulary, other: Vocabulary, name: str = "the other model") -> None:
    """Raise ValueError unless another model's ids mean the same tokens."""
    (size, ids), (other_size, other_ids) = own, other
    if size != other_size:
        problem = f"this one has {size} tokens, {name} {other_size}. Compare checkpoints of one tokenizer."
    elif ids is None or other_ids is None:
        if ids is other_ids:
            return
        problem = f"their tokenizers tell it, and one of this and {name} has no tokenizer. Load both with it, or both without."
    elif ids != other_ids:
        different = sorted({token for token, _ in ids.items() ^ other_ids.items()})
        problem = (
            f"{len(different)} entries of the tokenizers of this one and {name} differ, such as {different[:3]}. Compare "
            "checkpoints of one tokenizer."
        )
    else:
        return
    raise ValueError(f"Models must share one vocabulary; {problem}")


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
