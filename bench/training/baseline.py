"""GPT-2 in plain PyTorch, as an engineer writes it today without custom kernels.

    stream     h = wte[token] + wpe[position]       rotary: wte[token]; RoPE rotates q and k
    block      h += attention(ln_1(h))     h += mlp(ln_2(h))
    head       logits = ln_f(h) wte^T, cut to vocab_size

`tritium bench train` compares tritium's model with it. Attention is F.scaled_dot_product_attention.
Precision, fused AdamW and torch.compile are the trainer's. The matmul with wte uses the padded rows
and the logits are cut after it: alignment is worth more than the padding costs.

Shapes     h (B, T, D), tokens (B, T), logits (B, T, V): B sequences, T tokens, D = d_model,
           V = vocab_size; H query heads, G key/value heads, K = D / H
Source     Radford et al. 2019, "Language models are unsupervised multitask learners"
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...model import GPTConfig
from ...model.init import init_weights

# cos and sin of the rotation of each position, (T, K / 2). None without RoPE.
Rotation = tuple[Tensor, Tensor] | None
# By the option `mlp`.
ACTIVATIONS = {
    "gelu": functools.partial(F.gelu, approximate="tanh"),
    "gelu_exact": F.gelu,
    "relu2": lambda h: F.relu(h).square(),
}


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.head_size = config.head_size
        heads = (config.n_head, config.kv_heads, config.kv_heads)
        self.widths = [count * config.head_size for count in heads]
        self.c_attn = nn.Linear(config.d_model, sum(self.widths), bias=config.bias)
        self.c_proj = nn.Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        # Split before the transpose: the three gradients are then joined in one copy, not two.
        parts = self.c_attn(x).split(self.widths, dim=-1)
        q, k, v = (
            part.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for part in parts
        )  # (B, H or G, T, K)
        if rotation is not None:
            q, k = _rotate(q, *rotation), _rotate(k, *rotation)
        is_grouped = q.shape[1] != k.shape[1]
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)
        return self.c_proj(o.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.d_model, config.d_feedforward, bias=config.bias)
        self.c_proj = nn.Linear(config.d_feedforward, config.d_model, bias=config.bias)
        self.activation = ACTIVATIONS[config.mlp]

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class GatedMLP(nn.Module):
    """SwiGLU: a linear layer through SiLU gates a second one; a third projects back."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_gate = nn.Linear(config.d_model, config.d_feedforward, bias=False)
        self.c_fc = nn.Linear(config.d_model, config.d_feedforward, bias=False)
        self.c_proj = nn.Linear(config.d_feedforward, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))


class Block(nn.Module):
    """One layer, (B, T, D) -> (B, T, D)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = _norm(config)
        self.attn = Attention(config)
        self.ln_2 = _norm(config)
        self.mlp = GatedMLP(config) if config.mlp == "swiglu" else MLP(config)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        x = x + self.attn(self.ln_1(x), rotation)
        return x + self.mlp(self.ln_2(x))


class Baseline(nn.Module):
    """A language model like GPT-2, with the module and parameter names of tritium.model.GPT.

    `load_state_dict(GPT(config).state_dict())` makes both compute the same function.

    Args:
        config: the shape.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.wpe = None
        if config.position == "learned":
            self.wpe = nn.Embedding(config.context_tokens, config.d_model)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = _norm(config)
        init_weights(self, config.n_layer)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        token_order: Tensor | None = None,
    ) -> Tensor:
        """Predict the token after each position.

        Args:
            tokens: (B, T) int64, T at most context_tokens.
            targets: (B, T) int64, the tokens to predict; -100 is ignored.
            token_order: the trainer passes it. PyTorch's embedding does not use it.
        Returns: logits (B, T, V). With targets their mean cross-entropy, (), in nats.
        """
        x = self.wte(tokens)
        position = torch.arange(tokens.shape[1], device=tokens.device)
        rotation = None
        if self.wpe is not None:
            x = x + self.wpe(position)
        else:
            pair = torch.arange(0, self.config.head_size, 2, device=tokens.device)
            angle = position[:, None] * 10_000.0 ** (-pair / self.config.head_size)  # (T, K / 2)
            rotation = angle.cos(), angle.sin()
        # train/precision.py may give the linear layers of the blocks a narrower dtype.
        x = x.to(self.h[0].attn.c_attn.weight.dtype)
        for block in self.h:
            x = block(x, rotation)
        logits = F.linear(self.ln_f(x), self.wte.weight.to(x.dtype))[..., : self.config.vocab_size]
        if targets is None:
            return logits
        # In 16 bits PyTorch's cross-entropy would return a loss of 16 bits.
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide.flatten(0, 1), targets.flatten())


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm for inputs of any dtype."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm for inputs of any dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def _norm(config: GPTConfig) -> nn.Module:
    if config.norm == "layer":
        return LayerNorm(config.d_model, bias=config.bias)
    if config.norm == "rms":
        return RMSNorm(config.d_model, eps=1e-6)
    raise ValueError(f"baseline: expected norm layer or rms, got {config.norm!r}; write it here")


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, -1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return rotated.to(heads.dtype)
