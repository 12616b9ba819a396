"""The recorded work of a step: nothing is missing, nothing counts twice."""

import math
from collections import Counter

import pytest
import torch

from tritium.bench.ops.attention import backward_in
from tritium.bench.training.step import step_work, trace
from tritium.bench.training.traffic import moved
from tritium.kernels import causal_attention, gelu_mlp, layer_norm
from tritium.model import GPTConfig
from tritium.model.cost import matrices, parameters
from tritium.train.recipes import recipe

pytestmark = pytest.mark.plain

MODEL = GPTConfig(n_layer=2, n_head=2, d_model=128, vocab_size=1024, context_tokens=128)
CONFIG = recipe("gpt2")


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)


@pytest.fixture(scope="module")
def work():
    return step_work(MODEL, CONFIG, 4, 3)


def test_matmul_flops_are_six_per_weight_and_token(work):
    tokens = 3 * 4 * MODEL.context_tokens
    weights = matrices(MODEL) + MODEL.vocab_size * MODEL.d_model
    assert sum(count * piece.flops for piece, count in work if piece.sizes) == 6 * weights * tokens


def test_attention_flops_are_nine_matmuls_over_visible_pairs(work):
    pairs = 128 * 129 // 2
    expected = 9 * 2 * pairs * MODEL.d_model * MODEL.n_layer * 3 * 4
    assert expected == sum(
        count * piece.flops for piece, count in work if "attention" in piece.kernel
    )


def test_one_pass_needs_five_matmuls_in_place_of_seven():
    q, k, v = (meta(2, 1000, 3, 64) for _ in range(3))

    def attend():
        o = causal_attention(q, k, v)
        torch.autograd.grad(o, (q, k, v), o)

    flops = []
    for passes in ("two passes", "one pass"):
        with backward_in(passes):
            flops.append(sum(work.flops for work in trace(attend)))
    assert flops[0] * (2 + 5) == flops[1] * (2 + 7)


def test_each_micro_batch_has_the_same_kernels_and_the_optimizer_runs_once(work):
    launches: Counter = Counter()
    for piece, count in work:
        if piece.launch is not None:
            launches[piece.kernel] += count
    for name in ("fwd", "bwd_dq", "bwd_dkdv"):
        assert launches[f"_causal_attention_{name}_kernel"] == 3 * MODEL.n_layer
    assert launches["_layer_norm_fwd_kernel"] == 3 * (2 * MODEL.n_layer + 1)
    updates = [piece for piece, count in work if piece.kernel == "_fused_adamw_" and count == 1]
    assert len(updates) == 2  # with and without decay


def test_adamw_moves_28_bytes_per_parameter(work):
    nbytes = sum(piece.nbytes for piece, _ in work if piece.kernel == "_fused_adamw_")
    assert nbytes == pytest.approx(28 * parameters(MODEL), rel=1e-3)


def test_one_micro_batch_has_no_accumulation():
    names = {piece.kernel for piece, count in step_work(MODEL, CONFIG, 4, 1) if count}
    assert "_fused_adamw_" in names
    assert len(step_work(MODEL, CONFIG, 4, 1)) > 40


def test_activation_checkpointing_adds_the_forward_of_blocks(work):
    again = step_work(MODEL, CONFIG.with_options(recompute="block"), 4, 3)
    first, second = (
        sum(count * piece.flops for piece, count in found if piece.sizes) for found in (work, again)
    )
    tokens = 3 * 4 * MODEL.context_tokens
    assert second - first == 2 * matrices(MODEL) * tokens


def test_the_bytes_are_those_of_traffic():
    x, weight = meta(64, 128), meta(128)

    def call():
        y = layer_norm(x, weight)
        torch.autograd.grad(y + y, (x, weight), meta(64, 128))

    _, expected = moved(call)
    found: Counter = Counter()
    for piece in trace(call):
        found[piece.kernel] += piece.nbytes
    assert found == expected


def test_work_has_the_part_and_the_operators_of_a_profile():
    q = meta(1, 128, 2, 64)
    (fwd,) = trace(lambda: causal_attention(q, q, q))
    assert (fwd.part, fwd.operators) == ("attention", ("tritium::causal_attention_fwd",))
    # Too small to fuse: cuBLAS, called by the operator.
    weights = meta(256, 64), None, meta(64, 256), None
    matmuls = [piece for piece in trace(lambda: gelu_mlp(meta(32, 64), *weights)) if piece.sizes]
    assert [piece.sizes for piece in matmuls] == [(32, 256, 64), (32, 64, 256)]
    assert {piece.part for piece in matmuls} == {"MLP"}
    assert {piece.operators for piece in matmuls} == {("tritium::gelu_mlp_fwd", "aten::mm")}
    assert not any(piece.is_pointwise for piece in matmuls)


def test_batched_matmuls_and_gemm_kernels_have_flops():
    a, b = meta(3, 16, 32), meta(3, 32, 8)
    (piece,) = trace(lambda: torch.bmm(a, b))
    assert (piece.sizes, piece.flops) == ((16, 8, 32), 2 * math.prod((3, 16, 8, 32)))
    weights = meta(4096, 1024), None, meta(1024, 4096), None
    pieces = trace(lambda: gelu_mlp(meta(8192, 1024), *weights))
    (gemm,) = [piece for piece in pieces if piece.kernel == "_gemm_kernel"]
    assert gemm.sizes == (8192, 4096, 1024)
    assert gemm.flops == 2 * math.prod(gemm.sizes)
