"""The task "classify": give a text one of several labels. See train/tasks.py.

    texts     of one file, without copies (classify_records.py)
    parts     training, validation and test, by the seed
    batches   texts packed end to end (classify_batch.py); the head reads the last token of each
              (model/classifier.py)

After the last step, the test texts are classified:

    RUN/test.json           accuracy, macro F1, and precision, recall and F1 of each label
    RUN/predictions.jsonl   the prediction for each text
    RUN/confusion.png       the confusion matrix

With class weights all losses are weighted, also those of validation and test.
"""

import collections
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import DivergedError, InputError, plural
from ...kernels import cross_entropy
from ...model import GPT, GPTClassifier, GPTConfig
from ...model.choices import ATTENTIONS
from ..config import DIVERGED, TrainConfig
from ..distributed.world import World
from ..evaluate import Evaluation
from ..execution import Execution
from ..run.folder import RunRecord
from ..storage.files import write_whole
from ..terminal.progress import console
from .classify_batch import LabelledBatch, encode_labelled
from .classify_metrics import Confusion
from .classify_records import (
    LabelledText,
    balanced,
    class_weights,
    read_labelled_texts,
    split_texts,
    without_copies,
)
from .data import TaskData, model_options
from .records import RecordLoader, fit_epochs, open_records, record_batches, row_tokens

# Validation texts in a sample, and characters of each.
_SAMPLE_TEXTS = 5
_SAMPLE_CHARACTERS = 80


def open_data(
    config: TrainConfig,
    *,
    record: RunRecord | None = None,
    run: Path | None = None,
    progress: bool = False,
) -> "ClassifyData":
    """Read the texts of a run.

    Args: record, run, progress: see pretrain.open_data. There is no progress bar.
    Raises: InputError if the run cannot use the file.
    """
    options = config.task_options
    _check(config)

    # Read, choose and split.
    source = open_records(
        config,
        record,
        run,
        read=lambda path: read_labelled_texts(path, options.text_column, options.label_column),
    )
    texts, num_contradictions = without_copies(source.records)
    num_copies = len(source.records) - len(texts)
    if options.balance:
        texts = balanced(texts, config.seed)
    fractions = {"val_fraction": options.val_fraction, "test_fraction": options.test_fraction}
    parts = split_texts(texts, **fractions, seed=config.seed)
    if record is not None and list(parts.labels) != record.labels:
        raise InputError(
            f"{source.path}: expected the labels {', '.join(record.labels)}, which {run} learns, "
            f"got {', '.join(parts.labels)}"
        )

    # Encode.
    most_tokens = row_tokens(config)
    weights = class_weights(parts.train, parts.labels) if options.class_weights else None
    rows = {}
    num_cut = 0
    for name in ("train", "val", "test"):
        rows[name], count = encode_labelled(
            getattr(parts, name),
            parts.labels,
            source.tokenizer,
            most_tokens=most_tokens,
            weights=weights,
        )
        num_cut += count
    return ClassifyData(
        path=source.path,
        sha256=source.sha256,
        tokenizer=source.tokenizer,
        train=range(rows["train"].tokens),
        val=range(rows["val"].tokens),
        labels=parts.labels,
        rows=rows,
        texts={"val": parts.val, "test": parts.test},
        note=_describe(texts, num_copies, num_contradictions, num_cut, most_tokens),
    )


def _check(config: TrainConfig) -> None:
    """Raise InputError for options that a classifier cannot have."""
    n_layer = config.model.n_layer
    blocks = config.task_options.trained_blocks
    if blocks is not None and not 0 <= blocks <= n_layer:
        raise InputError(
            f"trained_blocks: expected 0 to {n_layer}, the blocks of the model, got {blocks}"
        )
    if config.model.prefix_tokens:
        raise InputError(
            f"prefix_tokens: expected 0 in the task classify, whose texts are packed, got "
            f"{config.model.prefix_tokens}"
        )
    if blocks is not None and config.adapter.lora:
        raise InputError(f"trained_blocks: expected none with `lora`, got {blocks}")
    attention = config.execution.attention
    if not ATTENTIONS[attention].spans_rows:
        raise InputError(
            f"attention: expected tritium in the task classify, whose texts can continue in the "
            f"next row, got {attention}"
        )
    for name in ("eval_text", "eval_choice"):
        if getattr(config.report, name):
            raise InputError(f"{name}: expected none, because a classifier predicts no tokens")


def _describe(
    texts: Sequence[LabelledText],
    num_copies: int,
    num_contradictions: int,
    num_cut: int,
    most_tokens: int,
) -> str:
    counts = collections.Counter(each.label for each in texts).most_common()
    lines = [
        f"{plural(len(texts), 'text')}: "
        + ", ".join(f"{count:,} {label}" for label, count in counts[:20])
    ]
    if num_copies:
        lines.append(f"copies of a text left out: {num_copies:,}")
    if num_contradictions:
        lines.append(f"copies with another label than the first: {num_contradictions:,}")
    if num_cut:
        lines.append(f"texts cut after {most_tokens} tokens: {num_cut:,}")
    return "; ".join(lines)


@dataclass(frozen=True, kw_only=True)
class ClassEvaluation(Evaluation):
    """An evaluation whose line shows accuracy and macro F1 only."""

    def describe(self) -> str:
        """Return the loss, the accuracy and the macro F1 in one line."""
        more = self.more
        return (
            f"validation loss {self.loss:.4f}, accuracy {more['accuracy']:.4f}, "
            f"macro F1 {more['f1']:.4f}"
        )


@dataclass(frozen=True, kw_only=True)
class ClassifyData(TaskData):
    """The texts of a run, in three parts."""

    labels: tuple[str, ...]
    """The labels of the training part, sorted."""
    rows: dict[str, LabelledBatch]
    """All texts of each part: train, val, test."""
    texts: dict[str, list[LabelledText]]
    """The texts of val and test as they are in the file."""
    note: str
    """One line about the texts."""

    @property
    def has_test(self) -> bool:
        """Whether `finish` has something to do."""
        return True

    def fit(self, config: TrainConfig) -> TrainConfig:
        """Return the configuration with the steps that the epochs take."""
        return fit_epochs(config, len(self.rows["train"]))

    def describe(self, config: TrainConfig) -> str:
        """Return two lines about the texts and the length of a new run."""
        train, val, test = (len(self.rows[name]) for name in ("train", "val", "test"))
        epochs = config.steps * config.batch_size / train
        return (
            f"{self.note}\n{train:,} training, {val:,} validation and {test:,} test texts; "
            f"{plural(epochs, 'epoch', '.3g')} in {plural(config.steps, 'step')} of "
            f"{plural(config.batch_size, 'text')}"
        )

    def new_model(self, config: TrainConfig, shape: GPTConfig) -> GPTClassifier:
        """Return a classifier with new weights."""
        model = GPTClassifier(shape, self.labels, **model_options(config))
        model.freeze(config.task_options.trained_blocks)
        return model

    def adapt(self, trained: GPT, config: TrainConfig) -> GPTClassifier:
        """Return a classifier with the weights of a trained GPT, and a new head."""
        model = GPTClassifier.from_gpt(trained, self.labels, **model_options(config))
        model.freeze(config.task_options.trained_blocks)
        return model

    def loader(self, config: TrainConfig, execution: Execution) -> RecordLoader:
        """Return the training batches of this rank."""
        rows = self.rows["train"]
        mean_tokens = -(-rows.tokens // len(rows))
        return RecordLoader(rows, config, execution, context_tokens=mean_tokens)

    def evaluation_batches(
        self, config: TrainConfig, execution: Execution, *, is_last: bool
    ) -> Iterable[LabelledBatch]:
        """Return all validation texts of this rank."""
        return record_batches(self.rows["val"], execution)

    def evaluate(
        self, model: GPTClassifier, batches: Iterable[LabelledBatch], world: World
    ) -> ClassEvaluation | None:
        """Evaluate the model on `batches`, on all ranks. See TaskData.evaluate."""
        C = len(self.labels)
        loss, probabilities, label = _measure(model, batches)
        confusion = Confusion.of(self.labels, label, probabilities.argmax(1))
        sums = torch.tensor([loss, *confusion.counts.flatten().tolist()], dtype=torch.float64)
        loss, *counts = (world.mean(sums) * world.data_ranks).tolist()
        counts = np.round(counts).astype(np.int64).reshape(C, C)
        count = int(counts.sum())
        if not count:
            return None
        if not np.isfinite(loss):
            raise DivergedError(f"{DIVERGED} (validation loss is {loss / count})")
        more = Confusion(self.labels, counts).numbers()
        return ClassEvaluation(loss=loss / count, tokens=count, unit="text", more=more)

    def sample(self, model: GPTClassifier, config: TrainConfig) -> str:
        """Return the predictions for some validation texts."""
        _, probabilities, _ = _measure(model, [self.rows["val"][:_SAMPLE_TEXTS]])
        lines = []
        for each, row in zip(self.texts["val"], probabilities, strict=False):
            text = " ".join(each.text.split())[:_SAMPLE_CHARACTERS]
            found = f"{self.labels[row.argmax()]} {row.max():.3f}"
            lines.append(f"{found} (label {each.label}): {text}")
        return "\n".join(lines)

    def finish(
        self, run: Path, model: GPTClassifier, config: TrainConfig, report: Callable[[], None]
    ) -> None:
        """Classify the test texts, and write the results into the run."""
        rows = self.rows["test"]
        size = config.micro_batch

        def batches() -> Iterable[LabelledBatch]:
            for start in range(0, len(rows), size):
                report()
                yield rows[start : start + size]

        loss, probabilities, label = _measure(model, batches())
        prediction = probabilities.argmax(1)
        confusion = Confusion.of(self.labels, label, prediction)
        results = {
            "texts": len(rows),
            "loss": loss / len(rows),
            **confusion.numbers(),
            "labels": list(self.labels),
            "confusion": confusion.counts.tolist(),
        }
        write_whole(run / "test.json", [json.dumps(results, indent=2).encode(), b"\n"])
        # Without the folder of the file: a resumed run opens the file by its absolute path.
        lines = [
            {"place": Path(each.place).name, "label": each.label, "prediction": self.labels[found]}
            | {"probability": float(row[found]), "text": each.text}
            for each, found, row in zip(
                self.texts["test"], prediction.tolist(), probabilities, strict=True
            )
        ]
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_whole(run / "predictions.jsonl", [content.encode()])
        confusion.draw(run / "confusion.png", f"{run.name}: {plural(len(rows), 'test text')}")
        console.print(
            f"test: {plural(len(rows), 'text')}, loss {results['loss']:.4f}, accuracy "
            f"{confusion.accuracy:.4f}, macro F1 {results['f1']:.4f}\n{confusion.table()}"
        )


@torch.no_grad()
def _measure(
    model: GPTClassifier, batches: Iterable[LabelledBatch]
) -> tuple[float, np.ndarray, np.ndarray]:
    """Classify the texts of this rank, without dropout.

    Returns: the sum of the weighted losses; the probabilities (N, C); the labels (N,).
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    losses: list[Tensor] = []
    logits: list[Tensor] = []
    labels: list[np.ndarray] = []
    for batch in batches:
        inputs = batch.model_inputs(device)
        label = inputs.pop("label")
        weight = inputs.pop("loss_weight")
        found = model(**inputs)
        if not batch.num_targets.all():
            continue  # it only fills a place
        losses.append((cross_entropy(found, label, reduction="none") * weight).sum())
        logits.append(found)
        labels.append(batch.label)
    model.train(was_training)
    if not labels:
        return 0.0, np.zeros((0, len(model.labels))), np.zeros(0, np.int64)
    # Read all results at the end, so that nothing waits for the device between batches.
    probabilities = torch.cat(logits).softmax(1).cpu().numpy()
    return torch.stack(losses).sum().item(), probabilities, np.concatenate(labels)
