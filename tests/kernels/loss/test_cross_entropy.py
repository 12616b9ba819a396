"""cross_entropy: math, accuracy, layouts, contract, machine code."""

import itertools
import re
import sys

import pytest
import torch
import torch.nn.functional as F
import triton
from torch._dynamo.testing import CompileCounterWithBackend

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
from tests.tolerance import assert_accurate
from tritium.bench.codegen.disassembly import disassemblies, resources
from tritium.bench.codegen.launches import TARGETS, compile_launch, record_launches
from tritium.bench.codegen.machine_code import access_bytes, hottest_loop, occupancy
from tritium.kernels.core.op import INTERPRET
from tritium.kernels.loss.chunks import block_rows
from tritium.kernels.loss.cross_entropy import (
    BLOCK_ELEMENTS,
    cost,
    cross_entropy,
    launch_bwd,
    launch_fwd,
)
from tritium.kernels.loss.launch import LANES, launch_rows_fwd_bwd
from tritium.kernels.loss.options import LossOptions

MODULE = sys.modules[launch_fwd.__module__]
LAUNCH = sys.modules[launch_rows_fwd_bwd.__module__]
# One element; odd sizes; one past a power of two; rows of one tile and of several tiles.
SHAPES = [(1, 1), (5, 1), (1, 3), (33, 65), (7, 257), (4, 1024), (9, 1031), (3, 9001)]


def tensors(N, V, dtype, device):
    """Return logits, targets, and an incoming gradient for each row. Every fifth row is ignored."""
    generator = torch.Generator().manual_seed(N * 100_003 + V)
    logits = (2 * torch.randn(N, V, generator=generator)).to(device, dtype)
    target = torch.randint(V, (N,), generator=generator)
    target[2::5] = -100
    return logits, target.to(device), torch.randn(N, generator=generator).to(device)


def run(function, logits, *args, incoming=None, **options):
    """Return the loss and the gradient of the logits."""
    leaf = logits.detach().requires_grad_()
    loss = function(leaf, *args, **options)
    incoming = torch.ones_like(loss) if incoming is None else incoming.to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, leaf, incoming)]


def assert_loss_and_gradient_accurate(logits, target, *, reference, label="", **options):
    """Compare cross_entropy with `reference` in float64 and in the dtype of the logits."""
    got = run(cross_entropy, logits, target, **options)
    truth = run(reference, logits.double(), target, **options)
    baseline = run(reference, logits, target, **options)
    for name, *values in zip(["loss", "dlogits"], got, truth, baseline, strict=True):
        assert_accurate(f"{name} {label}", *values, length=max(logits.shape))


# --- 1. math


@pytest.mark.plain
@pytest.mark.parametrize(("options", "reduction"), list(itertools.product(OPTIONS, REDUCTIONS)))
def test_gradient_matches_finite_differences(options, reduction):
    logits, target, _ = tensors(6, 5, torch.float64, "cpu")
    target[0] = options.get("ignore_index", -100)
    target[target == -100] = options.get("ignore_index", -100)
    assert torch.autograd.gradcheck(
        lambda x: cross_entropy(x, target, reduction=reduction, **options), logits.requires_grad_()
    )


@pytest.mark.plain
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.3}, {"label_smoothing": 1.0}, {"ignore_index": 4}]
)
def test_matches_torch_cross_entropy(options, reduction):
    logits, target, _ = tensors(11, 33, torch.float64, "cpu")
    target = target.where(target != -100, options.get("ignore_index", -100))
    got, expected = (
        run(function, logits, target, reduction=reduction, **options)
        for function in (cross_entropy, F.cross_entropy)
    )
    assert_close(got, expected, rtol=1e-12, atol=1e-12)


# --- 2. kernel against the float64 reference


@pytest.mark.parametrize(
    ("N", "V", "dtype", "options"),
    [
        *(
            (*shape, dtype, options)
            for shape in SHAPES
            for dtype in FLOATS
            for options in ({}, ALL_OPTIONS)
        ),
        # Each option alone, in the most exact dtype, for rows that share a program and for a row of
        # several tiles.
        *(
            (*shape, torch.float32, options)
            for shape in ((33, 65), (9, 1031))
            for options in OPTIONS[1:4]
        ),
    ],
)
def test_loss_and_gradient_are_accurate(N, V, dtype, options, device):
    logits, target, incoming = tensors(N, V, dtype, device)
    for reduction in ("mean", "none") if options else REDUCTIONS:
        assert_loss_and_gradient_accurate(
            logits,
            target,
            reference=torch_cross_entropy,
            label=reduction,
            **given_reduction(options, reduction, incoming),
        )


def test_loss_and_gradient_are_accurate_if_targets_have_probability_near_one(device):
    logits, target, _ = tensors(64, 65, torch.float32, device)
    target.clamp_(min=0)
    logits.scatter_(1, target[:, None], 25.0)
    assert_loss_and_gradient_accurate(logits, target, reference=F.cross_entropy)


@pytest.mark.parametrize("V", [33, 4500])
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_loss_and_gradient_are_accurate_far_from_zero(shift, V, device):
    """In float32 a log-sum-exp of 10,000 has three decimals: the gradient must not depend on it."""
    logits, target, _ = tensors(9, V, torch.float32, device)
    assert_loss_and_gradient_accurate(logits + shift, target, reference=F.cross_entropy)


@pytest.mark.parametrize("lead", [20.0, 60.0])
def test_gradient_keeps_its_digits_if_the_target_has_probability_one(lead, device):
    """The subtraction p - 1 would give 0, as in PyTorch. So PyTorch cannot be the baseline here."""
    logits = torch.tensor([[lead, 0.0, 0.0]], device=device)
    target = torch.zeros(1, dtype=torch.long, device=device)
    loss, dlogits = run(cross_entropy, logits, target)
    true_loss, truth = run(F.cross_entropy, logits.double(), target)
    truth[0, 0] = -truth[0, 1:].sum()  # float64 loses these digits too
    torch.testing.assert_close(dlogits.double(), truth, rtol=1e-5, atol=0)
    if INTERPRET or device.type == "cuda":
        torch.testing.assert_close(
            loss.double(), torch.log1p(truth[0, 1:].sum()), rtol=1e-5, atol=0
        )
    assert abs(loss.item() - true_loss.item()) < 1e-7


def test_lowest_float32_logits_match_torch(device):
    """Some models mask columns with this number instead of -inf."""
    least = torch.finfo(torch.float32).min
    for logits in (
        torch.full((1, 4), least, device=device),
        torch.tensor([[least, 0.0, least, 1.0]], device=device),
    ):
        target = torch.ones(1, dtype=torch.long, device=device)
        assert_close(run(cross_entropy, logits, target), run(F.cross_entropy, logits, target))


@pytest.mark.parametrize("V", [33, 4500])
def test_columns_masked_with_minus_infinity_match_torch(V, device):
    """No NaN and no gradient in these columns. A target among them has an infinite loss."""
    logits, target, _ = tensors(9, V, torch.float32, device)
    logits[:, V // 2 :] = -float("inf")
    target[:8] %= V // 2
    target[8] = V - 1
    for reduction in ("none", "mean"):
        got = run(cross_entropy, logits, target, reduction=reduction)
        expected = run(F.cross_entropy, logits, target, reduction=reduction)
        assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("shape", [(1, 1), (33, 65), (9, 1031)])
def test_lse_and_number_of_right_predictions_match_torch(shape, softcap, dtype, device):
    logits, target, _ = tensors(*shape, dtype, device)
    # Every second row has its target at the maximum. 16-bit logits have ties, which count as right.
    target[::2] = logits[::2].argmax(-1).where(target[::2] >= 0, -100)
    got = cross_entropy(logits, target, softcap=softcap, return_lse=True, return_correct=True)
    loss, lse, correct = got
    truth, expected = torch_rows(logits.double(), target, softcap)
    baseline, _ = torch_rows(logits, target, softcap)
    assert_accurate("lse", lse, truth, baseline, length=shape[1])
    assert correct.dtype == torch.int64
    assert correct == expected
    assert torch.equal(loss, cross_entropy(logits, target, softcap=softcap))


def test_lse_and_number_of_right_predictions_keep_loss_and_gradient(device):
    logits, target, incoming = tensors(24, 7, torch.float32, device)
    for reduction in REDUCTIONS:
        given = given_reduction(ALL_OPTIONS, reduction, incoming)

        def with_both(logits, target, **options):
            found = cross_entropy(logits, target, return_lse=True, return_correct=True, **options)
            assert not found[1].requires_grad
            return found[0]

        assert_equal(
            run(with_both, logits, target, **given), run(cross_entropy, logits, target, **given)
        )
    deep = logits.view(2, 3, 4, 7), target.view(2, 3, 4)
    loss, lse = cross_entropy(*deep, return_lse=True)
    assert lse.shape == (2, 3, 4)
    assert not lse[deep[1] == -100].any()
    loss, correct = cross_entropy(*deep, reduction="none", return_correct=True)
    assert (loss.shape, correct.shape) == ((2, 3, 4), ())


def test_blocks_of_rows_match_one_block(device, monkeypatch):
    """23 rows in blocks of 5."""
    logits, target, incoming = tensors(23, 17, torch.float32, device)
    target = target.clamp(min=0)
    options = {**OPTIONS[-1], "reduction": "none", "incoming": incoming}
    expected = run(cross_entropy, logits, target, **options)
    monkeypatch.setattr(MODULE, "BLOCK_ELEMENTS", 5 * 17)
    got = run(cross_entropy, logits, target, **options)
    assert_close(got, expected, rtol=1e-6, atol=1e-6)


# --- 3. layouts


LAYOUTS = {
    "transposed": lambda base, N, V: base[:N, :N].t()[:, :V],
    "row stride": lambda base, N, V: base[::3, :V],
    "column slice": lambda base, N, V: base[:N, 3 : 3 + V],
    "column stride": lambda base, N, V: base[:N, ::3],
    "expanded": lambda base, N, V: base[:1, :V].expand(N, V),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_matches_the_contiguous_copy(layout, device):
    N, V = 12, 9
    base = torch.randn(3 * N, 3 * V, generator=torch.Generator().manual_seed(1)).to(device)
    logits = LAYOUTS[layout](base, N, V)
    _, target, incoming = tensors(N, V, torch.float32, device)
    strided_target, strided_incoming = (
        torch.stack([value, value], dim=1)[:, 0] for value in (target, incoming)
    )

    def gradient(view, targets, dloss):
        leaf = view.detach().requires_grad_()  # keeps the layout
        loss = cross_entropy(leaf, targets, reduction="none")
        return loss, *torch.autograd.grad(loss, leaf, dloss)

    assert_equal(
        gradient(logits, strided_target, strided_incoming),
        gradient(logits.contiguous(), target, incoming),
    )


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
def test_rows_at_any_alignment_are_accurate(columns, begin, V, dtype, device):
    """Rows start at any distance from a multiple of 16 bytes; each column is read once."""
    base, target, incoming = tensors(9, columns, dtype, device)
    target = (target.clamp(min=0) % V).where(target >= 0, target)
    target[0] = 0
    target[1] = V - 1
    assert_loss_and_gradient_accurate(
        base[:, begin : begin + V],
        target,
        reference=torch_cross_entropy,
        label_smoothing=0.1,
        reduction="none",
        incoming=incoming,
    )


def test_leading_axes_are_flattened(device):
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
def test_any_ignore_index_matches_torch(ignore_index, dtype, device):
    logits, target, _ = tensors(9, 5, torch.float32, device)
    target = target.where(target >= 0, ignore_index).to(dtype)
    got = run(cross_entropy, logits, target, ignore_index=ignore_index)
    assert_close(got, run(F.cross_entropy, logits, target.long(), ignore_index=ignore_index))


def test_loss_of_no_rows_or_only_ignored_rows_is_zero(device):
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
        leaf = logits.clone().requires_grad_()
        opcheck(ops.cross_entropy_fwd.default, (leaf, target, *options, reduction, True))
        dloss = incoming if reduction == "none" else incoming[0].clone()
        saved = torch.rand(2, 6, device=device), torch.tensor(5, device=device)
        opcheck(ops.cross_entropy_bwd.default, (dloss, logits, target, *saved, *options, reduction))


@pytest.mark.parametrize("dtype", FLOATS)
def test_operators_return_float32_losses_and_gradients_in_the_dtype_of_the_logits(dtype, device):
    logits, target, _ = tensors(6, 24, dtype, device)
    options = (-100, 0.0, 0.0, 0.0, "mean")
    loss, statistics, divisor, _ = torch.ops.tritium.cross_entropy_fwd(
        logits, target, *options, False
    )
    dlogits = torch.ops.tritium.cross_entropy_bwd(
        torch.ones_like(loss), logits, target, statistics, divisor, *options
    )
    assert loss.dtype == statistics.dtype == torch.float32
    assert divisor.dtype == torch.int64
    assert dlogits.dtype == dtype


def test_compiles_as_one_graph(device):
    logits, target, incoming = tensors(9, 40, torch.float32, device)
    compiled = torch.compile(
        lambda *args, **kw: cross_entropy(*args, **kw), fullgraph=True, backend="aot_eager"
    )
    for options in ({"reduction": "none", "incoming": incoming}, OPTIONS[3]):
        assert_equal(
            run(compiled, logits, target, **options), run(cross_entropy, logits, target, **options)
        )


@pytest.mark.plain
def test_ten_numbers_of_rows_compile_at_most_twice():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(cross_entropy, fullgraph=True, backend=counter)
    for N in range(5, 15):
        logits, target, _ = tensors(N, 40, torch.float32, "cpu")
        assert_equal(run(compiled, logits, target), run(cross_entropy, logits, target))
    assert counter.frame_count <= 2


def test_all_results_compile_as_one_graph(device):
    logits, target, _ = tensors(9, 40, torch.float32, device)

    def function(logits):
        return cross_entropy(logits, target, return_lse=True, return_correct=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(logits), function(logits))


def test_autocast_changes_nothing(device):
    logits, target, _ = tensors(4, 32, torch.bfloat16, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss, dlogits = run(cross_entropy, logits, target)
    assert (loss.dtype, dlogits.dtype) == (torch.float32, torch.bfloat16)
    assert_equal((loss, dlogits), run(cross_entropy, logits, target))


def test_reruns_are_bitwise_equal_and_do_not_modify_the_logits(device):
    logits, target, _ = tensors(300, 48, torch.float32, device)
    logits.requires_grad_()
    before = logits.detach().clone()
    losses = [cross_entropy(logits, target, **OPTIONS[3]) for _ in range(2)]
    grads = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    assert torch.equal(*losses)
    assert torch.equal(*grads)
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_scales_with_the_incoming_gradient(dtype, device):
    logits, target, _ = tensors(5, 12, dtype, device)
    _, once = run(cross_entropy, logits, target)
    _, twice = run(lambda *args: 2 * cross_entropy(*args), logits, target)
    assert torch.equal(twice, 2 * once)


def test_int32_targets_match_int64_targets(device):
    logits, target, _ = tensors(5, 12, torch.float32, device)
    assert_equal(run(cross_entropy, logits, target.int()), run(cross_entropy, logits, target))


def test_second_derivative_raises(device):
    logits, target, _ = tensors(5, 12, torch.float32, device)
    (dlogits,) = torch.autograd.grad(
        cross_entropy(logits.requires_grad_(), target), logits, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dlogits.sum().backward()


@pytest.mark.plain
@pytest.mark.parametrize("value", [5, -1, 2**31 - 1])
def test_target_outside_the_vocabulary_raises_on_the_cpu(value):
    with pytest.raises(
        IndexError,
        match=rf"^cross_entropy: target must be from 0 to 4 or ignore_index \(-100\), got {value};",
    ):
        cross_entropy(torch.randn(2, 5), torch.tensor([1, value]))


@pytest.mark.plain
def test_number_of_targets_outside_the_vocabulary_is_in_the_message():
    with pytest.raises(IndexError, match="got 5 and 1 more; check the vocabulary size"):
        cross_entropy(torch.randn(4, 5), torch.tensor([0, 5, -1, -100]))


@pytest.mark.plain
def test_targets_on_devices_are_not_read():
    logits = torch.empty(3, 5, device="meta")
    assert cross_entropy(logits, torch.full((3,), 9, device="meta")).shape == ()


@pytest.mark.parametrize("V", [5, 4500])
def test_target_outside_the_vocabulary_gives_nan_in_its_row_on_a_device(V, device, monkeypatch):
    """A GPU does not check the values; other rows are not affected."""
    monkeypatch.setattr(MODULE, "check_target_values", lambda *args: None)
    logits = torch.randn(4, V, device=device)
    target = torch.tensor([1, -1, V, -100], device=device)
    logits[3] = float("nan")  # an ignored row may hold anything
    loss, dlogits = run(cross_entropy, logits, target, reduction="none")
    assert loss.isnan().tolist() == [False, True, True, False]
    assert dlogits.isnan().all(1).tolist() == [False, True, True, False]
    assert dlogits.isnan().any(1).tolist() == [False, True, True, False]
    assert not dlogits[3].any()
    _, lse, correct = cross_entropy(logits, target, return_lse=True, return_correct=True)
    assert lse.isnan().tolist() == [False, True, True, False]
    assert correct <= 1
    assert run(cross_entropy, logits, target)[0].isnan()
    assert run(cross_entropy, logits, torch.full_like(target, 2**40))[0].isnan()


@pytest.mark.plain
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"logits": torch.ones(())},
            r"logits must be floating point \(\.\.\., V\) with V at least 1, got torch.\w+ \(\)",
        ),
        ({"logits": torch.ones(2, 0)}, r"logits must be .*, got torch.float32 \(2, 0\)"),
        (
            {"logits": torch.ones(2, 5, dtype=torch.long)},
            r"logits must be floating point .*, got torch.int64 \(2, 5\)",
        ),
        (
            {"logits": torch.ones(2, 5).to(torch.float8_e4m3fn)},
            r"logits must be one of .*, got torch.float8_e4m3fn",
        ),
        *BAD_ARGUMENTS,
    ],
)
def test_bad_arguments_raise(change, message):
    arguments = {"logits": torch.ones(2, 5), "target": torch.zeros(2, dtype=torch.long)} | change
    with pytest.raises(ValueError, match="^cross_entropy: " + message):
        cross_entropy(**arguments)


@pytest.mark.plain
def test_blocks_of_rows_fit_in_the_cache():
    for N, V in itertools.product((0, 1, 100, 10**7), (1, 65, 50_304, 10**7)):
        rows = block_rows(N, V, BLOCK_ELEMENTS, 1)
        assert rows >= 1
        assert rows == 1 or (rows <= N and rows * V <= BLOCK_ELEMENTS)


@pytest.mark.plain
def test_cost_is_the_size_of_the_tensors():
    assert cost(4096, 50_304, 2)["fwd_bytes"] == 2 * 4096 * 50_304
    assert cost(4096, 50_304, 2)["bwd_bytes"] == 2 * 2 * 4096 * 50_304


def test_float64_raises_for_kernels(device):
    if device.type == "cpu" and not INTERPRET:
        pytest.skip("the reference takes float64")
    with pytest.raises(
        TypeError, match="cross_entropy: the kernel takes float32, bfloat16 or float16, got float64"
    ):
        cross_entropy(
            torch.ones(2, 8, dtype=torch.float64, device=device),
            torch.zeros(2, dtype=torch.long, device=device),
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA and 20 GB")
def test_more_than_2_31_elements_match_a_slice():
    V, N = 50_304, 2**31 // 50_304 + 500
    logits = torch.randn(64, V, device="cuda", dtype=torch.bfloat16).repeat(N // 64 + 1, 1)[:N]
    target = torch.randint(V, (64,), device="cuda").repeat(N // 64 + 1)[:N]
    few = run(cross_entropy, logits[:64], target[:64], reduction="none")
    for many, some in zip(run(cross_entropy, logits, target, reduction="none"), few, strict=True):
        assert torch.equal(many[-64:].roll(N % 64, 0), some)


# --- 5. ahead-of-time compilation


NO_OPTION = LossOptions()
EVERY_OPTION = LossOptions(ignore_index=0, label_smoothing=0.1, z_loss=0.01, softcap=30.0)
SHORT_AND_LONG = [(torch.bfloat16, 65), (torch.float32, 50_257)]


def launches_of(N, V, dtype, arch, options, stride=None):
    """One launch of each kernel, for logits whose rows are `stride` elements apart."""
    logits = torch.empty_strided((N, V), (stride or V, 1), dtype=dtype, device="meta")
    target = torch.empty(N, dtype=torch.int64, device="meta")
    with record_launches(arch) as launches:
        loss, *saved, _ = launch_fwd(logits, target, options, False)
        launch_bwd(loss, logits, target, *saved, options)
        launch_rows_fwd_bwd(logits, target, None, options, saved[0][0])
    return launches


def disassembled(launches):
    """Pairs of a kernel's name and its machine code for sm_90."""
    texts = disassemblies([compile_launch(launch, "sm_90") for launch in launches])
    names = [launch.kernel.__name__ for launch in launches]
    return zip(names, texts, strict=True)


@pytest.mark.codegen
@pytest.mark.parametrize(
    ("options", "arch"),
    [(NO_OPTION, "sm_90"), *((EVERY_OPTION, arch) for arch in TARGETS if arch != "gfx950")],
)
def test_compiles_for_every_target_without_spills(options, arch):
    for dtype, V in SHORT_AND_LONG:
        for launch in launches_of(8192, V, dtype, arch, options):
            found = resources(compile_launch(launch, arch))
            assert found.spilled_bytes == 0, (launch.kernel.__name__, dtype, V)


@pytest.mark.codegen
@pytest.mark.parametrize(("V", "stride"), [(50_304, 50_304), (50_257, 50_257), (50_257, 50_304)])
def test_main_loop_loads_and_stores_16_bytes_at_a_time(V, stride):
    launches = launches_of(8192, V, torch.bfloat16, "sm_90", NO_OPTION, stride)
    for name, text in disassembled(launches):
        assert access_bytes(hottest_loop(text)) == 16, name


@pytest.mark.codegen
@pytest.mark.skipif(
    triton.__version__ not in ("3.6.0", "3.7.1"), reason="the table is from Triton 3.6.0 and 3.7.1"
)
@pytest.mark.parametrize("row", LANES["sm_"])
def test_in_place_kernel_runs_as_many_programs_as_its_table_says(row, monkeypatch):
    """With Triton 3.8.0 seven programs of 128 lanes fit, not five."""
    monkeypatch.setattr(LAUNCH, "LANES", {"sm_": (row,)})
    launch = launches_of(8192, 50_304, torch.bfloat16, "sm_90", NO_OPTION)[-1]
    assert launch.kernel.__name__ == "_cross_entropy_fwd_bwd_kernel"
    used = resources(compile_launch(launch, "sm_90"))
    assert occupancy(used, row.lanes // 32, "sm_90") == (row.programs, "registers")


@pytest.mark.codegen
def test_compiles_if_every_size_is_one():
    """Triton makes constants of arguments that are 1."""
    options = LossOptions(ignore_index=1, label_smoothing=0.5, z_loss=1.0, softcap=1.0)
    for name, text in disassembled(launches_of(1, 1, torch.bfloat16, "sm_90", options)):
        assert "STG" in text, f"{name} stores nothing"


@pytest.mark.codegen
@pytest.mark.parametrize(("dtype", "V"), SHORT_AND_LONG)
def test_row_addresses_are_int64(dtype, V):
    """Multiplications in 32 bits have a constant operand: the size of a tile or of a load."""
    for launch in launches_of(8192, V, dtype, "sm_90", EVERY_OPTION):
        code = compile_launch(launch, "sm_90").asm["ttir"]
        constants = set(re.findall(r"(%\S+) = arith.constant", code))
        lines = [line.split(" loc(")[0] for line in code.splitlines() if "arith.muli" in line]
        assert lines or launch.kernel.__name__ == "_cross_entropy_reduce_kernel"
        narrow = [line for line in lines if not line.endswith(("i64", "xi64>"))]
        for line in narrow:
            operands = set(re.findall(r"%[^\s,]+", line.split("=")[1]))
            assert constants & operands, f"{launch.kernel.__name__}: {line}"


@pytest.mark.codegen
def test_in_place_kernel_has_a_barrier_before_it_overwrites_the_logits():
    """The interpreter runs one thread and would not notice a missing barrier."""
    launch = launches_of(8192, 50_304, torch.bfloat16, "sm_90", NO_OPTION)[-1]
    assert launch.kernel.__name__ == "_cross_entropy_fwd_bwd_kernel"
    code = compile_launch(launch, "sm_90").asm["ttir"]
    assert re.search(r"\bbarrier\b", code[: code.rindex("tt.store")])
