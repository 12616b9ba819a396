"""The layers of a GPT. NORMS and MLPS in choices.py name the norms and MLPs among them.

Shapes     x, y and stream (B T, D): B sequences, T tokens, D = d_model; F = d_feedforward;
           H query heads, G key and value heads, K = D / H. Weights are (out, in), as in
           torch.nn.Linear; the published GPT-2 checkpoints store (in, out).
"""

import functools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import (
    add_layer_norm,
    add_rms_norm,
    attention_decode,
    gelu_mlp,
    layer_norm,
    linear,
    relu2_mlp,
    rms_norm,
    rotary,
    swiglu_mlp,
)
from .attention import AttentionArguments, NormRopeArguments
from .context import Branch, ForwardContext

if TYPE_CHECKING:
    from .config import GPTConfig

# Seeds of the dropout of LoRA in an MLP: of the layers that read x, and of the last layer.
Seeds = tuple[Tensor | None, Tensor | None]
NO_SEEDS: Seeds = (None, None)


class Linear(nn.Module):
    """x @ weight.T + bias. init.py fills the parameters.

    A LoraLinear (lora.py) can take its place. `seed` is the seed of that layer's dropout.
    """

    is_plain = True
    """Whether the output is x @ weight.T + bias, which fused operators compute."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None

    def forward(self, x: Tensor, seed: Tensor | None = None) -> Tensor:
        return linear(x, self.weight, self.bias)

    def branch(self, x: Tensor, seed: Tensor | None = None) -> Branch:
        """Return the layer's output as a branch."""
        bias, added_bias = self.split_bias()
        return Branch(linear(x, self.weight, bias), added_bias)

    def split_bias(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the bias without gradient, to be added, and the bias for the next norm."""
        if self.bias is None:
            return None, None
        # A view, because fully_shard adds a hook to each output of a module. Hooks on the parameter
        # itself would stay there and pile up.
        return self.bias.detach(), self.bias.view_as(self.bias)


# --- norms. Each norm first adds the last branch to the residual stream, in the same kernel.


class LayerNorm(nn.Module):
    """Add `branch` to the residual stream, then apply layer norm."""

    def __init__(self, config: "GPTConfig"):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.d_model))
        self.bias = nn.Parameter(torch.empty(config.d_model)) if config.bias else None
        self.eps = config.eps

    def forward(
        self,
        branch: Branch | None,
        stream: Tensor,
        dropout: tuple[float, Tensor | None] = (0.0, None),
    ) -> tuple[Tensor, Tensor]:
        """Return the norm of branch + stream, and branch + stream.

        Args:
            branch: None: only the norm is applied.
            dropout: probability and seed of dropping elements of the branch.
        """
        if branch is None:
            return layer_norm(stream, self.weight, self.bias, eps=self.eps), stream
        dropout_p, seed = dropout
        return add_layer_norm(
            branch.y,
            stream,
            self.weight,
            self.bias,
            eps=self.eps,
            added_bias=branch.added_bias,
            dropout_p=dropout_p,
            seed=seed,
        )


class RMSNorm(nn.Module):
    """Add `branch` to the residual stream, then apply root-mean-square norm."""

    def __init__(self, config: "GPTConfig"):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.d_model))
        self.eps = config.eps

    def forward(
        self,
        branch: Branch | None,
        stream: Tensor,
        dropout: tuple[float, Tensor | None] = (0.0, None),
    ) -> tuple[Tensor, Tensor]:
        """Return the norm of branch + stream, and branch + stream, as LayerNorm.forward does."""
        if branch is None:
            return rms_norm(stream, self.weight, eps=self.eps), stream
        dropout_p, seed = dropout
        return add_rms_norm(
            branch.y,
            stream,
            self.weight,
            eps=self.eps,
            added_bias=branch.added_bias,
            dropout_p=dropout_p,
            seed=seed,
        )


# --- attention


class HeadNorm(nn.Module):
    """RMS norm of each head, with one gain (K,) for all heads."""

    def __init__(self, config: "GPTConfig"):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.head_size))
        self.eps = config.eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)


class Attention(nn.Module):
    """Causal self-attention with grouped key and value heads.

    tensor_rank: rank among the processes that share the heads. Its heads get their own dropout.
    """

    tensor_rank = 0

    def __init__(self, config: "GPTConfig"):
        super().__init__()
        self.n_head = config.n_head
        self.kv_heads = config.kv_heads
        self.window = config.window
        self.softcap = config.softcap
        qkv_width = (config.n_head + 2 * config.kv_heads) * config.head_size
        self.c_attn = Linear(config.d_model, qkv_width, bias=config.has_qkv_bias)
        self.c_proj = Linear(config.d_model, config.d_model, bias=config.bias)
        self.q_norm = HeadNorm(config) if config.qk_norm else None
        self.k_norm = HeadNorm(config) if config.qk_norm else None

    def forward(self, x: Tensor, context: ForwardContext, layer: int) -> Branch:
        options = self._options(context, layer)
        qkv_seed, projection_seed = context.adapter_seeds_of(layer)[:2]
        attend_packed = context.attention.attend_packed
        keeps_qkv = context.cache is None and context.prefix is None
        if keeps_qkv and attend_packed is not None:
            # The backward of attention also computes the gradient of the bias of c_attn.
            qkv, added_bias = self.c_attn.branch(x, qkv_seed)
            qkv = qkv.unflatten(0, context.sizes)  # (B, T, (H + 2 G) K)
            norm_rope = self._norm_rope(context.rope)
            heads = (self.n_head, self.kv_heads)
            o = attend_packed(qkv, *heads, context.cu_seqlens, added_bias, norm_rope, options)
            return self.c_proj.branch(o.flatten(0, 1), projection_seed)

        qkv = self.c_attn(x, qkv_seed).unflatten(0, context.sizes)
        q, k, v = self._split(qkv, context.rope)
        if context.prefix is not None:
            k, v = self._after_prefix(k, v, context.prefix, layer)
        lengths = None
        if context.cache is not None:
            k, v, lengths = context.cache.extend(layer, k, v)  # k, v (B, S, G, K)
        if lengths is None:
            o = context.attention.attend(q, k, v, context.cu_seqlens, options)
        else:
            o = attention_decode(q, k, v, lengths, window=self.window, softcap=self.softcap)
        return self.c_proj.branch(o.reshape(len(x), -1), projection_seed)

    def _after_prefix(
        self, k: Tensor, v: Tensor, prefix: Tensor, layer: int
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, P + T, G, K): those of the prefix, then k and v."""
        B, _, G, K = k.shape
        both = prefix.unflatten(1, (-1, 2, G, K))[:, layer].to(k.dtype)  # (P, 2, G, K)
        first = both.expand(B, *both.shape).unbind(2)
        return torch.cat((first[0], k), dim=1), torch.cat((first[1], v), dim=1)

    def _options(self, context: ForwardContext, layer: int) -> AttentionArguments:
        options = AttentionArguments(window=self.window, softcap=self.softcap)
        if context.seeds is None or context.attention_dropout == 0:
            return options
        seed = context.seeds[3 * layer + 1, 0]
        return options._replace(
            dropout_p=context.attention_dropout,
            seed=seed + self.tensor_rank if self.tensor_rank else seed,
        )

    def _norm_rope(self, rope: tuple[Tensor, Tensor] | None) -> NormRopeArguments:
        cos, sin = (None, None) if rope is None else rope
        if self.q_norm is None:
            return NormRopeArguments(cos, sin)
        return NormRopeArguments(cos, sin, self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)

    def _split(
        self, qkv: Tensor, rope: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return q (B, T, H, K), k and v (B, T, G, K), with q and k normalized and rotated."""
        heads = qkv.unflatten(-1, (self.n_head + 2 * self.kv_heads, -1))
        if self.q_norm is None:
            qk, v = heads.split((self.n_head + self.kv_heads, self.kv_heads), dim=2)
            qk = qk if rope is None else rotary(qk, *rope)  # queries and keys together
            return *qk.split((self.n_head, self.kv_heads), dim=2), v
        # The norms need contiguous heads. With copies of all three, autograd can free qkv.
        parts = heads.split((self.n_head, self.kv_heads, self.kv_heads), dim=2)
        q, k, v = (part.contiguous() for part in parts)
        q = self.q_norm(q)
        k = self.k_norm(k)
        if rope is None:
            return q, k, v
        return rotary(q, *rope), rotary(k, *rope), v


# --- MLPs


class MLP(nn.Module):
    """Two linear layers with GELU (tanh form) between them.

    recompute: whether the backward computes GELU's output again instead of keeping it.
    """

    operator = staticmethod(gelu_mlp)
    activation = staticmethod(functools.partial(F.gelu, approximate="tanh"))
    recompute = False

    def __init__(self, config: "GPTConfig"):
        super().__init__()
        self.c_fc = Linear(config.d_model, config.d_feedforward, bias=config.bias)
        self.c_proj = Linear(config.d_feedforward, config.d_model, bias=config.bias)

    def forward(self, x: Tensor, seeds: Seeds = NO_SEEDS) -> Branch:
        c_fc = self.c_fc
        c_proj = self.c_proj
        if not (c_fc.is_plain and c_proj.is_plain):
            a = self.activation(c_fc(x, seeds[0]))
            return c_proj.branch(a, seeds[1])
        bias, added_bias = c_proj.split_bias()
        y = self.operator(x, c_fc.weight, c_fc.bias, c_proj.weight, bias, recompute=self.recompute)
        return Branch(y, added_bias)


class ExactGELUMLP(MLP):
    """Two linear layers with GELU, not its tanh form, between them."""

    operator = staticmethod(functools.partial(gelu_mlp, approximate="none"))
    activation = staticmethod(F.gelu)


class SquaredReLUMLP(MLP):
    """Two linear layers with relu(x)^2 between them."""

    operator = staticmethod(relu2_mlp)

    @staticmethod
    def activation(h: Tensor) -> Tensor:
        return F.relu(h).square()


class GatedMLP(nn.Module):
    """SwiGLU: silu(x @ c_gate.T) * (x @ c_fc.T), then c_proj. It has no biases."""

    def __init__(self, config: "GPTConfig"):
        super().__init__()
        self.c_gate = Linear(config.d_model, config.d_feedforward, bias=False)
        self.c_fc = Linear(config.d_model, config.d_feedforward, bias=False)
        self.c_proj = Linear(config.d_feedforward, config.d_model, bias=False)

    def forward(self, x: Tensor, seeds: Seeds = NO_SEEDS) -> Branch:
        c_gate = self.c_gate
        c_fc = self.c_fc
        c_proj = self.c_proj
        if not (c_gate.is_plain and c_fc.is_plain and c_proj.is_plain):
            a = F.silu(c_gate(x, seeds[0])) * c_fc(x, seeds[0])
            return c_proj.branch(a, seeds[1])
        return Branch(swiglu_mlp(x, c_gate.weight, c_fc.weight, c_proj.weight), None)
