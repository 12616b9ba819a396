"""Functions and modules under the names of other libraries keep the conventions of these libraries.

flash-attn needs a GPU and a build. Its conventions are written out here: masks from its docstrings.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.attention.cases import needs_kernels
from tests.kernels.compare import assert_close
from tritium.kernels import attention_decode, causal_attention, cross_entropy, rotary
from tritium.kernels.integrations import _compat_attention, _compat_liger, compat


def randn(*shape, seed=0, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def run(function, inputs, incoming=None):
    """Return the first output and the gradients of the inputs."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    y = function(*leaves)
    incoming = torch.ones_like(y) if incoming is None else incoming.to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, incoming)]


def attention(q, k, v, visible, scale=None):
    """Attention (B, T, H, K) with a mask (T, S), and lse."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    s = torch.einsum("bthk,bshk->bhts", q, k) * (scale or q.shape[-1] ** -0.5)
    s = s.masked_fill(~visible, -math.inf)
    return torch.einsum("bhts,bshk->bthk", s.softmax(-1), v), s.logsumexp(-1)


def flash_mask(T, S, window_size):
    """Keys between [i + S - T - left, i + S - T], both included: a causal mask makes right 0."""
    left, _ = window_size
    own = torch.arange(T)[:, None] + S - T
    j = torch.arange(S)
    visible = j <= own
    return visible if left == -1 else visible & (j >= own - left)


# --- PyTorch's SDPA


@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 2)])
def test_sdpa_matches_torch(H, G, device):
    inputs = [
        randn(2, heads, 9, 8, seed=heads + i, device=device) for i, heads in enumerate((H, G, G))
    ]
    options = {"is_causal": True, "scale": 0.3, "enable_gqa": H != G}
    got = run(lambda *x: compat.scaled_dot_product_attention(*x, **options), inputs)
    expected = run(lambda *x: F.scaled_dot_product_attention(*x, **options), inputs)
    assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_sdpa_takes_one_query_without_a_causal_mask(device):
    q, k, v = (randn(2, 4, T, 8, seed=T, device=device) for T in (1, 9, 10))
    got = compat.scaled_dot_product_attention(q, k, v[:, :, :9])
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v[:, :, :9]))


# --- flash-attn


@pytest.mark.parametrize("window_size", [(-1, -1), (3, 0), (0, 0), (3, -1)])
@pytest.mark.parametrize(("T", "S"), [(7, 7), (3, 7)])
def test_flash_attn_func_matches_its_documented_mask(T, S, window_size, device):
    inputs = [
        randn(2, length, heads, 8, seed=heads, device=device)
        for length, heads in ((T, 4), (S, 2), (S, 2))
    ]
    visible = flash_mask(T, S, window_size).to(device)

    def function(*x):
        return compat.flash_attn_func(*x, causal=True, window_size=window_size)

    expected = run(lambda *x: attention(*x, visible)[0], inputs)
    assert_close(run(function, inputs), expected, rtol=1e-4, atol=1e-5)


def test_flash_attn_func_returns_three_results(device):
    q, k, v = (randn(2, 7, 4, 8, seed=seed, device=device) for seed in range(3))
    o, lse, probabilities = compat.flash_attn_func(
        q, k, v, softmax_scale=0.2, causal=True, return_attn_probs=True
    )
    expected = attention(q, k, v, flash_mask(7, 7, (-1, -1)).to(device), 0.2)
    assert_close((o, lse), expected, rtol=1e-4, atol=1e-5)
    assert probabilities.numel() == 0


def test_right_window_of_zero_is_a_causal_mask(device):
    q, k, v = (randn(1, 7, 2, 8, seed=seed, device=device) for seed in range(3))
    got = compat.flash_attn_func(q, k, v, window_size=(-1, 0))
    assert torch.equal(got, causal_attention(q, k, v))


def test_flash_attn_qkvpacked_func_takes_q_k_and_v_of_each_token(device):
    qkv = randn(2, 7, 3, 4, 8, device=device)
    for window_size in ((-1, -1), (2, 0)):
        visible = flash_mask(7, 7, window_size).to(device)
        got = run(
            lambda qkv, w=window_size: compat.flash_attn_qkvpacked_func(
                qkv, causal=True, window_size=w
            ),
            [qkv],
        )
        expected = run(lambda qkv, m=visible: attention(*qkv.unbind(2), m)[0], [qkv])
        assert_close(got, expected, rtol=1e-4, atol=1e-5)
    o, lse, _ = compat.flash_attn_qkvpacked_func(qkv, causal=True, return_attn_probs=True)
    assert (o.shape, lse.shape) == ((2, 7, 4, 8), (2, 4, 7))


def test_flash_attn_varlen_func_matches_each_document_alone(device):
    q, k, v = (randn(9, heads, 8, seed=heads, device=device) for heads in (4, 2, 2))
    lengths = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    o, lse, _ = compat.flash_attn_varlen_func(
        q, k, v, lengths, lengths, 5, 5, causal=True, window_size=(2, 0), return_attn_probs=True
    )
    for start, stop in ((0, 4), (4, 9)):
        one = [x[None, start:stop] for x in (q, k, v)]
        visible = flash_mask(stop - start, stop - start, (2, 0)).to(device)
        expected = attention(*one, visible)
        assert_close(
            (o[None, start:stop], lse[None, :, start:stop]), expected, rtol=1e-4, atol=1e-5
        )
    if device.type == "cpu":
        again = compat.flash_attn_varlen_func(q, k, v, lengths, lengths.clone(), 5, 5, causal=True)
        assert again.shape == q.shape


@pytest.mark.parametrize("interleaved", [False, True])
def test_flash_attn_with_kvcache_appends_and_rotates(interleaved, device):
    """cache_seqlens leaves out the new tokens. cache_lengths of attention_decode counts them."""
    T, S, K, R = 2, 9, 8, 4
    q, k, v = (randn(2, T, heads, K, seed=heads, device=device) for heads in (4, 2, 2))
    k_cache, v_cache = (randn(2, S, 2, K, seed=seed, device=device) for seed in (5, 6))
    angle = torch.arange(S)[:, None] * torch.tensor([1.0, 0.1])
    cos, sin = angle.cos().to(device), angle.sin().to(device)
    lengths = torch.tensor([3, 0], dtype=torch.int32, device=device)

    expected_k, expected_v, expected_q = k_cache.clone(), v_cache.clone(), q.clone()
    for b, length in enumerate(lengths.tolist()):
        tables = cos[length:], sin[length:]
        rows = slice(length, length + T)
        expected_q[b : b + 1] = rotary(q[b : b + 1], *tables, interleaved=interleaved)
        expected_k[b, rows] = rotary(k[b : b + 1], *tables, interleaved=interleaved)[0]
        expected_v[b, rows] = v[b]
    expected = attention_decode(expected_q, expected_k, expected_v, lengths + T, window=3)

    got = compat.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cos, sin, lengths, causal=True, window_size=(2, 0),
        rotary_interleaved=interleaved,
    )  # fmt: skip
    assert R == 2 * cos.shape[1] < K
    assert torch.equal(k_cache, expected_k)
    assert torch.equal(v_cache, expected_v)
    assert torch.equal(got, expected)
    # One query sees all keys, with and without a causal mask.
    for length in (5, None):
        got = compat.flash_attn_with_kvcache(q[:, :1], k_cache, v_cache, cache_seqlens=length)
        full = torch.full((2,), length or S, device=device)
        assert torch.equal(got, attention_decode(q[:, :1], k_cache, v_cache, full))


Q = torch.ones(1, 3, 2, 8)
ONE_QUERY = Q[:, :1]
ONE = torch.ones(1)
LENGTHS = torch.tensor([0, 3], dtype=torch.int32)


FLASH = {"softmax_scale": 0.3, "softcap": 2.0, "causal": True, "window_size": (1, 0)}
EXPECTED = {"scale": 0.3, "softcap": 2.0, "window": 2}


@pytest.mark.plain
@pytest.mark.parametrize("return_attn_probs", [False, True])
@pytest.mark.parametrize(
    ("name", "args", "operator"),
    [
        ("flash_attn_func", [Q] * 3, "causal_attention"),
        ("flash_attn_qkvpacked_func", [torch.stack([Q] * 3, 2)], "causal_attention"),
        (
            "flash_attn_varlen_func",
            [*[Q[0]] * 3, LENGTHS, LENGTHS, 3, 3],
            "causal_attention_varlen",
        ),
        ("flash_attn_with_kvcache", [Q] * 3, "attention_decode"),
        ("scaled_dot_product_attention", [Q] * 3, "causal_attention"),
    ],
)
def test_options_reach_the_operator(name, args, operator, return_attn_probs, monkeypatch):
    options, expected = dict(FLASH), dict(EXPECTED)
    if name == "scaled_dot_product_attention":
        options, expected = {"scale": 0.3, "is_causal": True}, {"scale": 0.3}
    elif return_attn_probs and name != "flash_attn_with_kvcache":
        options["return_attn_probs"] = True
    if not return_attn_probs and operator != "attention_decode":
        options["dropout_p"] = expected["dropout_p"] = 0.25
        if name == "flash_attn_qkvpacked_func":
            operator = "causal_attention_qkvpacked"
    calls = []
    original = getattr(_compat_attention, operator)

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(_compat_attention, operator, spy)
    getattr(compat, name)(*args, **options)
    (call,) = calls
    assert {option: call[option] for option in expected} == expected


@pytest.mark.plain
@pytest.mark.parametrize(
    ("name", "args", "options", "message"),
    [
        ("scaled_dot_product_attention", [Q] * 3, {}, "is_causal must be True, got False"),
        ("scaled_dot_product_attention", [Q] * 3, {"attn_mask": ONE}, "attn_mask is not supported"),
        (
            "scaled_dot_product_attention",
            [Q[:, :, :1], Q, Q],
            {"is_causal": True},
            "is_causal needs as many keys as queries, got 2 and 1",
        ),
        (
            "scaled_dot_product_attention",
            [Q, Q[:, :1], Q[:, :1]],
            {"is_causal": True},
            "enable_gqa must be True for 3 query and 1 key heads",
        ),
        ("flash_attn_func", [Q] * 3, {}, "causal must be True, or window_size"),
        ("flash_attn_func", [Q] * 3, {"alibi_slopes": ONE}, "alibi_slopes is not supported"),
        *(
            (
                name,
                args,
                {"causal": True, "dropout_p": 0.1, "return_attn_probs": True},
                "return_attn_probs needs dropout_p 0, got 0.1",
            )
            for name, args in (
                ("flash_attn_func", [Q] * 3),
                ("flash_attn_qkvpacked_func", [torch.stack([Q] * 3, 2)]),
                ("flash_attn_varlen_func", [*[Q[0]] * 3, LENGTHS, LENGTHS, 3, 3]),
            )
        ),
        *(
            ("flash_attn_func", [Q] * 3, {"causal": True, "window_size": size}, "window_size must")
            for size in ((-2, 0), 3, None, (None, None), (1, 2, 3), (1.5, 0))
        ),
        ("flash_attn_func", [Q[0], Q, Q], {"causal": True}, r"q must be \(B, T, H, K\)"),
        ("flash_attn_qkvpacked_func", [Q], {"causal": True}, r"qkv must be \(B, T, 3, H, K\)"),
        ("flash_attn_qkvpacked_func", [torch.ones(1, 3, 3, 2, 8)], {}, "causal must be True"),
        (
            "flash_attn_varlen_func",
            [*[Q[0]] * 3, LENGTHS, LENGTHS - 1, 3, 3],
            {"causal": True},
            "cu_seqlens_k must equal cu_seqlens_q",
        ),
        # The lengths say that the document has three tokens.
        (
            "flash_attn_varlen_func",
            [*[Q[0]] * 3, LENGTHS, LENGTHS, 3, 1],
            {"causal": False},
            "causal must be True, or window_size",
        ),
        (
            "flash_attn_varlen_func",
            [*[Q[0]] * 3, LENGTHS, LENGTHS, 3, 3],
            {"causal": True, "block_table": ONE},
            "block_table is not supported",
        ),
        *(
            ("flash_attn_with_kvcache", [Q] * 3, {"causal": True, option: value}, option)
            for option, value in (
                ("cache_batch_idx", ONE),
                ("cache_leftpad", ONE),
                ("block_table", ONE),
                ("alibi_slopes", ONE),
                ("num_splits", 2),
                ("return_softmax_lse", True),
                ("rotary_cos", ONE),
            )
        ),
        ("flash_attn_with_kvcache", [Q] * 3, {}, "causal must be True"),
        ("flash_attn_with_kvcache", [Q[0], Q, Q], {}, r"q must be \(B, T, H, K\)"),
        *(
            (
                "flash_attn_with_kvcache",
                [ONE_QUERY, Q, Q, new, new],
                {"cache_seqlens": 0},
                "k and v",
            )
            for new in (Q[:, :1, :1], Q[..., :1], torch.ones(2, 1, 2, 8), Q[0])
        ),
        (
            "flash_attn_with_kvcache",
            [ONE_QUERY, Q, Q, ONE_QUERY, Q],
            {"cache_seqlens": 0},
            r"k and v must be \(1, T, 2, 8\) like the caches",
        ),
        *(
            ("flash_attn_with_kvcache", [ONE_QUERY, Q, Q, ONE_QUERY, ONE_QUERY], options, message)
            for options, message in (
                ({"cache_seqlens": 3}, r"cache_seqlens must be from 0 to 2, .* got \[3\]"),
                ({"cache_seqlens": -1}, r"cache_seqlens must be from 0 to 2, .* got \[-1\]"),
                ({"cache_seqlens": 1.0}, r"cache_seqlens must be int \| Tensor \| None, got 1.0"),
                ({"cache_seqlens": torch.tensor(1)}, r"cache_seqlens must be .* got torch.int64"),
                (
                    {"cache_seqlens": 2, "rotary_cos": Q[0, :2, 0], "rotary_sin": Q[0, :2, 0]},
                    "from 0 to 1, so that 1 new token fits into rotary_cos's 2 positions",
                ),
            )
        ),
        (
            "flash_attn_with_kvcache",
            [Q, Q, Q, ONE_QUERY, ONE_QUERY],
            {
                "causal": True,
                "cache_seqlens": 1,
                "rotary_cos": Q[0, :, 0],
                "rotary_sin": Q[0, :, 0],
            },
            "from 0 to 0, so that 3 new tokens fit into rotary_cos's 3 positions",
        ),
        *(
            (name, [], options, message)
            for name in ("LigerCrossEntropyLoss", "LigerFusedLinearCrossEntropyLoss")
            for options, message in (
                ({"reduction": "avg"}, "unknown reduction 'avg'; expected one of mean, sum, none"),
                ({"label_smoothing": -0.1}, "label_smoothing must be from 0 to 1, got -0.1"),
                ({"lse_square_scale": -1.0}, "lse_square_scale must be from 0"),
                ({"softcap": -1.0}, "softcap must be"),
            )
        ),
        ("LigerCrossEntropyLoss", [], {"weight": ONE}, "weight is not supported"),
        (
            "LigerCrossEntropyLoss",
            [],
            {"return_predicted_tokens": True},
            "return_predicted_tokens is not supported, expected False, got True",
        ),
        (
            "LigerCrossEntropyLoss",
            [],
            {"return_token_accuracy": True, "reduction": "none"},
            "return_token_accuracy needs reduction 'mean' or 'sum'",
        ),
        ("LigerFusedLinearCrossEntropyLoss", [], {"ce_weight": ONE}, "ce_weight is not supported"),
        ("LigerFusedLinearCrossEntropyLoss", [], {"use_token_scaling": True}, "use_token_scaling"),
        (
            "LigerFusedLinearCrossEntropyLoss",
            [],
            {"accum_dtype": torch.bfloat16},
            "accum_dtype must be None or float32, got torch.bfloat16",
        ),
        ("LigerRMSNorm", [8], {"casting_mode": "none"}, "casting_mode must be 'llama' or 'gemma'"),
        *(
            ("LigerLayerNorm", [8], {option: "triton"}, f"{option} is not supported")
            for option in ("impl", "mode", "backend")
        ),
        ("LigerRMSNorm", [8], {"row_mode": True}, "row_mode is not supported"),
        ("LigerRMSNorm", [8], {"init_fn": "randn"}, "init_fn must be 'ones' or 'zeros'"),
        # Python would take these for True, False, 0 or 1.
        *(
            (name, args, {"causal": True, option: value}, f"{option} must be {expected}, got")
            for name, args in (
                ("flash_attn_func", [Q] * 3),
                ("flash_attn_qkvpacked_func", [torch.stack([Q] * 3, 2)]),
                ("flash_attn_varlen_func", [*[Q[0]] * 3, LENGTHS, LENGTHS, 3, 3]),
                ("flash_attn_with_kvcache", [ONE_QUERY, Q, Q]),
            )
            for option, value, expected in (
                ("causal", "no", "bool"),
                ("softmax_scale", True, r"float \| None"),
                ("softcap", "2", r"float \| None"),
            )
        ),
        ("flash_attn_func", [Q] * 3, {"causal": True, "deterministic": "no"}, "deterministic"),
        ("flash_attn_func", [Q] * 3, {"causal": True, "return_attn_probs": 1}, "return_attn_probs"),
        ("flash_attn_with_kvcache", [Q] * 3, {"causal": True, "num_splits": False}, "num_splits"),
        ("flash_attn_with_kvcache", [Q] * 3, {"cache_seqlens": True}, "cache_seqlens must be"),
        ("scaled_dot_product_attention", [Q] * 3, {"is_causal": "no"}, "is_causal must be bool"),
        ("scaled_dot_product_attention", [Q, Q, None], {}, "value must be Tensor, got None"),
        *(
            (name, [], {option: value}, f"{option} must be")
            for name in ("LigerCrossEntropyLoss", "LigerFusedLinearCrossEntropyLoss")
            for option, value in (
                ("ignore_index", None),
                ("label_smoothing", "0.1"),
                ("lse_square_scale", True),
                ("return_z_loss", "no"),
                ("return_token_accuracy", 1),
            )
        ),
        ("LigerFusedLinearCrossEntropyLoss", [], {"use_token_scaling": 0}, "use_token_scaling"),
        ("LigerLayerNorm", [8], {"bias": "no"}, "bias must be bool, got 'no'"),
        ("LigerLayerNorm", [8], {"eps": -1.0}, "eps must be at least 0, got -1.0"),
        ("LigerRMSNorm", [8], {"offset": "1"}, "offset must be float, got '1'"),
        ("LigerRMSNorm", [8], {"eps": -1.0}, "eps must be at least 0, got -1.0"),
        ("LigerRMSNorm", [0], {}, "hidden_size must be at least 1, got 0"),
    ],
)
def test_options_that_are_not_supported_raise(name, args, options, message):
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        getattr(compat, name)(*args, **options)


@pytest.mark.plain
def test_appending_to_fake_caches_reads_no_values():
    with FakeTensorMode() as mode:
        cache, new, lengths = (
            mode.from_tensor(x) for x in (torch.ones(2, 9, 1, 4), torch.ones(2, 1, 1, 4), LENGTHS)
        )
        o = compat.flash_attn_with_kvcache(new, cache, cache, new, new, cache_seqlens=lengths)
    assert o.shape == new.shape


@pytest.mark.plain
def test_a_failed_append_leaves_the_caches_as_they_were():
    k_cache, v_cache = torch.zeros(1, 3, 2, 8), torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match="v_cache must be"):
        compat.flash_attn_with_kvcache(
            ONE_QUERY, k_cache, v_cache, ONE_QUERY, ONE_QUERY, cache_seqlens=0
        )
    assert not k_cache.any()


# --- Liger


def logits_and_target(device):
    target = torch.randint(11, (9,), generator=torch.Generator().manual_seed(1))
    target[2::5] = -100
    return randn(9, 11, device=device), target.to(device)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_liger_losses_match_torch(reduction, device):
    logits, target = logits_and_target(device)
    x, weight, bias = (randn(*shape, seed=3, device=device) for shape in ((9, 4), (11, 4), (11,)))
    options = {"reduction": reduction, "label_smoothing": 0.1}
    loss = compat.LigerCrossEntropyLoss(**options)
    expected = run(lambda x: F.cross_entropy(x, target, **options), [logits])
    assert_close(run(lambda x: loss(x, target), [logits]), expected, rtol=1e-4, atol=1e-5)
    fused = compat.LigerFusedLinearCrossEntropyLoss(**options)
    got = run(lambda w, x, b: fused(w, x, target, b), [weight, x, bias])
    expected = run(
        lambda w, x, b: F.cross_entropy(F.linear(x, w, b), target, **options), [weight, x, bias]
    )
    assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.plain
@pytest.mark.parametrize("name", ["LigerCrossEntropyLoss", "LigerFusedLinearCrossEntropyLoss"])
@pytest.mark.parametrize("asked", [(), ("z_loss",), ("token_accuracy",)])
def test_liger_losses_ask_the_operator_for_what_they_return(name, asked, monkeypatch):
    logits, target = logits_and_target("cpu")
    fused = "Fused" in name
    operator = "linear_cross_entropy" if fused else "cross_entropy"
    original, calls = getattr(_compat_liger, operator), []

    def spy(*args, **kwargs):
        calls.append((kwargs["return_lse"], kwargs["return_correct"]))
        return original(*args, **kwargs)

    monkeypatch.setattr(_compat_liger, operator, spy)
    loss = getattr(compat, name)(**{f"return_{result}": True for result in asked})
    inputs = (torch.eye(11), logits, target) if fused else (logits, target)
    found = loss(*inputs)
    assert calls == [("z_loss" in asked, "token_accuracy" in asked)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    for result in asked:
        torch.testing.assert_close(getattr(compiled, result), getattr(found, result))
    assert isinstance(found, torch.Tensor) != bool(asked)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_liger_losses_return_z_loss_and_accuracy(reduction, device):
    logits, target = logits_and_target(device)
    target[:2] = logits[:2].argmax(-1)
    options = {
        "lse_square_scale": 0.1, "softcap": 5.0, "reduction": reduction, "return_z_loss": True,
        "return_token_accuracy": True,
    }  # fmt: skip
    capped = 5 * torch.tanh(logits / 5)
    has_loss = target != -100
    rows = 0.1 * capped.logsumexp(-1).square()[has_loss]
    right = (capped.argmax(-1) == target)[has_loss]
    output = compat.LigerCrossEntropyLoss(**options)(logits, target)
    fused = compat.LigerFusedLinearCrossEntropyLoss(**options)
    for found in (output, fused(torch.eye(11, device=device), logits, target)):
        torch.testing.assert_close(found.z_loss, rows.mean() if reduction == "mean" else rows.sum())
        torch.testing.assert_close(found.token_accuracy, right.float().mean())
        loss = cross_entropy(logits, target, z_loss=0.1, softcap=5.0, reduction=reduction)
        torch.testing.assert_close(found.loss, loss)
        assert found.predicted_tokens is None


@pytest.mark.parametrize("bias", [False, True])
def test_liger_layer_norm_matches_torch(bias, device):
    norm = compat.LigerLayerNorm(8, eps=1e-3, bias=bias).to(device)
    assert list(norm.state_dict()) == ["weight", "bias"]
    assert norm.bias.any() == bias
    x = randn(3, 8, device=device)
    expected = F.layer_norm(x, (8,), norm.weight, norm.bias, 1e-3)
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("elementwise_affine", [False, True])
def test_liger_rms_norm_matches_torch(offset, elementwise_affine, device):
    norm = compat.LigerRMSNorm(8, offset=offset, elementwise_affine=elementwise_affine).to(device)
    assert list(norm.state_dict()) == ["weight"] * elementwise_affine
    x = randn(3, 8, device=device)
    weight = 1 + offset if elementwise_affine else 1
    torch.testing.assert_close(norm(x), weight * F.rms_norm(x, (8,), None, 1e-6))


@needs_kernels
@pytest.mark.parametrize("name", ["LigerCrossEntropyLoss", "LigerFusedLinearCrossEntropyLoss"])
def test_losses_match_liger(name, device):
    """Triton's interpreter runs Liger's kernels of the losses too, without options."""
    liger = pytest.importorskip("liger_kernel.transformers")
    logits, target = logits_and_target(device)
    fused = "Fused" in name
    inputs = [torch.eye(11, device=device), logits] if fused else [logits]
    found, expected = (
        run(lambda *x, loss=loss: loss(*x, target), [x.clone() for x in inputs])
        for loss in (getattr(compat, name)(), getattr(liger, name)())
    )
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.plain
def test_signatures_match_liger():
    """Same parameters, order and defaults, same names in the state dict."""
    import inspect

    liger = pytest.importorskip("liger_kernel.transformers")
    for name in (
        "LigerCrossEntropyLoss",
        "LigerFusedLinearCrossEntropyLoss",
        "LigerLayerNorm",
        "LigerRMSNorm",
    ):
        theirs, ours = getattr(liger, name), getattr(compat, name)
        for method in ("__init__", "forward"):
            found, expected = (
                [(p.name, p.default) for p in inspect.signature(function).parameters.values()]
                for function in (getattr(ours, method), getattr(theirs, method))
            )
            assert found[1 : len(expected)] == expected[1:]  # old versions have fewer
        if name.endswith("Norm"):
            assert list(theirs(8).state_dict()) == list(ours(8).state_dict())
