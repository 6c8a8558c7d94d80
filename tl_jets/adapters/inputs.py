"""Converts all accepted inputs to token ids and a mask of real tokens, both [batch, pos].

Padding is given by the mask; without one, it is inferred from the tokenizer's pad token:

- A pad token that is not also BOS, EOS or unknown is padding wherever a row begins or ends with it.
- If the pad token is also EOS or BOS, as TransformerLens sets it for tokenizers without one, padding is the excess of a
  row's run over the shortest run of the batch, so that an EOS at the end (or BOS at the start) of every prompt is real.
  A warning says what counts as padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tl_jets.core.caller import warn_caller
from tl_jets.core.tokens import check_text, token_text

_KINDS = "a prompt, a list of prompts, token ids [batch, pos], or what a tokenizer returns (input_ids, attention_mask)"
_CHAT = (
    "Input must be text or token ids; got chat messages. Write them as text, text = model.tokenizer.apply_chat_template("
    "messages, tokenize=False), and pass ResidualNetwork(model).tokenize(text, prepend_bos=False): a template writes its "
    "own BOS."
)


def read_input(
    model: Any, given: Any, attention_mask: Any = None
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"], Int[Tensor, "batch pos"] | None]:
    """Token ids, mask of real tokens, and the mask to pass to the model, or None if it needs none.

    Raises:
        ValueError: No prompt or an empty one, too long a prompt, ids outside the vocabulary, a wrong shape, two masks.
        TypeError: Neither text nor integer token ids.
    """
    if isinstance(given, Mapping):
        given, attention_mask = _encoded(given, attention_mask)
    given, tokenizer = _plain(given), getattr(model, "tokenizer", None)
    is_text = isinstance(given, list) and bool(given) and isinstance(given[0], str)
    if is_text:
        tokens, valid = read_text(model, given)
    else:
        tokens, valid = _read_ids(given)
        if attention_mask is None and bool(valid.all()):
            valid = _infer_padding(tokenizer, tokens)
    if attention_mask is not None:
        valid = _read_mask(attention_mask, tokens, valid)
    elif not bool(valid.all()) and getattr(model.cfg, "attention_dir", "causal") == "bidirectional":
        raise ValueError(
            "Prompts of unequal length are padded, which bidirectional attention would see; pass one prompt at a time, or "
            "tokens with an attention_mask."
        )
    _check_length(model, tokens.shape[1])
    tokens = _in_vocabulary(model, tokens, valid, is_text)
    # Without a mask, TransformerLens treats leading pad tokens as padding if the tokenizer pads left.
    is_left = getattr(tokenizer, "padding_side", "right") == "left"
    needs_mask = is_left or attention_mask is not None or not bool(valid.all())
    device = next(model.parameters()).device
    tokens, valid = torch.stack([tokens, valid.to(tokens)]).to(device)  # one copy, which waits for a device
    valid = valid.bool()
    return tokens, valid, valid.long() if needs_mask else None


def read_text(
    model: Any, prompts: Any, prepend_bos: bool | None = None
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Ids of prompts, padded on the right, and mask of real tokens. `prepend_bos=None` is the model's default.

    Raises:
        ValueError: No prompt or an empty one, text that is no UTF-8, or a model without a tokenizer.
        TypeError: Not text.
    """
    prompts = _plain(prompts)
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"Text must be a prompt or a list of prompts; got {_described(prompts)}.")
    if not prompts:
        raise ValueError("There must be at least one prompt; got none.")
    if not all(prompts):
        raise ValueError("A prompt must have at least one character; got an empty one. Pass text or token ids.")
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("Text needs a model with a tokenizer; this one has none. Pass token ids [batch, pos].")
    for prompt in prompts:
        check_text("A prompt", prompt)
    option = {} if prepend_bos is None else {"prepend_bos": prepend_bos}
    rows = [model.to_tokens(prompt, truncate=False, **option)[0].cpu() for prompt in prompts]
    if not all(len(row) for row in rows):
        raise ValueError("A prompt must have at least one token; the tokenizer made none of one. Pass other text.")
    if prepend_bos is None:
        _warn_of_two_bos(tokenizer, prompts, rows)
    pad = getattr(tokenizer, "pad_token_id", None)
    return _padded(rows, 0 if pad is None else int(pad))


def _warn_of_two_bos(tokenizer: Any, prompts: list[str], rows: list[Tensor]) -> None:
    """Warn if text from a chat template starts with the BOS that the model also prepends."""
    text, bos = getattr(tokenizer, "bos_token", None), getattr(tokenizer, "bos_token_id", None)
    if not text or bos is None:
        return
    pairs = zip(prompts, rows, strict=True)
    twice = sum(prompt.startswith(text) and row[:2].tolist() == [bos, bos] for prompt, row in pairs)
    if twice:
        warn_caller(
            f"{twice} of {len(prompts)} prompts begin with 2 BOS tokens: the text begins with {text!r}, and the model prepends "
            f"another. Pass ResidualNetwork(model).tokenize(text, prepend_bos=False) in place of text that has its BOS, as a "
            f"chat template writes it (prepend_bos=True if two are meant)."
        )


def _plain(given: Any) -> Any:
    """The input as a tensor, or a list of prompts, ids, or rows of ids."""
    if isinstance(given, Tensor):
        return given
    if not isinstance(given, (str, bytes)) and callable(getattr(given, "tolist", None)):  # NumPy, pandas
        given = given.tolist()
    if isinstance(given, str):
        return [given]
    if isinstance(given, (bytes, bytearray)) or not isinstance(given, Sequence):
        raise TypeError(f"Input must be {_KINDS}; got {_described(given)}.")
    given = list(given)
    # Of several chats, the first message.
    first = [row[0] if isinstance(row, (list, tuple)) and row else row for row in given]
    if any(isinstance(item, Mapping) for item in first):
        is_chat = all(isinstance(item, Mapping) and "role" in item for item in first)
        raise TypeError(_CHAT if is_chat else f"Input must be {_KINDS}; got a list of dicts.")
    others = [i for i, item in enumerate(given) if not isinstance(item, str)]
    if 0 < len(others) < len(given):
        raise TypeError(f"Prompts must all be text; item {others[0]} is {_described(given[others[0]])}.")
    return given


def _encoded(given: Mapping[str, Any], attention_mask: Any) -> tuple[Any, Any]:
    """Ids and mask of a tokenizer's output."""
    if "input_ids" not in given:
        keys = f"A dict must hold input_ids, and may hold an attention_mask; got one of {sorted(map(str, given))}."
        raise TypeError(_CHAT if "role" in given else keys)
    own = given.get("attention_mask")
    if own is not None and attention_mask is not None:
        raise ValueError("A dict already holds its attention_mask; got another. Leave one out.")
    return given["input_ids"], attention_mask if own is None else own


def _read_ids(given: Any) -> tuple[Tensor, Tensor]:
    """Ids [batch, pos], and mask of those not filled in behind shorter rows, on the device of the ids."""
    if isinstance(given, list) and not given:
        raise ValueError("Input must hold at least one prompt; got an empty list.")
    if isinstance(given, list) and (isinstance(given[0], Sequence) or getattr(given[0], "ndim", 0)):
        rows = [_tensor(row) for row in given]
        rows = [row[0] if row.ndim == 2 and len(row) == 1 else row for row in rows]
        wrong = next((row for row in rows if row.ndim != 1 or not len(row)), None)
        if wrong is not None:
            raise ValueError(
                f"A list of token ids must hold one row [pos] a prompt, pos >= 1; got a row of shape {tuple(wrong.shape)}."
            )
        return _padded(rows, 0)
    tokens = _tensor(given)
    if tokens.ndim == 1:
        tokens = tokens[None]
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(f"Token ids must have shape [batch, pos] with pos >= 1; got {tuple(tokens.shape)}.")
    return tokens, torch.ones_like(tokens, dtype=torch.bool)


def _tensor(ids: Any) -> Tensor:
    """Ids as int64, on the CPU: every look at them on a device would wait for it."""
    try:
        tokens = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        got = f"{_described(ids)}, which is no array of ids ({error})"
        raise TypeError(f"Input must be {_KINDS}; got {got}.") from error
    if tokens.is_meta:
        raise ValueError("Token ids must have values; got a tensor on the meta device, which has none.")
    if tokens.numel() and (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype is torch.bool):
        raise TypeError(
            f"Token ids must be integers [batch, pos]; got dtype {tokens.dtype}. Convert them with .long()."
        )
    return tokens.long().cpu()


def _padded(rows: list[Tensor], fill: int) -> tuple[Tensor, Tensor]:
    """Rows [pos], padded on the right to [batch, pos], and mask of those not filled in."""
    device = rows[0].device
    tokens = pad_sequence([row.to(device, torch.long) for row in rows], batch_first=True, padding_value=fill)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return tokens, torch.arange(tokens.shape[1], device=device) < lengths[:, None]


def _read_mask(attention_mask: Any, tokens: Tensor, filled: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """A 0/1 attention mask as booleans, checked against the tokens; given in rows if the tokens are."""
    if isinstance(attention_mask, (list, tuple)) and not bool(filled.all()):
        mask, found = _padded([torch.as_tensor(row).flatten() for row in attention_mask], 0)
        mask = mask if torch.equal(found, filled.to(found.device)) else mask[:0]
    else:
        mask = torch.as_tensor(attention_mask).cpu()
    if mask.shape != tokens.shape:
        raise ValueError(f"attention_mask must have the tokens' shape {tuple(tokens.shape)}; got {tuple(mask.shape)}.")
    if not bool(((mask == 0) | (mask == 1)).all()) or not bool(mask.bool().any(-1).all()):
        raise ValueError("attention_mask must be 0 or 1 with a 1 in every row; got something else.")
    return mask.bool().to(tokens.device) & filled


def _infer_padding(tokenizer: Any, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """Mask of real tokens, from pad tokens at the ends of rows; batches of only pad or of single tokens are real."""
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    real = tokens != pad
    if bool((real[:, 0] & real[:, -1]).all()) or tokens.shape[1] == 1 or not bool(real.any()):
        return torch.ones_like(real)
    if not bool(real.any(1).all()):
        raise ValueError(
            f"Every prompt must have a real token; rows {(~real.any(1)).nonzero()[:, 0].tolist()} are nothing but the pad token "
            f"{pad}. Leave them out, or pass attention_mask= with 1 for real tokens."
        )
    runs = torch.stack([real.long().argmax(1), real.flip(1).long().argmax(1)])  # before and after what is real
    kept = torch.zeros_like(runs[:, :1])
    roles = [name for name in ("bos", "eos", "unk") if getattr(tokenizer, f"{name}_token_id", None) == pad]
    if roles:
        kept = runs.amin(1, keepdim=True)
        if "bos" in roles and int(runs[0].max()) == 1:
            kept[0] = 1  # a lone BOS
    before, after = (runs - kept).clamp_min(0)
    place = torch.arange(tokens.shape[1], device=tokens.device)
    valid = (place >= before[:, None]) & (place < tokens.shape[1] - after[:, None])
    left = int(runs.sum()) - int((~valid).sum())
    if roles and (not bool(valid.all()) or int(kept.max()) > 1 or bool((runs[0] < kept[0]).any())):
        warn_caller(
            f"Rows of this batch begin or end with the pad token {token_text(tokenizer, pad)!r} (id {pad}), which is "
            f"also {' and '.join(name.upper() for name in roles)}: {int(before.sum())} leading and {int(after.sum())} trailing "
            f"ones are taken for padding, {left} for real. Pass attention_mask= (1 for real tokens), or the prompts as a list "
            f"of texts, to decide it."
        )
    return valid


def _in_vocabulary(model: Any, tokens: Tensor, valid: Tensor, is_text: bool) -> Tensor:
    """Tokens after a check that real ones have an embedding; padding without one becomes id 0."""
    d_vocab = min(int(model.cfg.d_vocab), len(model.W_E))
    outside = (tokens < 0) | (tokens >= d_vocab)
    wrong = tokens[outside & valid].unique().tolist()
    if wrong and is_text:
        names = ", ".join(f"{token_text(model.tokenizer, token)!r} (id {token})" for token in wrong[:5])
        raise ValueError(
            f"Token ids must lie in 0..{d_vocab - 1}, the rows of the embedding; the tokenizer makes {names} of this text. Leave "
            f"such tokens out, or resize the embedding first (hf_model.resize_token_embeddings(len(tokenizer)))."
        )
    if wrong:
        raise ValueError(
            f"Token ids must lie in 0..{d_vocab - 1}; got {int(tokens[valid].min())}..{int(tokens[valid].max())}. Is this the "
            f"tokenizer of another model?"
        )
    return tokens.masked_fill(outside, 0)


def _check_length(model: Any, length: int) -> None:
    n_ctx = getattr(model.cfg, "n_ctx", None)
    if n_ctx is not None and length > n_ctx:
        raise ValueError(f"A prompt must fit the context of {n_ctx} tokens; got {length}. Shorten it.")


def _described(given: Any) -> str:
    """A short description of an input."""
    if given is None or isinstance(given, (int, float)):
        return repr(given)
    kind = type(given)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
