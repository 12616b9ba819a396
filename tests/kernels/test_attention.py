"""causal_attention and causal_attention_qkvpacked against the definition written out in one piece, and against PyTorch's."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.tolerance import assert_accurate
from tritium.kernels import causal_attention, causal_attention_qkvpacked
from tritium.kernels._attention_reference import BLOCK_QUERIES
from tritium.kernels._philox import random_bits
from tritium.kernels.attention import cost

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [{}, {"window": 5}, {"softcap": 2.0}, {"scale": 0.3}, {"window": 7, "softcap": 3.0, "scale": 0.5}]
# (B, T, S, H, G, K): one token, odd, grouped, multi-query, one past a block of queries, more keys than queries.
SHAPES = [
    (1, 1, 1, 1, 1, 16),
    (2, 17, 17, 3, 3, 40),
    (2, 9, 20, 4, 2, 16),
    (1, BLOCK_QUERIES + 1, BLOCK_QUERIES + 1, 2, 1, 16),
    (1, 1, 300, 2, 2, 8),
    (1, 150, 300, 1, 1, 32),
]


def tensors(B, T, S, H, G, K, dtype, device):
    """q, k, v and the incoming gradients of o and lse."""
    generator = torch.Generator().manual_seed(T * 1009 + S)
    shapes = [(B, T, H, K), (B, S, G, K), (B, S, G, K), (B, T, H, K), (B, H, T)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def naive(q, k, v, *, scale=None, window=None, softcap=0.0, keep=None):
    """The definition, every score at once."""
    (_, T, H, K), (S, G) = q.shape, k.shape[1:3]
    k, v = (x.repeat_interleave(H // G, dim=2) for x in (k, v))
    s = torch.einsum("bthk,bshk->bhts", q, k) * (1 / math.sqrt(K) if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    ahead = (torch.arange(T, device=q.device) + S - T)[:, None] - torch.arange(S, device=q.device)
    s = s.masked_fill((ahead < 0) | (ahead >= (S if window is None else window)), -math.inf)
    p = s.softmax(-1) if keep is None else s.softmax(-1) * keep
    return torch.einsum("bhts,bshk->bthk", p, v), s.logsumexp(-1)


def run(function, inputs, incoming):
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    outputs = function(*leaves)
    return [output.detach() for output in outputs] + list(torch.autograd.grad(outputs, leaves, incoming))


def ours(**options):
    return lambda q, k, v: causal_attention(q, k, v, return_lse=True, **options)


def packed(q, k, v):
    """As a linear layer writes them: (B, T, (H + 2 G) K)."""
    return torch.cat((q, k, v), dim=2).flatten(2)


# --- 1. math


@pytest.mark.plain
@pytest.mark.parametrize("options", [*OPTIONS, {"dropout_p": 0.3, "seed": 3}])
def test_gradients_of_the_reference_are_those_of_its_forward(options):
    q, k, v, *_ = (value.requires_grad_() for value in tensors(1, 5, 8, 4, 2, 3, torch.float64, "cpu"))
    assert torch.autograd.gradcheck(ours(**options), (q, k, v))


@pytest.mark.plain
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_definition(shape, options):
    q, k, v, *incoming = tensors(*shape, torch.float64, "cpu")
    got = run(ours(**options), (q, k, v), incoming)
    expected = run(lambda *x: naive(*x, **options), (q, k, v), incoming)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# --- 2. accuracy


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy_beside_torch(shape, dtype, device):
    _, T, S, H, G, K = shape
    q, k, v, do, _ = tensors(*shape, dtype, device)

    def sdpa(q, k, v):
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return (F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=H != G).transpose(1, 2),)

    got = run(lambda *x: (causal_attention(*x),), (q, k, v), [do])
    peer = run(sdpa, (q, k, v), [do])
    truth = run(lambda *x: naive(*x)[:1], [x.double() for x in (q, k, v)], [do.double()])
    # ds = p (dp - D) cancels: D is formed from o as it was rounded, so an ulp of o times do comes back times q or k.
    dp = torch.einsum("bthk,bshk->bhts", do.double(), v.double().repeat_interleave(H // G, dim=2)).abs().max().item()
    scales = {"dq": dp * k.abs().max().item() / math.sqrt(K), "dk": dp * q.abs().max().item() / math.sqrt(K)}
    for name, *values in zip(["o", "dq", "dk", "dv"], got, truth, peer, strict=True):
        assert_accurate(name, *values, length=S, scale=scales.get(name, 0.0))


def test_large_scores_stay_finite_and_a_lone_key_is_exact(device):
    q, k, v, do, _ = tensors(1, 33, 33, 2, 2, 16, torch.float32, device)
    got = run(lambda *x: (causal_attention(*x, scale=1.0),), (100 * q, 100 * k, v), [do])
    assert all(value.isfinite().all() for value in got)
    assert torch.equal(causal_attention(q, k, v, window=1), v)
    assert torch.equal(causal_attention(q, k, v)[:, 0], v[:, 0])


# --- 3. layouts and special shapes


def test_views_of_a_packed_projection_and_strided_gradients(device):
    B, T, H, K = 2, 20, 3, 8
    qkv = torch.randn(B, T, 3 * H * K, device=device)
    q, k, v = (part.view(B, T, H, K) for part in qkv.split(H * K, dim=-1))
    do = torch.randn(B, H, K, T, device=device).permute(0, 3, 1, 2)
    got = run(lambda *x: (causal_attention(*x),), (q, k, v), [do])
    expected = run(lambda *x: (causal_attention(*x),), [x.contiguous() for x in (q, k, v)], [do.contiguous()])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"window": 7, "softcap": 3.0, "scale": 0.5}, {"dropout_p": 0.2, "seed": 9}])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("T", "H", "G", "K"), [(1, 1, 1, 16), (17, 3, 3, 40), (BLOCK_QUERIES + 1, 4, 2, 16), (33, 4, 1, 24)])
def test_packed_gives_what_the_parts_give(T, H, G, K, dtype, options, device):
    q, k, v, do, _ = tensors(2, T, T, H, G, K, dtype, device)
    o, *grads = run(lambda *x: (causal_attention(*x, **options),), (q, k, v), [do])
    got = run(lambda x: (causal_attention_qkvpacked(x, H, n_kv_head=G, **options),), [packed(q, k, v)], [do.flatten(2)])
    assert torch.equal(got[0], o.flatten(2))
    assert torch.equal(got[1], packed(*grads))


def test_packed_takes_any_layout(device):
    qkv, do = torch.randn(2, 9, 2 * 6 * 8, device=device), torch.randn(2, 16, 9, device=device).mT
    for view in (qkv[..., ::2], qkv[..., 48:], qkv[..., :48].transpose(0, 1).contiguous().transpose(0, 1)):
        got = run(lambda x: (causal_attention_qkvpacked(x, 2),), [view], [do])
        expected = run(lambda x: (causal_attention_qkvpacked(x, 2),), [view.contiguous()], [do.contiguous()])
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(("B", "T"), [(0, 4), (2, 0)])
def test_packed_empty(B, T, device):
    qkv = torch.ones(B, T, 4 * 8, device=device, requires_grad=True)
    o = causal_attention_qkvpacked(qkv, 2, n_kv_head=1)
    assert o.shape == (B, T, 16)
    o.sum().backward()
    assert qkv.grad.shape == qkv.shape


@pytest.mark.parametrize(("B", "T", "S"), [(0, 4, 4), (2, 0, 4), (2, 0, 0)])
def test_empty(B, T, S, device):
    q, k, v, *_ = (value.requires_grad_() for value in tensors(B, T, S, 2, 1, 8, torch.float32, device))
    o = causal_attention(q, k, v)
    assert o.shape == q.shape
    o.sum().backward()
    assert torch.equal(k.grad, torch.zeros_like(k))


def test_a_window_of_every_key_is_none(device):
    q, k, v, *_ = tensors(1, 40, 40, 2, 2, 16, torch.float32, device)
    assert torch.equal(causal_attention(q, k, v, window=40), causal_attention(q, k, v))
    assert torch.equal(causal_attention(q, k, v, window=4000), causal_attention(q, k, v))


# --- dropout


def test_dropout_is_the_mask_of_its_seed(device):
    B, T, H, K, p = 2, 30, 3, 8, 0.25
    q, k, v, do, _ = tensors(B, T, T, H, H, K, torch.float64, "cpu")
    words = 4 * -(-T // 4)
    index = torch.arange(B * H * T * words).view(B, H, T, words)[..., :T]
    keep = (random_bits(torch.tensor(11), index) >= p * 2**32 - 2**31).double() / (1 - p)
    got = run(lambda *x: (causal_attention(*x, dropout_p=p, seed=11),), (q, k, v), [do])
    expected = run(lambda *x: naive(*x, keep=keep)[:1], (q, k, v), [do])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)

    q, k, v = (x.to(device, torch.float32) for x in (q, k, v))
    assert not torch.equal(causal_attention(q, k, v, dropout_p=p, seed=11), causal_attention(q, k, v, dropout_p=p, seed=12))
    torch.manual_seed(5)
    first = causal_attention(q, k, v, dropout_p=p)
    assert not torch.equal(first, causal_attention(q, k, v, dropout_p=p)), "each call draws its own seed"
    torch.manual_seed(5)
    assert torch.equal(first, causal_attention(q, k, v, dropout_p=p))


# --- 4. contract


def test_opcheck(device):
    q, k, v, do, dlse = tensors(1, 6, 9, 4, 2, 8, torch.float32, device)
    seed = torch.full((), 3, device=device)
    options = (0.5, 4, 2.0, 0.1)
    torch.library.opcheck(
        torch.ops.tritium.causal_attention_fwd.default, (*(x.requires_grad_() for x in (q, k, v)), None, seed, *options)
    )
    with torch.no_grad():
        o, lse = torch.ops.tritium.causal_attention_fwd(q, k, v, None, seed, *options)
    plain = [x.detach() for x in (do, dlse, q, k, v, o, lse)]
    torch.library.opcheck(torch.ops.tritium.causal_attention_bwd.default, (*plain, None, seed, *options))
    torch.library.opcheck(
        torch.ops.tritium.causal_attention_bwd.default, (plain[0], None, *plain[2:], None, None, 0.5, 9, 0.0, 0.0)
    )


def test_packed_opcheck(device):
    q, k, v, do, _ = tensors(1, 6, 6, 4, 2, 8, torch.float32, device)
    qkv, seed, options = packed(q, k, v), torch.full((), 3, device=device), (0.5, 4, 2.0, 0.1)
    forward, backward = (getattr(torch.ops.tritium, f"causal_attention_qkvpacked_{way}").default for way in ("fwd", "bwd"))
    torch.library.opcheck(forward, (qkv.clone().requires_grad_(), 4, 2, None, seed, *options))
    o, lse = forward(qkv, 4, 2, None, seed, *options)
    torch.library.opcheck(backward, (do.flatten(2), qkv, o, lse, None, seed, 4, 2, *options))


def test_packed_compiles_as_one_graph_and_follows_autocast(device):
    q, k, v, do, _ = tensors(2, 12, 12, 4, 2, 8, torch.float32, device)
    qkv = packed(q, k, v)

    def function(x):
        return (causal_attention_qkvpacked(x, 4, n_kv_head=2, window=5),)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, [qkv], [do.flatten(2)]), run(function, [qkv], [do.flatten(2)]), strict=True):
        assert torch.equal(a, b)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(function(qkv)[0], function(qkv.bfloat16())[0])


def test_compiles_as_one_graph(device):
    q, k, v, *incoming = tensors(2, 12, 12, 4, 2, 8, torch.float32, device)
    compiled = torch.compile(ours(window=5), fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, (q, k, v), incoming), run(ours(window=5), (q, k, v), incoming), strict=True):
        assert torch.equal(a, b)


def test_autocast_lowers_the_inputs_and_only_them(device):
    q, k, v, *_ = tensors(1, 12, 12, 2, 2, 8, torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        o, lse = causal_attention(q, k, v, return_lse=True)
    expected = causal_attention(*(x.bfloat16() for x in (q, k, v)), return_lse=True)
    assert (o.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(o, expected[0])
    assert torch.equal(lse, expected[1])


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_some_inputs_need_gradients(wanted, device):
    inputs = tensors(1, 7, 7, 2, 2, 8, torch.float32, device)[:3]
    inputs[wanted].requires_grad_()
    causal_attention(*inputs).square().sum().backward()
    assert [x.grad is not None for x in inputs] == [i == wanted for i in range(3)]


def ones(*shape, **kwargs):
    return torch.ones(*shape, **kwargs)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": ones(2, 4, 8)}, r"q must be \(B, T, H, K\), k and v \(B, S, G, K\), got \(2, 4, 8\)"),
        ({"v": ones(2, 4, 2, 9)}, r"k and v \(B, S, G, K\)"),
        ({"q": ones(3, 4, 4, 8)}, r"batch 3, got \(2, 4, 2, 8\)"),
        ({"q": ones(2, 4, 3, 8)}, r"the key heads must divide the 3 query heads, got 2"),
        ({"q": ones(2, 5, 4, 8)}, r"at least as many keys as the 5 queries .*, got 4"),
        (
            {"q": ones(2, 4, 4, 257), "k": ones(2, 4, 2, 257), "v": ones(2, 4, 2, 257)},
            "head size must be from 1 to 256, got 257",
        ),
        ({"q": ones(2, 4, 4, 8, dtype=torch.bfloat16)}, "share one float dtype; cast them, got torch.bfloat16"),
        ({"q": ones(2, 4, 4, 8, device="meta")}, "on one device; move them, got meta"),
        ({"window": 0}, "window must be None or at least 1 key .*, got 0"),
        ({"softcap": -1.0}, "softcap must be 0 .* or positive and finite, got -1.0"),
        ({"dropout_p": 1.0}, r"dropout_p must lie in \[0, 1\), got 1.0"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"q": ones(2, 4, 4, 8), "k": ones(2, 4, 2, 8), "v": ones(2, 4, 2, 8)} | change
    with pytest.raises(ValueError, match="^causal_attention: .*" + message):
        causal_attention(**arguments)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 0}, "n_kv_head must divide n_head, both at least 1, got 2 and 0"),
        ({"n_kv_head": 3}, "n_kv_head must divide n_head, both at least 1, got 3 and 4"),
        ({"qkv": ones(2, 5, 65)}, r"\(B, T, 8 K\) for 4 query and 2 key heads, got torch.float32 \(2, 5, 65\)"),
        ({"qkv": ones(5, 64)}, r"got torch.float32 \(5, 64\)"),
        ({"qkv": ones(2, 5, 64, dtype=torch.int32)}, r"floating point .*, got torch.int32"),
        ({"qkv": ones(1, 1, 8 * 257)}, "head size must be from 1 to 256, got 257"),
        ({"window": 0}, "window must be None or at least 1 key .*, got 0"),
        ({"dropout_p": 1.0}, r"dropout_p must lie in \[0, 1\), got 1.0"),
    ],
)
def test_bad_packed_input_is_named(change, message):
    arguments = {"qkv": ones(2, 5, 64), "n_head": 4, "n_kv_head": 2} | change
    with pytest.raises(ValueError, match="^causal_attention_qkvpacked: .*" + message):
        causal_attention_qkvpacked(**arguments)


@pytest.mark.plain
def test_cost_counts_visible_pairs():
    assert cost(1, 4, 4, 1, 1, 8, 2)["fwd_flops"] == 4 * 8 * (1 + 2 + 3 + 4)
    assert cost(1, 4, 6, 1, 1, 8, 2)["fwd_flops"] == 4 * 8 * (3 + 4 + 5 + 6)
    assert cost(1, 4, 4, 1, 1, 8, 2, window=2)["fwd_flops"] == 4 * 8 * (1 + 2 + 2 + 2)
