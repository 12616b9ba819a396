"""embedding: the five groups of tests that each operator has."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from triton.runtime.jit import JITFunction

from tests.held import Held
from tests.kernels.compare import assert_close, assert_equal, opcheck
from tests.tolerance import assert_accurate
from tritium.bench.codegen.disassembly import resources
from tritium.bench.codegen.launches import TARGETS, compile_launch, record_launches
from tritium.kernels import linear_cross_entropy
from tritium.kernels.core.dropout import Dropout
from tritium.kernels.core.op import INTERPRET
from tritium.kernels.embedding import (
    BLOCK_COLUMNS,
    PIECE,
    cost,
    embedding,
    launch_add,
    launch_bwd,
    launch_fwd,
    order_of,
)

MODULE = sys.modules[launch_fwd.__module__]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["y", "dweight", "dposition_weight"]
# B, T, V, D: one element; odd sizes; one past a piece of sorted tokens and a block of columns.
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (3, 43, 11, 33), (1, PIECE + 1, 2, 16), (2, 5, 9, 257)]


@pytest.fixture
def piece_of_four(monkeypatch):
    """Pieces of four sorted tokens, and two rows of dy at a time: most runs have several parts."""
    monkeypatch.setattr(MODULE, "PIECE", 4)
    monkeypatch.setattr(MODULE, "BLOCK_ROWS", 2)
    monkeypatch.setattr(MODULE, "PIECES_PER_STEP", 4)


needs_kernels = pytest.mark.skipif(
    not (INTERPRET or torch.cuda.is_available()), reason="needs TRITON_INTERPRET=1 or a GPU"
)


def tensors(B, T, V, D, dtype, device):
    """Return tokens, a weight, a position weight of T + 2 rows, and an incoming gradient."""
    generator = torch.Generator().manual_seed(T * 1009 + V)
    tokens = torch.randint(V, (B, T), generator=generator)
    values = [
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in ((V, D), (T + 2, D), (B, T, D))
    ]
    return tokens.to(device), *values


def torch_embedding(tokens, weight, *, position=None, position_weight=None, order=None, dtype=None):
    """Compute the same with PyTorch. It sums gradients in the dtype of the weights."""
    y = F.embedding(tokens, weight)
    if position_weight is not None:
        if position is None:
            position = torch.arange(tokens.shape[-1], device=tokens.device)
        y = y + F.embedding(position, position_weight)
    return y.to(dtype or weight.dtype)


def run(function, tokens, weight, position_weight=None, dy=None, **options):
    """Return y, and the gradients of weight and, if given, position_weight."""
    leaves = [
        table.detach().requires_grad_() for table in (weight, position_weight) if table is not None
    ]
    table = leaves[1] if len(leaves) > 1 else None
    y = function(tokens, leaves[0], position_weight=table, **options)
    dy = torch.ones_like(y) if dy is None else dy.to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_all_accurate(tokens, weight, position_weight, dy, *, order=None, **options):
    """Compare with float64. The baseline sums in the dtype of the weights."""
    got = run(embedding, tokens, weight, position_weight, dy, order=order, **options)
    # y is rounded before the backward sees it, so dy has the rounded dtype in both.
    dy = dy.to(options.get("dtype") or weight.dtype)
    exact = {**options, "dtype": torch.float64}
    truth = run(
        torch_embedding, tokens, weight.double(), position_weight.double(), dy.double(), **exact
    )
    baseline = run(torch_embedding, tokens, weight, position_weight, dy, **options)
    longest = int(torch.bincount(tokens.flatten()).max()) + len(tokens)
    # The terms of a sum may cancel.
    scale = longest**0.5 * dy.abs().max().item()
    for name, *values in zip(NAMES, got, truth, baseline, strict=True):
        terms = 0.0 if name == "y" else scale
        assert_accurate(name, *values, length=longest, scale=terms, terms=torch.float32)


# --- 1. math


@pytest.mark.plain
@pytest.mark.parametrize("is_dispatched", [False, True])
def test_gradients_match_finite_differences(is_dispatched, monkeypatch):
    """Test the operator, and the PyTorch functions that replace it on a CPU."""
    monkeypatch.setattr(MODULE._fwd, "_composite_if", lambda *_: not is_dispatched)
    tokens, weight, table, _ = tensors(2, 3, 4, 5, torch.float64, "cpu")
    position = torch.tensor([[0, 1, 2], [0, 0, 1]])
    for options in ({}, {"position": position}):
        assert torch.autograd.gradcheck(
            lambda w, p, options=options: embedding(tokens, w, position_weight=p, **options),
            (weight.requires_grad_(), table.requires_grad_()),
        )


@pytest.mark.plain
@pytest.mark.parametrize("is_dispatched", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_matches_torch(dtype, is_dispatched, monkeypatch):
    monkeypatch.setattr(MODULE._fwd, "_composite_if", lambda *_: not is_dispatched)
    tensors_ = tensors(3, 50, 20, 8, torch.float32, "cpu")
    got, expected = (
        run(function, *tensors_, dtype=dtype) for function in (embedding, torch_embedding)
    )
    assert_close(got, expected, rtol=1e-6, atol=1e-6)


# --- 2. kernel against the float64 reference


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("B", "T", "V", "D"), SHAPES)
def test_values_and_gradients_are_accurate(B, T, V, D, dtype, device):
    assert_all_accurate(*tensors(B, T, V, D, dtype, device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_result_of_float32_weights_is_rounded_once(dtype, device):
    """The gradients of float32 weights are float32."""
    inputs = tensors(2, 37, 7, 16, torch.float32, device)
    assert_all_accurate(*inputs, dtype=dtype)
    for gradient in run(embedding, *inputs, dtype=dtype)[1:]:
        assert gradient.dtype == torch.float32


@pytest.mark.usefixtures("piece_of_four")
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 13, 40])
def test_runs_of_any_length_are_summed(length, device):
    """A run of equal tokens begins at each place of a piece, and ends at each."""
    for first in range(4):
        tokens = torch.tensor([[0] * first + [1] * length + [2, 3, 3]], device=device)
        _, weight, table, dy = tensors(1, tokens.shape[1], 5, 8, torch.float32, device)
        assert_all_accurate(tokens, weight, table, dy)


@pytest.mark.parametrize("D", [8, 5])  # 5: a program has more columns than the weight
def test_all_tokens_equal_are_summed(D, device):
    tokens, weight, table, dy = tensors(3, 200, 5, D, torch.float32, device)
    assert_all_accurate(torch.full_like(tokens, 4), weight, table, dy)


@needs_kernels
@pytest.mark.usefixtures("piece_of_four")
def test_a_partial_sum_does_not_write_past_its_columns(device, monkeypatch):
    """A program has 8 columns, the weight 5. A write into the next partial sum would be a race."""
    empty = torch.empty
    allocated = []

    def recorded(*sizes, **options):
        allocated.append(empty(*sizes, **options))
        return allocated[-1]

    monkeypatch.setattr(MODULE.torch, "empty", recorded)
    dy = torch.randn(12, 5, device=device)
    launch_bwd(
        dy, torch.zeros(12, dtype=torch.long, device=device), None, 2, torch.float32, Dropout()
    )
    (partial,) = [tensor for tensor in allocated if tensor.shape == (3, 2, 5)]
    # One run in three pieces: it begins in the first and continues in the others.
    assert not partial[[0, 1, 2], [1, 0, 0]].isnan().any()
    assert partial[[0, 1, 2], [0, 1, 1]].isnan().all()


def test_bfloat16_weights_are_summed_in_float32(device):
    """In bfloat16 a sum of ones would stop at 256."""
    weight = torch.zeros(2, 3, dtype=torch.bfloat16, device=device)
    tokens = torch.ones(1, 300, dtype=torch.long, device=device)
    _, dweight = run(embedding, tokens, weight)
    assert dweight.tolist() == [[0.0] * 3, [300.0] * 3]


# --- 3. layouts


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_any_layout_matches_the_contiguous_copy(dtype, device):
    tokens, weight, table, dy = tensors(4, 6, 9, 8, torch.float32, device)
    expected = run(embedding, tokens, weight, table, dy)
    tokens = tokens.to(dtype)
    token_views = [tokens, tokens.t().contiguous().t(), torch.stack([tokens, tokens], 2)[..., 0]]
    weight_views = [
        weight.t().contiguous().t(),
        torch.cat([weight, weight], 1)[:, 8:],
        torch.cat([weight, weight])[9:],
    ]
    gradients = [
        dy.transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack([dy, dy], 3)[..., 0],
    ]
    wide_table = torch.cat([table, table], 1)[:, :8]
    for views in itertools.product(token_views, weight_views, [table, wide_table], gradients):
        assert_equal(run(embedding, *views), expected)


def test_expanded_gradient_matches_the_contiguous_copy(device):
    tokens, weight, table, _ = tensors(2, 5, 4, 8, torch.float32, device)
    dy = torch.ones((), device=device).expand(2, 5, 8)
    assert_equal(
        run(embedding, tokens, weight, table, dy),
        run(embedding, tokens, weight, table, dy.contiguous()),
    )


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,)])
def test_no_tokens_give_an_empty_result_and_zero_gradients(shape, device):
    _, weight, table, _ = tensors(2, 3, 4, 8, torch.float32, device)
    tokens = torch.empty(shape, dtype=torch.long, device=device)
    y, *gradients = run(embedding, tokens, weight, table)
    assert y.shape == (*shape, 8)
    assert not any(gradient.any() for gradient in gradients)


def test_tokens_of_any_rank_keep_their_shape(device):
    tokens, weight, table, _ = tensors(4, 6, 9, 8, torch.float32, device)
    y = embedding(tokens, weight, position_weight=table)
    deep = embedding(tokens.view(2, 2, 6), weight, position_weight=table)
    assert torch.equal(deep.view_as(y), y)
    assert torch.equal(embedding(tokens[1], weight, position_weight=table), y[1])
    assert torch.equal(embedding(tokens[1, 0], weight), weight[tokens[1, 0]])


def test_positions_shared_by_all_rows_or_given_per_token_match_the_default(device):
    tokens, weight, table, dy = tensors(3, 7, 9, 8, torch.float32, device)
    expected = run(embedding, tokens, weight, table, dy)
    shared = torch.arange(7, device=device)
    for position in (shared, shared.int(), shared.expand(3, 7)):
        got = run(embedding, tokens, weight, table, dy, position=position)
        assert_close(got, expected, rtol=1e-6, atol=1e-6)
    later = embedding(tokens[:, 2:], weight, position=shared[2:], position_weight=table)
    assert torch.equal(later, expected[0][:, 2:])


def test_positions_of_documents_are_accurate(device):
    tokens, weight, table, dy = tensors(2, 9, 9, 8, torch.float32, device)
    position = torch.tensor([[*range(4), *range(5)], [*range(1), *range(8)]], device=device)
    assert_all_accurate(tokens, weight, table, dy, position=position)


# --- 4. contract


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_order_from_the_host_gives_bitwise_the_same_gradient(dtype, device):
    tokens, weight, table, dy = tensors(3, 100, 11, 8, torch.bfloat16, device)
    order = order_of(tokens.cpu()).to(device, dtype)
    assert_equal(
        run(embedding, tokens, weight, table, dy, order=order),
        run(embedding, tokens, weight, table, dy),
    )


def test_order_may_have_gaps_in_memory(device):
    tokens, weight, table, dy = tensors(3, 100, 11, 8, torch.bfloat16, device)
    order = order_of(tokens)
    with_gaps = torch.stack((order, torch.zeros_like(order)), 1)[:, 0]
    assert_equal(
        run(embedding, tokens, weight, table, dy, order=with_gaps),
        run(embedding, tokens, weight, table, dy, order=order),
    )


def test_opcheck(device):
    tokens, weight, table, dy = tensors(2, 6, 7, 8, torch.float32, device)
    rows, dy, ops = tokens.flatten(), dy.flatten(0, 1), torch.ops.tritium
    weight, table = weight.requires_grad_(), table.requires_grad_()
    order, seed = order_of(tokens), torch.tensor(5, device=device)
    for arguments in (
        (rows, weight, None, None, None, 6, torch.bfloat16, 0.0, None),
        (rows, weight, None, table, order, 6, torch.float32, 0.5, seed),
        (rows, weight, rows % 8, table, order.int(), 6, torch.float32, 0.5, seed),
    ):
        opcheck(ops.embedding_fwd.default, arguments)
    opcheck(ops.embedding_bwd.default, (dy, rows, None, 7, torch.float32, 0.0, None))
    opcheck(ops.embedding_bwd.default, (dy, rows, order, 7, torch.bfloat16, 0.5, seed))
    opcheck(ops.embedding_add.default, (weight.detach().clone(), dy, rows, order.int(), 0.5, seed))


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.plain)]
)
def test_compiles_as_one_graph_with_bitwise_equal_reruns(backend, device):
    torch._dynamo.reset()  # other tests may have compiled it for many kinds of arguments
    tokens, weight, table, dy = tensors(2, 40, 7, 8, torch.float32, device)
    order = order_of(tokens)
    compiled = torch.compile(embedding, fullgraph=True, backend=backend)
    for options in ({}, {"order": order}, {"position": tokens % 8}):
        runs = [run(compiled, tokens, weight, table, dy, **options) for _ in range(3)]
        for again in runs[1:]:
            assert_equal(again, runs[0])
        expected = run(embedding, tokens, weight, table, dy, **options)
        assert_close(runs[0], expected, rtol=1e-6, atol=1e-6)


def test_compiles_once_for_any_number_of_sequences(device):
    torch._dynamo.reset()
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager", dynamic=True)
    for B in (2, 3, 5):
        inputs = tensors(B, 6, 7, 8, torch.float32, device)
        with torch.compiler.set_stance("default" if B == 2 else "fail_on_recompile"):
            got = run(compiled, *inputs)
        assert_close(got, run(embedding, *inputs), rtol=1e-6, atol=1e-6)


def test_autocast_changes_nothing(device):
    inputs = tensors(2, 5, 7, 8, torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = run(embedding, *inputs)
    assert_equal(got, run(embedding, *inputs))


def test_reruns_are_bitwise_equal(device):
    inputs = tensors(3, 100, 11, 32, torch.bfloat16, device)
    assert_equal(*(run(embedding, *inputs) for _ in range(2)))


def test_only_tables_that_need_gradients_get_them(device):
    tokens, weight, table, dy = tensors(2, 5, 7, 8, torch.float32, device)
    _, *expected = run(embedding, tokens, weight, table, dy)
    for needed in (0, 1):
        tables = [weight.clone(), table.clone()]
        tables[needed].requires_grad_()
        embedding(tokens, tables[0], position_weight=tables[1]).backward(dy)
        assert torch.equal(tables[needed].grad, expected[needed])
        assert tables[1 - needed].grad is None


@pytest.mark.plain
@pytest.mark.parametrize("is_dispatched", [False, True])
@pytest.mark.parametrize("value", [7, -1])
def test_token_outside_the_weight_raises_on_the_cpu(value, is_dispatched, monkeypatch):
    monkeypatch.setattr(MODULE._fwd, "_composite_if", lambda *_: not is_dispatched)
    tokens, weight, *_ = tensors(2, 5, 7, 8, torch.float32, "cpu")
    tokens[1, 2] = value
    with pytest.raises(IndexError, match=f"^embedding: tokens must be from 0 to 6, got {value}"):
        embedding(tokens, weight)


@needs_kernels
@pytest.mark.parametrize("order", [True, False])
def test_invalid_token_or_position_gives_a_nan_row_and_no_gradient(order, device):
    tokens, weight, table, dy = tensors(2, 5, 7, 8, torch.float32, device)
    position = torch.arange(5, device=device).repeat(2, 1)
    tokens[0, 1], tokens[1, 0], position[1, 4] = -1, 7, 99
    y, dweight, dtable = run(
        embedding, tokens, weight, table, dy,
        position=position, order=order_of(tokens) if order else None,
    )  # fmt: skip
    bad = y.isnan().all(-1)
    assert torch.equal(bad, y.isnan().any(-1))
    assert bad.nonzero().tolist() == [[0, 1], [1, 0], [1, 4]]
    for gradient, index in ((dweight, tokens), (dtable, position)):
        inside = (index >= 0) & (index < len(gradient))
        expected = torch.zeros_like(gradient).index_add_(0, index[inside], dy[inside])
        torch.testing.assert_close(gradient, expected)


def tied_loss(tokens, weight, table, matrix, target, *, is_tied, order=None, **dropout):
    """A small model whose embedding and head share `weight`."""
    options = {"position_weight": table, "order": order, "dtype": matrix.dtype}
    y, head = embedding(tokens, weight, return_weight=True, **options, **dropout)
    head = head if is_tied else weight
    return linear_cross_entropy(torch.tanh(y @ matrix), head, target, vocab_size=len(weight) - 2)


@pytest.mark.parametrize(
    "backend",
    [
        None,
        "aot_eager",
        pytest.param("inductor", marks=[pytest.mark.plain, pytest.mark.slow]),
    ],
)
def test_gradients_of_embedding_and_head_are_added_in_place(backend, device, monkeypatch):
    """The sum is bitwise that of autograd, which adds two tensors."""
    monkeypatch.setattr(MODULE._fwd, "_composite_if", lambda *_: False)
    tokens, weight, table, _ = tensors(2, 20, 13, 8, torch.float32, device)
    tokens %= 11
    matrix = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    leaves = [leaf.requires_grad_() for leaf in (weight, table, matrix.to(device, torch.bfloat16))]
    target = tokens.flip(1)

    def gradients(function, **options):
        loss = function(tokens, *leaves, target, **options)
        return [loss.detach(), *torch.autograd.grad(2 * loss, leaves)]

    function = tied_loss
    if backend:
        function = torch.compile(tied_loss, fullgraph=True, backend=backend)
    got = gradients(function, is_tied=True, order=order_of(tokens))
    assert_equal(got, gradients(function, is_tied=True, order=order_of(tokens)))
    assert_equal(got, gradients(function, is_tied=False))
    assert got[1].dtype == torch.float32
    if backend is None:
        dropout = {"dropout_p": 0.3, "seed": 5}
        dropped = gradients(function, is_tied=True, **dropout)
        assert_equal(dropped, gradients(function, is_tied=False, **dropout))
        assert not torch.equal(dropped[1], got[1])


def test_shared_weight_gets_its_gradient_without_a_head(device):
    tokens, weight, table, dy = tensors(2, 5, 7, 8, torch.float32, device)
    alone = run(
        lambda *a, **k: embedding(*a, **k, return_weight=True)[0], tokens, weight, table, dy
    )
    assert_equal(alone, run(embedding, tokens, weight, table, dy))
    leaf = weight.clone().requires_grad_()
    _, head = embedding(tokens, leaf, return_weight=True)
    (2 * head).sum().backward()
    assert torch.equal(leaf.grad, torch.full_like(leaf, 2))


@pytest.mark.plain
def test_sharing_the_weight_saves_a_tensor_of_its_size(monkeypatch):
    """The gradient of the embedding needs no tensor of its own."""
    monkeypatch.setattr(JITFunction, "run", lambda *args, **kwargs: None)
    V, D, N = 1000, 64, 32
    weight = torch.empty(V, D, device="meta")
    dy = torch.empty(N, D, device="meta")
    tokens = torch.empty(N, dtype=torch.int64, device="meta")
    order = tokens.clone()
    with Held(weight, dy, tokens, order) as held:
        launch_add(weight, dy, tokens, order, Dropout())
    assert held.most < 4 * N * D
    with Held(weight, dy, tokens, order) as held:
        launch_bwd(dy, tokens, order, V, torch.float32, Dropout())
    assert held.most >= 4 * V * D


@pytest.mark.plain
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weight": torch.ones(4)},
            r"weight must be floating point \(V, D\) with V and D at least 1, got torch.float32 "
            r"\(4,\) on cpu",
        ),
        ({"weight": torch.ones(4, 0)}, r"weight must be .*, got torch.float32 \(4, 0\)"),
        ({"weight": torch.ones(4, 2).long()}, r"weight must be floating .*, got torch.int64"),
        (
            {"tokens": torch.ones(2, 3)},
            r"tokens must be int64 or int32 \(2, 3\) on cpu, got torch.float32 \(2, 3\)",
        ),
        (
            {"tokens": torch.ones(2, 3, dtype=torch.long, device="meta")},
            r"tokens must be int64 or int32 \(2, 3\) on cpu, got .* on meta",
        ),
        (
            {"position": torch.ones(2, dtype=torch.long), "position_weight": torch.ones(3, 5)},
            r"position must be int64 or int32 \(3,\) or \(2, 3\) on cpu, got torch.int64 \(2,\)",
        ),
        (
            {"order": torch.ones(2, 3, dtype=torch.long)},
            r"order must be int64 or int32 \(6,\) on cpu, got torch.int64 \(2, 3\)",
        ),
        (
            {"position_weight": torch.ones(2, 5)},
            r"position_weight must be torch.float32 \(3 or more, 5\) on cpu, got torch.float32 "
            r"\(2, 5\)",
        ),
        (
            {"position_weight": torch.ones(3, 4)},
            r"position_weight must be torch.float32 \(3 or more, 5\) on cpu, got .* \(3, 4\)",
        ),
        (
            {"position_weight": torch.ones(3, 5).half()},
            r"position_weight must be torch.float32 \(3 or more, 5\) on cpu, got torch.float16",
        ),
        ({"dtype": "float32"}, r"dtype must be dtype \| None, got 'float32'"),
        ({"dtype": torch.int64}, r"dtype must be one of float32, .* float64, got torch.int64"),
        ({"position": torch.ones(3, dtype=torch.long)}, "position needs position_weight, got none"),
    ],
)
def test_bad_arguments_raise(change, message):
    arguments = {
        "tokens": torch.zeros(2, 3, dtype=torch.long),
        "weight": torch.ones(4, 5),
    } | change
    with pytest.raises(ValueError, match="^embedding: " + message):
        embedding(**arguments)


def test_kernel_raises_for_float64(device):
    if device.type == "cpu" and not INTERPRET:
        pytest.skip("float64 on a CPU runs the reference")
    tokens, weight, *_ = tensors(2, 3, 4, 8, torch.float64, device)
    message = "^embedding: the kernel takes float32, bfloat16 or float16, got float64"
    with pytest.raises(TypeError, match=message):
        embedding(tokens, weight)


@pytest.mark.plain
def test_cost_counts_dy_and_each_row_of_the_weight_once():
    found = cost(65_536, 768, 50_304, 2)
    assert found["fwd_bytes"] == 65_536 * 768 * 6
    assert found["bwd_bytes"] == 65_536 * 768 * 2 + 50_304 * 768 * 4


# --- 5. ahead-of-time compilation


def launches_of(B, T, V, D, dtype, arch, dropout):
    """Return one launch of each kernel, with and without positions per token."""
    tokens = torch.empty(B * T, dtype=torch.int64, device="meta")
    order = torch.empty(B * T, dtype=torch.int32, device="meta")
    weight, table, dy = (torch.empty(rows, D, device="meta") for rows in (V, T, B * T))
    with record_launches(arch) as launches:
        launch_fwd(tokens, weight, None, table, order, T, dtype, dropout)
        launch_fwd(tokens, weight, tokens, table, order, T, dtype, dropout)
        launch_bwd(dy.to(dtype), tokens, order, V, torch.float32, dropout)
        launch_add(weight, dy.to(dtype), tokens, order, dropout)
    return launches


@pytest.mark.codegen
@pytest.mark.parametrize("arch", [name for name in TARGETS if name != "gfx950"])
@pytest.mark.parametrize("has_dropout", [False, True])
def test_compiles_for_every_target_without_spills(arch, has_dropout):
    seed = torch.empty((), dtype=torch.int64, device="meta")
    dropout = Dropout(dropout_p=0.1, seed=seed) if has_dropout else Dropout()
    # The last shape: Triton makes constants of integer arguments that are 1.
    cases = [
        (torch.float32, (8, 1024, 50_304, 768)),
        (torch.bfloat16, (8, 1024, 50_304, 768)),
        (torch.bfloat16, (1, PIECE + 1, 1, 1)),
    ]
    for dtype, shape in cases[: 1 if has_dropout else None]:
        for launch in launches_of(*shape, dtype, arch, dropout):
            found = resources(compile_launch(launch, arch))
            assert found.spilled_bytes == 0, launch.kernel.__name__


@pytest.mark.plain
def test_columns_of_a_program_cover_common_widths_without_waste():
    assert all(D % BLOCK_COLUMNS == 0 for D in (768, 1024, 1280))


# --- torch.func


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_torch_func_for_each_sequence_match_autograd(dtype, device):
    tokens, weight, table, dy = tensors(3, 5, 7, 8, dtype, device)

    def total(weight, table, tokens, dy):
        return (embedding(tokens, weight, position_weight=table) * dy).sum()

    gradient = torch.func.grad(total, (0, 1))
    found = torch.func.vmap(gradient, (None, None, 0, 0))(weight, table, tokens, dy)
    for i in range(3):
        leaves = [weight.clone().requires_grad_(), table.clone().requires_grad_()]
        expected = torch.autograd.grad(total(*leaves, tokens[i], dy[i]), leaves)
        assert_close([grad[i] for grad in found], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_torch_func_for_a_weight_shared_with_a_head_matches_autograd(dtype, device):
    tokens, weight, _, dy = tensors(2, 3, 5, 8, dtype, device)

    def total(weight):
        y, head = embedding(tokens, weight, return_weight=True)
        return (y * dy).sum() + (head * head).sum()

    leaf = weight.clone().requires_grad_()
    expected = torch.autograd.grad(total(leaf), leaf)
    # In bfloat16 the sum of both gradients is rounded once, or once more.
    tolerance = {"rtol": 2.0**-7, "atol": 2.0**-5} if dtype == torch.bfloat16 else {}
    assert_close([torch.func.grad(total)(weight)], expected, **tolerance)
