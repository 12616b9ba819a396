"""A small call of each public operator, for tests that hold for all operators.

`CASES[name]` is a pair of functions. The first one calls the operator and returns a tensor or a
tuple. The second one, `make(n, device)`, returns its float arguments and its other arguments, for n
tokens.
"""

import torch
from torch import Tensor

from tritium import kernels

D, F, H, K, V = 8, 12, 2, 4, 11


def floats(*shapes):
    """Return a `make` of float arguments only. "n" in a shape stands for the number of tokens."""
    return with_others(lambda n: (), *shapes)


def with_others(others, *shapes):
    """Return a `make`, with the other arguments from `others(n)`."""

    def make(n: int, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        generator = torch.Generator().manual_seed(n)
        sizes = [[n if size == "n" else size for size in shape] for shape in shapes]
        values = [torch.randn(size, generator=generator).to(device) for size in sizes]
        return values, [value.to(device) for value in others(n)]

    return make


def target(n):
    """Return targets. Every third row is ignored."""
    classes = torch.arange(n) % V
    classes[::3] = -100
    return (classes,)


def tables(n):
    """Return cos and sin of a rotation."""
    angle = torch.outer(torch.arange(n), torch.tensor([1.0, 0.1]))
    return angle.cos(), angle.sin()


def attention_with_lse(q, k, v):
    """Attend. With return_lse a CPU runs the operator, not SDPA."""
    return kernels.causal_attention(q, k, v, return_lse=True)


MLP = [("n", D), (F, D), (F,), (D, F), (D,)]
HEADS = [(1, "n", H, K)] * 3
CASES = {
    "add_layer_norm": (kernels.add_layer_norm, floats(("n", D), ("n", D), (D,), (D,))),
    "add_rms_norm": (kernels.add_rms_norm, floats(("n", D), ("n", D), (D,))),
    "attention_decode": (
        kernels.attention_decode,
        with_others(lambda n: (torch.tensor([n]),), (1, 1, H, K), *HEADS[1:]),
    ),
    "causal_attention": (attention_with_lse, floats(*HEADS)),
    "causal_attention_qkvpacked": (
        lambda qkv: kernels.causal_attention_qkvpacked(qkv, H, softcap=5.0),
        floats((1, "n", 3 * H * K)),
    ),
    "causal_attention_varlen": (
        lambda q, k, v, lengths: kernels.causal_attention_varlen(q, k, v, lengths, len(q)),
        with_others(lambda n: (torch.tensor([0, n // 2, n]).int(),), *[("n", H, K)] * 3),
    ),
    "cross_entropy": (kernels.cross_entropy, with_others(target, ("n", V))),
    "embedding": (
        lambda weight, tokens: kernels.embedding(tokens, weight),
        with_others(lambda n: (torch.arange(n)[None] % V,), (V, D)),
    ),
    "gelu_mlp": (kernels.gelu_mlp, floats(*MLP)),
    "layer_norm": (kernels.layer_norm, floats(("n", D), (D,), (D,))),
    "linear": (
        lambda x, weight, bias: kernels.linear(x, weight, bias, activation="gelu"),
        floats(*MLP[:3]),
    ),
    "linear_cross_entropy": (
        lambda x, weight, bias, target: kernels.linear_cross_entropy(x, weight, target, bias),
        with_others(target, ("n", D), (V, D), (V,)),
    ),
    "relu2_mlp": (kernels.relu2_mlp, floats(*MLP)),
    "rms_norm": (kernels.rms_norm, floats(("n", D), (D,))),
    "rotary": (kernels.rotary, with_others(tables, HEADS[0])),
    "swiglu": (kernels.swiglu, floats(("n", F), ("n", F))),
    "swiglu_mlp": (kernels.swiglu_mlp, floats(("n", D), (F, D), (F, D), (D, F))),
}


def run(function, values, others):
    """Return the outputs and the gradients of the float arguments. Decoding has no gradients."""
    leaves = [value.detach().requires_grad_() for value in values]
    outputs = function(*leaves, *others)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not outputs[0].requires_grad:
        return list(outputs)
    grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])
    return [*(output.detach() for output in outputs), *grads]
