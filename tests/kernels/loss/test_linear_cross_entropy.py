"""linear_cross_entropy: math, accuracy, layouts, contract, memory.

Machine code: test_cross_entropy.py compiles the kernels of both losses.
"""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from triton.runtime.jit import JITFunction

from tests.held import Held
from tests.kernels.compare import assert_close, assert_equal, opcheck
from tests.kernels.loss.cases import (
    ALL_OPTIONS,
    BAD_ARGUMENTS,
    FLOATS,
    OPTIONS,
    REDUCTIONS,
    given_reduction,
    torch_cross_entropy,
    torch_rows,
)
from tests.tolerance import assert_accurate, walk
from tritium.kernels import linear_cross_entropy
from tritium.kernels.core.op import INTERPRET
from tritium.kernels.loss.chunks import MAX_CHUNK_ROWS
from tritium.kernels.loss.launch import launch_scale
from tritium.kernels.loss.linear_cross_entropy import (
    cost,
    launch_fwd,
    launch_rows_bwd,
    reference_fwd,
    reference_rows_bwd,
    reference_scale,
)
from tritium.kernels.loss.options import LossOptions

MODULE = sys.modules[launch_fwd.__module__]
REFERENCE = sys.modules[reference_fwd.__module__]
# Rows, width, vocabulary: one element, odd sizes, one past a power of two.
SHAPES = [(1, 1, 1), (1, 5, 3), (33, 17, 65), (7, 64, 257), (70, 3, 5), (15, 3, 5)]
NAMES = ["loss", "dx", "dweight", "dbias"]


def tensors(N, D, V, dtype, device):
    """Return (x, weight, bias), targets, and a gradient per row. Every fifth row is ignored."""
    generator = torch.Generator().manual_seed(N * 10_007 + D * 101 + V)
    inputs = [
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in ((N, D), (V, D), (V,))
    ]
    target = torch.randint(V, (N,), generator=generator)
    target[2::5] = -100
    return inputs, target.to(device), torch.randn(N, generator=generator).to(device)


def unfused_loss(x, weight, target, bias=None, **options):
    """The same loss, computed from all logits."""
    return torch_cross_entropy(F.linear(x, weight, bias), target, **options)


def run(function, inputs, target, incoming=None, **options):
    """Return the loss and the gradients of x, weight and, if given, bias."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    x, weight, *bias = leaves
    loss = function(x, weight, target, *bias, **options)
    incoming = torch.ones_like(loss) if incoming is None else incoming.to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, incoming)]


def run_backward(function, inputs, target):
    """Like run, with loss.backward(): reentrant checkpoints do not support torch.autograd.grad."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    loss = function(*leaves[:2], target, leaves[2])
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def scales(inputs, target, incoming=None, **options):
    """Return the magnitude of the terms that each gradient sums. Rounding errors do not cancel.

    The derivative of a softcap is 1 - tanh(x)^2. Near 0 its rounding errors are those of 1, so the
    gradient before the softcap bounds the terms.
    """
    x, weight, bias = (value.detach().double() for value in inputs)
    logits = F.linear(x, weight, bias)
    softcap = options.pop("softcap", 0.0)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits.requires_grad_()
    loss = torch_cross_entropy(logits, target, **options)
    incoming = torch.ones_like(loss) if incoming is None else incoming.to(loss.dtype)
    (dlogits,) = torch.autograd.grad(loss, logits, incoming)
    return {
        "loss": 0.0,
        "dx": walk(dlogits, weight),
        "dweight": walk(dlogits.t(), x),
        "dbias": len(x) ** 0.5 * dlogits.abs().max().item(),
    }


@pytest.fixture
def set_chunk_rows(monkeypatch):
    """A function that sets the rows per chunk and per block."""

    def set_rows(rows):
        monkeypatch.setattr(MODULE, "plan", lambda *_: rows)
        monkeypatch.setattr(REFERENCE, "block_rows", lambda *_: rows)

    return set_rows


@pytest.fixture
def chunks_of_five(set_chunk_rows):
    """Use chunks of five rows. The number of rows need not be divisible by five."""
    set_chunk_rows(5)


# --- 1. math


@pytest.mark.plain
@pytest.mark.usefixtures("chunks_of_five")
@pytest.mark.parametrize(("options", "reduction"), list(itertools.product(OPTIONS, REDUCTIONS)))
def test_gradients_match_finite_differences(options, reduction):
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
def test_matches_the_unfused_loss(options, reduction):
    inputs, target, incoming = tensors(23, 6, 33, torch.float64, "cpu")
    target = target.where(target != -100, options.get("ignore_index", -100))
    given = given_reduction(options, reduction, incoming)
    got = run(linear_cross_entropy, inputs, target, **given)
    assert_close(got, run(unfused_loss, inputs, target, **given), rtol=1e-11, atol=1e-11)


# --- 2. kernel against the float64 reference


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("N", "D", "V"), SHAPES)
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS])
def test_loss_and_gradients_are_accurate(N, D, V, dtype, options, device, set_chunk_rows):
    set_chunk_rows(max(5, N // 3 + 1))
    inputs, target, incoming = tensors(N, D, V, dtype, device)
    for reduction in ("mean", "none") if options else REDUCTIONS:
        given = given_reduction(options, reduction, incoming)
        got = run(linear_cross_entropy, inputs, target, **given)
        truth = run(unfused_loss, [value.double() for value in inputs], target, **given)
        baseline = run(unfused_loss, inputs, target, **given)
        terms = scales(inputs, target, **given)
        for name, *values in zip(NAMES, got, truth, baseline, strict=True):
            # dx and dweight are rounded again after the scaling.
            size = values[1].abs().max().item() if name in ("dx", "dweight") else 0.0
            scale = size + terms[name]
            assert_accurate(f"{name} {reduction}", *values, length=max(N, V) + D, scale=scale)


def test_weight_gradient_does_not_overflow_before_it_is_divided(device):
    """The sum over 4,096 equal rows exceeds the range of float16; the mean does not."""
    N = 4096
    x = torch.full((N, 2), 40.0, device=device, dtype=torch.float16)
    weight = torch.zeros(3, 2, device=device, dtype=torch.float16)
    target = torch.zeros(N, dtype=torch.long, device=device)
    _, _, dweight = run(linear_cross_entropy, [x, weight], target)
    expected = torch.full((2,), -40 * 2 / 3, device=device, dtype=torch.float16)
    torch.testing.assert_close(dweight[0], expected)


def test_bias_gradient_is_summed_in_float32_over_the_chunks(device, chunks_of_five):
    """All rows add the same number. In bfloat16 a sum of 300 would be wrong by a tenth."""
    x, weight, bias = (
        torch.zeros(shape, device=device, dtype=torch.bfloat16)
        for shape in ((300, 2), (3, 2), (3,))
    )
    target = torch.zeros(300, dtype=torch.long, device=device)
    *_, dbias = run(linear_cross_entropy, [x, weight, bias], target, reduction="sum")
    torch.testing.assert_close(
        dbias.float().cpu(), torch.tensor([-200.0, 100.0, 100.0]), rtol=1 / 128, atol=0
    )


@pytest.mark.usefixtures("chunks_of_five")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_lse_and_number_of_right_predictions_match_torch(needs_gradient, reduction, dtype, device):
    (x, weight, bias), target, _ = tensors(33, 17, 65, dtype, device)
    logits = F.linear(x.double(), weight.double(), bias.double())
    target[::2] = logits[::2, :60].argmax(-1).where(target[::2] >= 0, -100)
    target.clamp_(max=59)
    x.requires_grad_(needs_gradient)
    options = {"softcap": 3.0, "reduction": reduction, "vocab_size": 60}
    got = linear_cross_entropy(
        x, weight, target, bias, return_lse=True, return_correct=True, **options
    )
    loss, lse, correct = got
    truth, expected = torch_rows(logits[:, :60], target, 3.0)
    baseline, _ = torch_rows(F.linear(x.float(), weight.float(), bias.float())[:, :60], target, 3.0)
    if INTERPRET or device.type == "cuda":  # their logits are rounded to the dtype of x
        baseline, expected = torch_rows(F.linear(x, weight, bias)[:, :60], target, 3.0)
    assert_accurate("lse", lse, truth, baseline, length=17 + 65, scale=3.0)
    assert not lse.requires_grad
    assert correct == expected
    assert torch.equal(loss, linear_cross_entropy(x, weight, target, bias, **options))


@pytest.mark.parametrize(
    ("weight_dtype", "bias_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
)
def test_bias_may_have_another_dtype_than_weight(weight_dtype, bias_dtype, device):
    (x, weight, bias), target, _ = tensors(33, 17, 65, torch.bfloat16, device)
    inputs = x, weight.to(weight_dtype), bias.to(bias_dtype)
    got = run(linear_cross_entropy, inputs, target)
    same = x, weight.to(weight_dtype), bias.to(weight_dtype)
    expected = run(linear_cross_entropy, same, target)
    assert got[3].dtype == bias_dtype
    assert_equal(got, [*expected[:3], expected[3].to(bias_dtype)])


# --- 3. layouts


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_layout_matches_the_contiguous_copy(reduction, device):
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
        assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_leading_axes_are_flattened(device):
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
def test_loss_of_no_rows_or_only_ignored_rows_is_zero(N, device):
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
    target = target.clamp(max=19)
    ops, options = torch.ops.tritium, (-100, 0.1, 0.01, 5.0)
    leaves = [value.clone().requires_grad_() for value in (x, weight, bias)]
    for reduction, want in (("mean", True), ("none", False)):
        arguments = (leaves[0], leaves[1], target, leaves[2], *options, reduction, 20, *[want] * 4)
        opcheck(ops.linear_cross_entropy_fwd.default, arguments)
    opcheck(
        ops.linear_cross_entropy_fwd.default,
        (x, weight, target, None, *options, "sum", 24, True, False, False, True),
    )
    # A float32 weight with a 16-bit x.
    opcheck(
        ops.linear_cross_entropy_fwd.default,
        (x.bfloat16().requires_grad_(), leaves[1], target, None, *options, "mean", 20, *[True] * 4),
    )
    scaled = (incoming[0].clone(), torch.tensor(5, device=device), x, weight, bias)
    opcheck(ops.linear_cross_entropy_scale.default, (*scaled, torch.bfloat16))
    opcheck(
        ops.linear_cross_entropy_rows_bwd.default,
        (incoming, x, weight, target, bias, *options, "none", 20, True, True),
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_as_one_graph(reduction, device):
    inputs, target, incoming = tensors(9, 8, 40, torch.float32, device)
    compiled = torch.compile(
        lambda *args, **kw: linear_cross_entropy(*args, **kw), fullgraph=True, backend="aot_eager"
    )
    given = given_reduction(OPTIONS[-1], reduction, incoming)
    target = target.clamp(min=0)
    assert_equal(
        run(compiled, inputs, target, **given), run(linear_cross_entropy, inputs, target, **given)
    )


@pytest.mark.plain
@pytest.mark.usefixtures("chunks_of_five")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ten_numbers_of_rows_compile_at_most_twice(reduction):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=counter)
    for N in range(13, 23):
        inputs, target, incoming = tensors(N, 8, 40, torch.float32, "cpu")
        given = given_reduction({}, reduction, incoming)
        assert_equal(
            run(compiled, inputs, target, **given),
            run(linear_cross_entropy, inputs, target, **given),
        )
    assert counter.frame_count <= 2


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_casts_x_and_does_not_round_gradients_of_float32_weights(reduction, device):
    inputs, target, _ = tensors(9, 16, 12, torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = run(linear_cross_entropy, inputs, target, reduction=reduction)
    assert [value.dtype for value in got] == [torch.float32] * 4
    x, weight, bias = inputs
    expected = run(linear_cross_entropy, [x.bfloat16(), weight, bias], target, reduction=reduction)
    assert_equal(got, [value.float() for value in expected])


def test_autocast_casts_16_bit_weights(device):
    (x, weight, bias), target, _ = tensors(9, 16, 12, torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = run(linear_cross_entropy, [x, weight.half(), bias.half()], target)
    assert [value.dtype for value in got[1:]] == [torch.float32, torch.float16, torch.float16]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_of_a_float32_weight_is_not_rounded_to_the_dtype_of_x(reduction, dtype, device):
    """It is that of the rounded weight: the loss and dx are bitwise those of a 16-bit weight."""
    (x, weight, bias), target, _ = tensors(37, 16, 12, dtype, device)
    masters = [weight.float() + 1e-5, bias.float() + 1e-5]
    rounded = [master.to(dtype) for master in masters]
    loss, dx, dweight, dbias = run(linear_cross_entropy, [x, *masters], target, reduction=reduction)
    expected = run(linear_cross_entropy, [x, *rounded], target, reduction=reduction)
    assert_equal((loss, dx, dweight.to(dtype), dbias.to(dtype)), expected)
    assert dweight.dtype == dbias.dtype == torch.float32
    wide = [value.double() for value in (x, *rounded)]
    truth = run(unfused_loss, wide, target, reduction=reduction)[2]
    if not INTERPRET and device.type == "cpu":  # the kernels round dlogits to 16 bits
        assert (dweight - truth).abs().max() < 1e-5 * truth.abs().max()
    assert not torch.equal(dweight, dweight.to(dtype).float())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("V", "padded", "options"),
    [
        (5, 6, OPTIONS[-1]),
        (65, 128, OPTIONS[-1]),
        (65, 128, OPTIONS[1]),  # label smoothing gives all classes a gradient
        (1030, 1088, OPTIONS[-1]),
        (1024, 2100, OPTIONS[-1]),
    ],
)
def test_padding_rows_of_the_weight_change_nothing(V, padded, options, reduction, dtype, device):
    """The padding would win every softmax. Rounding in matmuls may depend on their size."""
    (x, weight, bias), target, _ = tensors(9, 4, padded, dtype, device)
    target = (target % V).where(target >= 0, options.get("ignore_index", -100))
    weight[V:] = 1e3
    options = {**options, "reduction": reduction, "vocab_size": V}
    loss, dx, dweight, dbias = run(linear_cross_entropy, [x, weight, bias], target, **options)
    options["vocab_size"] = None
    expected = run(linear_cross_entropy, [x, weight[:V], bias[:V]], target, **options)
    assert_close((loss, dx, dweight[:V], dbias[:V]), expected)
    assert not dweight[V:].any()
    assert not dbias[V:].any()


@pytest.mark.plain
@pytest.mark.parametrize("has_bias", [True, False])
def test_weights_that_slow_a_gpu_are_padded_without_effect(has_bias, monkeypatch):
    x, weight = torch.randn(5, 8, dtype=torch.float64), torch.randn(19, 8, dtype=torch.float64)
    bias = torch.randn(19, dtype=torch.float64) if has_bias else None
    target = torch.randint(19, (5,))
    leaves = [value.requires_grad_() for value in (x, weight, bias) if value is not None]

    def results():
        loss = linear_cross_entropy(x, weight, target, bias)
        return [loss, *torch.autograd.grad(loss, leaves)]

    expected = results()
    rows = []
    monkeypatch.setattr(MODULE, "_is_slow", lambda V, x: rows.append(V) or True)
    assert_close(results(), expected, rtol=1e-12, atol=1e-12)
    assert rows == [19]


@pytest.mark.plain
def test_16_bit_weights_with_an_unaligned_number_of_classes_are_padded_on_a_device():
    x = torch.empty(5, 8, dtype=torch.bfloat16, device="meta")
    for V, rows in ((50257, 50304), (50264, 50264)):
        weight = torch.empty(V, 8, dtype=torch.bfloat16, device="meta")
        assert MODULE._pad_classes(weight, None, x)[0].shape == (rows, 8)
    weight = torch.empty(50257, 8, device="meta")
    assert MODULE._pad_classes(weight, None, x.float())[0] is weight


@pytest.mark.plain
def test_a_padding_row_is_not_a_class():
    (x, weight, _), target, _ = tensors(9, 4, 12, torch.float32, "cpu")
    target[1] = 10
    with pytest.raises(IndexError, match=r"target must be from 0 to 9 or .*, got 10"):
        linear_cross_entropy(x, weight, target, vocab_size=10)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reruns_are_bitwise_equal(reduction, device, set_chunk_rows):
    set_chunk_rows(64)
    inputs, target, _ = tensors(300, 24, 48, torch.bfloat16, device)
    runs = [run(linear_cross_entropy, inputs, target, reduction=reduction) for _ in range(2)]
    assert_equal(*runs)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needed", [{"x"}, {"weight"}, {"bias"}, {"x", "bias"}])
def test_only_inputs_that_need_gradients_get_them(needed, reduction, device):
    inputs, target, _ = tensors(9, 4, 12, torch.float32, device)
    _, *grads = run(linear_cross_entropy, inputs, target, reduction=reduction)
    expected = dict(zip(["x", "weight", "bias"], grads, strict=True))
    leaves = {name: value.clone() for name, value in zip(expected, inputs, strict=True)}
    for name in needed:
        leaves[name].requires_grad_()
    linear_cross_entropy(**leaves, target=target, reduction=reduction).sum().backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == needed
    for name in needed:
        assert torch.equal(leaves[name].grad, expected[name])


def test_forward_computes_only_the_gradients_that_the_backward_needs(device, monkeypatch):
    (x, weight, bias), target, _ = tensors(9, 4, 12, torch.float32, device)
    wanted = []
    forward = MODULE._fwd

    def record(*args):
        wanted.append(args[6:8])
        return forward(*args)

    monkeypatch.setattr(MODULE, "_fwd", record)
    leaf = weight.clone().requires_grad_()
    linear_cross_entropy(x, weight, target, bias)
    linear_cross_entropy(x, leaf, target)
    linear_cross_entropy(x.clone().requires_grad_(), weight, target)
    linear_cross_entropy(x, weight, target, bias.requires_grad_())
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
def test_gradients_scale_with_the_incoming_gradient(reduction, device):
    inputs, target, _ = tensors(9, 4, 12, torch.float32, device)
    _, *once = run(linear_cross_entropy, inputs, target, reduction=reduction)
    _, *four_times = run(
        lambda *args, **kw: 4 * linear_cross_entropy(*args, **kw),
        inputs,
        target,
        reduction=reduction,
    )
    assert_equal(four_times, [4 * value for value in once])


def test_backward_of_a_retained_graph_gives_the_same_gradients_again(device):
    (x, weight, _), target, _ = tensors(9, 4, 12, torch.float32, device)
    loss = linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), target)
    first, second = (
        torch.autograd.grad(3 * loss, (x, weight), retain_graph=True) for _ in range(2)
    )
    assert_equal(first, second)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward_of_a_freed_graph_raises(reduction, device):
    (x, weight, _), target, _ = tensors(9, 4, 12, torch.float32, device)
    loss = linear_cross_entropy(x.requires_grad_(), weight, target, reduction=reduction).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant, device):
    """A reentrant checkpoint runs its first forward without autograd: it computes no gradients."""
    inputs, target, _ = tensors(9, 4, 12, torch.float32, device)

    def recomputed(x, weight, target, bias):
        return checkpoint(
            linear_cross_entropy, x, weight, target, bias, use_reentrant=use_reentrant
        )

    assert_equal(
        run_backward(recomputed, inputs, target), run_backward(linear_cross_entropy, inputs, target)
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_raises(reduction, device):
    (x, weight, _), target, _ = tensors(5, 4, 12, torch.float32, device)
    loss = linear_cross_entropy(x.requires_grad_(), weight, target, reduction=reduction).sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dx.sum().backward()


def peak_bytes(call, N, D, V, dtype):
    """Return the peak memory of call(x, weight, target), without its arguments.

    Held counts the bytes of tensors on "meta", which take no memory.
    """
    x = torch.empty(N, D, dtype=dtype, device="meta", requires_grad=True)
    weight = torch.empty(V, D, dtype=dtype, device="meta", requires_grad=True)
    target = torch.empty(N, dtype=torch.int64, device="meta")
    with Held(x, weight, target) as held:
        call(x, weight, target)
    return held.most


def unfused(x, weight, target):
    return torch.autograd.grad(F.cross_entropy(F.linear(x, weight), target), (x, weight))


def fused(fwd, scale):
    """A call of the forward and the backward, as autograd makes it."""

    @torch.no_grad()
    def call(x, weight, target):
        V = weight.shape[0]
        wants = True, True, False, False
        loss, divisor, *grads, _, _ = fwd(x, weight, target, None, LossOptions(), V, *wants)
        scale(torch.ones_like(loss), divisor, *grads, weight.dtype)

    return call


def fused_rows(rows_bwd):
    """A call of the backward of reduction "none"."""

    @torch.no_grad()
    def call(x, weight, target):
        dloss = torch.empty(x.shape[0], device="meta")
        options = LossOptions(reduction="none")
        rows_bwd(dloss, x, weight, target, None, options, weight.shape[0], True, True)

    return call


@pytest.mark.plain
def test_reference_takes_15_percent_of_the_unfused_memory():
    sizes = (256, 50_304, torch.float32)
    reference = fused(reference_fwd, reference_scale)
    found = peak_bytes(reference, 8192, *sizes)
    assert found <= 0.15 * peak_bytes(unfused, 8192, *sizes)
    assert peak_bytes(fused_rows(reference_rows_bwd), 8192, *sizes) <= found + 8192 * 16
    # More rows add only dx, unscaled and scaled, and a few numbers per row.
    per_row = 2 * 256 * 4 + 64
    assert peak_bytes(reference, 16_384, *sizes) - found <= 8192 * per_row


@pytest.mark.plain
@pytest.mark.parametrize(
    ("D", "N", "fraction"),
    [
        (768, 16_384, 0.15),
        (1024, 16_384, 0.15),
        (1280, 16_384, 0.15),
        (1600, 16_384, 0.175),
        (1600, 32_768, 0.15),
    ],
)
def test_kernels_take_the_stated_fraction_of_the_unfused_memory(D, N, fraction, monkeypatch):
    monkeypatch.setattr(JITFunction, "run", lambda *args, **kwargs: None)
    # As on CUDA: matmul_out allocates nothing there.
    monkeypatch.setattr(MODULE, "matmul_out", lambda a, b, out, accumulate=False: None)
    V = 50_304
    sizes = (D, V, torch.bfloat16)
    kernels = fused(launch_fwd, launch_scale)
    stated = cost(N, D, V, 2)
    found = peak_bytes(kernels, N, *sizes)
    assert found <= fraction * peak_bytes(unfused, N, *sizes)
    row_losses = 4 * N
    assert found == stated["workspace_bytes"] + stated["saved_bytes"] + row_losses
    # More rows add dx, unscaled and scaled, and the row losses, but no logits.
    assert peak_bytes(kernels, 4 * N, *sizes) - found <= 3 * N * (2 * 2 * D + 4)
    assert peak_bytes(fused_rows(launch_rows_bwd), N, *sizes) <= found + 4 * N


@pytest.mark.plain
def test_kernels_hold_a_16_bit_copy_of_a_float32_weight_as_cost_states(monkeypatch):
    monkeypatch.setattr(JITFunction, "run", lambda *args, **kwargs: None)
    monkeypatch.setattr(MODULE, "matmul_out", lambda a, b, out, accumulate=False: None)
    N, D, V = 16_384, 768, 50_304
    x = torch.empty(N, D, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(V, D, device="meta")
    target = torch.empty(N, dtype=torch.int64, device="meta")
    with Held(x, weight, target) as held:
        launch_fwd(x, weight, target, None, LossOptions(), 50_257, True, True, False, False)
    stated = cost(N, D, V, 2, weight_itemsize=4)
    assert held.most == stated["workspace_bytes"] + stated["saved_bytes"] + 4 * N


def test_saves_only_the_gradients_that_the_backward_needs(device):
    (x, weight, bias), target, _ = tensors(9, 4, 12, torch.float32, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda value: value):
        linear_cross_entropy(x, weight, target, bias)
        with torch.no_grad():
            linear_cross_entropy(x.requires_grad_(), weight, target, bias)
        assert not kept
        linear_cross_entropy(x, weight, target, bias)
    assert sum(value.numel() for value in kept) == x.numel() + 1, "dx and the divisor"


@pytest.mark.plain
@pytest.mark.parametrize("value", [12, -1])
def test_target_outside_the_vocabulary_raises_on_the_cpu(value):
    (x, weight, _), target, _ = tensors(9, 4, 12, torch.float32, "cpu")
    target[1] = value
    with pytest.raises(
        IndexError, match=rf"^linear_cross_entropy: target must be from 0 to 11 .*, got {value}; "
    ):
        linear_cross_entropy(x, weight, target)


def test_target_outside_the_vocabulary_gives_nan_on_a_device(device, monkeypatch):
    """A GPU does not check the values."""
    monkeypatch.setattr(REFERENCE, "check_target_values", lambda *args: None)
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
            r"weight must have shape \(V, 4\) with V at least 1 to match x .*, got \(4, 5\); pass",
        ),
        (
            {"weight": torch.ones(0, 4)},
            r"weight must have shape \(V, 4\) with V at least 1 .*, got \(0, 4\)",
        ),
        ({"weight": torch.ones(4)}, r"weight must have shape \(V, 4\) .*, got \(4,\)"),
        (
            {"weight": torch.ones(5, 4).double()},
            r"weight must be torch.float32 to match x, got torch.float64; convert it",
        ),
        (
            {"weight": torch.ones(5, 4, device="meta")},
            r"weight must be on cpu like x, got meta; move it",
        ),
        (
            {"bias": torch.ones(4)},
            r"bias must have shape \(5,\) to match weight \(5, 4\), got \(4,\)",
        ),
        (
            {"x": torch.ones(2, 4).half(), "weight": torch.ones(5, 4).bfloat16()},
            r"weight must be torch.float16 or torch.float32 to match x, got torch.bfloat16; ",
        ),
        (
            {"bias": torch.ones(5).half()},
            r"bias must be torch.float32 to match x, got torch.float16",
        ),
        ({"vocab_size": 6}, r"vocab_size must be from 1 to 5, the rows of weight, got 6"),
        ({"vocab_size": 0}, r"vocab_size must be from 1 to 5, the rows of weight, got 0"),
        *BAD_ARGUMENTS,
    ],
)
def test_bad_arguments_raise(change, message):
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
def test_cost_counts_three_matmuls_and_the_chunk_of_logits():
    found = cost(4096, 768, 50_304, 2)
    assert found["fwd_flops"] + found["bwd_flops"] == 3 * 2 * 4096 * 768 * 50_304
    assert found["fwd_bytes"] == 2 * (4096 + 50_304) * 768
    aligned_rows = cost(MAX_CHUNK_ROWS, 768, 50_257, 2)["workspace_bytes"]
    assert aligned_rows == MAX_CHUNK_ROWS * 50_304 * 2
    master = cost(MAX_CHUNK_ROWS, 768, 50_304, 2, weight_itemsize=4)["workspace_bytes"]
    assert master == aligned_rows + 50_304 * 768 * 2
    assert cost(10**7, 64, 3, 2)["workspace_bytes"] <= 2 << 26
