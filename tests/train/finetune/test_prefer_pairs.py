"""Records of pairs, their tokens and their rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tritium.errors import InputError
from tritium.train.data.tokenizers.tokenizer import from_spec
from tritium.train.finetune.prefer_pairs import Counts, make_rows, read_pair, widest
from tritium.train.finetune.rows import Example

pytestmark = pytest.mark.plain

PLACE = "pairs.jsonl:3"
RECORD = {"instruction": "Add.", "input": "1 + 1", "chosen": "2", "rejected": "three", "output": ""}


@pytest.fixture(scope="module")
def tokenizer():
    return from_spec("bytes", list)


def text_of(tokenizer, example: Example) -> tuple[str, str]:
    """Return the text of all tokens, and that of the targets without the end of text."""
    targets = example.tokens[example.is_answer]
    assert targets[-1] == tokenizer.end_of_text
    return tokenizer.decode(example.tokens[:-1].tolist()), tokenizer.decode(targets[:-1].tolist())


def test_a_pair_has_one_prompt_and_two_answers(tokenizer):
    texts = [text_of(tokenizer, each) for each in read_pair((PLACE, RECORD), tokenizer, "alpaca")]
    assert [answer.strip() for _, answer in texts] == ["2", "three"]
    prompts = {text.removesuffix(answer) for text, answer in texts}
    assert len(prompts) == 1
    assert "### Input:\n1 + 1" in prompts.pop()


def test_a_character_without_a_token_raises_with_its_record():
    chars = from_spec("chars", lambda: ["abc"])
    with pytest.raises(InputError, match=r"^pairs.jsonl:3: tokenizer chars: expected one of"):
        read_pair((PLACE, RECORD), chars, "plain")


def test_prompt_is_an_instruction_without_input(tokenizer):
    record = {"prompt": "Add 1 and 1.", "chosen": "2", "rejected": "three"}
    other = RECORD | {"instruction": "Add 1 and 1.", "input": ""}
    pairs = [read_pair((PLACE, each), tokenizer, "plain") for each in (record, other)]
    for first, second in zip(*pairs, strict=True):
        assert np.array_equal(first.tokens, second.tokens)


def test_fields_of_other_tasks_are_not_read(tokenizer):
    record = {"prompt": "Add 1 and 1.", "chosen": "2", "rejected": "three"}
    more = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "z"}]}
    pairs = [read_pair((PLACE, each), tokenizer, "plain") for each in (record, record | more)]
    for first, second in zip(*pairs, strict=True):
        assert np.array_equal(first.tokens, second.tokens)
    with pytest.raises(InputError, match=r"expected the key 'instruction', got the keys .'chosen'"):
        read_pair((PLACE, {"chosen": "2", "rejected": "3"} | more), tokenizer, "plain")


@pytest.mark.parametrize("field", ["instruction", "chosen", "rejected"])
def test_a_missing_field_names_line_and_field(field, tokenizer):
    record = {name: value for name, value in RECORD.items() if name != field}
    with pytest.raises(InputError, match=f"pairs.jsonl:3: expected the key '{field}'"):
        read_pair((PLACE, record), tokenizer, "plain")


def example(*tokens: int, prompt: int = 2) -> Example:
    return Example(np.array(tokens, dtype=np.int32), np.arange(len(tokens)) >= prompt)


def test_long_answers_lose_their_end_and_some_pairs_are_left_out():
    pairs = [
        (example(1, 2, 3, 4), example(1, 2, 5)),  # fits
        (example(1, 2, 3, 4, 5, 6, 7), example(1, 2, 5)),  # cut
        (example(1, 2, 3), example(1, 2, 3)),  # equal
        (example(1, 2, 3, 4, 5, 6), example(1, 2, 3, 4, 5, 7)),  # equal after the cut
        (example(1, 2, 3, 4, 5, 6, prompt=5), example(1, 2, 3, 4, 5, 7, prompt=5)),  # no room
    ]
    counts = Counts()
    kept, places = counts.cut(pairs, 4)
    assert places == [0, 1]
    assert (counts.shortened, counts.equal, counts.left_out) == (1, 2, 1)
    assert kept[1][0].tokens.tolist() == [1, 2, 3, 4, 5]


def test_model_inputs_have_all_chosen_answers_first():
    pairs = [(example(1, 2, 3, 4), example(1, 2, 5)), (example(7, 8, 9), example(7, 8, 6, 6))]
    rows = make_rows(pairs, widest([pairs]))
    rows.reference.copy_(torch.tensor([[4.0, 1.0], [2.0, 3.0]]))
    inputs = rows.model_inputs(torch.device("cpu"))
    assert inputs["tokens"][:, :3].tolist() == [[1, 2, 3], [7, 8, 0], [1, 2, 0], [7, 8, 6]]
    assert inputs["targets"][:, :4].tolist() == [
        [-100, 3, 4, -100],
        [-100, 9, -100, -100],
        [-100, 5, -100, -100],
        [-100, 6, 6, -100],
    ]
    assert inputs["reference"].tolist() == [3.0, -1.0]
    assert rows[1:].model_inputs(torch.device("cpu"))["tokens"].shape == (2, 8)
    wide = make_rows(pairs, 24)
    assert wide[1:].width == 8
    assert replace(wide, has_one_width=True)[1:].width == 24
    assert rows.sha256() == make_rows(pairs, 8).sha256() != make_rows(pairs[::-1], 8).sha256()
