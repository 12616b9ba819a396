"""Compare causal_attention with a definition without blocks, and with PyTorch."""

import pytest
import torch

from tests.kernels.attention.cases import (
    DTYPES,
    assert_bitwise_equal,
    assert_matches_definition,
    attend,
    attend_lse,
    definition,
    make_inputs,
    meta,
    needs_kernels,
    packed,
    run,
    sdpa,
)
from tests.kernels.compare import opcheck, slow_to_interpret
from tritium.bench.codegen.disassembly import resources
from tritium.bench.codegen.launches import TARGETS, compile_launch, record_launches
from tritium.bench.codegen.machine_code import MULTIPROCESSORS
from tritium.kernels import causal_attention, causal_attention_qkvpacked
from tritium.kernels.attention.causal import cost
from tritium.kernels.attention.launch import launch_bwd, launch_fwd
from tritium.kernels.attention.options import AttentionOptions

OPTIONS = [
    {},
    {"window": 5},
    {"softcap": 2.0},
    {"scale": 0.3},
    {"window": 7, "softcap": 3.0, "scale": 0.5},
]
# (B, T, S, H, G, K): one token, odd lengths, lengths next to a tile's, several tiles; grouped and
# multi-query heads; more keys than queries; head sizes that are not a power of two; the smallest
# and the largest head size.
SHAPES = [
    (1, 1, 1, 1, 1, 16),
    (2, 17, 17, 3, 3, 40),
    (2, 9, 20, 4, 2, 16),
    (1, 1, 300, 2, 2, 24),
    (1, 150, 300, 1, 1, 32),
    (1, 127, 127, 1, 1, 59),
    (2, 128, 128, 2, 1, 64),
    (1, 129, 129, 2, 1, 16),
    (1, 70, 196, 1, 1, 16),  # the first query sees all keys of the first tiles but one
    (1, 33, 65, 2, 1, 80),
    (1, 70, 70, 1, 1, 96),
    (1, 40, 40, 1, 1, 111),
    (1, 131, 131, 1, 1, 128),
    (1, 65, 65, 1, 1, 256),
]


# --- 1. math


@pytest.mark.plain
@pytest.mark.parametrize("options", [*OPTIONS, {"dropout_p": 0.3, "seed": 3}])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("T", [5, 8])
def test_gradients_match_finite_differences(T, return_lse, options):
    """There are 8 keys. T = 8 without options and lse runs SDPA. Other cases run the reference."""
    q, k, v, *_ = (x.requires_grad_() for x in make_inputs(1, T, 8, 4, 2, 3, torch.float64, "cpu"))
    function = (attend_lse if return_lse else attend)(**options)
    assert torch.autograd.gradcheck(function, (q, k, v))


@pytest.mark.plain
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES[:5] + SHAPES[7:8])
def test_reference_matches_definition(shape, options):
    q, k, v, *incoming = make_inputs(*shape, torch.float64, "cpu")
    got = run(attend_lse(**options), (q, k, v), incoming)
    expected = run(lambda *x: definition(*x, **options), (q, k, v), incoming)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.plain
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "shape", [(2, 17, 17, 6, 2, 5), (2, 9, 20, 4, 2, 16), (0, 3, 3, 2, 1, 4), (2, 0, 0, 2, 1, 4)]
)
def test_result_without_lse_matches_definition(shape, options):
    """SDPA computes the result if there are as many queries as keys and no options."""
    _, T, S, H, G, _ = shape
    q, k, v, do, _ = make_inputs(*shape, torch.float64, "cpu")
    expected = run(lambda *x: definition(*x, **options)[:1], (q, k, v), [do])
    functions = [attend(**options)]
    if T == S:
        functions.append(
            lambda *x: [
                causal_attention_qkvpacked(packed(*x), H, n_kv_head=G, **options).view(do.shape)
            ]
        )
    for function in functions:
        for a, b in zip(run(function, (q, k, v), [do]), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.plain
def test_lse_gives_attention_sinks():
    """The recipe of docs/coming-from.md matches a softmax with a sink among the scores."""
    q, k, v, do, _ = make_inputs(2, 7, 7, 4, 2, 8, torch.float64, "cpu")
    sink = torch.linspace(-1, 1, 4, dtype=torch.float64)

    def recipe(q, k, v, sink):
        o, lse = causal_attention(q, k, v, return_lse=True)
        return ((o * torch.sigmoid(lse - sink[:, None]).mT[..., None].to(o.dtype)),)

    def expected(q, k, v, sink):
        k, v = (x.repeat_interleave(2, dim=2) for x in (k, v))
        s = torch.einsum("bthk,bshk->bhts", q, k) * 8**-0.5
        s = s.masked_fill(torch.ones(7, 7).triu(1).bool(), -float("inf"))
        s = torch.cat((s, sink[:, None, None].expand(2, -1, 7, 1)), dim=-1)
        return (torch.einsum("bhts,bshk->bthk", s.softmax(-1)[..., :-1], v),)

    found = [run(function, (q, k, v, sink), [do]) for function in (recipe, expected)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("T", "options", "uses_sdpa"),
    [
        (8, {}, True),
        (8, {"window": 8}, True),
        (8, {"scale": 0.3}, True),
        (5, {}, False),
        (8, {"window": 7}, False),
        (8, {"softcap": 2.0}, False),
        (8, {"dropout_p": 0.1}, False),
        (8, {"return_lse": True}, False),
        (8, {"dtype": torch.bfloat16}, False),
    ],
)
def test_plain_attention_on_a_cpu_in_32_bits_uses_sdpa(T, options, uses_sdpa):
    options = {"dtype": torch.float32} | options
    q, k, v, *_ = make_inputs(1, T, 8, 2, 1, 4, options.pop("dtype"), "cpu")
    with torch.profiler.profile() as profile:
        causal_attention(q, k, v, **options)
    names = {event.name for event in profile.events()}
    assert ("aten::scaled_dot_product_attention" in names) == uses_sdpa
    assert ("tritium::causal_attention_fwd" in names) != uses_sdpa


# --- 2. accuracy


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, dtype) for shape in SHAPES for dtype in DTYPES),
        # Many tiles. float32 tiles are smaller, so the shapes above have many already.
        ((1, 1000, 1000, 1, 1, 64), torch.bfloat16),
    ],
)
def test_accuracy_compared_with_sdpa(shape, dtype, device):
    q, k, v, *incoming = make_inputs(*shape, dtype, device)
    got = run(attend_lse(), (q, k, v), incoming)
    assert_matches_definition(got, (q, k, v), incoming, baseline=sdpa)


@pytest.mark.parametrize(
    ("options", "T", "S", "dtype"),
    [
        *(({"window": window}, 150, 300, torch.bfloat16) for window in (1, 40, 128, 129)),
        *(({"window": window}, 300, 300, torch.bfloat16) for window in (2, 127, 128, 200)),
        *(
            pytest.param({"window": window}, T, 300, torch.bfloat16, marks=slow_to_interpret)
            for window, T in ((1, 300), (2, 150), (40, 300), (127, 150), (129, 300), (200, 150))
        ),
        # float32 tiles are smaller, so a shorter sequence has as many edges.
        *(({"window": window}, 50, 100, torch.float32) for window in (1, 32, 33)),
        *(({"window": window}, 100, 100, torch.float32) for window in (31, 32, 70)),
        *(
            pytest.param({"window": window}, T, 100, torch.float32, marks=slow_to_interpret)
            for window, T in ((1, 100), (31, 50), (33, 100), (70, 50))
        ),
        # Windows that contain whole tiles. In some tiles the last query misses one key only.
        ({"window": 255}, 384, 384, torch.bfloat16),
        ({"window": 127}, 200, 200, torch.float32),
        ({"window": 129}, 300, 300, torch.float16),
        *(({"scale": 0.7}, 150, 150, dtype) for dtype in DTYPES),
    ],
)
def test_accuracy_with_a_window_or_a_scale(options, T, S, dtype, device):
    q, k, v, *incoming = make_inputs(1, T, S, 2, 1, 16, dtype, device)
    got = run(attend_lse(**options), (q, k, v), incoming)
    assert_matches_definition(got, (q, k, v), incoming, baseline=sdpa, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{"softcap": 0.5}, {"softcap": 30.0}, {"softcap": 2.0, "window": 50, "scale": 1.0}]
)
def test_accuracy_with_a_softcap(options, dtype, device):
    q, k, v, *incoming = make_inputs(1, 140, 140, 2, 1, 32, dtype, device)
    got = run(attend_lse(**options), (q, k, v), incoming)
    assert_matches_definition(got, (q, k, v), incoming, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_ten_thousand_give_finite_results(dtype, device):
    q, k, v, *incoming = make_inputs(1, 140, 140, 2, 2, 16, dtype, device)
    largest = torch.einsum("bthk,bshk->bhts", q.double(), k.double()).abs().max().item()
    for options in ({}, {"softcap": 50.0}, {"window": 3}):
        got = run(attend_lse(scale=1e4 / largest, **options), (q, k, v), incoming)
        assert all(value.isfinite().all() for value in got)


@pytest.mark.parametrize("T", [5, 140])
def test_equal_scores_near_the_lowest_float32_average_the_values(T, device):
    v = make_inputs(1, T, T, 2, 2, 16, torch.float32, device)[2]
    q = torch.full_like(v, 1e18)
    count = torch.arange(1, T + 1, device=device)[:, None, None]
    torch.testing.assert_close(causal_attention(q, -q, v, scale=3.0), v.cumsum(1) / count)


@pytest.mark.parametrize("dtype", DTYPES)
def test_query_that_sees_one_key_returns_its_value_exactly(dtype, device):
    q, k, v, *_ = make_inputs(1, 140, 140, 2, 2, 16, dtype, device)
    for scale in (None, 1e-3, 300.0, 3333.3):
        assert torch.equal(causal_attention(q, k, v, window=1, scale=scale), v)
        assert torch.equal(causal_attention(q, k, v, scale=scale)[:, 0], v[:, 0])


# --- 3. layouts and special shapes


def test_views_of_a_packed_projection_match_contiguous_tensors(device):
    """The incoming gradient is not contiguous either."""
    B, T, H, K = 2, 20, 3, 8
    qkv = torch.randn(B, T, 3 * H * K, device=device)
    views = [part.view(B, T, H, K) for part in qkv.split(H * K, dim=-1)]
    do = torch.randn(B, H, K, T, device=device).permute(0, 3, 1, 2)
    got = run(attend(), views, [do])
    assert_bitwise_equal(got, run(attend(), [x.contiguous() for x in views], [do.contiguous()]))


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (2, 1, 0)])
def test_strides_do_not_change_the_result(order, device):
    """Axes in any order in memory, an axis repeated by expand, every other column of a head."""
    B, T, H, K = 2, 20, 2, 8
    sizes = [(B, T, H)[axis] for axis in order]
    q, k, v = (
        torch.randn(*sizes, K, device=device).permute(*(order.index(axis) for axis in range(3)), 3)
        for _ in range(3)
    )
    repeated = q, k[:1].expand(B, -1, -1, -1), v[:, :, :1].expand(-1, -1, H, -1)
    for values in ((q, k, v), repeated, [x[..., ::2] for x in (q, k, v)]):
        do = torch.randn(1, 1, 1, values[0].shape[-1], device=device).expand(values[0].shape)
        got = run(attend(), values, [do])
        copies = [x.contiguous() for x in values]
        assert_bitwise_equal(got, run(attend(), copies, [do.contiguous()]))


@pytest.mark.parametrize(("B", "T", "S"), [(0, 4, 4), (2, 0, 4), (2, 0, 0)])
def test_empty_inputs_give_empty_outputs_and_zero_gradients(B, T, S, device):
    inputs = make_inputs(B, T, S, 2, 1, 8, torch.float32, device)
    q, k, v, *_ = (x.requires_grad_() for x in inputs)
    o = causal_attention(q, k, v)
    assert o.shape == q.shape
    o.sum().backward()
    assert torch.equal(k.grad, torch.zeros_like(k))


def test_window_of_every_key_matches_no_window(device):
    q, k, v, *_ = make_inputs(1, 40, 40, 2, 2, 16, torch.float32, device)
    assert torch.equal(causal_attention(q, k, v, window=40), causal_attention(q, k, v))
    assert torch.equal(causal_attention(q, k, v, window=4000), causal_attention(q, k, v))


# --- 4. contract


def test_opcheck(device):
    q, k, v, do, dlse = make_inputs(1, 6, 9, 4, 2, 8, torch.float32, device)
    # The schema has scale, window, softcap, dropout_p, seed and cu_seqlens in place of the options.
    options = (0.5, 4, 2.0, 0.1, torch.full((), 3, device=device), None)
    forward = torch.ops.tritium.causal_attention_fwd.default
    backward = torch.ops.tritium.causal_attention_bwd.default
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    opcheck(forward, (*leaves, *options))
    o, lse = forward(q, k, v, *options)
    opcheck(backward, (do, dlse, q, k, v, o, lse, *options))
    opcheck(backward, (do, None, q, k, v, o, lse, 0.5, 9, 0.0, 0.0, None, None))


def test_compiles_as_one_graph(device):
    q, k, v, *incoming = make_inputs(2, 12, 12, 4, 2, 8, torch.float32, device)
    function = attend_lse(window=5)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = run(compiled, (q, k, v), incoming)
    assert_bitwise_equal(got, run(function, (q, k, v), incoming))


def test_autocast_casts_the_inputs(device):
    q, k, v, *_ = make_inputs(1, 12, 12, 2, 2, 8, torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        o, lse = causal_attention(q, k, v, return_lse=True)
    expected = causal_attention(*(x.bfloat16() for x in (q, k, v)), return_lse=True)
    assert (o.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert_bitwise_equal((o, lse), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reruns_are_bitwise_equal(dtype, device):
    q, k, v, *incoming = make_inputs(1, 150, 150, 2, 1, 64, dtype, device)
    first = run(attend_lse(window=100), (q, k, v), incoming)
    for _ in range(1000 if device.type == "cuda" else 2):
        assert_bitwise_equal(run(attend_lse(window=100), (q, k, v), incoming), first)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA and 48 GB of memory")
def test_more_than_two_to_the_31_elements(device):
    """The last of 2,100 sequences, 6.6e9 elements into qkv, gets the result that it gets alone."""
    if torch.cuda.mem_get_info()[0] < 48e9:
        pytest.skip("needs 48 GB free")

    def attend_packed(x):
        return (causal_attention_qkvpacked(x, 16),)

    qkv = torch.randn(2100, 1024, 3 * 1024, device=device, dtype=torch.bfloat16)
    do = torch.randn(2100, 1024, 1024, device=device, dtype=torch.bfloat16)
    alone = run(attend_packed, [qkv[-1:]], [do[-1:]])
    assert_bitwise_equal([x[-1:] for x in run(attend_packed, [qkv], [do])], alone)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_one_input_alone_can_require_a_gradient(wanted, device):
    inputs = make_inputs(1, 7, 7, 2, 2, 8, torch.float32, device)[:3]
    inputs[wanted].requires_grad_()
    causal_attention(*inputs).square().sum().backward()
    assert [x.grad is not None for x in inputs] == [i == wanted for i in range(3)]


def ones(*shape, **kwargs):
    return torch.ones(*shape, **kwargs)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q": ones(2, 4, 8)},
            r"q must be \(B, T, H, K\), k and v \(B, S, G, K\), got \(2, 4, 8\)",
        ),
        ({"v": ones(2, 4, 2, 9)}, r"k and v \(B, S, G, K\)"),
        ({"q": ones(3, 4, 4, 8)}, r"batch size 3, got \(2, 4, 2, 8\)"),
        ({"q": ones(2, 4, 0, 8)}, r"q must have at least one head, got \(2, 4, 0, 8\)"),
        ({"q": ones(2, 4, 3, 8)}, r"the key heads must divide the 3 query heads, got 2"),
        ({"q": ones(2, 4, 4, 9)}, r"k and v must have q's head size 9, got \(2, 4, 2, 8\)"),
        ({"q": ones(2, 5, 4, 8)}, r"at least as many keys as the 5 queries, got 4"),
        (
            {"q": ones(2, 4, 4, 8, dtype=torch.bfloat16)},
            "the same float dtype, got torch.bfloat16, torch.float32 and torch.float32; cast them",
        ),
        ({"q": ones(2, 4, 4, 8, device="meta")}, "on the same device, got meta.*; move them"),
        ({"dropout_p": None}, "dropout_p must be float, got None"),
        ({"dropout_p": False}, "dropout_p must be float, got False"),
        ({"seed": 1.5}, r"seed must be int \| Tensor \| None, got 1.5"),
        ({"window": True}, r"window must be int \| None, got True"),
        ({"scale": torch.tensor(0.1)}, r"scale must be float \| None, got torch.float32 \(\)"),
        ({"return_lse": 1}, "return_lse must be bool, got 1"),
        (
            {name: ones(2, 4, 2, 8).to(torch.float8_e5m2) for name in "qkv"},
            "q must be one of .*, got torch.float8_e5m2; cast it",
        ),
    ],
)
def test_bad_input_raises(change, message):
    arguments = {"q": ones(2, 4, 4, 8), "k": ones(2, 4, 2, 8), "v": ones(2, 4, 2, 8)} | change
    with pytest.raises(ValueError, match="^causal_attention: .*" + message):
        causal_attention(**arguments)


@needs_kernels
def test_float64_raises_under_the_name_of_the_public_function(device):
    q, k, v, *_ = make_inputs(1, 4, 4, 2, 2, 8, torch.float64, device)
    message = "the kernel takes float32, bfloat16 or float16, got float64"
    names = "causal_attention or causal_attention_varlen"
    with pytest.raises(TypeError, match=f"^{names}: {message}"):
        causal_attention(q, k, v)
    weight = torch.ones(8, dtype=torch.float64, device=device)
    for options in ({}, {"q_norm_weight": weight, "k_norm_weight": weight}):
        with pytest.raises(TypeError, match=f"^causal_attention_qkvpacked: {message}"):
            causal_attention_qkvpacked(packed(q, k, v), 2, **options)


@pytest.mark.plain
def test_cost_counts_visible_pairs():
    assert cost(1, 4, 4, 1, 1, 8, 2)["fwd_flops"] == 4 * 8 * (1 + 2 + 3 + 4)
    assert cost(1, 4, 6, 1, 1, 8, 2)["fwd_flops"] == 4 * 8 * (3 + 4 + 5 + 6)
    assert cost(1, 4, 4, 1, 1, 8, 2, window=2)["fwd_flops"] == 4 * 8 * (1 + 2 + 2 + 2)


# --- 5. ahead-of-time compilation; the bench's golden table covers the shipped head sizes


@pytest.mark.codegen
@pytest.mark.parametrize("arch", [name for name in TARGETS if name != "gfx950"])
def test_all_options_at_the_largest_head_size_fit_the_device(arch):
    """A window, softcap, dropout and documents. A kernel that does not fit compiles to a trap."""
    q, k = meta(1, 4096, 4, 256), meta(1, 4096, 2, 256)
    lse = meta(1, 4, 4096, dtype=torch.float32)
    cu_seqlens, seed = meta(9, dtype=torch.int32), meta(dtype=torch.int64)
    options = AttentionOptions(
        scale=0.1, window=512, softcap=30.0, dropout_p=0.1, seed=seed, cu_seqlens=cu_seqlens
    )
    with record_launches(arch) as launches:
        launch_fwd(q, k, k, options)
        launch_bwd(q, lse, q, k, k, q, lse, options)
    limits = MULTIPROCESSORS[arch]
    for launch in launches:
        compiled = compile_launch(launch, arch)
        found = resources(compiled)
        assert found.shared_bytes <= limits.shared_bytes - limits.shared_reserved
        if launch.kernel.__name__ != "_causal_attention_padding_kernel":  # it needs few
            assert found.registers > 16, f"{launch.kernel.__name__} does nothing"
        assert getattr(compiled.metadata, "tmem_size", 0) <= 512
