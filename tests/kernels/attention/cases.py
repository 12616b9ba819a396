"""What the tests of attention share: inputs, the definition written out in one piece, and the bar for its error."""

import math

import torch
import torch.nn.functional as F

from tests.tolerance import assert_accurate
from tritium.kernels import causal_attention

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["o", "lse", "dq", "dk", "dv"]


def tensors(B, T, S, H, G, K, dtype, device):
    """q, k, v and the incoming gradients of o and lse, that of lse at least float32."""
    generator = torch.Generator().manual_seed(T * 1009 + S)
    shapes = [(B, T, H, K), (B, S, G, K), (B, S, G, K), (B, T, H, K)]
    lse = torch.randn((B, H, T), generator=generator).to(
        device, torch.promote_types(dtype, torch.float32)
    )
    return [*(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes), lse]


def visible(T, S, window, device):
    """Which keys (S) are seen by which queries (T)."""
    ahead = (torch.arange(T, device=device) + S - T)[:, None] - torch.arange(S, device=device)
    return (ahead >= 0) & (ahead < (S if window is None else window))


def naive(q, k, v, *, scale=None, window=None, softcap=0.0, keep=None):
    """o and lse as the definition has them, every score at once, in the dtype of the inputs."""
    (_, T, H, K), (S, G) = q.shape, k.shape[1:3]
    k, v = (x.repeat_interleave(H // G, dim=2) for x in (k, v))
    s = torch.einsum("bthk,bshk->bhts", q, k) * (1 / math.sqrt(K) if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~visible(T, S, window, q.device), -math.inf)
    p = s.softmax(-1) if keep is None else s.softmax(-1) * keep.to(s.dtype)
    return torch.einsum("bhts,bshk->bthk", p, v), s.logsumexp(-1)


def sdpa(q, k, v, *, scale=None, window=None):
    """o as PyTorch's fused operator gives it, and lse from scores in the dtype of the inputs."""
    (_, T, H, _), (S, G) = q.shape, k.shape[1:3]
    mask = visible(T, S, window, q.device)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    o = F.scaled_dot_product_attention(
        *heads, attn_mask=mask, scale=scale, enable_gqa=H != G
    ).transpose(1, 2)
    return o, naive(q, k, v, scale=scale, window=window)[1]


def run(function, inputs, incoming):
    """Outputs and gradients."""
    leaves = [
        value.detach().requires_grad_() for value in inputs
    ]  # no clone: it would lose the strides
    outputs = function(*leaves)
    grads = torch.autograd.grad(
        outputs, leaves, [g.to(o.dtype) for g, o in zip(incoming, outputs, strict=True)]
    )
    return [output.detach() for output in outputs] + list(grads)


def ours(**options):
    return lambda q, k, v: causal_attention(q, k, v, return_lse=True, **options)


def packed(q, k, v):
    """As a linear layer writes them: (B, T, (H + 2 G) K)."""
    return torch.cat((q, k, v), dim=2).flatten(2)


def assert_like_the_definition(got, inputs, incoming, *, keep=None, peer=naive, **options):
    """Fail if o, lse, dq, dk or dv are further from the float64 definition than the bar of tests/tolerance.py.

    `peer` does the same in the dtype of the inputs.
    """
    (q, k, v), (do, _) = inputs, incoming
    if keep is not None:
        options["keep"] = keep
    truth = run(lambda *x: naive(*x, **options), [x.double() for x in inputs], incoming)
    theirs = run(lambda *x: peer(*x, **options), inputs, incoming)
    theirs[1] = theirs[1].to(got[1].dtype)
    # ds = p (dp - D) cancels: D is formed from o as it was rounded, so an ulp of o times do comes back times q or k.
    group, scale = q.shape[2] // k.shape[2], options.get("scale", q.shape[-1] ** -0.5)
    dp = (
        torch.einsum("bthk,bshk->bhts", do.double(), v.double().repeat_interleave(group, dim=2))
        .abs()
        .max()
        .item()
    )
    scales = {"dq": scale * dp * k.abs().max().item(), "dk": scale * dp * q.abs().max().item()}
    for name, *values in zip(NAMES, got, truth, theirs, strict=True):
        assert_accurate(name, *values, length=k.shape[1], scale=scales.get(name, 0.0))
