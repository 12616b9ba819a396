"""Named runs, a row each; `tritium train NAME` starts from the row, every option may change it."""

import difflib
from dataclasses import replace

import torch

from ..errors import InputError
from .config import TrainConfig

_GPT2 = TrainConfig(
    data=("python",),
    tokenizer="bpe:32768",
    held_out=0.01,
    n_layer=12,
    n_head=12,
    d_model=768,
    context_tokens=1024,
    steps=5_000,
    # About half a million tokens a step, as GPT-2 and GPT-3's smallest were trained.
    batch_size=512,
    micro_batch_size=32,
    lr=6e-4,
    min_lr=6e-5,
    warmup_steps=250,
    eval_interval=250,
    eval_tokens=1_048_576,
    checkpoint_interval=500,
    prompt="    def __init__(self",
)

RECIPES: dict[str, TrainConfig] = {
    # About two minutes on two cores of 2024. A prompt ends without a space: the space belongs to the token that follows.
    "laptop": TrainConfig(
        tokenizer="bpe:4096",
        steps=500,
        batch_size=8,
        lr=3e-3,
        eval_interval=100,
        prompt="    def __init__(self",
    ),
    # The model and schedule that nanoGPT's README gives for a CPU.
    "shakespeare-char": TrainConfig(
        data=("tinyshakespeare.txt",),
        tokenizer="chars",
        n_layer=4,
        n_head=4,
        d_model=128,
        bias=False,
        context_tokens=64,
        steps=2_000,
        batch_size=12,
        lr=1e-3,
        min_lr=1e-4,
        warmup_steps=100,
        beta2=0.99,
        eval_tokens=15_360,
        checkpoint_interval=1_000,
    ),
    "gpt2": _GPT2,
    "gpt2-medium": replace(
        _GPT2, n_layer=24, n_head=16, d_model=1024, micro_batch_size=16, lr=3e-4, min_lr=3e-5
    ),
    "gpt2-large": replace(
        _GPT2, n_layer=36, n_head=20, d_model=1280, micro_batch_size=8, lr=2.5e-4, min_lr=2.5e-5
    ),
    "gpt2-xl": replace(
        _GPT2, n_layer=48, n_head=25, d_model=1600, micro_batch_size=4, lr=2e-4, min_lr=2e-5
    ),
    "llama-124m": replace(_GPT2, bias=False, position="rotary", norm="rms", mlp="swiglu"),
}


def recipe(name: str) -> TrainConfig:
    """The recipe of that name. Raises: InputError listing the near ones."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.4) or list(RECIPES)
        raise InputError(f"no recipe {name!r}; near: {', '.join(near)}")
    return RECIPES[name]


def default_recipe() -> str:
    """The best recipe for this machine."""
    return "gpt2" if torch.cuda.is_available() else "laptop"
