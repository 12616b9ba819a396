import contextlib
import inspect
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from functorch.compile import aot_function, nop
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from tritium import kernels
from tritium.kernels.core._wrappers import (
    on_device_of_tensors,
    with_one_warning,
    without_float64,
)
from tritium.kernels.core.op import (
    FLOATS,
    INTERPRET,
    LAUNCHERS,
    can_read_values,
    define_op,
    is_32_bit,
    public,
)


def double_reference(x: Tensor) -> Tensor:
    return x * 2


def square_reference(x: Tensor) -> Tensor:
    return x @ x


def double_launch(x: Tensor) -> Tensor:
    return x + x + 0.5  # not what the reference returns


double = define_op("test_double", launch=double_launch, reference=double_reference)
square = define_op("test_square", launch=None, reference=square_reference)


def triple(x: Tensor) -> Tensor:
    return x * 3


# --- which implementation runs


def test_device_chooses_the_implementation():
    x = torch.ones(3)
    assert double(x).tolist() == [2.5] * 3 if INTERPRET else [2.0] * 3
    assert double(torch.ones(3, device="meta")).shape == (3,)


def test_composite_runs_on_a_cpu_if_it_applies():
    """The operator has no gradient of its own. Autograd differentiates the composite."""
    tripled = define_op(
        "test_composite", launch=double_launch, reference=double_reference,
        composite=triple, composite_if=lambda x: len(x) == 3,
    )  # fmt: skip
    x = torch.ones(3, requires_grad=True)
    if INTERPRET:
        assert tripled(x).tolist() == [2.5] * 3
    else:
        (gradient,) = torch.autograd.grad(tripled(x).sum(), x)
        assert gradient.tolist() == [3.0] * 3
    expected = 2.5 if INTERPRET else 2.0
    assert tripled.dispatch(x).tolist() == [expected] * 3
    assert tripled(torch.ones(4)).tolist() == [expected] * 4


def test_composites_apply_to_32_bits_by_default():
    assert is_32_bit(torch.ones(1), 5)
    assert is_32_bit(torch.ones(1, dtype=torch.float64))
    assert not is_32_bit(torch.ones(1, dtype=torch.bfloat16))


# --- options: a dataclass becomes arguments of the schema


@dataclass(frozen=True, kw_only=True)
class ScaleOptions:
    scale: float
    offset: Tensor | None


def scaled_reference(x: Tensor, options: ScaleOptions, times: int) -> Tensor:
    y = x * options.scale * times
    return y if options.offset is None else y + options.offset


def scaled_backward(dy: Tensor, options: ScaleOptions, times: int) -> Tensor:
    return dy * options.scale * times


def define_scaled(name: str):
    forward = define_op(f"{name}_fwd", launch=None, reference=scaled_reference)
    backward = define_op(f"{name}_bwd", launch=None, reference=scaled_backward)

    def save(ctx, inputs, output):
        _, ctx.options, ctx.times = inputs

    def grad(ctx, dy):
        return backward(dy, ctx.options, ctx.times), None, None

    forward.register_autograd(grad, setup_context=save)
    return forward


def test_options_are_arguments_of_the_schema():
    scaled = define_scaled("test_scaled")
    schema = str(torch.ops.tritium.test_scaled_fwd.default._schema)
    assert "(Tensor x, float scale, Tensor? offset, SymInt times)" in schema
    x = torch.ones(3, requires_grad=True)
    y = scaled(x, ScaleOptions(scale=2.0, offset=torch.ones(())), 5)
    assert y.tolist() == [11.0] * 3
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.tolist() == [10.0] * 3


def test_options_compile_in_one_graph():
    scaled = define_scaled("test_scaled_compiled")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x, offset):
        return scaled(x * 2, ScaleOptions(scale=0.5, offset=offset), x.shape[0])

    for size in (3, 5, 7):  # compiled code treats the size as a symbol from the second size on
        x = torch.ones(size, requires_grad=True)
        y = run(x, torch.ones(()))
        assert y.tolist() == [size + 1.0] * size
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert gradient.tolist() == [size] * size


# --- what define_op registers


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_launches():
    assert double(torch.ones(3, device="cuda")).tolist() == [2.5] * 3


def test_reference_on_cuda_warns_once():
    """Call the function that is registered for CUDA without a launch, here with CPU tensors."""
    x = torch.ones(2, 2)
    run = with_one_warning("test_square", square_reference)
    with pytest.warns(
        UserWarning, match="test_square has no Triton kernel yet; CUDA runs its PyTorch reference"
    ):
        assert torch.equal(run(x), x @ x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(x)


def test_launches_run_on_the_gpu_of_the_tensors(monkeypatch):
    """A CPU tensor stands for one on a GPU. The index of its device is None."""
    entered = []
    monkeypatch.setattr(
        torch.cuda, "device", lambda device: entered.append(device) or contextlib.nullcontext()
    )
    run = on_device_of_tensors(lambda scale, x: x * scale)
    for current, expected in ((None, []), (0, [torch.device("cpu")])):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        assert run(2.0, torch.ones(1)).item() == 2.0
        assert entered == expected


def test_launch_raises_for_float64():
    run = without_float64("test_double", double_launch)
    assert run(torch.ones(1)).item() == 2.5
    with pytest.raises(
        TypeError, match="test_double: the kernel takes float32, bfloat16 or float16, got float64"
    ):
        run(torch.ones(1, dtype=torch.float64))


@pytest.mark.plain
@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("test_default_fwd", {}, "test_default"),
        ("test_other_fwd", {"public_name": "shown"}, "shown"),
    ],
)
def test_messages_have_the_public_name(name, options, expected, monkeypatch):
    names = []
    monkeypatch.setattr(
        "tritium.kernels.core.op.with_one_warning",
        lambda name, reference: names.append(name) or reference,
    )
    op = define_op(name, launch=None, reference=double_reference, **options)
    assert names == [expected]
    x = torch.ones(2)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"^{expected}: forward"):
        op(forward_ad.make_dual(x, x))


@pytest.mark.plain
def test_launchers_are_registered_by_name():
    assert LAUNCHERS["test_double"] is double_launch
    assert "test_square" not in LAUNCHERS


@pytest.mark.plain
def test_launch_and_reference_share_a_signature():
    def launch(x: Tensor, scale: float) -> Tensor:
        return x

    with pytest.raises(
        TypeError, match=r"define_op: test_uneven: launch must have the signature of reference"
    ):
        define_op("test_uneven", launch=launch, reference=double_reference)


@pytest.mark.plain
def test_shapes_and_reference_share_a_signature():
    def shapes(x: Tensor, scale: float) -> Tensor:
        return x

    with pytest.raises(
        TypeError, match=r"define_op: test_uneven: shapes must have the signature of reference"
    ):
        define_op("test_uneven", launch=None, reference=double_reference, shapes=shapes)


@pytest.mark.plain
def test_shapes_avoid_a_compilation_per_size():
    def reference(x: Tensor) -> Tensor:
        return torch.stack([x[row] * 2 for row in range(len(x))])

    def shapes(x: Tensor) -> Tensor:
        return x.new_empty(x.shape)

    for name, given, expected in (("test_fixed", None, 5), ("test_any", shapes, 2)):
        op = define_op(name, launch=None, reference=reference, shapes=given)
        torch._dynamo.reset()  # forget which sizes have varied
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(lambda x, op=op: op(x), fullgraph=True, backend=counter)
        for rows in range(2, 7):
            x = torch.randn(rows, 3)
            assert torch.equal(compiled(x), 2 * x)
        assert counter.frame_count == expected
    assert op(torch.ones(4, 3, device="meta")).shape == (4, 3)


@pytest.mark.plain
def test_autocast_does_not_reach_references():
    x = torch.full((2, 2), 1 + 2**-12)  # not a bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert square(x).dtype == torch.float32
        assert square(x)[0, 0] == 2 * x[0, 0] ** 2
        assert (x @ x).dtype == torch.bfloat16


def test_backward_through_an_operator_without_a_gradient_raises():
    x = torch.ones(2, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"test_square.*: no autograd formula was registered"):
        square(x).sum().backward()
    with torch.no_grad():
        assert not square(x).requires_grad


# --- public: arguments are checked against annotations


def example(
    x: Tensor,
    y: Tensor | None = None,
    *,
    n: int = 1,
    m: int | None = None,
    p: float = 0.0,
    flag: bool = False,
    word: str = "",
    seed: int | Tensor | None = None,
) -> Tensor:
    """Multiply."""
    return x * n * (1 if m is None else m) * (1.0 + p)


checked = public(example)


@pytest.mark.plain
def test_public_keeps_name_docstring_and_signature():
    assert inspect.signature(checked) == inspect.signature(example)
    assert (checked.__name__, checked.__doc__) == ("example", "Multiply.")


@pytest.mark.plain
def test_public_accepts_the_annotated_types():
    x = torch.ones(2)
    integers = torch.ones(2, dtype=torch.int32)
    weight = torch.nn.Parameter(torch.ones(2))
    for dtype in FLOATS:
        assert checked(x.to(dtype)).dtype == dtype
    for y in (None, integers, weight, x > 0, x.to(torch.complex64)):
        got = checked(x, y, n=2, m=3, p=1, flag=True, word="a", seed=integers)
        assert torch.equal(got, 12 * x)
    got = checked(x=weight, y=weight, m=None, p=np.float64(0.5), seed=2**60)
    assert torch.equal(got, 1.5 * x)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [torch.ones(2)]}, "x must be Tensor, got a list; convert it"),
        ({"x": None}, "x must be Tensor, got None; convert it"),
        (
            {"x": torch.ones(2).to(torch.float8_e5m2)},
            "x must be one of float32, .*, got torch.float8_e5m2; cast it",
        ),
        (
            {"y": torch.ones(2).to(torch.float8_e4m3fn)},
            "y must be one of .*, got torch.float8_e4m3fn; cast it",
        ),
        ({"y": 1.0}, r"y must be Tensor \| None, got 1.0; convert it"),
        ({"n": 2.0}, "n must be int, got 2.0; convert it"),
        ({"n": None}, "n must be int, got None; convert it"),
        ({"n": True}, "n must be int, got True; convert it"),
        ({"m": 2.5}, r"m must be int \| None, got 2.5; convert it"),
        ({"p": False}, "p must be float, got False; convert it"),
        ({"p": "a"}, "p must be float, got 'a'; convert it"),
        ({"p": torch.ones(2, 3)}, r"p must be float, got torch.float32 \(2, 3\); convert it"),
        ({"flag": 1}, "flag must be bool, got 1; convert it"),
        ({"word": None}, "word must be str, got None; convert it"),
        ({"seed": 1.5}, r"seed must be int \| Tensor \| None, got 1.5; convert it"),
    ],
)
def test_public_raises_for_other_types(change, message):
    with pytest.raises(ValueError, match=f"^example: {message}$"):
        checked(**{"x": torch.ones(2)} | change)
    x = change.pop("x", torch.ones(2))
    with pytest.raises(ValueError, match=f"^example: {message}$"):
        checked(x, *([change.pop("y")] if "y" in change else []), **change)


@pytest.mark.plain
def test_missing_repeated_and_unknown_arguments_raise_type_errors():
    for args, options in (
        ((), {}),
        ((torch.ones(1),) * 3, {}),
        ((torch.ones(1),), {"other": True}),
    ):
        with pytest.raises(TypeError, match=r"^example\(\) "):
            checked(*args, **options)


@pytest.mark.plain
def test_public_compiles_no_more_often_than_its_function_for_any_number():
    """PyTorch 2.11 compiles `example` again for each float. PyTorch 2.13 compiles it twice."""
    counts = {}
    for function in (example, checked):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(
            lambda x, n, p, call=function: call(x, n=n, p=p, seed=n),
            fullgraph=True,
            backend=counter,
        )
        for n in range(2, 8):
            x = torch.ones(n + 1)
            assert torch.equal(compiled(x, n, n / 4), example(x, n=n, p=n / 4))
        counts[function] = counter.frame_count
    assert counts[checked] <= counts[example]
    if torch.__version__ >= (2, 13):
        assert counts[example] <= 2
    with pytest.raises(ValueError, match=r"^example: n must be int, got 2\.0"):
        torch.compile(lambda x: checked(x, n=2.0), backend="aot_eager")(x)


@pytest.mark.plain
def test_values_can_be_read_on_a_cpu_only():
    assert can_read_values(torch.ones(1))
    assert not can_read_values(torch.ones(1, device="meta"))
    assert not can_read_values(
        FakeTensorMode().from_tensor(torch.ones(1))
    )  # the mode is not active
    found = []
    for transform in (torch.func.vmap, make_fx, lambda function: aot_function(function, nop)):
        transform(lambda x: found.append(can_read_values(x)) or x)(torch.ones(2))
    assert len(found) >= 3
    assert not any(found)
    with FlopCounterMode(display=False):  # a mode that only watches
        assert can_read_values(torch.ones(1))


@pytest.mark.plain
@pytest.mark.parametrize("name", kernels.__all__)
def test_every_public_operator_checks_its_arguments(name):
    with pytest.raises(ValueError, match=f"^{name}: .* must be Tensor, got 'a'; convert it$"):
        getattr(kernels, name)(*["a"] * 4)


def rms_norm_of_dual(x, weight):
    with forward_ad.dual_level():
        return kernels.rms_norm(forward_ad.make_dual(x, x), weight)


def rms_norm_in_jvp(x, weight):
    return torch.func.jvp(lambda weight: kernels.rms_norm(x, weight), (weight,), (weight,))


@pytest.mark.parametrize("function", [rms_norm_of_dual, rms_norm_in_jvp])
def test_forward_mode_derivatives_raise(function):
    """PyTorch would return a tangent of zero."""
    x, weight = torch.randn(4, 8), torch.randn(8)
    message = "^rms_norm: forward-mode derivatives are not supported; use backward"
    with pytest.raises(NotImplementedError, match=message):
        function(x, weight)
    with forward_ad.dual_level():
        kernels.rms_norm(x, weight)  # no tangent
