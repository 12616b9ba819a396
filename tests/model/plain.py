"""A GPT in plain PyTorch, one line per layer: the definition that tests compare GPT with."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tritium.kernels.core.philox import random_bits
from tritium.model import GPT, GPTConfig


def logits(model: GPT, tokens: Tensor, seeds: Tensor | None = None) -> Tensor:
    """Return the logits (B, T, V) of `model`, computed with its parameters but none of its code.

    seeds: the seed of each mask of dropout, as dropout_seeds returns them. None: no dropout.
    """
    config = model.config
    weights = dict(model.named_parameters())
    h = weights["wte.weight"][tokens]
    if config.position == "learned":
        h = h + weights["wpe.weight"][: tokens.shape[1]]
    if config.position == "sinusoidal":
        h = h + sinusoids(*h.shape[1:])
    h = dropped(h, config.embedding_dropout, seeds, 0)
    for layer in range(config.n_layer):
        prefix = f"h.{layer}."
        block = {
            name.removeprefix(prefix): value
            for name, value in weights.items()
            if name.startswith(prefix)
        }
        first = 3 * layer
        y = attention(config, block, norm(config, block, "ln_1", h), seeds, first + 1)
        h = h + dropped(y, config.dropout, seeds, first + 2)
        y = mlp(config, block, norm(config, block, "ln_2", h))
        h = h + dropped(y, config.dropout, seeds, first + 3)
    head = weights["wte.weight" if config.tied_head else "lm_head.weight"]
    y = norm(config, weights, "ln_f", h)
    return capped(y @ head[: config.vocab_size].t(), config.head_softcap)


def norm(config: GPTConfig, weights: dict, name: str, x: Tensor) -> Tensor:
    if config.norm == "rms":
        return rms(x, weights[f"{name}.weight"], config.eps)
    bias = weights.get(f"{name}.bias")
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], bias, config.eps)


def rms(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * gain


def linear(weights: dict, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def attention(
    config: GPTConfig, weights: dict, x: Tensor, seeds: Tensor | None, site: int
) -> Tensor:
    H, G, K = config.n_head, config.kv_heads, config.head_size
    qkv = linear(weights, "attn.c_attn", x).unflatten(-1, (-1, K)).transpose(1, 2)
    q, k, v = qkv.split((H, G, G), dim=1)  # (B, H or G, T, K)
    if config.qk_norm:
        q = rms(q, weights["attn.q_norm.weight"], config.eps)
        k = rms(k, weights["attn.k_norm.weight"], config.eps)
    if config.position == "rotary":
        q, k = rotated(q, config.rope_base), rotated(k, config.rope_base)
    k, v = (each.repeat_interleave(H // G, dim=1) for each in (k, v))
    scores = capped(q @ k.mT / K**0.5, config.softcap)
    token = torch.arange(x.shape[1])
    distance = token[:, None] - token
    is_hidden = (distance < 0) | (distance >= (config.window or x.shape[1]))
    weight = scores.masked_fill(is_hidden, -torch.inf).softmax(-1)
    weight = dropped(weight, config.attention_dropout, seeds, site)
    return linear(weights, "attn.c_proj", (weight @ v).transpose(1, 2).flatten(2))


def rotated(x: Tensor, base: float) -> Tensor:
    T, K = x.shape[-2:]
    # The model's tables are float32, also in a float64 model.
    angle = torch.arange(T)[:, None] * base ** (-torch.arange(0, K, 2) / K)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def sinusoids(T: int, D: int) -> Tensor:
    angle = torch.arange(T)[:, None] * 10_000.0 ** (-torch.arange(0, D, 2) / D)
    table = torch.zeros(T, D)
    table[:, 0::2] = 0.02 * angle.sin()
    table[:, 1::2] = 0.02 * angle.cos()
    return table


def mlp(config: GPTConfig, weights: dict, x: Tensor) -> Tensor:
    hidden = linear(weights, "mlp.c_fc", x)
    if config.mlp == "swiglu":
        hidden = F.silu(linear(weights, "mlp.c_gate", x)) * hidden
    elif config.mlp == "relu2":
        hidden = hidden.relu().square()
    elif config.mlp == "gelu_exact":
        hidden = hidden * torch.erfc(-hidden / math.sqrt(2)) / 2
    else:
        hidden = F.gelu(hidden, approximate="tanh")
    return linear(weights, "mlp.c_proj", hidden)


def capped(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap) if cap else x


def dropped(x: Tensor, p: float, seeds: Tensor | None, site: int) -> Tensor:
    """Dropout of the last axis in rows: row r begins at random word 4 r ceil(columns / 4)."""
    if seeds is None or p == 0:
        return x
    columns = x.shape[-1]
    stride = -(-columns // 4) * 4
    index = torch.arange(x.numel() // columns)[:, None] * stride + torch.arange(columns)
    is_kept = random_bits(seeds[site, 0], index) >= int(p * 2**32) - 2**31
    return x * is_kept.view(x.shape) / (1 - p)
