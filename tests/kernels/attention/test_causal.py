"""causal_attention and causal_attention_qkvpacked against the definition written out in one piece, and against PyTorch's."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.kernels.attention.cases import (
    FLOATS,
    assert_like_the_definition,
    naive,
    ours,
    packed,
    run,
    sdpa,
    tensors,
)
from tritium.bench.codegen.disassembly import resources
from tritium.bench.codegen.launches import TARGETS, compile_launch, record_launches
from tritium.bench.codegen.machine_code import MULTIPROCESSORS
from tritium.kernels import causal_attention, causal_attention_qkvpacked
from tritium.kernels.attention._launch import (
    FLOAT32_TILES,
    TILES,
    launch_bwd,
    launch_fwd,
    padded,
    plan,
)
from tritium.kernels.attention._reference import BLOCK_QUERIES
from tritium.kernels.attention.causal import _launch as _attention_launch
from tritium.kernels.attention.causal import cost
from tritium.kernels.core.op import INTERPRET
from tritium.kernels.core.philox import random_bits

OPTIONS = [
    {},
    {"window": 5},
    {"softcap": 2.0},
    {"scale": 0.3},
    {"window": 7, "softcap": 3.0, "scale": 0.5},
]
# (B, T, S, H, G, K): one token, odd, around a tile, several tiles; grouped and multi-query; more keys than queries; head sizes
# that are no power of two, the smallest and the largest.
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
needs_kernels = pytest.mark.skipif(
    not (INTERPRET or torch.cuda.is_available()),
    reason="compares kernels: needs CUDA or TRITON_INTERPRET=1",
)


# --- 1. math


@pytest.mark.plain
@pytest.mark.parametrize("options", [*OPTIONS, {"dropout_p": 0.3, "seed": 3}])
def test_gradients_of_the_reference_are_those_of_its_forward(options):
    for T in (5, 8):  # as many queries as keys have a path of their own
        q, k, v, *_ = (
            value.requires_grad_() for value in tensors(1, T, 8, 4, 2, 3, torch.float64, "cpu")
        )
        assert torch.autograd.gradcheck(ours(**options), (q, k, v))


@pytest.mark.plain
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES[:5] + SHAPES[7:8])
def test_reference_is_the_definition(shape, options):
    q, k, v, *incoming = tensors(*shape, torch.float64, "cpu")
    got = run(ours(**options), (q, k, v), incoming)
    expected = run(lambda *x: naive(*x, **options), (q, k, v), incoming)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.plain
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "shape", [(2, 17, 17, 6, 2, 5), (2, 9, 20, 4, 2, 16), (0, 3, 3, 2, 1, 4), (2, 0, 0, 2, 1, 4)]
)
def test_so_is_what_runs_where_no_lse_is_asked_for(shape, options):
    """PyTorch's fused operator, where there are as many keys as queries and no options that it lacks."""
    (_, T, S, H, G, _), (q, k, v, do, _) = shape, tensors(*shape, torch.float64, "cpu")
    expected = run(lambda *x: naive(*x, **options)[:1], (q, k, v), [do])
    functions = [lambda *x: [causal_attention(*x, **options)]]
    if T == S:
        functions.append(
            lambda *x: [
                causal_attention_qkvpacked(packed(*x), H, n_kv_head=G, **options).view(do.shape)
            ]
        )
    for function in functions:
        for a, b in zip(run(function, (q, k, v), [do]), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# --- 2. accuracy


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, dtype) for shape in SHAPES for dtype in FLOATS),
        (
            (1, 1000, 1000, 1, 1, 64),
            torch.bfloat16,
        ),  # many tiles; those of float32 are many in 300 already
    ],
)
def test_accuracy_beside_torch(shape, dtype, device):
    q, k, v, *incoming = tensors(*shape, dtype, device)
    got = run(ours(), (q, k, v), incoming)
    assert_like_the_definition(got, (q, k, v), incoming, peer=sdpa)


@pytest.mark.parametrize(
    ("options", "T", "S", "dtype"),
    [
        *(
            ({"window": window}, T, 300, torch.bfloat16)
            for window in (1, 2, 40, 127, 128, 129, 200)
            for T in (150, 300)
        ),
        # Tiles of float32 are smaller: as many edges in a shorter sequence.
        *(
            ({"window": window}, T, 100, torch.float32)
            for window in (1, 31, 32, 33, 70)
            for T in (50, 100)
        ),
        # A last query that just misses the first key of a tile, and windows wide enough that whole tiles lie inside.
        ({"window": 255}, 384, 384, torch.bfloat16),
        ({"window": 127}, 200, 200, torch.float32),
        ({"window": 129}, 300, 300, torch.float16),
        *(({"scale": 0.7}, 150, 150, dtype) for dtype in FLOATS),
    ],
)
def test_accuracy_with_a_window_or_a_scale(options, T, S, dtype, device):
    q, k, v, *incoming = tensors(1, T, S, 2, 1, 16, dtype, device)
    got = run(ours(**options), (q, k, v), incoming)
    assert_like_the_definition(got, (q, k, v), incoming, peer=sdpa, **options)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "options", [{"softcap": 0.5}, {"softcap": 30.0}, {"softcap": 2.0, "window": 50, "scale": 1.0}]
)
def test_accuracy_with_a_softcap(options, dtype, device):
    q, k, v, *incoming = tensors(1, 140, 140, 2, 1, 32, dtype, device)
    got = run(ours(**options), (q, k, v), incoming)
    assert_like_the_definition(got, (q, k, v), incoming, **options)


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_scores_stay_finite(dtype, device):
    """Logits of ten thousand, either sign."""
    q, k, v, *incoming = tensors(1, 140, 140, 2, 2, 16, dtype, device)
    largest = torch.einsum("bthk,bshk->bhts", q.double(), k.double()).abs().max().item()
    for options in (
        {"scale": 1e4 / largest},
        {"scale": 1e4 / largest, "softcap": 50.0},
        {"scale": 1e4 / largest, "window": 3},
    ):
        assert all(value.isfinite().all() for value in run(ours(**options), (q, k, v), incoming))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_lone_key_gives_its_value_exactly(dtype, device):
    q, k, v, *_ = tensors(1, 140, 140, 2, 2, 16, dtype, device)
    for scale in (None, 1e-3, 300.0, 3333.3):
        assert torch.equal(causal_attention(q, k, v, window=1, scale=scale), v)
        assert torch.equal(causal_attention(q, k, v, scale=scale)[:, 0], v[:, 0])


# --- 3. layouts and special shapes

PACKED_OPTIONS = [{}, {"window": 7, "softcap": 3.0, "scale": 0.5}, {"dropout_p": 0.2, "seed": 9}]


def test_views_of_a_packed_projection_and_strided_gradients(device):
    B, T, H, K = 2, 20, 3, 8
    qkv = torch.randn(B, T, 3 * H * K, device=device)
    q, k, v = (part.view(B, T, H, K) for part in qkv.split(H * K, dim=-1))
    do = torch.randn(B, H, K, T, device=device).permute(0, 3, 1, 2)
    got = run(lambda *x: (causal_attention(*x),), (q, k, v), [do])
    expected = run(
        lambda *x: (causal_attention(*x),), [x.contiguous() for x in (q, k, v)], [do.contiguous()]
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("T", "H", "G", "K", "dtype", "options"),
    [
        *(
            (17, 3, 3, 40, dtype, options)
            for dtype in (torch.float32, torch.bfloat16)
            for options in PACKED_OPTIONS
        ),
        *((BLOCK_QUERIES + 1, 2, 1, 16, torch.bfloat16, options) for options in PACKED_OPTIONS),
        (33, 4, 1, 24, torch.bfloat16, PACKED_OPTIONS[0]),
        (33, 4, 1, 24, torch.float32, PACKED_OPTIONS[1]),
        (33, 4, 1, 24, torch.bfloat16, PACKED_OPTIONS[2]),
        (1, 1, 1, 16, torch.float32, PACKED_OPTIONS[1]),
        (1, 1, 1, 16, torch.bfloat16, PACKED_OPTIONS[2]),
    ],
)
def test_packed_gives_what_the_parts_give(T, H, G, K, dtype, options, device):
    q, k, v, do, _ = tensors(2, T, T, H, G, K, dtype, device)
    o, *grads = run(lambda *x: (causal_attention(*x, **options),), (q, k, v), [do])
    got = run(
        lambda x: (causal_attention_qkvpacked(x, H, n_kv_head=G, **options),),
        [packed(q, k, v)],
        [do.flatten(2)],
    )
    assert torch.equal(got[0], o.flatten(2))
    assert torch.equal(got[1], packed(*grads))


def test_packed_takes_any_layout(device):
    qkv, do = torch.randn(2, 9, 2 * 6 * 8, device=device), torch.randn(2, 16, 9, device=device).mT
    for view in (
        qkv[..., ::2],
        qkv[..., 48:],
        qkv[..., :48].transpose(0, 1).contiguous().transpose(0, 1),
    ):
        got = run(lambda x: (causal_attention_qkvpacked(x, 2),), [view], [do])
        expected = run(
            lambda x: (causal_attention_qkvpacked(x, 2),), [view.contiguous()], [do.contiguous()]
        )
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
    q, k, v, *_ = (
        value.requires_grad_() for value in tensors(B, T, S, 2, 1, 8, torch.float32, device)
    )
    o = causal_attention(q, k, v)
    assert o.shape == q.shape
    o.sum().backward()
    assert torch.equal(k.grad, torch.zeros_like(k))


def test_a_window_of_every_key_is_none(device):
    q, k, v, *_ = tensors(1, 40, 40, 2, 2, 16, torch.float32, device)
    assert torch.equal(causal_attention(q, k, v, window=40), causal_attention(q, k, v))
    assert torch.equal(causal_attention(q, k, v, window=4000), causal_attention(q, k, v))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_descriptors_and_pointers_read_the_same(dtype, device, monkeypatch):
    """Packed at a width that TMA can stride over, with one element too many in each row, and beginning at an odd address."""
    B, T, H, K = 2, 140, 2, 16
    q, k, v, do, _ = tensors(B, T, T, H, H, K, dtype, device)
    aligned = packed(q, k, v)
    odd = torch.cat([aligned, aligned[..., :1]], -1)[..., :-1]
    shifted = torch.cat([aligned.flatten()[:1], aligned.flatten()])[1:].view_as(aligned)
    seen = []
    original = _attention_launch.descriptor
    monkeypatch.setattr(
        _attention_launch,
        "descriptor",
        lambda x, block: seen.append(original(x, block)) or seen[-1],
    )
    results = [
        run(lambda x: (causal_attention_qkvpacked(x, H),), [x], [do.flatten(2)])
        for x in (aligned, odd, shifted)
    ]
    if device.type == "cpu" or torch.cuda.get_device_capability()[0] >= 9:
        # Of each run k and v forward, k and v for dq, do and q, lse and delta for dk and dv.
        assert [isinstance(x, torch.Tensor) for x in seen] == [False] * 8 + 2 * [
            *4 * [True],
            False,
            True,
            False,
            False,
        ]
    # do is made contiguous, so a descriptor serves it whatever qkv is like.
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernels
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_the_order_of_heads_changes_nothing(heads, device, monkeypatch):
    """Groups of query heads that end with a smaller one."""
    q, k, v, *incoming = tensors(1, 140, 140, 5, 5, 16, torch.bfloat16, device)
    expected = run(ours(), (q, k, v), incoming)
    monkeypatch.setattr(_attention_launch, "L2_BYTES", heads * 2 * 140 * 16 * 2)
    assert all(
        torch.equal(a, b) for a, b in zip(run(ours(), (q, k, v), incoming), expected, strict=True)
    )


def test_any_strides_with_a_unit_last_one(device):
    """Axes in any order in memory, an axis repeated without a copy, and gradients that come expanded."""
    B, T, H, K = 2, 20, 2, 8
    for order in ((0, 1, 2), (1, 0, 2), (2, 0, 1), (2, 1, 0)):
        q, k, v = (
            torch.randn([(B, T, H)[axis] for axis in order] + [K], device=device)
            .permute(*(order.index(axis) for axis in range(3)), 3)
            for _ in range(3)
        )  # fmt: skip
        repeated = q, k[:1].expand(B, -1, -1, -1), v[:, :, :1].expand(-1, -1, H, -1)
        for values in ((q, k, v), repeated, [x[..., ::2] for x in (q, k, v)]):
            do = torch.randn(1, 1, 1, values[0].shape[-1], device=device).expand(values[0].shape)
            got = run(lambda *x: (causal_attention(*x),), values, [do])
            expected = run(
                lambda *x: (causal_attention(*x),),
                [x.contiguous() for x in values],
                [do.contiguous()],
            )
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# --- dropout


def keep_mask(p, seed, B, H, T, S, device):
    """1 / (1 - p) where the generator's word of (b, h, i, j) says so, else 0."""
    words = 4 * -(-S // 4)
    index = torch.arange(B * H * T * words, device=device).view(B, H, T, words)[..., :S]
    return (random_bits(torch.tensor(seed, device=device), index) >= p * 2**32 - 2**31).double() / (
        1 - p
    )


@pytest.mark.parametrize(
    ("T", "S", "window", "dtype"),
    [
        *((30, 30, None, dtype) for dtype in FLOATS),
        *((140, 141, None, dtype) for dtype in (torch.float32, torch.bfloat16)),
        *((130, 139, 37, dtype) for dtype in (torch.bfloat16, torch.float16)),
    ],
)
def test_dropout_is_the_mask_of_its_seed(T, S, window, dtype, device):
    B, H, K, p, seed = 2, 2, 16, 0.25, 2**61 + 11
    q, k, v, *incoming = tensors(B, T, S, H, 1, K, dtype, device)
    got = run(ours(dropout_p=p, seed=seed, window=window), (q, k, v), incoming)
    options = {} if window is None else {"window": window}
    assert_like_the_definition(
        got, (q, k, v), incoming, keep=keep_mask(p, seed, B, H, T, S, device), **options
    )


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_expected_fraction(p, device):
    """Equal scores and values of one: query i gives (how many of its i + 1 keys are kept) / ((i + 1) (1 - p))."""
    T = 200
    zeros, ones = torch.zeros(2, T, 2, 16, device=device), torch.ones(2, T, 2, 16, device=device)
    o = causal_attention(zeros, zeros, ones, dropout_p=p, seed=5)[..., 0]
    kept = (o * torch.arange(1, T + 1, device=device)[:, None] * (1 - p)).double().sum().item()
    pairs = 4 * T * (T + 1) / 2
    assert abs(kept / pairs - (1 - p)) < 5 * (p * (1 - p) / pairs) ** 0.5


@pytest.mark.plain
def test_the_mean_gradient_under_dropout_is_that_without():
    """Of 600 masks the mean gradient is within six of its standard errors of the one without dropout, element by element."""
    q, k, v, do, _ = tensors(1, 6, 6, 1, 1, 4, torch.float64, "cpu")
    # Of a sum linear in the weights: o itself, and the softmax behind it is not dropped.
    grads = [
        run(
            lambda *x, seed=seed: (causal_attention(*x, dropout_p=0.3, seed=seed),), (q, k, v), [do]
        )
        for seed in range(600)
    ]
    expected = run(lambda *x: (causal_attention(*x),), (q, k, v), [do])
    for samples, mean in zip(zip(*grads, strict=True), expected, strict=True):
        samples = torch.stack(samples)
        error = (samples.mean(0) - mean).abs()
        assert (error <= 6 * samples.std(0) / 600**0.5 + 1e-12).all()


def test_seeds_are_drawn_kept_and_given_as_tensors(device):
    q, k, v, do, _ = tensors(1, 40, 40, 2, 2, 16, torch.float32, device)

    def drop(*x, **options):
        return (causal_attention(*x, dropout_p=0.25, **options),)

    assert not torch.equal(*(drop(q, k, v, seed=seed)[0] for seed in (11, 12)))
    assert torch.equal(
        drop(q, k, v, seed=11)[0], drop(q, k, v, seed=torch.tensor(11, device=device))[0]
    )
    torch.manual_seed(5)
    first = drop(q, k, v)[0]
    assert not torch.equal(first, drop(q, k, v)[0]), "each call draws its own seed"
    torch.manual_seed(5)
    assert torch.equal(first, drop(q, k, v)[0])
    # A checkpoint runs the forward again: the same mask, whether the seed is given or drawn.
    for options in ({"seed": 3}, {}):
        torch.manual_seed(6)
        plain = run(lambda *x: drop(*x, **options), (q, k, v), [do])  # noqa: B023
        torch.manual_seed(6)
        again = run(
            lambda *x: checkpoint(lambda *y: drop(*y, **options), *x, use_reentrant=False),  # noqa: B023
            (q, k, v),
            [do],
        )
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


# --- 4. contract


def test_opcheck(device):
    q, k, v, do, dlse = tensors(1, 6, 9, 4, 2, 8, torch.float32, device)
    seed = torch.full((), 3, device=device)
    options = (0.5, 4, 2.0, 0.1)
    torch.library.opcheck(
        torch.ops.tritium.causal_attention_fwd.default,
        (*(x.requires_grad_() for x in (q, k, v)), None, seed, *options),
    )
    with torch.no_grad():
        o, lse = torch.ops.tritium.causal_attention_fwd(q, k, v, None, seed, *options)
    plain = [x.detach() for x in (do, dlse, q, k, v, o, lse)]
    torch.library.opcheck(
        torch.ops.tritium.causal_attention_bwd.default, (*plain, None, seed, *options)
    )
    torch.library.opcheck(
        torch.ops.tritium.causal_attention_bwd.default,
        (plain[0], None, *plain[2:], None, None, 0.5, 9, 0.0, 0.0),
    )


def test_packed_opcheck(device):
    q, k, v, do, _ = tensors(1, 6, 6, 4, 2, 8, torch.float32, device)
    qkv, seed, options = packed(q, k, v), torch.full((), 3, device=device), (0.5, 4, 2.0, 0.1)
    forward, backward = (
        getattr(torch.ops.tritium, f"causal_attention_qkvpacked_{way}").default
        for way in ("fwd", "bwd")
    )
    torch.library.opcheck(forward, (qkv.clone().requires_grad_(), 4, 2, None, seed, *options))
    o, lse = forward(qkv, 4, 2, None, seed, *options)
    torch.library.opcheck(backward, (do.flatten(2), qkv, o, lse, None, seed, 4, 2, *options))


def test_packed_compiles_as_one_graph_and_follows_autocast(device):
    q, k, v, do, _ = tensors(2, 12, 12, 4, 2, 8, torch.float32, device)
    qkv = packed(q, k, v)

    def function(x):
        return (causal_attention_qkvpacked(x, 4, n_kv_head=2, window=5),)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        run(compiled, [qkv], [do.flatten(2)]), run(function, [qkv], [do.flatten(2)]), strict=True
    ):
        assert torch.equal(a, b)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(function(qkv)[0], function(qkv.bfloat16())[0])


def test_compiles_as_one_graph(device):
    q, k, v, *incoming = tensors(2, 12, 12, 4, 2, 8, torch.float32, device)
    compiled = torch.compile(ours(window=5), fullgraph=True, backend="aot_eager")
    for a, b in zip(
        run(compiled, (q, k, v), incoming), run(ours(window=5), (q, k, v), incoming), strict=True
    ):
        assert torch.equal(a, b)


def test_autocast_lowers_the_inputs_and_only_them(device):
    q, k, v, *_ = tensors(1, 12, 12, 2, 2, 8, torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        o, lse = causal_attention(q, k, v, return_lse=True)
    expected = causal_attention(*(x.bfloat16() for x in (q, k, v)), return_lse=True)
    assert (o.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(o, expected[0])
    assert torch.equal(lse, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reruns_are_bitwise_equal(dtype, device):
    """A few times where kernels are interpreted, a thousand times on a GPU."""
    q, k, v, *incoming = tensors(1, 150, 150, 2, 1, 64, dtype, device)
    first = run(ours(window=100), (q, k, v), incoming)
    for _ in range(1000 if device.type == "cuda" else 2):
        assert all(
            torch.equal(a, b)
            for a, b in zip(run(ours(window=100), (q, k, v), incoming), first, strict=True)
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA, and 48 GB of it")
def test_more_than_two_to_the_31_elements(device):
    """The last of 2,100 sequences, 6.6e9 elements into qkv, is what it is alone."""
    if torch.cuda.mem_get_info()[0] < 48e9:
        pytest.skip("needs 48 GB free")
    qkv = torch.randn(2100, 1024, 3 * 1024, device=device, dtype=torch.bfloat16)
    do = torch.randn(2100, 1024, 1024, device=device, dtype=torch.bfloat16)
    last = run(lambda x: (causal_attention_qkvpacked(x, 16),), [qkv[-1:]], [do[-1:]])
    o, dqkv = run(lambda x: (causal_attention_qkvpacked(x, 16),), [qkv], [do])
    assert torch.equal(o[-1:], last[0])
    assert torch.equal(dqkv[-1:], last[1])


@pytest.mark.plain
@pytest.mark.parametrize("rows", [*TILES.values(), FLOAT32_TILES], ids=[*TILES, "float32"])
def test_every_head_size_has_a_tile(rows):
    for direction in ("fwd", "dq", "dkdv"):
        assert max(rows[direction]) == 256
        for tile in rows[direction].values():
            owned, walked = (
                (tile.block_m, tile.block_n)
                if direction != "dkdv"
                else (tile.block_n, tile.block_m)
            )
            assert owned >= 16
            assert walked >= 16
            assert walked % 4 == 0, "dropout draws four words at a time"


@pytest.mark.plain
def test_tiles_are_chosen_by_architecture_head_size_and_dtype():
    assert [padded(size) for size in (1, 16, 40, 64, 65, 111, 256)] == [
        16,
        16,
        64,
        64,
        128,
        128,
        256,
    ]
    for arch, family in (
        ("sm_80", "sm_"),
        ("sm_89", "sm_"),
        ("sm_90", "sm_9"),
        ("sm_103", "sm_10"),
        ("sm_120", "sm_12"),
        ("gfx950", "gfx"),
    ):
        assert plan("dq", 40, torch.bfloat16, arch) is TILES[family]["dq"][64]
        assert plan("fwd", 65, torch.float32, arch) is FLOAT32_TILES["fwd"][128]
        for direction, owned, walked in (
            ("fwd", "block_m", "block_n"),
            ("dkdv", "block_n", "block_m"),
        ):
            tile, dropping = (
                plan(direction, 64, torch.bfloat16, arch, dropout) for dropout in (False, True)
            )
            assert getattr(dropping, owned) == getattr(tile, owned)
            assert getattr(dropping, walked) == max(16, getattr(tile, walked) // 2)


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
        (
            {"q": ones(2, 4, 8)},
            r"q must be \(B, T, H, K\), k and v \(B, S, G, K\), got \(2, 4, 8\)",
        ),
        ({"v": ones(2, 4, 2, 9)}, r"k and v \(B, S, G, K\)"),
        ({"q": ones(3, 4, 4, 8)}, r"batch 3, got \(2, 4, 2, 8\)"),
        ({"q": ones(2, 4, 0, 8)}, r"q must have at least one head, got \(2, 4, 0, 8\)"),
        ({"q": ones(2, 4, 3, 8)}, r"the key heads must divide the 3 query heads, got 2"),
        ({"q": ones(2, 5, 4, 8)}, r"at least as many keys as the 5 queries .*, got 4"),
        (
            {"q": ones(2, 4, 4, 257), "k": ones(2, 4, 2, 257), "v": ones(2, 4, 2, 257)},
            "head size must be from 1 to 256, got 257",
        ),
        (
            {"q": ones(2, 4, 4, 8, dtype=torch.bfloat16)},
            "share one float dtype; cast them, got torch.bfloat16",
        ),
        ({"q": ones(2, 4, 4, 8, device="meta")}, "on one device; move them, got meta"),
        ({"scale": 0.0}, r"scale must be None \(1 / sqrt\(K\)\) or positive and finite, got 0.0"),
        (
            {"seed": torch.tensor(3.0), "dropout_p": 0.1},
            r"seed must be an int or a \(\) int64 tensor on cpu, got torch.float32",
        ),
        ({"window": 0}, "window must be None or at least 1 key .*, got 0"),
        ({"softcap": -1.0}, "softcap must be 0 .* or positive and finite, got -1.0"),
        ({"dropout_p": 1.0}, r"dropout_p must lie in \[0, 1\), got 1.0"),
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
def test_bad_input_is_named(change, message):
    arguments = {"q": ones(2, 4, 4, 8), "k": ones(2, 4, 2, 8), "v": ones(2, 4, 2, 8)} | change
    with pytest.raises(ValueError, match="^causal_attention: .*" + message):
        causal_attention(**arguments)


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
        ({"dropout_p": 1.0}, r"dropout_p must lie in \[0, 1\), got 1.0"),
    ],
)
def test_bad_packed_input_is_named(change, message):
    arguments = {"qkv": ones(2, 5, 64), "n_head": 4, "n_kv_head": 2} | change
    with pytest.raises(ValueError, match="^causal_attention_qkvpacked: .*" + message):
        causal_attention_qkvpacked(**arguments)


@needs_kernels
def test_float64_is_refused_by_the_name_that_was_called(device):
    q, k, v, *_ = tensors(1, 4, 4, 2, 2, 8, torch.float64, device)
    with pytest.raises(
        TypeError,
        match=r"^causal_attention: the kernel takes float32, bfloat16 or float16, got float64",
    ):
        causal_attention(q, k, v)
    with pytest.raises(TypeError, match=r"^causal_attention_qkvpacked: the kernel takes"):
        causal_attention_qkvpacked(packed(q, k, v), 2)


@pytest.mark.plain
def test_cost_counts_visible_pairs():
    assert cost(1, 4, 4, 1, 1, 8, 2)["fwd_flops"] == 4 * 8 * (1 + 2 + 3 + 4)
    assert cost(1, 4, 6, 1, 1, 8, 2)["fwd_flops"] == 4 * 8 * (3 + 4 + 5 + 6)
    assert cost(1, 4, 4, 1, 1, 8, 2, window=2)["fwd_flops"] == 4 * 8 * (1 + 2 + 2 + 2)


# --- 5. compilation ahead of time; at shipped head sizes and without options it is the bench's held table that says more


@pytest.mark.codegen
@pytest.mark.parametrize("arch", [name for name in TARGETS if name != "gfx950"])
def test_every_option_at_once_fits_the_machine(arch):
    """The largest head size, with a window, softcap, dropout and documents: no kernel is cut down to a trap."""

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, lse = meta(1, 4096, 4, 256), meta(1, 4096, 2, 256), meta(1, 4, 4096, dtype=torch.float32)
    options = (meta(9, dtype=torch.int32), meta(dtype=torch.int64), 0.1, 512, 30.0, 0.1)
    with record_launches(arch) as launches:
        launch_fwd(q, k, k, *options)
        launch_bwd(q, lse, q, k, k, q, lse, *options)
    multiprocessor = MULTIPROCESSORS[arch]
    for launch in launches:
        compiled = compile_launch(launch, arch)
        found = resources(compiled)
        assert found.shared_bytes <= multiprocessor.shared_bytes - multiprocessor.shared_reserved
        assert found.registers > 16, f"{launch.kernel.__name__} does nothing"
        assert getattr(compiled.metadata, "tmem_size", 0) <= 512
