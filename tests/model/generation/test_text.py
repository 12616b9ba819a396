import random

import pytest

from tritium.model.generation.text import TextStream

pytestmark = pytest.mark.plain


def stream(pieces: list[bytes], stop=()) -> tuple[list[str], TextStream]:
    """Push the pieces as tokens. Return the text of each push, then the rest."""
    text = TextStream(lambda ids: b"".join(pieces[i] for i in ids), stop)
    return [*(text.push(i) for i in range(len(pieces))), text.finish()], text


def test_a_character_that_is_split_over_tokens_comes_whole():
    found, _ = stream([b"a\xf0\x9f", b"\x98", b"\x80b"])
    assert found == ["a", "", "\N{GRINNING FACE}b", ""]


def test_an_incomplete_character_at_the_end_becomes_a_replacement_character():
    assert stream([b"a\xe2\x82"])[0] == ["a", "\N{REPLACEMENT CHARACTER}"]


def test_text_is_held_back_while_it_could_begin_a_stop():
    found, text = stream([b"one", b"\nUs", b"e it", b"\nUser", b":x", b"y"], ["\nUser:"])
    assert found == ["one", "", "\nUse it", "", "", "", ""]
    assert text.is_stopped


def test_the_earliest_stop_ends_the_text():
    assert "".join(stream([b"ab", b"cdef"], ["e", "cd"])[0]) == "ab"


def test_held_text_is_released_if_no_stop_follows():
    found, text = stream([b"a\nUs"], ["\nUser:"])
    assert found == ["a", "\nUs"]
    assert not text.is_stopped


def test_joined_pieces_are_the_text_of_all_tokens():
    generator = random.Random(0)
    alphabet = ["a", "b", "é", "€", "\U0001f600"]
    for _ in range(300):
        data = "".join(generator.choices(alphabet, k=20)).encode()
        if generator.random() < 0.3:  # bytes that are not UTF-8
            data = bytes(generator.choices(data, k=len(data)))
        cuts = sorted(generator.choices(range(len(data)), k=6))
        pieces = [data[i:j] for i, j in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        whole = data.decode("utf-8", "replace")
        stop = ["aab", "€b"]
        assert "".join(stream(pieces)[0]) == whole
        ends = [whole.find(each) for each in stop if each in whole]
        assert "".join(stream(pieces, stop)[0]) == whole[: min(ends, default=len(whole))]
