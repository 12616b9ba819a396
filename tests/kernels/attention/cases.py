"""Helpers of the attention tests: inputs, a definition without blocks, the bar for errors."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.tolerance import assert_accurate
from tritium.kernels import causal_attention
from tritium.kernels.core.op import INTERPRET

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["o", "lse", "dq", "dk", "dv"]
# Empty documents first, last and between; one longer than several tiles; single tokens; whole
# tiles; no token at all.
LENGTHS = [
    (5, 0, 130, 64, 1, 0, 33),
    (0, 0, 33, 0),
    (1,) * 9,
    (128, 128),
    (64, 0, 0, 64, 1),
    (300,),
    (0, 0),
    (3,),
]

needs_kernels = pytest.mark.skipif(
    not (INTERPRET or torch.cuda.is_available()),
    reason="runs a kernel: needs CUDA or TRITON_INTERPRET=1",
)


def make_inputs(B, T, S, H, G, K, dtype, device):
    """q, k, v, do and dlse; dlse is at least float32."""
    generator = torch.Generator().manual_seed(T * 1009 + S)
    shapes = [(B, T, H, K), (B, S, G, K), (B, S, G, K), (B, T, H, K)]
    dlse = torch.randn((B, H, T), generator=generator)
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return [*tensors, dlse.to(device, torch.promote_types(dtype, torch.float32))]


def meta(*shape, dtype=torch.bfloat16):
    """A tensor without data, to record launches with."""
    return torch.empty(shape, dtype=dtype, device="meta")


def packed(q, k, v):
    """(B, T, (H + 2 G) K), as a linear layer writes them."""
    return torch.cat((q, k, v), dim=2).flatten(2)


def visible_keys(T, S, window, device):
    """Which query sees which key, (T, S)."""
    ahead = (torch.arange(T, device=device) + S - T)[:, None] - torch.arange(S, device=device)
    return (ahead >= 0) & (ahead < (S if window is None else window))


def definition(q, k, v, *, scale=None, window=None, softcap=0.0, dropout_scale=None):
    """o and lse from all scores at once, in the dtype of the inputs."""
    (_, T, H, K), (S, G) = q.shape, k.shape[1:3]
    k, v = (x.repeat_interleave(H // G, dim=2) for x in (k, v))
    s = torch.einsum("bthk,bshk->bhts", q, k) * (1 / math.sqrt(K) if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~visible_keys(T, S, window, q.device), -math.inf)
    p = s.softmax(-1)
    if dropout_scale is not None:
        p = p * dropout_scale.to(s.dtype)
    return torch.einsum("bhts,bshk->bthk", p, v), s.logsumexp(-1)


def sdpa(q, k, v, *, scale=None, window=None):
    """o from PyTorch's fused operator, and lse from scores in the dtype of the inputs."""
    (_, T, H, _), (S, G) = q.shape, k.shape[1:3]
    mask = visible_keys(T, S, window, q.device)
    q_heads, k_heads, v_heads = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(
        q_heads, k_heads, v_heads, attn_mask=mask, scale=scale, enable_gqa=H != G
    )
    return o.transpose(1, 2), definition(q, k, v, scale=scale, window=window)[1]


def run(function, inputs, incoming):
    """Return outputs and gradients of the inputs. `incoming` are gradients of the outputs."""
    # No clone: it would lose the strides.
    leaves = [value.detach().requires_grad_() for value in inputs]
    outputs = function(*leaves)
    incoming = [g.to(o.dtype) for g, o in zip(incoming, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, leaves, incoming)
    return [output.detach() for output in outputs] + list(grads)


def attend(**options):
    """causal_attention with these options, as a function of q, k and v that returns (o,)."""
    return lambda q, k, v: (causal_attention(q, k, v, **options),)


def attend_lse(**options):
    """causal_attention with these options, as a function of q, k and v that returns (o, lse)."""
    return lambda q, k, v: causal_attention(q, k, v, return_lse=True, **options)


def assert_bitwise_equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def assert_matches_definition(
    got, inputs, incoming, *, dropout_scale=None, baseline=definition, **options
):
    """Check o, lse, dq, dk and dv against the float64 definition, within tests/tolerance.py.

    `baseline` computes the same in the dtype of the inputs.
    """
    (q, k, v), (do, _) = inputs, incoming
    if dropout_scale is not None:
        options["dropout_scale"] = dropout_scale
    truth = run(lambda *x: definition(*x, **options), [x.double() for x in inputs], incoming)
    theirs = run(lambda *x: baseline(*x, **options), inputs, incoming)
    theirs[1] = theirs[1].to(got[1].dtype)
    # In ds = p (dp - delta) large terms cancel. delta is computed from the rounded o, so dq and dk
    # contain the rounding error of o, multiplied by do and by k or q.
    group, scale = q.shape[2] // k.shape[2], options.get("scale", q.shape[-1] ** -0.5)
    values = v.double().repeat_interleave(group, dim=2)
    dp = torch.einsum("bthk,bshk->bhts", do.double(), values).abs().max().item()
    scales = {"dq": scale * dp * k.abs().max().item(), "dk": scale * dp * q.abs().max().item()}
    for name, *tensors in zip(NAMES, got, truth, theirs, strict=True):
        assert_accurate(name, *tensors, length=k.shape[1], scale=scales.get(name, 0.0))
