"""Tests of all public operators: compilation, export, transforms, threads and processes.

operators.py has a call of each. Tests of single operators are in the other files.
"""

import multiprocessing
import os
import sys
import threading

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.compare import assert_close, assert_equal
from tests.kernels.operators import CASES, run
from tritium import kernels
from tritium.kernels.core import op
from tritium.kernels.core.op import INTERPRET

CPU = torch.device("cpu")
# Operators whose compilations other tests count, here or in their own files.
COUNTED_ELSEWHERE = {
    "add_layer_norm",
    "add_rms_norm",
    "attention_decode",
    "causal_attention",
    "causal_attention_qkvpacked",
    "causal_attention_varlen",
    "cross_entropy",
    "linear_cross_entropy",
    "relu2_mlp",
}
pytestmark = pytest.mark.skipif(INTERPRET, reason="the kernels do not take part in what is tested")


def test_there_is_a_case_for_each_public_operator():
    assert list(CASES) == kernels.__all__


# --- torch.compile and torch.export


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in COUNTED_ELSEWHERE])
def test_ten_numbers_of_tokens_compile_at_most_twice(name, device):
    """One compilation is for the first number, a second one for all numbers."""
    torch._dynamo.reset()
    function, make = CASES[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for n in range(4, 14):
        arguments = make(n, device)
        got = run(compiled, *arguments)
    assert_equal(got, run(function, *arguments))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", ["rms_norm", "swiglu_mlp", "cross_entropy"])
def test_a_stance_may_force_eager_mode(name, device):
    function, make = CASES[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    with torch.compiler.set_stance("force_eager"):
        assert_equal(run(compiled, *make(5, device)), run(function, *make(5, device)))
    assert counter.frame_count == 0


class Call(nn.Module):
    """A module that calls a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


@pytest.mark.parametrize("name", CASES)
def test_operators_export(name, device):
    function, make = CASES[name]
    values, others = make(5, device)
    exported = torch.export.export(Call(function), (*values, *others))
    got, expected = exported.module()(*values, *others), function(*values, *others)
    if isinstance(got, torch.Tensor):
        got, expected = [got], [expected]
    assert_close(got, expected)


@pytest.mark.parametrize("name", CASES)
def test_traced_graphs_match(name, device):
    function, make = CASES[name]
    values, others = make(5, device)
    traced = make_fx(lambda *args: function(*args))(*values, *others)
    torch.testing.assert_close(traced(*values, *others), function(*values, *others))


# --- direct calls, which skip PyTorch's dispatcher


@pytest.mark.parametrize("name", CASES)
def test_direct_calls_match_calls_through_the_dispatcher(name, device, monkeypatch):
    function, make = CASES[name]
    expected = run(function, *make(5, device))
    monkeypatch.setattr(op, "device_of", lambda args: None)
    assert_equal(run(function, *make(5, device)), expected)


class Record(TorchDispatchMode):
    """Record the names of operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **kwargs or {})


def test_dispatch_modes_and_profilers_see_operators(device):
    function, make = CASES["rms_norm"]
    with Record() as record:
        run(function, *make(5, device))
    for name in ("fwd", "bwd"):
        assert record.names.count(f"tritium.rms_norm_{name}.default") == 1
    with torch.profiler.profile() as profile:
        run(function, *make(5, device))
    names = [event.name for event in profile.events()]
    assert {"tritium::rms_norm_fwd", "tritium::rms_norm_bwd"} <= set(names)


def test_calls_of_subclasses_of_tensors_go_through_the_dispatcher(device):
    class Subclass(torch.Tensor):
        pass

    x = torch.ones(2, device=device)
    assert op.device_of((x, nn.Parameter(x), 1.0, None)) == device.type
    assert op.device_of((x, x.as_subclass(Subclass))) is None


# --- fake tensors, meta tensors, autocast


@pytest.mark.parametrize("name", CASES)
def test_fake_and_meta_tensors_get_the_shapes_and_dtypes_of_real_ones(name, device):
    function, make = CASES[name]
    values, others = make(5, device)
    expected = [(value.shape, value.dtype) for value in run(function, values, others)]
    on_meta = [[value.to("meta") for value in part] for part in (values, others)]
    assert [(value.shape, value.dtype) for value in run(function, *on_meta)] == expected
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [[mode.from_tensor(value) for value in part] for part in (values, others)]
        found = run(function, *fake)
    assert [(value.shape, value.dtype) for value in found] == expected


@pytest.mark.parametrize("name", CASES)
def test_gradients_under_autocast_have_the_dtype_of_their_inputs(name, device):
    function, make = CASES[name]
    values, others = make(5, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = run(function, values, others)
    assert all(value.isfinite().all() for value in found)
    if name != "attention_decode":
        grads = found[-len(values) :]
        assert all(grad.dtype == value.dtype for grad, value in zip(grads, values, strict=True))


# --- torch.func


def sum_of_first(function):
    """Return the sum of the first output of a function."""

    def total(*args):
        output = function(*args)
        return (output[0] if isinstance(output, tuple) else output).sum()

    return total


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", [name for name in CASES if name != "attention_decode"])
def test_gradients_of_torch_func_match_autograd(name, device):
    """Gradients of one example, and of each example in a batch."""
    function, make = CASES[name]
    values, others = make(5, device)
    total = sum_of_first(function)
    indices = tuple(range(len(values)))
    leaves = [value.clone().requires_grad_() for value in values]
    expected = torch.autograd.grad(total(*leaves, *others), leaves)
    gradient = torch.func.grad(total, indices)
    assert_close(gradient(*values, *others), expected)

    batch = [torch.stack([value.flip(0), value]) for value in values]
    axes = (*(0 for _ in values), *(None for _ in others))
    grads = torch.func.vmap(gradient, axes)(*batch, *others)
    assert_close([grad[1] for grad in grads], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "width"),
    [
        (lambda x, bias: kernels.layer_norm(x, x[0], added_bias=bias), 8),
        (lambda x, bias: kernels.add_layer_norm(x, x + 1, x[0], added_bias=bias)[0], 8),
        (lambda x, bias: kernels.causal_attention_qkvpacked(x[None], 2, added_bias=bias), 24),
    ],
)
def test_gradients_of_torch_func_for_an_added_bias_match_autograd(function, width, device):
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(0)).to(device)
    bias = torch.zeros(width, device=device)

    def total(x, bias):
        return function(x, bias).square().sum()

    leaves = [value.clone().requires_grad_() for value in (x, bias)]
    expected = torch.autograd.grad(total(*leaves), leaves)
    assert_close(torch.func.grad(total, (0, 1))(x, bias), expected, rtol=1e-4, atol=1e-5)


def test_second_derivatives_of_torch_func_raise(device):
    x, weight = torch.randn(3, 8, device=device), torch.ones(8, device=device)
    first = torch.func.grad(sum_of_first(kernels.rms_norm))
    message = "rms_norm_bwd: no autograd formula was registered"
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(lambda x: first(x, weight).sum())(x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", [name for name in CASES if name != "attention_decode"])
def test_batched_gradients_match_single_ones(name, device):
    """torch.autograd.grad has a vmap of its own, not that of torch.func."""
    function, make = CASES[name]
    values, others = make(5, device)
    leaves = [value.requires_grad_() for value in values]
    output = function(*leaves, *others)
    output = output[0] if isinstance(output, tuple) else output
    incoming = torch.randn(2, *output.shape, generator=torch.Generator().manual_seed(0)).to(device)
    single = [torch.autograd.grad(output, leaves, dy, retain_graph=True) for dy in incoming]
    batched = torch.autograd.grad(output, leaves, incoming, is_grads_batched=True)
    expected = [torch.stack(grads) for grads in zip(*single, strict=True)]
    assert_close(batched, expected, rtol=1e-4, atol=1e-5)


class NoGradient(torch.autograd.Function):
    """The identity. Its input gets no gradient, not even zeros."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


@pytest.mark.parametrize("name", [name for name in CASES if name != "attention_decode"])
def test_outputs_without_gradients_give_their_inputs_none(name, device, monkeypatch):
    monkeypatch.setattr(op.Op, "uses_composite", lambda *_: False)
    function, make = CASES[name]
    values, others = make(5, device)
    leaves = [value.requires_grad_() for value in values]
    outputs = function(*leaves, *others)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(NoGradient.apply(output).sum() for output in outputs).backward()
    assert not any(leaf.grad is not None and leaf.grad.any() for leaf in leaves)


# --- threads and processes


def results(device=CPU):
    """Run all operators. Return the sums of their outputs and gradients."""
    sums = []
    for function, make in CASES.values():
        sums += [value.double().sum().item() for value in run(function, *make(5, device))]
    return sums


def test_threads_get_equal_results(device):
    found = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: results(device)})) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found.values()) == [results(device)] * 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason=f"{sys.platform} has no fork")
def test_forked_workers_get_equal_results():
    """On a CPU, as the workers of a DataLoader."""
    expected = results()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(results).get(timeout=60) == expected


@pytest.mark.slow
def test_spawned_workers_get_equal_results():
    x, weight = torch.randn(3, 8), torch.randn(8)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply_async(kernels.rms_norm, (x, weight)).get(timeout=120)
    assert torch.equal(found, kernels.rms_norm(x, weight))


# --- tensor subclasses and wrappers of modules


class Block(nn.Module):
    """A user's own module with operators inside."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.Parameter(torch.ones(width))
        self.gate, self.up = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        x = kernels.rms_norm(x, self.norm)
        return kernels.swiglu(self.gate(x), self.up(x))


@pytest.fixture
def one_process_group(tmp_path):
    """A process group of this process alone."""
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_distributed_tensors_raise(one_process_group):
    from torch.distributed.tensor import DTensor, Replicate

    x = DTensor.from_local(torch.ones(4, 8), one_process_group, [Replicate()])
    message = "^rms_norm: weight must be a tensor of this process, got a DTensor; pass its to_local"
    with pytest.raises(ValueError, match=message):
        kernels.rms_norm(torch.ones(4, 8), x)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_modules_of_a_user_train_under_ddp_and_fsdp(wrapper, one_process_group):
    torch.manual_seed(0)
    block, x = Block(8), torch.randn(3, 8)
    block(x).sum().backward()
    expected = [parameter.grad.clone() for parameter in block.parameters()]
    block.zero_grad()
    if wrapper == "ddp":
        model = nn.parallel.DistributedDataParallel(block)
    else:
        model = torch.distributed.fsdp.fully_shard(block, mesh=one_process_group)
    model(x).sum().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    if wrapper == "fsdp":
        grads = [grad.full_tensor() for grad in grads]
    assert_close(grads, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", CASES)
def test_operators_are_captured_in_a_cuda_graph(name):
    function, make = CASES[name]
    arguments = make(16, torch.device("cuda"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = run(function, *arguments)
        run(function, *arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(function, *arguments)
    graph.replay()
    assert_equal(found, expected)
