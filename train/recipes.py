"""Named configurations. `tritium train NAME` starts from a row; every option can change it."""

from dataclasses import replace
from pathlib import Path

from ..errors import InputError, unknown_name
from ..model import PRESETS, GPTConfig
from .config import ExecutionOptions, ReportOptions, TrainConfig

_GPT2 = TrainConfig(
    data=("python",),
    # GPT-2's size, so that the model has its 124,439,808 parameters. Nothing is downloaded.
    tokenizer=f"bpe:{PRESETS['gpt2'].vocab_size}",
    held_out=0.01,
    model=PRESETS["gpt2"],
    steps=5_000,
    # About half a million tokens per step, as for GPT-2 and the smallest GPT-3.
    batch_size=512,
    lr=6e-4,
    min_lr=6e-5,
    warmup_steps=250,
    execution=ExecutionOptions(micro_batch_size=32),
    report=ReportOptions(eval_tokens=1_048_576),
)


def _like_gpt2(model: str, *, micro_batch_size: int, lr: float) -> TrainConfig:
    """Return GPT-2's recipe for another model. The learning rate falls to a tenth of its peak."""
    options = {"micro_batch_size": micro_batch_size, "lr": lr, "min_lr": lr / 10}
    return replace(_GPT2, model=PRESETS[model]).with_options(**options)


# GPT-2 124M as others train it, with GPT-2's tokenizer and about one epoch of 10 billion tokens.
# llm.c's scripts/run_gpt2_124M.sh: the run behind the validation loss of 3.28 on FineWeb that
# modded-nanogpt takes as its target.
_FINEWEB = replace(
    _GPT2,
    data=("fineweb-10b",),
    tokenizer="gpt2",
    steps=18_865,
    min_lr=0.0,
    warmup_steps=700,
)
# build-nanogpt's train_gpt2.py.
_FINEWEB_EDU = replace(
    _FINEWEB, data=("fineweb-edu-10b",), steps=19_073, min_lr=6e-5, warmup_steps=715
)


RECIPES: dict[str, TrainConfig] = {
    # For a CPU, in minutes. docs/lab-log.md has the experiments behind the values.
    "laptop": TrainConfig(
        tokenizer="bpe:4096",
        # A small model that reads most of the text is better than a larger one that reads less:
        # in 200 processor seconds, 6, 4, 3 and 2 layers gave 1.70, 1.66, 1.61 and 1.58 bits per
        # byte. Sequences of 128 tokens gave 1.71, half as many of 256 tokens 1.79 (6 layers).
        model=GPTConfig(n_layer=2, n_head=2, d_model=128, context_tokens=128),
        # 750 steps end at 1.475 bits per byte, the mean of five runs (AMD EPYC, November 2026).
        steps=750,
        batch_size=16,
        # With 4 layers of 256, 123 steps of AdamW gave 2.38 bits per byte, 67 steps of Muon 2.17.
        optimizer="muon",
        lr=0.012,
        min_lr=0.0,
        warmup_steps=50,
        # With beta2 0.95 a run ended at 1.492 bits per byte, with 0.99 at 1.477.
        beta2=0.99,
        report=ReportOptions(eval_interval=250),
    ),
    # The model and schedule that nanoGPT's README gives for a CPU.
    "shakespeare-char": TrainConfig(
        data=("tinyshakespeare.txt",),
        tokenizer="chars",
        model=GPTConfig(
            n_layer=4, n_head=4, d_model=128, context_tokens=64, bias=False, mlp="gelu_exact"
        ),
        steps=2_000,
        batch_size=12,
        lr=1e-3,
        min_lr=1e-4,
        warmup_steps=100,
        beta2=0.99,
        report=ReportOptions(eval_tokens=15_360, checkpoint_interval=1_000),
    ),
    "gpt2": _GPT2,
    "gpt2-fineweb": _FINEWEB,
    "gpt2-fineweb-edu": _FINEWEB_EDU,
    "gpt2-medium": _like_gpt2("gpt2-medium", micro_batch_size=16, lr=3e-4),
    "gpt2-large": _like_gpt2("gpt2-large", micro_batch_size=8, lr=2.5e-4),
    "gpt2-xl": _like_gpt2("gpt2-xl", micro_batch_size=4, lr=2e-4),
    "llama-124m": _like_gpt2("llama-124m", micro_batch_size=32, lr=6e-4),
    # For a GPU: the model and the batch of nanoGPT's config/train_shakespeare_char.py, but with the
    # tanh form of GELU. With the schedule of that file, 5,000 steps of AdamW, the validation loss
    # was lowest at step 1,500: 1.481. Then it rose, and the run was stopped after step 2,000. 1,500
    # steps of Muon ended at 1.477. Without dropout of embeddings and attention weights the lowest
    # loss was 1.571 (H200, November 2026).
    "shakespeare-char-gpu": TrainConfig(
        data=("tinyshakespeare.txt",),
        tokenizer="chars",
        model=GPTConfig(
            n_layer=6,
            n_head=6,
            d_model=384,
            context_tokens=256,
            bias=False,
            dropout=0.2,
            embedding_dropout=0.2,
            attention_dropout=0.2,
        ),
        steps=1_500,
        batch_size=64,
        optimizer="muon",
        lr=6e-3,
        min_lr=0.0,
        warmup_steps=100,
        beta2=0.99,
        report=ReportOptions(eval_tokens=111_616, checkpoint_interval=1_000),
    ),
}

# Files that exist where a driver of NVIDIA (also in WSL) or AMD runs.
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def recipe(name: str) -> TrainConfig:
    """Return a recipe. Raises: InputError that suggests the nearest names."""
    if name not in RECIPES:
        raise InputError(unknown_name("recipe", name, RECIPES))
    return RECIPES[name]


def default_recipe() -> str:
    """Return the name of the recipe that fits this machine."""
    import torch

    return _recipe_with(torch.cuda.is_available())


def likely_default_recipe() -> str:
    """Return default_recipe as --help shows it: without PyTorch, whose import takes seconds.

    It looks for the files of GPU drivers. default_recipe asks PyTorch whether the GPU works.
    """
    return _recipe_with(any(Path(file).exists() for file in _GPU_DRIVERS))


def _recipe_with(has_gpu: bool) -> str:
    return "gpt2" if has_gpu else "laptop"
