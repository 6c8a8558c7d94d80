"""Text of token ids, with spaces, whatever the tokenizer does to single tokens."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

# Decoding an id takes some 20 microseconds, and a lens of a real model names thousands.
_DECODED: WeakKeyDictionary[Any, tuple[Any, dict[int, str]]] = WeakKeyDictionary()


def token_text(tokenizer: Any, token: int) -> str:
    """The text that a token adds after another; many tokenizers drop the leading space of a single token.

    Tokens that decode to nothing or to the replacement character are shown as the tokenizer's entry, such as `<0xE2>`,
    unknown ids as `id:4096`. Without a tokenizer, the id itself.
    """
    if tokenizer is None:
        return str(token)
    alone, twice = tokenizer.decode([token]), tokenizer.decode([token, token])
    text = twice[len(alone) :] if twice.startswith(alone) else alone
    if not text or "\ufffd" in text:
        entry = getattr(tokenizer, "convert_ids_to_tokens", lambda token: None)
        try:
            text = entry(token) or f"id:{token}"
        except (IndexError, KeyError, OverflowError):
            text = f"id:{token}"
    return writable(text)


def writable(text: str) -> str:
    """Text with lone surrogates escaped, so that files can hold it."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def check_text(what: str, text: str) -> None:
    """Raise ValueError for text with a lone surrogate, which is not Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} must be text that can be written as UTF-8; got a lone surrogate, {text[error.start]!a}, at character "
            f"{error.start}. Write text.encode('utf-8', 'replace').decode()."
        ) from error


def token_names(tokenizer: Any, tensors: Iterable[Tensor]) -> dict[int, str]:
    """Texts of all ids in some tensors without padding (-1), each decoded once; TypeError if not a tokenizer."""
    if tokenizer is not None and not callable(getattr(tokenizer, "decode", None)):
        raise TypeError(
            f"tokenizer must be a Hugging Face tokenizer, or None; got {tokenizer!r}. The number of tokens is an "
            "option of the call that made the result (top_k)."
        )
    every = [tensor.flatten() for tensor in tensors]
    # All at once: every look at a device waits for it.
    found = torch.cat([each.to(every[0].device) for each in every]).cpu().unique().tolist() if every else []
    ids = set(found) - {-1}
    known = _texts(tokenizer)
    known.update((token, token_text(tokenizer, token)) for token in ids - known.keys())
    return {token: known[token] for token in sorted(ids)}


def _texts(tokenizer: Any) -> dict[int, str]:
    """Texts of a tokenizer's ids that were decoded before; none once tokens were added or `decode` is another."""
    try:
        state = len(tokenizer), getattr(tokenizer.decode, "__func__", tokenizer.decode)
        before, texts = _DECODED.get(tokenizer, (None, {}))
    except (TypeError, AttributeError):  # no tokenizer, no length, or no weak reference: nothing is kept
        return {}
    if before != state:
        texts = {}
        _DECODED[tokenizer] = state, texts
    return texts


def decode(tokenizer: Any, ids: Tensor) -> Any:
    """Texts of ids as nested lists; None at padding (-1). Raises ValueError without a tokenizer."""
    if tokenizer is None:
        raise ValueError("Tokens are decoded with a tokenizer; the model has none. Pass tokenizer=...")
    return nested_texts(token_names(tokenizer, [ids]), ids)


def nested_texts(names: Mapping[int, str], ids: Tensor) -> Any:
    """Texts of ids as nested lists, from `token_names` of them; None at padding (-1)."""

    def nested(values: Any) -> Any:
        return [nested(value) for value in values] if isinstance(values, list) else names.get(values)

    return nested(ids.tolist())


def unescaped(text: str) -> str:
    """The text that `visible` shows as `text`."""
    text = text.replace("\u00b7", " ")
    try:
        return ast.literal_eval(f"'{text}'") if "\\" in text and "'" not in text and "\n" not in text else text
    except (SyntaxError, ValueError):
        return text


def visible(text: str | None) -> str:
    """A token's text with visible spaces and line breaks; padding is `?`, an empty token the empty set."""
    return "?" if text is None else repr(text)[1:-1].replace(" ", "\u00b7") or "\u2205"
