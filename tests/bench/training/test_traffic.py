import contextlib
import json
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from tritium.bench import RESULTS
from tritium.bench.record import read_record
from tritium.bench.training import traffic
from tritium.bench.training.traffic import (
    PRESET_NAMES,
    SEQUENCES,
    Moved,
    eager_passes,
    figures,
    main,
    moved,
    tritium_passes,
)
from tritium.kernels import add_layer_norm
from tritium.kernels.core.triton import tl, triton
from tritium.model import PRESETS, GPTConfig

pytestmark = pytest.mark.plain

DIRECTIONS = ("forward", "backward")
SMALL = GPTConfig(n_head=2, d_model=32, context_tokens=16)


@pytest.fixture(scope="module")
def found():
    return figures()


@pytest.mark.parametrize("index", range(len(PRESET_NAMES)), ids=PRESET_NAMES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_block_moves_less_than_eager_and_at_least_the_least(found, index, direction):
    row = found["blocks"][index]
    ours, eager = (row[name][direction]["token_bytes"] for name in ("tritium", "eager"))
    assert row["least"][direction] <= ours < eager


def test_a_backward_in_one_pass_moves_three_widths_less(found):
    """It reads q, k and v once. do is read once for delta, and once more.

    Its tiles are larger, so it has fewer partial sums for the gradient of the bias. Two passes
    write and read 3 float32 per column for 64 tokens, one pass for 128 tokens.
    """
    for row in found["blocks"]:
        ours, one_pass = (
            sum(row[name][direction]["token_bytes"] for direction in DIRECTIONS)
            for name in ("tritium", "one_pass")
        )
        width_bytes = 2 * row["d_model"]
        assert (ours - one_pass) / width_bytes == pytest.approx(3 + 6 / 64, abs=0.01)
        assert one_pass < 86 * width_bytes


def test_window_softcap_and_dropout_need_no_extra_pass(found):
    """Dropout makes the gradients of a branch and of the stream differ: each norm writes both."""
    plain = found["blocks"][0]["tritium"]
    width_bytes = 2 * found["blocks"][0]["d_model"]
    for name, extra in (("window 256", 0), ("softcap 50", 0), ("dropout 0.1", 2)):
        row = found["options"][name]
        assert row["forward"]["token_bytes"] == plain["forward"]["token_bytes"]
        added = row["backward"]["token_bytes"] - plain["backward"]["token_bytes"]
        assert added == extra * width_bytes


@pytest.mark.parametrize(
    ("option", "widths"), [("rotary", (4, 4)), ("QK-norm", (4, 6)), ("rotary, QK-norm", (4, 6))]
)
def test_rope_and_qk_norm_share_one_pass_over_queries_and_keys(found, option, widths):
    """The forward reads and writes q and k. The backward reads and writes dq and dk in place.

    The backward of the norm also reads q and k. Tables and sums are small.
    """
    plain, row = found["blocks"][0]["tritium"], found["options"][option]
    width_bytes = found["blocks"][0]["d_model"] * found["itemsize"]
    for direction, width in zip(("forward", "backward"), widths, strict=True):
        added = row[direction]["token_bytes"] - plain[direction]["token_bytes"]
        assert abs(added - width * width_bytes) < 0.01 * width_bytes


def test_the_committed_record_has_the_present_figures(found):
    """After a change: `tritium bench traffic --out bench/results/traffic.json`, then report."""
    record = read_record(RESULTS / "traffic.json", "traffic")
    assert {key: record[key] for key in found} == json.loads(json.dumps(found))


@pytest.mark.parametrize("passes", [tritium_passes, eager_passes])
def test_bytes_grow_linearly_with_the_sequences(found, passes):
    row = found["blocks"][0][passes.__name__.removesuffix("_passes")]
    sequences = 3 * SEQUENCES[0]
    third = passes(PRESETS["gpt2"], sequences)
    for direction in DIRECTIONS:
        expected = row[direction]["token_bytes"] * sequences * 1024 + row[direction]["step_bytes"]
        assert third[direction].total() == expected


def test_fake_tensors_are_counted_like_real_ones(monkeypatch):
    fake = eager_passes(SMALL, 2)
    monkeypatch.setattr(traffic, "FakeTensorMode", contextlib.nullcontext)
    assert eager_passes(SMALL, 2) == fake


def test_the_command_prints_and_writes(found, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(traffic, "figures", lambda: found)
    assert main(["--out", str(tmp_path / "traffic.json")]) == 0
    assert "| gpt2-xl | " in capsys.readouterr().out
    assert read_record(tmp_path / "traffic.json", "traffic")["blocks"][0]["preset"] == "gpt2"


# Bytes of x (4, 8), row (8,), w (8, 2) and x @ w in float32.
X, ROW, W, XW = 128, 32, 64, 32
CALLS = [
    ("add", lambda x, row, w: x + x.clone(), 5 * X),
    ("the same twice", lambda x, row, w: x * x, 2 * X),
    ("broadcast", lambda x, row, w: x * row, 2 * X + ROW),
    ("expanded", lambda x, row, w: torch.sum(row.expand(4, 8)), ROW + 4),
    ("views", lambda x, row, w: x.t()[1:].unsqueeze(0).expand(3, 7, 4).detach(), 0),
    ("part", lambda x, row, w: x[:, :4].clone(), X),
    ("allocated", lambda x, row, w: (torch.empty_like(x), x.new_empty(3)), 0),
    ("filled", lambda x, row, w: torch.zeros(4, 8), X),
    ("added in place", lambda x, row, w: x.add_(row), 2 * X + ROW),
    ("overwritten", lambda x, row, w: x.copy_(row), X + ROW),
    ("zeroed", lambda x, row, w: x.zero_(), X),
    ("matmul", lambda x, row, w: x @ w, X + W + XW),
    ("matmul with out=", lambda x, row, w: torch.mm(x, w, out=w.new_empty(4, 2)), X + W + XW),
    ("layer", lambda x, row, w: F.linear(x, w.t(), w[0]), X + W + 8 + XW),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("call", "nbytes"), [row[1:] for row in CALLS], ids=[row[0] for row in CALLS]
)
def test_each_tensor_counts_once(call, nbytes, device):
    tensors = [torch.ones(size, device=device) for size in ((4, 8), (8,), (8, 2))]
    with Moved() as seen:
        call(*tensors)
    assert seen.nbytes.total() == nbytes


def test_composite_operators_are_counted_by_their_parts():
    """Below autograd, where launchers run, they are not decomposed yet."""
    x, w = torch.ones(8, 8), torch.ones(3, 8)
    with torch._C._AutoDispatchBelowAutograd(), Moved() as seen:
        F.linear(x.t().reshape(64, 1).view(8, 8), w)
    assert +seen.nbytes == {"clone": 2 * 256, "mm": 256 + 96 + 96}


@triton.jit
def _copy_kernel(x_ptr, y_ptr, w_desc, nothing_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs) + w_desc.load([0, 0]))


def test_each_tensor_argument_of_a_launch_counts_once():
    x, w = torch.zeros(64), torch.zeros(2, 16)

    def call():
        _copy_kernel[(1,)](
            x[:32], x[32:], TensorDescriptor.from_tensor(w, [2, 16]), None, n=32, BLOCK=32
        )
        _copy_kernel[(1,)](x, x, w, None, n=32, BLOCK=32)  # in place
        return "done"

    assert moved(call) == ("done", Counter(_copy_kernel=3 * 128 + 2 * 256 + 128))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tritium_operators_are_counted_by_their_kernels(device):
    M, N = 6, 32
    sizes = ((M, N), (N,), (N,))
    x, weight, bias = (
        torch.ones(size, device=device, dtype=torch.bfloat16, requires_grad=True) for size in sizes
    )
    (y, h), forward = moved(lambda: add_layer_norm(x, x, weight, bias))
    assert forward == {"_layer_norm_fwd_kernel": 2 * (4 * M * N + 2 * N) + 4 * 2 * M}
    grads, backward = moved(lambda: torch.autograd.grad((y, h), (x, weight, bias), (x, x)))
    assert [grad.shape for grad in grads] == [x.shape, weight.shape, bias.shape]
    # x is both summands, so its gradient is a sum of two.
    assert set(backward) == {"_layer_norm_bwd_kernel", "_partial_sums_kernel", "add"}
    assert backward["add"] == 2 * 2 * M * N
