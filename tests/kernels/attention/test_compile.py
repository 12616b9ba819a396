"""What compilers make of attention: torch.compile one graph for any length, Triton kernels of sizes that are 1."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernels.attention.cases import FLOATS, packed, tensors
from tritium.bench.codegen.launches import compile_launch, record_launches
from tritium.kernels import (
    attention_decode,
    causal_attention,
    causal_attention_qkvpacked,
    causal_attention_varlen,
)
from tritium.kernels.attention._launch import launch_bwd, launch_fwd


def dense(q, k, v, _):
    return causal_attention(q, k, v, window=5, return_lse=True)


def without_options(q, k, v, _):
    return (causal_attention(q, k, v),)


def dropped(q, k, v, _):
    return (causal_attention(q, k, v, dropout_p=0.3, seed=7),)


def varlen(q, k, v, cu_seqlens):
    return causal_attention_varlen(
        q[0], k[0], v[0], cu_seqlens, len(q[0]), softcap=2.0, return_lse=True
    )


def qkvpacked(q, k, v, _):
    return (causal_attention_qkvpacked(packed(q, k, v), 2, n_kv_head=1),)


def packed_documents(q, k, v, cu_seqlens):
    return (causal_attention_qkvpacked(packed(q, k, v), 2, n_kv_head=1, cu_seqlens=cu_seqlens),)


def decode(q, k, v, cu_seqlens):
    with torch.no_grad():
        return (attention_decode(q[:, :1], k, v, cu_seqlens[-1:]),)


@pytest.mark.plain
@pytest.mark.parametrize(
    "function", [dense, without_options, dropped, varlen, qkvpacked, packed_documents, decode]
)
def test_ten_lengths_compile_at_most_twice(function):
    """Once for the first length, once for any; forward and backward."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for T in (17, 18, 30, 40, 63, 100, 128, 129, 150, 300):
        values = tensors(1, T, T, 2, 1, 8, torch.float32, "cpu")[:3]
        cu_seqlens = torch.tensor([0, T // 3, T], dtype=torch.int32)
        results = []
        for f in (compiled, function):
            leaves = [x.clone().requires_grad_() for x in values]
            outputs = f(*leaves, cu_seqlens)
            if function is not decode:
                sum(output.square().sum() for output in outputs).backward()
            results.append([*outputs, *(leaf.grad for leaf in leaves if function is not decode)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counter.frame_count <= 2


@pytest.mark.plain
@pytest.mark.parametrize("function", [dense, without_options, dropped, varlen])
def test_one_graph_for_any_number_of_heads(function):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for H, G in ((4, 2), (3, 3)):
        inputs = (
            *tensors(1, 9, 9, H, G, 8, torch.float32, "cpu")[:3],
            torch.tensor([0, 4, 9], dtype=torch.int32),
        )
        assert all(
            torch.equal(a, b) for a, b in zip(compiled(*inputs), function(*inputs), strict=True)
        )


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_compilers_are_told_is_what_is_returned(dtype, device):
    """Shapes, dtypes and strides of tensors without data, and of those with it."""
    B, T, S = 2, 5, 9
    ops, options = torch.ops.tritium, (0.5, S, 0.0, 0.0)
    q, k, v, do, dlse = tensors(B, T, S, 4, 2, 8, dtype, device)
    wide = packed(*(x[:, :T] for x in (q, k, v)))[:, :, None].expand(-1, -1, 2, -1)[
        :, :, 0
    ]  # strides of no fresh tensor
    o, lse = ops.causal_attention_fwd(q, k, v, None, None, *options)
    calls = [
        (ops.causal_attention_fwd, (q.mT.contiguous().mT, k, v, None, None, *options)),
        (
            ops.causal_attention_bwd,
            (do, dlse.float(), q, k.mT.contiguous().mT, v, o, lse, None, None, *options),
        ),
        (ops.causal_attention_qkvpacked_fwd, (wide, 4, 2, None, None, *options)),
        (
            ops.causal_attention_qkvpacked_bwd,
            (do.flatten(2), wide, o.flatten(2), lse, None, None, 4, 2, *options),
        ),
        (ops.attention_decode, (q, k, v, torch.full((B,), S, device=device), 0.5, S, 0.0)),
    ]
    for op, arguments in calls:
        told = op(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments))
        for a, b in zip(
            *((x,) if isinstance(x, torch.Tensor) else x for x in (op(*arguments), told)),
            strict=True,
        ):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), op


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.codegen
@pytest.mark.parametrize(
    ("T", "S", "documents", "window", "dropout_p"),
    [(1, 1, 0, 1, 0.1), (1, 300, 0, 1, 0.0), (1, 1, 1, 1, 0.0)],
)
def test_one_of_everything_compiles(T, S, documents, window, dropout_p):
    q, k, lse = meta(1, T, 1, 16), meta(1, S, 1, 16), meta(1, 1, T, dtype=torch.float32)
    cu_seqlens = meta(documents + 1, dtype=torch.int32) if documents else None
    seed = meta(dtype=torch.int64) if dropout_p else None
    options = (cu_seqlens, seed, 0.25, window, 0.0, dropout_p)
    with record_launches("sm_90") as launches:
        launch_fwd(q, k, k, *options)
        launch_bwd(q, lse, q, k, k, q, lse, *options)
    names = {launch.kernel.__name__ for launch in launches}
    assert len(names) == (4 if documents else 3)
    for launch in launches:
        assert "cubin" in compile_launch(launch, "sm_90").asm, launch.kernel.__name__
