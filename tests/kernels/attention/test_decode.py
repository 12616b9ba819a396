"""Compare attention_decode with the last rows of full attention, sequence by sequence."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tests.kernels.attention.cases import definition, make_inputs, meta, needs_kernels, sdpa
from tests.kernels.compare import opcheck, slow_to_interpret
from tests.tolerance import assert_accurate
from tritium.bench.codegen.launches import compile_launch, record_launches
from tritium.kernels import attention_decode
from tritium.kernels.attention import decode
from tritium.kernels.attention.decode import MAX_SPLITS, cost, launch, plan

# (B, T, S, H, G, K): one token, grouped and multi-query heads, several tokens, more rows than a
# tile, odd head sizes.
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


def make_caches(B, T, S, H, G, K, dtype, device):
    """q, caches with NaN after each sequence's end, and lengths from T to S."""
    q, k, v, *_ = make_inputs(B, T, S, H, G, K, dtype, device)
    lengths = torch.linspace(S, T, B).round().int().to(device)
    for b, length in enumerate(lengths):
        k[b, length:] = torch.nan
        v[b, length:] = torch.nan
    return q, k, v, lengths


# --- 2. accuracy


@pytest.mark.parametrize(
    ("shape", "options", "dtype"),
    [
        *((shape, {}, torch.bfloat16) for shape in SHAPES[:-1]),
        # Each option with one token, with several splits and with several tokens.
        *((shape, options, torch.bfloat16) for shape in SHAPES[1:3] for options in OPTIONS[1:]),
        (SHAPES[3], OPTIONS[1], torch.bfloat16),
        (SHAPES[3], OPTIONS[2], torch.bfloat16),
        (SHAPES[5], OPTIONS[3], torch.bfloat16),
        *(
            pytest.param(shape, options, torch.bfloat16, marks=slow_to_interpret)
            for shape, options in (
                *((shape, options) for shape in (SHAPES[0], SHAPES[4]) for options in OPTIONS[1:]),
                (SHAPES[3], OPTIONS[3]),
                (SHAPES[5], OPTIONS[1]),
                (SHAPES[5], OPTIONS[2]),
            )
        ),
        *((shape, {}, dtype) for shape in SHAPES[:-1] for dtype in (torch.float32, torch.float16)),
        # The longest cache. With a window, most of its splits see no key.
        *((SHAPES[-1], options, torch.bfloat16) for options in OPTIONS[:3]),
        (SHAPES[-1], {}, torch.float32),
        *((SHAPES[2], options, torch.float32) for options in OPTIONS),
    ],
)
def test_new_tokens_match_the_last_rows_of_full_attention(shape, options, dtype, device):
    q, k, v, lengths = make_caches(*shape, dtype, device)
    got = attention_decode(q, k, v, lengths, **options)
    baseline = definition if "softcap" in options else sdpa
    for b, length in enumerate(lengths.tolist()):
        one = [q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length]]
        truth, _ = definition(*(x.double() for x in one), **options)
        theirs, _ = baseline(*one, **options)
        assert_accurate("o", got[b : b + 1], truth, theirs, length=length)


def test_equal_scores_near_the_lowest_float32_average_the_values(device):
    v = torch.randn(1, 20, 2, 16, device=device)
    q = torch.full_like(v, 1e18)
    o = attention_decode(q[:, :1], -q, v, torch.tensor([19], device=device), scale=3.0)
    torch.testing.assert_close(o, v[:, :19].mean(1, keepdim=True))


# --- 3. lengths and layouts


def test_token_that_sees_no_key_gets_zero(device):
    q, k, v, _ = make_caches(2, 3, 20, 2, 1, 16, torch.float32, device)
    lengths = torch.tensor([0, 2], device=device)
    o = attention_decode(q, k.nan_to_num(), v.nan_to_num(), lengths)
    assert not o[0].any()
    assert not o[1, 0].any()
    assert o[1, 1:].all()


@pytest.mark.parametrize(("B", "T"), [(0, 1), (2, 0)])
def test_empty_input_gives_empty_output(B, T, device):
    q, k, v, _ = make_caches(2, 3, 20, 2, 1, 16, torch.float32, device)
    lengths = torch.tensor([5, 5], device=device)[:B]
    assert attention_decode(q[:B, :T], k[:B], v[:B], lengths).shape == (B, T, 2, 16)


@needs_kernels
def test_kernel_clamps_lengths_outside_the_cache(device, monkeypatch):
    """A GPU does not check lengths. The last four would wrap around in 32 bits."""
    monkeypatch.setattr(decode, "_check_length_values", lambda *_: None)
    q, k, v, _ = make_caches(6, 2, 50, 4, 2, 16, torch.float32, device)
    k, v = k.nan_to_num(), v.nan_to_num()
    invalid = torch.tensor([51, -1, 2**32 + 3, -(2**32) + 3, 2**31, -(2**31)], device=device)
    expected = attention_decode(q, k, v, torch.tensor([50, 0] * 3, device=device))
    assert torch.equal(attention_decode(q, k, v, invalid), expected)


def test_strides_and_integer_dtype_do_not_change_the_result(device):
    q, k, v, lengths = make_caches(2, 2, 50, 4, 2, 16, torch.float32, device)
    expected = attention_decode(q, k, v, lengths)
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    strided = [torch.stack([x, x], -1)[..., 0] for x in (q, k, v)]
    for values in (swapped, strided):
        assert torch.equal(attention_decode(*values, lengths.long()), expected)


# --- 4. contract


def test_reruns_are_bitwise_equal(device):
    values = make_caches(2, 1, 700, 2, 2, 64, torch.bfloat16, device)
    first = attention_decode(*values)
    for _ in range(1000 if device.type == "cuda" else 2):
        assert torch.equal(attention_decode(*values), first)


def contract_inputs(device):
    """Without NaN: opcheck compares inputs before and after, and NaN is not equal to itself."""
    q, k, v, lengths = make_caches(2, 2, 20, 4, 2, 8, torch.float32, device)
    return q, k.nan_to_num(), v.nan_to_num(), lengths


def test_opcheck(device):
    arguments = (*contract_inputs(device), 0.5, 9, 0.0)
    opcheck(torch.ops.tritium.attention_decode.default, arguments)


def test_compiles_as_one_graph_and_follows_autocast(device):
    inputs = contract_inputs(device)
    compiled = torch.compile(attention_decode, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), attention_decode(*inputs))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert attention_decode(*inputs).dtype == torch.bfloat16


def test_output_does_not_require_a_gradient(device):
    q, *rest = contract_inputs(device)
    expected = attention_decode(q, *rest)
    o = attention_decode(q.requires_grad_(), *rest)
    assert not o.requires_grad
    assert torch.equal(o, expected)


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
            r"must have q's batch size 3 and head size 8, got \(2, 9, 2, 8\)",
        ),
        (
            {name: ones(2, 1, 2, 300) for name in ("q", "k_cache", "v_cache")},
            "the head size must be from 1 to 256, got 300",
        ),
        ({"q": ones(2, 1, 0, 8)}, r"q must have at least one head, got \(2, 1, 0, 8\)"),
        ({"q": ones(2, 1, 3, 8)}, "key heads must divide the 3 query heads, got 2"),
        (
            {"q": ones(2, 1, 4, 8, dtype=torch.float16)},
            "the same float dtype, got torch.float16, torch.float32 and torch.float32; cast them",
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
            "on the same device, got .* cpu and meta; move them",
        ),
        ({"cache_lengths": [3, 9]}, "cache_lengths must be Tensor, got a list"),
        ({"window": 2.5}, r"window must be int \| None, got 2.5"),
        ({"scale": -1.0}, r"scale must be None \(1 / sqrt\(K\)\) or positive and finite, got -1.0"),
        ({"window": 0}, r"window must be None or at least 1 key \(a query sees itself\), got 0"),
        (
            {"softcap": float("inf")},
            r"softcap must be None, 0 \(none\) or positive and finite, got inf",
        ),
    ],
)
def test_bad_input_raises(change, message):
    arguments = {"q": ones(2, 1, 4, 8), "k_cache": ones(2, 9, 2, 8), "v_cache": ones(2, 9, 2, 8)}
    arguments |= {"cache_lengths": torch.tensor([3, 9])} | change
    with pytest.raises(ValueError, match="^attention_decode: .*" + message):
        attention_decode(**arguments)


@pytest.mark.plain
def test_long_sequence_is_split_and_full_batch_is_not():
    assert plan(1, 1, 8192, 32, 8, 128, 2, sms=132).splits == min(MAX_SPLITS, 2 * 132 // 8)
    assert plan(64, 1, 1024, 12, 12, 64, 2, sms=132).splits == 1
    assert plan(1, 1, 10, 1, 1, 64, 2, sms=132).splits == 1
    prompt = plan(1, 1024, 1024, 12, 12, 64, 2, sms=132)
    assert (prompt.block_m, prompt.splits) == (64, 1)


@pytest.mark.plain
@pytest.mark.parametrize("K", [16, 64, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tile_of_keys_takes_at_most_16_kb_or_16_keys(K, itemsize):
    p = plan(1, 1, 999, 4, 4, K, itemsize)
    assert p.block_n >= 16
    assert p.block_n * p.block_k * itemsize <= max(16_384, 16 * p.block_k * itemsize)


@pytest.mark.plain
def test_cost_reads_the_cache_once():
    assert cost(2, 1, 100, 8, 2, 64, 2)["fwd_bytes"] == 2 * 2 * (100 * 2 + 8) * 64 * 2


# --- 5. ahead-of-time compilation


def record(B, T, S, H, G, K):
    """The launches of one call."""
    lengths = meta(B, dtype=torch.int32)
    with record_launches("sm_90") as launches:
        launch(meta(B, T, H, K), meta(B, S, G, K), meta(B, S, G, K), lengths, 0.25, S, 0.0)
    return launches


@pytest.mark.codegen
@pytest.mark.parametrize(
    ("B", "T", "S", "G"),
    [(2048, 1, 64, 32), (65_536, 1, 64, 1), (1, 2**23, 2**23, 1), (1, 1, 9000, 2)],
)
def test_grids_are_within_the_limits_of_cuda(B, T, S, G):
    for one in record(B, T, S, G, G, 64):
        assert one.grid[0] < 2**31
        assert all(programs <= 65_535 for programs in one.grid[1:])


@pytest.mark.codegen
@pytest.mark.parametrize(("S", "kernels"), [(1, 1), (300, 2)])
def test_sizes_of_one_compile(S, kernels):
    """Triton makes an integer argument of 1 a constant, which lacks the methods of a tensor."""
    launches = record(1, 1, S, 1, 1, 16)
    assert len(launches) == kernels
    for one in launches:
        assert "cubin" in compile_launch(one, "sm_90").asm, one.kernel.__name__


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("lengths_axis", [0, None])
def test_vmap_matches_a_loop(lengths_axis, device):
    q, k, v, lengths = make_caches(6, 1, 9, 2, 1, 16, torch.float32, device)
    batch = [x.unflatten(0, (3, 2)) for x in (q, k.nan_to_num(), v.nan_to_num(), lengths)]
    if lengths_axis is None:
        batch[3] = batch[3][0]
    got = torch.func.vmap(attention_decode, (0, 0, 0, lengths_axis))(*batch)
    for i in range(3):
        given = batch[3] if lengths_axis is None else batch[3][i]
        torch.testing.assert_close(got[i], attention_decode(*(x[i] for x in batch[:3]), given))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "trace",
    [lambda f, arguments: make_fx(lambda *x: f(*x))(*arguments), torch.jit.trace],
    ids=["make_fx", "jit"],
)
def test_a_traced_graph_reads_the_lengths_that_it_gets(trace, device):
    *tensors, lengths = make_caches(2, 1, 9, 2, 1, 16, torch.float32, device)
    tensors = [x.nan_to_num() for x in tensors]
    traced = trace(attention_decode, (*tensors, lengths))
    for given in (lengths, torch.tensor([2, 7], dtype=torch.int32, device=device)):
        torch.testing.assert_close(traced(*tensors, given), attention_decode(*tensors, given))
