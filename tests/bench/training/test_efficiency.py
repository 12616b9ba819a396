"""The assumptions of a prediction: which kernel gets which, and that they are fractions."""

from dataclasses import replace

import pytest
import torch

from tritium.bench.ops.attention import backward_in
from tritium.bench.training import efficiency
from tritium.bench.training.efficiency import (
    EFFICIENCIES,
    LIMITS,
    efficiency_of,
    floor_seconds,
)
from tritium.bench.training.step import Work, step_work, trace
from tritium.errors import InputError
from tritium.kernels import causal_attention
from tritium.model import PRESETS
from tritium.train.recipes import recipe

pytestmark = pytest.mark.plain

H200 = LIMITS["h200"]


def matmul(M: int, N: int, K: int) -> Work:
    sizes = (M, N, K)
    return Work(operators=("aten::mm",), kernel="mm", nbytes=1, flops=2 * M * N * K, sizes=sizes)


def test_the_floor_is_the_larger_of_bytes_and_flops():
    work = Work(operators=(), kernel="x", nbytes=43 * 10**9, flops=780 * 10**9)
    assert floor_seconds(work, H200) == pytest.approx(1e-2)
    assert floor_seconds(replace(work, nbytes=1), H200) == pytest.approx(1e-3)


def test_every_kernel_of_gpt2_has_an_efficiency_between_0_and_1():
    used = set()
    for work, _ in step_work(PRESETS["gpt2"], recipe("gpt2"), 8, 2):
        row, value = efficiency_of(work, H200)
        assert 0.1 < value <= 1, work.kernel
        used.add(row.name)
    assert {"cuBLAS matmul", "GEMM with epilogue", "attention", "loss of rows"} <= used
    assert used <= {row.name for row in EFFICIENCIES}


def test_kernels_get_the_row_that_names_them():
    for kernel, name in {
        "addmm": "cuBLAS matmul",
        "_layer_norm_bwd_kernel": "norm backward",
        "_foreach_norm": "optimizer",
        "_cross_entropy_reduce_kernel": "other kernels",
        "_partial_sums_kernel": "other kernels",
    }.items():
        work = Work(operators=(), kernel=kernel, nbytes=1, sizes=(8192, 8192, 8192))
        assert efficiency_of(work, H200)[0].name == name


@pytest.mark.parametrize(
    ("fast", "slow"),
    [
        (matmul(32768, 3072, 8192), matmul(32768, 3072, 768)),  # deep and shallow
        (matmul(5504, 768, 8192), matmul(4096, 768, 8192)),  # 129 and 96 tiles on 132 SMs
        (matmul(32768, 3072, 4096), matmul(768, 3072, 4096)),  # many tiles, and a divided K
        (matmul(32768, 3072, 4096), matmul(32768, 3072, 4097)),  # aligned and unaligned
    ],
)
def test_a_matmul_of_better_sizes_is_more_efficient(fast, slow):
    assert efficiency_of(fast, H200)[1] > 1.02 * efficiency_of(slow, H200)[1]


def test_a_kernel_that_the_golden_table_does_not_have_raises():
    with pytest.raises(InputError, match="expected a row for new_kernel, found none; run"):
        efficiency._golden_row("new_kernel", 64)


def attention(
    monkeypatch, tokens: int, *, blocks: int, serialized: bool = False, **sizes: int
) -> float:
    """The estimated efficiency of the forward with the given tile."""
    q = torch.empty(1, tokens, 2, 64, dtype=torch.bfloat16, device="meta")
    (work,) = trace(lambda: causal_attention(q, q, q))
    arguments = {**work.launch.arguments, **sizes}
    golden = {
        "hottest_loop": {"instructions": 846},
        "num_warps": 4,
        "blocks_per_sm": blocks,
        "serialized": serialized,
    }
    monkeypatch.setattr(efficiency, "_golden_row", lambda kernel, head_size: golden)
    launch = replace(work.launch, arguments=arguments)
    return efficiency_of(replace(work, launch=launch), H200)[1]


def test_attention_is_faster_with_overlap_and_long_sequences(monkeypatch):
    tile = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8}
    short = attention(monkeypatch, 1024, blocks=2, **tile)
    assert short < attention(monkeypatch, 16384, blocks=2, **tile)
    alone = attention(monkeypatch, 1024, blocks=1, **tile)
    assert alone < short
    serialized = attention(monkeypatch, 1024, blocks=2, serialized=True, **tile)
    assert serialized == pytest.approx(alone)


def test_one_pass_is_less_efficient_if_the_last_wave_is_not_full(monkeypatch):
    golden = {"hottest_loop": {"instructions": 440}, "num_warps": 8, "blocks_per_sm": 1}
    monkeypatch.setattr(efficiency, "_golden_row", lambda *_: {**golden, "serialized": False})

    def backward(heads: int) -> float:
        q = torch.empty(1, 1024, heads, 64, dtype=torch.bfloat16, device="meta").requires_grad_()
        with backward_in("one pass"):
            work = trace(lambda: causal_attention(q, q, q).sum().backward())
        (kernel,) = (piece for piece in work if piece.kernel.endswith("one_pass_kernel"))
        return efficiency_of(kernel, H200)[1]

    assert backward(264) == pytest.approx(backward(132), rel=0.01)
    assert backward(133) == pytest.approx(backward(264) * 133 / 264, rel=0.01)


def test_the_estimate_of_attention_is_near_public_rates(monkeypatch):
    """Triton's tutorial on an H100, head 64, causal: 291 and 363 TFLOP/s."""
    tile = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8}
    for tokens, rate in ((1024, 291e12), (16384, 363e12)):
        found = attention(monkeypatch, tokens, blocks=2, **tile) * H200.flops_per_second
        assert found == pytest.approx(rate, rel=0.12)
