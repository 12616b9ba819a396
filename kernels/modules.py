"""torch.nn.Modules over the operators. Each takes the state dict of the module that it replaces.

    module                    state dict of
    LayerNorm                 torch.nn.LayerNorm
    RMSNorm                   torch.nn.RMSNorm, and the RMSNorm of Llama in transformers
    GELUMLP                   layout "linear": torch.nn.Linear as c_fc and c_proj
                              layout "gpt2": GPT2MLP of transformers
    SwiGLUMLP                 LlamaMLP of transformers
    CausalSelfAttention       layout "packed": torch.nn.Linear as c_attn and c_proj
                              layout "gpt2": GPT2Attention of transformers
                              layout "llama": LlamaAttention of transformers
    LinearCrossEntropyLoss    torch.nn.Linear, the head of a language model

State dicts go both ways without conversion: parameters have the names and shapes of the replaced
module. The layout "gpt2" therefore stores weights as (in, out), as the Conv1D of transformers does.
A module never guesses the layout from shapes, because a square weight fits both.

All modules take `device` and `dtype`, also device="meta", and have reset_parameters(). Copying,
pickling, to(), torch.compile and autocast work as for torch.nn. The MLPs call their layers, with
PyTorch's activation between them, if a layer is not a plain one: an adapter such as LoRA, a
subclass, or a layer with hooks, parametrizations or quantized weights.

Shapes     x: (B, T, D)   B sequences, T tokens, D = d_model; F = d_hidden; V = vocab_size
           H = n_head query heads, G = n_kv_head key and value heads, K = head_size
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ._conv1d import Conv1D, linear_layer
from ._module_checks import check_heads, check_layout, check_norm, check_sizes
from .attention.causal import causal_attention, causal_attention_qkvpacked
from .attention.options import check_head_size, check_score_options
from .attention.varlen import causal_attention_varlen
from .core.dropout import check_dropout_p
from .core.op import public
from .loss.linear_cross_entropy import linear_cross_entropy
from .loss.options import LossOptions
from .mlp.mlp import check_approximate, gelu_mlp
from .mlp.swiglu_mlp import swiglu_mlp
from .norm.layer_norm import add_layer_norm, layer_norm
from .norm.rms_norm import add_rms_norm, rms_norm
from .plain import is_plain
from .rotary import rotary


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm over the last axis. The constructor is that of torch.nn.LayerNorm.

    Raises: ValueError if normalized_shape has more than one axis, or for a bad option.
    """

    @public
    def __init__(
        self,
        normalized_shape,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.eps = check_norm("LayerNorm", self.normalized_shape, eps)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return the norm of x (..., D); with `residual` the norm of the sum, and the sum.

        The residual has the shape of x. Addition and norm are one pass over memory.
        """
        weight = _ones(self, x) if self.weight is None else self.weight
        if residual is None:
            return layer_norm(x, weight, self.bias, eps=self.eps)
        return add_layer_norm(x, residual, weight, self.bias, eps=self.eps)


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm over the last axis. The constructor is that of torch.nn.RMSNorm.

    eps=None means the machine epsilon of float32, and of float64 for float64 x, as in torch.nn.
    Raises: ValueError if normalized_shape has more than one axis, or for a bad option.
    """

    @public
    def __init__(
        self,
        normalized_shape,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.eps = check_norm("RMSNorm", self.normalized_shape, eps)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return the norm of x; with `residual` the norm of x + residual, and x + residual."""
        weight = _ones(self, x) if self.weight is None else self.weight
        default_eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
        eps = default_eps if self.eps is None else self.eps
        if residual is None:
            return rms_norm(x, weight, eps=eps)
        return add_rms_norm(x, residual, weight, eps=eps)


def _ones(norm: nn.Module, x: Tensor) -> Tensor:
    """Return a weight of ones, whose size the operators check."""
    return torch.ones(norm.normalized_shape, dtype=x.dtype, device=x.device)


class GELUMLP(nn.Module):
    """A linear layer c_fc, GELU, and a linear layer c_proj.

    Args:
        d_model, d_hidden: D and F.
        bias: whether both layers have a bias.
        approximate: "tanh" or "none", as for torch.nn.GELU. GPT-2 has "tanh".
        recompute: keep one (..., F) tensor for the backward instead of two, and compute GELU again
            there. It has no effect if a layer is not a plain one.
        layout: "linear" or "gpt2", see the top of this file.
    Raises: ValueError for a bad size or option.
    """

    LAYOUTS = ("linear", "gpt2")

    @public
    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        *,
        bias: bool = True,
        approximate: str = "tanh",
        recompute: bool = False,
        layout: str = "linear",
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes("GELUMLP", d_model=d_model, d_hidden=d_hidden)
        check_layout("GELUMLP", layout, self.LAYOUTS)
        check_approximate("GELUMLP", approximate)
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.approximate = approximate
        self.recompute = recompute
        self.layout = layout
        self.c_fc = linear_layer(layout, d_model, d_hidden, **options)
        self.c_proj = linear_layer(layout, d_hidden, d_model, **options)

    def reset_parameters(self) -> None:
        """Initialize both layers again."""
        self.c_fc.reset_parameters()
        self.c_proj.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., D) for x (..., D)."""
        c_fc, c_proj = self.c_fc, self.c_proj
        cls = Conv1D if self.layout == "gpt2" else nn.Linear
        if not (is_plain(c_fc, cls) and is_plain(c_proj, cls)):
            return c_proj(functional.gelu(c_fc(x), approximate=self.approximate))
        w1, w2 = c_fc.weight, c_proj.weight
        if self.layout == "gpt2":
            w1, w2 = w1.t(), w2.t()  # views: the kernels take any strides
        options = {"approximate": self.approximate, "recompute": self.recompute}
        return gelu_mlp(x, w1, c_fc.bias, w2, c_proj.bias, **options)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}, layout={self.layout!r}"


class SwiGLUMLP(nn.Module):
    """silu(gate_proj(x)) * up_proj(x), then down_proj. There are no biases.

    Args:
        d_model, d_hidden: D and F.
    Raises: ValueError for a bad size.
    """

    @public
    def __init__(self, d_model: int, d_hidden: int, *, device=None, dtype=None):
        super().__init__()
        check_sizes("SwiGLUMLP", d_model=d_model, d_hidden=d_hidden)
        options = {"bias": False, "device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(d_model, d_hidden, **options)
        self.up_proj = nn.Linear(d_model, d_hidden, **options)
        self.down_proj = nn.Linear(d_hidden, d_model, **options)

    def reset_parameters(self) -> None:
        """Initialize the three layers again."""
        for layer in (self.gate_proj, self.up_proj, self.down_proj):
            layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., D) for x (..., D)."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if not all(is_plain(each, nn.Linear) and each.bias is None for each in (gate, up, down)):
            return down(functional.silu(gate(x)) * up(x))
        return swiglu_mlp(x, gate.weight, up.weight, down.weight)


class CausalSelfAttention(nn.Module):
    """Project x to queries, keys and values, attend to earlier tokens, and project back.

    Args:
        d_model, n_head: D and H.
        n_kv_head: G, a divisor of H. Default: H.
        head_size: K. Default: D / H.
        bias: whether the projections to q, k and v have biases.
        out_bias: whether the output projection has a bias. Default: `bias`.
        qk_norm: normalize each query and key head with RMSNorm, as Qwen3 does. The layout must be
            "llama".
        eps: of these norms.
        window, softcap, dropout_p: as for causal_attention. Dropout applies in training mode.
        layout: "packed", "gpt2" or "llama", see the top of this file.
    Raises: ValueError for a bad option, or sizes that do not divide each other.
    """

    LAYOUTS = ("packed", "gpt2", "llama")

    @public
    def __init__(
        self,
        d_model: int,
        n_head: int,
        *,
        n_kv_head: int | None = None,
        head_size: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        qk_norm: bool = False,
        eps: float = 1e-6,
        window: int | None = None,
        softcap: float | None = 0.0,
        dropout_p: float = 0.0,
        layout: str = "packed",
        device=None,
        dtype=None,
    ):
        super().__init__()
        name = "CausalSelfAttention"
        n_kv_head = n_head if n_kv_head is None else n_kv_head
        check_layout(name, layout, self.LAYOUTS)
        check_heads(name, d_model, n_head, n_kv_head, head_size)
        if qk_norm and layout != "llama":
            raise ValueError(f"{name}: qk_norm needs layout 'llama', got {layout!r}")
        check_score_options(name, scale=None, window=window, softcap=softcap)
        check_dropout_p(name, dropout_p)
        self.n_head = n_head
        self.n_kv_head = n_kv_head
        self.head_size = d_model // n_head if head_size is None else head_size
        check_head_size(name, self.head_size)
        self.window = window
        self.softcap = softcap
        self.dropout_p = dropout_p
        self.layout = layout

        # projections, with the names of the replaced module
        options = {"device": device, "dtype": dtype}
        q_width = n_head * self.head_size
        kv_width = n_kv_head * self.head_size
        out_bias = bias if out_bias is None else out_bias
        if layout == "llama":
            self.q_proj = nn.Linear(d_model, q_width, bias=bias, **options)
            self.k_proj = nn.Linear(d_model, kv_width, bias=bias, **options)
            self.v_proj = nn.Linear(d_model, kv_width, bias=bias, **options)
            self.o_proj = nn.Linear(q_width, d_model, bias=out_bias, **options)
        else:
            self.c_attn = linear_layer(
                layout, d_model, q_width + 2 * kv_width, bias=bias, **options
            )
            self.c_proj = linear_layer(layout, q_width, d_model, bias=out_bias, **options)
        if qk_norm:
            self.q_norm = RMSNorm(self.head_size, eps=eps, **options)
            self.k_norm = RMSNorm(self.head_size, eps=eps, **options)
        self.has_qk_norm = qk_norm

    def reset_parameters(self) -> None:
        """Initialize all layers again."""
        for layer in self.children():
            layer.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        rope: tuple[Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Return y (B, T, D).

        Args:
            x: (B, T, D).
            rope: (cos, sin) as for `rotary`: (S, K / 2) or (B, T, K / 2). None: no rotation. Pass
                the first half of the tables of transformers (B, T, K): cos[..., : K // 2].
            cu_seqlens: (documents + 1,) int32, for documents packed in the B T tokens, as for
                causal_attention_varlen. None: B sequences.
        """
        options = {"window": self.window, "softcap": self.softcap}
        if self.training and self.dropout_p > 0:
            options["dropout_p"] = self.dropout_p
        if self.layout != "llama" and rope is None:
            o = causal_attention_qkvpacked(
                self.c_attn(x),
                self.n_head,
                n_kv_head=self.n_kv_head,
                cu_seqlens=cu_seqlens,
                **options,
            )
            return self.c_proj(o)

        q, k, v = self._heads(x)
        if rope is not None:
            if isinstance(rope, Tensor) or len(rope) != 2:
                found = "one tensor" if isinstance(rope, Tensor) else f"{len(rope)} elements"
                raise ValueError(
                    f"CausalSelfAttention: rope must be (cos, sin), a pair of tensors, got {found}"
                )
            q = rotary(q, *rope)
            k = rotary(k, *rope)
        if cu_seqlens is None:
            o = causal_attention(q, k, v, **options).flatten(2)
        else:
            packed = (heads.flatten(0, 1) for heads in (q, k, v))
            o = causal_attention_varlen(*packed, cu_seqlens, q.shape[0] * q.shape[1], **options)
            o = o.view(*x.shape[:2], -1)
        return self.o_proj(o) if self.layout == "llama" else self.c_proj(o)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q (B, T, H, K), k and v (B, T, G, K)."""
        if self.layout != "llama":
            heads = self.c_attn(x).unflatten(-1, (-1, self.head_size))
            return heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_size))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return (self.q_norm(q), self.k_norm(k), v) if self.has_qk_norm else (q, k, v)

    def extra_repr(self) -> str:
        return (
            f"n_head={self.n_head}, n_kv_head={self.n_kv_head}, head_size={self.head_size}, "
            f"layout={self.layout!r}"
        )


class LinearCrossEntropyLoss(nn.Linear):
    """The head of a language model and its loss, which never holds all logits.

    It is a torch.nn.Linear with another forward. To tie it to an embedding, assign the parameter:
    loss.weight = embedding.weight.

    Args:
        d_model, vocab_size: D and V.
        bias: whether the head has a bias.
        ignore_index, label_smoothing, z_loss, softcap, reduction: as for linear_cross_entropy.
    Raises: ValueError for a bad size or option.
    """

    @public
    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        *,
        bias: bool = False,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = 0.0,
        reduction: str = "mean",
        device=None,
        dtype=None,
    ):
        check_sizes("LinearCrossEntropyLoss", d_model=d_model, vocab_size=vocab_size)
        super().__init__(d_model, vocab_size, bias=bias, device=device, dtype=dtype)
        self.options = {
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
            "reduction": reduction,
        }
        LossOptions(**self.options).check("LinearCrossEntropyLoss")

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Return the loss of x (..., D) for target (...), in nats, float32."""
        return linear_cross_entropy(x, self.weight, target, self.bias, **self.options)

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (..., V), to which `softcap` is applied."""
        logits = super().forward(x)
        softcap = self.options["softcap"]
        return softcap * torch.tanh(logits / softcap) if softcap else logits
