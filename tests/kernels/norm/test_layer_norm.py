"""layer_norm and add_layer_norm: the five groups of tests that each operator has."""

import re
import sys

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.compare import assert_equal, opcheck
from tests.tolerance import assert_accurate
from tritium.bench.codegen.disassembly import resources
from tritium.bench.codegen.launches import (
    TARGETS,
    RunLaunchers,
    compile_launch,
    record_launches,
)
from tritium.kernels import add_layer_norm, add_rms_norm, layer_norm
from tritium.kernels.core.dropout import Dropout, resolve_dropout
from tritium.kernels.core.op import INTERPRET
from tritium.kernels.core.partial_sums import PARTIALS_PER_STEP
from tritium.kernels.norm._checks import MAX_WIDTH
from tritium.kernels.norm.launch import MAX_RESIDENT_WIDTH, plan
from tritium.kernels.norm.layer_norm import (
    _add_fwd,
    cost,
    launch_add_fwd,
    launch_bwd,
    launch_fwd,
)

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# One element, odd, one row past a tile and one before, one column past a tile, GPT-2's width, one
# past it.
SHAPES = [(1, 1), (5, 1), (3, 7), (129, 16), (33, 64), (31, 65), (4, 768), (3, 769)]
WIDE = [(2, MAX_RESIDENT_WIDTH + 1), (3, MAX_RESIDENT_WIDTH + 4096)]


def tensors(M, N, dtype, device, mean=0.0):
    """x, residual, weight, bias and two incoming gradients."""
    generator = torch.Generator().manual_seed(M * 100_003 + N)
    shapes = [(M, N), (M, N), (N,), (N,), (M, N), (M, N)]
    x, *rest = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return [x + mean, *rest]


def run(function, inputs, incoming):
    """Return the outputs of `function`, and the gradients of those inputs that are not None."""
    leaves = [value.detach().requires_grad_() if value is not None else None for value in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(
        outputs, [leaf for leaf in leaves if leaf is not None], incoming[: len(outputs)]
    )
    return [output.detach() for output in outputs] + list(grads)


def torch_layer_norm(x, weight, bias=None):
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def torch_add_layer_norm(x, residual, weight, bias=None):
    h = x + residual
    return torch_layer_norm(h, weight, bias), h


def add_layer_norm_after_bias(x, residual, weight, bias, added_bias):
    return add_layer_norm(x, residual, weight, bias, added_bias=added_bias)


def torch_add_layer_norm_after_bias(x, residual, weight, bias, added_bias):
    # Adds 0, in the dtype of the sum that is tested.
    return torch_add_layer_norm(x + (added_bias - added_bias.detach()), residual, weight, bias)


def check(operator, definition, inputs, incoming, names):
    """Compare outputs and gradients of `operator` with those of `definition` in float64."""
    double = [None if value is None else value.double() for value in inputs]
    got = run(operator, inputs, incoming)
    truth = run(definition, double, [value.double() for value in incoming])
    baseline = run(definition, inputs, incoming)
    M, N = inputs[0].shape
    # In dx large terms cancel. In a row of one element dx is 0, while the terms are as large as
    # r g. So the size of r g decides how large an error may be.
    h, weight = (double[0] + double[1], double[2]) if len(inputs) >= 4 else double[:2]
    scale = (
        (incoming[0] * weight).abs().max() / (h.var(-1, correction=0) + 1e-5).min().sqrt()
    ).item()
    for name, *values in zip(names, got, truth, baseline, strict=True):
        sizes = {"length": M} if name in ("dweight", "dbias") else {"length": N}
        if name in ("dx", "dresidual"):
            sizes |= {"scale": scale, "terms": torch.float32}
        if name == "dadded":
            # A sum of M elements of dx with independent errors.
            sizes = {"scale": M**0.5 * scale, "terms": torch.float32, "length": M + N}
        assert_accurate(name, *values, **sizes)


# --- 1. math


@pytest.mark.plain
@pytest.mark.parametrize("with_bias", [True, False])
def test_reference_gradients_match_finite_differences(with_bias):
    x, residual, weight, bias, _, _ = (
        value.requires_grad_() for value in tensors(3, 5, torch.float64, "cpu")
    )
    bias = bias if with_bias else None
    assert torch.autograd.gradcheck(layer_norm, (x, weight, bias))
    assert torch.autograd.gradcheck(add_layer_norm, (x, residual, weight, bias))


@pytest.mark.plain
def test_gradient_of_an_added_bias_matches_finite_differences():
    x, residual, weight, bias, added_bias, _ = (
        value.requires_grad_() for value in tensors(3, 5, torch.float64, "cpu")
    )
    added_bias = added_bias[0].detach().requires_grad_()

    def after_bias(x, residual, weight, bias, added_bias):
        x = x + added_bias.detach()
        plain = layer_norm(x, weight, bias, added_bias=added_bias)
        return plain, *add_layer_norm(x, residual, weight, bias, added_bias=added_bias)

    assert torch.autograd.gradcheck(after_bias, (x, residual, weight, bias, added_bias))


@pytest.mark.plain
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("has_bias", [True, False])
def test_operator_returns_the_gradient_of_the_composite(has_bias, dropout_p):
    """In float64 a CPU runs the composite. Here the operator runs too."""
    x, residual, weight, bias, *incoming = tensors(4, 6, torch.float64, "cpu")
    dropout = resolve_dropout("test", dropout_p, 3, x.device)
    inputs = (x, residual, weight, bias if has_bias else None, 1e-5, x[0], dropout)
    results = []
    for run_forward in (_add_fwd, _add_fwd.dispatch):
        leaves = [
            value.clone().requires_grad_() if isinstance(value, torch.Tensor) else value
            for value in inputs
        ]
        outputs = run_forward(*leaves)[:2]
        wanted = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        results.append(torch.autograd.grad(outputs, wanted, incoming))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.plain
def test_reference_matches_torch_layer_norm():
    x, residual, weight, bias, *incoming = tensors(7, 33, torch.float64, "cpu")
    for got, expected in zip(
        run(add_layer_norm, (x, residual, weight, bias), incoming),
        run(torch_add_layer_norm, (x, residual, weight, bias), incoming),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


# --- 2. kernel against the float64 reference


@pytest.mark.parametrize(
    ("M", "N", "dtype"),
    [
        *((*shape, dtype) for shape in SHAPES for dtype in FLOATS),
        *((*WIDE[0], dtype) for dtype in (torch.float32, torch.bfloat16)),
        (*WIDE[1], torch.float16),
    ],
)
def test_add_layer_norm_is_accurate(M, N, dtype, device):
    x, residual, weight, bias, *incoming = tensors(M, N, dtype, device)
    names = ["y", "h", "dx", "dresidual", "dweight", "dbias"]
    check(add_layer_norm, torch_add_layer_norm, (x, residual, weight, bias), incoming, names)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("M", "N"), [(1, 1), (129, 16), (31, 65), (3, 769), WIDE[0]])
def test_gradient_of_an_added_bias_is_accurate(M, N, dtype, device):
    """The baseline sums dx after rounding it. The kernel sums it before."""
    x, residual, weight, bias, *incoming = tensors(M, N, dtype, device)
    names = ["y", "h", "dx", "dresidual", "dweight", "dbias", "dadded"]
    check(
        add_layer_norm_after_bias,
        torch_add_layer_norm_after_bias,
        (x, residual, weight, bias, weight.flip(0)),
        incoming,
        names,
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("M", "N"), [(5, 1), (31, 65), (3, 769), WIDE[0]])
def test_layer_norm_without_bias_is_accurate(M, N, dtype, device):
    x, _, weight, _, *incoming = tensors(M, N, dtype, device)
    check(layer_norm, torch_layer_norm, (x, weight), incoming, ["y", "dx", "dweight"])


@pytest.mark.parametrize("N", [769, MAX_RESIDENT_WIDTH + 1])
def test_masked_columns_do_not_enter_the_variance(N, device):
    """A masked element would add the square of the mean, which is far from zero here."""
    x, _, weight, bias, *incoming = tensors(2, N, torch.float32, device, mean=1000.0)
    check(
        layer_norm, torch_layer_norm, (x, weight, bias), incoming, ["y", "dx", "dweight", "dbias"]
    )


@pytest.mark.parametrize(
    ("M", "N", "sms", "partials"),
    [
        (37, 1000, 1, 4),
        (9, MAX_RESIDENT_WIDTH + 1, 1, 4),
        (2 * PARTIALS_PER_STEP + 9, 1025, 99, 137),
    ],
)
def test_backward_programs_own_several_blocks_of_rows(M, N, sms, partials, device, monkeypatch):
    """In the last case the kernel that adds up the partial sums takes several steps, too."""
    monkeypatch.setattr(sys.modules[plan.__module__], "sm_count", lambda device: sms)
    assert plan(M, N, sms).partials == partials
    x, residual, weight, bias, *incoming = tensors(M, N, torch.float32, device)
    names = ["y", "h", "dx", "dresidual", "dweight", "dbias", "dadded"]
    check(
        add_layer_norm_after_bias,
        torch_add_layer_norm_after_bias,
        (x, residual, weight, bias, weight.flip(0)),
        incoming,
        names,
    )


def test_residual_wider_than_x_gives_a_wider_sum(device):
    x, residual, weight, bias, *_ = tensors(4, 96, torch.float32, device)
    x = x.bfloat16().requires_grad_()
    y, h = add_layer_norm(x, residual.requires_grad_(), weight, bias)
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(h, x + residual, rtol=0, atol=0)
    (y.float().sum() + h.square().sum()).backward()
    assert (x.grad.dtype, residual.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(x.grad, residual.grad.bfloat16(), rtol=0, atol=0)


# --- 3. layouts


def layouts(M, N, device):
    """Views (M, N) by the name of their layout."""
    base = torch.randn(2 * M, 2 * N, generator=torch.Generator().manual_seed(1)).to(device)
    return {
        "transposed": base.flatten()[: N * M].view(N, M).t(),
        "row stride": base[::2, :N],
        "column slice": base[:M, 3 : 3 + N],
        "column stride": base[:M, ::2],
        "expanded": base[:1, :N].expand(M, N),
    }


@pytest.mark.parametrize(
    "name", ["transposed", "row stride", "column slice", "column stride", "expanded"]
)
def test_any_layout_gives_the_result_of_a_contiguous_copy(name, device):
    M, N = 6, 10
    x = layouts(M, N, device)[name]
    _, residual, weight, bias, *incoming = tensors(M, N, torch.float32, device)
    strided = torch.stack([weight, bias], dim=1)
    transposed = [gradient.t().contiguous().t() for gradient in incoming]
    got = run(add_layer_norm, (x, residual, strided[:, 0], strided[:, 1]), transposed)
    expected = run(add_layer_norm, (x.contiguous(), residual, weight, bias), incoming)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("N", [40, pytest.param(MAX_RESIDENT_WIDTH + 1, marks=pytest.mark.slow)])
def test_row_strides_are_independent(N, device):
    """Each tensor in its own run is a slice of a tensor with longer rows, read without a copy."""
    M = 3
    x, residual, weight, bias, dy, dh = tensors(M, N, torch.float32, device)
    values = {"x": x, "residual": residual, "dy": dy, "dh": dh}
    weight.requires_grad_()
    bias.requires_grad_()

    def outputs_and_gradients(x, residual, dy, dh):
        x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
        fused = add_layer_norm(x, residual, weight, bias)
        plain = layer_norm(x, weight, bias)
        fused_grads = torch.autograd.grad(fused, (x, residual, weight, bias), (dy, dh))
        plain_grads = torch.autograd.grad(plain, (x, weight, bias), dy)
        return [*fused, plain, *fused_grads, *plain_grads]

    expected = outputs_and_gradients(**values)
    for name, value in values.items():
        longer = torch.full((M, N + 7), 1e3, device=device)
        longer[:, 5 : 5 + N] = value
        got = outputs_and_gradients(**values | {name: longer[:, 5 : 5 + N]})
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b), name


def test_any_number_of_leading_axes(device):
    weight = torch.randn(8, device=device)
    x = torch.randn(2, 3, 4, 8, device=device, requires_grad=True)
    y = layer_norm(x, weight)
    assert y.shape == x.shape
    y.sum().backward()  # the incoming gradient is one expanded element
    assert x.grad.shape == x.shape
    assert layer_norm(x[0, 0, 0], weight).shape == (8,)


def test_no_rows_give_empty_outputs_and_zero_weight_gradients(device):
    weight = torch.randn(8, device=device, requires_grad=True)
    x = torch.empty(0, 8, device=device, requires_grad=True)
    y = layer_norm(x, weight)
    assert y.shape == (0, 8)
    y.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


# --- 4. contract


def test_opcheck(device):
    M, N = 5, 24
    x, residual, weight, bias, dy, dh = (
        value.requires_grad_() for value in tensors(M, N, torch.float32, device)
    )
    statistics = torch.randn(M, device=device), torch.rand(M, device=device)
    ops = torch.ops.tritium
    added_bias = torch.randn(N, dtype=torch.bfloat16, device=device, requires_grad=True)
    opcheck(ops.layer_norm_fwd.default, (x, weight, None, 1e-5, added_bias))
    opcheck(ops.add_layer_norm_fwd.default, (x, residual, weight, bias, 1e-5, None, 0.0, None))
    opcheck(
        ops.add_layer_norm_fwd.default, (x, residual, weight, bias, 1e-5, added_bias, 0.0, None)
    )
    plain = [value.detach() for value in (dy, dh, x, weight)]
    opcheck(ops.layer_norm_bwd.default, (*plain, *statistics, True, None, 0.0, None))
    opcheck(
        ops.layer_norm_bwd.default,
        (plain[0], None, *plain[2:], *statistics, False, torch.bfloat16, 0.0, None),
    )


@pytest.mark.parametrize("operator", [add_layer_norm, add_rms_norm])
def test_results_for_transposed_axes_are_contiguous(operator, device):
    """On the meta device too: torch.compile expects the strides that a tensor has there."""
    x, residual = torch.randn(2, 3, 4, 8, device=device).transpose(1, 2).bfloat16()
    weight = torch.ones(8, device=device)
    for target in (device, "meta"):
        inputs = [each.to(target) for each in (x, residual, weight)]
        assert not inputs[0].is_contiguous()
        assert all(result.is_contiguous() for result in operator(*inputs))


def test_compiles_as_one_graph(device):
    *inputs, dy, dh = tensors(6, 40, torch.float32, device)
    inputs.append(inputs[2].flip(0))
    compiled = torch.compile(
        lambda *args: add_layer_norm_after_bias(*args), fullgraph=True, backend="aot_eager"
    )
    for a, b in zip(
        run(compiled, inputs, [dy, dh]),
        run(add_layer_norm_after_bias, inputs, [dy, dh]),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_eps_can_be_a_large_int(device):
    """Such an int does not fit 64 bits."""
    x, weight = torch.arange(8.0, device=device)[None] * 1e15, torch.ones(8, device=device)
    assert_equal([layer_norm(x, weight, eps=10**30)], [layer_norm(x, weight, eps=1e30)])
    got, expected = (add_layer_norm(x, x, weight, eps=eps) for eps in (10**30, 1e30))
    assert_equal(got, expected)


def test_autocast_keeps_the_dtype_of_x(device):
    x, _, weight, bias, *_ = tensors(4, 32, torch.bfloat16, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = layer_norm(x, weight.float(), bias.float())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer_norm(x, weight.float(), bias.float()))


def test_autocast_gives_the_gradient_of_a_float32_added_bias_in_float32(device):
    x, _, weight, bias, dy, _ = tensors(40, 32, torch.bfloat16, device)
    added_bias = bias.float().requires_grad_()
    x.requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = layer_norm(x, weight.float(), bias.float(), added_bias=added_bias)
    y.backward(dy)
    assert added_bias.grad.dtype == torch.float32
    # x.grad is rounded to bfloat16, but the sum is not computed from the rounded values.
    rounding = torch.finfo(torch.bfloat16).eps / 2 * x.grad.float().abs().sum(0)
    assert ((added_bias.grad - x.grad.float().sum(0)).abs() <= rounding).all()
    assert not torch.equal(added_bias.grad, x.grad.float().sum(0))


def test_reruns_are_bitwise_equal(device):
    x, residual, weight, bias, *incoming = tensors(300, 48, torch.bfloat16, device)
    inputs = (x, residual, weight, bias, bias)
    first, second = (run(add_layer_norm_after_bias, inputs, incoming) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", [add_layer_norm, add_rms_norm])
def test_two_backwards_add_up_in_x_and_in_residual(operator, dtype, backend, device):
    """Also for more than two axes, where autograd could give both the same memory."""
    x, residual = (
        torch.randn(2, 3, 8, dtype=dtype, device=device, requires_grad=True) for _ in range(2)
    )
    weight = torch.ones(8, dtype=dtype, device=device)
    call = operator if backend is None else torch.compile(operator, backend=backend)
    dy, dh = torch.randn(2, 2, 3, 8, device=device).to(dtype)
    passed = dh.clone()
    grads = []
    for _ in range(2):
        torch.autograd.backward(call(x, residual, weight), (dy, passed))
        grads.append((x.grad.clone(), residual.grad.clone()))
    for once, twice in zip(*grads, strict=True):
        assert torch.equal(2 * once, twice)
    assert torch.equal(passed, dh)


@pytest.mark.plain
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_residual_may_be_float64_on_a_cpu(dtype):
    x, residual, weight, bias, dy, _ = tensors(4, 12, torch.float64, "cpu")
    x, weight, bias = (each.to(dtype) for each in (x, weight, bias))
    inputs = [each.requires_grad_() for each in (x, residual, weight, bias)]
    got = torch.autograd.grad(add_layer_norm(*inputs)[0], inputs, dy.to(dtype))
    exact = [each.double() for each in inputs]
    expected = torch.autograd.grad(add_layer_norm(*exact)[0], exact, dy)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_frozen_inputs_get_no_gradient(frozen, device):
    x, _, weight, bias, *_ = tensors(4, 12, torch.float32, device)
    inputs = {"x": x, "weight": weight, "bias": bias}
    for name, value in inputs.items():
        value.requires_grad_(name != frozen)
    layer_norm(x, weight, bias).square().sum().backward()
    assert [name for name, value in inputs.items() if value.grad is None] == [frozen]


@pytest.mark.parametrize("N", [12, MAX_RESIDENT_WIDTH + 1])
def test_value_of_an_added_bias_is_not_read(N, device):
    x, residual, weight, bias, *incoming = tensors(4, N, torch.bfloat16, device)
    nan = torch.full_like(bias, float("nan"))
    got = run(add_layer_norm_after_bias, (x, residual, weight, bias, nan), incoming)
    expected = run(add_layer_norm, (x, residual, weight, bias), incoming)
    assert got[-1].isfinite().all()
    for a, b in zip(got[:-1], expected, strict=True):
        assert torch.equal(a, b)


def test_gradient_of_an_added_bias_does_not_depend_on_which_other_inputs_get_one(device):
    x, residual, weight, bias, *incoming = tensors(9, 12, torch.bfloat16, device)
    expected = run(add_layer_norm_after_bias, (x, residual, weight, bias, bias), incoming)[-1]
    added_bias = bias.clone().requires_grad_()
    y, h = add_layer_norm(x, residual, weight, bias, added_bias=added_bias)
    torch.autograd.backward((y, h), incoming)
    assert torch.equal(added_bias.grad, expected)
    added_bias.grad = None
    y, h = add_layer_norm(x, residual, weight, added_bias=added_bias)
    torch.autograd.backward((y, h), incoming)
    assert torch.equal(added_bias.grad, expected)


@pytest.mark.plain
@pytest.mark.parametrize("is_needed", [True, False])
def test_sums_for_an_added_bias_are_computed_only_if_its_gradient_is_needed(is_needed):
    x, weight, bias = (torch.empty(shape, device="meta") for shape in ((6, 8), (8,), (8,)))
    bias.requires_grad_(is_needed)
    with record_launches("sm_90") as launches, RunLaunchers():
        layer_norm(x.requires_grad_(), weight, added_bias=bias).sum().backward()
    backward = launches[1].arguments
    assert (backward["dadded_partial_ptr"] is not None) == is_needed


def test_gradients_are_right_if_only_the_sum_is_used(device):
    """No gradient reaches y."""
    x, residual, weight, bias, *_ = (
        value.requires_grad_() for value in tensors(4, 12, torch.float32, device)
    )
    add_layer_norm(x, residual, weight, bias)[1].sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(residual.grad, x.grad)


@pytest.mark.parametrize("narrow", ["weight", "bias"])
def test_weight_and_bias_may_have_different_dtypes(narrow, device):
    """Values of the narrower dtype are converted to the wider one, and gradients back."""
    x, _, weight, bias, dy, _ = tensors(4, 12, torch.float32, device)
    parameters = {"weight": weight, "bias": bias}
    parameters[narrow] = parameters[narrow].bfloat16()
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    y = layer_norm(x, **leaves)
    y.backward(dy)
    wide = {name: value.float().requires_grad_() for name, value in parameters.items()}
    expected = layer_norm(x, **wide)
    expected.backward(dy)
    assert torch.equal(y, expected)
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == leaf.dtype
        assert torch.equal(leaf.grad, wide[name].grad.to(leaf.dtype))


@pytest.mark.plain
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weight": torch.ones(7)},
            r"weight must have shape \(8,\) to match x \(2, 8\), got \(7,\)",
        ),
        ({"bias": torch.ones(1, 8)}, r"bias must have shape \(8,\)"),
        (
            {"bias": torch.ones(8, dtype=torch.long)},
            r"bias must be floating point, got torch.int64; cast it",
        ),
        ({"weight": torch.ones(8, device="meta")}, r"weight must be on cpu like x, got meta"),
        ({"added_bias": torch.ones(7)}, r"added_bias must have shape \(8,\) to match x \(2, 8\)"),
        (
            {"added_bias": torch.ones(8, dtype=torch.long)},
            r"added_bias must be floating point, got torch.int64; cast it",
        ),
        ({"eps": "a"}, "eps must be float, got 'a'"),
        ({"eps": -1e-5}, "eps must be at least 0, got -1e-05"),
        ({"x": torch.ones(2, 0)}, r"x must be \(\.\.\., N\) with N from 1 to 65536, got \(2, 0\)"),
        ({"x": torch.ones(())}, r"x must be \(\.\.\., N\)"),
        ({"x": torch.ones(2, 8, dtype=torch.long)}, r"must be floating point, got torch.int64"),
        (
            {"residual": torch.ones(2, 1)},
            r"residual must be floating point, \(2, 8\) on cpu like x, got torch.float32 \(2, 1\)",
        ),
    ],
)
def test_bad_arguments_raise(change, message):
    arguments = {
        "x": torch.ones(2, 8),
        "residual": torch.ones(2, 8),
        "weight": torch.ones(8),
        "bias": torch.ones(8),
    } | change
    with pytest.raises(ValueError, match="^add_layer_norm: .*" + message):
        add_layer_norm(**arguments)


def test_kernel_raises_for_float64(device):
    if device.type == "cpu" and not INTERPRET:
        pytest.skip("float64 on a CPU runs the reference")
    x = torch.ones(2, 8, dtype=torch.float64, device=device)
    message = "^layer_norm: the kernel takes float32, bfloat16 or float16, got float64"
    with pytest.raises(TypeError, match=message):
        layer_norm(x, torch.ones(8, device=device))


@pytest.mark.plain
def test_cost_counts_each_tensor_once():
    M, N, itemsize = 32768, 1024, 2
    plain, fused = cost(M, N, itemsize), cost(M, N, itemsize, residual=True)
    assert plain["fwd_bytes"] == 2 * M * N * itemsize  # x, y
    assert plain["bwd_bytes"] == 3 * M * N * itemsize  # dy, x, dx
    assert fused["fwd_bytes"] == 4 * M * N * itemsize  # x, residual, y, h
    assert fused["bwd_bytes"] == 4 * M * N * itemsize  # dy, dh, h, dx
    dropped = cost(M, N, itemsize, residual=True, dropout=True)
    assert dropped["bwd_bytes"] == 5 * M * N * itemsize  # dresidual too


# --- 5. ahead-of-time compilation


@pytest.mark.codegen
@pytest.mark.parametrize("arch", [name for name in TARGETS if name != "gfx950"])
@pytest.mark.parametrize("N", [768, 1024, 1280, 1600, MAX_WIDTH])
def test_compiles_for_every_target_without_spills(N, arch):
    x, weight, statistics = (
        torch.empty(shape, device="meta") for shape in [(8192, N), (N,), (8192,)]
    )
    with record_launches(arch) as launches:
        for dtype in (torch.bfloat16, torch.float32):
            h, w = x.to(dtype), weight.to(dtype)
            # The variant with all optional tensors needs the most registers. The golden table of
            # the bench has the other variants.
            launch_add_fwd(h, h, w, w, 1e-5, None, Dropout())
            launch_bwd(h, h, h, w, statistics, statistics, True, dtype, Dropout())
    assert len(launches) == 6
    for launch in launches:
        found = resources(compile_launch(launch, arch))
        # With triton 3.7.1 the wide backward has 8 bytes of stack on sm_100, whatever the tile.
        if (N, arch) != (MAX_WIDTH, "sm_100"):
            assert found.spilled_bytes == 0, launch.kernel.__name__


@pytest.mark.codegen
@pytest.mark.parametrize("N", [1, MAX_RESIDENT_WIDTH + 1])
def test_a_single_row_compiles(N):
    """Triton makes constants of integer arguments that are 1. They have no method `to`."""
    x, weight, statistics = (torch.empty(shape, device="meta") for shape in [(1, N), (N,), (1,)])
    with record_launches("sm_90") as launches:
        launch_fwd(x, weight, None, 1e-5, None)
        launch_add_fwd(x, x, weight, weight, 1e-5, None, Dropout())
        launch_bwd(x, x, x, weight, statistics, statistics, True, x.dtype, Dropout())
    for launch in launches:
        assert "cubin" in compile_launch(launch, "sm_90").asm, launch.kernel.__name__


@pytest.mark.codegen
@pytest.mark.parametrize("N", [1000, MAX_RESIDENT_WIDTH + 8])
def test_rows_are_addressed_in_int64(N):
    """Tensors of 2^31 elements are too large for a test. Read the compiled code instead."""
    x, weight, statistics = (
        torch.empty(shape, device="meta") for shape in [(8192, N), (N,), (8192,)]
    )
    with record_launches("sm_90") as launches:
        launch_add_fwd(x, x, weight, weight, 1e-5, None, Dropout())
        launch_bwd(x, x, x, weight, statistics, statistics, True, x.dtype, Dropout())
    for launch in launches:
        code = compile_launch(launch, "sm_90").asm["ttir"]
        multiplications = [
            line.split(" loc(")[0] for line in code.splitlines() if "arith.muli" in line
        ]
        # block * BLOCK_M may stay int32: there are fewer than 2^31 rows.
        narrow = [
            line
            for line in multiplications
            if not line.endswith(("i64", "xi64>")) and not re.search(r"%c\d+_i32", line)
        ]
        assert multiplications
        assert not narrow, launch.kernel.__name__
