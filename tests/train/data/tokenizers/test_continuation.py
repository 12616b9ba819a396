import pytest

from tritium.train.data.tokenizers.continuation import encode_continuation
from tritium.train.data.tokenizers.tokenizer import Tokenizer, from_spec

pytestmark = pytest.mark.plain
BYTES = from_spec("bytes", list)


class Spaced(Tokenizer):
    """Like Llama's tokenizer, it puts a space before a text."""

    can_cut = False
    start_tokens = (256,)

    def encode(self, text):
        return super().encode(" " + text)


def test_a_piece_has_the_ids_that_it_has_in_the_whole_text():
    spaced = Spaced("bytes", "bytes", BYTES.pieces)
    before = spaced.encode("one").tolist()
    found = encode_continuation(spaced, "one", " two", before)
    assert before + found == spaced.encode("one two").tolist()


def test_a_piece_at_the_start_or_of_another_tokenizer_is_encoded_alone():
    spaced = Spaced("bytes", "bytes", BYTES.pieces)
    assert encode_continuation(spaced, "", "two", []) == spaced.encode("two").tolist()
    texts = []

    def encode(text):
        texts.append(text)
        return BYTES.encode(text)

    before = BYTES.encode("one").tolist()
    assert encode_continuation(BYTES, "one", "two", before, encode) == list(b"two")
    assert texts == ["two"]


def test_a_text_whose_ids_change_with_the_piece_keeps_them():
    spaced = Spaced("bytes", "bytes", BYTES.pieces)
    assert encode_continuation(spaced, "one", "two", [1]) == spaced.encode("two").tolist()
