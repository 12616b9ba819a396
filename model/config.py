"""The shape of a GPT, and the options of LoRA, as data. choices.py has the tables of choices."""

import math
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Literal

from ..errors import InputError, unknown_name
from .choices import MLPS, NORMS, POSITIONS

# The number of rows of the embedding is a multiple of this. Tensor cores and shards prefer sizes
# that are multiples of 128 bytes, which are 64 elements of bfloat16.
VOCABULARY_MULTIPLE = 64
# Options that have an effect in training only. Models of equal shape may differ in them.
DROPOUTS = ("dropout", "embedding_dropout", "attention_dropout")
# A run that starts from a trained model can set these options. It takes all others from the model.
OPTIONS_OF_RUN = (*DROPOUTS, "prefix_tokens")
_OPTIONAL_SIZES = ("n_kv_head", "d_hidden", "window")
_CHOICES = {"position": POSITIONS, "norm": NORMS, "mlp": MLPS}


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """A decoder like GPT-2 or Llama: pre-norm blocks.

    Raises: ValueError if a size is not positive, if d_model is not a multiple of n_head, if n_head
        is not a multiple of n_kv_head, for an unknown choice, for a number out of range, and for
        RoPE with an odd head size.
    """

    n_layer: int = 12
    """Number of blocks."""
    n_head: int = 12
    """Query heads per block."""
    d_model: int = 768
    """Width of the residual stream."""
    vocab_size: int = 50_257
    """Number of different tokens."""
    context_tokens: int = 1024
    """Maximum number of tokens that the model can attend to."""
    n_kv_head: int | None = None
    """Key and value heads per block. None: n_head."""
    bias: bool = True
    """Whether linear layers and layer norms have a bias. RMS norm and SwiGLU never have one."""
    qkv_bias: bool | None = None
    """Whether the layer of queries, keys and values has a bias. None: as `bias`."""
    tied_head: bool = True
    """Whether the head shares the embedding's weight. The head never has a bias."""
    position: Literal[tuple(POSITIONS)] = "learned"
    """learned, sinusoidal: add a vector per position; rotary: rotate queries and keys (RoPE)."""
    norm: Literal[tuple(NORMS)] = "layer"
    """layer: layer norm; rms: root-mean-square norm."""
    mlp: Literal[tuple(MLPS)] = "gelu"
    """gelu: two layers and GELU in the tanh form of GPT-2; gelu_exact: exact GELU; relu2: relu(x)^2
    in place of GELU; swiglu: SwiGLU, three layers."""
    d_hidden: int | None = None
    """Width of the MLP's hidden layer. None: four times d_model; SwiGLU: about 8 / 3 times."""
    norm_eps: float | None = None
    """Added to the variance in norms. None: 1e-5 for layer norm, 1e-6 for RMS norm."""
    rope_base: float = 10_000.0
    """RoPE rotates pair i of a head by the angle position / rope_base^(2 i / head size)."""
    qk_norm: bool = False
    """Whether RMS norm, with a gain per element, scales each query and key before RoPE."""
    window: int | None = None
    """How many tokens a token attends to, itself included. None: itself and all before it."""
    softcap: float = 0.0
    """c > 0 replaces an attention score s by c tanh(s / c). 0: scores stay as they are."""
    head_softcap: float = 0.0
    """c > 0 replaces a logit s of the head by c tanh(s / c). 0: logits stay as they are."""
    dropout: float = 0.0
    """Probability of dropping an element of the output of attention or of an MLP."""
    embedding_dropout: float = 0.0
    """Probability of dropping an element of the embedding, after positions are added."""
    attention_dropout: float = 0.0
    """Probability of dropping an attention weight."""
    prefix_tokens: int = 0
    """Prefix tuning: train this many keys and values before each sequence, and no other weight."""

    def __post_init__(self):
        for name in (
            "n_layer",
            "n_head",
            "d_model",
            "vocab_size",
            "context_tokens",
            *_OPTIONAL_SIZES,
        ):
            size = getattr(self, name)
            if size is None and name in _OPTIONAL_SIZES:
                continue
            if not _is_integer(size):
                raise ValueError(f"GPTConfig: {name}: expected an integer, got {size!r}")
            if size < 1:
                raise ValueError(f"GPTConfig: {name}: expected 1 or more, got {size}")
        if not _is_integer(self.prefix_tokens) or self.prefix_tokens < 0:
            raise ValueError(
                f"GPTConfig: prefix_tokens: expected an integer of 0 or more, got "
                f"{self.prefix_tokens!r}"
            )
        if self.d_model % self.n_head:
            raise ValueError(
                f"GPTConfig: d_model: expected a multiple of `n_head`, {self.n_head}, got "
                f"{self.d_model}"
            )
        if self.n_head % self.kv_heads:
            raise ValueError(
                f"GPTConfig: n_head: expected a multiple of `n_kv_head`, {self.n_kv_head}, got "
                f"{self.n_head}"
            )
        for name, rows in _CHOICES.items():
            choice = getattr(self, name)
            if choice not in rows:
                raise ValueError(f"GPTConfig: {unknown_name(name, choice, rows)}")
        for name, value in (("norm_eps", self.eps), ("rope_base", self.rope_base)):
            if not 0 < value < float("inf"):
                raise ValueError(f"GPTConfig: {name}: expected a positive number, got {value}")
        for name in ("softcap", "head_softcap"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"GPTConfig: {name}: expected 0 or more, and finite, got {value}")
        for name in DROPOUTS:
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(
                    f"GPTConfig: {name}: expected 0 or more, and less than 1, got {value}"
                )
        if POSITIONS[self.position].rotates and self.head_size % 2:
            raise ValueError(
                f"GPTConfig: position: expected an even head size for {self.position}, got "
                f"{self.head_size}; change `n_head`"
            )

    def with_dropout_of(self, other: "GPTConfig") -> "GPTConfig":
        """Return a copy with the probabilities of dropout of another configuration."""
        return replace(self, **{name: getattr(other, name) for name in DROPOUTS})

    def with_prefix(self, tokens: int) -> "GPTConfig":
        """Return a copy with another prefix. Prefix and context together keep their length.

        Raises: ValueError if the context has no room for the prefix.
        """
        context = self.position_rows - tokens
        if context < 1:
            raise ValueError(
                f"GPTConfig: prefix_tokens: expected less than the context of {self.position_rows} "
                f"tokens, got {tokens}"
            )
        return replace(self, prefix_tokens=tokens, context_tokens=context)

    @property
    def position_rows(self) -> int:
        """Number of positions: of the prefix, and of the context."""
        return self.context_tokens + self.prefix_tokens

    @property
    def kv_heads(self) -> int:
        """Key and value heads per block."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the layer of queries, keys and values has a bias."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.d_model // self.n_head

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of queries, keys and values in the weight of the layer that computes all three."""
        kv = self.kv_heads * self.head_size
        return self.d_model, kv, kv

    @property
    def d_feedforward(self) -> int:
        """Width of the MLP's hidden layer."""
        return self.d_hidden or MLPS[self.mlp].width(self.d_model)

    @property
    def eps(self) -> float:
        """Number that norms add to the variance."""
        return NORMS[self.norm].eps if self.norm_eps is None else self.norm_eps

    @property
    def padded_vocab_size(self) -> int:
        """Rows of embedding and head: vocab_size rounded up. No padding row is ever predicted."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """Small weights to train while the weights of the model are frozen.

    Raises: InputError, naming the option, for values out of range.
    """

    lora: int = 0
    """Rank of LoRA: train two matrices per linear layer, and no other weight. 0: no LoRA."""
    lora_alpha: float | None = None
    """The output of LoRA is scaled by lora_alpha / lora. None: lora, a scale of 1."""
    lora_dropout: float = 0.0
    """Probability of dropping an element of the input of LoRA."""
    lora_targets: tuple[str, ...] = ()
    """Layers with LoRA, such as c_attn, c_fc, attn.c_proj. Default: all linear layers of blocks."""

    def __post_init__(self):
        if self.lora < 0:
            raise InputError(f"lora: expected a rank of 0 or more, got {self.lora}")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise InputError(
                f"lora_alpha: expected a number above 0, and finite, got {self.lora_alpha}"
            )
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"lora_dropout: expected a number in [0, 1), got {self.lora_dropout}")
        if not self.lora:
            for name in ("lora_alpha", "lora_dropout", "lora_targets"):
                value = getattr(self, name)
                if value not in (None, 0.0, ()):
                    raise InputError(f"{name}: expected a rank with `lora`, got none; set `lora`")

    @property
    def alpha(self) -> float:
        """lora_alpha, or its default."""
        return float(self.lora if self.lora_alpha is None else self.lora_alpha)
