"""Attention under torch.compile: one graph for any length, and fake outputs like the real ones."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernels.attention.cases import DTYPES, assert_bitwise_equal, make_inputs, packed
from tritium.kernels import (
    attention_decode,
    causal_attention,
    causal_attention_qkvpacked,
    causal_attention_varlen,
)


def dense(q, k, v, _):
    return causal_attention(q, k, v, window=5, return_lse=True)


def without_options(q, k, v, _):
    return (causal_attention(q, k, v),)


def with_dropout(q, k, v, _):
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


FUNCTIONS = [dense, without_options, with_dropout, varlen, qkvpacked, packed_documents, decode]


def outputs_and_grads(function, inputs, cu_seqlens):
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = function(*leaves, cu_seqlens)
    if not outputs[0].requires_grad:  # decode
        return outputs
    sum(output.square().sum() for output in outputs).backward()
    return [*outputs, *(leaf.grad for leaf in leaves)]


@pytest.mark.plain
@pytest.mark.parametrize(
    "dynamic", [None, pytest.param(True, marks=pytest.mark.slow)], ids=["automatic", "dynamic"]
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_ten_lengths_compile_at_most_twice(function, dynamic):
    """One compilation is for the first length, a second one for all lengths."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
    for T in (17, 18, 30, 40, 63, 100, 128, 129, 150, 300):
        inputs = make_inputs(1, T, T, 2, 1, 8, torch.float32, "cpu")[:3]
        cu_seqlens = torch.tensor([0, T // 3, T], dtype=torch.int32)
        got = outputs_and_grads(compiled, inputs, cu_seqlens)
        assert_bitwise_equal(got, outputs_and_grads(function, inputs, cu_seqlens))
    assert counter.frame_count <= 2


@pytest.mark.plain
@pytest.mark.parametrize("function", [dense, without_options, with_dropout, varlen])
def test_one_graph_for_any_number_of_heads(function):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    for H, G in ((4, 2), (3, 3)):
        inputs = make_inputs(1, 9, 9, H, G, 8, torch.float32, "cpu")[:3]
        assert_bitwise_equal(compiled(*inputs, cu_seqlens), function(*inputs, cu_seqlens))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_outputs_match_real_outputs(dtype, device):
    """They match in shape, dtype and strides, also for inputs with unusual strides."""
    B, T, S = 2, 5, 9
    ops = torch.ops.tritium
    options = (0.5, S, 0.0, 0.0, None, None)
    q, k, v, do, dlse = make_inputs(B, T, S, 4, 2, 8, dtype, device)
    qkv = packed(*(x[:, :T] for x in (q, k, v)))
    qkv = qkv[:, :, None].expand(-1, -1, 2, -1)[:, :, 0]
    lengths = torch.full((B,), S, device=device)
    o, lse = ops.causal_attention_fwd(q, k, v, *options)
    calls = [
        (ops.causal_attention_fwd, (q.mT.contiguous().mT, k, v, *options)),
        (
            ops.causal_attention_bwd,
            (do, dlse.float(), q, k.mT.contiguous().mT, v, o, lse, *options),
        ),
        (ops.causal_attention_qkvpacked_fwd, (qkv, qkv[0, 0], 4, 2, *options)),
        *(
            (
                ops.causal_attention_qkvpacked_bwd,
                (do.flatten(2), qkv, o.flatten(2), lse, 4, 2, needs_bias, *options),
            )
            for needs_bias in (False, True)
        ),
        (ops.attention_decode, (q, k, v, lengths, 0.5, S, 0.0)),
    ]
    for op, arguments in calls:
        real = op(*arguments)
        fake = op(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments))
        if isinstance(real, torch.Tensor):
            real, fake = [real], [fake]
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), op


class Documents(torch.nn.Module):
    def forward(self, q, k, v, cu_seqlens):
        return causal_attention_varlen(q, k, v, cu_seqlens, 64)


@pytest.mark.plain
def test_exports_for_any_number_of_documents():
    q, k, v = (torch.randn(9, 2, 16) for _ in range(3))
    inputs = (q, k, v, torch.tensor([0, 4, 9]).int())
    documents = {0: torch.export.Dim("documents_and_one", min=2)}
    shapes = ({}, {}, {}, documents)
    exported = torch.export.export(Documents(), inputs, dynamic_shapes=shapes, strict=False)
    other = torch.tensor([0, 2, 5, 6, 9]).int()
    assert torch.equal(exported.module()(q, k, v, other), Documents()(q, k, v, other))
