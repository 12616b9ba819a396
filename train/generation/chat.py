"""A conversation with a model.

Messages become text by the chat template of the tokenizer, or by a row of templates.py: the row
with which the model was fine-tuned, else `plain`. With such a row, an answer ends before the text
that begins a next question.

A turn is a question and its answer. If the messages do not fit into the context, the oldest turns
are left out, whole turns at a time. The system message stays. A part of the context is reserved for
the answer: max_new_tokens, but at most half of the context.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...errors import InputError
from ...model import GPT
from ...model.generation import Decoder, Sampling
from ..data.tokenizers.tokenizer import Tokenizer
from ..storage.files import write_whole
from .templates import TEMPLATES
from .text import encode_question, for_tokenizer, stream_sample


@dataclass
class Conversation:
    """A model, its tokenizer, and the messages so far.

    Args:
        model: a GPT.
        tokenizer: its tokenizer.
        sampling: the options. Answer i has the seed `seed` + i.
        system: the system message. None: there is none.
        template: a row of TEMPLATES. None: the tokenizer's chat template, else plain.
    Attributes:
        messages: {"role": "user" or "assistant", "content": text} each, without the system message.
        dropped: number of messages that the last prompt left out.
    Raises: InputError if max_new_tokens is 0, or if the system message does not fit.
    """

    model: GPT
    tokenizer: Tokenizer
    sampling: Sampling
    system: str | None = None
    template: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    dropped: int = 0

    def __post_init__(self):
        if self.sampling.max_new_tokens < 1:
            raise InputError("max_new_tokens: expected at least 1 for a chat, got 0")
        if self.template is None and self.tokenizer.chat_template is None:
            self.template = "plain"
        if self.template is not None:
            stop = TEMPLATES[self.template].stop
            self.sampling = replace(self.sampling, stop=(*self.sampling.stop, stop))
        # One decoder for all answers, so that a CUDA graph is captured once.
        filters = for_tokenizer(self.sampling, self.tokenizer)
        self._decoder = Decoder(self.model, 1, filters)
        self._answers = 0
        if self.system is not None:
            try:
                self._fit([{"role": "user", "content": ""}])
            except InputError as error:
                raise InputError(f"{error} or the system message") from None

    def ask(self, question: str) -> Iterator[str]:
        """Yield the answer as it is made.

        The question and its answer become messages. If the caller stops early, the answer is the
        part that was yielded.

        Raises: InputError if the question alone does not fit into the context, or if the template
            raises an error.
        """
        turn = {"role": "user", "content": question}
        prompt, self.dropped = self._fit([*self.messages, turn])
        room = self.model.config.context_tokens - len(prompt)
        sampling = replace(
            self.sampling, max_new_tokens=min(self.sampling.max_new_tokens, room), seed=self._seed()
        )
        self._answers += 1
        answer = ""
        try:
            for piece in stream_sample(self.model, self.tokenizer, prompt, sampling, self._decoder):
                piece = piece if answer else piece.lstrip()
                answer += piece
                if piece:
                    yield piece
        finally:
            self.messages += [turn, {"role": "assistant", "content": answer.strip()}]

    def reset(self) -> None:
        """Forget all messages but the system message."""
        self.messages.clear()

    def save(self, path: Path) -> None:
        """Write the messages as JSON, in the form that chat templates take.

        Raises: InputError if the file exists or its folder does not.
        """
        if not path.parent.is_dir():
            raise InputError(f"{path}: expected an existing folder, found none; make it")
        if path.exists():
            raise InputError(f"{path}: expected a new file, found one; give another name")
        text = json.dumps(self._with_system(self.messages), indent=2, ensure_ascii=False)
        write_whole(path, [text.encode("utf-8", "replace") + b"\n"])

    def _seed(self) -> int | None:
        seed = self.sampling.seed
        return None if seed is None else (seed + self._answers) % 2**63

    def _with_system(self, messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *messages]

    def _fit(self, messages: list[dict[str, str]]) -> tuple[list[int], int]:
        """Return the ids of the messages that fit, and the number of messages left out."""
        context = self.model.config.context_tokens
        reserved = min(self.sampling.max_new_tokens, context // 2)
        for dropped in range(0, len(messages), 2):
            asked = self._with_system(messages[dropped:])
            ids = encode_question(self.tokenizer, asked, self.template or "model")
            if len(ids) <= context - reserved:
                return ids, dropped
        raise InputError(
            f"chat: expected at most {context - reserved} tokens of system message and question, "
            f"got {len(ids)}; shorten the question"
        )
