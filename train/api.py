"""Train, fine-tune and use models from Python, with the engine of the command line.

    import tritium

    run = tritium.train("laptop", data="my.txt", steps=200)
    run.sample("Once upon a time")
    tuned = tritium.finetune("instruct", run, "records.jsonl", epochs=2)
    tuned.metrics()[-1]["val_loss"]
    tritium.load("runs/laptop-1").plot()

Bad input raises tritium.InputError. Ctrl-C writes a checkpoint and raises tritium.InterruptedRun;
tritium.load(folder).resume() continues.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, InterruptedRun
from ..model import GPT, GPTClassifier
from ..model.generation import Sampling
from .config import OPTION_CLASSES, TrainConfig
from .data.tokenizers.tokenizer import Tokenizer
from .evaluate import Evaluation
from .finetune.classify_batch import classify_texts
from .finetune.start import finetune_config
from .generation.text import encode_prompt, stream_sample
from .loop import resume, start
from .machine.device import choose_device, choose_matmul
from .recipes import default_recipe, recipe
from .run.checkpoint import checkpoints
from .run.folder import create_free_folder, remove_unused_folder
from .run.goodput import begin_now
from .run.metrics import check_metrics, read_lines
from .run.models import SavedModel, open_model
from .run.plots import plot_loss
from .run.trackers import Callbacks
from .start.config_file import read_config
from .start.new_run import new_config
from .storage.records import check_types

Callback = Callable[[dict[str, Any]], object]


@dataclass(frozen=True, eq=False)
class Run:
    """A trained model and the files of its training.

    Attributes:
        folder: the folder of the run, a checkpoint, or a Hugging Face folder.
        evaluation: of the finished model on all held-out data. None: `load` opened the run.
    """

    folder: Path
    evaluation: Evaluation | None = None

    @property
    def _saved(self) -> SavedModel:
        return open_model(self.folder)

    @functools.cached_property
    def model(self) -> GPT:
        """The model of the newest checkpoint, in float32, on the GPU if there is one.

        A GPT, or a GPTClassifier after the task classify.
        """
        device = choose_device("auto")
        choose_matmul(device)
        return self._saved.load_any().float().to(device).eval()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
        return self._saved.tokenizer()

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl, oldest first.

        pandas.DataFrame(run.metrics()) is a table of them. train/run/metrics.py lists the keys.

        Returns: a dictionary per step and per evaluation, which has `val_loss`.
        Raises: InputError if there is no line of a step.
        """
        return read_lines(self._folder_with_metrics())

    def plot(self) -> Path:
        """Draw the loss curve.

        Returns: the path of loss.png.
        Raises: InputError if there is no line of a step.
        """
        return plot_loss(self._folder_with_metrics())

    def sample(
        self,
        prompt: str | None = None,
        *,
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_p: float | None = 0.95,
        **options: Any,
    ) -> str:
        """Return a prompt and text that continues it.

        Args:
            prompt: text to continue, at most as long as the context. None: the start of a document.
            max_new_tokens, temperature, top_p, options: fields of model.generation.Sampling.
        Returns: the prompt and its continuation.
        Raises: InputError if the model is a classifier, an option is out of range, or the prompt
            is too long.
        """
        values = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        if isinstance(self.model, GPTClassifier):
            raise InputError(f"{self.folder}: expected a language model, got a classifier")
        try:
            sampling = Sampling(**values | options)
            ids = encode_prompt(self.tokenizer, prompt)
            found = stream_sample(self.model, self.tokenizer, ids, sampling)
            return (prompt or "") + "".join(found)
        except ValueError as error:
            raise InputError(str(error)) from None

    def classify(self, texts: Iterable[str]) -> list[dict[str, float]]:
        """Return the probabilities of all labels for each text.

        Args: texts: any number of texts.
        Returns: a dictionary per text, from label to probability.
        Raises: InputError if the model is not a classifier.
        """
        model = self.model
        if not isinstance(model, GPTClassifier):
            raise InputError(f"{self.folder}: expected a classifier, got a language model")
        found = classify_texts(model, self.tokenizer, texts)
        return [dict(zip(model.labels, each, strict=True)) for each in found]

    def resume(
        self,
        *,
        on_step: Callback | None = None,
        on_evaluation: Callback | None = None,
        **changes: Any,
    ) -> "Run":
        """Continue a stopped run from its newest checkpoint, in this process.

        Args:
            on_step, on_evaluation: as for `train`.
            changes: new values of options, such as steps. train/run/history.py has the names.
        Returns: a new Run, whose model is the finished one.
        Raises: as `train`.
        """
        folder = self._folder_of_run()
        callbacks = Callbacks(on_step, on_evaluation)
        changes = _as_options(changes)
        return _finish(folder, lambda: resume(folder, changes=changes, callbacks=callbacks))

    def _folder_with_metrics(self) -> Path:
        folder = self._folder_of_run()
        check_metrics(folder)
        return folder

    def _folder_of_run(self) -> Path:
        saved = self._saved
        if saved.adapter is not None:
            raise InputError(f"{self.folder}: expected the folder of a run, got an adapter")
        if saved.run is None:
            raise InputError(f"{self.folder}: expected the folder of a run, got a published model")
        return saved.run


def train(
    recipe_or_config: str | Path | TrainConfig | None = None,
    *,
    on_step: Callback | None = None,
    on_evaluation: Callback | None = None,
    **options: Any,
) -> Run:
    """Train a new model in this process, as `tritium train` does.

    Args:
        recipe_or_config: name of a recipe, the Path of a file for --config, or a configuration.
            None: the recipe for this machine.
        on_step: called with the line of metrics.jsonl of each step, a dictionary, after the results
            of the step were read: up to ten steps later. train/run/metrics.py lists the keys.
        on_evaluation: called with the line of each evaluation.
        options: of TrainConfig, by their flat names: data, steps, n_layer, device, out, ...
    Returns: the finished run.
    Raises: InputError for bad input; DivergedError; InterruptedRun after Ctrl-C; the
        exception of a callback, as it is. After the last two the run has a checkpoint.
    """
    callbacks = Callbacks(on_step, on_evaluation)
    if isinstance(recipe_or_config, TrainConfig):
        name, base = "run", recipe_or_config
    elif isinstance(recipe_or_config, Path):
        name, base = recipe_or_config.stem, read_config(recipe_or_config)
    else:
        name = recipe_or_config or default_recipe()
        base = recipe(name)
    return _start(name, new_config(base, _as_options(options)), callbacks)


def finetune(
    task: str,
    model: Run | str | Path,
    data: str | Path,
    *,
    on_step: Callback | None = None,
    on_evaluation: Callback | None = None,
    **options: Any,
) -> Run:
    """Train a model further on records, in this process, as `tritium finetune` does.

    Args:
        task: a row of train/tasks.py, such as "instruct".
        model: a Run, or the path of a run, a checkpoint or a Hugging Face folder.
        data: file of records.
        on_step, on_evaluation: as for `train`.
        options: of TrainConfig and of the task, by their flat names: epochs, lr, out, ...
    Returns: the finished run.
    Raises: as `train`.
    """
    callbacks = Callbacks(on_step, on_evaluation)
    path = model.folder if isinstance(model, Run) else Path(model)
    return _start(task, finetune_config(task, path, data, **_as_options(options)), callbacks)


def load(run_or_folder: str | Path) -> Run:
    """Open a run, a checkpoint or a Hugging Face folder.

    Args: run_or_folder: its path.
    Returns: a Run. Its model is read when it is first used.
    Raises: InputError if there is no model.
    """
    folder = Path(run_or_folder).absolute()
    open_model(folder)
    return Run(folder)


def _as_options(options: dict[str, Any]) -> dict[str, Any]:
    """Turn lists into tuples, paths into texts, and one path of `data` into a tuple.

    NumPy numbers become Python numbers.

    Raises: InputError for a value of the wrong type.
    """
    found = {}
    for name, value in options.items():
        if name == "data" and isinstance(value, str | Path):
            value = (value,)
        is_list = isinstance(value, list | tuple)
        found[name] = tuple(map(_as_option, value)) if is_list else _as_option(value)
    for part in OPTION_CLASSES:
        check_types(found, part)
    return found


def _as_option(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return value.item() if isinstance(value, np.generic) else value


def _start(name: str, config: TrainConfig, callbacks: Callbacks) -> Run:
    """Train a new run in its folder, or in the next free folder runs/NAME-N."""
    folder = Path(config.report.out) if config.report.out else create_free_folder(name)
    folder = folder.absolute()  # a callback may change the working directory
    try:
        return _finish(folder, lambda: start(config, folder, callbacks=callbacks))
    finally:
        if config.report.out is None:
            remove_unused_folder(folder)


def _finish(folder: Path, work: Callable[[], Evaluation]) -> Run:
    """Run `work` to the end. An interrupted run with a checkpoint says how to continue."""
    begin_now()
    try:
        return Run(folder, work())
    except InterruptedRun as stop:
        raise InterruptedRun(stop.number, folder if checkpoints(folder) else None) from None
