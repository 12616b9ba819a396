"""The tables of choices of a model: one table per option, one row per choice.

    NORMS            norms                                implemented in layers.py
    MLPS             MLPs                                 layers.py
    POSITIONS        encodings of positions               gpt.py, positions.py
    ATTENTIONS       implementations of attention         attention.py
    RECOMPUTATIONS   modes of activation checkpointing    recompute.py

To add a choice, add a row. A row names its implementation and holds the numbers that the formulas
of cost.py need. GPTConfig, TrainConfig, `--help` and `tritium plan` read the tables. This file does
not import PyTorch, because the import takes seconds: a row imports its implementation when a model
is built.

Shapes     B sequences, T tokens, D = d_model, F = d_feedforward
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import unknown_name

if TYPE_CHECKING:
    from torch import nn

    from .attention import AttentionFunctions
    from .config import GPTConfig

# The hidden width of SwiGLU is a multiple of this. Tensor cores and shards prefer aligned sizes.
FEEDFORWARD_MULTIPLE = 64


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A row of a table."""

    implementation: str
    """MODULE:NAME of a class, a function or a dataclass. MODULE is relative to the package of the
    table."""

    def load(self) -> Any:
        """Import the implementation and return it."""
        module, name = self.implementation.split(":")
        package = type(self).__module__.rpartition(".")[0]
        return getattr(importlib.import_module(f".{module}", package), name)


# --- norms


@dataclass(frozen=True, kw_only=True)
class NormRow(Choice):
    """A norm that the option `norm` names.

    implementation: a module with a weight (D,), and the same forward as LayerNorm.
    """

    has_bias: bool
    """Whether it has a bias (D,) if config.bias is true."""
    statistics: int
    """Float32 numbers per token that it keeps for its backward."""
    eps: float
    """Default of the option `norm_eps`."""
    keeps_float32_mask: bool
    """Whether autograd keeps the dropout mask in float32 on a CPU, where no kernel runs."""

    @property
    def module(self) -> Callable[["GPTConfig"], "nn.Module"]:
        """The class of the module."""
        return self.load()


NORMS = {
    "layer": NormRow(
        implementation="layers:LayerNorm",
        has_bias=True,
        statistics=2,
        eps=1e-5,
        keeps_float32_mask=True,
    ),
    "rms": NormRow(
        implementation="layers:RMSNorm",
        has_bias=False,
        statistics=1,
        eps=1e-6,
        keeps_float32_mask=False,
    ),
}


# --- MLPs


@dataclass(frozen=True, kw_only=True)
class MLPRow(Choice):
    """An MLP that the option `mlp` names.

    implementation: a module that maps (B T, D) to a Branch. It keeps its input and two tensors
        (B T, F) for its backward.
    """

    width: Callable[[int], int]
    """width(d_model) returns F."""
    matrices: int
    """Number of weight matrices. Each has D F elements."""
    has_bias: bool
    """Whether it has two biases, (F,) and (D,), if config.bias is true."""
    has_gate: bool
    """Whether it has a layer c_gate, as models of the Llama family have."""
    extra_hidden_without_fusion: int
    """Number of further tensors (B T, F) that it keeps if LoRA stops the fusion of its layers."""
    backward_bytes: Callable[[int, int, int, int, bool], int]
    """backward_bytes(N, D, F, itemsize, is_recomputed) returns the bytes that its backward
    allocates at once. N = B T; is_recomputed: recompute is "gelu"."""

    @property
    def module(self) -> Callable[["GPTConfig"], "nn.Module"]:
        """The class of the module."""
        return self.load()


def _gelu_backward_bytes(N: int, D: int, F: int, itemsize: int, is_recomputed: bool) -> int:
    """Return the bytes of da and dh, (N, F), and of dw2.

    In float32 autograd frees the activation before it allocates dh, so dh adds nothing.
    """
    hidden = 2 if itemsize < 4 or is_recomputed else 1
    return hidden * itemsize * N * F + itemsize * F * D


def _relu2_backward_bytes(N: int, D: int, F: int, itemsize: int, is_recomputed: bool) -> int:
    """Return the bytes of da and dh, (N, F), and of dw2."""
    return 2 * itemsize * N * F + itemsize * F * D


def _swiglu_backward_bytes(N: int, D: int, F: int, itemsize: int, is_recomputed: bool) -> int:
    """Return the largest bytes of reference_bwd: during SwiGLU, or during the weight gradients.

    float32: da, s, silu(g), dg, du and a.
    16 bits: da, g, s, silu(g) and one from which a is rounded in float32; dg, du and a in 16 bits.
    dg, du and a stay for the weight gradients.
    """
    at_once = 4 * 5 + 3 * itemsize if itemsize < 4 else 6 * 4
    return max(at_once * N * F, 3 * itemsize * (N * F + F * D))


def _swiglu_width(d_model: int) -> int:
    """Return 8 D / 3, rounded up. Three such matrices have as many elements as GELU's two."""
    return -(-8 * d_model // (3 * FEEDFORWARD_MULTIPLE)) * FEEDFORWARD_MULTIPLE


_GELU = MLPRow(
    implementation="layers:MLP",
    width=lambda d_model: 4 * d_model,
    matrices=2,
    has_bias=True,
    has_gate=False,
    extra_hidden_without_fusion=0,
    backward_bytes=_gelu_backward_bytes,
)

MLPS = {
    "gelu": _GELU,
    "gelu_exact": replace(_GELU, implementation="layers:ExactGELUMLP"),
    "relu2": replace(
        _GELU, implementation="layers:SquaredReLUMLP", backward_bytes=_relu2_backward_bytes
    ),
    "swiglu": MLPRow(
        implementation="layers:GatedMLP",
        width=_swiglu_width,
        matrices=3,
        has_bias=False,
        has_gate=True,
        extra_hidden_without_fusion=2,
        backward_bytes=_swiglu_backward_bytes,
    ),
}


# --- positions


@dataclass(frozen=True, kw_only=True)
class PositionRow:
    """A way to encode positions that the option `position` names."""

    has_table: bool
    """Whether the model adds a learned vector per position to the embedding of the token."""
    rotates: bool
    """Whether attention rotates queries and keys (RoPE). RoPE needs an even head size."""
    is_sinusoidal: bool = False
    """Whether the model adds a fixed vector per position, of sines and cosines."""


POSITIONS = {
    "learned": PositionRow(has_table=True, rotates=False),
    "rotary": PositionRow(has_table=False, rotates=True),
    "sinusoidal": PositionRow(has_table=False, rotates=False, is_sinusoidal=True),
}


# --- attention


@dataclass(frozen=True, kw_only=True)
class AttentionRow(Choice):
    """An implementation that the option `attention` names: AttentionFunctions."""

    operators: tuple[str, ...]
    """How the names of its forward operators start. Selective checkpointing keeps their outputs."""
    unsupported: tuple[str, ...] = ()
    """Options of GPTConfig that it does not support: they must be 0."""
    spans_rows: bool = False
    """Whether a packed document can continue in the next row of the batch."""
    needs: str | None = None
    """The module that must be installed."""
    needs_16_bit_cuda: bool = False
    """Whether it runs only on CUDA and only in 16 bits."""

    @property
    def functions(self) -> "AttentionFunctions":
        """The functions that compute it."""
        return self.load()


ATTENTIONS = {
    "tritium": AttentionRow(
        implementation="attention:TRITIUM",
        operators=("tritium::causal_attention",),
        spans_rows=True,
    ),
    "sdpa": AttentionRow(
        implementation="attention:SDPA",
        operators=(
            "aten::_scaled_dot_product_flash",
            "aten::_scaled_dot_product_efficient",
            "aten::_scaled_dot_product_cudnn",
        ),
        # Its dropout has no seed, so activation checkpointing could not repeat it. With more keys
        # than queries, is_causal aligns the first of both, not the last.
        unsupported=("softcap", "attention_dropout", "prefix_tokens"),
    ),
    "flash-attn": AttentionRow(
        implementation="attention:FLASH_ATTN",
        operators=("flash_attn::_flash_attn",),
        needs="flash_attn",
        needs_16_bit_cuda=True,
        unsupported=("attention_dropout",),
    ),
}


def _attention_row(name: str) -> AttentionRow:
    if name not in ATTENTIONS:
        raise ValueError(f"attention: {unknown_name('implementation', name, ATTENTIONS)}")
    return ATTENTIONS[name]


def choose_attention(name: str) -> AttentionRow:
    """Return a row. Raises: ValueError for an unknown name, or if its package is not installed."""
    row = _attention_row(name)
    if row.needs is not None and importlib.util.find_spec(row.needs) is None:
        raise ValueError(
            f"attention: expected an installed {name}, found none; pip install 'tritium[{name}]', "
            "or set attention to tritium"
        )
    return row


def check_attention_options(name: str, config: "GPTConfig") -> None:
    """Raise ValueError if an attention is unknown or does not support an option of the model."""
    for option in _attention_row(name).unsupported:
        if getattr(config, option):
            raise ValueError(
                f"attention: expected tritium with {option} {getattr(config, option)}, got {name}, "
                f"which does not support {option}"
            )


# --- activation checkpointing


@dataclass(frozen=True, kw_only=True)
class RecomputeRow(Choice):
    """A mode of activation checkpointing that the option `recompute` names.

    implementation: a function of a block and its inputs that returns block(*inputs).
    """

    dropped_bytes: Callable[["GPTConfig", int, int], int]
    """dropped_bytes(config, itemsize, block_bytes) returns the bytes per token that a block does
    not keep. block_bytes is what it keeps in mode none."""
    keeps_inputs: bool = False
    """Whether the inputs of each block are kept too, in addition to what dropped_bytes leaves."""
    in_mlp: bool = False
    """Whether the MLP module computes its activation again: GPT sets its attribute `recompute`."""
    mlps: tuple[str, ...] = tuple(MLPS)
    """The rows of MLPS that the mode fits."""
    extra_matmul_forwards: int = 0
    """How many times the backward runs the forward matmuls of each block again."""
    extra_attention_forwards: int = 0
    """How many times the backward runs the forward of attention again."""

    @property
    def run_block(self) -> Callable:
        """The function: run_block(block, *inputs)."""
        return self.load()

    def fits(self, config: "GPTConfig") -> bool:
        """Return whether a model can use this mode."""
        return config.mlp in self.mlps


def _attention_bytes(config: "GPTConfig", itemsize: int) -> int:
    """The output and the float32 log-sum-exp of attention, per token."""
    return config.d_model * itemsize + 4 * config.n_head


RECOMPUTATIONS = {
    "none": RecomputeRow(
        implementation="recompute:run_block", dropped_bytes=lambda config, itemsize, block: 0
    ),
    "gelu": RecomputeRow(
        implementation="recompute:run_block",
        dropped_bytes=lambda config, itemsize, block: config.d_feedforward * itemsize,
        in_mlp=True,
        mlps=("gelu", "gelu_exact"),
    ),
    "selective": RecomputeRow(
        implementation="recompute:checkpoint_except_attention",
        dropped_bytes=lambda config, itemsize, block: block - _attention_bytes(config, itemsize),
        keeps_inputs=True,
        extra_matmul_forwards=1,
    ),
    "block": RecomputeRow(
        implementation="recompute:checkpoint_block",
        dropped_bytes=lambda config, itemsize, block: block,
        keeps_inputs=True,
        extra_matmul_forwards=1,
        extra_attention_forwards=1,
    ),
}


def check_recompute(name: str, config: "GPTConfig") -> None:
    """Raise ValueError for an unknown mode, or for a mode that needs another MLP."""
    if name not in RECOMPUTATIONS:
        raise ValueError(f"recompute: {unknown_name('mode', name, RECOMPUTATIONS)}")
    if not RECOMPUTATIONS[name].fits(config):
        *others, last = [mode for mode, row in RECOMPUTATIONS.items() if row.fits(config)]
        raise ValueError(
            f"recompute: {name} needs mlp {' or '.join(RECOMPUTATIONS[name].mlps)}, "
            f"got {config.mlp}; "
            f"use {', '.join(others)} or {last}"
        )
