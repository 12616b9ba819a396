"""The commands around training: train, data, sample, info; plan has a file of its own."""

import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import tyro

from ... import __version__
from ...errors import InputError, InterruptedRun, NoMemoryError
from ...kernels.core.device import ceiling, sm_count
from ...kernels.core.op import INTERPRET
from ...kernels.core.triton import HAS_TRITON, triton
from ...model import GPT, GPTConfig
from ...model.cost import parameters
from ..config import ExecutionOptions, ReportOptions, TrainConfig
from ..data.build import build
from ..data.prepare import cache_dir
from ..data.tokenizer import Tokenizer
from ..device import choose_device, choose_matmul
from ..distributed.world import Launch, World, join
from ..evaluate import Evaluation
from ..loop import resume, sample_text, start
from ..plan import plan, what_fits
from ..precision import choose_dtype, working_copy
from ..recipes import RECIPES, default_recipe, recipe
from ..run.checkpoint import load_checkpoint, newest_checkpoint
from ..run.folder import read_run
from ..run.metrics import console
from .cli import is_out_of_memory, parse

TRAIN_HELP = f"""Train a GPT on text. Without a recipe: the best one for this machine.


tritium train [RECIPE] [--key value ...]      recipes: {", ".join(RECIPES)}

tritium train --resume RUN_DIR                go on with a stopped run, exactly where it was


torchrun --nproc-per-node 8 -m tritium.train ...      the same on the 8 GPUs of a machine"""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Options of `tritium data build`."""

    out_dir: tyro.conf.Positional[str]
    """Folder to make."""
    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Files and folders of txt, md, py, jsonl, jsonl.gz, parquet; stdlib: the interpreter's library; python: all of it."""
    tokenizer: str = "bpe:4096"
    """bytes, chars, gpt2, FILE.tiktoken or bpe:SIZE."""
    held_out: float = 0.1
    """Share of the documents kept for validation."""
    text_field: str = "text"
    """Field of jsonl lines, column of parquet files."""


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Options of `tritium sample`."""

    run: tyro.conf.Positional[str]
    """Folder of a run."""
    prompt: str = ""
    """Text to go on from; default: the start of a document."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token each time."""
    top_k: int | None = None
    """Choose among the k likeliest tokens."""
    top_p: float | None = 0.95
    """Choose among the likeliest tokens that together have this probability."""
    max_new_tokens: int = 200
    """Tokens to write at most."""
    seed: int | None = None
    """Same seed, same text."""
    device: str = "auto"
    """cpu, cuda ...; auto: CUDA if there is one."""


@dataclass(frozen=True, kw_only=True)
class ModelFlags(GPTConfig):
    """The flags of the model."""

    vocab_size: tyro.conf.Suppress[int] = GPTConfig.vocab_size


@dataclass(frozen=True, kw_only=True)
class TrainFlags(TrainConfig):
    """TrainConfig as flat flags: --n-layer, not --model.n-layer."""

    model: tyro.conf.OmitArgPrefixes[ModelFlags]
    execution: tyro.conf.OmitArgPrefixes[ExecutionOptions]
    report: tyro.conf.OmitArgPrefixes[ReportOptions]

    @classmethod
    def of(cls, config: TrainConfig) -> "TrainFlags":
        """Return the flags whose defaults are `config`."""
        values = {name: getattr(config, name) for name in TrainConfig.__dataclass_fields__}
        return cls(**values | {"model": ModelFlags(**asdict(config.model))})

    def config(self) -> TrainConfig:
        """Return the configuration that the flags describe."""
        return TrainConfig.from_options(**self.options())


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of `tritium train`."""

    run: tyro.conf.OmitArgPrefixes[TrainFlags]
    """What decides the run."""
    launch: tyro.conf.OmitArgPrefixes[Launch]
    """How several processes share it."""


def train(argv: Sequence[str]) -> int:
    """tritium train"""
    if argv and argv[0].split("=")[0] == "--resume":
        run, launch = _resume_arguments(argv)
        with join(launch) as world:
            return _report(run, world, lambda: resume(run, world))
    if "--resume" in argv:
        raise InputError(
            "--resume RUN_DIR comes first: a resumed run keeps the options it was started with"
        )
    named = bool(argv) and not argv[0].startswith("-")
    name = argv[0] if named else default_recipe()
    default = TrainOptions(run=TrainFlags.of(recipe(name)), launch=Launch())
    options = parse(
        TrainOptions, argv[named:], prog="tritium train", description=TRAIN_HELP, default=default
    )
    config = options.run.config()
    if (Path(config.data[0]) / "dataset.json").is_file() and not any(
        word.startswith("--tokenizer") for word in argv
    ):
        config = replace(
            config, tokenizer=None
        )  # a dataset brings its own; the recipe's is for its own text
    with join(options.launch) as world:
        run = world.on_rank0(
            lambda: Path(config.report.out) if config.report.out else _free_run(name)
        )
        if world.is_rank0:
            print(f"{name}: training into {run}; watch {run / 'metrics.jsonl'}")
            _say_how_to_use_all(world, config)
        return _report(run, world, lambda: start(config, run, world))


def _resume_arguments(argv: Sequence[str]) -> tuple[Path, Launch]:
    words = argv[0].split("=", 1) + list(argv[1:])
    if len(words) < 2:
        raise InputError("--resume: expected a folder of a run, got none")
    try:
        return Path(words[1]), parse(
            Launch, words[2:], prog="tritium train --resume RUN_DIR", description=TRAIN_HELP
        )
    except InputError as error:
        raise InputError(
            f"--resume RUN_DIR: expected nothing after it but how processes share the run: {error}"
        ) from None


def _say_how_to_use_all(world: World, config: TrainConfig) -> None:
    count = torch.cuda.device_count()
    if world.engine is None and count > 1 and config.execution.device in ("auto", "cuda"):
        print(
            f"training on 1 of {count} GPUs; for all: torchrun --nproc-per-node {count} -m tritium.train and the same words"
        )


def _report(run: Path, world: World, work: Callable[[], Evaluation]) -> int:
    began = time.perf_counter()
    console.quiet = not world.is_rank0
    try:
        result = work()
    except InterruptedRun:
        if world.is_rank0:
            program = (
                f"{_program()} train" if world.engine is None else "torchrun ... -m tritium.train"
            )
            print(f"stopped; go on with: {program} --resume {shlex.quote(str(run))}")
        return 130
    except Exception as error:
        # On the rank that ran out alone: the others wait for it until torchrun ends them.
        if is_out_of_memory(error) and (run / "config.json").exists():
            raise NoMemoryError(what_fits(read_run(run), world)) from error
        raise
    if not world.is_rank0:
        return 0
    seconds = time.perf_counter() - began
    shown = (
        (run / "samples.txt")
        .read_text(encoding="utf-8")
        .rsplit("--- step ", 1)[-1]
        .split("\n", 1)[-1]
    )
    record = read_run(run)
    print(f"\n{shown}")
    print(
        f"validation loss {result.loss:.4f} nats a token over all {result.tokens:,} held-out tokens: ",
        end="",
    )
    print(f"perplexity {result.perplexity:.2f}, {result.bits_per_byte:.3f} bits a byte")
    print(
        f"{parameters(record.model):,} parameters, {seconds:.0f} s; loss curve: {run / 'loss.png'}"
    )
    print(
        f"next: {_program()} sample {shlex.quote(str(run))} --prompt {shlex.quote(record.train.report.prompt or 'Once')}"
    )
    print(f"      for a better model, the same command with --steps {4 * record.train.steps}")
    return 0


def _program() -> str:
    """How this program was called, so that hints can be pasted."""
    name = Path(sys.argv[0])
    if name.name != "tritium":
        return "python -m tritium"
    return "tritium" if shutil.which("tritium") == str(name.resolve()) else sys.argv[0]


def _free_run(name: str) -> Path:
    number = 1
    while (path := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return path


def data(argv: Sequence[str]) -> int:
    """tritium data"""
    description = "Turn text into token shards that `tritium train --data OUT_DIR` reads."
    if not argv or argv[0] != "build":
        if argv and argv[0] not in ("-h", "--help"):
            raise InputError(f"tritium data: expected build, got {argv[0]!r}")
        argv = ["build", "--help"]
    options = parse(DataOptions, argv[1:], prog="tritium data build", description=description)
    info = build(
        options.out_dir,
        options.inputs,
        options.tokenizer,
        held_out=options.held_out,
        text_field=options.text_field,
    )
    for name, split in (("train", info.train), ("held out", info.val)):
        print(
            f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, {split.bytes:,} bytes"
        )
    print(
        f"dropped {info.duplicates_dropped:,} duplicate documents, skipped {info.files_skipped:,} files that are no UTF-8 text"
    )
    print(f"next: {_program()} train --data {shlex.quote(options.out_dir)}")
    return 0


def sample(argv: Sequence[str]) -> int:
    """tritium sample"""
    options = parse(
        SampleOptions, argv, prog="tritium sample", description="Write text with a trained model."
    )
    run = Path(options.run)
    record, checkpoint = read_run(run), newest_checkpoint(run)
    if options.seed is not None and not 0 <= options.seed < 2**63:
        raise InputError(f"--seed: expected a number from 0 to 2**63 - 1, got {options.seed}")
    device = choose_device(options.device)
    choose_matmul(device)
    model = GPT(record.model)
    load_checkpoint(checkpoint, model)
    model = working_copy(model.to(device), choose_dtype("auto", device))
    try:
        text = sample_text(
            model, Tokenizer.load(run / "tokenizer.json"), options.prompt, max_new_tokens=options.max_new_tokens,
            temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed,
        )  # fmt: skip
    except ValueError as error:
        raise InputError(str(error)) from None
    print(text)
    return 0


def info(argv: Sequence[str]) -> int:
    """tritium info"""
    if argv and argv[0] in ("-h", "--help"):
        print(
            "usage: tritium info\n\nVersions, the device and what is known of it, where caches are."
        )
        return 0
    if argv:
        raise InputError(f"tritium info: takes no options, got {argv[0]!r}")
    # Here, not above: it takes two seconds to import.
    from torch._inductor.runtime import cache_dir_utils

    device = choose_device("auto")
    rows = {
        "tritium": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": (triton.__version__ + (", interpreter on" if INTERPRET else ""))
        if HAS_TRITON
        else "not installed",
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} CPU",
        "cores": f"{sm_count(device)} SMs"
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads",
        "kernels": "Triton" if device.type == "cuda" and HAS_TRITON else "PyTorch references",
        "ceilings": _ceilings(device),
        "default recipe": default_recipe(),
        "caches": f"{cache_dir()} (datasets); set TRITIUM_HOME to move it",
        "compile cache": f"{cache_dir_utils.cache_dir()} (torch.compile); set TORCHINDUCTOR_CACHE_DIR to move it",
        "kernel cache": f"{triton.knobs.cache.dir}; set TRITON_CACHE_DIR to move it"
        if HAS_TRITON
        else "none",
    }
    for name, value in rows.items():
        print(f"{name:15} {value}")
    return 0


def _ceilings(device: torch.device) -> str:
    known = ceiling(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if known is None:
        return "not known for this device: no MFU is reported"
    return f"{known.bf16_flops / 1e12:.0f} TFLOP/s dense bf16, {known.bytes_per_second / 1e12:.2f} TB/s memory"


COMMANDS = {"train": train, "data": data, "sample": sample, "plan": plan, "info": info}
