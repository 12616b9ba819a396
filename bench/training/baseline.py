"""GPT-2 in plain PyTorch, as a careful engineer writes it today without kernels of their own: what tritium is measured beside.

    stream     h = wte[token] + wpe[position]       rotary: wte[token]; queries and keys turn with the position
    block      h += attention(ln_1(h))     h += mlp(ln_2(h))
    head       logits = ln_f(h) wte^T, of which the vocab_size real ones count

Attention is F.scaled_dot_product_attention; precision, fused AdamW and torch.compile are the trainer's, see training.py. The
product with wte takes the padded rows, whose alignment is worth more than they cost, and the logits are cut after it.

Shapes     h (B, T, D), tokens (B, T), logits (B, T, V): B sequences, T tokens, D = d_model, V = vocab_size; H query heads, G
           key/value heads, K = D / H
Source     Radford et al. 2019, "Language models are unsupervised multitask learners"
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...model import GPTConfig
from ...model.init import init_weights


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.head_size = config.head_size
        self.widths = [
            heads * config.head_size for heads in (config.n_head, config.kv_heads, config.kv_heads)
        ]
        self.c_attn = nn.Linear(config.d_model, sum(self.widths), bias=config.bias)
        self.c_proj = nn.Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        # Split before the heads are moved forward: the three gradients are then joined in one copy, not in two.
        parts = self.c_attn(x).split(self.widths, dim=-1)
        q, k, v = (
            part.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for part in parts
        )  # (B, H or G, T, K)
        if turn is not None:
            q, k = _turned(q, *turn), _turned(k, *turn)
        o = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.c_proj(o.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear maps with GELU (tanh form) between them."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.d_model, config.d_feedforward, bias=config.bias)
        self.c_proj = nn.Linear(config.d_feedforward, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class GatedMLP(nn.Module):
    """A linear map through SiLU as the gate of another, and a third back."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_gate = nn.Linear(config.d_model, config.d_feedforward, bias=False)
        self.c_fc = nn.Linear(config.d_model, config.d_feedforward, bias=False)
        self.c_proj = nn.Linear(config.d_feedforward, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))


class Block(nn.Module):
    """One layer: (B, T, D) to (B, T, D)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = _norm(config)
        self.attn = Attention(config)
        self.ln_2 = _norm(config)
        self.mlp = MLP(config) if config.mlp == "gelu" else GatedMLP(config)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), turn)
        return x + self.mlp(self.ln_2(x))


class Baseline(nn.Module):
    """A GPT-2-style language model whose modules and parameters have the names of tritium.model.GPT's.

    `load_state_dict(GPT(config).state_dict())` makes it the same function.

    Args:
        config: its shape.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.wpe = (
            nn.Embedding(config.context_tokens, config.d_model)
            if config.position == "learned"
            else None
        )
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = _norm(config)
        init_weights(self, config.n_layer)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Predict the token that follows each position.

        Args:
            tokens: (B, T) int64, T at most context_tokens.
            targets: (B, T) int64, the tokens to be predicted; -100 where none is.
        Returns: logits (B, T, V); with targets the mean cross-entropy over them, (), in nats.
        """
        x, position, turn = (
            self.wte(tokens),
            torch.arange(tokens.shape[1], device=tokens.device),
            None,
        )
        if self.wpe is not None:
            x = x + self.wpe(position)
        else:
            pair = torch.arange(0, self.config.head_size, 2, device=tokens.device)
            angle = position[:, None] * 10_000.0 ** (-pair / self.config.head_size)  # (T, K / 2)
            turn = angle.cos(), angle.sin()
        # The blocks' linear maps may be narrower than the rest, as train/precision.py makes them.
        x = x.to(self.h[0].attn.c_attn.weight.dtype)
        for block in self.h:
            x = block(x, turn)
        logits = F.linear(self.ln_f(x), self.wte.weight.to(x.dtype))[..., : self.config.vocab_size]
        # PyTorch's cross-entropy of 16 bits would give a loss of 16 bits.
        wide = torch.promote_types(logits.dtype, torch.float32)
        return (
            logits
            if targets is None
            else F.cross_entropy(logits.flatten(0, 1).to(wide), targets.flatten())
        )


class LayerNorm(nn.LayerNorm):
    """PyTorch's, of inputs in any dtype."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (
            None if parameter is None else parameter.to(x.dtype)
            for parameter in (self.weight, self.bias)
        )
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """PyTorch's, of inputs in any dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def _norm(config: GPTConfig) -> nn.Module:
    return (
        LayerNorm(config.d_model, bias=config.bias)
        if config.norm == "layer"
        else RMSNorm(config.d_model, eps=1e-6)
    )


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(heads.dtype)
