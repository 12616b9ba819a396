"""The task "prefer": prefer one answer to another, by DPO (model/preference.py).

    records      pairs of answers: prefer_pairs.py
    reference    log-probabilities of all answers before the first step, in RUN/reference.json
    validation   loss, margin, and accuracy: the fraction of pairs with a margin above 0
    margins      of each validation and test pair after the last step, in RUN/margins.jsonl; prints
                 the means with 95% intervals, by the bootstrap over pairs

reference.json has a checksum, and a hash of the pairs. A resumed run reads it.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import DivergedError, InputError
from ...model import GPT, GPTConfig
from ...model.preference import PreferenceModel, as_preference_model, dpo_loss
from ..config import DIVERGED, TrainConfig
from ..distributed.engines import SingleProcess
from ..distributed.world import World
from ..evaluate import Evaluation
from ..execution import Execution
from ..run.folder import RunRecord
from ..storage.files import seal, unseal, write_whole
from ..terminal.progress import console, progress
from .conversations import choose_template
from .data import TaskData, model_options
from .prefer_pairs import Counts, PairRows, check_not_empty, make_rows, read_pair, widest
from .records import (
    RecordLoader,
    describe_epochs,
    fit_epochs,
    open_records,
    record_batches,
    row_tokens,
    split,
)

REFERENCE = "reference.json"
MARGINS = "margins.jsonl"
_SPLITS = ("training", "validation", "test")
_RESAMPLES = 2000


def open_data(
    config: TrainConfig,
    *,
    record: RunRecord | None = None,
    run: Path | None = None,
    progress: bool = False,
) -> "PreferData":
    """Read, split and encode the pairs of a run.

    Args: record, run, progress: see pretrain.open_data. There is no progress bar.
    Raises: InputError, which names the line, for a bad record.
    """
    source = open_records(config, record, run)
    options = config.task_options
    template = choose_template(options.template, source.tokenizer)
    pairs = [read_pair(each, source.tokenizer, template) for each in source.records]
    fractions = {"val_fraction": options.val_fraction, "test_fraction": options.test_fraction}
    splits = split(len(pairs), **fractions, seed=config.seed)

    T = row_tokens(config)
    counts = Counts()
    found = [counts.cut([pairs[i] for i in part.tolist()], T) for part in splits]
    kept = dict(zip(_SPLITS, (each for each, _ in found), strict=True))
    check_not_empty({name: kept[name] for name in _SPLITS[:2]}, source.path, T)
    width = min(widest(kept.values()), config.model.context_tokens)
    train, val, test = (make_rows(each, width) for each in kept.values())
    return PreferData(
        path=source.path,
        sha256=source.sha256,
        tokenizer=source.tokenizer,
        train=train,
        val=val,
        test=test,
        places={
            name: part[kept_places]
            for name, part, (_, kept_places) in zip(_SPLITS, splits, found, strict=True)
        },
        template=template,
        counts=counts,
    )


@dataclass(frozen=True, kw_only=True)
class PreferData(TaskData):
    """The pairs of a run."""

    train: PairRows
    val: PairRows
    test: PairRows
    places: dict[str, np.ndarray]
    """Number of the record of each pair, from 0, by split."""
    template: str
    """"model", or a row of TEMPLATES."""
    counts: Counts

    @property
    def has_test(self) -> bool:
        """Whether `finish` writes margins: always, because there are validation pairs."""
        return True

    def fit(self, config: TrainConfig) -> TrainConfig:
        """Record the template, and the steps that the epochs take."""
        return fit_epochs(config.with_options(template=self.template), len(self.train))

    def describe(self, config: TrainConfig) -> str:
        """Return the pairs, the length of the run, and how many pairs were cut or left out."""
        sizes = [len(rows) for rows in (self.train, self.val, self.test)]
        line = f"{describe_epochs(config, len(self.train), sizes)}; template {self.template}"
        counts = self.counts
        if counts.shortened:
            line += f"; pairs cut at {row_tokens(config)} tokens: {counts.shortened}"
        if counts.equal:
            line += f"; pairs of equal answers left out: {counts.equal}"
        if counts.left_out:
            line += f"; left out without room for an answer: {counts.left_out}"
        return line

    # --- the model, and the reference

    def new_model(self, config: TrainConfig, shape: GPTConfig) -> GPT:
        """Return a model with new weights. A resume loads a checkpoint."""
        return PreferenceModel(shape, **_loss_options(config), **model_options(config))

    def adapt(self, trained: GPT, config: TrainConfig) -> GPT:
        """Return the trained model with the loss of DPO."""
        return as_preference_model(trained, **_loss_options(config), **model_options(config))

    def begin(self, run: Path, engine: SingleProcess, config: TrainConfig, step: int) -> None:
        """Compute the reference of all pairs, or read it. All ranks must call it."""
        file = run / REFERENCE
        if step == 0 and not engine.world.on_rank0(file.is_file):
            model = engine.complete_model()
            engine.world.on_rank0(lambda: self._write_reference(file, model, engine.execution))
        reference = engine.world.on_rank0(lambda: self._read_reference(file))
        for name, rows in self._rows().items():
            rows.reference.copy_(torch.tensor(reference[name]).view(-1, 2))

    def _rows(self) -> dict[str, PairRows]:
        return dict(zip(_SPLITS, (self.train, self.val, self.test), strict=True))

    def _sha256(self) -> str:
        return " ".join(rows.sha256() for rows in self._rows().values())

    @torch.no_grad()
    def _write_reference(self, file: Path, model: PreferenceModel, execution: Execution) -> None:
        """Compute the log-probabilities of all answers, on rank 0."""
        console.print("computing the log-probabilities of all answers before the first step")
        was_training = model.training
        model.eval()
        record = {"pairs": self._sha256()}
        total = sum(map(len, self._rows().values()))
        with progress("answers", total) as advance:
            for name, rows in self._rows().items():
                values = [rows.reference[:0]]
                for start in range(0, len(rows), execution.micro_batch):
                    part = rows[start : start + execution.micro_batch]
                    inputs = part.model_inputs(execution.device)
                    logps = model.answer_logps(inputs["tokens"], inputs["targets"])
                    values.append(logps.view(2, -1).t().float().cpu())
                    execution.world.mark()
                    advance(len(part))
                record[name] = torch.cat(values).tolist()
        model.train(was_training)
        write_whole(file, [seal(record)])

    def _read_reference(self, file: Path) -> dict[str, list]:
        try:
            record = unseal(file.read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(
                f"{file}: damaged or missing ({error}); it holds the log-probabilities before the "
                "first step; put it back, or start a new run"
            ) from None
        if record["pairs"] != self._sha256():
            raise InputError(
                f"{file}: expected the pairs of answers with which the run was started, got other "
                "ones; a run of the task prefer keeps its records"
            )
        return record

    # --- batches and evaluations

    def loader(self, config: TrainConfig, execution: Execution) -> RecordLoader:
        """Return the training batches of this rank."""
        # A compiled model and a CUDA graph have one shape.
        has_one_width = execution.is_compiled or execution.cuda_graph
        rows = replace(self.train, has_one_width=has_one_width)
        return RecordLoader(rows, config, execution, 2 * rows.tokens.shape[2])

    def evaluation_batches(
        self, config: TrainConfig, execution: Execution, *, is_last: bool
    ) -> Iterator[PairRows]:
        """Return the validation pairs of this rank. Every evaluation uses all of them."""
        return record_batches(self.val, execution)

    def evaluate(self, model: GPT, batches: Iterable[PairRows], world: World) -> Evaluation | None:
        """Return loss, margin and accuracy of the validation pairs. See TaskData.evaluate."""
        margins = margins_of(model, batches)
        # The sum over ranks of the pairs, losses, margins and right answers.
        sums = torch.tensor(
            [
                len(margins),
                dpo_loss(margins, model.label_smoothing).sum(),
                margins.sum(),
                (margins > 0).sum(),
            ],
            dtype=torch.float64,
        )
        count, *totals = (world.mean(sums) * world.data_ranks).tolist()
        if not count:
            return None
        loss, margin, accuracy = (total / count for total in totals)
        if not math.isfinite(loss):
            raise DivergedError(f"{DIVERGED} (validation loss is {loss})")
        more = {"margin": margin, "accuracy": accuracy}
        return Evaluation(loss=loss, tokens=round(count), unit="pair", more=more)

    def finish(
        self, run: Path, model: GPT, config: TrainConfig, report: Callable[[], None]
    ) -> None:
        """Write margins of validation and test pairs to RUN/margins.jsonl; print their means."""
        lines = []
        for name in _SPLITS[1:]:
            rows = self._rows()[name]
            if not len(rows):
                continue
            margins = margins_of(model, _batches(rows, config.micro_batch, report))
            for place, margin in zip(self.places[name].tolist(), margins.tolist(), strict=True):
                record = {"split": name, "record": place, "margin": margin}
                lines.append(json.dumps(record) + "\n")
            low, high = bootstrap_interval(margins.numpy(), config.seed)
            console.print(
                f"{name} margin {margins.mean():.4f} (95% interval {low:.4f} to {high:.4f}), "
                f"accuracy {(margins > 0).double().mean():.4f}, over {len(margins)} pairs"
            )
        write_whole(run / MARGINS, ["".join(lines).encode()])


def _batches(rows: PairRows, size: int, report: Callable[[], None]) -> Iterator[PairRows]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
        report()


@torch.no_grad()
def margins_of(model: GPT, batches: Iterable[PairRows]) -> Tensor:
    """Return the margins of the pairs in `batches` that have a weight, (pairs,) float64."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    found = []
    for batch in batches:
        margins = model(**batch.model_inputs(device), reduction="none")
        found.append(margins[: int(batch.num_targets.sum())].double())
    model.train(was_training)
    # Read them at the end, so that nothing waits for the device between batches.
    return torch.cat(found).cpu() if found else torch.zeros(0, dtype=torch.float64)


def bootstrap_interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    """Return the 95% interval of the mean: percentiles over resampled values."""
    generator = np.random.default_rng(seed)
    picks = generator.integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


def _loss_options(config: TrainConfig) -> dict[str, float | bool]:
    options = config.task_options
    return {
        "beta": options.beta,
        "label_smoothing": options.label_smoothing,
        "length_normalize": options.length_normalize,
    }
