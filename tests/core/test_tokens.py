"""How token ids are written."""

from __future__ import annotations

import pytest
import torch
import zoo

from tl_jets.core.tokens import decode, token_names, token_text, visible


class Tokenizer:
    """Ids are characters; a lone token loses its leading space, as in SentencePiece tokenizers."""

    words = (" the", "ing", "\n", " ", "", "\ufffd")

    def decode(self, ids):
        return "".join(self.words[i] for i in ids).removeprefix(" ")


@pytest.mark.parametrize(("token", "text"), list(enumerate(Tokenizer.words)))
def test_token_text_keeps_leading_spaces(token, text):
    assert token_text(Tokenizer(), token) == text
    assert token_text(None, token) == str(token)


def test_a_tokenizer_that_merges_repeated_tokens():
    class Merging:
        def decode(self, ids):
            return "?" if len(ids) == 1 else "\u00e9"

    assert token_text(Merging(), 3) == "?"


def test_token_names_decode_each_id_once():
    seen = []

    class Counting(Tokenizer):
        def decode(self, ids):
            seen.append(tuple(ids))
            return super().decode(ids)

    ids = torch.tensor([[0, 1, 0], [-1, 1, 2]])
    assert token_names(Counting(), [ids, ids]) == {0: " the", 1: "ing", 2: "\n"}
    assert len(seen) == len(set(seen)) == 6


def test_decode_nests_as_the_ids_do():
    assert decode(Tokenizer(), torch.tensor([[[0], [1]], [[2], [-1]]])) == [[[" the"], ["ing"]], [["\n"], [None]]]
    with pytest.raises(ValueError, match=r"decoded with a tokenizer; the model has none. Pass tokenizer="):
        decode(None, torch.tensor([1]))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", "\u00b7the"),
        ("\n", "\\n"),
        ("", "\u2205"),
        (None, "?"),
        ("\t x", "\\t\u00b7x"),
        ("it's", "it's"),
        ("\x1b[2J", "\\x1b[2J"),
    ],
)
def test_visible(text, shown):
    """Nothing that moves a cursor reaches the terminal."""
    assert visible(text) == shown


@pytest.mark.skipif(zoo.STORIES is None, reason="stories260K is not beside this checkout")
def test_a_real_sentencepiece_tokenizer():
    tokenizer = zoo.load_stories("bridge").tokenizer
    ids = tokenizer("Lily had a red ball", add_special_tokens=False)["input_ids"]
    texts = [token_text(tokenizer, token) for token in ids]
    assert "".join(texts).strip() == "Lily had a red ball"
    assert " had" in texts and " a" in texts
