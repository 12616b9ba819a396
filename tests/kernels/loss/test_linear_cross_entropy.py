"""linear_cross_entropy: the kinds of tests every kernel file has."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from triton.runtime.jit import JITFunction

from tests.kernels.loss.cases import torch_cross_entropy
from tests.tolerance import assert_accurate, walk
from tritium.bench.training.memory import Held
from tritium.kernels import linear_cross_entropy
from tritium.kernels.loss.linear_cross_entropy import (
    CHUNK_ROWS,
    MIN_BLOCK_ROWS,
    block_rows,
    cost,
    launch_fwd,
    launch_rows_bwd,
    launch_scale,
    plan,
    reference_fwd,
    reference_rows_bwd,
    reference_scale,
)

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Rows, width, vocabulary: one element, odd, one past a power of two.
SHAPES = [(1, 1, 1), (1, 5, 3), (33, 17, 65), (7, 64, 257), (70, 3, 5), (15, 3, 5)]
EVERYTHING = {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 2.0, "ignore_index": 1}
OPTIONS = [{}, {"label_smoothing": 0.1}, {"z_loss": 0.01}, {"softcap": 3.0}, EVERYTHING]
REDUCTIONS = ["mean", "sum", "none"]
NAMES = ["loss", "dx", "dweight", "dbias"]


def tensors(N, D, V, dtype, device):
    """x, weight, bias; targets of which some are ignored where there are several; an incoming gradient of each row."""
    generator = torch.Generator().manual_seed(N * 10_007 + D * 101 + V)
    inputs = [
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in ((N, D), (V, D), (V,))
    ]
    target = torch.randint(V, (N,), generator=generator)
    target[2::5] = -100
    return inputs, target.to(device), torch.randn(N, generator=generator).to(device)


def by_torch(x, weight, target, bias=None, **options):
    """The same by way of all the logits."""
    return torch_cross_entropy(F.linear(x, weight, bias), target, **options)


def run(function, inputs, target, incoming=None, **options):
    """Loss and gradients of `function` at fresh leaves of x, weight and, where there is one, bias."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    x, weight, *bias = leaves
    loss = function(x, weight, target, *bias, **options)
    incoming = torch.ones_like(loss) if incoming is None else incoming.to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, incoming)]


def run_backward(function, inputs, target):
    """As run, by way of loss.backward(), which alone works with reentrant checkpoints."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    loss = function(*leaves[:2], target, leaves[2])
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def scales(inputs, target, incoming=None, **options):
    """What the gradients are rounded of beside themselves: the terms of their sums, gradients of logits in the dtype of x."""
    x, weight, bias = (value.detach().double() for value in inputs)
    logits = F.linear(x, weight, bias).requires_grad_()
    loss = torch_cross_entropy(logits, target, **options)
    incoming = torch.ones_like(loss) if incoming is None else incoming.to(loss.dtype)
    (dlogits,) = torch.autograd.grad(loss, logits, incoming)
    # Those of dbias cancel: that each was rounded does not.
    return {
        "dx": walk(dlogits, weight),
        "dweight": walk(dlogits.t(), x),
        "dbias": len(x) ** 0.5 * dlogits.abs().max().item(),
    }


@pytest.fixture
def chunks_of(monkeypatch):
    """Call it with the number of rows that chunks and blocks are to have."""

    def chosen(rows):
        for name in ("block_rows", "plan"):
            monkeypatch.setattr(sys.modules[plan.__module__], name, lambda N, V: rows)

    return chosen


@pytest.fixture
def chunks_of_five(chunks_of):
    """Chunks that are many and do not divide the rows."""
    chunks_of(5)


# --- 1. math


@pytest.mark.plain
@pytest.mark.usefixtures("chunks_of_five")
@pytest.mark.parametrize(("options", "reduction"), list(itertools.product(OPTIONS, REDUCTIONS)))
def test_gradients_are_those_of_the_forward(options, reduction):
    inputs, target, _ = tensors(7, 3, 4, torch.float64, "cpu")
    target[target == -100] = options.get("ignore_index", -100)
    x, weight, bias = (value.requires_grad_() for value in inputs)
    assert torch.autograd.gradcheck(
        lambda x, w, b: linear_cross_entropy(x, w, target, b, reduction=reduction, **options),
        (x, weight, bias),
    )


@pytest.mark.plain
@pytest.mark.usefixtures("chunks_of_five")
@pytest.mark.parametrize(("options", "reduction"), list(itertools.product(OPTIONS, REDUCTIONS)))
def test_it_is_cross_entropy_of_all_the_logits(options, reduction):
    inputs, target, incoming = tensors(23, 6, 33, torch.float64, "cpu")
    target = target.where(target != -100, options.get("ignore_index", -100))
    given = {
        **options,
        "reduction": reduction,
        "incoming": incoming if reduction == "none" else None,
    }
    for got, expected in zip(
        *(run(f, inputs, target, **given) for f in (linear_cross_entropy, by_torch)), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


# --- 2. against the float64 truth


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("N", "D", "V"), SHAPES)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 2.0}])
def test_is_accurate(N, D, V, dtype, options, device, chunks_of):
    chunks_of(max(5, N // 3 + 1))
    inputs, target, incoming = tensors(N, D, V, dtype, device)
    for reduction in ("mean", "none") if options else REDUCTIONS:
        given = {
            **options,
            "reduction": reduction,
            "incoming": incoming if reduction == "none" else None,
        }
        got = run(linear_cross_entropy, inputs, target, **given)
        truth = run(by_torch, [value.double() for value in inputs], target, **given)
        peer = run(by_torch, inputs, target, **given)
        of = scales(inputs, target, **given)
        for name, *values in zip(NAMES, got, truth, peer, strict=True):
            size = values[1].abs().max().item() if name in ("dx", "dweight") else 0.0
            assert_accurate(
                f"{name} {reduction}", *values, length=max(N, V) + D, scale=size + of.get(name, 0.0)
            )


def test_gradients_of_many_rows_are_not_lost_in_16_bits(device):
    """A token that every row has adds up to more than float16 holds before it is divided by the number of rows."""
    N = 4096
    x = torch.full((N, 2), 40.0, device=device, dtype=torch.float16)
    weight = torch.zeros(3, 2, device=device, dtype=torch.float16)
    _, _, dweight = run(
        linear_cross_entropy, [x, weight], torch.zeros(N, dtype=torch.long, device=device)
    )
    torch.testing.assert_close(
        dweight[0], torch.full((2,), -40 * 2 / 3, device=device, dtype=torch.float16)
    )


def test_the_gradient_of_a_bias_is_summed_in_float32_over_the_chunks(device, chunks_of_five):
    """Every row adds the same: in bfloat16 the sum of 300 would be off by a tenth."""
    x, weight, bias = (
        torch.zeros(shape, device=device, dtype=torch.bfloat16)
        for shape in ((300, 2), (3, 2), (3,))
    )
    target = torch.zeros(300, dtype=torch.long, device=device)
    *_, dbias = run(linear_cross_entropy, [x, weight, bias], target, reduction="sum")
    torch.testing.assert_close(
        dbias.float().cpu(), torch.tensor([-200.0, 100.0, 100.0]), rtol=1 / 128, atol=0
    )


# --- 3. layouts


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_layout_gives_what_the_contiguous_copy_gives(reduction, device):
    (x, weight, bias), target, incoming = tensors(12, 8, 9, torch.float32, device)
    views = [
        x.t().contiguous().t(),
        torch.cat([x, x], dim=1)[:, :8],
        torch.stack([x, x], dim=2)[:, :, 0],
        x.view(3, 4, 8).transpose(0, 1).contiguous().transpose(0, 1),
    ]
    wide_weight = torch.cat([weight, weight], dim=1)[:, 8:]
    dloss = torch.stack([incoming, incoming], dim=1)[:, 0] if reduction == "none" else incoming[0]
    expected = None
    for view in [x, *views]:
        leaves = [leaf.detach().requires_grad_() for leaf in (view, wide_weight, bias)]
        loss = linear_cross_entropy(
            *leaves[:2], target.view(view.shape[:-1]), leaves[2], reduction=reduction
        )
        got = [loss.reshape(-1), *torch.autograd.grad(loss, leaves, dloss.reshape(loss.shape))]
        got[1] = got[1].reshape(x.shape)
        expected = expected or got
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_leading_axes(device):
    (x, weight, _), target, _ = tensors(24, 4, 7, torch.float32, device)
    for reduction in REDUCTIONS:
        flat = run(linear_cross_entropy, [x, weight], target, reduction=reduction)
        deep = run(
            linear_cross_entropy,
            [x.view(2, 3, 4, 4), weight],
            target.view(2, 3, 4),
            reduction=reduction,
        )
        assert deep[0].shape == ((2, 3, 4) if reduction == "none" else ())
        for a, b in zip(deep, flat, strict=True):
            assert torch.equal(a.reshape(b.shape), b)
    assert linear_cross_entropy(x[0], weight, target[0]).shape == ()


@pytest.mark.parametrize("N", [0, 3])
def test_nothing_to_count_gives_zero(N, device):
    inputs, target, _ = tensors(N, 4, 5, torch.float32, device)
    for reduction in REDUCTIONS:
        loss, *grads = run(
            linear_cross_entropy, inputs, torch.full_like(target, -100), reduction=reduction
        )
        assert loss.shape == ((N,) if reduction == "none" else ())
        assert not any(value.any() for value in [loss, *grads])


# --- 4. contract


def test_opcheck(device):
    (x, weight, bias), target, incoming = tensors(6, 8, 24, torch.float32, device)
    ops, options = torch.ops.tritium, (-100, 0.1, 0.01, 5.0)
    leaves = [value.clone().requires_grad_() for value in (x, weight, bias)]
    for reduction, want in (("mean", True), ("none", False)):
        arguments = (leaves[0], leaves[1], target, leaves[2], *options, reduction, want, want)
        torch.library.opcheck(ops.linear_cross_entropy_fwd.default, arguments)
    torch.library.opcheck(
        ops.linear_cross_entropy_fwd.default,
        (x, weight, target, None, *options, "sum", True, False),
    )
    scaled = (incoming[0].clone(), torch.tensor(5, device=device), x, weight, bias)
    torch.library.opcheck(ops.linear_cross_entropy_scale.default, (*scaled, torch.bfloat16))
    torch.library.opcheck(
        ops.linear_cross_entropy_rows_bwd.default,
        (incoming, x, weight, target, bias, *options, True, True),
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_as_one_graph(reduction, device):
    inputs, target, incoming = tensors(9, 8, 40, torch.float32, device)
    compiled = torch.compile(
        lambda *args, **kw: linear_cross_entropy(*args, **kw), fullgraph=True, backend="aot_eager"
    )
    given = {
        **EVERYTHING,
        "reduction": reduction,
        "incoming": incoming if reduction == "none" else None,
    }
    for a, b in zip(
        *(run(f, inputs, target.clamp(min=0), **given) for f in (compiled, linear_cross_entropy)),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.plain
@pytest.mark.usefixtures("chunks_of_five")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ten_numbers_of_rows_compile_at_most_twice(reduction):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=counter)
    for N in range(13, 23):
        inputs, target, incoming = tensors(N, 8, 40, torch.float32, "cpu")
        given = {"reduction": reduction, "incoming": incoming if reduction == "none" else None}
        for a, b in zip(
            *(run(f, inputs, target, **given) for f in (compiled, linear_cross_entropy)),
            strict=True,
        ):
            assert torch.equal(a, b)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_multiplies_in_its_dtype(reduction, device):
    inputs, target, _ = tensors(9, 16, 12, torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = run(linear_cross_entropy, inputs, target, reduction=reduction)
    assert [value.dtype for value in got] == [torch.float32] * 4
    expected = run(
        linear_cross_entropy, [value.bfloat16() for value in inputs], target, reduction=reduction
    )
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b.float())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reruns_are_bitwise_equal(reduction, device, chunks_of):
    chunks_of(64)
    inputs, target, _ = tensors(300, 24, 48, torch.bfloat16, device)
    for a, b in zip(
        *(run(linear_cross_entropy, inputs, target, reduction=reduction) for _ in range(2)),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needed", [{"x"}, {"weight"}, {"bias"}, {"x", "bias"}])
def test_only_some_inputs_need_gradients(needed, reduction, device):
    inputs, target, _ = tensors(9, 4, 12, torch.float32, device)
    expected = dict(
        zip(
            ["x", "weight", "bias"],
            run(linear_cross_entropy, inputs, target, reduction=reduction)[1:],
            strict=True,
        )
    )
    leaves = {name: value.clone() for name, value in zip(expected, inputs, strict=True)}
    for name in needed:
        leaves[name].requires_grad_()
    linear_cross_entropy(**leaves, target=target, reduction=reduction).sum().backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == needed
    for name in needed:
        assert torch.equal(leaves[name].grad, expected[name])


def test_forward_forms_only_the_gradients_that_will_be_asked_for(device, monkeypatch):
    (x, weight, bias), target, _ = tensors(9, 4, 12, torch.float32, device)
    module, wanted = sys.modules[plan.__module__], []

    def record(*args, want_dx, want_dw, operator=module._fwd):
        wanted.append((want_dx, want_dw))
        return operator(*args, want_dx, want_dw)

    monkeypatch.setattr(module, "_fwd", record)
    frozen, leaf = weight, weight.clone().requires_grad_()
    linear_cross_entropy(x, frozen, target, bias)
    linear_cross_entropy(x, leaf, target)
    linear_cross_entropy(x.clone().requires_grad_(), frozen, target)
    linear_cross_entropy(x, frozen, target, bias.requires_grad_())
    linear_cross_entropy(x, leaf, target, reduction="none")
    with torch.no_grad():
        linear_cross_entropy(x, leaf, target)
    assert wanted == [
        (False, False),
        (False, True),
        (True, False),
        (False, True),
        (False, False),
        (False, False),
    ]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_incoming_gradient_scales(reduction, device):
    inputs, target, _ = tensors(9, 4, 12, torch.float32, device)
    _, *once = run(linear_cross_entropy, inputs, target, reduction=reduction)
    _, *four_times = run(
        lambda *args, **kw: 4 * linear_cross_entropy(*args, **kw),
        inputs,
        target,
        reduction=reduction,
    )
    for a, b in zip(four_times, once, strict=True):
        assert torch.equal(a, 4 * b)


def test_backward_twice_gives_the_same_twice(device):
    (x, weight, _), target, _ = tensors(9, 4, 12, torch.float32, device)
    loss = linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), target)
    first, second = (
        torch.autograd.grad(3 * loss, (x, weight), retain_graph=True) for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward_is_refused_as_autograd_does(reduction, device):
    (x, weight, _), target, _ = tensors(9, 4, 12, torch.float32, device)
    loss = linear_cross_entropy(x.requires_grad_(), weight, target, reduction=reduction).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant, device):
    """The first forward forms no gradients where autograd is off, and they are right where it runs again."""
    inputs, target, _ = tensors(9, 4, 12, torch.float32, device)

    def recomputed(x, weight, target, bias):
        return checkpoint(
            linear_cross_entropy, x, weight, target, bias, use_reentrant=use_reentrant
        )

    for a, b in zip(
        *(run_backward(f, inputs, target) for f in (recomputed, linear_cross_entropy)), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused(reduction, device):
    (x, weight, _), target, _ = tensors(5, 4, 12, torch.float32, device)
    loss = linear_cross_entropy(x.requires_grad_(), weight, target, reduction=reduction).sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dx.sum().backward()


def peak(call, N, D, V, dtype):
    """The most bytes that call(x, weight, target) holds at once beside these. Tensors on "meta" cost nothing, but count."""
    x, weight = (
        torch.empty(size, dtype=dtype, device="meta", requires_grad=True)
        for size in ((N, D), (V, D))
    )
    target = torch.empty(N, dtype=torch.int64, device="meta")
    with Held(x, weight, target) as found:
        call(x, weight, target)
    return found.most


def unfused(x, weight, target):
    return torch.autograd.grad(F.cross_entropy(F.linear(x, weight), target), (x, weight))


def fused(fwd, scale):
    """Forward and backward as autograd calls them."""

    @torch.no_grad()
    def call(x, weight, target):
        loss, divisor, *grads = fwd(
            x, weight, target, None, -100, 0.0, 0.0, 0.0, "mean", True, True
        )
        scale(torch.ones_like(loss), divisor, *grads, x.dtype)

    return call


def for_rows(rows_bwd):
    """The backward of reduction "none"."""

    @torch.no_grad()
    def call(x, weight, target):
        rows_bwd(
            torch.empty(x.shape[0], device="meta"),
            x,
            weight,
            target,
            None,
            -100,
            0.0,
            0.0,
            0.0,
            True,
            True,
        )

    return call


@pytest.mark.plain
def test_the_reference_holds_a_few_percent_of_what_all_logits_take():
    sizes = (256, 50_304, torch.float32)
    ours = peak(fused(reference_fwd, reference_scale), 8192, *sizes)
    assert ours <= 0.15 * peak(unfused, 8192, *sizes)
    assert peak(for_rows(reference_rows_bwd), 8192, *sizes) <= ours + 8192 * 16
    # Twice the rows: only the gradient of x, formed and scaled, and a few numbers a row.
    assert peak(fused(reference_fwd, reference_scale), 16_384, *sizes) - ours <= 8192 * (
        2 * 256 * 4 + 64
    )


@pytest.mark.plain
def test_the_kernels_hold_a_chunk_of_logits(monkeypatch):
    monkeypatch.setattr(JITFunction, "run", lambda *args, **kwargs: None)
    # Only CUDA's products are summed into float32, and they allocate nothing.
    monkeypatch.setattr(
        sys.modules[plan.__module__], "matmul_out", lambda a, b, out, accumulate=False: None
    )
    N, sizes = 16_384, (768, 50_304, torch.bfloat16)
    stated, ours = cost(N, *sizes[:2], 2), peak(fused(launch_fwd, launch_scale), N, *sizes)
    assert ours <= 0.15 * peak(unfused, N, *sizes)
    # And the loss of each row.
    assert ours == stated["workspace_bytes"] + stated["saved_bytes"] + 4 * N
    four_times = peak(fused(launch_fwd, launch_scale), 4 * N, *sizes)
    assert four_times - ours == 3 * N * (4 * 768 + 4)
    assert peak(for_rows(launch_rows_bwd), N, *sizes) <= ours + 4 * N


def test_without_gradients_nothing_is_kept(device):
    (x, weight, bias), target, _ = tensors(9, 4, 12, torch.float32, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda value: value):
        linear_cross_entropy(x, weight, target, bias)
        with torch.no_grad():
            linear_cross_entropy(x.requires_grad_(), weight, target, bias)
        assert not kept
        linear_cross_entropy(x, weight, target, bias)
    assert sum(value.numel() for value in kept) == x.numel() + 1, (
        "the count and the gradient of x alone"
    )


@pytest.mark.plain
@pytest.mark.parametrize("value", [12, -1])
def test_target_outside_the_vocabulary_is_named(value):
    (x, weight, _), target, _ = tensors(9, 4, 12, torch.float32, "cpu")
    target[1] = value
    with pytest.raises(
        IndexError, match=rf"^linear_cross_entropy: target must be from 0 to 11 .*, got {value}; "
    ):
        linear_cross_entropy(x, weight, target)


def test_target_outside_the_vocabulary_is_nan_where_values_are_not_looked_at(device, monkeypatch):
    monkeypatch.setattr(sys.modules[plan.__module__], "check_targets", lambda *args: None)
    (x, weight, _), _, _ = tensors(4, 3, 5, torch.float32, device)
    target = torch.tensor([1, 5, -100, -1], device=device)
    loss, dx, dweight = run(linear_cross_entropy, [x, weight], target, reduction="none")
    assert loss.isnan().tolist() == [False, True, False, True]
    assert dx.isnan().all(1).tolist() == dx.isnan().any(1).tolist() == [False, True, False, True]
    assert dweight.isnan().all()
    assert run(linear_cross_entropy, [x, weight], target)[0].isnan()


@pytest.mark.plain
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.ones(())},
            r"x must be floating point \(\.\.\., D\) with D at least 1, got torch.float32 \(\)",
        ),
        ({"x": torch.ones(2, 0)}, r"x must be floating point .*, got torch.float32 \(2, 0\)"),
        (
            {"x": torch.ones(2, 4, dtype=torch.long)},
            r"x must be floating point .*, got torch.int64 \(2, 4\)",
        ),
        (
            {"weight": torch.ones(4, 5)},
            r"weight must be \(V, 4\) with V at least 1 to match x \(2, 4\), got \(4, 5\); pass",
        ),
        (
            {"weight": torch.ones(0, 4)},
            r"weight must be \(V, 4\) with V at least 1 .*, got \(0, 4\)",
        ),
        ({"weight": torch.ones(4)}, r"weight must be \(V, 4\) .*, got \(4,\)"),
        (
            {"weight": torch.ones(5, 4).double()},
            r"weight must be torch.float32 on cpu like x, got torch.float64 on cpu; ",
        ),
        (
            {"weight": torch.ones(5, 4, device="meta")},
            r"weight must be torch.float32 on cpu like x, got torch.float32 on meta",
        ),
        ({"bias": torch.ones(4)}, r"bias must be \(5,\) to match weight \(5, 4\), got \(4,\)"),
        (
            {"bias": torch.ones(5).half()},
            r"bias must be torch.float32 on cpu like x, got torch.float16 on cpu",
        ),
        (
            {"target": torch.ones(3, dtype=torch.long)},
            r"target must be \(2,\) to match x \(2, 4\), got \(3,\)",
        ),
        (
            {"target": torch.ones(2)},
            r"target must be int64 or int32 class indices, got torch.float32",
        ),
        (
            {"target": torch.ones(2, dtype=torch.long, device="meta")},
            r"target must be on cpu like x, got meta",
        ),
        ({"label_smoothing": 1.0}, r"label_smoothing must be at least 0 and below 1, got 1.0"),
        ({"z_loss": -1.0}, r"z_loss must be from 0, for none, to 1e\+18, got -1.0"),
        ({"softcap": -30.0}, r"softcap must be 0, for none, or from 1e-18 to 1e\+18, got -30.0"),
        ({"reduction": "max"}, r"reduction must be one of mean, sum, none, got 'max'"),
    ],
)
def test_bad_input_is_named(change, message):
    target = torch.zeros(2, dtype=torch.long)
    arguments = {
        "x": torch.ones(2, 4),
        "weight": torch.ones(5, 4),
        "bias": torch.ones(5),
        "target": target,
    } | change
    with pytest.raises(ValueError, match="^linear_cross_entropy: " + message):
        linear_cross_entropy(**arguments)


@pytest.mark.plain
def test_plans_bound_blocks_and_chunks():
    for N, V in itertools.product((0, 1, 100, 4_097, 10**7), (1, 65, 4096, 50_304)):
        rows = block_rows(N, V)
        assert 1 <= rows <= max(N, 1)
        assert rows * V <= max(1 << 20, MIN_BLOCK_ROWS * V)
        rows = plan(N, V)
        assert rows % 128 == 0
        assert rows <= max(CHUNK_ROWS, (1 << 26) // V)
    assert (
        block_rows(10**7, 65)
        > block_rows(10**7, 4096)
        == block_rows(10**7, 50_304)
        == MIN_BLOCK_ROWS
    )
    assert plan(65_536, 50_304) == plan(16_384, 50_304) == CHUNK_ROWS
    assert plan(CHUNK_ROWS + 1, 50_304) == 2_176, "two chunks of about the same size"
    assert cost(CHUNK_ROWS, 768, 50_257, 2)["workspace_bytes"] == CHUNK_ROWS * 50_304 * 2, (
        "rows aligned for products"
    )
    assert cost(10**7, 64, 3, 2)["workspace_bytes"] <= 2 << 26


@pytest.mark.plain
def test_cost_is_that_of_three_products():
    whole = cost(4096, 768, 50_304, 2)
    assert whole["fwd_flops"] + whole["bwd_flops"] == 3 * 2 * 4096 * 768 * 50_304
    assert whole["fwd_bytes"] == 2 * (4096 + 50_304) * 768
