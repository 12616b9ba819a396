"""The shape of a GPT, as data."""

from dataclasses import dataclass
from typing import Literal

# Rows of the embedding are added up to a multiple of this: 128 bytes of bf16, what tensor cores and shards like.
VOCABULARY_MULTIPLE = 64
# And swiglu's hidden layer, for the same reason.
FEEDFORWARD_MULTIPLE = 64
# What a model is put together from, beside sizes; model/gpt.py has a row for each.
CHOICES = {"position": ("learned", "rotary"), "norm": ("layer", "rms"), "mlp": ("gelu", "swiglu")}


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """A GPT-2-style decoder: pre-norm blocks, head tied to the embedding; what differs in its successors is a choice.

    Raises: ValueError if a size is not positive, d_model is no multiple of n_head or n_head none of n_kv_head, for a choice
        that there is not, and for rotary positions with heads of an odd size.
    """

    n_layer: int = 12
    """Number of blocks."""
    n_head: int = 12
    """Query heads a block."""
    d_model: int = 768
    """Width of the residual stream."""
    vocab_size: int = 50_257
    """Tokens that can be predicted; the embedding has a few more rows, see padded_vocab_size."""
    context_tokens: int = 1024
    """Most tokens the model can look at."""
    n_kv_head: int | None = None
    """Key and value heads a block; None: as many as query heads."""
    bias: bool = True
    """Whether linear maps and layer norms add a bias, as GPT-2's do. Neither rms norm nor the swiglu perceptron has any."""
    position: Literal[CHOICES["position"]] = "learned"
    """learned: a vector for each position, added to the token's; rotary: queries and keys are turned by it."""
    norm: Literal[CHOICES["norm"]] = "layer"
    """layer: layer norm; rms: root-mean-square norm."""
    mlp: Literal[CHOICES["mlp"]] = "gelu"
    """gelu: two linear maps, GELU between; swiglu: three, of which one is the gate of another."""

    def __post_init__(self):
        for name in ("n_layer", "n_head", "d_model", "vocab_size", "context_tokens", "n_kv_head"):
            size = self.kv_heads if name == "n_kv_head" else getattr(self, name)
            if size < 1:
                raise ValueError(f"GPTConfig: {name} must be at least 1, got {size}")
        if self.d_model % self.n_head:
            raise ValueError(
                f"GPTConfig: d_model must be a multiple of n_head ({self.n_head}), got {self.d_model}"
            )
        if self.n_head % self.kv_heads:
            raise ValueError(
                f"GPTConfig: n_head must be a multiple of n_kv_head ({self.n_kv_head}), got {self.n_head}"
            )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"GPTConfig: {name} must be {' or '.join(choices)}, got {getattr(self, name)!r}"
                )
        if self.position == "rotary" and self.head_size % 2:
            raise ValueError(
                f"GPTConfig: rotary positions need heads of an even size, got {self.head_size}; change n_head"
            )

    @property
    def kv_heads(self) -> int:
        """Key and value heads a block."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.d_model // self.n_head

    @property
    def d_feedforward(self) -> int:
        """Width of the MLP's hidden layer; swiglu's is chosen so that its three matrices have as many numbers as gelu's two."""
        if self.mlp == "gelu":
            return 4 * self.d_model
        return -(-8 * self.d_model // (3 * FEEDFORWARD_MULTIPLE)) * FEEDFORWARD_MULTIPLE

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up for alignment. The added rows never get probability."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
