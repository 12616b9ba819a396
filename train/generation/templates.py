"""Templates: text around the messages of a conversation, for tokenizers without a chat template.

    plain       SYSTEM                      alpaca      SYSTEM, or a sentence that says what follows

                User: QUESTION                          ### Instruction:
                Assistant: ANSWER                       QUESTION

                                                        ### Response:
                                                        ANSWER

A question with an input has both: in `alpaca` the input is under "### Input:", else on its own
line. `tritium chat` uses the template with which a run was fine-tuned, else `plain`.

Source     Taori et al. 2023, "Stanford Alpaca" (alpaca). There, an answer begins on the line of
           "### Response:", and the first sentence mentions the input, if there is one
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import InputError

Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Template:
    """A row of TEMPLATES. {} stands for the content of a message."""

    start: str = ""
    """Text before the first question, if there is no system message."""
    system: str = "{}\n\n"
    between: str
    """Text between an answer and the next question."""
    question_start: str
    question: str
    """The rest of a question, and the words that begin its answer."""
    answer: str
    input: str
    """Text after an instruction that has an input."""

    @property
    def stop(self) -> str:
        """Text that ends an answer, because it begins the next question."""
        return self.between + self.question_start

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text of messages, the last of which is a question, up to its answer."""
        return "".join(text for text, _ in self.pieces(messages))

    def pieces(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """Return the text of messages in pieces, and whether each piece is an answer.

        The stop text after an answer belongs to the answer, so that a model learns to stop.
        """
        has_system = messages[0]["role"] == "system"
        start = self.system.replace("{}", messages[0]["content"]) if has_system else self.start
        pieces = [(start + self.question_start, False)]
        turns = messages[has_system:]
        for place, message in enumerate(turns, 1):
            is_answer = message["role"] == "assistant"
            text = self.answer if is_answer else self.question
            ending = self.stop if is_answer and place < len(turns) else ""
            pieces.append((text.replace("{}", message["content"]) + ending, is_answer))
        (first, _), (second, _), *others = pieces
        return [(first + second, False), *others]


TEMPLATES = {
    "plain": Template(
        between="\n",
        question_start="User:",
        question=" {}\nAssistant:",
        answer=" {}",
        input="\n{}",
    ),
    "alpaca": Template(
        start=(
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n"
        ),
        between="\n\n",
        question_start="### Instruction:",
        question="\n{}\n\n### Response:\n",
        answer="{}",
        input="\n\n### Input:\n{}",
    ),
}


def check_messages(messages: object, place: str) -> list[Message]:
    """Return the messages of a conversation in which questions and answers alternate.

    Args: place: where they are, for messages of errors.
    Raises: InputError, which names the place, for anything else.
    """
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{place}: messages: expected a list of messages, got {messages!r:.60}")
    for number, message in enumerate(messages, 1):
        where = f"{place}: message {number}"
        if not isinstance(message, dict):
            raise InputError(f"{where}: expected a JSON object, got {message!r:.60}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise InputError(f"{where}: {key}: expected text, got {message.get(key)!r:.60}")
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    for number, message in enumerate(turns):
        expected = "assistant" if number % 2 else "user"
        if message["role"] != expected:
            raise InputError(
                f"{place}: message {number + 1 + len(messages) - len(turns)}: expected the role "
                f"{expected}, got {message['role']!r}; questions and answers alternate, after at "
                "most one system message"
            )
    if len(turns) < 2:
        raise InputError(f"{place}: messages: expected a question and its answer, got no answer")
    return [{"role": each["role"], "content": each["content"]} for each in messages]
