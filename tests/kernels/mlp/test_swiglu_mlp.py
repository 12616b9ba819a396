"""swiglu_mlp: the kinds of tests every kernel file has."""

import pytest
import torch
import torch.nn.functional as F

from tests.tolerance import assert_accurate, walk
from tritium.bench.codegen.disassembly import resources
from tritium.bench.codegen.launches import TARGETS, compile_launch, record_launches
from tritium.kernels.core.op import INTERPRET
from tritium.kernels.mlp.swiglu_mlp import cost, launch_bwd, launch_fwd, swiglu_mlp

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Rows, width, feed-forward width: one element, odd, one past a power of two.
SHAPES = [(1, 1, 1), (3, 7, 5), (17, 129, 65), (32, 16, 64)]
NAMES = ["y", "dx", "dw_gate", "dw_up", "dw_down"]


def tensors(N, D, width, dtype, device):
    """x, the three weights, and an incoming gradient."""
    generator = torch.Generator().manual_seed(N * 10_007 + D * 101 + width)
    shapes = [(N, D), (width, D), (width, D), (D, width), (N, D)]
    values = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return values[:-1], values[-1]


def torch_mlp(x, w_gate, w_up, w_down):
    return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


def run(function, inputs, incoming):
    """Output and gradients of `function` at fresh leaves."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, incoming.to(y.dtype))]


def scales(inputs, incoming, truth):
    """What each of NAMES is rounded of: itself, and three times the terms of its sum, for g, da and du or a."""
    x, w_gate, w_up, w_down = (value.double() for value in inputs)
    g, u = (F.linear(x, weight).requires_grad_() for weight in (w_gate, w_up))
    a, dy = F.silu(g) * u, incoming.double()
    dg, du = torch.autograd.grad(a, (g, u), dy @ w_down)
    dx = torch.cat([dg, du], dim=1), torch.cat([w_gate, w_up])
    products = (a, w_down.t()), dx, (dg.t(), x), (du.t(), x), (dy.t(), a)
    return [
        value.abs().max().item() + 3 * walk(*factors)
        for value, factors in zip(truth, products, strict=True)
    ]


@pytest.mark.plain
def test_gradients_are_those_of_the_forward_and_of_torch():
    inputs, incoming = tensors(3, 2, 5, torch.float64, "cpu")
    for got, expected in zip(
        *(run(f, inputs, incoming) for f in (swiglu_mlp, torch_mlp)), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(swiglu_mlp, [value.requires_grad_() for value in inputs])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("N", "D", "width"), SHAPES)
def test_is_accurate(N, D, width, dtype, device, products):
    inputs, incoming = tensors(N, D, width, dtype, device)
    truth = run(torch_mlp, [value.double() for value in inputs], incoming)
    got, peer = (run(function, inputs, incoming) for function in (swiglu_mlp, torch_mlp))
    for name, scale, *values in zip(
        NAMES, scales(inputs, incoming, truth), got, truth, peer, strict=True
    ):
        assert_accurate(name, *values, length=N + D + width, scale=scale)


def test_gates_far_from_zero(device):
    """exp(-g) leaves float32 on one side, and the gate is 0 or the identity."""
    x = torch.tensor([[-1e30], [-200.0], [-1.0], [0.0], [1.0], [200.0], [1e15]], device=device)
    one = torch.ones(1, 1, device=device)
    ours, theirs = (
        run(f, [x, one, one * 1e-20, one], torch.ones_like(x)) for f in (swiglu_mlp, torch_mlp)
    )
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-12)


def test_any_layout_gives_what_the_contiguous_copy_gives(device):
    inputs, incoming = tensors(12, 8, 16, torch.float32, device)
    expected = run(swiglu_mlp, inputs, incoming)
    transposed = [value.t().contiguous().t() for value in inputs]
    for got, value in zip(
        run(swiglu_mlp, transposed, incoming.t().contiguous().t()), expected, strict=True
    ):
        torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-5)
    deep = run(swiglu_mlp, [inputs[0].view(3, 4, 8), *inputs[1:]], incoming.view(3, 4, 8))
    for got, value in zip(deep, expected, strict=True):
        assert torch.equal(got.reshape(value.shape), value)
    assert swiglu_mlp(inputs[0][0], *inputs[1:]).shape == (8,)
    y, dx, *dweights = run(swiglu_mlp, [inputs[0][:0], *inputs[1:]], incoming[:0])
    assert y.shape == dx.shape == (0, 8)
    assert not any(value.any() for value in dweights)


def test_opcheck(device):
    inputs, dy = tensors(6, 8, 12, torch.float32, device)
    g, u = (torch.randn(6, 12, device=device) for _ in range(2))
    for products in ("auto", "fused"):
        leaves = [value.clone().requires_grad_() for value in inputs]
        torch.library.opcheck(torch.ops.tritium.swiglu_mlp_fwd.default, (*leaves, products))
    for needs in ([True] * 4, [False, True, False, False], [True, False, False, True]):
        torch.library.opcheck(torch.ops.tritium.swiglu_mlp_bwd.default, (dy, *inputs, g, u, needs))


@pytest.mark.parametrize("needed", [{0}, {1}, {2}, {3}, {0, 2}])
def test_only_some_inputs_need_gradients(needed, device):
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
            for a, b in zip(
                *(run(f, inputs, incoming) for f in (compiled, swiglu_mlp)), strict=True
            ):
                assert torch.equal(a, b)


def test_autocast_multiplies_in_its_dtype(device):
    inputs, incoming = tensors(6, 8, 12, torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = run(swiglu_mlp, inputs, incoming)
    assert [value.dtype for value in got] == [torch.bfloat16] + 4 * [torch.float32]
    for a, b in zip(
        got, run(swiglu_mlp, [value.bfloat16() for value in inputs], incoming), strict=True
    ):
        assert torch.equal(a, b.to(a.dtype))


def test_reruns_are_bitwise_equal_and_a_second_derivative_is_refused(device):
    inputs, incoming = tensors(300, 24, 64, torch.bfloat16, device)
    for a, b in zip(*(run(swiglu_mlp, inputs, incoming) for _ in range(2)), strict=True):
        assert torch.equal(a, b)
    x = inputs[0].float().requires_grad_()
    (dx,) = torch.autograd.grad(
        swiglu_mlp(x, *(weight.float() for weight in inputs[1:])).sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dx.sum().backward()


def test_keeps_two_wide_tensors_beside_its_inputs(device):
    inputs, _ = tensors(6, 8, 12, torch.float32, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: kept.append(value.shape) or value, lambda value: value
    ):
        swiglu_mlp(*(value.requires_grad_() for value in inputs))
    assert sorted(kept) == sorted([*(value.shape for value in inputs), (6, 12), (6, 12)])


@pytest.mark.plain
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.ones(2, 0)},
            r"x must be floating point \(\.\.\., D\) with D at least 1, got torch.float32 \(2, 0\)",
        ),
        (
            {"w_gate": torch.ones(6, 5)},
            r"w_gate must be \(F, 4\) to match x \(2, 4\), got \(6, 5\); pass weights",
        ),
        ({"w_gate": torch.ones(())}, r"w_gate must be \(F, 4\) .*, got \(\)"),
        ({"w_up": torch.ones(4, 6)}, r"w_up must be \(6, 4\) to match x \(2, 4\), got \(4, 6\)"),
        ({"w_down": torch.ones(6, 4)}, r"w_down must be \(4, 6\) .*, got \(6, 4\)"),
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
def test_bad_input_is_named(change, message):
    good = {
        "x": torch.ones(2, 4),
        "w_gate": torch.ones(6, 4),
        "w_up": torch.ones(6, 4),
        "w_down": torch.ones(4, 6),
    }
    with pytest.raises(ValueError, match="^swiglu_mlp: " + message):
        swiglu_mlp(**good | change)


def test_kernels_refuse_float64(device):
    if device.type == "cpu" and not INTERPRET:
        pytest.skip("float64 on the CPU runs the reference")
    with pytest.raises(
        TypeError, match="swiglu_mlp: the kernel takes float32, bfloat16 or float16, got float64"
    ):
        swiglu_mlp(*tensors(2, 4, 6, torch.float64, device)[0])


@pytest.mark.plain
def test_cost_is_that_of_nine_products():
    whole = cost(4096, 768, 2048, 2)
    assert whole["fwd_flops"] + whole["bwd_flops"] == 9 * 2 * 4096 * 768 * 2048


@pytest.mark.codegen
@pytest.mark.parametrize("arch", [name for name in TARGETS if name != "gfx950"])
def test_compiles_for_every_target_without_spills(arch):
    for dtype in (torch.bfloat16, torch.float32):
        shapes = ((512, 64), (192, 64), (64, 192), (512, 192))
        x, w, down, wide = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
        with record_launches(arch) as launches:
            launch_fwd(x, w, w, down, "cublas")
            launch_bwd(x, x, w, w, down, wide, wide, [True] * 4)
        for launch in launches:
            assert resources(compile_launch(launch, arch)).spilled_bytes == 0, (
                launch.kernel.__name__
            )
