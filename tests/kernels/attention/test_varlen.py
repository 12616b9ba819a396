"""causal_attention_varlen, and packed documents in causal_attention_qkvpacked, against a loop over the documents."""

import itertools

import pytest
import torch

from tests.kernels.attention.cases import FLOATS, assert_like_the_definition, packed, run, tensors
from tritium.kernels import causal_attention, causal_attention_qkvpacked, causal_attention_varlen
from tritium.kernels.attention._launch import _schedule
from tritium.kernels.core.op import INTERPRET
from tritium.kernels.core.triton import cdiv

# Empty documents first, last and between, one longer than several tiles, single tokens, whole tiles, none at all.
LENGTHS = [
    (5, 0, 130, 64, 1, 0, 33),
    (0, 0, 33, 0),
    (1,) * 9,
    (128, 128),
    (64, 0, 0, 64, 1),
    (300,),
    (0, 0),
    (3,),
]
OPTIONS = [
    {},
    {"window": 50},
    {"window": 3, "softcap": 2.0, "scale": 0.7},
    {"dropout_p": 0.3, "seed": 3},
]


def starts(lengths, device):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def parts(x, lengths):
    return x.split(list(lengths))


def each(q, k, v, lengths, **options):
    """o and lse, document by document."""
    documents = [parts(x, lengths) for x in (q, k, v)]
    outputs = [
        causal_attention(*(x[None] for x in document), return_lse=True, **options)
        for document in zip(*documents, strict=True)
    ]
    return torch.cat([o[0] for o, _ in outputs]), torch.cat([lse[0] for _, lse in outputs], -1)


def inputs(lengths, H, G, K, dtype, device):
    N = sum(lengths)
    *values, dlse = tensors(1, N, N, H, G, K, dtype, device)
    q, k, v, do = (x[0] for x in values)
    return (q, k, v), [do, dlse[0]]


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
def test_documents_are_what_they_are_alone(lengths, options, dtype, device):
    values, incoming = inputs(lengths, 2, 1, 16, dtype, device)
    call = {
        "cu_seqlens": starts(lengths, device),
        "max_seqlen": max(1, *lengths),
        "return_lse": True,
        **options,
    }
    got = run(lambda *x: causal_attention_varlen(*x, **call), values, incoming)
    expected = run(lambda *x: each(*x, lengths, **options), values, incoming)
    # Kernels take the same tiles in the same order, but for a document shorter than the window no masks when it is alone.
    exact = (INTERPRET or device.type == "cuda") and "window" not in options
    for a, b in zip(got, expected, strict=True):
        if exact or a.numel() == 0:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(
                a, b, rtol=0, atol=8 * torch.finfo(dtype).eps * max(1.0, b.abs().max().item())
            )


@pytest.mark.parametrize("dtype", FLOATS)
def test_accuracy_of_a_document_among_others(dtype, device):
    lengths, place = (70, 0, 150, 40), 2
    values, incoming = inputs(lengths, 2, 1, 40, dtype, device)
    got = run(
        lambda *x: causal_attention_varlen(
            *x, starts(lengths, device), 150, return_lse=True, window=64
        ),
        values,
        incoming,
    )
    begin = sum(lengths[:place])
    span = slice(begin, begin + lengths[place])
    one = [x[None, span] for x in values]
    own = [got[0][None, span], got[1][None, :, span], *(grad[None, span] for grad in got[2:])]
    assert_like_the_definition(
        own, one, [incoming[0][None, span], incoming[1][None, :, span]], window=64
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_nothing_of_a_document_reaches_another(dtype, device):
    """What another holds and is sent, however large, changes no bit of a document's outputs and gradients."""
    lengths, other = (40, 90, 30), slice(40, 130)
    values, incoming = inputs(lengths, 2, 2, 16, dtype, device)

    def attend():
        attention = run(
            lambda *x: causal_attention_varlen(*x, starts(lengths, device), 90, return_lse=True),
            values,
            incoming,
        )
        return [attention[0], attention[1].mT, *attention[2:]]

    before = attend()
    for x in (*values, incoming[0], incoming[1].mT):
        x[other] *= -100 if dtype == torch.float16 else -1e9
    for a, b in zip(before, attend(), strict=True):
        assert torch.equal(a[:40], b[:40])
        assert torch.equal(a[130:], b[130:])
        assert not torch.equal(a[other], b[other])


@pytest.mark.parametrize(
    ("options", "dtype"),
    [(OPTIONS[0], torch.float32), *((options, torch.bfloat16) for options in OPTIONS[:3])],
)
def test_tokens_behind_the_last_document_get_zeros_and_change_nothing(options, dtype, device):
    lengths, documents = (40, 0, 90, 70), 3
    N = sum(lengths[:documents])
    values, incoming = inputs(lengths, 2, 1, 16, dtype, device)
    cu_seqlens = starts(lengths[:documents], device)

    def attend(q, k, v):
        return causal_attention_varlen(q, k, v, cu_seqlens, 90, return_lse=True, **options)

    o, lse, *grads = run(attend, values, incoming)
    alone = run(attend, [x[:N] for x in values], [incoming[0][:N], incoming[1][:, :N]])
    for got, expected in zip((o, lse.mT, *grads), (alone[0], alone[1].mT, *alone[2:]), strict=True):
        assert torch.equal(got[:N], expected)
        assert torch.equal(got[N:], torch.zeros_like(got[N:]))

    qkv, do = (x.flatten(2) for x in (torch.cat([x[None] for x in values], 2), incoming[0][None]))
    o_packed, dqkv = run(
        lambda x: (
            causal_attention_qkvpacked(x, 2, n_kv_head=1, cu_seqlens=cu_seqlens, **options),
        ),
        [qkv],
        [do],
    )
    assert torch.equal(o_packed[0, :N], o[:N].flatten(1))
    assert not o_packed[0, N:].any()
    assert not dqkv[0, N:].any()


@pytest.mark.parametrize("options", [OPTIONS[0], *OPTIONS[2:]])
def test_packed_documents_are_what_the_parts_are(options, device):
    B, T, H, G, K = 2, 80, 4, 2, 16
    lengths = (80, 30, 0, 50)
    q, k, v, do, _ = tensors(B, T, T, H, G, K, torch.bfloat16, device)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    cu_seqlens = starts(lengths, device)
    o, *grads = run(
        lambda *x: (causal_attention_varlen(*x, cu_seqlens, T, **options),),
        flat,
        [do.flatten(0, 1)],
    )
    got = run(
        lambda x: (causal_attention_qkvpacked(x, H, n_kv_head=G, cu_seqlens=cu_seqlens, **options),), [packed(q, k, v)],
        [do.flatten(2)],
    )  # fmt: skip
    assert torch.equal(got[0], o.view(B, T, H * K))
    assert torch.equal(got[1], packed(*(grad.view(B, T, -1, K) for grad in grads)))


@pytest.mark.parametrize(("B", "T"), [(0, 4), (2, 0)])
def test_packed_documents_of_no_tokens(B, T, device):
    qkv = torch.ones(B, T, 4 * 8, device=device, requires_grad=True)
    o = causal_attention_qkvpacked(qkv, 2, n_kv_head=1, cu_seqlens=starts((0, 0), device))
    assert o.shape == (B, T, 16)
    o.sum().backward()
    assert qkv.grad.shape == qkv.shape


def test_dropout_of_one_document_is_that_of_its_rows(device):
    """Alone in the tensor a document has the mask of causal_attention; behind others another one."""
    values, incoming = inputs((50,), 2, 1, 16, torch.float32, device)
    options = {"dropout_p": 0.4, "seed": 9, "return_lse": True}
    got = run(
        lambda *x: causal_attention_varlen(*x, starts((50,), device), 50, **options),
        values,
        incoming,
    )
    alone = run(
        lambda *x: causal_attention(*x, **options),
        [x[None] for x in values],
        [g[None] for g in incoming],
    )
    assert all(torch.equal(a, b[0]) for a, b in zip(got, alone, strict=True))
    twice = [torch.cat([x, x]) for x in values]
    o = causal_attention_varlen(*twice, starts((50, 50), device), 50, dropout_p=0.4, seed=9)
    assert torch.equal(
        o[:50],
        causal_attention_varlen(*twice, starts((50, 50), device), 99, dropout_p=0.4, seed=9)[:50],
    )
    assert not torch.equal(o[:50], o[50:])


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("lengths", [*LENGTHS, (0,) * 200 + (17, 400, 16, 15)])
def test_the_list_of_tiles_has_each_once_and_most_work_first(lengths, block, device):
    if not (INTERPRET or device.type == "cuda"):
        pytest.skip("runs a kernel: needs CUDA or TRITON_INTERPRET=1")
    work, tiles = _schedule(starts(lengths, device), sum(lengths), block)
    assert work.shape == (tiles, 2)
    listed = [tuple(pair) for pair in work.tolist() if pair != [-1, -1]]
    expected = [
        (document, tile)
        for document, length in enumerate(lengths)
        for tile in range(cdiv(length, block))
    ]
    assert sorted(listed) == expected
    assert listed == sorted(listed, key=lambda pair: (-pair[1], pair[0]))


@pytest.mark.parametrize(
    "senseless", [[40, 90], [300, 200, 100], [0, 500, 300], [-50, 100], [0, 2**31 - 17] * 18]
)
def test_the_list_of_tiles_of_senseless_documents_stays_in_its_bounds(senseless, device):
    """What stands before and behind cu_seqlens in memory has no say in it."""
    if not (INTERPRET or device.type == "cuda"):
        pytest.skip("runs a kernel: needs CUDA or TRITON_INTERPRET=1")
    surrounded = torch.tensor(
        [-(2**30)] * 8 + senseless + [2**30] * 8, dtype=torch.int32, device=device
    )
    work, _ = _schedule(surrounded[8:-8], 100, 16)
    used = work[(work != -1).any(1)]
    assert (used[:, 0] >= 0).all()
    assert (used[:, 0] < len(senseless) - 1).all()
    assert (used[:, 1] >= 0).all()
    alone, _ = _schedule(torch.tensor(senseless, dtype=torch.int32, device=device), 100, 16)
    assert torch.equal(work, alone)


def test_opcheck_and_one_graph(device):
    lengths = (7, 0, 5)
    (q, k, v), incoming = inputs(lengths, 4, 2, 8, torch.float32, device)
    cu_seqlens = starts(lengths, device)
    forward = (*(x[None].requires_grad_() for x in (q, k, v)), cu_seqlens, None, 0.5, 12, 0.0, 0.0)
    torch.library.opcheck(torch.ops.tritium.causal_attention_fwd.default, forward)
    compiled = torch.compile(causal_attention_varlen, fullgraph=True, backend="aot_eager")
    results = [
        run(lambda *x, f=f: f(*x, cu_seqlens, 7, return_lse=True), (q, k, v), incoming)
        for f in (compiled, causal_attention_varlen)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        o = causal_attention_varlen(q, k, v, cu_seqlens, 7)
    assert torch.equal(
        o, causal_attention_varlen(*(x.bfloat16() for x in (q, k, v)), cu_seqlens, 7)
    )


def ones(*shape, **kwargs):
    return torch.ones(*shape, **kwargs)


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
        ({"cu_seqlens": torch.tensor([0], dtype=torch.int32)}, r"got torch.int32 \(1,\)"),
        (
            {"cu_seqlens": torch.empty(2, dtype=torch.int32, device="meta")},
            "must be on cpu like q; move it, got meta",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 10], dtype=torch.int32)},
            r"must rise from 0 to at most the 9 tokens, got \[0, 10\]",
        ),
        (
            {"cu_seqlens": torch.tensor([1, 9], dtype=torch.int32)},
            r"must rise from 0 to at most the 9 tokens, got \[1, 9\]",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 5, 4, 9], dtype=torch.int32)},
            r"must rise .* got \[0, 5, 4, 9\]",
        ),
        ({"window": 0}, "window must be None or at least 1 key .*, got 0"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"q": ones(9, 4, 8), "k": ones(9, 2, 8), "v": ones(9, 2, 8), "max_seqlen": 9}
    arguments |= {"cu_seqlens": torch.tensor([0, 4, 9], dtype=torch.int32)} | change
    with pytest.raises(ValueError, match="^causal_attention_varlen: .*" + message):
        causal_attention_varlen(**arguments)


def test_bad_documents_are_named_by_the_operator_that_got_them():
    cu_seqlens = torch.tensor([0, 11], dtype=torch.int32)
    with pytest.raises(
        ValueError, match=r"^causal_attention_qkvpacked: cu_seqlens must rise .*, got \[0, 11\]"
    ):
        causal_attention_qkvpacked(ones(2, 5, 64), 4, n_kv_head=2, cu_seqlens=cu_seqlens)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="a kernel alone must stay in bounds: needs CUDA"
)
def test_senseless_documents_stay_within_the_tensors(device):
    (q, k, v), incoming = inputs((300,), 2, 2, 64, torch.bfloat16, device)
    before = [x.clone() for x in (q, k, v, *incoming)]
    for senseless in ([0, 500, 300], [-5, 100, 300], [300, 200, 100], [0, 2**31 - 1, 2]):
        cu_seqlens = torch.tensor(senseless, dtype=torch.int32, device=device)
        run(
            lambda *x, c=cu_seqlens: causal_attention_varlen(*x, c, 300, return_lse=True),
            (q, k, v),
            incoming,
        )
    torch.cuda.synchronize()
    assert all(torch.equal(x, then) for x, then in zip((q, k, v, *incoming), before, strict=True))
