"""The task "instruct": answer instructions and questions.

    records     instructions or conversations: conversations.py
    rows        several records end to end: rows.py
    loss        the mean over the tokens of answers, of each answer of a conversation
    test        answers to the test records, by greedy decoding, in RUN/answers.jsonl

A run has the same rows in each epoch, in another order. It prints how many records were cut and
left out.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import InputError
from ...model import GPT
from ...model.generation import Decoder, Sampling, generate
from ..config import TrainConfig
from ..execution import Execution
from ..generation.templates import TEMPLATES, Message
from ..generation.text import answer_text, encode_question, for_tokenizer
from ..run.folder import RunRecord
from ..storage.files import write_whole
from .conversations import choose_template, encode, read_messages
from .data import TaskData
from .records import (
    RecordLoader,
    describe_epochs,
    errors_name,
    fit_epochs,
    open_records,
    record_batches,
    row_tokens,
    split,
)
from .rows import Counts, Example, Rows, make_rows

ANSWERS = "answers.jsonl"
# Test records that are answered at once.
_ANSWER_BATCH = 16


def open_data(
    config: TrainConfig,
    *,
    record: RunRecord | None = None,
    run: Path | None = None,
    progress: bool = False,
) -> "InstructData":
    """Read, split, encode and pack the records of a run.

    Args: record, run, progress: see pretrain.open_data. There is no progress bar.
    Raises: InputError, which names the line, for a bad record.
    """
    source = open_records(config, record, run)
    options = config.task_options
    tokenizer = source.tokenizer
    template = choose_template(options.template, tokenizer)
    conversations = [read_messages(each, template) for each in source.records]
    fractions = {"val_fraction": options.val_fraction, "test_fraction": options.test_fraction}
    splits = split(len(conversations), **fractions, seed=config.seed)

    # The rows of the training and the validation split.
    T = row_tokens(config)
    counts = Counts()
    examples = []
    for part in splits[:2]:
        encoded = []
        for i in part.tolist():
            with errors_name(source.records[i][0]):  # the tokenizer may not have a character
                encoded += encode(tokenizer, conversations[i], template)
        examples.append(counts.cut(encoded, T))
    if not all(examples):
        raise InputError(
            f"{source.path}: expected answers that begin within {T} tokens in the training and in "
            "the validation split, got none; give a longer context"
        )
    train, val = (make_rows(each, T if options.packing else None) for each in examples)
    # A test question that cannot be encoded ends the run here, not after the last step.
    for i in splits[2].tolist():
        with errors_name(source.records[i][0]):
            encode_question(tokenizer, conversations[i][:-1], template)
    return InstructData(
        path=source.path,
        sha256=source.sha256,
        tokenizer=tokenizer,
        train=train,
        val=val,
        template=template,
        records=[each for _, each in source.records],
        conversations=conversations,
        splits=splits,
        counts=counts,
        num_inputs=sum(map(len, examples[0])),
    )


@dataclass(frozen=True, kw_only=True)
class InstructData(TaskData):
    """The records of a run, and their rows in the training and validation splits."""

    train: Rows
    val: Rows
    template: str
    """"model", or a row of TEMPLATES."""
    records: list[dict]
    conversations: list[list[Message]]
    splits: tuple[np.ndarray, np.ndarray, np.ndarray]
    """The records for training, validation and test."""
    counts: Counts
    num_inputs: int
    """Tokens in the training rows, without padding."""

    @property
    def has_test(self) -> bool:
        """Whether there are test records."""
        return len(self.splits[2]) > 0

    def fit(self, config: TrainConfig) -> TrainConfig:
        """Record the template, and the steps that the epochs take."""
        return fit_epochs(config.with_options(template=self.template), len(self.train))

    def describe(self, config: TrainConfig) -> str:
        """Return the records, the length of the run, the padding, and how many were cut."""
        line = describe_epochs(config, len(self.train), [len(part) for part in self.splits])
        line += (
            f"; {int(self.train.num_targets.sum()):,} answer tokens, "
            f"{1 - self.num_inputs / self.train.tokens.numel():.1%} of the rows is padding; "
            f"template {self.template}"
        )
        if self.counts.shortened:
            line += f"; records cut at {self._width} tokens: {self.counts.shortened}"
        if self.counts.left_out:
            line += f"; left out without room for an answer: {self.counts.left_out}"
        return line

    @property
    def _width(self) -> int:
        return self.train.tokens.shape[1]

    def encode(self, place: int) -> list[Example]:
        """Return the examples of a record."""
        return encode(self.tokenizer, self.conversations[place], self.template)

    def question(self, place: int) -> list[int]:
        """Return the ids of a record up to its last answer."""
        return encode_question(self.tokenizer, self.conversations[place][:-1], self.template)

    def loader(self, config: TrainConfig, execution: Execution) -> RecordLoader:
        """Return the training batches of this rank."""
        return RecordLoader(self.train, config, execution, self._width)

    def evaluation_batches(
        self, config: TrainConfig, execution: Execution, *, is_last: bool
    ) -> Iterator[Rows]:
        """Return the validation rows of this rank. Every evaluation uses all of them."""
        return record_batches(self.val, execution)

    def sample(self, model: GPT, config: TrainConfig) -> str:
        """Return the question of the first validation record and an answer to it."""
        prompt = self.question(self.splits[1][0])
        (found,) = self.answer(model, [prompt], config.report.sample_tokens)
        return self.tokenizer.decode(prompt) + ("" if found is None else found)

    def finish(
        self, run: Path, model: GPT, config: TrainConfig, report: Callable[[], None]
    ) -> None:
        """Write the answers to the test records to RUN/answers.jsonl."""
        test = self.splits[2].tolist()
        prompts = [self.question(place) for place in test]
        # Similar lengths together, so that a batch has room for long answers.
        order = sorted(range(len(test)), key=lambda i: len(prompts[i]))
        answers: dict[int, str | None] = {}
        for start in range(0, len(order), _ANSWER_BATCH):
            group = order[start : start + _ANSWER_BATCH]
            batch = [prompts[i] for i in group]
            found = self.answer(model, batch, config.task_options.answer_tokens)
            answers |= dict(zip(group, found, strict=True))
            report()
        lines = [
            json.dumps(self.records[place] | {"answer": answers[i]}, ensure_ascii=False) + "\n"
            for i, place in enumerate(test)
        ]
        write_whole(run / ANSWERS, ["".join(lines).encode("utf-8", "replace")])

    def answer(self, model: GPT, prompts: list[list[int]], most: int) -> list[str | None]:
        """Return the answer to each prompt, by greedy decoding.

        Args:
            prompts: ids, as `question` returns them.
            most: maximum number of tokens of an answer. Answers also end at the end of the context.
        Returns: None for a prompt that fills the context.
        """
        context = model.config.context_tokens
        fitting = [prompt for prompt in prompts if len(prompt) < context]
        if not fitting:
            return [None] * len(prompts)
        longest = max(map(len, fitting))
        stop = () if self.template == "model" else (TEMPLATES[self.template].stop,)
        new = min(most, context - longest)
        sampling = for_tokenizer(
            Sampling(temperature=0.0, max_new_tokens=new, stop=stop, seed=0), self.tokenizer
        )
        decoder = Decoder(model, len(fitting), sampling, capacity=longest + new, use_graph=False)
        found = generate(
            model, fitting, sampling=sampling, tokenizer=self.tokenizer, decoder=decoder
        )
        answers = [
            self._text(prompt, ids, stop) for prompt, ids in zip(fitting, found, strict=True)
        ]
        # The longest prompt ended the answers of the others: answer these again without it.
        ended = [
            i
            for i, prompt in enumerate(fitting)
            if len(found[i]) == len(prompt) + new and new < min(most, context - len(prompt))
        ]
        if ended:
            again = self.answer(model, [fitting[i] for i in ended], most)
            for i, text in zip(ended, again, strict=True):
                answers[i] = text
        rest = iter(answers)
        return [next(rest) if len(prompt) < context else None for prompt in prompts]

    def _text(self, prompt: list[int], ids: list[int], stop: tuple[str, ...]) -> str:
        """Return the text after a prompt, up to a stop token or a stop text."""
        text = answer_text(self.tokenizer, prompt, ids)
        for each in stop:
            text = text.partition(each)[0]
        return text.strip()
