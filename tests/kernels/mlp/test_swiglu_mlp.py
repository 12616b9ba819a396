"""swiglu_mlp: math, accuracy, layouts, contract, machine code."""

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.compare import assert_close, assert_equal, opcheck
from tests.kernels.mlp.cases import BAD_X, FLOATS, double, randn, run, saved_shapes, transposed
from tests.tolerance import assert_accurate, walk
from tritium.bench.codegen.disassembly import resources
from tritium.bench.codegen.launches import TARGETS, compile_launch, record_launches
from tritium.kernels.core.op import INTERPRET
from tritium.kernels.mlp.swiglu_mlp import cost, launch_bwd, launch_fwd, swiglu_mlp

# Rows, width, feed-forward width: one element, odd sizes, one past a power of two.
SHAPES = [(1, 1, 1), (3, 7, 5), (17, 129, 65), (32, 16, 64)]
NAMES = ["y", "dx", "dw_gate", "dw_up", "dw_down"]


def tensors(N, D, width, dtype, device):
    """x, w_gate, w_up and w_down; an incoming gradient."""
    shapes = [(N, D), (width, D), (width, D), (D, width), (N, D)]
    *inputs, incoming = randn(shapes, N * 10_007 + D * 101 + width, dtype, device)
    return inputs, incoming


def torch_mlp(x, w_gate, w_up, w_down):
    return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


def scales(inputs, incoming, truth):
    """Return the magnitude of each result, plus three times the magnitude of the terms it sums.

    The terms are rounded three times: as g, as da, and as u or a.
    """
    x, w_gate, w_up, w_down = double(inputs)
    g, u = (F.linear(x, weight).requires_grad_() for weight in (w_gate, w_up))
    a = F.silu(g) * u
    dy = incoming.double()
    dg, du = torch.autograd.grad(a, (g, u), dy @ w_down)
    operands = (
        (a, w_down.t()),
        (torch.cat([dg, du], dim=1), torch.cat([w_gate, w_up])),
        (dg.t(), x),
        (du.t(), x),
        (dy.t(), a),
    )
    return [
        value.abs().max().item() + 3 * walk(*pair)
        for value, pair in zip(truth, operands, strict=True)
    ]


# --- 1. math


@pytest.mark.plain
def test_gradients_match_finite_differences_and_torch():
    inputs, incoming = tensors(3, 2, 5, torch.float64, "cpu")
    got = run(swiglu_mlp, inputs, incoming)
    assert_close(got, run(torch_mlp, inputs, incoming), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(swiglu_mlp, [value.requires_grad_() for value in inputs])


# --- 2. kernel against the float64 reference


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("N", "D", "width"), SHAPES)
def test_output_and_gradients_are_accurate(N, D, width, dtype, device, matmul):
    inputs, incoming = tensors(N, D, width, dtype, device)
    truth = run(torch_mlp, double(inputs), incoming)
    baseline = run(torch_mlp, inputs, incoming)
    got = run(swiglu_mlp, inputs, incoming)
    bounds = scales(inputs, incoming, truth)
    for name, scale, *values in zip(NAMES, bounds, got, truth, baseline, strict=True):
        assert_accurate(name, *values, length=N + D + width, scale=scale)


def test_gates_far_from_zero_match_torch(device):
    """exp(-g) overflows float32 for very negative gates; SiLU is then 0."""
    x = torch.tensor([[-1e30], [-200.0], [-1.0], [0.0], [1.0], [200.0], [1e15]], device=device)
    one = torch.ones(1, 1, device=device)
    inputs = [x, one, one * 1e-20, one]
    got = run(swiglu_mlp, inputs, torch.ones_like(x))
    expected = run(torch_mlp, inputs, torch.ones_like(x))
    assert_close(got, expected, rtol=1e-5, atol=1e-12)


# --- 3. layouts


def test_any_layout_matches_the_contiguous_copy(device):
    inputs, incoming = tensors(12, 8, 16, torch.float32, device)
    expected = run(swiglu_mlp, inputs, incoming)
    got = run(swiglu_mlp, [transposed(value) for value in inputs], transposed(incoming))
    assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_leading_axes_are_flattened(device):
    (x, *weights), incoming = tensors(12, 8, 16, torch.float32, device)
    expected = run(swiglu_mlp, [x, *weights], incoming)
    got = run(swiglu_mlp, [x.view(3, 4, 8), *weights], incoming.view(3, 4, 8))
    assert got[0].shape == (3, 4, 8)
    assert_equal([a.reshape(b.shape) for a, b in zip(got, expected, strict=True)], expected)
    assert swiglu_mlp(x[0], *weights).shape == (8,)


def test_empty_inputs_give_zero_gradients(device):
    (x, *weights), incoming = tensors(12, 8, 16, torch.float32, device)
    y, dx, *grads = run(swiglu_mlp, [x[:0], *weights], incoming[:0])
    assert y.shape == dx.shape == (0, 8)
    assert not any(grad.any() for grad in grads)


# --- 4. contract


def test_opcheck(device):
    inputs, dy = tensors(6, 8, 12, torch.float32, device)
    gate, up = randn([(6, 12), (6, 12)], 0, torch.float32, device)
    ops = torch.ops.tritium
    for choice in ("auto", "fused"):
        leaves = [value.clone().requires_grad_() for value in inputs]
        opcheck(ops.swiglu_mlp_fwd.default, (*leaves, choice))
    for needs in ([True] * 4, [False, True, False, False], [True, False, False, True]):
        opcheck(ops.swiglu_mlp_bwd.default, (dy, *inputs, gate, up, needs))


@pytest.mark.parametrize("needed", [{0}, {1}, {2}, {3}, {0, 2}])
def test_only_inputs_that_need_gradients_get_them(needed, device):
    inputs, incoming = tensors(6, 8, 12, torch.float32, device)
    _, *expected = run(swiglu_mlp, inputs, incoming)
    leaves = [value.clone().requires_grad_(index in needed) for index, value in enumerate(inputs)]
    swiglu_mlp(*leaves).backward(incoming)
    assert {index for index, leaf in enumerate(leaves) if leaf.grad is not None} == needed
    for index in needed:
        assert torch.equal(leaves[index].grad, expected[index])


def test_compiles_as_one_graph_for_any_number_of_rows(device):
    compiled = torch.compile(swiglu_mlp, fullgraph=True, backend="aot_eager", dynamic=True)
    for N in (5, 9, 13):
        inputs, incoming = tensors(N, 8, 12, torch.float32, device)
        with torch.compiler.set_stance("default" if N == 5 else "fail_on_recompile"):
            assert_equal(run(compiled, inputs, incoming), run(swiglu_mlp, inputs, incoming))


def test_autocast_computes_matmuls_in_its_dtype(device):
    inputs, incoming = tensors(6, 8, 12, torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = run(swiglu_mlp, inputs, incoming)
    assert [value.dtype for value in got] == [torch.bfloat16] + 4 * [torch.float32]
    expected = run(swiglu_mlp, [value.bfloat16() for value in inputs], incoming)
    assert_equal(got, [b.to(a.dtype) for a, b in zip(got, expected, strict=True)])


def test_reruns_are_bitwise_equal(device):
    inputs, incoming = tensors(300, 24, 64, torch.bfloat16, device)
    assert_equal(run(swiglu_mlp, inputs, incoming), run(swiglu_mlp, inputs, incoming))


def test_second_derivative_raises(device):
    (x, *weights), _ = tensors(6, 8, 12, torch.float32, device)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(swiglu_mlp(x, *weights).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dx.sum().backward()


def test_saves_its_inputs_and_two_wide_tensors(device):
    inputs, _ = tensors(6, 8, 12, torch.float32, device)
    found = saved_shapes(swiglu_mlp, *(value.requires_grad_() for value in inputs))
    assert found == sorted([*(tuple(value.shape) for value in inputs), (6, 12), (6, 12)])


@pytest.mark.plain
@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"x": x}, message) for x, message in BAD_X),
        (
            {"w_gate": torch.ones(6, 5)},
            r"w_gate must have shape \(F, 4\) to match x \(2, 4\), got \(6, 5\); pass weights",
        ),
        ({"w_gate": torch.ones(())}, r"w_gate must have shape \(F, 4\) .*, got \(\)"),
        (
            {"w_up": torch.ones(4, 6)},
            r"w_up must have shape \(6, 4\) to match x \(2, 4\), got \(4, 6\)",
        ),
        ({"w_down": torch.ones(6, 4)}, r"w_down must have shape \(4, 6\) .*, got \(6, 4\)"),
        (
            {"w_down": torch.ones(4, 6).double()},
            r"w_down must be torch.float32 on cpu like x, got torch.float64 on cpu",
        ),
        (
            {"w_up": torch.ones(6, 4, device="meta")},
            r"w_up must be torch.float32 on cpu like x, got torch.float32 on meta",
        ),
    ],
)
def test_bad_arguments_raise(change, message):
    good = {
        "x": torch.ones(2, 4),
        "w_gate": torch.ones(6, 4),
        "w_up": torch.ones(6, 4),
        "w_down": torch.ones(4, 6),
    }
    with pytest.raises(ValueError, match="^swiglu_mlp: " + message):
        swiglu_mlp(**good | change)


def test_float64_raises_for_kernels(device):
    if device.type == "cpu" and not INTERPRET:
        pytest.skip("the reference takes float64")
    inputs, _ = tensors(2, 4, 6, torch.float64, device)
    with pytest.raises(TypeError, match=r"^swiglu_mlp: the kernel takes .*, got float64"):
        swiglu_mlp(*inputs)


@pytest.mark.plain
def test_cost_counts_nine_matmuls():
    found = cost(4096, 768, 2048, 2)
    assert found["fwd_flops"] + found["bwd_flops"] == 9 * 2 * 4096 * 768 * 2048


# --- 5. ahead-of-time compilation


@pytest.mark.codegen
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arch", [name for name in TARGETS if name != "gfx950"])
def test_compiles_for_every_target_without_spills(arch, dtype):
    shapes = ((512, 64), (192, 64), (64, 192), (512, 192))
    x, w, down, wide = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    with record_launches(arch) as launches:
        launch_fwd(x, w, w, down, "cublas")
        launch_bwd(x, x, w, w, down, wide, wide, [True] * 4)
    for launch in launches:
        found = resources(compile_launch(launch, arch))
        assert found.spilled_bytes == 0, launch.kernel.__name__
