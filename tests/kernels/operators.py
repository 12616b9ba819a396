"""A small call of each public operator, for tests that hold for all operators.

`CASES[name](n, device)` returns a function and its float inputs. n is the number of tokens.
The function returns one tensor or a tuple. It holds all arguments that are not floats.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tritium import kernels

D, F, H, K, V = 8, 12, 2, 4, 11
Case = tuple[Callable, list[Tensor]]


def _randn(n: int, *shapes: tuple[int, ...], device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def _target(n: int, device: torch.device) -> Tensor:
    """Targets (n,). Every third row is ignored."""
    target = torch.arange(n) % V
    target[::3] = -100
    return target.to(device)


def _layer_norm(n, device):
    return kernels.layer_norm, _randn(n, (n, D), (D,), (D,), device=device)


def _add_layer_norm(n, device):
    return kernels.add_layer_norm, _randn(n, (n, D), (n, D), (D,), (D,), device=device)


def _rms_norm(n, device):
    return kernels.rms_norm, _randn(n, (n, D), (D,), device=device)


def _add_rms_norm(n, device):
    return kernels.add_rms_norm, _randn(n, (n, D), (n, D), (D,), device=device)


def _causal_attention(n, device):
    # With return_lse a CPU runs the operator, not SDPA.
    def function(q, k, v):
        return kernels.causal_attention(q, k, v, return_lse=True)

    return function, _randn(n, *[(1, n, H, K)] * 3, device=device)


def _causal_attention_qkvpacked(n, device):
    def function(qkv):
        return kernels.causal_attention_qkvpacked(qkv, H, softcap=5.0)

    return function, _randn(n, (1, n, 3 * H * K), device=device)


def _causal_attention_varlen(n, device):
    lengths = torch.tensor([0, n // 2, n], dtype=torch.int32, device=device)

    def function(q, k, v):
        return kernels.causal_attention_varlen(q, k, v, lengths, n)

    return function, _randn(n, *[(n, H, K)] * 3, device=device)


def _attention_decode(n, device):
    lengths = torch.tensor([n], device=device)

    def function(q, k_cache, v_cache):
        return kernels.attention_decode(q, k_cache, v_cache, lengths)

    return function, _randn(n, (1, 1, H, K), (1, n, H, K), (1, n, H, K), device=device)


def _rotary(n, device):
    angle = torch.outer(torch.arange(n), torch.tensor([1.0, 0.1]))
    cos, sin = angle.cos().to(device), angle.sin().to(device)
    return lambda x: kernels.rotary(x, cos, sin), _randn(n, (1, n, H, K), device=device)


def _embedding(n, device):
    tokens = (torch.arange(n) % V)[None].to(device)
    return lambda weight: kernels.embedding(tokens, weight), _randn(n, (V, D), device=device)


def _linear(n, device):
    def function(x, weight, bias):
        return kernels.linear(x, weight, bias, activation="gelu")

    return function, _randn(n, (n, D), (F, D), (F,), device=device)


def _gelu_mlp(n, device):
    shapes = (n, D), (F, D), (F,), (D, F), (D,)
    return kernels.gelu_mlp, _randn(n, *shapes, device=device)


def _relu2_mlp(n, device):
    shapes = (n, D), (F, D), (F,), (D, F), (D,)
    return kernels.relu2_mlp, _randn(n, *shapes, device=device)


def _swiglu(n, device):
    return kernels.swiglu, _randn(n, (n, F), (n, F), device=device)


def _swiglu_mlp(n, device):
    return kernels.swiglu_mlp, _randn(n, (n, D), (F, D), (F, D), (D, F), device=device)


def _cross_entropy(n, device):
    target = _target(n, device)
    return lambda logits: kernels.cross_entropy(logits, target), _randn(n, (n, V), device=device)


def _linear_cross_entropy(n, device):
    target = _target(n, device)

    def function(x, weight, bias):
        return kernels.linear_cross_entropy(x, weight, target, bias)

    return function, _randn(n, (n, D), (V, D), (V,), device=device)


CASES: dict[str, Callable[[int, torch.device], Case]] = {
    name: globals()[f"_{name}"] for name in kernels.__all__
}
