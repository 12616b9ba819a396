"""QK-norm and RoPE inside causal_attention_qkvpacked: the five groups of tests of an operator."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad

from tests.kernels.attention.cases import DTYPES, assert_bitwise_equal, needs_kernels, run
from tests.kernels.compare import assert_close, opcheck
from tests.tolerance import assert_accurate
from tritium.bench.codegen.disassembly import resources
from tritium.bench.codegen.launches import TARGETS, compile_launch, record_launches
from tritium.kernels import causal_attention, causal_attention_qkvpacked, rms_norm, rotary
from tritium.kernels.attention import _norm_rope
from tritium.kernels.attention._norm_rope import (
    TILE_ELEMENTS,
    NormRope,
    launch_norm_rope,
    launch_norm_rope_bwd,
    plan,
)

EPS = 1e-3
# Pairs: whether RoPE is applied, whether QK-norm is applied.
APPLIED = [(True, False), (False, True), (True, True)]
IDS = ["rope", "norm", "norm_rope"]
# B, T, H, G, K: one pair, odd sizes, more heads than a tile holds, GPT-2's head.
SHAPES = [(1, 1, 1, 1, 2), (2, 5, 3, 1, 6), (1, 9, 6, 3, 10), (1, 3, 2, 2, 64)]
# Rows of (rope, norm, shape). RoPE needs an even head size.
CASES = [
    pytest.param(*applied, shape, id=f"{name}-{shape}")
    for applied, name in zip(APPLIED, IDS, strict=True)
    for shape in (*SHAPES, *([] if applied[0] else [(2, 3, 2, 1, 7)]))
]
ops = torch.ops.tritium


def tensors(B, T, H, G, K, dtype, device):
    """qkv, an incoming gradient of it, two gains, and tables of T + 2 rows."""
    generator = torch.Generator().manual_seed(T * 1009 + K)
    shapes = [(B, T, (H + 2 * G) * K)] * 2
    qkv, dqkv = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    gains = [torch.randn(K, generator=generator).to(device) for _ in range(2)]
    angle = torch.outer(torch.arange(T + 2), 10_000.0 ** (-torch.arange(K // 2) * 2 / K))
    return qkv, dqkv, gains, (angle.cos().to(device), angle.sin().to(device))


def keywords(gains, tables, rope, norm):
    """Keyword arguments of causal_attention_qkvpacked."""
    found = {}
    if rope:
        found |= {"cos": tables[0], "sin": tables[1]}
    if norm:
        found |= {"q_norm_weight": gains[0], "k_norm_weight": gains[1], "norm_eps": EPS}
    return found


def in_torch(qkv, gains, tables, H, G, rope, norm):
    """q, k and v, computed by PyTorch in the dtype of qkv."""
    B, T, width = qkv.shape
    parts = list(qkv.view(B, T, -1, width // (H + 2 * G)).split((H, G, G), dim=2))
    for i, gain in enumerate(gains if norm else ()):
        x = parts[i]
        parts[i] = torch.nn.functional.rms_norm(x, x.shape[-1:], gain.to(x.dtype), EPS)
    if rope:
        cos, sin = (table[:T, None].to(qkv.dtype) for table in tables)
        for i in range(2):
            x1, x2 = parts[i].chunk(2, -1)
            parts[i] = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)
    return parts


def packed_by_torch(qkv, gains, tables, H, G, rope, norm, **options):
    """o by causal_attention of the parts."""
    return causal_attention(*in_torch(qkv, gains, tables, H, G, rope, norm), **options).flatten(2)


# --- 1. math


@pytest.mark.plain
@pytest.mark.parametrize("options", [{}, {"window": 2}], ids=["sdpa", "reference"])
@pytest.mark.parametrize(("rope", "norm"), APPLIED, ids=IDS)
def test_gradients_match_finite_differences(rope, norm, options):
    qkv, _, gains, tables = tensors(2, 3, 2, 1, 4, torch.float64, "cpu")
    gains, tables = [x.double() for x in gains], [x.double() for x in tables]
    bias = torch.randn(qkv.shape[-1], dtype=torch.float64)

    def by_attention(qkv, bias, *gains):
        arguments = keywords(gains, tables, rope, norm) | options
        x = qkv + bias.detach()
        return causal_attention_qkvpacked(x, 2, n_kv_head=1, added_bias=bias, **arguments)

    def by_torch(qkv, bias, *gains):
        return packed_by_torch(qkv + bias, gains, tables, 2, 1, rope, norm, **options)

    inputs = [x.requires_grad_() for x in (qkv, bias, *(gains if norm else ()))]
    assert torch.autograd.gradcheck(by_torch, inputs)
    do = torch.randn(2, 3, 8, dtype=torch.float64)
    got, expected = (torch.autograd.grad(f(*inputs), inputs, do) for f in (by_attention, by_torch))
    assert_close(got, expected, rtol=1e-10, atol=1e-12)


# --- 2. kernels against the float64 reference


def changed(qkv, gains, tables, H, G, rope, norm):
    """Queries and keys (B, T, H + G, K)."""
    arguments = NormRope(eps=EPS, cos=tables[0] if rope else None, sin=tables[1] if rope else None)
    fields = (arguments.eps, arguments.cos, arguments.sin)
    return ops.qk_norm_rope(qkv, *(gains if norm else (None, None)), H, G, *fields)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rope", "norm", "shape"), CASES)
def test_queries_and_keys_are_accurate(shape, rope, norm, dtype, device):
    qkv, _, gains, tables = tensors(*shape, dtype, device)
    H, G, K = shape[2:]
    got = changed(qkv, gains, tables, H, G, rope, norm)
    truth, baseline = (
        torch.cat(in_torch(x, gains, tables, H, G, rope, norm)[:2], dim=2)
        for x in (qkv.double(), qkv)
    )
    assert_accurate("qk", got, truth, baseline, length=K)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rope", "norm", "shape"), CASES)
@pytest.mark.parametrize("groups", [1, 1000], ids=["one_program", "programs"])
def test_gradients_of_queries_and_keys_are_accurate(
    shape, rope, norm, groups, dtype, device, monkeypatch
):
    """With one program per tile of heads, a program owns all blocks of tokens."""
    monkeypatch.setattr(_norm_rope, "SUMMING_PROGRAMS", 1)
    monkeypatch.setattr(_norm_rope, "sm_count", lambda device: groups)
    monkeypatch.setattr(_norm_rope, "TILE_ELEMENTS", 64)
    plan.cache_clear()
    qkv, dqkv, gains, tables = tensors(*shape, dtype, device)
    H, G, K = shape[2:]
    weights = gains if norm else (None, None)
    arguments = NormRope(eps=EPS, cos=tables[0] if rope else None, sin=tables[1] if rope else None)
    result, dbias = dqkv.clone(), torch.full((qkv.shape[-1],), 7.0, device=device)
    dweights = launch_norm_rope_bwd(result, dbias, qkv, *weights, H, G, arguments)
    plan.cache_clear()

    def grads(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (qkv, *(gains if norm else ()))]
        outputs = in_torch(leaves[0], leaves[1:], tables, H, G, rope, norm)
        incoming = [x.to(dtype) for x in in_torch(dqkv, gains, tables, H, G, False, False)]
        return torch.autograd.grad(outputs, leaves, incoming)

    truth, baseline = grads(torch.float64), grads(dtype)
    largest = gains[0].abs().max() * dqkv.abs().max() / EPS**0.5
    scale = largest.item() if norm else 0.0
    float32 = {"scale": scale, "terms": torch.float32}
    assert_accurate("dqkv", result, truth[0], baseline[0], length=K, **float32)
    assert torch.equal(result[..., (H + G) * K :], dqkv[..., (H + G) * K :])
    for name, got, exact, theirs in zip(
        ("dq_weight", "dk_weight"), dweights, truth[1:], baseline[1:], strict=False
    ):
        sizes = {"length": qkv.shape[0] * qkv.shape[1] * H * K, "scale": exact.abs().max().item()}
        assert_accurate(name, got, exact, theirs.float(), **sizes, terms=torch.float32)
    sums = result.double().sum((0, 1))[: (H + G) * K]
    terms = {"scale": result.double().square().sum((0, 1)).max().sqrt().item(), "terms": dtype}
    in_dtype = result.sum((0, 1)).float()[: (H + G) * K]
    assert_accurate("dbias", dbias[: (H + G) * K], sums, in_dtype, length=qkv.shape[1], **terms)
    assert (dbias[(H + G) * K :] == 7).all()


@needs_kernels
def test_tokens_past_the_end_add_nothing_if_norm_eps_is_zero(device):
    """The norm of a masked token is then 0 / 0."""
    H, G, K = 2, 1, 64
    qkv, dqkv, gains, _ = tensors(1, 3, H, G, K, torch.float32, device)
    dbias = torch.zeros(qkv.shape[-1], device=device)
    arguments = NormRope(eps=0.0, cos=None, sin=None)
    sums = launch_norm_rope_bwd(dqkv, dbias, qkv, *gains, H, G, arguments)
    assert all(each.isfinite().all() for each in (*sums, dqkv, dbias))


@pytest.mark.parametrize(
    ("options", "rope", "norm", "dtype"),
    [
        ({"softcap": 3.0}, True, True, torch.float32),
        ({"window": 5}, True, False, torch.bfloat16),
        ({"dropout_p": 0.2, "seed": 3}, False, True, torch.float32),
        ({"ends": (2, 9, 16)}, True, True, torch.bfloat16),
    ],
    ids=["softcap", "window", "dropout", "documents"],
)
def test_attention_is_that_of_the_changed_queries_and_keys(options, rope, norm, dtype, device):
    """With documents the last tokens are padding."""
    B, T, H, G, K = 2, 9, 4, 2, 16
    qkv, do, gains, tables = tensors(B, T, H, G, K, dtype, device)
    do, options = do[..., : H * K].contiguous(), dict(options)
    if "ends" in options:
        ends = torch.tensor([0, *options.pop("ends")], dtype=torch.int32, device=device)
        options["cu_seqlens"] = ends
    arguments = keywords(gains, tables, rope, norm) | options
    o, dqkv = run(
        lambda x: (causal_attention_qkvpacked(x, H, n_kv_head=G, **arguments),), [qkv], [do]
    )

    qk = changed(qkv, gains, tables, H, G, rope, norm).flatten(2)
    replaced = torch.cat((qk, qkv[..., (H + G) * K :]), -1)
    expected, dreplaced = run(
        lambda x: (causal_attention_qkvpacked(x, H, n_kv_head=G, **options),), [replaced], [do]
    )
    assert torch.equal(o, expected)
    leaf = qkv.detach().double().requires_grad_()
    outputs = in_torch(leaf, gains, tables, H, G, rope, norm)
    incoming = in_torch(dreplaced.double(), gains, tables, H, G, False, False)
    (truth,) = torch.autograd.grad(outputs, leaf, incoming)
    # In 16 bits the kernels round the gradients of the changed queries and keys, the reference does
    # not: one rounding of each.
    norms = leaf.view(B, T, -1, K).square().mean(-1).sqrt()
    scale = dreplaced.abs().max().item() * (3 / norms.min().item() if norm else 1)
    assert_accurate("dqkv", dqkv, truth, truth.to(dtype), length=K, scale=scale)


# --- 3. layouts


def test_layouts_of_qkv_and_of_the_tables_do_not_change_the_result(device):
    B, T, H, G, K = 2, 5, 2, 1, 8
    qkv, _, gains, tables = tensors(B, T, H, G, K, torch.float32, device)
    do = torch.randn(B, T, H * K, generator=torch.Generator().manual_seed(0)).to(device)

    def attend(qkv, cos, sin, gains):
        arguments = keywords(gains, (cos, sin), True, True) | {"window": 3}
        return run(
            lambda x: (causal_attention_qkvpacked(x, H, n_kv_head=G, **arguments),), [qkv], [do]
        )

    expected = attend(qkv, *tables, gains)
    swapped = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    sliced = torch.cat((qkv, qkv), -1)[..., qkv.shape[-1] :]
    strided = torch.stack((qkv, qkv), -1)[..., 0]
    per_token = [table[:T].expand(B, -1, -1).contiguous() for table in tables]
    narrow = [torch.cat((table, table), -1)[:, : K // 2] for table in tables]
    in_float64 = [table.double() for table in narrow]
    one_narrow = (narrow[0], tables[1])
    two_apart = [torch.stack((gain, gain), -1)[:, 0] for gain in gains]
    layouts = (swapped, per_token), (sliced, in_float64), (strided, narrow), (qkv, one_narrow)
    for x, (cos, sin) in layouts:
        assert_close(attend(x, cos, sin, two_apart), expected, rtol=1e-5, atol=1e-6)


def test_positions_of_documents_restart_with_tables_per_token(device):
    """Each document gives what it gives alone."""
    H, K, lengths = 2, 8, (3, 7)
    qkv, do, gains, tables = tensors(1, 10, H, H, K, torch.float32, device)
    do = do[..., : H * K].contiguous()
    position = torch.cat([torch.arange(n) for n in lengths]).to(device)[None]

    def attend(qkv, do, tables, **options):
        arguments = keywords(gains, tables, True, True) | options
        return run(lambda x: (causal_attention_qkvpacked(x, H, **arguments),), [qkv], [do])

    ends = torch.tensor([0, 3, 10], dtype=torch.int32, device=device)
    per_token = [table[position] for table in tables]
    got = attend(qkv, do, per_token, cu_seqlens=ends)
    # As two sequences of five tokens, the packed tokens are the same.
    halves = [x.view(2, 5, -1) for x in (qkv, do, *per_token)]
    two = attend(*halves[:2], halves[2:], cu_seqlens=ends)
    assert_bitwise_equal([x.flatten(0, 1) for x in two], [x[0] for x in got])
    parts = [
        attend(x, d, tables, softcap=1e6)
        for x, d in zip(qkv.split(lengths, 1), do.split(lengths, 1), strict=True)
    ]
    for value, alone in zip(got, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(value, torch.cat(alone, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("B", "T"), [(0, 4), (2, 0)])
def test_empty_inputs_give_empty_outputs_and_zero_gradients_of_weights(B, T, device):
    qkv, _, gains, tables = tensors(B, T, 2, 1, 8, torch.float32, device)
    leaves = [x.requires_grad_() for x in (qkv, *gains)]
    arguments = keywords(gains, tables, True, True) | {"window": 3}
    o = causal_attention_qkvpacked(qkv, 2, n_kv_head=1, **arguments)
    dqkv, *dweights = torch.autograd.grad(o.sum(), leaves)
    assert (o.shape, dqkv.shape) == ((B, T, 16), qkv.shape)
    assert not any(dweight.any() for dweight in dweights)


# --- 4. contract


def test_opcheck(device):
    H, G, K = 2, 1, 8
    qkv, _, gains, tables = tensors(1, 5, H, G, K, torch.float32, device)
    scores = (0.5, 3, 0.0, 0.0, None, None)
    fields = (EPS, *tables)
    opcheck(ops.qk_norm_rope.default, (qkv, *gains, H, G, *fields))
    qk = ops.qk_norm_rope(qkv, *gains, H, G, *fields)
    bias = torch.zeros(qkv.shape[-1], device=device)
    leaves = [x.clone().requires_grad_() for x in (qkv, *gains)]
    inputs = (leaves[0], qk, bias, *leaves[1:], H, G, *fields, *scores)
    opcheck(ops.causal_attention_norm_rope_fwd.default, inputs)
    o, lse = ops.causal_attention_norm_rope_fwd(*inputs)
    incoming = (torch.ones_like(o), qkv, qk, o.detach(), lse.detach())
    for needs_bias in (True, False):
        opcheck(
            ops.causal_attention_norm_rope_bwd.default,
            (*incoming, *gains, H, G, needs_bias, *fields, *scores),
        )


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain", marks=pytest.mark.slow),
        pytest.param({"window": 5}, id="window"),
    ],
)
def test_compiles_as_one_graph_for_any_number_of_tokens(options, device):
    """With the gradients of bias and weights. On a CPU, the plain case runs SDPA."""
    torch._dynamo.reset()

    def function(qkv, bias, q_weight, k_weight, cos, sin):
        arguments = keywords((q_weight, k_weight), (cos, sin), True, True) | options
        return causal_attention_qkvpacked(qkv, 2, n_kv_head=1, added_bias=bias, **arguments)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (7, 11):
        qkv, _, gains, tables = tensors(2, T, 2, 1, 8, torch.float32, device)
        bias = torch.zeros(qkv.shape[-1], device=device)
        inputs = (qkv, bias, *gains)
        do = [torch.ones(2, T, 16, device=device)]
        with torch.compiler.set_stance("default" if T == 7 else "fail_on_recompile"):
            got = run(lambda *x, t=tables: (compiled(*x, *t),), inputs, do)
        assert_close(got, run(lambda *x, t=tables: (function(*x, *t),), inputs, do))


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}], ids=["plain", "softcap"])
def test_gradients_of_torch_func_match_autograd(options, device):
    qkv, do, gains, tables = tensors(1, 4, 2, 1, 8, torch.float32, device)
    do = do[..., :16]

    def total(qkv, *gains):
        arguments = keywords(gains, tables, True, True) | options
        return (causal_attention_qkvpacked(qkv, 2, n_kv_head=1, **arguments) * do).sum()

    got = torch.func.grad(total, argnums=(0, 1, 2))(qkv, *gains)
    leaves = [x.clone().requires_grad_() for x in (qkv, *gains)]
    expected = torch.autograd.grad(total(*leaves), leaves)
    assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_autocast_casts_qkv_and_keeps_the_dtypes_of_gradients(device):
    qkv, _, gains, tables = tensors(2, 5, 2, 1, 8, torch.float32, device)
    bias = torch.zeros(qkv.shape[-1], device=device)
    leaves = [x.requires_grad_() for x in (qkv, *gains, bias)]
    arguments = keywords(gains, tables, True, True) | {"added_bias": bias}
    with torch.autocast(device.type, dtype=torch.bfloat16):
        o = causal_attention_qkvpacked(qkv, 2, n_kv_head=1, **arguments)
    assert torch.equal(o, causal_attention_qkvpacked(qkv.bfloat16(), 2, n_kv_head=1, **arguments))
    grads = torch.autograd.grad(o.sum(), leaves)
    assert [x.dtype for x in grads] == [torch.float32] * 4
    # The gradient of the bias is a sum in float32 that was not rounded to bfloat16.
    assert not torch.equal(grads[3], grads[3].bfloat16().float())


def test_reruns_are_bitwise_equal(device):
    qkv, do, gains, tables = tensors(2, 20, 4, 2, 16, torch.bfloat16, device)
    bias = torch.zeros(qkv.shape[-1], device=device)

    def function(qkv, bias, *gains):
        arguments = keywords(gains, tables, True, True) | {"added_bias": bias}
        return (causal_attention_qkvpacked(qkv, 4, n_kv_head=2, **arguments),)

    results = [run(function, (qkv, bias, *gains), [do[..., :64]]) for _ in range(2)]
    assert_bitwise_equal(*results)


def test_frozen_weights_get_no_gradient(device):
    qkv, _, gains, tables = tensors(1, 4, 2, 1, 8, torch.float32, device)
    for options in ({}, {"window": 3}):
        leaf = qkv.clone().requires_grad_()
        arguments = keywords(gains, tables, True, True) | options
        causal_attention_qkvpacked(leaf, 2, n_kv_head=1, **arguments).sum().backward()
        assert leaf.grad is not None
        assert gains[0].grad is None


def test_one_pair_of_operators_replaces_the_separate_ones(device):
    """The result is close to that of rms_norm and rotary, which round in between."""
    qkv, _, gains, tables = tensors(2, 7, 2, 1, 8, torch.float32, device)
    q, k, v = qkv.view(2, 7, 4, 8).split((2, 1, 1), 2)
    q, k = (rotary(rms_norm(x, w, eps=EPS), *tables) for x, w in zip((q, k), gains, strict=True))
    arguments = keywords(gains, tables, True, True)
    o = causal_attention_qkvpacked(qkv, 2, n_kv_head=1, **arguments)
    torch.testing.assert_close(o, causal_attention(q, k, v).flatten(2))


def ones(*shape, **kwargs):
    return torch.ones(*shape, **kwargs)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sin": None}, "expected both cos and sin or neither, got only cos"),
        ({"norm_eps": float("inf")}, "norm_eps must be at least 0, and finite, got inf"),
        ({"cos": ones(4, 4)}, r"cos must be floating point \(5 or more, 4\) or \(2, 5, 4\) .* qkv"),
        ({"sin": ones(5, 3)}, r"sin must be .* \(5 or more, 4\) .*, got torch.float32 \(5, 3\)"),
        ({"sin": ones(5, 4, requires_grad=True)}, "sin must not require a gradient"),
        ({"cos": ones(5, 4, device="meta")}, "cos must be on cpu like qkv, got meta"),
        ({"qkv": ones(2, 5, 56)}, "RoPE needs an even head size, got 7"),
        ({"q_norm_weight": None}, "expected both q_norm_weight and k_norm_weight or neither"),
        (
            {"k_norm_weight": ones(7)},
            r"k_norm_weight must be floating point \(8,\) on cpu to match qkv, got .* \(7,\)",
        ),
        ({"q_norm_weight": ones(8).int()}, "q_norm_weight must be floating point .* torch.int32"),
        ({"norm_eps": -1.0}, "norm_eps must be at least 0, and finite, got -1.0"),
    ],
)
def test_bad_input_raises(change, message):
    arguments = {
        "qkv": ones(2, 5, 64),
        "n_head": 4,
        "n_kv_head": 2,
        "cos": ones(5, 4),
        "sin": ones(5, 4),
        "q_norm_weight": ones(8),
        "k_norm_weight": ones(8),
    } | change
    with pytest.raises(ValueError, match="^causal_attention_qkvpacked: " + message):
        causal_attention_qkvpacked(**arguments)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_values_of_cu_seqlens_are_checked_once(norm, device, monkeypatch):
    qkv, _, gains, tables = tensors(1, 4, 2, 1, 6, torch.float32, device)
    names = []
    for module in ("launch", "_norm_rope_operator", "_reference"):
        monkeypatch.setattr(
            f"tritium.kernels.attention.{module}.check_document_values",
            lambda name, *_: names.append(name),
        )
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32, device=device)
    options = keywords(gains, tables, False, norm)
    causal_attention_qkvpacked(qkv, 2, n_kv_head=1, cu_seqlens=cu_seqlens, **options)
    assert names == ["causal_attention_qkvpacked"]


@pytest.mark.plain
def test_forward_mode_derivatives_raise_under_the_name_of_the_public_function():
    qkv, dqkv, gains, tables = tensors(1, 4, 2, 1, 6, torch.float32, "cpu")
    options = keywords(gains, tables, True, True) | {"window": 2}
    message = "^causal_attention_qkvpacked: forward-mode derivatives are not supported"
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        causal_attention_qkvpacked(forward_ad.make_dual(qkv, dqkv), 2, n_kv_head=1, **options)


@pytest.mark.plain
def test_plan_fits_a_head_and_bounds_the_tile():
    for N, heads, K in itertools.product((0, 1, 5, 10**6), (1, 2, 3, 24), (1, 2, 7, 64, 80, 256)):
        tile = plan(N, heads, K)
        assert 2 * tile["BLOCK_P"] >= K
        rows = tile["BLOCK_T"] * tile["BLOCK_H"]
        assert rows * 2 * tile["BLOCK_P"] <= TILE_ELEMENTS


# --- 5. ahead-of-time compilation


@pytest.mark.codegen
@pytest.mark.parametrize("arch", [name for name in TARGETS if name != "gfx950"])
def test_kernels_compile_for_every_target_without_spills(arch):
    for dtype, (B, T, H, G, K), rope, norm in [
        (torch.bfloat16, (8, 1024, 12, 12, 64), True, True),
        (torch.bfloat16, (8, 1024, 32, 8, 128), True, False),
        (torch.float32, (1, 1, 1, 1, 7), False, True),
    ]:
        qkv = torch.empty(B, T, (H + 2 * G) * K, dtype=dtype, device="meta")
        table = torch.empty(T, K // 2, device="meta") if rope else None
        weight = torch.empty(K, device="meta") if norm else None
        arguments = (weight, weight, H, G, NormRope(eps=EPS, cos=table, sin=table))
        dbias = torch.empty(qkv.shape[-1], device="meta")
        with record_launches(arch) as launches:
            launch_norm_rope(qkv, *arguments)
            launch_norm_rope_bwd(torch.empty_like(qkv), dbias, qkv, *arguments)
        for launch in launches[:2]:
            assert resources(compile_launch(launch, arch)).spilled_bytes == 0
