"""linear and gelu_mlp: the kinds of tests every kernel file has."""

import pytest
import torch
import torch.nn.functional as F

from tests.tolerance import assert_accurate, walk
from tritium.bench.codegen.launches import record_launches
from tritium.kernels import gelu_mlp, linear
from tritium.kernels.core.op import INTERPRET
from tritium.kernels.mlp.gelu_mlp import cost, launch_gelu_mlp_bwd, launch_gelu_mlp_fwd

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Rows, width, feed-forward width: one element, odd, one past a tile, GPT-2's ratio.
SHAPES = [(1, 1, 1), (5, 1, 3), (17, 129, 65), (32, 16, 64)]
APPROXIMATE = ["tanh", "none"]
NAMES = ["y", "dx", "dw1", "db1", "dw2", "db2"]


def tensors(N, D, width, dtype, device, biases=True):
    """x, w1, b1, w2, b2 and an incoming gradient."""
    generator = torch.Generator().manual_seed(N * 10_007 + D * 101 + width)
    shapes = [(N, D), (width, D), (width,), (D, width), (D,), (N, D)]
    values = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    if not biases:
        values[2] = values[4] = None
    return values[:-1], values[-1]


def torch_mlp(x, w1, b1, w2, b2, *, approximate="tanh"):
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate=approximate), w2, b2)


def torch_linear(x, weight, bias=None, *, activation=None):
    h = F.linear(x, weight, bias)
    return (
        h
        if activation is None
        else F.gelu(h, approximate="tanh" if activation == "gelu_tanh" else "none")
    )


def double(values):
    return [None if value is None else value.double() for value in values]


def run(function, inputs, incoming, **options):
    """Output and gradients of `function` at fresh leaves of those of `inputs` that are not None."""
    leaves = [None if value is None else value.detach().requires_grad_() for value in inputs]
    y = function(*leaves, **options)
    return [
        y.detach(),
        *torch.autograd.grad(
            y, [leaf for leaf in leaves if leaf is not None], incoming.to(y.dtype)
        ),
    ]


def scales(inputs, incoming, truth, approximate="tanh"):
    """What each of `truth` is rounded of, by name: itself, and twice the terms of its sum, for h and for dh or a."""
    x, w1, b1, w2, _ = double(inputs)
    h = F.linear(x, w1, b1).requires_grad_()
    a, dy, one = F.gelu(h, approximate=approximate), incoming.double(), torch.ones_like(x[:, :1])
    (dh,) = torch.autograd.grad(a, h, dy @ w2)
    products = ((a, w2.t()), (dh, w1), (dh.t(), x), (dh.t(), one), (dy.t(), a), (dy.t(), 0 * one))
    walks = {name: walk(*factors) for name, factors in zip(NAMES, products, strict=True)}
    return {name: value.abs().max().item() + 2 * walks[name] for name, value in truth.items()}


@pytest.fixture
def chunks(monkeypatch):
    """Where a is formed again, of few rows at a time."""
    monkeypatch.setattr("tritium.kernels.mlp.gelu_mlp.RECOMPUTE_ROWS", 8)


# --- 1. math


@pytest.mark.plain
@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_gradients_of_the_mlp_are_those_of_its_forward(approximate, recompute, biases):
    inputs, _ = tensors(3, 2, 5, torch.float64, "cpu", biases)
    leaves = [value.requires_grad_() for value in inputs if value is not None]

    def function(x, w1, *rest):
        b1, w2, b2 = rest if biases else (None, rest[0], None)
        return gelu_mlp(x, w1, b1, w2, b2, approximate=approximate, recompute=recompute)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.plain
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
def test_gradients_of_linear_are_those_of_its_forward(activation):
    (x, weight, bias, *_), _ = tensors(3, 2, 5, torch.float64, "cpu")
    x, weight, bias = (value.requires_grad_() for value in (x, weight, bias))
    assert torch.autograd.gradcheck(
        lambda *args: linear(*args, activation=activation), (x, weight, bias)
    )
    assert torch.autograd.gradcheck(lambda *args: linear(*args, activation=activation), (x, weight))


@pytest.mark.plain
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_mlp_is_torch_linear_gelu_linear(approximate):
    inputs, incoming = tensors(9, 6, 17, torch.float64, "cpu")
    for got, expected in zip(
        *(run(f, inputs, incoming, approximate=approximate) for f in (gelu_mlp, torch_mlp)),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activation_is_torch_gelu_far_from_zero_too(activation, dtype, device, products):
    if dtype == torch.float64 and (INTERPRET or device.type == "cuda"):
        pytest.skip("kernels do not take float64")
    values = [0.0, -0.0, 1e-20, 3.0, -3.0, 6.0, -6.0, 50.0, -50.0, 1e15, -1e15]
    if INTERPRET or device.type == "cuda":
        # In float32 the reference's gradient is not a number there, as PyTorch's is not.
        values += [1e20, -1e20]
    x = torch.tensor(values, dtype=dtype, device=device)[:, None]
    one, incoming = (torch.ones(size, 1, dtype=dtype, device=device) for size in (1, len(values)))
    theirs = run(torch_linear, double([x, one]), incoming, activation=activation)
    for got, expected in zip(
        run(linear, [x, one], incoming, activation=activation), theirs, strict=True
    ):
        torch.testing.assert_close(got, expected.to(dtype), rtol=4e-6, atol=1e-6)


# --- 2. against the float64 truth


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("N", "D", "width"), SHAPES)
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_mlp_is_accurate(N, D, width, dtype, approximate, device, products, chunks):
    inputs, incoming = tensors(N, D, width, dtype, device)
    truth = run(torch_mlp, double(inputs), incoming, approximate=approximate)
    peer = run(torch_mlp, inputs, incoming, approximate=approximate)
    bounds = scales(inputs, incoming, dict(zip(NAMES, truth, strict=True)), approximate)
    for recompute in (True, False):
        got = run(gelu_mlp, inputs, incoming, approximate=approximate, recompute=recompute)
        for name, *values in zip(NAMES, got, truth, peer, strict=True):
            assert_accurate(name, *values, length=N + D + width, scale=bounds[name])


@pytest.mark.parametrize("dtype", FLOATS)
def test_mlp_without_biases_is_accurate(dtype, device, products):
    (x, w1, _, w2, _), incoming = tensors(17, 33, 65, dtype, device)
    inputs = [x, w1, None, w2, None]
    names = ["y", "dx", "dw1", "dw2"]
    truth = dict(zip(names, run(torch_mlp, double(inputs), incoming), strict=True))
    bounds = scales(inputs, incoming, truth)
    got, peer = (run(function, inputs, incoming) for function in (gelu_mlp, torch_mlp))
    for name, *values in zip(names, got, truth.values(), peer, strict=True):
        assert_accurate(name, *values, length=17 + 33 + 65, scale=bounds[name])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("N", "D", "width"), SHAPES)
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
def test_linear_is_accurate(N, D, width, dtype, activation, device, products):
    (x, weight, bias, _, _), _ = tensors(N, D, width, dtype, device)
    incoming = torch.randn(N, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for inputs in ((x, weight, bias), (x, weight)):
        got = run(linear, inputs, incoming, activation=activation)
        truth = run(torch_linear, double(inputs), incoming, activation=activation)
        peer = run(torch_linear, inputs, incoming, activation=activation)
        for name, *values in zip(
            ["y", "dx", "dweight", "dbias"][: len(got)], got, truth, peer, strict=True
        ):
            assert_accurate(name, *values, length=N + D + width)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_recompute_is_as_accurate_over_many_chunks(dtype, device, chunks):
    """Gradients that chunks add to are not rounded in between."""
    inputs, incoming = tensors(256, 8, 12, dtype, device)
    truth = run(torch_mlp, double(inputs), incoming)
    formed, kept = (
        run(gelu_mlp, inputs, incoming, recompute=recompute) for recompute in (True, False)
    )
    for name, *values in zip(NAMES, formed, truth, kept, strict=True):
        assert_accurate(name, *values, length=256)


@pytest.mark.parametrize("width", [257, 3000])
def test_a_program_sums_the_bias_gradient_over_all_of_its_rows(width, device, monkeypatch):
    """On one multiprocessor, each program has several blocks of rows; all where there are more columns than programs."""
    monkeypatch.setattr("tritium.kernels.mlp._epilogues.sm_count", lambda device: 1)
    inputs, incoming = tensors(200, 8, width, torch.float32, device)
    truth = run(torch_mlp, double(inputs), incoming)
    for name, *values in zip(
        NAMES, run(gelu_mlp, inputs, incoming), truth, run(torch_mlp, inputs, incoming), strict=True
    ):
        assert_accurate(name, *values, length=200 + 8 + width)


# --- 3. layouts


def test_any_layout_gives_what_the_contiguous_copy_gives(device, products):
    (x, w1, b1, w2, b2), incoming = tensors(12, 8, 16, torch.float32, device)
    views = [
        x.t().contiguous().t(),
        torch.cat([x, x], dim=1)[:, :8],
        torch.stack([x, x], dim=2)[:, :, 0],
        x.view(3, 4, 8).transpose(0, 1).contiguous().transpose(0, 1),
    ]
    expected = None
    for view in [x, *views]:
        transposed = [
            weight.t().contiguous().t() if view is not x else weight for weight in (w1, w2)
        ]
        strided = b1 if view is x else torch.stack([b1, b1], dim=1)[:, 0]
        leaves = [
            leaf.detach().requires_grad_()
            for leaf in (view, transposed[0], strided, transposed[1], b2)
        ]
        y = gelu_mlp(*leaves)
        z = linear(leaves[0], leaves[1], leaves[2], activation="gelu_tanh")
        dy = incoming.t().contiguous().t().reshape(y.shape)
        got = [
            y,
            z,
            *torch.autograd.grad(
                (y, z), leaves, (dy, torch.ones(1, device=device).expand(z.shape))
            ),
        ]
        expected = expected or got
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.reshape(b.shape), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recompute", [True, False])
def test_leading_axes_and_empty_inputs(recompute, device, products):
    inputs, incoming = tensors(24, 4, 6, torch.float32, device)
    deep = [inputs[0].view(2, 3, 4, 4), *inputs[1:]]
    for a, b in zip(
        run(gelu_mlp, deep, incoming.view(2, 3, 4, 4), recompute=recompute),
        run(gelu_mlp, inputs, incoming, recompute=recompute),
        strict=True,
    ):
        assert torch.equal(a.reshape(b.shape), b)
    assert gelu_mlp(inputs[0][0], *inputs[1:]).shape == (4,)
    assert linear(inputs[0][0], *inputs[1:3], activation="gelu").shape == (6,)

    y, dx, *dparameters = run(
        gelu_mlp, [inputs[0][:0], *inputs[1:]], incoming[:0], recompute=recompute
    )
    assert y.shape == dx.shape == (0, 4)
    assert not any(value.any() for value in dparameters)
    assert linear(inputs[0][:0].view(0, 3, 4), *inputs[1:3], activation="gelu").shape == (0, 3, 6)


# --- 4. contract


def test_opcheck(device, chunks):
    inputs, dy = tensors(11, 8, 12, torch.float32, device)
    x, w1, b1, w2, b2 = (value.requires_grad_() for value in inputs)
    ops = torch.ops.tritium
    torch.library.opcheck(ops.linear_fwd.default, (x, w1, b1, "none", "auto"))
    torch.library.opcheck(ops.gelu_mlp_fwd.default, (x, w1, b1, w2, b2, "tanh", False, "auto"))
    torch.library.opcheck(ops.gelu_mlp_fwd.default, (x, w1, None, w2, None, "none", True, "fused"))
    x, w1, w2 = (value.detach() for value in (x, w1, w2))
    h, a = torch.randn(11, 12, device=device), torch.randn(11, 12, device=device)
    torch.library.opcheck(ops.linear_bwd.default, (h, x, w1, a, "tanh", [True, True, False]))
    only_x, only_w2 = ([index == needed for index in range(5)] for needed in (0, 3))
    for saved, needs in ((a, [True] * 5), (None, [True] * 5), (None, only_x), (None, only_w2)):
        torch.library.opcheck(
            ops.gelu_mlp_bwd.default, (dy, x, w1, w2, h, saved, "tanh", "auto", needs)
        )


@pytest.mark.parametrize("recompute", [True, False])
def test_compiles_as_one_graph(recompute, device, products):
    inputs, incoming = tensors(6, 8, 12, torch.float32, device)

    def both(x, w1, b1, w2, b2):
        return (
            gelu_mlp(x, w1, b1, w2, b2, recompute=recompute)
            + linear(x, w1, b1, activation="gelu")[:, :8]
        )

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(run(f, inputs, incoming) for f in (compiled, both)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
def test_autocast_multiplies_in_its_dtype(activation, device):
    inputs, incoming = tensors(6, 8, 12, torch.float32, device)
    half, wide_incoming = (
        [value.bfloat16() for value in inputs],
        torch.cat([incoming, incoming], dim=1)[:, :12],
    )
    for function, count, dy, options in (
        (gelu_mlp, 5, incoming, {}),
        (linear, 3, wide_incoming, {"activation": activation}),
    ):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y, *grads = run(function, inputs[:count], dy, **options)
        assert y.dtype == torch.bfloat16
        assert {grad.dtype for grad in grads} == {torch.float32}
        for a, b in zip([y, *grads], run(function, half[:count], dy, **options), strict=True):
            assert torch.equal(a, b.to(a.dtype))


@pytest.mark.parametrize("products", ["fused", "cublas"])
def test_reruns_are_bitwise_equal(device, products):
    inputs, incoming = tensors(300, 24, 96, torch.bfloat16, device)

    def forced(*leaves):
        return torch.ops.tritium.gelu_mlp_fwd(*leaves, "tanh", False, products)[0]

    for a, b in zip(*(run(forced, inputs, incoming) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("needed", [{"x"}, {"w1"}, {"b1"}, {"w2"}, {"b2"}, {"x", "w2"}])
def test_only_some_inputs_need_gradients(needed, recompute, device, products, chunks):
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


@pytest.mark.parametrize("needed", ["x", "weight", "bias"])
def test_linear_where_only_one_input_needs_a_gradient(needed, device):
    (x, weight, bias, _, _), _ = tensors(6, 8, 12, torch.float32, device)
    leaves = {"x": x, "weight": weight, "bias": bias}
    leaves[needed].requires_grad_()
    linear(**leaves, activation="gelu_tanh").sum().backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [needed]


def test_recompute_keeps_one_tensor_fewer_and_changes_no_bit(device):
    """Not fused, as so few rows are not: a fused forward forms a from h before that is rounded."""
    inputs, incoming = tensors(6, 8, 12, torch.float32, device)
    kept = {}
    for recompute in (False, True):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda value, recompute=recompute: (
                kept.setdefault(recompute, []).append(value.shape) or value
            ),
            lambda value: value,
        ):
            kept[recompute, "results"] = run(gelu_mlp, inputs, incoming, recompute=recompute)
    assert sorted(kept[False]) == sorted([*kept[True], (6, 12)])
    assert torch.ops.tritium.gelu_mlp_fwd(*inputs, "tanh", True, "auto")[2].numel() == 0
    for a, b in zip(kept[False, "results"], kept[True, "results"], strict=True):
        assert torch.equal(a, b)


def test_a_backward_under_autocast_is_that_of_its_forward(device):
    inputs, incoming = tensors(6, 8, 12, torch.float32, device)
    leaves = [value.detach().requires_grad_() for value in inputs]
    y = gelu_mlp(*leaves, recompute=True)  # else it is PyTorch's on a CPU
    outside = torch.autograd.grad(y, leaves, incoming, retain_graph=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = torch.autograd.grad(y, leaves, incoming)
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


@pytest.mark.skipif(
    not (INTERPRET or torch.cuda.is_available()), reason="PyTorch's own functions have one"
)
@pytest.mark.parametrize("function", [gelu_mlp, linear])
def test_a_second_derivative_is_refused(function, device):
    (x, *parameters), _ = tensors(6, 8, 12, torch.float32, device)
    x.requires_grad_()
    y = (
        gelu_mlp(x, *parameters)
        if function is gelu_mlp
        else linear(x, *parameters[:2], activation="gelu")
    )
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dx.sum().backward()


def test_kernels_refuse_float64(device):
    if device.type == "cpu" and not INTERPRET:
        pytest.skip("float64 on the CPU runs the reference")
    inputs, _ = tensors(2, 4, 6, torch.float64, device)
    with pytest.raises(
        TypeError, match=r"^gelu_mlp: the kernel takes float32, bfloat16 or float16, got float64"
    ):
        gelu_mlp(*inputs)
    with pytest.raises(TypeError, match=r"^linear: the kernel takes"):
        linear(*inputs[:3], activation="gelu")


@pytest.mark.plain
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.ones(())},
            r"x must be floating point \(\.\.\., D\) with D at least 1, got torch.float32 \(\)",
        ),
        (
            {"x": torch.ones(2, 4, dtype=torch.long)},
            r"x must be floating point .*, got torch.int64 \(2, 4\)",
        ),
        (
            {"w1": torch.ones(4, 6)},
            r"w1 must be \(F, 4\) to match x \(2, 4\), got \(4, 6\); pass weights",
        ),
        ({"w1": torch.ones(0, 4)}, r"w1 must be \(F, 4\) to match x \(2, 4\), got \(0, 4\)"),
        ({"w1": torch.ones(4)}, r"w1 must be \(F, 4\) to match x \(2, 4\), got \(4,\)"),
        ({"w2": torch.ones(6, 4)}, r"w2 must be \(4, 6\) to match x \(2, 4\), got \(6, 4\)"),
        ({"recompute": 1}, "recompute must be bool, got 1"),
        ({"w1": [1.0]}, "w1 must be Tensor, got a list"),
        ({"b1": torch.ones(4)}, r"b1 must be \(6,\) to match x \(2, 4\), got \(4,\)"),
        ({"b2": torch.ones(1, 4)}, r"b2 must be \(4,\) to match x \(2, 4\), got \(1, 4\)"),
        (
            {"b2": torch.ones(4).double()},
            r"b2 must be torch.float32 on cpu like x, got torch.float64 on cpu; convert",
        ),
        (
            {"w2": torch.ones(4, 6, device="meta")},
            r"w2 must be torch.float32 on cpu like x, got torch.float32 on meta",
        ),
        ({"approximate": "gelu"}, r"approximate must be 'tanh' or 'none', got 'gelu'"),
    ],
)
def test_bad_input_of_the_mlp_is_named(change, message):
    good = {
        "x": torch.ones(2, 4),
        "w1": torch.ones(6, 4),
        "b1": torch.ones(6),
        "w2": torch.ones(4, 6),
        "b2": torch.ones(4),
    }
    with pytest.raises(ValueError, match="^gelu_mlp: " + message):
        gelu_mlp(**good | change)


@pytest.mark.plain
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.ones(2, 0)},
            r"x must be floating point \(\.\.\., D\) with D at least 1, got torch.float32 \(2, 0\)",
        ),
        (
            {"weight": torch.ones(4, 6)},
            r"weight must be \(F, 4\) to match x \(2, 4\), got \(4, 6\)",
        ),
        ({"bias": torch.ones(4)}, r"bias must be \(6,\) to match x \(2, 4\), got \(4,\)"),
        (
            {"weight": torch.ones(6, 4).half()},
            r"weight must be torch.float32 on cpu like x, got torch.float16 on cpu",
        ),
        ({"activation": 1}, r"activation must be str \| None, got 1"),
        ({"activation": "relu"}, r"activation must be None, 'gelu' or 'gelu_tanh', got 'relu'"),
    ],
)
def test_bad_input_of_linear_is_named(change, message, activation):
    good = {
        "x": torch.ones(2, 4),
        "weight": torch.ones(6, 4),
        "bias": torch.ones(6),
        "activation": activation,
    }
    with pytest.raises(ValueError, match="^linear: " + message):
        linear(**good | change)


@pytest.mark.plain
def test_products_are_those_asked_for():
    x, w1, w2, h = (
        torch.empty(shape, device="meta") for shape in ((64, 8), (12, 8), (8, 12), (64, 12))
    )
    ours, between = (
        ["_gemm_kernel"] * 2,
        ["_mlp_activation_fwd_kernel", "_mlp_activation_bwd_kernel"],
    )
    for products, kernels in (("fused", ours), ("cublas", between)):
        with record_launches("sm_90") as launches:
            launch_gelu_mlp_fwd(x, w1, None, w2, None, "tanh", False, products)
            launch_gelu_mlp_bwd(x, x, w1, w2, h, h, "tanh", products, [True] * 5)
        assert [launch.kernel.__name__ for launch in launches] == [*kernels, "_partial_sums_kernel"]


@pytest.mark.plain
def test_cost_counts_products_and_what_recompute_spares():
    whole, spared = cost(4096, 768, 3072, 2), cost(4096, 768, 3072, 2, recompute=True)
    assert whole["fwd_flops"] == 2 * 2 * 4096 * 768 * 3072
    assert whole["bwd_flops"] == 2 * whole["fwd_flops"]
    for direction in ("fwd_bytes", "bwd_bytes"):
        assert whole[direction] - spared[direction] == 2 * 4096 * 3072
