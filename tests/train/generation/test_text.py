import pytest
import torch

from tests.model.models import SMALL, random_model
from tritium.errors import InputError
from tritium.model.generation import Decoder, Sampling
from tritium.train.data.tokenizers.tokenizer import Tokenizer
from tritium.train.generation.text import (
    answer_text,
    encode_prompt,
    for_tokenizer,
    sample_text,
    stream_sample,
)

pytestmark = pytest.mark.plain

TOKENIZER = Tokenizer("chars", "chars", [bytes([48 + i]) for i in range(40)] + [b"<|endoftext|>"])
GREEDY = Sampling(temperature=0.0, max_new_tokens=10)


@pytest.fixture
def model():
    """A model with more ids than the tokenizer, whose most likely ids are not the tokenizer's."""
    model = random_model()
    with torch.no_grad():
        model.wte.weight[41:] *= 20
    return model


def test_prompt_begins_with_the_start_tokens(monkeypatch):
    assert encode_prompt(TOKENIZER, "12") == [1, 2]
    assert encode_prompt(TOKENIZER, None) == [40]
    monkeypatch.setattr(TOKENIZER, "start_tokens", (7,))
    assert encode_prompt(TOKENIZER, "12") == [7, 1, 2]
    assert encode_prompt(TOKENIZER, None) == [7]
    with pytest.raises(InputError, match="prompt: expected text, got an empty one"):
        encode_prompt(TOKENIZER, "")


def test_the_text_of_an_answer_has_no_prompt_and_no_stop_token():
    for answer in ([3, 4], [3, 4, 40]):
        assert answer_text(TOKENIZER, [1, 2], [1, 2, *answer]) == "34"
    assert answer_text(TOKENIZER, [1, 2], [1, 2, 40]) == ""
    assert answer_text(TOKENIZER, [1, 2], [1, 2]) == ""


def test_only_ids_of_the_tokenizer_are_chosen(model):
    text = "".join(stream_sample(model, TOKENIZER, [1, 2], GREEDY))
    assert text
    tokens = model.generate([[1, 2]], sampling=GREEDY)[0]
    assert max(tokens) > 40


def test_text_ends_at_a_stop_token(model, monkeypatch):
    text = "".join(stream_sample(model, TOKENIZER, [1, 2], GREEDY))
    monkeypatch.setattr(TOKENIZER, "stop_tokens", (40, ord(text[3]) - 48))
    expected = text[: text.index(text[3])]
    assert "".join(stream_sample(model, TOKENIZER, [1, 2], GREEDY)) == expected


def test_a_decoder_for_another_batch_raises(model):
    decoder = Decoder(model, 2, for_tokenizer(GREEDY, TOKENIZER))
    with pytest.raises(ValueError, match="expected a decoder for 1 sequences"):
        next(stream_sample(model, TOKENIZER, [1, 2], GREEDY, decoder=decoder))


def test_sample_of_a_training_run_reads_the_end_of_a_long_prompt(model):
    prompt = "0123456789" * 4
    text = sample_text(model, TOKENIZER, prompt, GREEDY)
    end = prompt[-SMALL.context_tokens :]
    ids = encode_prompt(TOKENIZER, end)
    assert text == prompt + "".join(stream_sample(model, TOKENIZER, ids, GREEDY))
    assert sample_text(model, TOKENIZER, "", GREEDY)
