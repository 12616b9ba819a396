"""rms_norm and add_rms_norm: the five groups of tests that each operator has.

test_layer_norm.py tests the shared kernels further: tiles, strides, int64 addresses.
"""

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.compare import assert_equal, opcheck
from tests.tolerance import assert_accurate
from tritium.bench.codegen.disassembly import resources
from tritium.bench.codegen.launches import TARGETS, compile_launch, record_launches
from tritium.kernels import add_rms_norm, rms_norm
from tritium.kernels.core.dropout import Dropout
from tritium.kernels.core.op import INTERPRET
from tritium.kernels.norm.launch import MAX_RESIDENT_WIDTH
from tritium.kernels.norm.rms_norm import cost, launch_add_fwd, launch_bwd

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# One element, odd, one past a power of two, several rows per program, rows too wide for registers.
SHAPES = [(1, 1), (3, 1), (5, 33), (37, 64), (4, 769), (3, 1025), (2, MAX_RESIDENT_WIDTH + 1)]


def tensors(M, N, dtype, device):
    """x, residual, weight and two incoming gradients."""
    generator = torch.Generator().manual_seed(M * 100_003 + N)
    shapes = [(M, N), (M, N), (N,), (M, N), (M, N)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def run(function, inputs, incoming):
    """Return the outputs of `function` and the gradients of its inputs."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(outputs, leaves, incoming[: len(outputs)])
    return [output.detach() for output in outputs] + list(grads)


def torch_rms_norm(x, weight):
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def torch_add_rms_norm(x, residual, weight):
    h = x + residual
    return torch_rms_norm(h, weight), h


def add_rms_norm_after_bias(x, residual, weight, added_bias):
    return add_rms_norm(x, residual, weight, added_bias=added_bias)


def torch_add_rms_norm_after_bias(x, residual, weight, added_bias):
    # Adds 0.
    return torch_add_rms_norm(x + (added_bias - added_bias.detach()), residual, weight)


def check(operator, definition, inputs, incoming, names):
    """Compare outputs and gradients of `operator` with those of `definition` in float64."""
    double = [value.double() for value in inputs]
    got = run(operator, inputs, incoming)
    baseline = run(definition, inputs, incoming)
    truth = run(definition, double, [value.double() for value in incoming])
    M, N = inputs[0].shape
    # In dx large terms cancel. In a row of one element dx is almost 0, while the terms are as large
    # as r g. So the size of r g decides how large an error may be.
    h = double[0] + double[1] if len(inputs) >= 3 else double[0]
    weight = inputs[2] if len(inputs) >= 3 else inputs[1]
    scale = ((incoming[0] * weight).abs().max() / (h.square().mean(-1) + 1e-6).min().sqrt()).item()
    for name, *values in zip(names, got, truth, baseline, strict=True):
        sizes = {"length": M if name == "dweight" else N}
        if name in ("dx", "dresidual"):
            sizes |= {"scale": scale, "terms": torch.float32}
        if name == "dadded":
            # A sum of M elements of dx with independent errors.
            sizes = {"scale": M**0.5 * scale, "terms": torch.float32, "length": M + N}
        assert_accurate(name, *values, **sizes)


# --- 1. math


@pytest.mark.plain
def test_reference_gradients_match_finite_differences():
    x, residual, weight, _, _ = (
        value.requires_grad_() for value in tensors(3, 5, torch.float64, "cpu")
    )
    assert torch.autograd.gradcheck(rms_norm, (x, weight))
    assert torch.autograd.gradcheck(rms_norm, (x,))
    assert torch.autograd.gradcheck(add_rms_norm, (x, residual, weight))


@pytest.mark.plain
def test_gradient_of_an_added_bias_matches_finite_differences():
    x, residual, weight, added_bias, _ = tensors(3, 5, torch.float64, "cpu")
    leaves = [value.requires_grad_() for value in (x, residual, weight, added_bias[0].clone())]

    def after_bias(x, residual, weight, added_bias):
        x = x + added_bias.detach()
        plain = rms_norm(x, weight, added_bias=added_bias)
        return plain, *add_rms_norm(x, residual, weight, added_bias=added_bias)

    assert torch.autograd.gradcheck(after_bias, leaves)


@pytest.mark.plain
def test_reference_matches_torch_rms_norm():
    *inputs, dy, dh = tensors(7, 33, torch.float64, "cpu")
    for got, expected in zip(
        *(run(f, inputs, [dy, dh]) for f in (add_rms_norm, torch_add_rms_norm)), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


# --- 2. kernel against the float64 reference


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("M", "N"), SHAPES)
def test_rms_norm_and_add_rms_norm_are_accurate(M, N, dtype, device):
    x, residual, weight, *incoming = tensors(M, N, dtype, device)
    names = ["y", "h", "dx", "dresidual", "dweight"]
    check(add_rms_norm, torch_add_rms_norm, (x, residual, weight), incoming, names)
    check(rms_norm, torch_rms_norm, (x, weight), incoming, ["y", "dx", "dweight"])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("M", "N"), [(37, 64), (2, MAX_RESIDENT_WIDTH + 1)])
def test_gradient_of_an_added_bias_is_accurate(M, N, dtype, device):
    x, residual, weight, *incoming = tensors(M, N, dtype, device)
    names = ["y", "h", "dx", "dresidual", "dweight", "dadded"]
    inputs = (x, residual, weight, weight.flip(0))
    check(add_rms_norm_after_bias, torch_add_rms_norm_after_bias, inputs, incoming, names)


@pytest.mark.parametrize("N", [33, MAX_RESIDENT_WIDTH + 1])
def test_eps_is_added_to_the_mean_square(N, device):
    x, residual, weight, *_ = tensors(3, N, torch.float32, device)
    for h, y in (
        (x, rms_norm(x, weight, eps=2.0)),
        (x + residual, add_rms_norm(x, residual, weight, eps=2.0)[0]),
    ):
        truth = F.rms_norm(h.double(), (N,), weight.double(), 2.0)
        baseline = F.rms_norm(h, (N,), weight, 2.0)
        assert_accurate("y", y, truth, baseline, length=N)


def add_rms_norm_without_weight(x, residual, added_bias):
    return add_rms_norm(x, residual, added_bias=added_bias)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("M", "N"), [(5, 33), (2, MAX_RESIDENT_WIDTH + 1)])
def test_no_weight_matches_a_weight_of_ones(M, N, dtype, device):
    """Multiplications by 1 are exact, so all results are bitwise equal."""
    x, residual, weight, dy, dh = tensors(M, N, dtype, device)
    ones = torch.ones_like(weight)
    y, dx, _ = run(rms_norm, (x, ones), [dy])
    assert_equal(run(rms_norm, (x,), [dy]), (y, dx))
    expected = run(add_rms_norm_after_bias, (x, residual, ones, weight), [dy, dh])
    expected.pop(4)  # the gradient of the weight
    assert_equal(run(add_rms_norm_without_weight, (x, residual, weight), [dy, dh]), expected)


# --- 3. layouts


@pytest.mark.parametrize("N", [40, MAX_RESIDENT_WIDTH + 1])
def test_any_layout_gives_the_result_of_a_contiguous_copy(N, device):
    x, residual, weight, dy, dh = tensors(4, N, torch.float32, device)
    expected = run(add_rms_norm, (x, residual, weight), [dy, dh])
    strided = torch.stack([weight, weight], dim=1)[:, 0]
    sliced = [torch.cat([value, value], dim=1)[:, N:] for value in (x, residual, dy, dh)]
    transposed = [value.t().contiguous().t() for value in (x, residual, dy, dh)]
    for a, b, da, db in (sliced, transposed):
        got = run(add_rms_norm, (a, b, strided), [da, db])
        for value, wanted in zip(got, expected, strict=True):
            assert torch.equal(value, wanted)
        assert torch.equal(rms_norm(a, strided), rms_norm(x, weight))


def test_any_number_of_leading_axes(device):
    weight = torch.randn(8, device=device)
    x = torch.randn(2, 3, 4, 8, device=device, requires_grad=True)
    rms_norm(x, weight).sum().backward()  # the incoming gradient is one expanded element
    assert x.grad.shape == x.shape
    assert rms_norm(x[0, 0, 0], weight).shape == (8,)


def test_no_rows_give_zero_weight_gradients(device):
    weight = torch.randn(8, device=device, requires_grad=True)
    rms_norm(torch.empty(0, 8, device=device, requires_grad=True), weight).sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


# --- 4. contract


def test_opcheck(device):
    x, residual, weight, dy, dh = tensors(5, 24, torch.float32, device)
    ops, rstd = torch.ops.tritium, torch.rand(5, device=device)
    leaves = [value.clone().requires_grad_() for value in (x, residual, weight)]
    added_bias = weight.bfloat16().requires_grad_()
    opcheck(ops.rms_norm_fwd.default, (leaves[0], leaves[2], 1e-6, added_bias))
    opcheck(ops.add_rms_norm_fwd.default, (*leaves, 1e-6, None, 0.0, None))
    opcheck(ops.add_rms_norm_fwd.default, (*leaves, 1e-6, added_bias, 0.0, None))
    opcheck(ops.rms_norm_bwd.default, (dy, dh, x, weight, rstd, None, 0.0, None))
    opcheck(ops.rms_norm_bwd.default, (dy, None, x, weight, rstd, torch.bfloat16, 0.0, None))
    opcheck(ops.rms_norm_fwd.default, (leaves[0], None, 1e-6, None))
    opcheck(ops.rms_norm_bwd.default, (dy, None, x, None, rstd, None, 0.0, None))


def test_compiles_as_one_graph_for_any_number_of_rows(device):
    compiled = torch.compile(
        lambda *args: add_rms_norm_after_bias(*args),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for M in (5, 9, 12):
        *inputs, dy, dh = tensors(M, 40, torch.float32, device)
        inputs.append(inputs[2].flip(0))
        with torch.compiler.set_stance("default" if M == 5 else "fail_on_recompile"):
            for a, b in zip(
                *(run(f, inputs, [dy, dh]) for f in (compiled, add_rms_norm_after_bias)),
                strict=True,
            ):
                assert torch.equal(a, b)


def test_eps_can_be_a_large_int(device):
    """Such an int does not fit 64 bits."""
    x, weight = torch.full((2, 8), 1e15, device=device), torch.ones(8, device=device)
    assert torch.equal(rms_norm(x, weight, eps=10**30), rms_norm(x, weight, eps=1e30))
    got, expected = (add_rms_norm(x, x, weight, eps=eps) for eps in (10**30, 1e30))
    assert_equal(got, expected)


def test_autocast_keeps_the_dtype_of_x(device):
    x, _, weight, *_ = tensors(4, 32, torch.bfloat16, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = rms_norm(x, weight.float())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rms_norm(x, weight.float()))


def test_reruns_are_bitwise_equal(device):
    x, residual, weight, *incoming = tensors(300, 48, torch.bfloat16, device)
    inputs = (x, residual, weight, weight)
    for a, b in zip(
        *(run(add_rms_norm_after_bias, inputs, incoming) for _ in range(2)), strict=True
    ):
        assert torch.equal(a, b)


def test_residual_wider_than_x_gives_a_wider_sum(device):
    x, residual, weight, dy, dh = tensors(4, 12, torch.float32, device)
    y, h, *grads = run(add_rms_norm, (x.bfloat16(), residual, weight), [dy.bfloat16(), dh])
    assert torch.equal(h, x.bfloat16() + residual)
    assert torch.equal(y, rms_norm(h, weight).bfloat16())
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("used", [0, 1])
def test_gradients_are_right_if_only_one_output_is_used(used, device):
    x, residual, weight, dy, _ = tensors(4, 12, torch.float32, device)
    leaves = [value.clone().requires_grad_() for value in (x, residual, weight)]
    add_rms_norm(*leaves)[used].backward(dy)
    assert torch.equal(leaves[0].grad, leaves[1].grad)
    assert torch.equal(leaves[0].grad, dy) == bool(used)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_frozen_inputs_get_no_gradient(frozen, device):
    x, _, weight, *_ = tensors(4, 12, torch.float32, device)
    inputs = {"x": x, "weight": weight}
    for name, value in inputs.items():
        value.requires_grad_(name != frozen)
    rms_norm(x, weight).square().sum().backward()
    assert [name for name, value in inputs.items() if value.grad is None] == [frozen]


@pytest.mark.plain
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weight": torch.ones(7)},
            r"weight must have shape \(8,\) to match x \(2, 8\), got \(7,\)",
        ),
        ({"weight": torch.ones(8, device="meta")}, r"weight must be on cpu like x, got meta"),
        ({"added_bias": torch.ones(7)}, r"added_bias must have shape \(8,\) to match x \(2, 8\)"),
        ({"weight": torch.ones(8, dtype=torch.long)}, r"weight must be floating point, got"),
        ({"eps": -1.0}, "eps must be at least 0, got -1.0"),
        ({"eps": float("nan")}, "eps must be at least 0, got nan"),
        ({"x": torch.ones(2, 0)}, r"x must be \(\.\.\., N\) with N from 1 to 65536, got \(2, 0\)"),
        (
            {"x": torch.ones(2, 8, dtype=torch.long)},
            r"x must be floating point, got torch.int64; cast it",
        ),
        (
            {"residual": torch.ones(2, 1)},
            r"residual must be floating point, \(2, 8\) on cpu like x, got .* \(2, 1\)",
        ),
    ],
)
def test_bad_arguments_raise(change, message):
    arguments = {
        "x": torch.ones(2, 8),
        "residual": torch.ones(2, 8),
        "weight": torch.ones(8),
    } | change
    with pytest.raises(ValueError, match="^add_rms_norm: " + message):
        add_rms_norm(**arguments)


def test_kernel_raises_for_float64(device):
    if device.type == "cpu" and not INTERPRET:
        pytest.skip("float64 on a CPU runs the reference")
    x = torch.ones(2, 8, dtype=torch.float64, device=device)
    message = "^rms_norm: the kernel takes float32, bfloat16 or float16, got float64"
    with pytest.raises(TypeError, match=message):
        rms_norm(x, torch.ones(8, device=device))


@pytest.mark.plain
def test_cost_counts_each_tensor_once():
    M, N, itemsize = 32768, 1024, 2
    assert cost(M, N, itemsize)["fwd_bytes"] == 2 * M * N * itemsize
    assert cost(M, N, itemsize, residual=True)["bwd_bytes"] == 4 * M * N * itemsize


# --- 5. ahead-of-time compilation


@pytest.mark.codegen
@pytest.mark.parametrize("arch", [name for name in TARGETS if name != "gfx950"])
@pytest.mark.parametrize("N", [1024, MAX_RESIDENT_WIDTH + 8])
def test_compiles_for_every_target_without_spills(N, arch):
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((8192, N), (N,)))
        rstd = torch.empty(8192, device="meta")
        with record_launches(arch) as launches:
            # The variant with a residual needs the most registers. The golden table of the bench
            # has the other variants.
            launch_add_fwd(x, x, weight, 1e-6, None, Dropout())
            launch_bwd(x, x, x, weight, rstd, dtype, Dropout())
        for launch in launches:
            assert resources(compile_launch(launch, arch)).spilled_bytes == 0, (
                launch.kernel.__name__
            )
