"""The shape of a GPT, as data. The choices are rows of the tables in layers.py."""

from dataclasses import dataclass
from typing import Literal

from .layers import MLPS, NORMS, POSITIONS

# The number of rows of the embedding is a multiple of this. Tensor cores and shards prefer sizes
# that are multiples of 128 bytes, which are 64 elements of bfloat16.
VOCABULARY_MULTIPLE = 64
_CHOICES = {"position": POSITIONS, "norm": NORMS, "mlp": MLPS}


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """A decoder like GPT-2: pre-norm blocks, and a head that shares its weight with the embedding.

    Raises: ValueError if a size is not positive, if d_model is not a multiple of n_head, if n_head
        is not a multiple of n_kv_head, for an unknown choice, and for RoPE with an odd head size.
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
    """Largest number of tokens that the model can attend to."""
    n_kv_head: int | None = None
    """Key and value heads per block. Default: n_head."""
    bias: bool = True
    """Whether linear layers and layer norms have a bias. RMS norm and SwiGLU never have one."""
    position: Literal[tuple(POSITIONS)] = "learned"
    """learned: add a vector per position; rotary: rotate queries and keys (RoPE)."""
    norm: Literal[tuple(NORMS)] = "layer"
    """layer: layer norm; rms: root-mean-square norm."""
    mlp: Literal[tuple(MLPS)] = "gelu"
    """gelu: two linear layers with GELU between them; swiglu: SwiGLU, three linear layers."""

    def __post_init__(self):
        for name in ("n_layer", "n_head", "d_model", "vocab_size", "context_tokens", "n_kv_head"):
            size = self.kv_heads if name == "n_kv_head" else getattr(self, name)
            if size < 1:
                raise ValueError(f"GPTConfig: {name} must be at least 1, got {size}")
        if self.d_model % self.n_head:
            raise ValueError(
                f"GPTConfig: d_model must be a multiple of n_head ({self.n_head}), "
                f"got {self.d_model}"
            )
        if self.n_head % self.kv_heads:
            raise ValueError(
                f"GPTConfig: n_head must be a multiple of n_kv_head ({self.n_kv_head}), "
                f"got {self.n_head}"
            )
        for name, rows in _CHOICES.items():
            choice = getattr(self, name)
            if choice not in rows:
                raise ValueError(f"GPTConfig: {name} must be {' or '.join(rows)}, got {choice!r}")
        if POSITIONS[self.position].rotates and self.head_size % 2:
            raise ValueError(
                f"GPTConfig: {self.position} positions need an even head size, "
                f"got {self.head_size}; change n_head"
            )

    @property
    def kv_heads(self) -> int:
        """Key and value heads per block."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.d_model // self.n_head

    @property
    def d_feedforward(self) -> int:
        """Width of the MLP's hidden layer."""
        return MLPS[self.mlp].width(self.d_model)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up. The model never predicts a padding row."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
