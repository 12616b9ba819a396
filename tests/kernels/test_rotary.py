"""rotary: the five groups of tests that each operator has."""

import itertools

import pytest
import torch

from tests.kernels.compare import opcheck
from tests.tolerance import assert_accurate
from tritium.bench.codegen.disassembly import resources
from tritium.bench.codegen.launches import TARGETS, compile_launch, record_launches
from tritium.kernels.core.op import INTERPRET
from tritium.kernels.rotary import TILE_ELEMENTS, cost, launch_rotary, plan, rotary

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# B, T, H, K: one pair, odd numbers of pairs and heads, GPT-2's head, a large one.
SHAPES = [(1, 1, 1, 2), (2, 3, 1, 6), (1, 17, 3, 10), (2, 9, 5, 64), (1, 5, 2, 256)]


def tensors(B, T, H, K, dtype, device):
    """x, tables of T + 3 rows, and an incoming gradient."""
    generator = torch.Generator().manual_seed(T * 1009 + K)
    x, dy = (torch.randn(B, T, H, K, generator=generator).to(device, dtype) for _ in range(2))
    angle = torch.arange(T + 3)[:, None] * 10_000.0 ** (-torch.arange(K // 2) * 2 / K)
    return x, angle.cos().to(device), angle.sin().to(device), dy


def complex_rotary(x, cos, sin, *, interleaved=False):
    """Multiply each pair by e^(i angle), in float64."""
    T, K = x.shape[1], x.shape[-1]
    rotation = torch.complex(cos.double(), sin.double())[:T].unsqueeze(-2)
    pairs = x.double().unflatten(-1, (K // 2, 2) if interleaved else (2, K // 2))
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    y = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * rotation)
    return (y if interleaved else y.transpose(-1, -2)).reshape(x.shape)


def torch_rotary(x, cos, sin, *, interleaved=False):
    """RoPE as models usually implement it, in the dtype of x."""
    T = x.shape[1]
    cos, sin = (table[:T].to(x.dtype).unsqueeze(-2) for table in (cos, sin))
    x1, x2 = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    return torch.stack((y1, y2), -1).flatten(-2) if interleaved else torch.cat((y1, y2), -1)


def run(function, x, cos, sin, dy, **options):
    """The output and the gradient of x."""
    leaf = x.detach().requires_grad_()
    y = function(leaf, cos, sin, **options)
    return [y.detach(), *torch.autograd.grad(y, leaf, dy.to(y.dtype))]


# --- 1. math


@pytest.mark.plain
@pytest.mark.parametrize("interleaved", [False, True])
def test_reference_gradients_match_finite_differences(interleaved):
    x, cos, sin, _ = tensors(2, 3, 2, 6, torch.float64, "cpu")

    def rotate(x):
        return rotary(x, cos.double(), sin.double(), interleaved=interleaved)

    assert torch.autograd.gradcheck(rotate, x.requires_grad_())
    assert torch.autograd.gradgradcheck(rotate, x)
    cos, sin = cos[:, :1], sin[:, :1]
    assert torch.autograd.gradcheck(rotate, x)


@pytest.mark.plain
@pytest.mark.parametrize("interleaved", [False, True])
def test_reference_matches_complex_multiplication(interleaved):
    x, cos, sin, _ = tensors(2, 3, 2, 6, torch.float64, "cpu")
    got = rotary(x, cos.double(), sin.double(), interleaved=interleaved)
    expected = complex_rotary(x, cos, sin, interleaved=interleaved)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.plain
def test_scores_depend_on_the_distance_between_tokens_only():
    """This is the purpose of RoPE: the dot of a query at t and a key at s depends on t - s only."""
    _, cos, sin, _ = tensors(1, 20, 1, 8, torch.float64, "cpu")
    q, k = torch.randn(2, 8, dtype=torch.float64)
    rotated_q, rotated_k = (
        rotary(head.expand(1, 20, 1, 8), cos.double(), sin.double())[0, :, 0] for head in (q, k)
    )
    scores = rotated_q @ rotated_k.t()
    for distance in range(5):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-6, atol=1e-6)


# --- 2. kernel against the float64 reference


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_is_accurate(shape, dtype, interleaved, device):
    x, cos, sin, dy = tensors(*shape, dtype, device)
    got = run(rotary, x, cos, sin, dy, interleaved=interleaved)
    truth = run(complex_rotary, x.double(), cos, sin, dy, interleaved=interleaved)
    baseline = run(torch_rotary, x, cos, sin, dy, interleaved=interleaved)
    for name, *values in zip(["y", "dx"], got, truth, baseline, strict=True):
        assert_accurate(name, *values, length=2)


@pytest.mark.parametrize("interleaved", [False, True])
def test_heads_past_the_last_full_tile_are_rotated(interleaved, device):
    K = 512
    heads = TILE_ELEMENTS // K
    x, cos, sin, dy = tensors(1, 2 * heads + 1, 1, K, torch.float32, device)
    assert plan(2 * heads + 1, K, K) == (heads, K // 2, 1)
    got = run(rotary, x, cos, sin, dy, interleaved=interleaved)
    truth = run(complex_rotary, x.double(), cos, sin, dy, interleaved=interleaved)
    baseline = run(torch_rotary, x, cos, sin, dy, interleaved=interleaved)
    for name, *values in zip(["y", "dx"], got, truth, baseline, strict=True):
        assert_accurate(name, *values, length=2)


@pytest.mark.parametrize(("K", "R"), [(6, 4), (80, 20), (64, 32), (256, 2)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_narrow_tables_rotate_the_first_elements_and_copy_the_others(K, R, interleaved, device):
    x, _, _, dy = tensors(2, 9, 3, K, torch.float32, device)
    _, cos, sin, _ = tensors(2, 9, 3, R, torch.float32, device)
    first = run(rotary, x[..., :R], cos, sin, dy[..., :R], interleaved=interleaved)
    got = run(rotary, x, cos, sin, dy, interleaved=interleaved)
    for value, rotated, copied in zip(got, first, (x, dy), strict=True):
        assert torch.equal(value, torch.cat((rotated, copied[..., R:]), -1))


@pytest.mark.skipif(
    not (INTERPRET or torch.cuda.is_available()), reason="needs TRITON_INTERPRET=1 or a GPU"
)
@pytest.mark.parametrize("interleaved", [False, True])
def test_masked_elements_are_not_written(interleaved, device, monkeypatch):
    """5 heads in a tile of 8, and 3 pairs in a tile of 4. Memory after y keeps its values."""
    x, cos, sin, _ = tensors(1, 5, 1, 6, torch.float32, device)
    assert plan(5, 6, 6) == (8, 4, 1)
    memory = torch.full((200,), 7.0, device=device)
    x_in_memory = torch.zeros(200, device=device)[:30].view_as(x).copy_(x)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *args, **options: memory[:30].view_as(x))
        y = launch_rotary(x_in_memory, cos, sin, interleaved, False)
    assert y.data_ptr() == memory.data_ptr()
    assert (memory[30:] == 7).all()


# --- 3. layouts


@pytest.mark.parametrize("interleaved", [False, True])
def test_any_layout_gives_the_result_of_a_contiguous_copy(interleaved, device):
    B, T, H, K = 2, 9, 3, 8
    x, cos, sin, dy = tensors(B, T, H, K, torch.float32, device)
    expected = run(rotary, x, cos, sin, dy, interleaved=interleaved)
    packed = torch.cat([x, 2 * x, x], dim=2).flatten(2)  # q, k, v as a linear layer writes them
    views = [
        x,
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.transpose(1, 2).contiguous().transpose(1, 2),
        packed[..., : H * K].unflatten(-1, (H, K)),
        torch.cat([x, x], dim=-1)[..., K:],
        torch.stack([x, x], dim=-1)[..., 0],
    ]
    gradients = [dy, torch.stack([dy, dy], dim=-1)[..., 0]]
    both = torch.cat([cos, sin], dim=-1)
    tables = [
        (both[:, : K // 2], sin),  # tables with different strides
        (cos, both[:, K // 2 :]),
        (cos.double(), sin.double()),
    ]
    for view, incoming, (cos, sin) in itertools.product(views, gradients, tables):
        got = run(rotary, view, cos, sin, incoming, interleaved=interleaved)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


def test_sliced_tables_start_at_a_later_position(device):
    x, cos, sin, _ = tensors(2, 9, 3, 8, torch.float32, device)
    assert torch.equal(rotary(x[:, 5:], cos[5:], sin[5:]), rotary(x, cos, sin)[:, 5:])


def test_tables_per_token_allow_positions_to_restart(device):
    x, cos, sin, dy = tensors(2, 9, 3, 8, torch.float32, device)
    lengths = [3, 6], [8, 1]  # documents of each sequence
    position = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    position = position.to(device)
    got = run(rotary, x, cos[position], sin[position], dy)
    for b, row in enumerate(lengths):
        documents = zip(x[b].split(row), dy[b].split(row), strict=True)
        parts = [run(rotary, part[None], cos, sin, grad[None]) for part, grad in documents]
        for value, expected in zip(got, zip(*parts, strict=True), strict=True):
            assert torch.equal(value[b], torch.cat(expected, dim=1)[0])


@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4)])
def test_empty_inputs_give_empty_outputs(shape, device):
    x, cos, sin, dy = tensors(*shape, torch.float32, device)
    for value in run(rotary, x, cos, sin, dy):
        assert value.shape == shape


# --- 4. contract


def test_opcheck(device):
    x, cos, sin, _ = tensors(2, 5, 3, 8, torch.float32, device)
    narrow = cos[:, :2], sin[:, :2]
    for tables, interleaved, is_reversed in (
        ((cos, sin), False, True),
        ((cos, sin), True, False),
        (narrow, False, False),
    ):
        opcheck(
            torch.ops.tritium.rotary.default,
            (x.clone().requires_grad_(), *tables, interleaved, is_reversed),
        )


def test_compiles_as_one_graph_for_any_number_of_tokens(device):
    compiled = torch.compile(rotary, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (6, 9, 12):
        x, cos, sin, dy = tensors(2, T, 3, 8, torch.float32, device)
        with torch.compiler.set_stance("default" if T == 6 else "fail_on_recompile"):
            got = run(compiled, x, cos, sin, dy)
        for a, b in zip(got, run(rotary, x, cos, sin, dy), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("R", [4, 8])
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_output_can_be_changed_in_place(interleaved, R, dtype, device):
    x, _, _, dy = tensors(2, 5, 3, 8, dtype, device)
    _, cos, sin, _ = tensors(2, 5, 3, R, dtype, device)
    assert not rotary(x, cos, sin, interleaved=interleaved)._is_view()

    def doubled(*args, **options):
        return rotary(*args, **options).mul_(2)

    got = run(doubled, x, cos, sin, dy, interleaved=interleaved)
    expected = run(rotary, x, cos, sin, dy, interleaved=interleaved)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, 2 * b)


def test_autocast_keeps_the_dtype_of_x(device):
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
            r"cos must be floating point \(3 or more, 4\) or \(2, 3, 4\) .*, got .* \(2, 4\)",
        ),
        ({"sin": torch.ones(3, 8)}, r"sin must be .*, got torch.float32 \(3, 8\)"),
        ({"cos": torch.ones(3, 8)}, r"cos must be .* \(3 or more, 4\) .* \(3, 8\)"),
        ({"cos": torch.ones(3, 0)}, r"cos must be .* \(3 or more, 4\) .* \(3, 0\)"),
        ({"cos": torch.ones(3, 2)}, r"sin must be .* \(3 or more, 2\) .* \(3, 4\)"),
        ({"sin": torch.ones(1, 3, 4)}, r"sin must be .*, got torch.float32 \(1, 3, 4\)"),
        (
            {"cos": torch.ones(3, 4).long()},
            r"cos must be floating point .*, got torch.int64 \(3, 4\)",
        ),
        ({"cos": torch.ones(3, 4, device="meta")}, r"cos must be on cpu like x, got meta"),
        ({"cos": torch.ones(3, 4, requires_grad=True)}, r"cos must not require a gradient"),
    ],
)
def test_bad_arguments_raise(change, message):
    arguments = {
        "x": torch.ones(2, 3, 4, 8),
        "cos": torch.ones(3, 4),
        "sin": torch.ones(3, 4),
    } | change
    with pytest.raises(ValueError, match="^rotary: " + message):
        rotary(**arguments)


def test_kernel_raises_for_float64(device):
    if device.type == "cpu" and not INTERPRET:
        pytest.skip("float64 on a CPU runs the reference")
    x, cos, sin, _ = tensors(1, 2, 1, 4, torch.float64, device)
    message = "^rotary: the kernel takes float32, bfloat16 or float16, got float64"
    with pytest.raises(TypeError, match=message):
        rotary(x, cos, sin)


@pytest.mark.plain
def test_plan_fits_a_head_and_bounds_the_tile():
    sizes = ((2, 2), (6, 6), (6, 2), (64, 64), (64, 32), (80, 20), (256, 2), (4096, 4096))
    for M, (K, R) in itertools.product((1, 3, 100, 10**7), sizes):
        block_m, block_p, block_rest = plan(M, K, R)
        assert 2 * block_p >= R
        assert block_rest >= K - R
        assert block_m == 1 or block_m * max(2 * block_p, block_rest) <= TILE_ELEMENTS


@pytest.mark.plain
def test_cost_counts_x_and_y_once():
    heads, K, itemsize = 12 * 8192, 64, 2
    assert cost(heads, K, itemsize)["fwd_bytes"] == 2 * heads * K * itemsize


# --- 5. ahead-of-time compilation


@pytest.mark.codegen
@pytest.mark.parametrize("arch", [name for name in TARGETS if name != "gfx950"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_compiles_for_every_target_without_spills(interleaved, arch):
    # The last shape: Triton makes constants of integer arguments that are 1.
    for dtype, shape, rotated in [
        (torch.bfloat16, (8, 1024, 12, 64), 64),
        (torch.bfloat16, (8, 1024, 32, 80), 32),
        (torch.float32, (8, 1024, 12, 128), 128),
        (torch.bfloat16, (1, 1, 1, 2), 2),
    ]:
        x = torch.empty(shape, dtype=dtype, device="meta")
        table = torch.empty(shape[1], rotated // 2, device="meta")
        with record_launches(arch) as launches:
            launch_rotary(x, table, table, interleaved, False)
        assert resources(compile_launch(launches[0], arch)).spilled_bytes == 0
