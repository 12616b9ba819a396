"""cross_entropy: the kinds of tests every kernel file has."""

import itertools
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernels.loss.cases import torch_cross_entropy
from tests.tolerance import assert_accurate
from tritium.bench.codegen.disassembly import disassemblies, resources
from tritium.bench.codegen.launches import TARGETS, compile_launch, record_launches
from tritium.bench.codegen.machine_code import access_bytes, hottest_loop
from tritium.kernels.core.op import INTERPRET
from tritium.kernels.loss._launch import launch_rows_fwd_bwd, plan_tile
from tritium.kernels.loss.cross_entropy import (
    BLOCK_ELEMENTS,
    Options,
    cost,
    cross_entropy,
    launch_bwd,
    launch_fwd,
    plan,
)

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# One element, odd, one past a power of two, rows of one tile and of several, which begin where they may or 16 bytes apart.
SHAPES = [(1, 1), (5, 1), (1, 3), (33, 65), (7, 257), (4, 1024), (9, 1031), (3, 9001)]
EVERYTHING = {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 2.0}
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"softcap": 3.0},
    {**EVERYTHING, "ignore_index": 1},
]
REDUCTIONS = ["mean", "sum", "none"]


def tensors(N, V, dtype, device):
    """Logits, targets of which some are ignored where there are several, and an incoming gradient of each row."""
    generator = torch.Generator().manual_seed(N * 100_003 + V)
    logits = (2 * torch.randn(N, V, generator=generator)).to(device, dtype)
    target = torch.randint(V, (N,), generator=generator)
    target[2::5] = -100
    return logits, target.to(device), torch.randn(N, generator=generator).to(device)


def run(function, logits, *args, incoming=None, **options):
    """Loss and gradient of `function` at a fresh leaf of `logits`."""
    leaf = logits.detach().requires_grad_()
    loss = function(leaf, *args, **options)
    incoming = torch.ones_like(loss) if incoming is None else incoming.to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, leaf, incoming)]


# --- 1. math


@pytest.mark.plain
@pytest.mark.parametrize(("options", "reduction"), list(itertools.product(OPTIONS, REDUCTIONS)))
def test_gradient_is_that_of_the_forward(options, reduction):
    logits, target, _ = tensors(6, 5, torch.float64, "cpu")
    target[0] = options.get("ignore_index", -100)
    target[target == -100] = options.get("ignore_index", -100)
    assert torch.autograd.gradcheck(
        lambda x: cross_entropy(x, target, reduction=reduction, **options), logits.requires_grad_()
    )


@pytest.mark.plain
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.3}, {"ignore_index": 4}])
def test_it_is_torch_cross_entropy(options, reduction):
    logits, target, _ = tensors(11, 33, torch.float64, "cpu")
    target = target.where(target != -100, options.get("ignore_index", -100))
    ours, theirs = (
        run(f, logits, target, reduction=reduction, **options)
        for f in (cross_entropy, F.cross_entropy)
    )
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


# --- 2. against the float64 truth


@pytest.mark.parametrize(
    ("N", "V", "dtype", "options"),
    [
        *(
            (*shape, dtype, options)
            for shape in SHAPES
            for dtype in FLOATS
            for options in ({}, EVERYTHING)
        ),
        # One option alone where the bar is narrowest: rows that share a program, and one that several tiles take.
        *(
            (*shape, torch.float32, options)
            for shape in ((33, 65), (9, 1031))
            for options in OPTIONS[1:4]
        ),
    ],
)
def test_is_accurate(N, V, dtype, options, device):
    logits, target, incoming = tensors(N, V, dtype, device)
    # What is reduced, and how, no option has a say in.
    for reduction in ("mean", "none") if options else REDUCTIONS:
        given = {
            **options,
            "reduction": reduction,
            "incoming": incoming if reduction == "none" else None,
        }
        got = run(cross_entropy, logits, target, **given)
        truth = run(torch_cross_entropy, logits.double(), target, **given)
        peer = run(torch_cross_entropy, logits, target, **given)
        for name, *values in zip(["loss", "dlogits"], got, truth, peer, strict=True):
            assert_accurate(f"{name} {reduction}", *values, length=max(N, V))


def test_is_accurate_where_the_target_is_certain(device):
    logits, target, _ = tensors(64, 65, torch.float32, device)
    target.clamp_(min=0)
    logits.scatter_(1, target[:, None], 25.0)
    got, truth, peer = (run(f, x, target) for f, x in
                        ((cross_entropy, logits), (F.cross_entropy, logits.double()), (F.cross_entropy, logits)))  # fmt: skip
    for name, *values in zip(["loss", "dlogits"], got, truth, peer, strict=True):
        assert_accurate(name, *values, length=65)


@pytest.mark.parametrize("V", [33, 4500])
def test_is_accurate_far_from_zero(V, device):
    """A log-sum-exp of ten thousand has three digits behind the point in float32: the gradient must not depend on them."""
    logits, target, _ = tensors(9, V, torch.float32, device)
    for shift in (1e4, -1e4):
        inputs = logits + shift
        got, (truth, peer) = (
            run(cross_entropy, inputs, target),
            (run(F.cross_entropy, x, target) for x in (inputs.double(), inputs)),
        )
        for name, *values in zip(["loss", "dlogits"], got, truth, peer, strict=True):
            assert_accurate(name, *values, length=V)


@pytest.mark.parametrize("lead", [20.0, 60.0])
def test_a_certain_target_keeps_the_digits_of_the_others(lead, device):
    """p - 1, computed as that, would be 0; PyTorch's own error is as large as the value, so it is no bar here."""
    logits = torch.tensor([[lead, 0.0, 0.0]], device=device)
    target = torch.zeros(1, dtype=torch.long, device=device)
    (loss, dlogits), (true_loss, truth) = (
        run(cross_entropy, logits, target),
        run(F.cross_entropy, logits.double(), target),
    )
    truth[0, 0] = -truth[0, 1:].sum()  # in float64 too
    torch.testing.assert_close(dlogits.double(), truth, rtol=1e-5, atol=0)
    if INTERPRET or device.type == "cuda":
        torch.testing.assert_close(
            loss.double(), torch.log1p(truth[0, 1:].sum()), rtol=1e-5, atol=0
        )
    assert abs(loss.item() - true_loss.item()) < 1e-7


def test_logits_at_the_end_of_float32(device):
    """What masks are made of where -inf is feared."""
    least = torch.finfo(torch.float32).min
    for logits in (
        torch.full((1, 4), least, device=device),
        torch.tensor([[least, 0.0, least, 1.0]], device=device),
    ):
        target = torch.ones(1, dtype=torch.long, device=device)
        for a, b in zip(
            *(run(f, logits, target) for f in (cross_entropy, F.cross_entropy)), strict=True
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("V", [33, 4500])
def test_columns_without_probability(V, device):
    """-inf masks a column: no NaN, no gradient; a target there has an infinite loss, as in PyTorch."""
    logits, target, _ = tensors(9, V, torch.float32, device)
    logits[:, V // 2 :] = -float("inf")
    target[:8] %= V // 2
    target[8] = V - 1
    for reduction in ("none", "mean"):
        got, expected = (
            run(f, logits, target, reduction=reduction) for f in (cross_entropy, F.cross_entropy)
        )
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_more_rows_than_a_block(device, monkeypatch):
    """Blocks that do not divide the rows give what one block gives."""
    logits, target, incoming = tensors(23, 17, torch.float32, device)
    options = {**OPTIONS[-1], "reduction": "none", "incoming": incoming}
    expected = run(cross_entropy, logits, target.clamp(min=0), **options)
    monkeypatch.setattr(sys.modules[plan.__module__], "BLOCK_ELEMENTS", 5 * 17)
    for a, b in zip(
        run(cross_entropy, logits, target.clamp(min=0), **options), expected, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# --- 3. layouts


def layouts(N, V, device):
    base = torch.randn(3 * N, 3 * V, generator=torch.Generator().manual_seed(1)).to(device)
    yield "transposed", base[:N, :N].t()[:, :V]
    yield "row stride", base[::3, :V]
    yield "column slice", base[:N, 3 : 3 + V]
    yield "column stride", base[:N, ::3]
    yield "expanded", base[:1, :V].expand(N, V)


@pytest.mark.parametrize("index", range(5))
def test_any_layout_gives_what_the_contiguous_copy_gives(index, device):
    N, V = 12, 9
    name, logits = list(layouts(N, V, device))[index]
    _, target, incoming = tensors(N, V, torch.float32, device)
    strided_target, strided_incoming = (
        torch.stack([value, value], dim=1)[:, 0] for value in (target, incoming)
    )

    def gradient(view, targets, dloss):
        leaf = view.detach().requires_grad_()  # a leaf of the same layout
        loss = cross_entropy(leaf, targets, reduction="none")
        return loss, *torch.autograd.grad(loss, leaf, dloss)

    got = gradient(logits, strided_target, strided_incoming)
    for a, b in zip(got, gradient(logits.contiguous(), target, incoming), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("columns", "begin", "V"),
    [
        (4104, 0, 4097),
        (4099, 0, 4097),
        (9003, 0, 9000),
        (4500, 3, 4400),
        (1100, 5, 1030),
        (67, 0, 64),
    ],
)
def test_long_rows_of_any_stride_and_begin(columns, begin, V, dtype, device):
    """Rows begin at any distance from a multiple of 16 bytes: the walk leaves no column out, reads none twice."""
    base, target, incoming = tensors(9, columns, dtype, device)
    logits, target = (
        base[:, begin : begin + V],
        (target.clamp(min=0) % V).where(target >= 0, target),
    )
    target[0], target[1] = 0, V - 1
    given = {"label_smoothing": 0.1, "reduction": "none", "incoming": incoming}
    got = run(cross_entropy, logits, target, **given)
    truth, peer = (run(torch_cross_entropy, x, target, **given) for x in (logits.double(), logits))
    for name, *values in zip(["loss", "dlogits"], got, truth, peer, strict=True):
        assert_accurate(name, *values, length=V)


def test_leading_axes(device):
    logits, target, _ = tensors(24, 7, torch.float32, device)
    for reduction in REDUCTIONS:
        flat = run(cross_entropy, logits, target, reduction=reduction)
        deep = run(
            cross_entropy, logits.view(2, 3, 4, 7), target.view(2, 3, 4), reduction=reduction
        )
        assert deep[0].shape == ((2, 3, 4) if reduction == "none" else ())
        for a, b in zip(deep, flat, strict=True):
            assert torch.equal(a.reshape(b.shape), b)
    assert cross_entropy(logits[0], target[0], reduction="none").shape == ()


@pytest.mark.parametrize("ignore_index", [1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_any_ignore_index(ignore_index, dtype, device):
    logits, target, _ = tensors(9, 5, torch.float32, device)
    target = target.where(target >= 0, ignore_index).to(dtype)
    ours = run(cross_entropy, logits, target, ignore_index=ignore_index)
    theirs = run(F.cross_entropy, logits, target.long(), ignore_index=ignore_index)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_to_count_gives_zero(device):
    for logits in (torch.randn(3, 5, device=device), torch.empty(0, 5, device=device)):
        target = torch.full(logits.shape[:1], -100, device=device)
        loss, dlogits = run(cross_entropy, logits, target)
        assert loss.item() == 0
        assert torch.equal(dlogits, torch.zeros_like(logits))
        assert cross_entropy(logits, target, reduction="none").shape == target.shape


# --- 4. contract


def test_opcheck(device):
    logits, target, incoming = tensors(6, 24, torch.float32, device)
    ops, options = torch.ops.tritium, (-100, 0.1, 0.01, 5.0)
    for reduction in REDUCTIONS:
        torch.library.opcheck(
            ops.cross_entropy_fwd.default,
            (logits.clone().requires_grad_(), target, *options, reduction),
        )
        dloss = incoming if reduction == "none" else incoming[0].clone()
        saved = torch.rand(2, 6, device=device), torch.tensor(5, device=device)
        torch.library.opcheck(
            ops.cross_entropy_bwd.default, (dloss, logits, target, *saved, *options)
        )


@pytest.mark.parametrize("dtype", FLOATS)
def test_operator_itself_returns_the_dtype_of_the_logits(dtype, device):
    logits, target, _ = tensors(6, 24, dtype, device)
    options = (-100, 0.0, 0.0, 0.0)
    loss, statistics, divisor = torch.ops.tritium.cross_entropy_fwd(
        logits, target, *options, "mean"
    )
    dlogits = torch.ops.tritium.cross_entropy_bwd(
        torch.ones_like(loss), logits, target, statistics, divisor, *options
    )
    assert (loss.dtype, statistics.dtype, divisor.dtype, dlogits.dtype) == (
        torch.float32,
        torch.float32,
        torch.int64,
        dtype,
    )


def test_compiles_as_one_graph(device):
    logits, target, incoming = tensors(9, 40, torch.float32, device)
    compiled = torch.compile(
        lambda *args, **kw: cross_entropy(*args, **kw), fullgraph=True, backend="aot_eager"
    )
    for options in ({"reduction": "none", "incoming": incoming}, {**OPTIONS[3]}):
        for a, b in zip(
            run(compiled, logits, target, **options),
            run(cross_entropy, logits, target, **options),
            strict=True,
        ):
            assert torch.equal(a, b)


@pytest.mark.plain
def test_ten_numbers_of_rows_compile_at_most_twice():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(cross_entropy, fullgraph=True, backend=counter)
    for N in range(5, 15):
        logits, target, _ = tensors(N, 40, torch.float32, "cpu")
        for a, b in zip(
            run(compiled, logits, target), run(cross_entropy, logits, target), strict=True
        ):
            assert torch.equal(a, b)
    assert counter.frame_count <= 2


def test_autocast_changes_nothing(device):
    logits, target, _ = tensors(4, 32, torch.bfloat16, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss, dlogits = run(cross_entropy, logits, target)
    assert (loss.dtype, dlogits.dtype) == (torch.float32, torch.bfloat16)
    for a, b in zip((loss, dlogits), run(cross_entropy, logits, target), strict=True):
        assert torch.equal(a, b)


def test_reruns_are_bitwise_equal_and_leave_the_logits(device):
    logits, target, _ = tensors(300, 48, torch.float32, device)
    logits.requires_grad_()
    before = logits.detach().clone()
    losses = [cross_entropy(logits, target, **OPTIONS[3]) for _ in range(2)]
    grads = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    assert torch.equal(*losses)
    assert torch.equal(*grads)
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_incoming_gradient_scales(dtype, device):
    logits, target, _ = tensors(5, 12, dtype, device)
    _, once = run(cross_entropy, logits, target)
    _, twice = run(lambda *args: 2 * cross_entropy(*args), logits, target)
    assert torch.equal(twice, 2 * once)


def test_int32_targets(device):
    logits, target, _ = tensors(5, 12, torch.float32, device)
    for a, b in zip(
        run(cross_entropy, logits, target.int()), run(cross_entropy, logits, target), strict=True
    ):
        assert torch.equal(a, b)


def test_a_second_derivative_is_refused(device):
    logits, target, _ = tensors(5, 12, torch.float32, device)
    (dlogits,) = torch.autograd.grad(
        cross_entropy(logits.requires_grad_(), target), logits, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dlogits.sum().backward()


@pytest.mark.plain
@pytest.mark.parametrize("value", [5, -1, 2**31 - 1])
def test_target_outside_the_vocabulary_is_named(value):
    with pytest.raises(
        IndexError,
        match=rf"^cross_entropy: target must be from 0 to 4 or ignore_index \(-100\), got {value}; ",
    ):
        cross_entropy(torch.randn(2, 5), torch.tensor([1, value]))


@pytest.mark.parametrize("V", [5, 4500])
def test_target_outside_the_vocabulary_is_nan_where_values_are_not_looked_at(
    V, device, monkeypatch
):
    """As on a GPU: the row's loss and gradient, and nobody else's."""
    monkeypatch.setattr(sys.modules[plan.__module__], "check_targets", lambda *args: None)
    logits, target = torch.randn(4, V, device=device), torch.tensor([1, -1, V, -100], device=device)
    logits[3] = float("nan")  # nor does it matter what an ignored row holds
    loss, dlogits = run(cross_entropy, logits, target, reduction="none")
    assert loss.isnan().tolist() == [False, True, True, False]
    assert dlogits.isnan().all(1).tolist() == [False, True, True, False]
    assert dlogits.isnan().any(1).tolist() == [False, True, True, False]
    assert not dlogits[3].any()
    assert run(cross_entropy, logits, target)[0].isnan()
    assert run(cross_entropy, logits, torch.full_like(target, 2**40))[0].isnan()


@pytest.mark.plain
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"logits": torch.ones(())},
            r"logits must be floating point \(\.\.\., V\) with V at least 1, got torch.float32 \(\)",
        ),
        ({"logits": torch.ones(2, 0)}, r"logits must be .*, got torch.float32 \(2, 0\)"),
        (
            {"logits": torch.ones(2, 5, dtype=torch.long)},
            r"logits must be floating point .*, got torch.int64 \(2, 5\)",
        ),
        (
            {"target": torch.ones(3, dtype=torch.long)},
            r"target must be \(2,\) to match logits \(2, 5\), got \(3,\); pass one",
        ),
        (
            {"target": torch.ones(2)},
            r"target must be int64 or int32 class indices, got torch.float32; cast it",
        ),
        (
            {"target": torch.ones(2, dtype=torch.long, device="meta")},
            r"target must be on cpu like logits, got meta",
        ),
        ({"label_smoothing": 1.0}, r"label_smoothing must be at least 0 and below 1, got 1.0"),
        ({"label_smoothing": -0.1}, r"label_smoothing must be .*, got -0.1"),
        ({"z_loss": -1.0}, r"z_loss must be from 0, for none, to 1e\+18, got -1.0"),
        ({"softcap": -30.0}, r"softcap must be 0, for none, or from 1e-18 to 1e\+18, got -30.0"),
        ({"softcap": float("inf")}, r"softcap must be .*, got inf"),
        ({"softcap": 1e39}, r"softcap must be .*, got 1e\+39"),
        ({"softcap": None}, r"softcap must be float, got None"),
        ({"ignore_index": 1.5}, r"ignore_index must be int, got 1.5"),
        (
            {"ignore_index": 2**40, "target": torch.zeros(2, dtype=torch.int32)},
            r"ignore_index must be one that torch.int32",
        ),
        (
            {"logits": torch.ones(2, 5).to(torch.float8_e4m3fn)},
            r"logits must be one of .*, got torch.float8_e4m3fn",
        ),
        ({"reduction": "max"}, r"reduction must be one of mean, sum, none, got 'max'"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"logits": torch.ones(2, 5), "target": torch.zeros(2, dtype=torch.long)} | change
    with pytest.raises(ValueError, match="^cross_entropy: " + message):
        cross_entropy(**arguments)


@pytest.mark.plain
def test_plan_keeps_blocks_small():
    for N, V in itertools.product((0, 1, 100, 10**7), (1, 65, 50_304, 10**7)):
        rows = plan(N, V)
        assert rows >= 1
        assert rows == 1 or (rows <= N and rows * V <= BLOCK_ELEMENTS)


@pytest.mark.plain
def test_cost_is_the_bytes_that_the_tensors_have():
    assert cost(4096, 50_304, 2)["fwd_bytes"] == 2 * 4096 * 50_304
    assert cost(4096, 50_304, 2)["bwd_bytes"] == 2 * 2 * 4096 * 50_304


def test_kernels_refuse_float64(device):
    if device.type == "cpu" and not INTERPRET:
        pytest.skip("float64 on the CPU runs the reference")
    with pytest.raises(
        TypeError, match="cross_entropy: the kernel takes float32, bfloat16 or float16, got float64"
    ):
        cross_entropy(
            torch.ones(2, 8, dtype=torch.float64, device=device),
            torch.zeros(2, dtype=torch.long, device=device),
        )


@pytest.mark.plain
def test_tiles_fill_a_program_and_are_powers_of_two():
    sizes = (1, 3, 16, 65, 511, 512, 1023, 1024, 2047, 4096, 50_257, 10**6)
    for itemsize, V, architecture in itertools.product((2, 4), sizes, ("sm_80", "sm_90", "gfx942")):
        tile = plan_tile(V, itemsize, architecture)
        assert tile.vec * itemsize == 16
        assert all(size & (size - 1) == 0 for size in (tile.block_m, tile.unroll, tile.block_v))
        assert tile.block_m == 1 or tile.block_v >= V, (
            "rows share a program only where one tile holds each"
        )
        assert tile.unroll * tile.block_v <= max(V, 2 * V, 16)
        assert 2 * V >= 1024 or tile.block_m * tile.block_v >= 1024


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA, and 20 GB of it")
def test_more_elements_than_an_int32_counts():
    V, N = 50_304, 2**31 // 50_304 + 500
    logits = torch.randn(64, V, device="cuda", dtype=torch.bfloat16).repeat(N // 64 + 1, 1)[:N]
    target = torch.randint(V, (64,), device="cuda").repeat(N // 64 + 1)[:N]
    few = run(cross_entropy, logits[:64], target[:64], reduction="none")
    for many, some in zip(run(cross_entropy, logits, target, reduction="none"), few, strict=True):
        assert torch.equal(many[-64:].roll(N % 64, 0), some)


# --- 5. ahead-of-time compilation


def launches_of(N, V, dtype, arch, options, stride=None):
    """Every kernel's launch, for logits whose rows are `stride` elements apart."""
    logits = torch.empty_strided((N, V), (stride or V, 1), dtype=dtype, device="meta")
    target = torch.empty(N, dtype=torch.int64, device="meta")
    with record_launches(arch) as launches:
        loss, *saved = launch_fwd(logits, target, *options, "mean")
        launch_bwd(loss, logits, target, *saved, *options)
        launch_rows_fwd_bwd(logits, target, None, Options(*options), saved[0][0])
    return launches


# Without options there is less to keep in registers; what is shipped has rows in the bench's held table besides.
NO_OPTION, EVERY_OPTION = (-100, 0.0, 0.0, 0.0), (0, 0.1, 0.01, 30.0)
SHORT_AND_LONG = [(torch.bfloat16, 65), (torch.float32, 50_257)]


@pytest.mark.codegen
@pytest.mark.parametrize(
    ("options", "arch"),
    [(NO_OPTION, "sm_90"), *((EVERY_OPTION, arch) for arch in TARGETS if arch != "gfx950")],
)
def test_compiles_for_every_target_without_spills(options, arch):
    for dtype, V in SHORT_AND_LONG:
        for launch in launches_of(8192, V, dtype, arch, options):
            assert resources(compile_launch(launch, arch)).spilled_bytes == 0, (
                launch.kernel.__name__,
                dtype,
                V,
            )


@pytest.mark.codegen
@pytest.mark.parametrize(("V", "stride"), [(50_304, 50_304), (50_257, 50_257), (50_257, 50_304)])
def test_whole_tiles_are_loaded_and_stored_16_bytes_at_a_time(V, stride):
    launches = launches_of(8192, V, torch.bfloat16, "sm_90", NO_OPTION, stride)
    for launch, text in zip(
        launches, disassemblies([compile_launch(one, "sm_90") for one in launches]), strict=True
    ):
        assert access_bytes(hottest_loop(text)) == 16, launch.kernel.__name__


@pytest.mark.codegen
def test_compiles_where_every_size_is_one():
    """Triton makes constants of them, which are no tensors."""
    launches = launches_of(1, 1, torch.bfloat16, "sm_90", (1, 0.5, 1.0, 1.0))
    for launch, text in zip(
        launches, disassemblies([compile_launch(one, "sm_90") for one in launches]), strict=True
    ):
        assert "STG" in text, f"{launch.kernel.__name__} stores nothing"


@pytest.mark.codegen
@pytest.mark.parametrize(("dtype", "V"), SHORT_AND_LONG)
def test_rows_are_addressed_in_int64(dtype, V):
    """Every product of a row with a stride can be read off the compiled code."""
    for launch in launches_of(8192, V, dtype, "sm_90", EVERY_OPTION):
        code = compile_launch(launch, "sm_90").asm["ttir"]
        products = [line.split(" loc(")[0] for line in code.splitlines() if "arith.muli" in line]
        # What is multiplied by a constant size, of a tile or a load, may stay narrow: columns are fewer than 2^31.
        constants = set(re.findall(r"(%\S+) = arith.constant", code))
        narrow = [
            line for line in products
            if not line.endswith(("i64", "xi64>")) and not constants & set(re.findall(r"%[^\s,]+", line.split("=")[1]))
        ]  # fmt: skip
        assert products or launch.kernel.__name__ == "_cross_entropy_reduce_kernel"
        assert not narrow, launch.kernel.__name__


@pytest.mark.codegen
def test_the_kernel_that_writes_over_its_logits_waits_between_reading_and_writing():
    """The interpreter, which runs one thread, would not miss it."""
    launch = launches_of(8192, 50_304, torch.bfloat16, "sm_90", NO_OPTION)[-1]
    assert launch.kernel.__name__ == "_cross_entropy_fwd_bwd_kernel"
    code = compile_launch(launch, "sm_90").asm["ttir"]
    assert re.search(r"\bbarrier\b", code[: code.rindex("tt.store")])
    assert not re.search(
        r"\bbarrier\b",
        compile_launch(
            launches_of(8, 65, torch.bfloat16, "sm_90", (0, 0.0, 0.0, 0.0))[0], "sm_90"
        ).asm["ttir"],
    )
