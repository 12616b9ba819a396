"""Compare packed documents with a loop over the documents."""

import itertools

import pytest
import torch

from tests.kernels.attention.cases import (
    DTYPES,
    LENGTHS,
    assert_bitwise_equal,
    assert_matches_definition,
    make_inputs,
    packed,
    run,
)
from tests.kernels.compare import opcheck
from tritium.kernels import causal_attention, causal_attention_qkvpacked, causal_attention_varlen
from tritium.kernels.core.op import INTERPRET

OPTIONS = [
    {},
    {"window": 50},
    {"window": 3, "softcap": 2.0, "scale": 0.7},
    {"dropout_p": 0.3, "seed": 3},
]


def cumulative(lengths, device):
    ends = [0, *itertools.accumulate(lengths)]
    return torch.tensor(ends, dtype=torch.int32, device=device)


def make_documents(lengths, H, G, K, dtype, device):
    """(q, k, v) and (do, dlse)."""
    N = sum(lengths)
    q, k, v, do, dlse = make_inputs(1, N, N, H, G, K, dtype, device)
    return (q[0], k[0], v[0]), (do[0], dlse[0])


def attend_varlen(cu_seqlens, max_seqlen, **options):
    return lambda q, k, v: causal_attention_varlen(
        q, k, v, cu_seqlens, max_seqlen, return_lse=True, **options
    )


def attend_one_by_one(lengths, **options):
    def attend(q, k, v):
        documents = zip(*(x[None].split(lengths, 1) for x in (q, k, v)), strict=True)
        outputs = [causal_attention(*each, return_lse=True, **options) for each in documents]
        return torch.cat([o[0] for o, _ in outputs]), torch.cat([lse[0] for _, lse in outputs], -1)

    return attend


def tokens_first(results):
    """Put the tokens of lse, and of everything else, on the first axis."""
    o, lse, *grads = results
    return [o, lse.mT, *grads]


# --- 2. accuracy


@pytest.mark.parametrize(
    ("lengths", "options", "dtype"),
    [
        *((lengths, options, torch.bfloat16) for lengths in LENGTHS[:2] for options in OPTIONS[:3]),
        *((LENGTHS[2], options, torch.bfloat16) for options in (OPTIONS[0], OPTIONS[2])),
        *((lengths, options, torch.bfloat16) for lengths in LENGTHS[3:] for options in OPTIONS[:2]),
        (LENGTHS[5], OPTIONS[2], torch.bfloat16),
        *((LENGTHS[0], options, torch.float32) for options in (OPTIONS[0], OPTIONS[2])),
    ],
)
def test_packed_documents_match_documents_one_by_one(lengths, options, dtype, device):
    inputs, incoming = make_documents(lengths, 2, 1, 16, dtype, device)
    cu_seqlens = cumulative(lengths, device)
    got = run(attend_varlen(cu_seqlens, max(1, *lengths), **options), inputs, incoming)
    expected = run(attend_one_by_one(lengths, **options), inputs, incoming)
    # Kernels compute the same tiles in the same order, packed or not. A window changes that: a
    # single document that is shorter than the window runs without a window.
    exact = (INTERPRET or device.type == "cuda") and "window" not in options
    for a, b in zip(got, expected, strict=True):
        if exact or a.numel() == 0:
            assert torch.equal(a, b)
        else:
            atol = 8 * torch.finfo(dtype).eps * max(1.0, b.abs().max().item())
            torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_of_a_document_between_others(dtype, device):
    lengths = (70, 0, 150, 40)
    inputs, incoming = make_documents(lengths, 2, 1, 40, dtype, device)
    attend = attend_varlen(cumulative(lengths, device), 150, window=64)
    o, lse, *grads = run(attend, inputs, incoming)
    document = slice(70, 220)
    got = [o[None, document], lse[None, :, document], *(grad[None, document] for grad in grads)]
    do, dlse = incoming
    assert_matches_definition(
        got,
        [x[None, document] for x in inputs],
        [do[None, document], dlse[None, :, document]],
        window=64,
    )


# --- 3. documents, padding, packed tensors


@pytest.mark.parametrize("dtype", DTYPES)
def test_documents_do_not_attend_to_each_other(dtype, device):
    """Large values in one document change no bit of the outputs and gradients of the others."""
    lengths, other = (40, 90, 30), slice(40, 130)
    inputs, incoming = make_documents(lengths, 2, 2, 16, dtype, device)
    attend = attend_varlen(cumulative(lengths, device), 90)
    before = tokens_first(run(attend, inputs, incoming))
    do, dlse = incoming
    for x in (*inputs, do, dlse.mT):
        x[other] *= -100 if dtype == torch.float16 else -1e9
    after = tokens_first(run(attend, inputs, incoming))
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:40], b[:40])
        assert torch.equal(a[130:], b[130:])
        assert not torch.equal(a[other], b[other])


@pytest.mark.parametrize(
    ("options", "dtype"),
    [(OPTIONS[0], torch.float32), *((options, torch.bfloat16) for options in OPTIONS[:3])],
)
def test_padding_gets_zeros_and_does_not_change_documents(options, dtype, device):
    """70 tokens after the last document are padding."""
    lengths = (40, 0, 90)
    N = sum(lengths)
    inputs, (do, dlse) = make_documents((*lengths, 70), 2, 1, 16, dtype, device)
    cu_seqlens = cumulative(lengths, device)
    attend = attend_varlen(cu_seqlens, 90, **options)
    got = tokens_first(run(attend, inputs, (do, dlse)))
    alone = tokens_first(run(attend, [x[:N] for x in inputs], (do[:N], dlse[:, :N])))
    for a, b in zip(got, alone, strict=True):
        assert torch.equal(a[:N], b)
        assert torch.equal(a[N:], torch.zeros_like(a[N:]))

    def attend_packed(qkv):
        return (causal_attention_qkvpacked(qkv, 2, n_kv_head=1, cu_seqlens=cu_seqlens, **options),)

    qkv = packed(*(x[None] for x in inputs))
    o_packed, dqkv = run(attend_packed, [qkv], [do[None].flatten(2)])
    assert torch.equal(o_packed[0, :N], got[0][:N].flatten(1))
    assert not o_packed[0, N:].any()
    assert not dqkv[0, N:].any()


@pytest.mark.parametrize("options", [OPTIONS[0], *OPTIONS[2:]])
def test_documents_in_qkvpacked_match_separate_tensors(options, device):
    B, T, H, G, K = 2, 80, 4, 2, 16
    q, k, v, do, _ = make_inputs(B, T, T, H, G, K, torch.bfloat16, device)
    cu_seqlens = cumulative((80, 30, 0, 50), device)

    def attend(q, k, v):
        return (causal_attention_varlen(q, k, v, cu_seqlens, T, **options),)

    def attend_packed(qkv):
        return (causal_attention_qkvpacked(qkv, H, n_kv_head=G, cu_seqlens=cu_seqlens, **options),)

    flat = [x.flatten(0, 1) for x in (q, k, v)]
    o, *grads = run(attend, flat, [do.flatten(0, 1)])
    got = run(attend_packed, [packed(q, k, v)], [do.flatten(2)])
    dqkv = packed(*(grad.view(B, T, -1, K) for grad in grads))
    assert_bitwise_equal(got, (o.view(B, T, H * K), dqkv))


def test_cu_seqlens_may_have_gaps_in_memory(device):
    (q, k, v), _ = make_documents((5, 9), 2, 1, 16, torch.float32, device)
    cu_seqlens = cumulative((5, 9), device)
    gaps = torch.stack((cu_seqlens, cu_seqlens + 1), -1)[:, 0]
    qkv = packed(*(x[None] for x in (q, k, v)))

    def attend(ends):
        o = causal_attention_varlen(q, k, v, ends, 9)
        return o, causal_attention_qkvpacked(qkv, 2, n_kv_head=1, cu_seqlens=ends)

    assert_bitwise_equal(attend(gaps), attend(cu_seqlens))


@pytest.mark.parametrize(("B", "T"), [(0, 4), (2, 0)])
def test_documents_of_an_empty_qkvpacked(B, T, device):
    qkv = torch.ones(B, T, 4 * 8, device=device, requires_grad=True)
    o = causal_attention_qkvpacked(qkv, 2, n_kv_head=1, cu_seqlens=cumulative((0, 0), device))
    assert o.shape == (B, T, 16)
    o.sum().backward()
    assert qkv.grad.shape == qkv.shape


def test_dropout_of_a_single_document_matches_causal_attention(device):
    (q, k, v), (do, dlse) = make_documents((50,), 2, 1, 16, torch.float32, device)
    options = {"dropout_p": 0.4, "seed": 9}
    got = run(attend_varlen(cumulative((50,), device), 50, **options), (q, k, v), (do, dlse))
    expected = run(
        lambda *x: causal_attention(*x, return_lse=True, **options),
        [x[None] for x in (q, k, v)],
        [do[None], dlse[None]],
    )
    assert_bitwise_equal(got, [x[0] for x in expected])


def test_equal_documents_get_different_dropout_masks(device):
    """max_seqlen does not change the masks."""
    inputs, _ = make_documents((50,), 2, 1, 16, torch.float32, device)
    twice = [torch.cat([x, x]) for x in inputs]
    cu_seqlens = cumulative((50, 50), device)
    o, other = (
        causal_attention_varlen(*twice, cu_seqlens, max_seqlen, dropout_p=0.4, seed=9)
        for max_seqlen in (50, 99)
    )
    assert not torch.equal(o[:50], o[50:])
    assert torch.equal(o, other)


# --- 4. contract


def test_opcheck(device):
    (q, k, v), _ = make_documents((7, 0, 5), 4, 2, 8, torch.float32, device)
    leaves = [x[None].requires_grad_() for x in (q, k, v)]
    arguments = (*leaves, 0.5, 12, 0.0, 0.0, None, cumulative((7, 0, 5), device))
    opcheck(torch.ops.tritium.causal_attention_fwd.default, arguments)


def test_compiles_as_one_graph_and_follows_autocast(device):
    lengths = (7, 0, 5)
    inputs, incoming = make_documents(lengths, 4, 2, 8, torch.float32, device)
    function = attend_varlen(cumulative(lengths, device), 7)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_bitwise_equal(run(compiled, inputs, incoming), run(function, inputs, incoming))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = function(*inputs)
    assert_bitwise_equal(got, function(*(x.bfloat16() for x in inputs)))


def ones(*shape, **kwargs):
    return torch.ones(*shape, **kwargs)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q": ones(1, 9, 4, 8)},
            r"q must be \(N, H, K\), k and v \(N, G, K\), got \(1, 9, 4, 8\)",
        ),
        ({"q": ones(8, 4, 8)}, "as many keys as the 8 queries, got 9"),
        ({"q": ones(9, 0, 8)}, r"q must have at least one head, got \(9, 0, 8\)"),
        ({"q": ones(9, 3, 8)}, "key heads must divide the 3 query heads, got 2"),
        ({"max_seqlen": 9.5}, "max_seqlen must be int, got 9.5"),
        ({"cu_seqlens": [0, 9]}, "cu_seqlens must be Tensor, got a list"),
        ({"max_seqlen": 0}, "max_seqlen must be at least 1, .*, got 0"),
        (
            {"cu_seqlens": torch.tensor([0, 9])},
            r"cu_seqlens must be int32 \(documents \+ 1,\), got torch.int64 \(2,\)",
        ),
        ({"cu_seqlens": int32(0)}, r"got torch.int32 \(1,\)"),
        (
            {"cu_seqlens": torch.empty(2, dtype=torch.int32, device="meta")},
            "must be on cpu like q, got meta; move it",
        ),
        ({"cu_seqlens": int32(0, 10)}, r"rise from 0 to at most the 9 tokens, got \[0, 10\]"),
        ({"cu_seqlens": int32(1, 9)}, r"rise from 0 to at most the 9 tokens, got \[1, 9\]"),
        ({"cu_seqlens": int32(0, 5, 4, 9)}, r"must rise .* got \[0, 5, 4, 9\]"),
        ({"window": 0}, "window must be None or at least 1 key .*, got 0"),
    ],
)
def test_bad_input_raises(change, message):
    arguments = {"q": ones(9, 4, 8), "k": ones(9, 2, 8), "v": ones(9, 2, 8), "max_seqlen": 9}
    arguments |= {"cu_seqlens": int32(0, 4, 9)} | change
    with pytest.raises(ValueError, match="^causal_attention_varlen: .*" + message):
        causal_attention_varlen(**arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="checks bounds on a GPU: needs CUDA")
def test_invalid_documents_do_not_write_outside_the_tensors(device):
    inputs, incoming = make_documents((300,), 2, 2, 64, torch.bfloat16, device)
    before = [x.clone() for x in (*inputs, *incoming)]
    for invalid in ([0, 500, 300], [-5, 100, 300], [300, 200, 100], [0, 2**31 - 1, 2]):
        cu_seqlens = int32(*invalid).to(device)
        run(attend_varlen(cu_seqlens, 300), inputs, incoming)
    torch.cuda.synchronize()
    assert_bitwise_equal((*inputs, *incoming), before)
