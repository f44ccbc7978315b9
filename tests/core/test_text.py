"""Words and ids: round trips, the two paddings, and errors that name the word."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minirlhf.text import SPECIALS, UnknownWord, Vocabulary, left_pad, right_pad

WORDS = ("friday", "order", "ships", ".", ",")
VOCABULARY = Vocabulary(WORDS)


def test_specials_come_first_and_pad_is_not_eos():
    assert (VOCABULARY.pad, VOCABULARY.eos, VOCABULARY.sep) == (0, 1, 2)
    assert VOCABULARY.words == (*SPECIALS, *WORDS)
    assert VOCABULARY.encode("friday .") == [3, 6]
    assert len(VOCABULARY) == 8


@given(st.lists(st.sampled_from(WORDS)))
def test_text_survives_the_round_trip(words):
    assert VOCABULARY.decode(VOCABULARY.encode(" ".join(words))).split() == words


def test_decode_skips_specials_and_takes_tensors():
    assert VOCABULARY.decode(torch.tensor([0, 0, 4, 2, 3, 1, 0])) == "order friday"


def test_unknown_word_is_named_with_near_ones():
    with pytest.raises(UnknownWord, match=r"'fridey' in 'order fridey'.*friday"):
        VOCABULARY.encode("order fridey")
    assert issubclass(UnknownWord, ValueError)
    with pytest.raises(UnknownWord, match="Order"):  # no lower-casing behind your back
        VOCABULARY.encode("Order")


def test_glued_punctuation_is_explained():
    with pytest.raises(UnknownWord, match=r"write punctuation as a word of its own"):
        VOCABULARY.encode("friday.")


def test_a_word_listed_twice_is_refused():
    with pytest.raises(ValueError, match="'order' twice"):
        Vocabulary(["order", "friday", "order"])
    with pytest.raises(ValueError, match="'<eos>' twice"):
        Vocabulary(["<eos>"])


@pytest.mark.parametrize("word", ["two words", "", "tab\t"])
def test_a_word_that_no_text_could_hold_is_refused(word):
    with pytest.raises(ValueError, match="white space"):
        Vocabulary(["order", word])


def test_fingerprint_follows_words_and_their_order():
    prints = {Vocabulary(w).fingerprint for w in (["a", "b"], ["b", "a"], ["a"], ["ab"])}
    assert len(prints) == 4
    assert Vocabulary(["a", "b"]).fingerprint == Vocabulary(("a", "b")).fingerprint


def test_paddings_meet_in_the_middle():
    assert left_pad([[3, 4], [5]]).tolist() == [[3, 4], [0, 5]]
    assert left_pad([[3, 4]], width=4).tolist() == [[0, 0, 3, 4]]
    responses, mask = right_pad([[3, 1], [1]], 3)
    assert responses.tolist() == [[3, 1, 0], [1, 0, 0]]
    assert mask.tolist() == [[True, True, False], [True, False, False]]
    assert mask.dtype == torch.bool and responses.dtype == torch.int64


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=5))
def test_right_pad_keeps_every_id_and_masks_exactly_those(rows):
    responses, mask = right_pad(rows)  # id 0 inside a row is a token, so the mask must say so
    assert [responses[i, mask[i]].tolist() for i in range(len(rows))] == rows
    assert responses[~mask].eq(0).all()


@pytest.mark.parametrize("pad, kind", [(left_pad, "prompt"), (right_pad, "response")])
def test_too_long_or_empty_rows_are_named(pad, kind):
    with pytest.raises(ValueError, match=rf"{kind} 1 has 3 tokens; between 1 and 2 fit"):
        pad([[3], [3, 4, 5]], 2)
    with pytest.raises(ValueError, match=rf"{kind} 0 has 0 tokens"):
        pad([[], [3]])
