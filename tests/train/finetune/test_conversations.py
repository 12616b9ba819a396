import pytest

from tritium.errors import InputError
from tritium.train.data.tokenizers.tokenizer import Tokenizer, from_spec
from tritium.train.finetune.conversations import choose_template, encode, read_messages
from tritium.train.generation.text import encode_question

pytestmark = pytest.mark.plain

TURNS = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "2"},
]
END = 256


class Templated(Tokenizer):
    """Bytes with a chat template: "(role content)" for each message. ")" ends an answer."""

    chat_template = "a template"
    forgets = False
    """Whether only the last question and its answer are rendered."""

    def render_chat(self, messages, *, add_generation_prompt=True) -> str:
        messages = messages[-2 + add_generation_prompt :] if self.forgets else messages
        turns = "".join(f"({message['role'][0]} {message['content']})" for message in messages)
        return turns + "(a " * add_generation_prompt


@pytest.fixture
def plain() -> Tokenizer:
    return from_spec("bytes", list)


@pytest.fixture
def templated(plain) -> Templated:
    return Templated("bytes", "bytes", plain.pieces)


def targets(example) -> str:
    """The text of an example with the bytes that are no targets as dots."""
    pairs = zip(example.tokens.tolist(), example.is_answer.tolist(), strict=True)
    return "".join(
        "$" if token == END else chr(token) if is_answer else "." for token, is_answer in pairs
    )


def test_every_answer_of_a_conversation_is_a_target_and_the_last_one_ends(plain):
    (example,) = encode(plain, TURNS, "plain")
    text = "User: one\nAssistant: 1\nUser: two\nAssistant: 2"
    assert bytes(example.tokens[:-1].tolist()).decode() == text
    assert targets(example) == "." * 20 + " 1\nUser:" + "." * 15 + " 2$"


@pytest.mark.parametrize("template", ["plain", "alpaca", "model"])
def test_a_question_is_encoded_as_in_training(template, templated):
    (example,) = encode(templated, TURNS, template)
    prompt = encode_question(templated, TURNS[:1], template)
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert not example.is_answer[: len(prompt)].any()
    assert example.is_answer[len(prompt)]


def test_a_chat_template_ends_answers_and_text_after_the_stop_token_is_no_target(templated):
    (example,) = encode(templated, TURNS, "model")
    assert targets(example) == "." * 10 + "1)" + "." * 10 + "2)$"
    templated.stop_tokens = (ord(")"), END)
    templated.render_chat = lambda messages, *, add_generation_prompt=True: (
        Templated.render_chat(templated, messages, add_generation_prompt=add_generation_prompt)
        .replace("1)", "1)\n")
        .replace("2)", "2)\n")
    )
    (example,) = encode(templated, TURNS, "model")
    assert targets(example) == "." * 10 + "1)" + "." * 11 + "2)."


def test_a_chat_template_that_drops_earlier_turns_gives_an_example_per_answer(templated):
    templated.forgets = True
    examples = encode(templated, TURNS, "model")
    assert [bytes(each.tokens[:-1].tolist()) for each in examples] == [
        b"(u one)(a 1)", b"(u two)(a 2)"
    ]  # fmt: skip
    templated.render_chat = lambda messages, *, add_generation_prompt=True: str(
        add_generation_prompt
    )
    with pytest.raises(InputError, match="expected a chat template that puts the same text before"):
        encode(templated, TURNS, "model")


def test_pieces_that_cannot_be_encoded_alone_are_encoded_with_what_precedes(plain):
    """Like Llama's tokenizer, this one puts a space before a text."""

    class Spaced(Tokenizer):
        can_cut = False

        def encode(self, text):
            return super().encode(" " + text)

    spaced = Spaced("bytes", "bytes", plain.pieces)
    (example,) = encode(spaced, TURNS, "alpaca")
    joined = bytes(example.tokens[:-1].tolist()).decode()
    assert "Response:\n1\n\n### Instruction:\ntwo" in joined


def test_the_template_is_the_models_if_it_has_one(plain, templated):
    assert choose_template("auto", plain) == "plain"
    assert choose_template("auto", templated) == "model"
    assert choose_template("alpaca", templated) == "alpaca"
    message = "template: expected plain or alpaca, because the tokenizer bytes has no chat template"
    with pytest.raises(InputError, match=message):
        choose_template("model", plain)


def test_an_input_follows_its_instruction():
    record = {"instruction": "Add {input}.", "input": "1 2", "output": "3"}
    asked = [read_messages(("f:1", record), name)[0]["content"] for name in ("plain", "alpaca")]
    assert asked == ["Add {input}.\n1 2", "Add {input}.\n\n### Input:\n1 2"]
    bare = {"instruction": "Add.", "output": "3"}
    assert read_messages(("f:1", bare), "plain") == [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "3"},
    ]
    chat = {"messages": [*TURNS, TURNS[0]]}
    assert read_messages(("f:1", chat), "plain") == TURNS, "up to the last answer"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"output": "3"}, "f:7: expected the key 'instruction' or 'messages', got the keys"),
        ({"instruction": "a"}, "f:7: expected the key 'output'"),
        ({"instruction": "a", "output": " "}, "f:7: output: expected text, got ' '"),
        ({"instruction": "a", "output": "b", "input": 3}, "f:7: input: expected text, got 3"),
        ({"messages": []}, "f:7: messages: expected a list of messages"),
    ],
)
def test_missing_fields_raise_with_their_line(record, message):
    with pytest.raises(InputError, match=message):
        read_messages(("f:7", record), "plain")
