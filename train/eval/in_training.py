"""Evaluations on other texts and files while a model trains: eval_text and eval_choice.

They add these keys to the evaluation lines of metrics.jsonl:

    text/NAME/loss              nats per token of the text NAME
    text/NAME/bits_per_byte     not for token shards without a tokenizer
    choice/FILE/METRIC          a metric of choice_formats.py, for the file FILE.jsonl

Windows do not overlap, as in training. All evaluations but the last use about `eval_tokens` tokens
of each text, spread over it. Choices always use all examples. Rank 0 evaluates alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...model import GPT
from ..config import TrainConfig, named_files
from ..data.tokenizers.tokenizer import Tokenizer
from .choice import Encoded, encode_examples, measure_choices
from .choice_formats import Example, read_examples
from .perplexity import check_length, measure
from .texts import Text, read_text


@dataclass(frozen=True)
class _Choices:
    task: str
    examples: list[Example]
    encoded: Encoded


@dataclass(frozen=True)
class TrainingEvaluations:
    """Texts and files, read and encoded once.

    Attributes:
        texts, choices: by their names.
        max_targets: tokens per text, except in the last evaluation.
    """

    texts: dict[str, Text]
    choices: dict[str, _Choices]
    max_targets: int

    def work(self, is_last: bool) -> int:
        """Return about how many targets and choices `measure` evaluates."""
        targets = [text.tokens for text in self.texts.values()]
        if not is_last:
            targets = [min(each, self.max_targets) for each in targets]
        choices = [len(row) for each in self.choices.values() for _, row in each.encoded]
        return sum(targets) + sum(choices)

    def measure(
        self, model: GPT, *, batch_size: int, is_last: bool, report: Callable[[int], None]
    ) -> dict[str, float]:
        """Return the values by their keys. The model can be in training mode.

        Args:
            batch_size: sequences per forward.
            is_last: whether to use all tokens of each text.
            report: called often, with the amount of finished work.
        """
        was_training = model.training
        model.eval()
        values = {}
        context = model.config.context_tokens
        for name, text in self.texts.items():
            found = measure(
                model,
                text,
                context=context,
                stride=context,
                batch_size=batch_size,
                max_targets=None if is_last else self.max_targets,
                report=report,
            )
            values[f"text/{name}/loss"] = found.loss
            if found.bits_per_byte is not None:
                values[f"text/{name}/bits_per_byte"] = found.bits_per_byte
        for name, choices in self.choices.items():
            found = measure_choices(
                model,
                choices.task,
                choices.examples,
                choices.encoded,
                batch_size=batch_size,
                report=report,
            )
            values |= {f"choice/{name}/{metric}": value for metric, value in found.items()}
        model.train(was_training)
        return values


def open_evaluations(config: TrainConfig, tokenizer: Tokenizer) -> TrainingEvaluations | None:
    """Read the files of eval_text and eval_choice. Returns: None if there are none.

    Raises: InputError if a file is missing or does not fit; OSError if it cannot be read.
    """
    files = named_files(config.report)
    if not any(files.values()):
        return None
    context = config.model.context_tokens
    texts = {}
    for name, file in files["eval_text"].items():
        texts[name] = read_text(Path(file), tokenizer, tokenizer.vocab_size)
        check_length(texts[name], context)
    choices = {}
    for name, file in files["eval_choice"].items():
        task, examples = read_examples(Path(file))
        choices[name] = _Choices(task, examples, encode_examples(examples, tokenizer, context))
    return TrainingEvaluations(texts, choices, config.report.eval_tokens)
