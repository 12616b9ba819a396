import contextlib
import inspect
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tritium import kernels
from tritium.kernels._op import (
    FLOATS,
    INTERPRET,
    LAUNCHERS,
    _on_its_device,
    _saying_so_once,
    _without_float64,
    autocast,
    can_look,
    define_op,
    differentiable,
    public,
)


def double_reference(x: Tensor) -> Tensor:
    return x * 2


def product_reference(x: Tensor) -> Tensor:
    return x @ x


def double_launch(x: Tensor) -> Tensor:
    return x + x + 0.5  # tells the two apart


double = define_op("test_double", launch=double_launch, reference=double_reference)
product = define_op("test_product", launch=None, reference=product_reference)


def test_the_dispatcher_chooses():
    x = torch.ones(3)
    assert double(x).tolist() == [2.5] * 3 if INTERPRET else [2.0] * 3
    assert double(torch.ones(3, device="meta")).shape == (3,)


def test_on_a_cpu_autograd_differentiates_the_reference_itself():
    """The operator has no gradient of its own. In 16 bits it is called in any case, and by the interpreter."""
    if not INTERPRET:
        (gradient,) = torch.autograd.grad(differentiable(double, x := torch.ones(3, requires_grad=True)).sum(), x)
        assert gradient.tolist() == [2.0] * 3
    for dtype in (torch.bfloat16, torch.float32) if INTERPRET else (torch.bfloat16,):
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            differentiable(double, torch.ones(3, dtype=dtype, requires_grad=True)).sum().backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_launches():
    assert double(torch.ones(3, device="cuda")).tolist() == [2.5] * 3


def test_what_cuda_does_without_a_kernel_is_said_once():
    """What is registered for CUDA where there is no launch, called here with CPU tensors."""
    x = torch.ones(2, 2)
    run = _saying_so_once("test_product", product_reference)
    with pytest.warns(UserWarning, match="test_product has no Triton kernel yet; CUDA runs its PyTorch reference"):
        assert torch.equal(run(x), x @ x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(x)


def test_launches_go_to_the_gpu_that_holds_the_tensors(monkeypatch):
    """Told with CPU tensors, whose device has the index None, and a current GPU of that index or another."""
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or contextlib.nullcontext())
    run = _on_its_device(lambda scale, x: x * scale)
    for current, expected in ((None, []), (0, [torch.device("cpu")])):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        assert run(2.0, torch.ones(1)).item() == 2.0
        assert entered == expected


def test_kernels_are_not_given_float64():
    run = _without_float64("test_double", double_launch)
    assert run(torch.ones(1)).item() == 2.5
    with pytest.raises(TypeError, match="test_double: the kernel takes float32, bfloat16 or float16, got float64"):
        run(torch.ones(1, dtype=torch.float64))


@pytest.mark.plain
def test_launchers_are_known_by_name():
    assert LAUNCHERS["test_double"] is double_launch
    assert "test_product" not in LAUNCHERS


@pytest.mark.plain
def test_launch_and_reference_share_a_signature():
    def launch(x: Tensor, scale: float) -> Tensor:
        return x

    with pytest.raises(TypeError, match=r"define_op: test_uneven: launch must have the signature of reference"):
        define_op("test_uneven", launch=launch, reference=double_reference)


@pytest.mark.plain
def test_shapes_and_reference_share_a_signature():
    def shapes(x: Tensor, scale: float) -> Tensor:
        return x

    with pytest.raises(TypeError, match=r"define_op: test_uneven: shapes must have the signature of reference"):
        define_op("test_uneven", launch=None, reference=double_reference, shapes=shapes)


@pytest.mark.plain
def test_shapes_spare_compiled_code_a_loop_over_a_size():
    def reference(x: Tensor) -> Tensor:
        return torch.stack([x[row] * 2 for row in range(len(x))])

    def shapes(x: Tensor) -> Tensor:
        return x.new_empty(x.shape)

    for name, given, expected in (("test_bound", None, 5), ("test_unbound", shapes, 2)):
        op = define_op(name, launch=None, reference=reference, shapes=given)
        torch._dynamo.reset()  # it remembers which sizes of a function have varied
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(lambda x, op=op: op(x), fullgraph=True, backend=counter)
        for rows in range(2, 7):
            x = torch.randn(rows, 3)
            assert torch.equal(compiled(x), 2 * x)
        assert counter.frame_count == expected
    assert op(torch.ones(4, 3, device="meta")).shape == (4, 3)


@pytest.mark.plain
def test_references_are_spared_autocast():
    x = torch.full((2, 2), 1 + 2**-12)  # not a bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product(x).dtype == torch.float32
        assert product(x)[0, 0] == 2 * x[0, 0] ** 2
        assert (x @ x).dtype == torch.bfloat16


@pytest.mark.plain
def test_autocast_casts_what_products_take():
    inputs = torch.ones(2), None, torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.int64)
    assert autocast(*inputs) == inputs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [x if x is None else x.dtype for x in autocast(*inputs)] == [torch.bfloat16, None, torch.float64, torch.int64]


def example(
    x: Tensor, y: Tensor | None = None, *, n: int = 1, m: int | None = None, p: float = 0.0, flag: bool = False, word: str = "",
    seed: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Multiply."""
    return x * n * (1 if m is None else m) * (1.0 + p)


named = public(example)


@pytest.mark.plain
def test_public_operators_keep_their_signature_and_take_what_it_says():
    assert inspect.signature(named) == inspect.signature(example)
    assert (named.__name__, named.__doc__) == ("example", "Multiply.")
    x, whole, weight = torch.ones(2), torch.ones(2, dtype=torch.int32), torch.nn.Parameter(torch.ones(2))
    for dtype in FLOATS:
        assert named(x.to(dtype)).dtype == dtype
    for y in (None, whole, weight, x > 0, x.to(torch.complex64)):
        assert torch.equal(named(x, y, n=2, m=3, p=1, flag=True, word="a", seed=whole), 12 * x)
    assert torch.equal(named(x=weight, y=y, m=None, p=np.float64(0.5), seed=2**60), 1.5 * x)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [torch.ones(2)]}, "x must be Tensor, got a list; convert it"),
        ({"x": None}, "x must be Tensor, got None; convert it"),
        ({"x": torch.ones(2).to(torch.float8_e5m2)}, "x must be one of float32, .*, got torch.float8_e5m2; cast it"),
        ({"y": torch.ones(2).to(torch.float8_e4m3fn)}, "y must be one of .*, got torch.float8_e4m3fn; cast it"),
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
def test_public_operators_refuse_what_their_signature_does_not_say(change, message):
    with pytest.raises(ValueError, match=f"^example: {message}$"):
        named(**{"x": torch.ones(2)} | change)
    x = change.pop("x", torch.ones(2))
    with pytest.raises(ValueError, match=f"^example: {message}$"):
        named(x, *([change.pop("y")] if "y" in change else []), **change)


@pytest.mark.plain
def test_public_operators_leave_other_mistakes_to_python():
    for args, options in (((), {}), ((torch.ones(1),) * 3, {}), ((torch.ones(1),), {"other": True})):
        with pytest.raises(TypeError, match=r"^example\(\) "):
            named(*args, **options)


@pytest.mark.plain
def test_public_operators_compile_as_one_graph_for_any_number():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, n, p: named(x, n=n, p=p, seed=n), fullgraph=True, backend=counter)
    for n in range(2, 12):
        x = torch.ones(n + 1)
        assert torch.equal(compiled(x, n, n / 4), named(x, n=n, p=n / 4))
    assert counter.frame_count <= 2
    with pytest.raises(ValueError, match=r"^example: n must be int, got 2\.0"):
        torch.compile(lambda x: named(x, n=2.0), backend="aot_eager")(x)


@pytest.mark.plain
def test_only_what_lies_on_the_cpu_can_be_looked_at():
    assert can_look(torch.ones(1))
    assert not can_look(torch.ones(1, device="meta"))


@pytest.mark.plain
@pytest.mark.parametrize("name", kernels.__all__)
def test_every_public_operator_is_one(name):
    with pytest.raises(ValueError, match=f"^{name}: .* must be Tensor, got 'a'; convert it$"):
        getattr(kernels, name)(*["a"] * 4)
