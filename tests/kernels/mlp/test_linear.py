"""linear: math, accuracy, layouts, contract, machine code."""

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.compare import assert_close, assert_equal, opcheck
from tests.kernels.mlp.cases import BAD_X, FLOATS, SHAPES, double, randn, run, transposed
from tests.tolerance import assert_accurate, walk
from tritium.bench.codegen.disassembly import resources
from tritium.bench.codegen.launches import TARGETS, compile_launch, record_launches
from tritium.kernels import linear
from tritium.kernels.core.op import INTERPRET
from tritium.kernels.mlp.linear import launch_bwd, launch_fwd

ACTIVATIONS = [None, "gelu", "gelu_tanh", "relu2"]
NAMES = ["y", "dx", "dweight", "dbias"]


def tensors(N, D, width, dtype, device):
    """x, weight, bias, and an incoming gradient."""
    shapes = [(N, D), (width, D), (width,), (N, width)]
    *inputs, incoming = randn(shapes, N * 10_007 + D * 101 + width, dtype, device)
    return inputs, incoming


def torch_linear(x, weight, bias=None, *, activation=None):
    h = F.linear(x, weight, bias)
    if activation is None:
        return h
    if activation == "relu2":
        return F.relu(h).square()
    return F.gelu(h, approximate="tanh" if activation == "gelu_tanh" else "none")


def relu2_scales(inputs, incoming, truth):
    """Return the magnitude of each result, plus twice the magnitude of the terms that it sums.

    The terms are rounded twice: as h and as dh. Rounding h changes y twice as much as h.
    """
    x, weight, *bias = double(inputs)
    dh = incoming.double() * 2 * F.relu(F.linear(x, weight, *bias))
    one = torch.ones_like(x[:, :1])
    operands = {"dx": (dh, weight), "dweight": (dh.t(), x), "dbias": (dh.t(), one)}
    sizes = {name: value.abs().max().item() for name, value in zip(NAMES, truth, strict=False)}
    rounded = {"y": sizes["y"]} | {name: walk(*pair) for name, pair in operands.items()}
    return {name: size + 2 * rounded[name] for name, size in sizes.items()}


# --- 1. math


@pytest.mark.plain
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_gradients_match_finite_differences(activation, has_bias):
    inputs, _ = tensors(3, 2, 5, torch.float64, "cpu")
    leaves = [value.requires_grad_() for value in inputs[: 3 if has_bias else 2]]
    assert torch.autograd.gradcheck(lambda *args: linear(*args, activation=activation), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_matches_torch_far_from_zero(activation, dtype, device, matmul):
    has_kernels = INTERPRET or device.type == "cuda"
    if dtype == torch.float64 and has_kernels:
        pytest.skip("kernels do not take float64")
    values = [0.0, -0.0, 1e-20, 3.0, -3.0, 6.0, -6.0, 50.0, -50.0, 1e15, -1e15]
    if has_kernels:
        values += [1e20, -1e20]  # the reference's gradient is NaN here, like PyTorch's
    x = torch.tensor(values, dtype=dtype, device=device)[:, None]
    one = torch.ones(1, 1, dtype=dtype, device=device)
    incoming = torch.ones_like(x)
    got = run(linear, [x, one], incoming, activation=activation)
    expected = run(torch_linear, double([x, one]), incoming, activation=activation)
    assert_close(got, [value.to(dtype) for value in expected], rtol=4e-6, atol=1e-6)


def test_gradient_of_relu2_is_computed_in_float32(device, matmul):
    """In float16, twice the incoming gradient would be infinite."""
    inputs = [torch.full((1, 1), value, dtype=torch.float16, device=device) for value in (1e-3, 1)]
    incoming = torch.full((1, 1), 40_000.0, dtype=torch.float16, device=device)
    got = run(linear, inputs, incoming, activation="relu2")
    expected = run(torch_linear, double(inputs), incoming, activation="relu2")
    assert_close(got, [value.half() for value in expected], rtol=1e-3, atol=0)


# --- 2. kernel against the float64 reference


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("N", "D", "width"), SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_and_gradients_are_accurate(N, D, width, dtype, activation, device, matmul):
    inputs, incoming = tensors(N, D, width, dtype, device)
    for given in (inputs, inputs[:2]):
        got = run(linear, given, incoming, activation=activation)
        truth = run(torch_linear, double(given), incoming, activation=activation)
        baseline = run(torch_linear, given, incoming, activation=activation)
        bounds = relu2_scales(given, incoming, truth) if activation == "relu2" else {}
        for name, *values in zip(NAMES[: len(got)], got, truth, baseline, strict=True):
            scale = bounds.get(name, 0.0)
            assert_accurate(name, *values, length=N + D + width, scale=scale)


# --- 3. layouts


def test_any_layout_matches_the_contiguous_copy(device, matmul):
    (x, weight, bias), incoming = tensors(12, 8, 16, torch.float32, device)
    expected = run(linear, [x, weight, bias], incoming, activation="gelu_tanh")
    strided_bias = torch.stack([bias, bias], dim=1)[:, 0]
    for view in (
        transposed(x),
        torch.cat([x, x], dim=1)[:, :8],
        torch.stack([x, x], dim=2)[:, :, 0],
        x.view(3, 4, 8).transpose(0, 1).contiguous().transpose(0, 1),
    ):
        inputs = [view, transposed(weight), strided_bias]
        dy = transposed(incoming).reshape(*view.shape[:-1], 16)
        got = run(linear, inputs, dy, activation="gelu_tanh")
        got = [a.reshape(b.shape) for a, b in zip(got, expected, strict=True)]
        assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_an_expanded_incoming_gradient_matches_its_copy(device, matmul):
    inputs, incoming = tensors(12, 8, 16, torch.float32, device)
    expanded = torch.ones(1, device=device).expand(incoming.shape)
    assert_close(
        run(linear, inputs, expanded, activation="gelu_tanh"),
        run(linear, inputs, expanded.contiguous(), activation="gelu_tanh"),
        rtol=1e-5,
        atol=1e-5,
    )


def test_leading_axes_are_kept_and_inputs_may_be_empty(device, matmul):
    (x, weight, bias), _ = tensors(24, 4, 6, torch.float32, device)
    assert linear(x[0], weight, bias, activation="gelu").shape == (6,)
    assert linear(x[:0].view(0, 3, 4), weight, bias, activation="gelu").shape == (0, 3, 6)


# --- 4. contract


def test_opcheck(device):
    inputs, incoming = tensors(11, 8, 12, torch.float32, device)
    leaves = [value.clone().requires_grad_() for value in inputs]
    ops = torch.ops.tritium
    opcheck(ops.linear_fwd.default, (*leaves, "gelu", "auto"))
    x, weight, _ = inputs
    h = torch.randn_like(incoming)
    needs = [True, True, False]
    opcheck(ops.linear_bwd.default, (incoming, x, weight, h, "gelu_tanh", needs))


def test_compiles_as_one_graph(device, matmul):
    inputs, incoming = tensors(6, 8, 12, torch.float32, device)

    def gelu_linear(*args):
        return linear(*args, activation="gelu")

    compiled = torch.compile(gelu_linear, fullgraph=True, backend="aot_eager")
    assert_equal(run(compiled, inputs, incoming), run(gelu_linear, inputs, incoming))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autocast_computes_matmuls_in_its_dtype(activation, device):
    inputs, incoming = tensors(6, 8, 12, torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y, *grads = run(linear, inputs, incoming, activation=activation)
    assert y.dtype == torch.bfloat16
    assert {grad.dtype for grad in grads} == {torch.float32}
    halves = [value.bfloat16() for value in inputs]
    y16, *grads16 = run(linear, halves, incoming, activation=activation)
    assert_equal([y, *grads], [y16, *(grad.float() for grad in grads16)])


@pytest.mark.parametrize("needed", ["x", "weight", "bias"])
def test_only_inputs_that_need_gradients_get_them(needed, device):
    (x, weight, bias), _ = tensors(6, 8, 12, torch.float32, device)
    leaves = {"x": x, "weight": weight, "bias": bias}
    leaves[needed].requires_grad_()
    linear(**leaves, activation="gelu_tanh").sum().backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [needed]


@pytest.mark.skipif(
    not (INTERPRET or torch.cuda.is_available()), reason="the composite has second derivatives"
)
def test_second_derivative_raises(device):
    (x, weight, bias), _ = tensors(6, 8, 12, torch.float32, device)
    x.requires_grad_()
    y = linear(x, weight, bias, activation="gelu")
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dx.sum().backward()


def test_float64_raises_for_kernels(device):
    if device.type == "cpu" and not INTERPRET:
        pytest.skip("the reference takes float64")
    inputs, _ = tensors(2, 4, 6, torch.float64, device)
    with pytest.raises(TypeError, match=r"^linear: the kernel takes .*, got float64"):
        linear(*inputs, activation="gelu")


@pytest.mark.plain
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"x": x}, message) for x, message in BAD_X),
        (
            {"weight": torch.ones(4, 6)},
            r"weight must have shape \(F, 4\) to match x \(2, 4\), got \(4, 6\)",
        ),
        (
            {"bias": torch.ones(4)},
            r"bias must have shape \(6,\) to match x \(2, 4\), got \(4,\)",
        ),
        (
            {"weight": torch.ones(6, 4).half()},
            r"weight must be torch.float32 on cpu like x, got torch.float16 on cpu",
        ),
        ({"activation": 1}, r"activation must be str \| None, got 1"),
        (
            {"activation": "relu"},
            "unknown activation 'relu'; did you mean 'relu2'",
        ),
    ],
)
def test_bad_arguments_raise(change, message, activation):
    good = {
        "x": torch.ones(2, 4),
        "weight": torch.ones(6, 4),
        "bias": torch.ones(6),
        "activation": activation,
    }
    with pytest.raises(ValueError, match="^linear: " + message):
        linear(**good | change)


@pytest.mark.plain
def test_matmul_argument_selects_the_kernels():
    x, weight, h = (torch.empty(shape, device="meta") for shape in ((64, 8), (12, 8), (64, 12)))
    for matmul, kernel in (("fused", "_gemm_kernel"), ("cublas", "_mlp_activation_fwd_kernel")):
        with record_launches("sm_90") as launches:
            launch_fwd(x, weight, None, "gelu_tanh", matmul)
            launch_bwd(h, x, weight, h, "gelu_tanh", [True] * 3)
        assert [launch.kernel.__name__ for launch in launches] == [
            kernel,
            "_mlp_activation_bwd_kernel",
            "_partial_sums_kernel",
        ]


# --- 5. ahead-of-time compilation


@pytest.mark.codegen
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arch", [name for name in TARGETS if name != "gfx950"])
def test_activation_kernels_compile_for_every_target_without_spills(arch, dtype, activation):
    shapes = ((512, 64), (192, 64), (512, 192))
    x, weight, h = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    with record_launches(arch) as launches:
        launch_fwd(x, weight, None, activation, "cublas")
        launch_bwd(h, x, weight, h, activation, [True] * 3)
    for launch in launches:
        found = resources(compile_launch(launch, arch))
        assert found.spilled_bytes == 0, launch.kernel.__name__
