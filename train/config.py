"""The configuration of a run, as data: what is trained, how it is executed, what is reported.

    TrainConfig         the experiment: data, model, optimizer, schedule
      .model            GPTConfig, the shape of the model; vocab_size follows from the tokenizer
      .execution        ExecutionOptions: device, precision, ...; results agree to rounding
      .report           ReportOptions: what the run writes, and when
      .adapter          AdapterOptions: LoRA, small weights that are trained alone
      .task_options     the options of the task: tasks.py

Options have flat names on the command line and in config.json: `n_layer`, not `model.n_layer`.
`from_options` and `options` convert between flat names and the nested dataclasses.

The docstring of an option is its help text: one line, because --help would keep a line break.
"""

import math
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import InputError, unknown_name
from ..model import GPTConfig
from ..model.choices import (
    ATTENTIONS,
    RECOMPUTATIONS,
    check_attention_options,
    check_recompute,
)
from ..model.config import AdapterOptions
from .choices import OPTIMIZERS, PRECISIONS
from .schedule import SCHEDULES
from .tasks import TASKS, TaskOptions, task_named

_DEFAULT_MODEL = GPTConfig(n_layer=4, n_head=4, d_model=256, context_tokens=256)
# It does not end with a space: in byte-pair vocabularies the space belongs to the next token.
PYTHON_PROMPT = "    def __init__(self"
DIVERGED = "training diverged: lower `lr`, raise `warmup_steps`, or set `grad_clip`"


@dataclass(frozen=True, kw_only=True)
class ExecutionOptions:
    """How the run executes: device, precision, memory. They change results only by rounding.

    With dropout, the micro-batch size changes results too, because masks differ.
    """

    device: str = "auto"
    """cpu, cuda, cuda:1, mps, ... auto: CUDA if there is a GPU, otherwise the CPU."""
    precision: Literal[tuple(PRECISIONS)] = "auto"
    """Dtype of matmuls. auto: float32 on a CPU, on CUDA bfloat16, or float16 on old GPUs."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether torch.compile compiles the model and its loss. auto: on CUDA."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Whether to run steps as CUDA graphs. auto: on CUDA, if micro-batches have a fixed shape."""
    attention: Literal[tuple(ATTENTIONS)] = "tritium"
    """tritium: own kernels; sdpa: PyTorch's; flash-attn: the flash-attn package, GPUs only."""
    recompute: Literal[tuple(RECOMPUTATIONS)] = "none"
    """Recompute in the backward. gelu: GELU; selective: blocks except attention; block: blocks."""
    micro_batch_size: int | Literal["auto"] | None = None
    """Sequences per forward on each rank. auto: as many as fit; None: all sequences of the rank."""
    max_minutes: float | None = None
    """Minutes after which the process writes a checkpoint and stops. None: no limit."""
    stop_status: int | None = None
    """Exit status of a stopped run. None: 128 + the signal's number, or 0 after max_minutes."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """The files and messages that the run writes, and how often."""

    out: str | None = None
    """Folder of the run. None: the next free runs/RECIPE-N."""
    eval_interval: int = 250
    """Steps between evaluations. There is always one after the last step."""
    eval_tokens: int = 32_768
    """Held-out tokens per evaluation. The evaluation after the last step uses all of them."""
    eval_text: tuple[str, ...] = ()
    """NAME=FILE: also evaluate on these texts, as `tritium eval perplexity` does."""
    eval_choice: tuple[str, ...] = ()
    """Also evaluate on these jsonl files, as `tritium eval choice` does."""
    checkpoint_interval: int = 500
    """Steps between checkpoints. There is always one after the last step."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    keep_every: int = 0
    """Also keep the checkpoints at multiples of this number of steps. 0: none."""
    background_checkpoints: bool = True
    """Write checkpoints while training continues. Needs host memory for a copy of one."""
    prompt: str | None = None
    """Prompt of the samples. None: a line of Python if the data is stdlib or python, else empty."""
    sample_tokens: int = 200
    """Tokens per sample."""
    log_interval: int = 100
    """Steps between lines with the loss, if the output is not a terminal. 0: no lines."""
    profile: int = 0
    """Number of steps to profile, after the first 10, into RUN/profile. 0: none."""
    wandb: str | None = None
    """Weights & Biases project that receives the lines of metrics.jsonl."""
    tensorboard: bool = False
    """Also write the metrics to RUN/tensorboard."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All options of a run. recipes.py has named configurations.

    Raises: InputError, naming the option, for values out of range.
    """

    task: Literal[tuple(TASKS)] = "pretrain"
    """The task that the model learns: a row of the table of tasks."""
    data: tuple[str, ...] = ("stdlib",)
    """Training text: a dataset of `tritium data build`, files, folders, or names such as stdlib."""
    tokenizer: str | None = None
    """bytes, chars, gpt2, FILE.tiktoken, FILE.json, FOLDER or bpe:SIZE. A dataset has its own."""
    held_out: float = 0.1
    """Fraction of the text held out for validation, when the run builds the dataset."""
    text_field: str = "text"
    """Key of json objects, or column of csv, tsv and parquet files, that holds the text."""
    seed: int = 1337
    """Seed of the initial weights, the order of the data and the samples."""
    init_from: str | None = None
    """Model to start from, with its shape: a run, a checkpoint or a Hugging Face folder."""
    model: GPTConfig = _DEFAULT_MODEL
    document_mask: bool = False
    """Keep documents in a sequence apart: no attention between them, and positions start at 0."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 16
    """Sequences per step, over all ranks."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 1e-4
    """Learning rate at the last step. Not used by the schedule constant."""
    warmup_steps: int = 100
    """Steps of linear warm-up from 0."""
    schedule: Literal[tuple(SCHEDULES)] = "cosine"
    """cosine: decays to min_lr; wsd: constant, then linear decay to min_lr in the last fifth."""
    optimizer: Literal[tuple(OPTIMIZERS)] = "adamw"
    """adamw: AdamW; muon: Muon for the matrices of blocks, AdamW for all other parameters."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings; none for biases and norms."""
    beta1: float = 0.9
    """AdamW's decay rate of the gradient's mean."""
    beta2: float = 0.95
    """AdamW's decay rate of the gradient's second moment."""
    grad_clip: float = 1.0
    """Largest global gradient norm. 0: no clipping."""
    skip_threshold: float = 20.0
    """Skip a step if loss or gradient norm has a larger robust z-score. 0: only if not finite."""
    max_bad_steps: int = 5
    """Bad steps in a row after which the run goes back to a checkpoint. 0: never."""

    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    execution: ExecutionOptions = field(default_factory=ExecutionOptions)
    report: ReportOptions = field(default_factory=ReportOptions)
    task_options: TaskOptions = field(default_factory=TaskOptions)

    def __post_init__(self):
        if not self.data or not all(self.data):
            raise InputError(
                "`data`: expected files, folders, a dataset, stdlib or python, got none; "
                "write . for the current folder"
            )
        if type(self.task_options) is not task_named(self.task).options:
            raise ValueError(
                f"TrainConfig: task_options must be {TASKS[self.task].options.__name__} for the "
                f"task {self.task}, got {type(self.task_options).__name__}"
            )
        for name, bound in LEAST.items():
            value = getattr(PART_OF[name](self), name)
            if not bound <= value < math.inf:
                raise InputError(f"{name}: expected {bound} or more, and finite, got {value}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed: expected a number from 0 to 2**63 - 1, got {self.seed}")
        check_held_out(self.held_out)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")
        minutes, status = self.execution.max_minutes, self.execution.stop_status
        if minutes is not None and not 0 < minutes < math.inf:
            raise InputError(f"max_minutes: expected more than 0, and finite, got {minutes}")
        if status is not None and not 0 <= status <= 255:
            raise InputError(f"stop_status: expected a number from 0 to 255, got {status}")
        named_files(self.report)
        keep_every = self.report.keep_every
        if keep_every % self.report.checkpoint_interval:
            raise InputError(
                "keep_every: expected a multiple of the checkpoint interval "
                f"{self.report.checkpoint_interval}, got {keep_every}"
            )
        if self.micro_batch < 1 or self.batch_size % self.micro_batch:
            raise InputError(
                f"micro_batch_size: expected a divisor of the batch size {self.batch_size}, "
                f"got {self.micro_batch}"
            )
        try:
            check_recompute(self.execution.recompute, self.model)
            check_attention_options(self.execution.attention, self.model)
        except ValueError as error:
            raise InputError(str(error)) from None

    @property
    def prompt(self) -> str:
        """Text that the sample of each evaluation continues."""
        if self.report.prompt is not None:
            return self.report.prompt
        return PYTHON_PROMPT if set(self.data) <= {"stdlib", "python"} else ""

    @property
    def micro_batch(self) -> int:
        """Sequences per forward and backward in a single process."""
        micro_batch = self.execution.micro_batch_size
        return self.batch_size if micro_batch in (None, "auto") else micro_batch

    def gpt(self, vocab_size: int) -> GPTConfig:
        """Return the shape of the model, with this vocabulary size."""
        return replace(self.model, vocab_size=vocab_size)

    def options(self) -> dict[str, Any]:
        """Return all options by their flat names."""
        others = _task_option_names() - set(_names(type(self.task_options)))
        return {
            name: getattr(part(self), name) for name, part in PART_OF.items() if name not in others
        }

    def with_options(self, **changes: Any) -> "TrainConfig":
        """Return a copy with changed options, given by their flat names.

        Raises: InputError for an unknown name, or values that do not fit.
        """
        task = task_named(changes.get("task", self.task))
        others = _task_option_names() - set(_names(task.options))
        for name in changes:
            if name not in PART_OF or name in others:
                known = [each for each in PART_OF if each not in others]
                raise InputError(unknown_name("option", name, known))

        # Replace the nested parts first, then the options of the TrainConfig itself.
        parts = {
            "model": self.model,
            "adapter": self.adapter,
            "execution": self.execution,
            "report": self.report,
            "task_options": self.task_options,
        }
        if type(self.task_options) is not task.options:
            parts["task_options"] = task.options()
        try:
            for name, part in parts.items():
                inside = {key: changes.pop(key) for key in _names(type(part)) if key in changes}
                parts[name] = replace(part, **inside)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(str(error).removeprefix("GPTConfig: ")) from None
        return replace(self, **parts, **changes)

    @classmethod
    def from_options(cls, **options: Any) -> "TrainConfig":
        """Build a configuration from flat names. Missing options take their defaults."""
        return cls().with_options(**options)


def check_held_out(held_out: float) -> None:
    """Raise InputError unless the fraction leaves text for training and for validation."""
    if not 0 < held_out < 1:
        raise InputError(
            f"held_out: expected a number between 0 and 1, got {held_out}; 0.1 is usual"
        )


def named_files(report: ReportOptions) -> dict[str, dict[str, str]]:
    """Return the files of `eval_text` and of `eval_choice`, by the names in metrics.jsonl.

    Raises: InputError for a text without a name, or for two files of one name.
    """
    pairs = {
        "eval_text": [each.partition("=")[::2] for each in report.eval_text],
        "eval_choice": [(Path(each).stem, each) for each in report.eval_choice],
    }
    for option, named in pairs.items():
        for name, file in named:
            if not re.fullmatch(r"[\w.-]+", name) or not file:
                form = "NAME=FILE" if option == "eval_text" else "FILE.jsonl"
                given = f"{name}={file}" if file and option == "eval_text" else file or name
                raise InputError(f"{option}: expected {form}, got {given!r}")
        names = [name for name, _ in named]
        if len(set(names)) < len(names):
            raise InputError(f"{option}: expected different names, got {' '.join(names)}")
    return {option: dict(named) for option, named in pairs.items()}


def _names(part: type) -> list[str]:
    """Return the options that are fields of `part` itself. vocab_size is not an option."""
    nested = ("model", "adapter", "execution", "report", "task_options", "vocab_size")
    return [each.name for each in fields(part) if each.name not in nested]


def _task_option_names() -> set[str]:
    """Return the names of the options of all tasks."""
    return {name for task in TASKS.values() for name in _names(task.options)}


# The dataclasses of the options that every task has.
OPTION_CLASSES = (TrainConfig, GPTConfig, AdapterOptions, ExecutionOptions, ReportOptions)

# Flat name -> function that returns the part of a TrainConfig with this option.
PART_OF = {
    **dict.fromkeys(_names(TrainConfig), lambda config: config),
    **dict.fromkeys(_names(GPTConfig), lambda config: config.model),
    **dict.fromkeys(_names(AdapterOptions), lambda config: config.adapter),
    **dict.fromkeys(_names(ExecutionOptions), lambda config: config.execution),
    **dict.fromkeys(_names(ReportOptions), lambda config: config.report),
    **dict.fromkeys(sorted(_task_option_names()), lambda config: config.task_options),
}

# Flat name -> smallest allowed value.
LEAST = {
    **dict.fromkeys(("steps", "batch_size", "eval_interval", "eval_tokens"), 1),
    **dict.fromkeys(("checkpoint_interval", "keep_checkpoints"), 1),
    **dict.fromkeys(("warmup_steps", "sample_tokens", "profile", "keep_every", "log_interval"), 0),
    **dict.fromkeys(("lr", "min_lr", "weight_decay", "grad_clip"), 0),
    **dict.fromkeys(("skip_threshold", "max_bad_steps"), 0),
}
