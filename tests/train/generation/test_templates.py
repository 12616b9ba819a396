import pytest

from tritium.errors import InputError
from tritium.train.generation.templates import TEMPLATES, check_messages

pytestmark = pytest.mark.plain

TURNS = [
    {"role": "user", "content": "one {}"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two"},
]


def test_plain_messages_are_paragraphs():
    system = {"role": "system", "content": "S"}
    expected = "S\n\nUser: one {}\nAssistant: 1\nUser: two\nAssistant:"
    assert TEMPLATES["plain"].prompt([system, *TURNS]) == expected


def test_alpaca_messages_have_headers():
    prompt = TEMPLATES["alpaca"].prompt(TURNS)
    assert prompt.startswith("Below is an instruction that describes a task.")
    assert prompt.endswith("### Response:\n1\n\n### Instruction:\ntwo\n\n### Response:\n")


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_stop_text_belongs_to_an_answer_before_a_question(name):
    template = TEMPLATES[name]
    answer = {"role": "assistant", "content": "2"}
    pieces = template.pieces([*TURNS, answer])
    assert [is_answer for _, is_answer in pieces] == [False, True, False, True]
    assert pieces[1][0].endswith("1" + template.stop)
    assert pieces[3][0].strip() == "2"
    assert template.prompt(TURNS) == "".join(text for text, _ in pieces[:3])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("text", "messages: expected a list of messages, got 'text'"),
        ([], r"messages: expected a list of messages, got \[\]"),
        (["x"], "message 1: expected a JSON object, got 'x'"),
        ([{"role": "user"}], "message 1: content: expected text, got None"),
        ([{"role": 1, "content": ""}], "message 1: role: expected text, got 1"),
        (TURNS[:1], "messages: expected a question and its answer, got no answer"),
        (TURNS[1:], "message 1: expected the role user, got 'assistant'"),
        ([*TURNS, TURNS[0]], "message 4: expected the role assistant, got 'user'"),
    ],
)
def test_messages_that_do_not_alternate_raise(messages, message):
    with pytest.raises(InputError, match=f"^f:3: {message}"):
        check_messages(messages, "f:3")
