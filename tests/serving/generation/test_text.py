"""Text as it is made: nothing of a stop string gets out, nothing else is lost."""

from __future__ import annotations

import pytest

pytest.importorskip("tokenizers")
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from turbotx.serving.generation.text import TextStream


def byte_tokenizer():
    """One token a byte: a character of several comes whole or not at all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


BYTES = byte_tokenizer()


def ids(text):
    return BYTES.encode(text).ids


def stream(text, stops=()):
    found = TextStream(BYTES, stops)
    parts = [found.push(token) for token in ids(text)]
    return [*parts, found.finish()], found.stopped


def test_characters_of_several_bytes_come_whole():
    parts, _ = stream("aé日😀")
    assert "".join(parts) == "aé日😀" and all("\ufffd" not in p for p in parts)


def test_bytes_that_make_no_character_show_at_the_end():
    found = TextStream(BYTES)
    parts = [found.push(t) for t in ids("a日")[:-1]]
    assert "".join(parts) == "a" and found.finish() == "\ufffd"


def test_a_stop_ends_the_text_before_itself():
    parts, stopped = stream("one two END three", ["END"])
    assert "".join(parts) == "one two " and stopped


def test_what_may_begin_a_stop_is_held_back_and_given_later():
    found = TextStream(BYTES, ["END"])
    parts = [found.push(t) for t in ids("xENx")]
    assert parts == ["x", "", "", "ENx"]
    parts, stopped = stream("xEN", ["END"])
    assert "".join(parts) == "xEN" and not stopped


def test_the_first_of_several_stops_ends_it():
    parts, stopped = stream("abcdef", ["ef", "cd"])
    assert "".join(parts) == "ab" and stopped


STOPS = st.lists(st.text("abé日 ", min_size=1, max_size=3), max_size=3)


@given(st.text("abé日 ", max_size=20), STOPS)
def test_pieces_make_the_text_up_to_the_first_stop(text, stops):
    parts, stopped = stream(text, stops)
    places = [p for p in map(text.find, stops) if p >= 0]
    # Of two stops that overlap the one that is complete first ends the text.
    ends = [text.find(s) + len(s) for s in stops if s in text]
    assert stopped == bool(places)
    whole = "".join(parts)
    assert text.startswith(whole)
    assert whole == text if not places else not any(s in whole for s in stops)
    if ends:
        assert len(whole) < min(ends)
