"""attention_decode against the last rows of full attention, sequence by sequence."""

import sys

import pytest
import torch

from tests.kernels.attention.cases import naive, sdpa, tensors
from tests.tolerance import assert_accurate
from tritium.bench.codegen.launches import compile_launch, record_launches
from tritium.kernels import attention_decode
from tritium.kernels.attention.decode import MAX_SPLITS, cost, launch, plan
from tritium.kernels.core.op import INTERPRET

# (B, T, S, H, G, K): one token, grouped and multi-query heads, several tokens, more rows than a tile, odd head sizes.
SHAPES = [
    (1, 1, 1, 1, 1, 16),
    (3, 1, 300, 4, 2, 64),
    (2, 5, 70, 4, 1, 40),
    (2, 130, 140, 2, 2, 16),
    (2, 1, 33, 2, 2, 128),
    (1, 2, 40, 1, 1, 256),
    (1, 3, 1000, 3, 1, 59),
]
OPTIONS = [{}, {"window": 7}, {"window": 129, "scale": 0.1}, {"softcap": 2.0}]


def caches(B, T, S, H, G, K, dtype, device):
    """q, caches with NaN behind each sequence's end, and lengths from T to S."""
    q, k, v, *_ = tensors(B, T, S, H, G, K, dtype, device)
    lengths = torch.linspace(S, T, B).round().int().to(device)
    for b, length in enumerate(lengths):
        k[b, length:] = v[b, length:] = torch.nan
    return q, k, v, lengths


@pytest.mark.parametrize(
    ("shape", "options", "dtype"),
    [
        # The longest, of which most of the programs that share it see nothing through a window, last and not with all.
        *((shape, options, torch.bfloat16) for shape in SHAPES[:-1] for options in OPTIONS),
        *((shape, {}, dtype) for shape in SHAPES[:-1] for dtype in (torch.float32, torch.float16)),
        *((SHAPES[-1], options, torch.bfloat16) for options in OPTIONS[:3]),
        (SHAPES[-1], {}, torch.float32),
        *((SHAPES[2], options, torch.float32) for options in OPTIONS),
    ],
)
def test_tokens_get_the_last_rows_of_full_attention(shape, options, dtype, device):
    q, k, v, lengths = caches(*shape, dtype, device)
    got = attention_decode(q, k, v, lengths, **options)
    peer = naive if "softcap" in options else sdpa
    for b, length in enumerate(lengths.tolist()):
        one = [q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length]]
        truth, theirs = naive(*(x.double() for x in one), **options)[0], peer(*one, **options)[0]
        assert_accurate("o", got[b : b + 1], truth, theirs, length=length)


def test_tokens_that_see_no_key_get_zero_and_empty_inputs_nothing(device):
    q, k, v, _ = caches(2, 3, 20, 2, 1, 16, torch.float32, device)
    o = attention_decode(q, k.nan_to_num(), v.nan_to_num(), torch.tensor([0, 2], device=device))
    assert not o[0].any()
    assert not o[1, 0].any()
    assert o[1, 1:].all()
    for B, T in ((0, 1), (2, 0)):
        assert attention_decode(
            q[:B, :T], k[:B], v[:B], torch.tensor([5, 5], device=device)[:B]
        ).shape == (B, T, 2, 16)


@pytest.mark.skipif(
    not (INTERPRET or torch.cuda.is_available()),
    reason="runs a kernel: needs CUDA or TRITON_INTERPRET=1",
)
def test_lengths_the_cache_does_not_have_are_cut(device, monkeypatch):
    """Where nobody looks at them: on a GPU. The last ones would wrap around in 32 bits."""
    monkeypatch.setattr(
        sys.modules["tritium.kernels.attention.decode"], "_refuse_bad_lengths", lambda *_: None
    )
    q, k, v, _ = caches(6, 2, 50, 4, 2, 16, torch.float32, device)
    k, v = k.nan_to_num(), v.nan_to_num()
    senseless = torch.tensor([51, -1, 2**32 + 3, -(2**32) + 3, 2**31, -(2**31)], device=device)
    expected = attention_decode(q, k, v, torch.tensor([50, 0] * 3, device=device))
    assert torch.equal(attention_decode(q, k, v, senseless), expected)


def test_any_strides_and_integer_lengths(device):
    q, k, v, lengths = caches(2, 2, 50, 4, 2, 16, torch.float32, device)
    expected = attention_decode(q, k, v, lengths)
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    wide = [torch.stack([x, x], -1)[..., 0] for x in (q, k, v)]
    for values in (swapped, wide):
        assert torch.equal(attention_decode(*values, lengths.long()), expected)


def test_reruns_are_bitwise_equal(device):
    values = caches(2, 1, 700, 2, 2, 64, torch.bfloat16, device)
    first = attention_decode(*values)
    assert all(
        torch.equal(attention_decode(*values), first)
        for _ in range(1000 if device.type == "cuda" else 2)
    )


def test_contract(device):
    q, k, v, lengths = caches(2, 2, 20, 4, 2, 8, torch.float32, device)
    k, v = (
        k.nan_to_num(),
        v.nan_to_num(),
    )  # a NaN is not equal to itself, which opcheck takes for a write
    torch.library.opcheck(
        torch.ops.tritium.attention_decode.default, (q, k, v, lengths, 0.5, 9, 0.0)
    )
    compiled = torch.compile(attention_decode, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, lengths), attention_decode(q, k, v, lengths))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert attention_decode(q, k, v, lengths).dtype == torch.bfloat16
    o = attention_decode(q.requires_grad_(), k, v, lengths)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        o.sum().backward()


def ones(*shape, **kwargs):
    return torch.ones(*shape, **kwargs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q": ones(2, 4, 8)},
            r"q must be \(B, T, H, K\), k_cache and v_cache \(B, S, G, K\), got \(2, 4, 8\)",
        ),
        (
            {"q": ones(3, 1, 4, 8)},
            r"must have q's batch 3 and head size 8, at most 256, got \(2, 9, 2, 8\)",
        ),
        ({"q": ones(2, 1, 0, 8)}, r"q must have at least one head, got \(2, 1, 0, 8\)"),
        ({"q": ones(2, 1, 3, 8)}, "key heads must divide the 3 query heads, got 2"),
        (
            {"q": ones(2, 1, 4, 8, dtype=torch.float16)},
            "share one float dtype; cast them, got torch.float16",
        ),
        (
            {"cache_lengths": torch.tensor([1.0, 2.0])},
            r"must be int32 or int64 \(2,\), got torch.float32 \(2,\)",
        ),
        (
            {"cache_lengths": torch.tensor([1])},
            r"must be int32 or int64 \(2,\), got torch.int64 \(1,\)",
        ),
        (
            {"cache_lengths": torch.tensor([1, 10])},
            r"must be from 0 to the cache's 9, got \[1, 10\]",
        ),
        (
            {"cache_lengths": torch.tensor([-1, 9])},
            r"must be from 0 to the cache's 9, got \[-1, 9\]",
        ),
        (
            {"cache_lengths": torch.empty(2, dtype=torch.int32, device="meta")},
            "on one device; .* cpu and meta",
        ),
        ({"cache_lengths": [3, 9]}, "cache_lengths must be Tensor, got a list"),
        ({"window": 2.5}, r"window must be int \| None, got 2.5"),
        ({"scale": -1.0}, r"scale must be None \(1 / sqrt\(K\)\) or positive and finite, got -1.0"),
        ({"window": 0}, r"window must be None or at least 1 key \(a token sees itself\), got 0"),
        ({"softcap": float("inf")}, r"softcap must be 0 \(none\) or positive and finite, got inf"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"q": ones(2, 1, 4, 8), "k_cache": ones(2, 9, 2, 8), "v_cache": ones(2, 9, 2, 8)}
    arguments |= {"cache_lengths": torch.tensor([3, 9])} | change
    with pytest.raises(ValueError, match="^attention_decode: .*" + message):
        attention_decode(**arguments)


@pytest.mark.plain
def test_one_sequence_is_shared_out_over_the_gpu_and_a_full_batch_is_not():
    one = plan(1, 1, 8192, 32, 8, 128, 2, sms=132)
    assert one.splits == min(MAX_SPLITS, 2 * 132 // 8)
    assert plan(64, 1, 1024, 12, 12, 64, 2, sms=132).splits == 1
    assert plan(1, 1, 10, 1, 1, 64, 2, sms=132).splits == 1
    prompt = plan(1, 1024, 1024, 12, 12, 64, 2, sms=132)
    assert (prompt.block_m, prompt.splits) == (64, 1)
    for K in (16, 64, 128, 256):
        for itemsize in (2, 4):
            p = plan(1, 1, 999, 4, 4, K, itemsize)
            assert p.block_n >= 16
            assert p.block_n * p.block_k * itemsize <= max(16_384, 16 * p.block_k * itemsize)


@pytest.mark.plain
def test_cost_is_the_cache_read_once():
    assert cost(2, 1, 100, 8, 2, 64, 2)["fwd_bytes"] == 2 * 2 * (100 * 2 + 8) * 64 * 2


def recorded(B, T, S, H, G, K, lengths=torch.int32):
    """The launches of one call, without tensors."""
    q, cache = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for shape in ((B, T, H, K), (B, S, G, K))
    )
    with record_launches("sm_90") as launches:
        launch(q, cache, cache, torch.empty(B, dtype=lengths, device="meta"), 0.25, S, 0.0)
    return launches


@pytest.mark.codegen
@pytest.mark.parametrize(
    ("B", "T", "S", "G"),
    [(2048, 1, 64, 32), (65_536, 1, 64, 1), (1, 2**23, 2**23, 1), (1, 1, 9000, 2)],
)
def test_grids_fit_the_machine(B, T, S, G):
    for one in recorded(B, T, S, G, G, 64):
        assert one.grid[0] < 2**31
        assert all(programs <= 65_535 for programs in one.grid[1:])


@pytest.mark.codegen
@pytest.mark.parametrize(("S", "kernels"), [(1, 1), (300, 2)])
def test_one_of_everything_compiles(S, kernels):
    """Integer arguments that are 1 are constants to Triton, which have no methods."""
    launches = recorded(1, 1, S, 1, 1, 16)
    assert len(launches) == kernels
    for one in launches:
        assert "cubin" in compile_launch(one, "sm_90").asm, one.kernel.__name__
