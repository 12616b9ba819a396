"""rotary: the kinds of tests every kernel file has."""

import itertools

import pytest
import torch

from tests.tolerance import assert_accurate
from tritium.bench.codegen.disassembly import resources
from tritium.bench.codegen.launches import TARGETS, compile_launch, record_launches
from tritium.kernels.core.op import INTERPRET
from tritium.kernels.rotary import cost, launch_rotary, plan, rotary

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# B, T, H, K: one pair, odd numbers of pairs and heads, GPT-2's head, a large one.
SHAPES = [(1, 1, 1, 2), (2, 3, 1, 6), (1, 17, 3, 10), (2, 9, 5, 64), (1, 5, 2, 256)]


def tensors(B, T, H, K, dtype, device):
    """x, tables of T + 3 rows, and an incoming gradient."""
    generator = torch.Generator().manual_seed(T * 1009 + K)
    x, dy = (torch.randn(B, T, H, K, generator=generator).to(device, dtype) for _ in range(2))
    angle = torch.arange(T + 3)[:, None] * 10_000.0 ** (-torch.arange(K // 2) * 2 / K)
    return x, angle.cos().to(device), angle.sin().to(device), dy


def by_complex_numbers(x, cos, sin, *, interleaved=False):
    """Multiplication by e^(i angle), in float64."""
    T, K = x.shape[1], x.shape[-1]
    turn = torch.complex(cos.double(), sin.double())
    turn = (turn if cos.ndim == 3 else turn[:T]).unsqueeze(-2)
    pairs = x.double().unflatten(-1, (K // 2, 2) if interleaved else (2, K // 2))
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    y = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    return (y if interleaved else y.transpose(-1, -2)).reshape(x.shape)


def by_torch(x, cos, sin, *, interleaved=False):
    """As model code writes it, in the dtype of x."""
    T = x.shape[1]
    cos, sin = (
        table[..., -T:, :].to(x.dtype) if table.ndim == 3 else table[:T].to(x.dtype)
        for table in (cos, sin)
    )
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    x1, x2 = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    return torch.stack((y1, y2), -1).flatten(-2) if interleaved else torch.cat((y1, y2), -1)


def run(function, x, cos, sin, dy, **options):
    leaf = x.detach().requires_grad_()
    y = function(leaf, cos, sin, **options)
    return [y.detach(), *torch.autograd.grad(y, leaf, dy.to(y.dtype))]


# --- 1. math


@pytest.mark.plain
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradient_is_that_of_the_forward(interleaved):
    x, cos, sin, _ = tensors(2, 3, 2, 6, torch.float64, "cpu")
    cos, sin = cos.double(), sin.double()
    assert torch.autograd.gradcheck(
        lambda x: rotary(x, cos, sin, interleaved=interleaved), x.requires_grad_()
    )
    assert torch.autograd.gradgradcheck(lambda x: rotary(x, cos, sin, interleaved=interleaved), x)
    torch.testing.assert_close(
        rotary(x, cos, sin, interleaved=interleaved),
        by_complex_numbers(x, cos, sin, interleaved=interleaved),
        rtol=1e-12,
        atol=0,
    )


@pytest.mark.plain
def test_products_of_turned_heads_depend_on_the_distance_alone():
    """What it is for: q at t times k at s is the same wherever t - s is."""
    _, cos, sin, _ = tensors(1, 20, 1, 8, torch.float64, "cpu")
    q, k = torch.randn(2, 8, dtype=torch.float64)
    turned = [
        rotary(head.expand(1, 20, 1, 8), cos.double(), sin.double())[0, :, 0] for head in (q, k)
    ]
    products = turned[0] @ turned[1].t()
    for distance in range(5):
        diagonal = products.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-6, atol=1e-6)


# --- 2. against the float64 truth


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_is_accurate(shape, dtype, interleaved, device):
    x, cos, sin, dy = tensors(*shape, dtype, device)
    got = run(rotary, x, cos, sin, dy, interleaved=interleaved)
    truth = run(by_complex_numbers, x.double(), cos, sin, dy, interleaved=interleaved)
    peer = run(by_torch, x, cos, sin, dy, interleaved=interleaved)
    for name, *values in zip(["y", "dx"], got, truth, peer, strict=True):
        assert_accurate(name, *values, length=2)


# --- 3. layouts


@pytest.mark.parametrize("interleaved", [False, True])
def test_any_layout_gives_what_the_contiguous_copy_gives(interleaved, device):
    B, T, H, K = 2, 9, 3, 8
    x, cos, sin, dy = tensors(B, T, H, K, torch.float32, device)
    packed = torch.cat([x, 2 * x, x], dim=2).flatten(2)  # as a linear layer writes q, k, v
    views = [
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.transpose(1, 2).contiguous().transpose(1, 2),
        packed[..., : H * K].unflatten(-1, (H, K)),
        torch.cat([x, x], dim=-1)[..., K:],
        torch.stack([x, x], dim=-1)[..., 0],
    ]
    expected = run(rotary, x, cos, sin, dy, interleaved=interleaved)
    sliced = torch.cat([cos, sin], dim=-1)[:, : K // 2]
    # Each table has its own strides, and may have more digits than are made use of.
    tables = [
        (sliced, sin),
        (cos, torch.cat([cos, sin], dim=-1)[:, K // 2 :]),
        (cos.double(), sin.double()),
    ]
    for view, incoming, (cos, sin) in itertools.product([x, *views], [dy, views_of(dy)], tables):
        got = run(rotary, view, cos, sin, incoming, interleaved=interleaved)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


def views_of(dy):
    return torch.stack([dy, dy], dim=-1)[..., 0]


def test_offsets_and_positions_of_their_own(device):
    x, cos, sin, _ = tensors(2, 9, 3, 8, torch.float32, device)
    whole = rotary(x, cos, sin)
    assert torch.equal(rotary(x[:, 5:], cos[5:], sin[5:]), whole[:, 5:])
    position = torch.arange(9, device=device).expand(2, 9)
    assert torch.equal(rotary(x, cos[position], sin[position]), whole)
    lengths = [3, 6], [8, 1]  # of each sequence's documents
    anew = torch.stack([torch.cat([position[0, :length] for length in row]) for row in lengths])
    documents = [
        [rotary(part[None], cos, sin)[0] for part in one.split(row)]
        for one, row in zip(x, lengths, strict=True)
    ]
    assert torch.equal(
        rotary(x, cos[anew], sin[anew]), torch.stack([torch.cat(parts) for parts in documents])
    )


@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4)])
def test_empty_inputs(shape, device):
    x, cos, sin, dy = tensors(*shape, torch.float32, device)
    for value in run(rotary, x, cos, sin, dy):
        assert value.shape == shape


# --- 4. contract


def test_opcheck(device):
    x, cos, sin, _ = tensors(2, 5, 3, 8, torch.float32, device)
    for interleaved, is_reversed in ((False, True), (True, False)):
        torch.library.opcheck(
            torch.ops.tritium.rotary.default,
            (x.clone().requires_grad_(), cos, sin, interleaved, is_reversed),
        )


def test_compiles_as_one_graph_for_any_number_of_tokens(device):
    compiled = torch.compile(rotary, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (6, 9, 12):
        x, cos, sin, dy = tensors(2, T, 3, 8, torch.float32, device)
        with torch.compiler.set_stance("default" if T == 6 else "fail_on_recompile"):
            for a, b in zip(
                run(compiled, x, cos, sin, dy), run(rotary, x, cos, sin, dy), strict=True
            ):
                assert torch.equal(a, b)


def test_autocast_leaves_the_dtype_of_x(device):
    x, cos, sin, _ = tensors(2, 5, 3, 8, torch.bfloat16, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = rotary(x, cos, sin)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rotary(x, cos, sin))


def test_reruns_are_bitwise_equal(device):
    x, cos, sin, dy = tensors(3, 40, 3, 32, torch.bfloat16, device)
    for a, b in zip(*(run(rotary, x, cos, sin, dy) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.ones(2, 3, 8)},
            r"x must be floating point \(B, T, H, K\) with K even, got torch.float32 \(2, 3, 8\)",
        ),
        (
            {"x": torch.ones(2, 3, 4, 7)},
            r"x must be .* with K even, got torch.float32 \(2, 3, 4, 7\)",
        ),
        ({"x": torch.ones(2, 3, 4, 8).long()}, r"x must be floating point .*, got torch.int64"),
        (
            {"cos": torch.ones(2, 4)},
            r"cos must be floating point \(3 or more, 4\) or \(2, 3, 4\) .*, got torch.float32 \(2, 4\)",
        ),
        ({"sin": torch.ones(3, 8)}, r"sin must be .*, got torch.float32 \(3, 8\)"),
        ({"sin": torch.ones(1, 3, 4)}, r"sin must be .*, got torch.float32 \(1, 3, 4\)"),
        (
            {"cos": torch.ones(3, 4).long()},
            r"cos must be floating point .*, got torch.int64 \(3, 4\)",
        ),
        ({"cos": torch.ones(3, 4, device="meta")}, r"cos must be on cpu like x, got meta"),
        ({"cos": torch.ones(3, 4, requires_grad=True)}, r"cos must not need a gradient"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "x": torch.ones(2, 3, 4, 8),
        "cos": torch.ones(3, 4),
        "sin": torch.ones(3, 4),
    } | change
    with pytest.raises(ValueError, match="^rotary: " + message):
        rotary(**arguments)


def test_kernels_refuse_float64(device):
    if device.type == "cpu" and not INTERPRET:
        pytest.skip("float64 on the CPU runs the reference")
    x, cos, sin, _ = tensors(1, 2, 1, 4, torch.float64, device)
    with pytest.raises(
        TypeError, match="rotary: the kernel takes float32, bfloat16 or float16, got float64"
    ):
        rotary(x, cos, sin)


@pytest.mark.plain
def test_plan_and_cost():
    for M, K in itertools.product((1, 3, 100, 10**7), (2, 6, 64, 128, 256, 4096)):
        block_m, pairs = plan(M, K)
        assert 2 * pairs >= K
        assert block_m == 1 or block_m * 2 * pairs <= 2048
    assert cost(12 * 8192, 64, 2)["fwd_bytes"] == 2 * 2 * 12 * 8192 * 64


# --- 5. ahead-of-time compilation


def launch_of(shape, dtype, arch, interleaved):
    x = torch.empty(shape, dtype=dtype, device="meta")
    table = torch.empty(shape[1], shape[3] // 2, device="meta")
    with record_launches(arch) as launches:
        launch_rotary(x, table, table, interleaved, False)
    return launches[0]


@pytest.mark.codegen
@pytest.mark.parametrize("arch", [name for name in TARGETS if name != "gfx950"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_compiles_for_every_target_without_spills(interleaved, arch):
    for dtype, K in ((torch.bfloat16, 64), (torch.float32, 128)):
        compiled = compile_launch(launch_of((8, 1024, 12, K), dtype, arch, interleaved), arch)
        assert resources(compiled).spilled_bytes == 0
    compile_launch(launch_of((1, 1, 1, 2), torch.bfloat16, arch, interleaved), arch)
