"""causal_attention_qkvpacked against causal_attention of its parts."""

import pytest
import torch

from tests.kernels.attention.cases import assert_bitwise_equal, attend, make_inputs, packed, run
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
        *((BLOCK_QUERIES + 1, 2, 1, 16, torch.bfloat16, options) for options in OPTIONS),
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
def test_empty_input_gives_empty_output_and_gradient(B, T, device):
    qkv = torch.ones(B, T, 4 * 8, device=device, requires_grad=True)
    o = causal_attention_qkvpacked(qkv, 2, n_kv_head=1)
    assert o.shape == (B, T, 16)
    o.sum().backward()
    assert qkv.grad.shape == qkv.shape


def test_opcheck(device):
    q, k, v, do, _ = make_inputs(1, 6, 6, 4, 2, 8, torch.float32, device)
    qkv = packed(q, k, v)
    # The schema has scale, window, softcap, dropout_p and seed in place of the options.
    options = (0.5, 4, 2.0, 0.1, torch.full((), 3, device=device))
    forward = torch.ops.tritium.causal_attention_qkvpacked_fwd.default
    backward = torch.ops.tritium.causal_attention_qkvpacked_bwd.default
    torch.library.opcheck(forward, (qkv.clone().requires_grad_(), 4, 2, None, *options))
    o, lse = forward(qkv, 4, 2, None, *options)
    torch.library.opcheck(backward, (do.flatten(2), qkv, o, lse, 4, 2, None, *options))


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
