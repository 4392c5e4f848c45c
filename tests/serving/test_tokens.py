"""Tokenisation: limits, truncation, token ids, pairs."""

from __future__ import annotations

import threading

import pytest

from tests.serving.conftest import word_tokenizer
from turbotx.serving.refusals import BadInput, TooLarge
from turbotx.serving.schemas import Token
from turbotx.serving.tokens import CHARACTERS_PER_TOKEN, TokenRow


def test_special_tokens_and_segments():
    tokenizer = word_tokenizer()
    assert tokenizer.encode("w0 w1") == TokenRow((2, 4, 5, 3))
    assert tokenizer.encode(("w0", "w1")) == TokenRow((2, 4, 3, 5, 3), (0, 0, 0, 1, 1))


def test_too_long_is_refused_or_truncated_on_either_side():
    tokenizer = word_tokenizer(max_length=4)
    with pytest.raises(TooLarge, match="5 tokens, the model takes 4"):
        tokenizer.encode("w0 w1 w2")
    assert tokenizer.encode("w0 w1 w2", truncate=True).ids == (2, 4, 5, 3)
    assert tokenizer.encode("w0 w1 w2", truncate=True, keep_end=True).ids == (2, 5, 6, 3)


def test_pairs_keep_both_sides_when_truncated():
    tokenizer = word_tokenizer(max_length=7)
    row = tokenizer.encode(("w0 w1 w2 w3 w4", "w9"), truncate=True)
    assert row.ids == (2, 4, 5, 6, 3, 13, 3)
    row = tokenizer.encode(("w0", "w5 w6 w7 w8"), truncate=True)
    assert row.ids == (2, 4, 3, 9, 10, 11, 3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pairs_are_cut_as_the_tokenizer_cuts_them(side):
    for longest in (7, 8, 13):
        own = word_tokenizer().tokenizer
        own.enable_truncation(longest, strategy="longest_first", direction=side)
        tokenizer = word_tokenizer(max_length=longest)
        for first in range(1, 14):
            for second in range(1, 14):
                pair = tuple(" ".join(f"w{i}" for i in range(n)) for n in (first, second))
                row = tokenizer.encode(pair, truncate=True, keep_end=side == "left")
                assert row.ids == tuple(own.encode(*pair).ids), (longest, first, second)


def test_enormous_texts_are_cut_before_they_are_tokenised():
    tokenizer = word_tokenizer(max_length=4)
    seen = []
    encode = tokenizer.encode_text
    tokenizer.encode_text = lambda a, b, s=True: seen.append(len(a)) or encode(a, b, s)
    huge = "w0 " * 100_000
    assert len(tokenizer.encode(huge, truncate=True)) == 4
    with pytest.raises(TooLarge, match="300000 characters"):
        tokenizer.encode(huge)
    assert set(seen) == {4 * CHARACTERS_PER_TOKEN}  # with its special tokens, and without


def test_token_ids_are_checked():
    tokenizer = word_tokenizer(max_length=4)
    assert tokenizer.check_ids([5, 6]) == TokenRow((5, 6))
    for ids, error in (([], BadInput), ([-1], BadInput), ([9999], BadInput), ([5] * 5, TooLarge)):
        with pytest.raises(error):
            tokenizer.check_ids(ids)


@pytest.mark.parametrize("text", ["", ("w0", ""), ("", "w0")])
def test_empty_texts_are_refused(text):
    with pytest.raises(BadInput, match="empty"):
        word_tokenizer().encode(text)


def test_lone_surrogates_are_refused():
    with pytest.raises(BadInput, match="Unicode"):
        word_tokenizer().encode("w0 \ud800")


def test_describes_each_token():
    first, second, third = word_tokenizer().describe("w7", 3)
    assert first == Token(2, "[CLS]", True, None, None)
    assert second == Token(11, "w7", False, 0, 2)
    assert third.text == "[SEP]"
    assert len(word_tokenizer().describe("w7", 3, add_special_tokens=False)) == 1
    for text in ("w7 w8", "w" * 1000):
        with pytest.raises(TooLarge, match="more than 3 tokens"):
            word_tokenizer().describe(text, 3)


def test_the_interpreter_goes_on_while_a_text_is_tokenised():
    tokenizer = word_tokenizer(max_length=10**6)
    turns, over = [], threading.Event()

    def take_turns():
        while not over.wait(0.0005):
            turns.append(1)

    other = threading.Thread(target=take_turns)
    text = "w1 " * 200_000
    other.start()
    before = len(turns)
    encoded = tokenizer.encode_text(text, None)
    during = len(turns) - before
    over.set()
    other.join()
    assert len(encoded.ids) == 200_002
    assert during > 5  # with the lock held there is one at most, in front and behind
