"""gelu_mlp and relu2_mlp: math, accuracy, layouts, contract.

Both run the same code with another activation. Tests that do not depend on it use gelu_mlp. Machine
code: test_gemm.py, test_linear.py.
"""

import functools
import sys

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.compare import assert_close, assert_equal, opcheck
from tests.kernels.mlp.cases import (
    BAD_X,
    FLOATS,
    SHAPES,
    double,
    randn,
    run,
    saved_shapes,
    transposed,
)
from tests.tolerance import assert_accurate, walk
from tritium.bench.codegen.launches import record_launches
from tritium.kernels import gelu_mlp, relu2_mlp
from tritium.kernels.core.op import INTERPRET
from tritium.kernels.mlp.mlp import cost, launch_bwd, launch_fwd

MODULE = sys.modules[launch_fwd.__module__]
ACTIVATIONS = {
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu2": lambda h: F.relu(h).square(),
}
NAMES = ["y", "dx", "dw1", "db1", "dw2", "db2"]


def tensors(N, D, width, dtype, device, *, has_biases=True):
    """x, w1, b1, w2 and b2; an incoming gradient."""
    shapes = [(N, D), (width, D), (width,), (D, width), (D,), (N, D)]
    *inputs, incoming = randn(shapes, N * 10_007 + D * 101 + width, dtype, device)
    if not has_biases:
        inputs[2] = inputs[4] = None
    return inputs, incoming


def torch_mlp(x, w1, b1, w2, b2, *, activation="gelu_tanh"):
    return F.linear(ACTIVATIONS[activation](F.linear(x, w1, b1)), w2, b2)


def mlp(*inputs, activation, **options):
    """The public operator that has this activation."""
    if activation == "relu2":
        return relu2_mlp(*inputs, **options)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return gelu_mlp(*inputs, approximate=approximate, **options)


def scales(inputs, incoming, truth, activation="gelu_tanh"):
    """Return the magnitude of each result, plus twice the magnitude of the terms that it sums.

    The terms are rounded twice: as h, and as dh or a.
    """
    x, w1, b1, w2, _ = double(inputs)
    h = F.linear(x, w1, b1).requires_grad_()
    a = ACTIVATIONS[activation](h)
    dy = incoming.double()
    one = torch.ones_like(x[:, :1])
    (dh,) = torch.autograd.grad(a, h, dy @ w2)
    operands = {
        "y": (a, w2.t()),
        "dx": (dh, w1),
        "dw1": (dh.t(), x),
        "db1": (dh.t(), one),
        "dw2": (dy.t(), a),
        "db2": (dy.t(), 0 * one),
    }
    return {
        name: value.abs().max().item() + 2 * walk(*operands[name]) for name, value in truth.items()
    }


def assert_output_and_gradients_accurate(inputs, incoming, *, activation="gelu_tanh", **options):
    """Compare an MLP with PyTorch in float64 and in the dtype of the inputs."""
    given = {"activation": activation}
    names = [name for name in NAMES if inputs[2] is not None or name not in ("db1", "db2")]
    truth = dict(zip(names, run(torch_mlp, double(inputs), incoming, **given), strict=True))
    baseline = run(torch_mlp, inputs, incoming, **given)
    got = run(mlp, inputs, incoming, **given, **options)
    bounds = scales(inputs, incoming, truth, activation)
    length = sum(inputs[0].shape) + inputs[1].shape[0]
    for name, *values in zip(names, got, truth.values(), baseline, strict=True):
        assert_accurate(name, *values, length=length, scale=bounds[name])


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks with `recompute`."""
    monkeypatch.setattr(MODULE, "RECOMPUTE_ROWS", 8)


# --- 1. math


@pytest.mark.plain
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("has_biases", [True, False])
def test_gradients_match_finite_differences(activation, recompute, has_biases):
    inputs, _ = tensors(3, 2, 5, torch.float64, "cpu", has_biases=has_biases)
    leaves = [value.requires_grad_() for value in inputs if value is not None]

    def function(x, w1, *rest):
        b1, w2, b2 = rest if has_biases else (None, rest[0], None)
        return mlp(x, w1, b1, w2, b2, activation=activation, recompute=recompute)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.plain
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_matches_the_layers_of_torch(activation):
    inputs, incoming = tensors(9, 6, 17, torch.float64, "cpu")
    got = run(mlp, inputs, incoming, activation=activation)
    expected = run(torch_mlp, inputs, incoming, activation=activation)
    assert_close(got, expected, rtol=1e-12, atol=1e-12)


# --- 2. kernel against the float64 reference


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("N", "D", "width"), SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_and_gradients_are_accurate(
    N, D, width, dtype, activation, device, matmul, small_chunks
):
    inputs, incoming = tensors(N, D, width, dtype, device)
    for recompute in (True, False):
        assert_output_and_gradients_accurate(
            inputs, incoming, activation=activation, recompute=recompute
        )


@pytest.mark.parametrize("dtype", FLOATS)
def test_output_and_gradients_are_accurate_without_biases(dtype, device, matmul):
    assert_output_and_gradients_accurate(*tensors(17, 33, 65, dtype, device, has_biases=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_recompute_is_as_accurate_over_many_chunks(dtype, device, small_chunks):
    """Sums of gradients over chunks are not rounded to 16 bits in between."""
    inputs, incoming = tensors(256, 8, 12, dtype, device)
    truth = run(torch_mlp, double(inputs), incoming)
    recomputed = run(gelu_mlp, inputs, incoming, recompute=True)
    kept = run(gelu_mlp, inputs, incoming, recompute=False)
    # A GPU may multiply chunks in another order, so that dh is rounded to another number.
    bounds = scales(inputs, incoming, dict(zip(NAMES, truth, strict=True)))
    for name, *values in zip(NAMES, recomputed, truth, kept, strict=True):
        assert_accurate(name, *values, length=256, scale=bounds[name])


@pytest.mark.parametrize("width", [257, 3000])
def test_bias_gradient_sums_all_rows_of_a_program(width, device, monkeypatch):
    """With one multiprocessor a program has several blocks of rows, or all of them."""
    monkeypatch.setattr("tritium.kernels.mlp._epilogues.sm_count", lambda device: 1)
    inputs, incoming = tensors(200, 8, width, torch.float32, device)
    truth = run(torch_mlp, double(inputs), incoming)
    baseline = run(torch_mlp, inputs, incoming)
    got = run(gelu_mlp, inputs, incoming)
    for name, *values in zip(NAMES, got, truth, baseline, strict=True):
        assert_accurate(name, *values, length=200 + 8 + width)


# --- 3. layouts


def test_any_layout_matches_the_contiguous_copy(device, matmul):
    (x, w1, b1, w2, b2), incoming = tensors(12, 8, 16, torch.float32, device)
    expected = run(gelu_mlp, [x, w1, b1, w2, b2], incoming)
    strided_bias = torch.stack([b1, b1], dim=1)[:, 0]
    for view in (
        transposed(x),
        torch.cat([x, x], dim=1)[:, :8],
        torch.stack([x, x], dim=2)[:, :, 0],
        x.view(3, 4, 8).transpose(0, 1).contiguous().transpose(0, 1),
    ):
        inputs = [view, transposed(w1), strided_bias, transposed(w2), b2]
        got = run(gelu_mlp, inputs, transposed(incoming).reshape(view.shape))
        got = [a.reshape(b.shape) for a, b in zip(got, expected, strict=True)]
        assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recompute", [True, False])
def test_leading_axes_are_flattened(recompute, device, matmul):
    inputs, incoming = tensors(24, 4, 6, torch.float32, device)
    expected = run(gelu_mlp, inputs, incoming, recompute=recompute)
    deep = [inputs[0].view(2, 3, 4, 4), *inputs[1:]]
    got = run(gelu_mlp, deep, incoming.view(2, 3, 4, 4), recompute=recompute)
    assert got[0].shape == (2, 3, 4, 4)
    assert_equal([a.reshape(b.shape) for a, b in zip(got, expected, strict=True)], expected)
    assert gelu_mlp(inputs[0][0], *inputs[1:]).shape == (4,)


@pytest.mark.parametrize("recompute", [True, False])
def test_empty_inputs_give_zero_gradients(recompute, device, matmul):
    (x, *parameters), incoming = tensors(24, 4, 6, torch.float32, device)
    y, dx, *grads = run(gelu_mlp, [x[:0], *parameters], incoming[:0], recompute=recompute)
    assert y.shape == dx.shape == (0, 4)
    assert not any(grad.any() for grad in grads)


# --- 4. contract


def test_opcheck(device, small_chunks):
    inputs, dy = tensors(11, 8, 12, torch.float32, device)
    x, w1, b1, w2, b2 = (value.requires_grad_() for value in inputs)
    ops = torch.ops.tritium
    opcheck(ops.gelu_mlp_fwd.default, (x, w1, b1, w2, b2, "gelu_tanh", False, "auto"))
    opcheck(ops.gelu_mlp_fwd.default, (x, w1, None, w2, None, "gelu", True, "fused"))
    opcheck(ops.relu2_mlp_fwd.default, (x, w1, b1, w2, b2, "relu2", False, "auto"))
    x, w1, w2 = (value.detach() for value in (x, w1, w2))
    h, a = randn([(11, 12), (11, 12)], 0, torch.float32, device)
    only_x = [True, False, False, False, False]
    only_w2 = [False, False, False, True, False]
    for saved, needs in ((a, [True] * 5), (None, [True] * 5), (None, only_x), (None, only_w2)):
        opcheck(ops.gelu_mlp_bwd.default, (dy, x, w1, w2, h, saved, "gelu_tanh", "auto", needs))
    opcheck(ops.relu2_mlp_bwd.default, (dy, x, w1, w2, h, a, "relu2", "auto", [True] * 5))


@pytest.mark.parametrize("operator", [gelu_mlp, relu2_mlp])
@pytest.mark.parametrize("recompute", [True, False])
def test_compiles_as_one_graph(recompute, operator, device, matmul):
    inputs, incoming = tensors(6, 8, 12, torch.float32, device)
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    assert_equal(
        run(compiled, inputs, incoming, recompute=recompute),
        run(operator, inputs, incoming, recompute=recompute),
    )


def test_autocast_computes_matmuls_in_its_dtype(device):
    inputs, incoming = tensors(6, 8, 12, torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y, *grads = run(gelu_mlp, inputs, incoming)
    assert y.dtype == torch.bfloat16
    assert {grad.dtype for grad in grads} == {torch.float32}
    y16, *grads16 = run(gelu_mlp, [value.bfloat16() for value in inputs], incoming)
    assert_equal([y, *grads], [y16, *(grad.float() for grad in grads16)])


def test_backward_under_autocast_matches_the_backward_outside(device):
    inputs, incoming = tensors(6, 8, 12, torch.float32, device)
    leaves = [value.detach().requires_grad_() for value in inputs]
    y = gelu_mlp(*leaves, recompute=True)  # not the composite, which autocast would change
    outside = torch.autograd.grad(y, leaves, incoming, retain_graph=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = torch.autograd.grad(y, leaves, incoming)
    assert_equal(inside, outside)


@pytest.mark.parametrize("choice", ["fused", "cublas"])
def test_reruns_are_bitwise_equal(device, choice):
    inputs, incoming = tensors(300, 24, 96, torch.bfloat16, device)

    def function(*leaves):
        return torch.ops.tritium.gelu_mlp_fwd(*leaves, "gelu_tanh", False, choice)[0]

    assert_equal(run(function, inputs, incoming), run(function, inputs, incoming))


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("needed", [{"x"}, {"w1"}, {"b1"}, {"w2"}, {"b2"}, {"x", "w2"}])
def test_only_inputs_that_need_gradients_get_them(needed, recompute, device, matmul, small_chunks):
    inputs, incoming = tensors(9, 8, 12, torch.float32, device)
    _, *grads = run(gelu_mlp, inputs, incoming, recompute=recompute)
    expected = dict(zip(["x", "w1", "b1", "w2", "b2"], grads, strict=True))
    leaves = {
        name: value.clone().requires_grad_(name in needed)
        for name, value in zip(expected, inputs, strict=True)
    }
    gelu_mlp(**leaves, recompute=recompute).backward(incoming)
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == needed
    for name in needed:
        assert torch.equal(leaves[name].grad, expected[name])


def test_recompute_saves_one_tensor_less(device):
    inputs, _ = tensors(6, 8, 12, torch.float32, device)
    leaves = [value.requires_grad_() for value in inputs]
    kept = saved_shapes(gelu_mlp, *leaves, recompute=False)
    recomputed = saved_shapes(gelu_mlp, *leaves, recompute=True)
    assert kept == sorted([*recomputed, (6, 12)])


def test_recompute_gives_bitwise_equal_results_without_fusion(device):
    """GELU is not fused for so few rows. A fused forward computes a before h is rounded."""
    inputs, incoming = tensors(6, 8, 12, torch.float32, device)
    assert_equal(
        run(gelu_mlp, inputs, incoming, recompute=True),
        run(gelu_mlp, inputs, incoming, recompute=False),
    )


@pytest.mark.skipif(
    not (INTERPRET or torch.cuda.is_available()), reason="the composite has second derivatives"
)
def test_second_derivative_raises(device):
    (x, *parameters), _ = tensors(6, 8, 12, torch.float32, device)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(gelu_mlp(x, *parameters).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dx.sum().backward()


@pytest.mark.parametrize("operator", [gelu_mlp, relu2_mlp])
def test_float64_raises_for_kernels(operator, device):
    if device.type == "cpu" and not INTERPRET:
        pytest.skip("the reference takes float64")
    inputs, _ = tensors(2, 4, 6, torch.float64, device)
    message = rf"^{operator.__name__}: the kernel takes .*, got float64"
    with pytest.raises(TypeError, match=message):
        operator(*inputs)


def test_gradient_of_relu2_mlp_is_computed_in_float32(device, matmul):
    """In float16, twice the gradient of the activation would be infinite."""
    values = {"x": 1e-3, "w1": 1.0, "b1": 0.0, "w2": 1.0, "b2": 0.0, "dy": 40_000.0}
    shapes = {name: (1,) if name in ("b1", "b2") else (1, 1) for name in values}
    *inputs, incoming = (
        torch.full(shapes[name], value, dtype=torch.float16, device=device)
        for name, value in values.items()
    )
    _, dx, dw1, db1, *_ = run(relu2_mlp, inputs, incoming)
    assert_close([dx.flatten(), db1], [torch.full_like(db1, 80.0)] * 2, rtol=1e-3, atol=0)
    assert_close([dw1], [torch.full_like(dw1, 0.08)], rtol=1e-3, atol=0)


def test_relu2_of_nan_is_nan(device, matmul):
    """The maximum of two numbers is usually the other one if one is NaN."""
    inputs, incoming = tensors(6, 8, 12, torch.float32, device)
    inputs[0][2, 3] = float("nan")
    y, dx, *_ = run(relu2_mlp, inputs, incoming)
    assert y[2].isnan().all()
    assert dx[2].isnan().all()
    assert y[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.plain
@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"x": x}, message) for x, message in BAD_X),
        (
            {"w1": torch.ones(4, 6)},
            r"w1 must have shape \(F, 4\) to match x \(2, 4\), got \(4, 6\); pass weights",
        ),
        ({"w1": torch.ones(0, 4)}, r"w1 must have shape \(F, 4\) .*, got \(0, 4\)"),
        ({"w1": torch.ones(4)}, r"w1 must have shape \(F, 4\) .*, got \(4,\)"),
        ({"w2": torch.ones(6, 4)}, r"w2 must have shape \(4, 6\) .*, got \(6, 4\)"),
        ({"b1": torch.ones(4)}, r"b1 must have shape \(6,\) .*, got \(4,\)"),
        ({"b2": torch.ones(1, 4)}, r"b2 must have shape \(4,\) .*, got \(1, 4\)"),
        (
            {"b2": torch.ones(4).double()},
            r"b2 must be torch.float32 on cpu like x, got torch.float64 on cpu; convert",
        ),
        (
            {"w2": torch.ones(4, 6, device="meta")},
            r"w2 must be torch.float32 on cpu like x, got torch.float32 on meta",
        ),
        ({"w1": [1.0]}, "w1 must be Tensor, got a list"),
        ({"recompute": 1}, "recompute must be bool, got 1"),
        ({"approximate": "gelu"}, "unknown approximate 'gelu'; expected one of tanh, none"),
    ],
)
def test_bad_arguments_raise(change, message):
    good = {
        "x": torch.ones(2, 4),
        "w1": torch.ones(6, 4),
        "b1": torch.ones(6),
        "w2": torch.ones(4, 6),
        "b2": torch.ones(4),
    }
    with pytest.raises(ValueError, match="^gelu_mlp: " + message):
        gelu_mlp(**good | change)
    if "approximate" not in change:
        with pytest.raises(ValueError, match="^relu2_mlp: " + message):
            relu2_mlp(**good | change)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("choice", "kernels"),
    [
        ("fused", ["_gemm_kernel", "_gemm_kernel"]),
        ("cublas", ["_mlp_activation_fwd_kernel", "_mlp_activation_bwd_kernel"]),
    ],
)
def test_matmul_argument_selects_the_kernels(choice, kernels):
    shapes = ((64, 8), (12, 8), (8, 12), (64, 12))
    x, w1, w2, h = (torch.empty(shape, device="meta") for shape in shapes)
    with record_launches("sm_90") as launches:
        launch_fwd(x, w1, None, w2, None, "gelu_tanh", False, choice)
        launch_bwd(x, x, w1, w2, h, h, "gelu_tanh", choice, [True] * 5)
    assert [launch.kernel.__name__ for launch in launches] == [*kernels, "_partial_sums_kernel"]


@pytest.mark.plain
def test_cost_counts_matmuls_and_the_tensor_that_recompute_saves():
    kept = cost(4096, 768, 3072, 2)
    recomputed = cost(4096, 768, 3072, 2, recompute=True)
    assert kept["fwd_flops"] == 2 * 2 * 4096 * 768 * 3072
    assert kept["bwd_flops"] == 2 * kept["fwd_flops"]
    for direction in ("fwd_bytes", "bwd_bytes"):
        assert kept[direction] - recomputed[direction] == 2 * 4096 * 3072
