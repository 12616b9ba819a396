"""Records as conversations, and conversations as tokens of which answers are targets.

    records     {"instruction": ..., "input": ..., "output": ...}; `input` may be empty or missing
                {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}, ...]}
    text        the model's chat template ("model"), or a row of generation/templates.py

An answer is a target up to its first stop token. The last answer gets one if the template has none.
"""

from collections.abc import Callable, Iterator

import numpy as np

from ...errors import InputError
from ..data.tokenizers.continuation import encode_continuation
from ..data.tokenizers.tokenizer import Tokenizer
from ..eval.jsonl import text_of
from ..generation.templates import TEMPLATES, Message, check_messages
from ..storage.records import shorten
from .records import Record
from .rows import Example


def choose_template(name: str, tokenizer: Tokenizer) -> str:
    """Return "model" or a row of TEMPLATES. "auto" is "model" if the tokenizer has a template."""
    has_template = tokenizer.chat_template is not None
    if name == "auto":
        return "model" if has_template else "plain"
    if name == "model" and not has_template:
        raise InputError(
            f"template: expected {' or '.join(TEMPLATES)}, because the tokenizer {tokenizer.name} "
            "has no chat template, got model"
        )
    return name


def read_messages(record: Record, template: str) -> list[Message]:
    """Return the conversation of a record, up to its last answer."""
    place, content = record
    if "messages" in content:
        messages = check_messages(content["messages"], place)
        return messages if messages[-1]["role"] == "assistant" else messages[:-1]
    if "instruction" not in content:
        raise InputError(
            f"{place}: expected the key 'instruction' or 'messages', got the keys "
            f"{shorten(list(content))}"
        )
    question = text_of(content, "instruction", place)
    answer = text_of(content, "output", place)
    more = content.get("input", "")
    if not isinstance(more, str):
        raise InputError(f"{place}: input: expected text, got {shorten(more)}")
    if more.strip():
        form = TEMPLATES[template if template in TEMPLATES else "plain"]
        question += form.input.replace("{}", more)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def encode(tokenizer: Tokenizer, messages: list[Message], template: str) -> list[Example]:
    """Return a conversation as one example.

    A chat template can change earlier answers. Then each answer begins an example of its own.
    """
    if template == "model":
        found = _rendered_pieces(tokenizer, messages)
        return [_example(tokenizer, pieces, [], tokenizer.encode_rendered) for pieces in found]
    pieces = TEMPLATES[template].pieces(messages)
    return [_example(tokenizer, pieces, list(tokenizer.start_tokens), tokenizer.encode)]


def _rendered_pieces(
    tokenizer: Tokenizer, messages: list[Message]
) -> Iterator[list[tuple[str, bool]]]:
    """Yield pieces as Template.pieces returns them, by the chat template of the model."""
    pieces = []
    text = ""
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        question = tokenizer.render_chat(messages[:place])
        complete = tokenizer.render_chat(messages[: place + 1], add_generation_prompt=False)
        if not complete.startswith(question):
            raise InputError(
                f"template: expected a chat template that puts the same text before an answer in "
                f"training and in generation, {tokenizer.name} has another; choose "
                f"{' or '.join(TEMPLATES)}"
            )
        if not question.startswith(text):
            yield pieces
            pieces = []
            text = ""
        pieces += [(question[len(text) :], False), (complete[len(question) :], True)]
        text = complete
    yield pieces


def _example(
    tokenizer: Tokenizer,
    pieces: list[tuple[str, bool]],
    start: list[int],
    encode: Callable[[str], np.ndarray],
) -> Example:
    """Encode pieces of text after the ids `start`. An answer ends with its first stop token."""
    tokens = list(start)
    is_answer = [False] * len(tokens)
    text = ""
    for place, (piece, is_target) in enumerate(pieces, 1):
        new = encode_continuation(tokenizer, text, piece, tokens[len(start) :], encode)
        text += piece
        flags = [is_target] * len(new)
        stops = [i for i, token in enumerate(new) if token in tokenizer.stop_tokens]
        if is_target and stops:
            flags[stops[0] + 1 :] = [False] * (len(new) - stops[0] - 1)
        elif is_target and place == len(pieces):
            new.append(tokenizer.end_of_text)
            flags.append(True)
        tokens += new
        is_answer += flags
    return Example(np.array(tokens, dtype=np.int32), np.array(is_answer, dtype=bool))
