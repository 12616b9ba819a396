"""swiglu: math, accuracy, layouts, contract, machine code."""

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.compare import assert_close, assert_equal, opcheck
from tests.kernels.mlp.cases import FLOATS, randn, run, saved_shapes, transposed
from tests.tolerance import assert_accurate
from tritium.bench.codegen.disassembly import resources
from tritium.bench.codegen.launches import TARGETS, compile_launch, record_launches
from tritium.kernels import swiglu
from tritium.kernels.core.op import INTERPRET
from tritium.kernels.mlp.swiglu import cost, launch_bwd, launch_swiglu_fwd

# One element, odd sizes, one past a tile of 2,048 elements.
SHAPES = [(1, 1), (3, 7), (3, 683), (33, 64)]


def tensors(shape, dtype, device):
    """gate and up; an incoming gradient."""
    *inputs, incoming = randn([shape] * 3, sum(shape), dtype, device)
    return inputs, incoming


def torch_swiglu(gate, up):
    return F.silu(gate) * up


# --- 1. math


@pytest.mark.plain
def test_gradients_match_finite_differences_and_torch():
    inputs, incoming = tensors((3, 5), torch.float64, "cpu")
    expected = run(torch_swiglu, inputs, incoming)
    assert_close(run(swiglu, inputs, incoming), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(swiglu, [value.requires_grad_() for value in inputs])


# --- 2. kernel against the float64 reference


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_accurate(shape, dtype, device):
    inputs, incoming = tensors(shape, dtype, device)
    truth = run(torch_swiglu, [value.double() for value in inputs], incoming)
    baseline = run(torch_swiglu, inputs, incoming)
    got = run(swiglu, inputs, incoming)
    for name, *values in zip(["a", "dgate", "dup"], got, truth, baseline, strict=True):
        # In dgate the terms s and g s (1 - s) can cancel; none is larger than da u.
        scale = (incoming.double() * inputs[1].double()).abs().max().item()
        assert_accurate(name, *values, scale=scale if name == "dgate" else 0.0)


def test_gates_far_from_zero_match_torch(device):
    """exp(-g) overflows float32 for very negative gates; SiLU is then 0."""
    gate = torch.tensor([-1e30, -200.0, -1.0, 0.0, 1.0, 200.0, 1e15], device=device)
    inputs = [gate, torch.full_like(gate, 1e-20)]
    incoming = torch.ones_like(gate)
    expected = run(torch_swiglu, inputs, incoming)
    assert_close(run(swiglu, inputs, incoming), expected, rtol=1e-5, atol=1e-12)


# --- 3. layouts


def test_any_layout_gives_the_result_of_a_contiguous_copy(device):
    (gate, up), incoming = tensors((12, 8), torch.float32, device)
    expected = run(swiglu, [gate, up], incoming)
    halves = torch.cat([gate, up], dim=1).chunk(2, dim=1)
    for inputs in ([transposed(gate), transposed(up)], halves, [gate, transposed(up)]):
        assert_equal(run(swiglu, inputs, transposed(incoming)), expected)


@pytest.mark.parametrize("shape", [(), (8,), (2, 3, 4), (0, 4)])
def test_any_number_of_axes(shape, device):
    inputs, incoming = tensors(shape, torch.float32, device)
    for value, expected in zip(
        run(swiglu, inputs, incoming), run(torch_swiglu, inputs, incoming), strict=True
    ):
        torch.testing.assert_close(value, expected)


# --- 4. contract


def test_opcheck(device):
    inputs, da = tensors((6, 12), torch.float32, device)
    leaves = [value.clone().requires_grad_() for value in inputs]
    opcheck(torch.ops.tritium.swiglu_fwd.default, tuple(leaves))
    opcheck(torch.ops.tritium.swiglu_bwd.default, (da, *inputs))


@pytest.mark.parametrize("needed", [0, 1])
def test_only_inputs_that_need_gradients_get_them(needed, device):
    inputs, incoming = tensors((6, 8), torch.float32, device)
    _, *expected = run(swiglu, inputs, incoming)
    leaves = [value.clone().requires_grad_(index == needed) for index, value in enumerate(inputs)]
    swiglu(*leaves).backward(incoming)
    assert leaves[1 - needed].grad is None
    assert torch.equal(leaves[needed].grad, expected[needed])


def test_compiles_as_one_graph_for_any_number_of_rows(device):
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager", dynamic=True)
    for N in (5, 9, 13):
        inputs, incoming = tensors((N, 8), torch.float32, device)
        with torch.compiler.set_stance("default" if N == 5 else "fail_on_recompile"):
            assert_equal(run(compiled, inputs, incoming), run(swiglu, inputs, incoming))


def test_autocast_changes_nothing(device):
    inputs, incoming = tensors((6, 8), torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = run(swiglu, inputs, incoming)
    assert_equal(got, run(swiglu, inputs, incoming))


def test_reruns_are_bitwise_equal_and_keep_the_inputs(device):
    inputs, incoming = tensors((300, 24), torch.bfloat16, device)
    copies = [value.clone() for value in inputs]
    assert_equal(run(swiglu, inputs, incoming), run(swiglu, inputs, incoming))
    assert_equal(inputs, copies)


def test_saves_its_inputs_only(device):
    inputs, _ = tensors((6, 8), torch.float32, device)
    assert saved_shapes(swiglu, *(value.requires_grad_() for value in inputs)) == [(6, 8)] * 2


@pytest.mark.plain
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": torch.ones(2, 4).long()}, "gate must be floating point, got torch.int64"),
        (
            {"up": torch.ones(4)},
            r"up must be torch.float32 \(2, 4\) on cpu like gate, got torch.float32 \(4,\) on cpu",
        ),
        ({"up": torch.ones(2, 4).double()}, r"up must be .*, got torch.float64 \(2, 4\) on cpu"),
        ({"up": torch.ones(2, 4, device="meta")}, "up must be .* on cpu like gate, got .* on meta"),
    ],
)
def test_bad_arguments_raise(change, message):
    with pytest.raises(ValueError, match="^swiglu: " + message):
        swiglu(**{"gate": torch.ones(2, 4), "up": torch.ones(2, 4)} | change)


def test_float64_raises_for_kernels(device):
    if device.type == "cpu" and not INTERPRET:
        pytest.skip("the reference takes float64")
    inputs, _ = tensors((2, 4), torch.float64, device)
    with pytest.raises(TypeError, match=r"^swiglu: the kernel takes .*, got float64"):
        swiglu(*inputs)


@pytest.mark.plain
def test_cost_counts_each_tensor_once():
    found = cost(4096 * 2048, 2)
    assert found["fwd_bytes"] + found["bwd_bytes"] == 8 * 4096 * 2048 * 2


# --- 5. ahead-of-time compilation


@pytest.mark.codegen
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arch", [name for name in TARGETS if name != "gfx950"])
def test_compiles_for_every_target_without_spills(arch, dtype):
    x = torch.empty(4096, 2048, dtype=dtype, device="meta")
    with record_launches(arch) as launches:
        launch_swiglu_fwd(x, x)
        launch_bwd(x, x, x)
    for launch in launches:
        found = resources(compile_launch(launch, arch))
        assert found.spilled_bytes == 0, launch.kernel.__name__
