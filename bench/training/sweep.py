"""tritium bench sweep: train variations of a recipe with equal processor time.

A sweep shows which options reach the lowest loss in a given processor time. Each row of a JSON file
names options that differ from the recipe:

    [{"name": "recipe"}, {"name": "muon", "options": {"optimizer": "muon", "lr": 0.006}}]

A row gets as many steps as fit into --seconds of processor time. The time of a step is that of the
fastest of a few steps on random tokens. If a row has the option "steps", it gets that number of
steps. Processor time counts all threads of this process, and no other program. Other programs that
use the caches and the memory still make it longer, so the record has the speed of a matmul before
each run. With --rounds the rows run in turn, each round with another seed. If the data is
`python` or `stdlib` and the prompt is the default, the record has the number of samples whose first
three lines are broken (python_text.py).

With --nanogpt, a nanoGPT checkout trains on the same tokens for the same processor time, in a
process of its own. It has the options that its README gives for a CPU, changed by
--nanogpt-options. This program evaluates its weights on the same held-out text.
"""

import json
import math
import pickle
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ... import train as start_training
from ...errors import InputError
from ...model import GPT
from ...model.cost import parameters
from ...train.commands.cli import parse
from ...train.config import OPTION_CLASSES, PYTHON_PROMPT, TrainConfig
from ...train.data.tokenizers.tokenizer import vocab_size_of
from ...train.execution import resolve
from ...train.pretrain import TextData, open_data
from ...train.recipes import recipe
from ...train.storage.records import check_names, check_types
from ...train.trainer import single_trainer
from ..record import check_writable, describe_provenance, provenance, write_record
from .implementations import import_nanogpt
from .python_text import is_broken
from .training import random_batch

HELP = """Train variations of a recipe on a CPU, each for the same processor time.


tritium bench sweep ROWS.json [--recipe laptop] [--seconds 400] [--key value ...]"""
# Steps on random tokens: the first ones allocate memory, the fastest of the others counts.
_WARMUP_STEPS = 2
_TIMED_STEPS = 8
# Samples per run, and tokens per sample. 100 tokens are usually more than three lines.
_SAMPLES = 20
_SAMPLE_TOKENS = 100
# The options for a CPU in nanoGPT's README, "I only have a macbook".
_NANOGPT_OPTIONS = (
    "device=cpu compile=False eval_interval=1000000 eval_iters=1 log_interval=1000000 dropout=0.0 "
    "n_layer=4 n_head=4 n_embd=128 block_size=64 batch_size=12 learning_rate=1e-3 min_lr=1e-4 "
    "beta2=0.99 warmup_iters=100 gradient_accumulation_steps=1 always_save_checkpoint=True"
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `tritium bench sweep`."""

    recipe: str = "laptop"
    """The recipe that the rows vary."""
    seconds: float = 400.0
    """Processor seconds of the steps of a row."""
    rounds: int = 1
    """How often each row is trained, each time with another seed."""
    nanogpt: str | None = None
    """A nanoGPT checkout, which is trained too."""
    nanogpt_options: str = ""
    """Options of nanoGPT's train.py to change: "n_embd=256 batch_size=8"."""
    out: str | None = None
    """Write the record to this file after each row."""

    def __post_init__(self):
        for name in ("seconds", "rounds"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise InputError(f"--{name}: expected a finite number above 0, got {value}")


def main(argv: Sequence[str]) -> int:
    """Run `tritium bench sweep`. Returns: exit status."""
    has_file = bool(argv) and not argv[0].startswith("-")
    options = parse(Options, argv[has_file:], prog="tritium bench sweep", description=HELP)
    if not has_file:
        raise InputError("tritium bench sweep: expected a JSON file with rows; see --help")
    rows = read_rows(Path(argv[0]), options.recipe)
    out = check_writable(options.out)
    if options.nanogpt is not None:
        import_nanogpt(Path(options.nanogpt))  # raises if the folder has no nanoGPT

    print(describe_provenance(provenance()))
    figures: dict[str, Any] = {"recipe": options.recipe, "seconds": options.seconds, "rows": []}
    for row in _measured(rows, options):
        figures["rows"].append(row)
        print(_describe(row), flush=True)
        if out:
            write_record(out, "sweep", figures)
    return 0


def read_rows(file: Path, name: str) -> list[tuple[str, dict[str, Any], TrainConfig]]:
    """Return the name, the options and the configuration of each row.

    Raises: InputError if the file has no rows, or if an option does not exist or has a wrong value.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: expected a JSON file with rows, got: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{file}: expected a JSON file with rows, got: {error}") from None
    is_list = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    if not is_list or not rows or any("name" not in row for row in rows):
        raise InputError(f'{file}: expected a list of {{"name": ..., "options": {{...}}}}')
    base = recipe(name)
    found = []
    for number, row in enumerate(rows, start=1):
        try:
            found.append(_read_row(row, base))
        except InputError as error:
            raise InputError(f"{file}: row {number}: {error}") from None
    return found


def _read_row(row: dict[str, Any], base: TrainConfig) -> tuple[str, dict[str, Any], TrainConfig]:
    check_names("key", row, ("name", "options"))
    options = row.get("options", {})
    if not isinstance(options, dict):
        raise InputError(f"options: expected an object, got {options!r}")
    for name in ("device", "out"):
        if name in options:
            raise InputError(f"{name}: expected no value, because the sweep sets it")
    for part in OPTION_CLASSES:
        check_types(options, part)
    config = base.with_options(device="cpu", **options)
    # Steps are timed before the tokenizer exists: its vocabulary size must follow from its name.
    if not re.fullmatch(r"bytes|chars|gpt2|bpe:[0-9]{1,8}", str(config.tokenizer)):
        expected = "expected bytes, chars, gpt2 or bpe:SIZE in a sweep"
        raise InputError(f"tokenizer: {expected}, got {config.tokenizer!r}")
    return str(row["name"]), options, config


def _measured(rows: list, options: Options) -> Iterator[dict[str, Any]]:
    """Train each row, and nanoGPT after them, once per round."""
    for number in range(options.rounds):
        for name, changes, config in rows:
            seed = config.seed + number
            yield {"name": name, "round": number, "options": changes} | train_row(
                options.recipe, config, changes | {"seed": seed}, options.seconds
            )
        if options.nanogpt is not None:
            # nanoGPT gets the tokens of the first row.
            data = open_data(rows[0][2])
            yield {"name": "nanoGPT", "round": number} | train_nanogpt(
                Path(options.nanogpt), options.nanogpt_options, data, options.seconds, number
            )


def train_row(
    name: str, config: TrainConfig, changes: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """Train a recipe with changed options for a processor time. Returns: figures of the run."""
    speed = matmul_gigaflops()
    step_seconds = processor_seconds_per_step(config)
    steps = changes.get("steps", max(1, int(seconds / step_seconds)))
    sizes = {"steps": steps, "eval_interval": steps, "checkpoint_interval": steps}
    sizes["warmup_steps"] = min(changes.get("warmup_steps", config.warmup_steps), steps // 10)
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        run = start_training(name, out=f"{folder}/run", device="cpu", **changes | sizes)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        sample = (Path(folder) / "run" / "samples.txt").read_text(encoding="utf-8")
        shape = run.model.config
        broken = {}
        if config.prompt == PYTHON_PROMPT:
            samples = _samples(run.model, config)
            broken = {"samples": len(samples), "broken_samples": sum(map(is_broken, samples))}
    return {
        "steps": steps,
        "tokens": steps * config.batch_size * config.model.context_tokens,
        "parameters": parameters(shape),
        "matmul_gigaflops": speed,
        "step_processor_seconds": step_seconds,
        "processor_seconds": cpu,
        "seconds": wall,
        "bits_per_byte": run.evaluation.bits_per_byte,
        "loss": run.evaluation.loss,
        "sample": sample,
        **broken,
    }


def _samples(model: GPT, config: TrainConfig) -> list[str]:
    """Return samples such as a run writes, with different seeds."""
    data = open_data(config)
    short = config.with_options(sample_tokens=_SAMPLE_TOKENS)
    return [data.sample(model, short.with_options(seed=seed)) for seed in range(_SAMPLES)]


def processor_seconds_per_step(config: TrainConfig) -> float:
    """Return the processor time of the fastest of a few steps on random tokens."""
    shape = config.gpt(vocab_size_of(config.tokenizer))
    trainer = single_trainer(GPT(shape), config)
    batch = random_batch(config, shape, 0)
    samples = []
    for step in range(_WARMUP_STEPS + _TIMED_STEPS):
        start = time.process_time()
        trainer.backward(batch, step=step)
        trainer.update(config.lr)
        samples.append(time.process_time() - start)
    return min(samples[_WARMUP_STEPS:])


def matmul_gigaflops() -> float:
    """Return the speed of a matmul of the size of the laptop recipe's, per processor second."""
    M, N, K = 2048, 1024, 256
    x, weight = torch.randn(M, K), torch.randn(N, K)
    samples = []
    for _ in range(20):
        start = time.process_time()
        torch.mm(x, weight.T)
        samples.append(time.process_time() - start)
    return 2 * M * N * K / min(samples) / 1e9


# --- nanoGPT on the same tokens


def train_nanogpt(
    checkout: Path, options: str, data: TextData, seconds: float, seed: int
) -> dict[str, Any]:
    """Train nanoGPT for a processor time, and evaluate its weights on all held-out text."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "data" / "text"
        source.mkdir(parents=True)
        for split, file in ((data.train, "train.bin"), (data.val, "val.bin")):
            split.read(0, len(split)).astype(np.uint16).tofile(source / file)
        vocabulary = {"vocab_size": data.tokenizer.vocab_size}
        (source / "meta.pkl").write_bytes(pickle.dumps(vocabulary))

        def train(steps: int) -> tuple[float, float]:
            return _run_nanogpt(checkout, Path(folder), options, steps, seed)

        # The time of a step: the difference of two short runs, without the start of the process.
        few, more = 20, 60
        step_seconds = (train(more)[1] - train(few)[1]) / (more - few)
        steps = max(1, int(seconds / step_seconds))
        wall, cpu = train(steps)
        model = GPT.from_pretrained(Path(folder) / "out" / "ckpt.pt").float()
    return {
        "options": _nanogpt_options(options),
        "steps": steps,
        "parameters": parameters(model.config),
        "step_processor_seconds": step_seconds,
        "processor_seconds": cpu,
        "seconds": wall,
        **_evaluate(model, data),
    }


def _run_nanogpt(
    checkout: Path, folder: Path, options: str, steps: int, seed: int
) -> tuple[float, float]:
    """Run nanoGPT's train.py. Returns: seconds of wall time and of processor time."""
    settings = _nanogpt_options(options) | {"max_iters": steps, "lr_decay_iters": steps}
    settings |= {"eval_interval": max(1, steps), "dataset": "text"}
    # The program has no option for its seed and its folder of data.
    program = (checkout / "train.py").read_text(encoding="utf-8")
    program = program.replace("torch.manual_seed(1337", f"torch.manual_seed({1337 + seed}")
    (folder / "train.py").write_text(program, encoding="utf-8")
    for file in ("model.py", "configurator.py"):
        (folder / file).write_text((checkout / file).read_text(encoding="utf-8"), encoding="utf-8")
    words = [f"--{name}={value}" for name, value in settings.items()]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "train.py", *words], cwd=folder, capture_output=True, text=True
    )
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise InputError(f"--nanogpt: train.py failed: {done.stderr.strip().splitlines()[-1]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _nanogpt_options(options: str) -> dict[str, str]:
    pairs = f"{_NANOGPT_OPTIONS} {options}".split()
    if any("=" not in pair for pair in pairs):
        raise InputError(f"--nanogpt-options: expected NAME=VALUE ..., got {options!r}")
    return dict(pair.split("=", 1) for pair in pairs)


def _evaluate(model: GPT, data: TextData) -> dict[str, float]:
    config = recipe("laptop").with_options(device="cpu", context_tokens=model.config.context_tokens)
    execution = resolve(config)
    batches = data.evaluation_batches(config, execution, is_last=True)
    evaluation = data.evaluate(model, batches, execution.world)
    return {"bits_per_byte": evaluation.bits_per_byte, "loss": evaluation.loss}


def _describe(row: dict[str, Any]) -> str:
    return (
        f"{row['name']}, round {row['round']}: {row['bits_per_byte']:.4f} bits per byte, "
        f"{row['steps']:,} steps, {row['parameters']:,} parameters, "
        f"{row['processor_seconds']:.0f} processor seconds, {row['seconds']:.0f} s"
    )
