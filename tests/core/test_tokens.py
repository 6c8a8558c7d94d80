"""How token ids are written."""

from __future__ import annotations

from typing import ClassVar

import pandas as pd
import pytest
import torch
import zoo

from tl_jets.core.tokens import check_text, decode, token_names, token_text, visible


class Tokenizer:
    """Ids are characters; a lone token loses its leading space, as in SentencePiece tokenizers."""

    words = (" the", "ing", "\n", " ", "", "\ufffd", " \ufffd", "", "a\ud800")
    entries: ClassVar = {4: "<0x00>", 5: "<0xE2>", 6: "\u2581<0xE2>"}

    def decode(self, ids):
        return "".join(self.words[i] for i in ids).removeprefix(" ")

    def convert_ids_to_tokens(self, token):
        return self.entries.get(token)


@pytest.mark.parametrize(
    ("token", "text"),
    [*enumerate(Tokenizer.words[:4]), *Tokenizer.entries.items(), (7, "id:7"), (8, "a\\ud800")],
)
def test_token_text_keeps_leading_spaces(token, text):
    assert token_text(Tokenizer(), token) == text
    assert token_text(None, token) == str(token)


def test_a_tokenizer_without_entries():
    class Bare:
        def decode(self, ids):
            return "\ufffd" * len(ids)

    assert token_text(Bare(), 3) == "id:3"


def test_texts_that_tables_and_tokenizers_do_not_take():
    with pytest.raises(ValueError, match=r"UTF-8; got a lone surrogate, '\\ud800', at character 2"):
        check_text("A prompt", "ab\ud800")
    pd.DataFrame({"token": [token_text(Tokenizer(), 8)]}).to_json()


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


def test_texts_are_decoded_once_and_anew_when_tokens_are_added():
    class Growing(Tokenizer):
        def __init__(self):
            self.asked, self.words = 0, list(Tokenizer.words)

        def __len__(self):
            return len(self.words)

        def decode(self, ids):
            self.asked += 1
            return super().decode(ids)

        def convert_ids_to_tokens(self, token):
            return None

    tokenizer, ids = Growing(), torch.tensor([[0, 1, -1], [4, 1, 0]])
    names = token_names(tokenizer, [ids])
    assert names == {0: " the", 1: "ing", 4: "id:4"}
    asked = tokenizer.asked
    assert token_names(tokenizer, [ids[0]]) == {0: " the", 1: "ing"} and tokenizer.asked == asked
    tokenizer.words[4] = "new"
    tokenizer.words.append("more")
    assert token_names(tokenizer, [ids, torch.tensor([9])]) == {0: " the", 1: "ing", 4: "new", 9: "more"}
    tokenizer.decode = lambda ids: "x" * len(ids)
    assert token_names(tokenizer, [ids]) == dict.fromkeys((0, 1, 4), "x")
    other = Growing()
    assert token_names(other, [ids]) == names and other.asked > 0
