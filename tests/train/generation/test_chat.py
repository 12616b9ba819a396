import json

import pytest

from tests.model.models import random_model
from tritium.errors import InputError
from tritium.model import GPTConfig
from tritium.model.generation import Sampling
from tritium.train.data.tokenizers.tokenizer import Tokenizer, from_spec
from tritium.train.generation.chat import Conversation

pytestmark = pytest.mark.plain

SAMPLING = Sampling(temperature=0.0, max_new_tokens=20)


class Templated(Tokenizer):
    """Bytes with a chat template: [role content] for each message, then "[" for the answer."""

    chat_template = "a template"

    def render_chat(self, messages, *, add_generation_prompt=True) -> str:
        turns = "".join(f"[{message['role'][0]} {message['content']}]" for message in messages)
        return turns + "[" * add_generation_prompt


@pytest.fixture(scope="module")
def model():
    config = {"vocab_size": 257, "context_tokens": 80, "position": "rotary", "norm": "rms"}
    return random_model(GPTConfig(n_layer=1, n_head=2, d_model=16, mlp="swiglu", **config))


@pytest.fixture
def bytes_tokenizer() -> Tokenizer:
    return from_spec("bytes", list)


@pytest.fixture
def templated(bytes_tokenizer) -> Tokenizer:
    return Templated("bytes", "bytes", bytes_tokenizer.pieces)


@pytest.fixture
def prompts(monkeypatch) -> list[str]:
    """The prompts that the model gets. Its answers are "yes"."""
    found = []

    def answer(model, tokenizer, prompt, sampling, decoder):
        found.append((bytes(prompt).decode(), sampling))
        yield from (" ", "ye", "s ")

    monkeypatch.setattr("tritium.train.generation.chat.stream_sample", answer)
    return found


def test_messages_follow_the_template_and_stay_in_the_conversation(model, templated, prompts):
    chat = Conversation(model, templated, SAMPLING, system="S")
    assert "".join(chat.ask("one")) == "yes "
    list(chat.ask("two"))
    assert [prompt for prompt, _ in prompts] == [
        "[s S][u one][",
        "[s S][u one][a yes][u two][",
    ]
    chat.reset()
    list(chat.ask("three"))
    assert prompts[-1][0] == "[s S][u three]["


def test_plain_form_stops_before_the_next_user_line(model, bytes_tokenizer, prompts):
    chat = Conversation(model, bytes_tokenizer, SAMPLING, system="S")
    list(chat.ask("one"))
    list(chat.ask("two"))
    prompt, sampling = prompts[-1]
    assert prompt == "S\n\nUser: one\nAssistant: yes\nUser: two\nAssistant:"
    assert sampling.stop == ("\nUser:",)


def test_oldest_turns_are_left_out_whole_and_the_system_message_stays(model, templated, prompts):
    """80 tokens, 20 of them for the answer."""
    chat = Conversation(model, templated, SAMPLING, system="S")
    for word in ("first", "second", "third", "fourth"):
        list(chat.ask(f"{word} 789"))
    # With the second turn it would have 63 tokens.
    assert prompts[-1][0] == "[s S][u third 789][a yes][u fourth 789]["
    assert chat.dropped == 4
    assert len(chat.messages) == 8


def test_answer_ends_where_the_context_ends(model, templated, prompts):
    chat = Conversation(model, templated, Sampling(max_new_tokens=500))
    list(chat.ask("x" * 30))
    assert prompts[0][1].max_new_tokens == 80 - len(prompts[0][0])


def test_question_that_does_not_fit_raises_and_is_forgotten(model, templated):
    chat = Conversation(model, templated, SAMPLING)
    with pytest.raises(InputError, match=r"chat: expected at most 60 tokens .*; shorten"):
        list(chat.ask("x" * 60))
    assert chat.messages == []


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(model, templated):
    chat = Conversation(model, templated, SAMPLING)
    answer = chat.ask("one")
    begun = next(answer)
    answer.close()
    assert [message["content"] for message in chat.messages] == ["one", begun.strip()]


def test_seed_repeats_the_conversation(model, templated):
    answers = []
    for seed in (1, 1, 2):
        chat = Conversation(model, templated, Sampling(max_new_tokens=20, seed=seed))
        answers.append(["".join(chat.ask("one")), "".join(chat.ask("one"))])
    assert answers[0] == answers[1] != answers[2]


def test_save_writes_messages_and_no_existing_file(model, templated, prompts, tmp_path):
    chat = Conversation(model, templated, SAMPLING, system="S")
    list(chat.ask("é"))
    chat.save(tmp_path / "chat.json")
    assert json.loads((tmp_path / "chat.json").read_text()) == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "é"},
        {"role": "assistant", "content": "yes"},
    ]
    with pytest.raises(InputError, match="expected a new file, found one"):
        chat.save(tmp_path / "chat.json")


def test_answers_without_tokens_raise(model, templated):
    with pytest.raises(InputError, match="max_new_tokens: expected at least 1 for a chat, got 0"):
        Conversation(model, templated, Sampling(max_new_tokens=0))


def test_a_system_message_that_does_not_fit_raises_at_the_start(model, templated):
    with pytest.raises(InputError, match="shorten the question or the system message"):
        Conversation(model, templated, SAMPLING, system="x" * 60)
