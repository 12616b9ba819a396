"""causal_attention_qkvpacked against causal_attention of its parts."""

import pytest
import torch

from tests.kernels.attention.cases import assert_bitwise_equal, attend, make_inputs, packed, run
from tests.kernels.compare import opcheck, slow_to_interpret
from tests.tolerance import assert_accurate
from tritium.kernels import causal_attention_qkvpacked
from tritium.kernels.attention._reference import BLOCK_QUERIES

OPTIONS = [
    {},
    {"window": 7, "softcap": 3.0, "scale": 0.5},
    {"dropout_p": 0.2, "seed": 9},
]


def attend_packed(n_head, **options):
    return lambda qkv: (causal_attention_qkvpacked(qkv, n_head, **options),)


@pytest.mark.parametrize(
    ("T", "H", "G", "K", "dtype", "options"),
    [
        *(
            (17, 3, 3, 40, dtype, options)
            for dtype in (torch.float32, torch.bfloat16)
            for options in OPTIONS
        ),
        *((BLOCK_QUERIES + 1, 2, 1, 16, torch.bfloat16, options) for options in OPTIONS[1:]),
        pytest.param(
            BLOCK_QUERIES + 1, 2, 1, 16, torch.bfloat16, OPTIONS[0], marks=slow_to_interpret
        ),
        (33, 4, 1, 24, torch.bfloat16, OPTIONS[0]),
        (33, 4, 1, 24, torch.float32, OPTIONS[1]),
        (33, 4, 1, 24, torch.bfloat16, OPTIONS[2]),
        (1, 1, 1, 16, torch.float32, OPTIONS[1]),
        (1, 1, 1, 16, torch.bfloat16, OPTIONS[2]),
    ],
)
def test_packed_matches_separate_tensors(T, H, G, K, dtype, options, device):
    q, k, v, do, _ = make_inputs(2, T, T, H, G, K, dtype, device)
    o, *grads = run(attend(**options), (q, k, v), [do])
    got = run(attend_packed(H, n_kv_head=G, **options), [packed(q, k, v)], [do.flatten(2)])
    assert_bitwise_equal(got, (o.flatten(2), packed(*grads)))


def test_strides_do_not_change_the_result(device):
    """Every other column, the second half of the columns, the batch as second axis in memory."""
    qkv, do = torch.randn(2, 9, 2 * 6 * 8, device=device), torch.randn(2, 16, 9, device=device).mT
    swapped = qkv[..., :48].transpose(0, 1).contiguous().transpose(0, 1)
    for view in (qkv[..., ::2], qkv[..., 48:], swapped):
        got = run(attend_packed(2), [view], [do])
        assert_bitwise_equal(got, run(attend_packed(2), [view.contiguous()], [do.contiguous()]))


@pytest.mark.parametrize(("B", "T"), [(0, 4), (2, 0)])
@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_empty_input_gives_empty_output_and_gradient(B, T, n_kv_head, device):
    width = (2 + 2 * n_kv_head) * 8
    qkv = torch.ones(B, T, width, device=device, requires_grad=True)
    o = causal_attention_qkvpacked(qkv, 2, n_kv_head=n_kv_head)
    assert o.shape == (B, T, 16)
    o.sum().backward()
    assert qkv.grad.shape == qkv.shape


# --- the gradient of a bias that qkv contains


def cumulative(*ends, device):
    return torch.tensor([0, *ends], dtype=torch.int32, device=device)


def attend_biased(n_head, **options):
    """(o,) of qkv and its bias."""
    return lambda qkv, bias: (causal_attention_qkvpacked(qkv, n_head, added_bias=bias, **options),)


@pytest.mark.plain
@pytest.mark.parametrize(
    "options", [{}, {"window": 3, "softcap": 2.0}, {"dropout_p": 0.2, "seed": 1}, {"ends": (2, 4)}]
)
def test_gradient_of_the_bias_passes_gradcheck(options):
    """The gradient is the one that the bias gets where it is added, if it is not detached there."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 32, generator=generator, dtype=torch.float64).requires_grad_()
    bias = torch.randn(32, generator=generator, dtype=torch.float64).requires_grad_()
    options = dict(options)
    if "ends" in options:
        options["cu_seqlens"] = cumulative(*options.pop("ends"), device="cpu")

    def by_attention(x, bias):
        qkv = x + bias.detach()
        return causal_attention_qkvpacked(qkv, 4, n_kv_head=2, added_bias=bias, **options)

    def by_addition(x, bias):
        return causal_attention_qkvpacked(x + bias, 4, n_kv_head=2, **options)

    assert torch.autograd.gradcheck(by_addition, (x, bias))
    do = torch.randn(2, 3, 16, generator=generator, dtype=torch.float64)
    got, expected = (
        torch.autograd.grad(f(x, bias), (x, bias), do) for f in (by_attention, by_addition)
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("T", "H", "G", "K", "options"),
    [
        (140, 2, 2, 16, {}),
        (129, 2, 2, 24, {"window": 7, "softcap": 3.0}),
        (33, 2, 1, 40, {"dropout_p": 0.2, "seed": 9}),
        (1, 1, 1, 16, {}),
        (70, 2, 1, 16, {"ends": (5, 5, 90, 131)}),
    ],
)
def test_gradient_of_the_bias_is_accurate(T, H, G, K, options, dtype, device):
    """With documents the last tokens are padding: they add nothing.

    In these cases the bias does not change the tiles, so o and dqkv are bitwise the same.
    """
    q, k, v, do, _ = make_inputs(2, T, T, H, G, K, dtype, device)
    qkv, do, options = packed(q, k, v), do.flatten(2), dict(options)
    if "ends" in options:
        options["cu_seqlens"] = cumulative(*options.pop("ends"), device=device)
    bias = torch.ones(qkv.shape[-1], device=device)
    o, dqkv, dbias = run(attend_biased(H, n_kv_head=G, **options), (qkv, bias), [do])
    assert_bitwise_equal((o, dqkv), run(attend_packed(H, n_kv_head=G, **options), [qkv], [do]))
    assert dbias.dtype == torch.float32
    # dqkv is rounded, and dbias sums what is not rounded yet: one rounding per term. Independent
    # roundings add up to one of the root of the sum of the squared terms.
    terms = dqkv.double().flatten(0, 1)
    exact, in_dtype = terms.sum(0), dqkv.sum((0, 1)).float()
    scale = terms.square().sum(0).max().sqrt().item()
    assert_accurate("dbias", dbias, exact, in_dtype, length=2 * T, scale=scale, terms=dtype)


def test_only_the_bias_can_get_a_gradient(device):
    """Also under autocast, where the bias is float32 and its gradient is too."""
    q, k, v, do, _ = make_inputs(2, 20, 20, 2, 1, 16, torch.bfloat16, device)
    qkv, do, options = packed(q, k, v), do.flatten(2), {"n_kv_head": 1, "window": 9}
    bias = torch.zeros(qkv.shape[-1], device=device, requires_grad=True)
    _, _, both = run(attend_biased(2, **options), (qkv, bias), [do])
    for x in (qkv, qkv.float()):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            (o,) = attend_biased(2, **options)(x, bias)
        (alone,) = torch.autograd.grad(o, bias, do)
        assert_bitwise_equal([alone], [both])


def test_compiles_with_a_bias_as_one_graph(device):
    q, k, v, do, _ = make_inputs(2, 12, 12, 4, 2, 8, torch.float32, device)
    inputs = packed(q, k, v), torch.zeros(64, device=device)
    for options in ({"window": 5}, {}):
        function = attend_biased(4, n_kv_head=2, **options)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert_bitwise_equal(
            run(compiled, inputs, [do.flatten(2)]), run(function, inputs, [do.flatten(2)])
        )


def test_opcheck(device):
    q, k, v, do, _ = make_inputs(1, 6, 6, 4, 2, 8, torch.float32, device)
    qkv = packed(q, k, v)
    # The schema has scale, window, softcap, dropout_p, seed and cu_seqlens in place of the options.
    options = (0.5, 4, 2.0, 0.1, torch.full((), 3, device=device), None)
    forward = torch.ops.tritium.causal_attention_qkvpacked_fwd.default
    backward = torch.ops.tritium.causal_attention_qkvpacked_bwd.default
    for bias in (None, qkv[0, 0].clone().requires_grad_()):
        inputs = (qkv.clone().requires_grad_(), bias, 4, 2)
        opcheck(forward, (*inputs, *options))
    o, lse = forward(qkv, None, 4, 2, *options)
    for needs_bias in (False, True):
        inputs = (do.flatten(2), qkv, o, lse, 4, 2, needs_bias)
        opcheck(backward, (*inputs, *options))


def test_compiles_as_one_graph_and_follows_autocast(device):
    q, k, v, do, _ = make_inputs(2, 12, 12, 4, 2, 8, torch.float32, device)
    qkv, do = packed(q, k, v), do.flatten(2)
    function = attend_packed(4, n_kv_head=2, window=5)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_bitwise_equal(run(compiled, [qkv], [do]), run(function, [qkv], [do]))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        o = function(qkv)
    assert_bitwise_equal(o, function(qkv.bfloat16()))


def ones(*shape, **kwargs):
    return torch.ones(*shape, **kwargs)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 2.0}, "n_head must be int, got 2.0"),
        ({"window": 2.5}, r"window must be int \| None, got 2.5"),
        ({"cu_seqlens": [0, 10]}, r"cu_seqlens must be Tensor \| None, got a list"),
        ({"n_head": 0}, "n_kv_head must divide n_head, both at least 1, got 2 and 0"),
        ({"n_kv_head": 3}, "n_kv_head must divide n_head, both at least 1, got 3 and 4"),
        (
            {"qkv": ones(2, 5, 65)},
            r"\(B, T, 8 K\) for 4 query and 2 key heads, got torch.float32 \(2, 5, 65\)",
        ),
        ({"qkv": ones(5, 64)}, r"got torch.float32 \(5, 64\)"),
        ({"qkv": ones(2, 5, 64, dtype=torch.int32)}, r"floating point .*, got torch.int32"),
        ({"qkv": ones(1, 1, 8 * 257)}, "head size must be from 1 to 256, got 257"),
        ({"added_bias": ones(63)}, r"added_bias must be floating point \(64,\) .*, got .* \(63,\)"),
        ({"window": 0}, "window must be None or at least 1 key .*, got 0"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        (
            {"cu_seqlens": torch.tensor([0, 11], dtype=torch.int32)},
            r"cu_seqlens must rise from 0 to at most the 10 tokens, got \[0, 11\]",
        ),
    ],
)
def test_bad_input_raises(change, message):
    arguments = {"qkv": ones(2, 5, 64), "n_head": 4, "n_kv_head": 2} | change
    with pytest.raises(ValueError, match="^causal_attention_qkvpacked: .*" + message):
        causal_attention_qkvpacked(**arguments)
