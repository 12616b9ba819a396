"""The GPT-2 architecture on tritium's operators, and what its successors changed, as the config has it.

    stream     h = wte[token] + wpe[position]       rotary: wte[token]; queries and keys turn with the position
    block      h += attention(ln_1(h))     h += mlp(ln_2(h))        each addition fused into the norm that follows it
    head       logits = ln_f(h) wte^T, over the vocab_size real rows only

Names of modules and parameters are those of the GPT-2 checkpoint; matrices are (out, in) as torch.nn.Linear keeps them, where
the checkpoint has (in, out).

Shapes     stream and branches (B T, D), tokens (B, T): B sequences, T tokens, D = d_model; H query heads, G key/value heads,
           K = D / H, F = d_feedforward, V = vocab_size
Source     Radford et al. 2019, "Language models are unsupervised multitask learners"; Touvron et al. 2023, arXiv:2302.13971
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import (
    add_layer_norm,
    add_rms_norm,
    attention_decode,
    gelu_mlp,
    layer_norm,
    linear,
    linear_cross_entropy,
    rms_norm,
    rotary,
    swiglu_mlp,
)
from .attention import ATTENTIONS, Implementation, choose_attention
from .config import GPTConfig
from .generate import KVCache, generate
from .init import init_weights
from .recompute import RECOMPUTATIONS, check_recompute

# Angles of rotary positions: of pair i of K / 2 position / ROTARY_BASE^(2 i / K).
ROTARY_BASE = 10_000.0


class ForwardContext(NamedTuple):
    """What every block is told beside the stream: B and T, documents, tables that turn heads, the cache, which attention."""

    sizes: tuple[int, int]
    cu_seqlens: Tensor | None = None
    turn: tuple[Tensor, Tensor] | None = None
    cache: KVCache | None = None
    attention: Implementation = ATTENTIONS["tritium"]


class Linear(nn.Module):
    """Weight (out, in) and bias (out,), or None, of a linear map; initialized by init_weights."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class LayerNorm(nn.Module):
    """Layer norm of the residual stream, with the addition of a block's output before it where there is one."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.d_model))
        self.bias = nn.Parameter(torch.empty(config.d_model)) if config.bias else None

    def forward(self, branch: Tensor | None, stream: Tensor) -> tuple[Tensor, Tensor]:
        """Return (norm of the sum, the sum)."""
        if branch is None:
            return layer_norm(stream, self.weight, self.bias), stream
        return add_layer_norm(branch, stream, self.weight, self.bias)


class RMSNorm(nn.Module):
    """The same with root-mean-square norm."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.d_model))

    def forward(self, branch: Tensor | None, stream: Tensor) -> tuple[Tensor, Tensor]:
        """Return (norm of the sum, the sum)."""
        if branch is None:
            return rms_norm(stream, self.weight), stream
        return add_rms_norm(branch, stream, self.weight)


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.kv_heads = config.n_head, config.kv_heads
        self.c_attn = Linear(
            config.d_model,
            (config.n_head + 2 * config.kv_heads) * config.head_size,
            bias=config.bias,
        )
        self.c_proj = Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(self, x: Tensor, context: ForwardContext, layer: int) -> Tensor:
        qkv = self.c_attn(x).unflatten(0, context.sizes)  # (B, T, (H + 2 G) K)
        if context.turn is None and context.cache is None and context.attention.packed is not None:
            o = context.attention.packed(qkv, self.n_head, self.kv_heads, context.cu_seqlens)
            return self.c_proj(o.flatten(0, 1))
        heads = qkv.unflatten(-1, (self.n_head + 2 * self.kv_heads, -1))
        qk, v = heads.split((self.n_head + self.kv_heads, self.kv_heads), dim=2)
        qk = qk if context.turn is None else rotary(qk, *context.turn)
        q, k = qk.split((self.n_head, self.kv_heads), dim=2)
        # q (B, T, H, K)   k, v (B, T, G, K), from the cache (B, S, G, K)
        if context.cache is not None:
            k, v, lengths = context.cache.extend(layer, k, v)
            o = attention_decode(q, k, v, lengths)
        else:
            o = context.attention.attend(q, k, v, context.cu_seqlens)
        return self.c_proj(o.reshape(len(x), -1))


class MLP(nn.Module):
    """Two linear maps with GELU (tanh form) between them.

    recomputes: whether the backward forms GELU's output again.
    """

    recomputes = False

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.d_model, config.d_feedforward, bias=config.bias)
        self.c_proj = Linear(config.d_feedforward, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        c_fc, c_proj = self.c_fc, self.c_proj
        return gelu_mlp(
            x, c_fc.weight, c_fc.bias, c_proj.weight, c_proj.bias, recompute=self.recomputes
        )


class GatedMLP(nn.Module):
    """A linear map through SiLU as the gate of another, and a third back; none has a bias."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_gate = Linear(config.d_model, config.d_feedforward, bias=False)
        self.c_fc = Linear(config.d_model, config.d_feedforward, bias=False)
        self.c_proj = Linear(config.d_feedforward, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu_mlp(x, self.c_gate.weight, self.c_fc.weight, self.c_proj.weight)


NORMS = {"layer": LayerNorm, "rms": RMSNorm}
MLPS = {"gelu": MLP, "swiglu": GatedMLP}


class Block(nn.Module):
    """One layer. Takes the residual stream and the branch not yet added to it; returns the same pair."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.ln_1 = NORMS[config.norm](config)
        self.attn = Attention(config)
        self.ln_2 = NORMS[config.norm](config)
        self.mlp = MLPS[config.mlp](config)

    def forward(
        self, branch: Tensor | None, stream: Tensor, context: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        y, stream = self.ln_1(branch, stream)
        y, stream = self.ln_2(self.attn(y, context, self.layer), stream)
        return self.mlp(y), stream


class GPT(nn.Module):
    """A GPT-2-style language model with freshly initialized weights.

    Args:
        config: its shape.
        attention: which of ATTENTIONS it computes with; generation with a cache takes ours.
        recompute: which of RECOMPUTATIONS its backward does instead of keeping what the forward made.
    Raises: ValueError if that attention is not known or not installed, or that recomputation not known or not for this MLP.
    """

    def __init__(self, config: GPTConfig, *, attention: str = "tritium", recompute: str = "none"):
        super().__init__()
        check_recompute(recompute, config)
        self.config, self.attention, self._apply_block = (
            config,
            choose_attention(attention),
            RECOMPUTATIONS[recompute],
        )
        self.wte = _embedding(config.padded_vocab_size, config.d_model)
        if config.position == "learned":
            self.wpe = _embedding(config.context_tokens, config.d_model)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        for block in self.h if recompute == "gelu" else ():
            block.mlp.recomputes = True
        self.ln_f = NORMS[config.norm](config)
        # Dtype of the residual stream in the blocks; None: the dtype of the embedding.
        self.compute_dtype: torch.dtype | None = None
        init_weights(self, config.n_layer)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Predict the token that follows each position.

        Args:
            tokens: (B, T) int64, T at most context_tokens less what the cache holds.
            targets: (B, T) int64, the tokens to be predicted; -100 where none is.
            cu_seqlens: (documents + 1,) int32 on the device of tokens: where each of the documents packed in the B T tokens
                begins, 0 first and B T last. No document sees another, and positions begin anew with each. Default: B
                documents of T tokens. Not together with a cache.
            cache: keys and values of the tokens before these; extended in place.
        Returns: logits (B, T, V); with targets the mean cross-entropy over them, () float32, in nats.
        Raises: ValueError if there are more tokens than the context holds, or both documents and a cache.
        """
        past = 0 if cache is None else cache.length
        B, T = tokens.shape
        if past + T > self.config.context_tokens:
            raise ValueError(
                f"GPT: context_tokens is {self.config.context_tokens}, got {past + T} tokens; shorten the input"
            )
        if cu_seqlens is not None and cache is not None:
            raise ValueError(
                "GPT: expected cu_seqlens or a cache, got both; generate from one document at a time"
            )
        position = torch.arange(past, past + T, device=tokens.device)
        if cu_seqlens is not None:
            starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=B * T)
            position = (torch.arange(B * T, device=tokens.device) - starts).view(B, T)
        stream, turn = self.wte(tokens), None
        if self.config.position == "learned":
            stream = stream + self.wpe(position)
        else:
            turn = _turn(position, self.config.head_size)
        branch, stream = None, stream.flatten(0, 1).to(self.compute_dtype or stream.dtype)
        context = ForwardContext((B, T), cu_seqlens, turn, cache, self.attention)
        for block in self.h:
            branch, stream = self._apply_block(block, branch, stream, context)
        if cache is not None:
            cache.length += T
        y, _ = self.ln_f(branch, stream)
        # The rows added for alignment take no part, so they never get probability.
        head = self.wte.weight[: self.config.vocab_size].to(y.dtype)
        return (
            linear(y, head).view(B, T, self.config.vocab_size)
            if targets is None
            else linear_cross_entropy(y, head, targets.flatten())
        )

    generate = generate


def _embedding(rows: int, width: int) -> nn.Embedding:
    """An embedding whose weight is left for init_weights to fill."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


def _turn(position: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles by which heads at `position` (T,) or (B, T) are turned, (..., K / 2) float32."""
    pair = torch.arange(0, head_size, 2, device=position.device)
    angle = position.unsqueeze(-1) * ROTARY_BASE ** (-pair / head_size)
    return angle.cos(), angle.sin()
