"""Modules take the state dicts of what they replace, compute the same, and copy like torch.nn."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tritium.kernels import causal_attention, modules

pytestmark = pytest.mark.plain

MODULES = {
    "LayerNorm": lambda **options: modules.LayerNorm(16, **options),
    "RMSNorm": lambda **options: modules.RMSNorm(16, **options),
    "GELUMLP": lambda **options: modules.GELUMLP(16, 24, **options),
    "GELUMLP-gpt2": lambda **options: modules.GELUMLP(16, 24, layout="gpt2", **options),
    "SwiGLUMLP": lambda **options: modules.SwiGLUMLP(16, 24, **options),
    "CausalSelfAttention": lambda **options: modules.CausalSelfAttention(16, 2, **options),
    "CausalSelfAttention-llama": lambda **options: modules.CausalSelfAttention(
        16, 4, n_kv_head=2, layout="llama", qk_norm=True, **options
    ),
    "LinearCrossEntropyLoss": lambda **options: modules.LinearCrossEntropyLoss(16, 9, **options),
}


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 7, 16, dtype=torch.float64)


def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(module, modules.LinearCrossEntropyLoss):
        return module(x, torch.arange(14, device=x.device).view(2, 7) % 9)
    return module(x)


@pytest.mark.parametrize("name", MODULES)
def test_copies_and_pickles_compute_the_same(name, x):
    module = MODULES[name](dtype=torch.float64)
    y = run(module, x)
    assert torch.equal(run(copy.deepcopy(module), x), y)
    assert torch.equal(run(pickle.loads(pickle.dumps(module)), x), y)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_on_meta_can_be_emptied_and_initialized(name, x):
    module = MODULES[name](device="meta")
    assert run(module, x.float().to("meta")).device.type == "meta"
    module = module.to_empty(device="cpu").to(torch.float64)
    module.reset_parameters()
    assert run(module, x).isfinite().all()


@pytest.mark.parametrize("name", MODULES)
def test_to_dtype_changes_the_outputs(name, x):
    module = MODULES[name]().to(torch.bfloat16)
    expected = torch.float32 if name == "LinearCrossEntropyLoss" else torch.bfloat16
    assert run(module, x.bfloat16()).dtype == expected


def test_one_graph_under_compile(x):
    block = nn.Sequential(
        modules.LayerNorm(16),
        modules.GELUMLP(16, 24, layout="gpt2"),
        modules.CausalSelfAttention(16, 4, layout="llama", qk_norm=True),
    ).double()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), block(x))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_norms_match_torch(name, affine, x):
    options = {"eps": 0.1, "elementwise_affine": affine, "dtype": torch.float64}
    original = getattr(nn, name)(16, **options)
    for parameter in original.parameters():
        nn.init.normal_(parameter)
    module = getattr(modules, name)(16, **options)
    module.load_state_dict(original.state_dict())
    torch.testing.assert_close(module(x), original(x))
    residual = torch.randn_like(x)
    y, total = module(x, residual)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(y, original(x + residual))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_default_eps_of_rms_norm_is_that_of_torch(dtype):
    x = torch.full((3, 16), 1e-3, dtype=dtype)  # the square is near eps
    y = modules.RMSNorm(16, dtype=dtype)(x)
    torch.testing.assert_close(y, nn.RMSNorm(16, dtype=dtype)(x))


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_norms_take_an_eps_that_is_a_large_int(name, x):
    module, expected = (getattr(modules, name)(16, eps=eps) for eps in (10**30, 1e30))
    assert isinstance(module.eps, float)
    assert torch.equal(module(x.float()), expected(x.float()))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_norms_check_the_last_axis(name, affine, x):
    module = getattr(modules, name)(8, elementwise_affine=affine)
    with pytest.raises(
        ValueError, match=r"weight must have shape \(16,\) to match x .* got \(8,\)"
    ):
        module(x.float())


def test_gelu_mlp_matches_linear_layers(x):
    original = nn.ModuleDict({"c_fc": nn.Linear(16, 24), "c_proj": nn.Linear(24, 16)}).double()
    module = modules.GELUMLP(16, 24, approximate="none", dtype=torch.float64)
    module.load_state_dict(original.state_dict())
    expected = original["c_proj"](F.gelu(original["c_fc"](x)))
    torch.testing.assert_close(module(x), expected)


# --- MLPs with layers that are not plain

# Layers of each MLP, in the order in which its forward calls them.
MLP_LAYERS = {
    "GELUMLP": ("c_fc", "c_proj"),
    "GELUMLP-gpt2": ("c_fc", "c_proj"),
    "SwiGLUMLP": ("gate_proj", "up_proj", "down_proj"),
}
LAYERS = [(name, layer) for name, layers in MLP_LAYERS.items() for layer in layers]


class LoRA(nn.Module):
    """An adapter whose attributes weight and bias are those of the layer in it, as in PEFT."""

    def __init__(self, base: nn.Module, n_in: int, n_out: int):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(2, n_in, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(n_out, 2, dtype=torch.float64))

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.t() @ self.b.t()


def merged(adapter: LoRA, layout: str) -> nn.Module:
    """Return the layer with the update of the adapter added to its weight."""
    layer = copy.deepcopy(adapter.base)
    update = (adapter.b @ adapter.a).detach()
    with torch.no_grad():
        layer.weight += update.t() if layout == "gpt2" else update
    return layer


def fused_calls(monkeypatch) -> list[str]:
    """Return a list to which each call of a fused MLP adds the name of the operator."""
    calls = []

    def record(name):
        operator = getattr(modules, name)

        def call(*args, **options):
            calls.append(name)
            return operator(*args, **options)

        monkeypatch.setattr(modules, name, call)

    record("gelu_mlp")
    record("swiglu_mlp")
    return calls


@pytest.mark.parametrize("name", MLP_LAYERS)
def test_plain_mlps_run_the_fused_operator(name, x, monkeypatch):
    calls = fused_calls(monkeypatch)
    MODULES[name](dtype=torch.float64)(x)
    assert calls == ["swiglu_mlp" if name == "SwiGLUMLP" else "gelu_mlp"]


@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_an_adapter_in_an_mlp_changes_the_output_and_gets_gradients(name, layer, x):
    mlp = MODULES[name](dtype=torch.float64)
    sizes = (24, 16) if layer in ("c_proj", "down_proj") else (16, 24)
    adapter = LoRA(getattr(mlp, layer).requires_grad_(False), *sizes)
    expected_module = copy.deepcopy(mlp)
    setattr(expected_module, layer, merged(adapter, getattr(mlp, "layout", "")))
    plain = mlp(x)
    setattr(mlp, layer, adapter)
    y = mlp(x)
    assert not torch.allclose(y, plain)
    torch.testing.assert_close(y, expected_module(x))
    y.square().sum().backward()
    assert adapter.a.grad.abs().sum() > 0
    assert adapter.b.grad.abs().sum() > 0


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_an_mlp_with_an_adapter_keeps_its_activation(approximate, x):
    mlp = modules.GELUMLP(16, 24, approximate=approximate, dtype=torch.float64)
    expected = mlp(x)
    mlp.c_fc = nn.Sequential(mlp.c_fc)
    torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_a_hook_on_a_layer_of_an_mlp_runs(name, layer, x):
    mlp = MODULES[name](dtype=torch.float64)
    keys = list(mlp.state_dict())
    plain = mlp(x)
    calls = []
    handle = getattr(mlp, layer).register_forward_hook(lambda *_: calls.append(layer))
    torch.testing.assert_close(mlp(x), plain)
    assert calls == [layer]
    assert list(mlp.state_dict()) == keys
    handle.remove()
    assert torch.equal(mlp(x), plain)
    assert calls == [layer]


def test_a_bias_that_a_user_adds_to_swiglu_mlp_is_applied(x):
    mlp = modules.SwiGLUMLP(16, 24, dtype=torch.float64)
    plain = mlp(x)
    down = nn.Linear(24, 16, dtype=torch.float64)
    down.weight = mlp.down_proj.weight
    mlp.down_proj = down
    torch.testing.assert_close(mlp(x), plain + down.bias)


def test_an_mlp_with_a_hook_compiles_as_one_graph(x):
    mlp = modules.GELUMLP(16, 24, dtype=torch.float64)
    mlp.c_proj.register_forward_hook(lambda module, args, y: 2 * y)
    compiled = torch.compile(mlp, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), mlp(x))


def test_packed_attention_matches_sdpa(x):
    module = modules.CausalSelfAttention(16, 4, n_kv_head=2, dtype=torch.float64)
    q, k, v = module.c_attn(x).unflatten(-1, (-1, 4)).transpose(1, 2).split((4, 2, 2), dim=1)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    expected = module.c_proj(o.transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("layout", ["packed", "gpt2", "llama"])
@pytest.mark.parametrize(
    "options", [{"window": 3}, {"softcap": 0.5}, {"window": 2, "softcap": 1.0}]
)
def test_options_of_attention_reach_the_operator(layout, options, x):
    module = modules.CausalSelfAttention(
        16, 4, n_kv_head=2, layout=layout, dtype=torch.float64, **options
    )
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    last = module.o_proj if layout == "llama" else module.c_proj
    expected = last(causal_attention(*module._heads(x), **options).flatten(2))
    torch.testing.assert_close(module(x), expected)
    cu_seqlens = torch.tensor([0, 7, 14], dtype=torch.int32)
    torch.testing.assert_close(module(x, cu_seqlens=cu_seqlens), expected)


def test_biases_of_attention_can_be_chosen():
    for layout, first, last in (("packed", "c_attn", "c_proj"), ("llama", "q_proj", "o_proj")):
        for bias, out_bias in ((True, None), (False, None), (True, False), (False, True)):
            module = modules.CausalSelfAttention(16, 2, bias=bias, out_bias=out_bias, layout=layout)
            expected = bias if out_bias is None else out_bias
            assert (getattr(module, first).bias is not None) == bias
            assert (getattr(module, last).bias is not None) == expected


def test_norms_of_queries_and_keys_take_eps():
    module = modules.CausalSelfAttention(16, 2, qk_norm=True, eps=0.5, layout="llama")
    assert module.q_norm.eps == module.k_norm.eps == 0.5


def test_rope_that_is_no_pair_raises(x):
    module = modules.CausalSelfAttention(16, 2, dtype=torch.float64)
    table = torch.ones(7, 4)
    for rope in (table, (table,) * 3):
        with pytest.raises(ValueError, match=r"rope must be \(cos, sin\), .* got (one|3)"):
            module(x, rope=rope)


@pytest.mark.parametrize("layout", ["packed", "llama"])
def test_documents_match_separate_sequences(layout, x):
    module = modules.CausalSelfAttention(16, 2, layout=layout, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 3, 7, 14], dtype=torch.int32)
    packed = module(x, cu_seqlens=cu_seqlens).flatten(0, 1)
    parts = [module(part[None])[0] for part in x.flatten(0, 1).split((3, 4, 7))]
    torch.testing.assert_close(packed, torch.cat(parts))


def test_dropout_applies_in_training_only(x):
    module = modules.CausalSelfAttention(16, 2, dropout_p=0.5, dtype=torch.float64)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_options_of_the_loss_reach_the_operator(x):
    options = {"ignore_index": 3, "label_smoothing": 0.1, "softcap": 0.5, "reduction": "sum"}
    loss = modules.LinearCrossEntropyLoss(16, 9, bias=True, dtype=torch.float64, **options)
    target = torch.randint(9, (2, 7))
    target[0, :2] = 3
    logits = loss.logits(x)
    torch.testing.assert_close(logits, 0.5 * torch.tanh(F.linear(x, loss.weight, loss.bias) / 0.5))
    del options["softcap"]
    expected = F.cross_entropy(logits.flatten(0, 1), target.flatten(), **options)
    torch.testing.assert_close(loss(x, target), expected)
    loss.options["z_loss"] = 0.01
    z_loss = 0.01 * logits.logsumexp(-1)[target != 3].square().sum()
    torch.testing.assert_close(loss(x, target), expected + z_loss)


def test_the_loss_matches_a_linear_head_and_can_be_tied(x):
    embedding = nn.Embedding(9, 16, dtype=torch.float64)
    loss = modules.LinearCrossEntropyLoss(16, 9, dtype=torch.float64)
    loss.weight = embedding.weight
    head = nn.Linear(16, 9, bias=False, dtype=torch.float64)
    head.load_state_dict(loss.state_dict())
    target = torch.randint(9, (2, 7))
    target[0, 0] = -100
    expected = F.cross_entropy(head(x).flatten(0, 1), target.flatten())
    torch.testing.assert_close(loss(x, target), expected)
    assert torch.equal(loss.logits(x), head(x))
    loss(x, target).backward()
    assert embedding.weight.grad is not None


# --- transformers

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 50}


@pytest.fixture
def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.GPT2Model(transformers.GPT2Config(**SIZES)).eval()


def llama_like(name: str):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    options = {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 16}
    config = transformers.AutoConfig.for_model(name, **SIZES, **options)
    return transformers.AutoModel.from_config(config).eval()


def test_parts_of_gpt2_match(gpt2):
    x = torch.randn(2, 7, 32)
    mlp = modules.GELUMLP(32, 128, layout="gpt2")
    mlp.load_state_dict(gpt2.h[0].mlp.state_dict())
    torch.testing.assert_close(mlp(x), gpt2.h[0].mlp(x))
    attention = modules.CausalSelfAttention(32, 4, layout="gpt2")
    attention.load_state_dict(gpt2.h[0].attn.state_dict())
    torch.testing.assert_close(attention(x), gpt2.h[0].attn(x)[0])
    gpt2.h[0].attn.load_state_dict(attention.state_dict())  # and back


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_parts_of_llama_match(name):
    model = llama_like(name)
    x = torch.randn(2, 7, 32)
    layer = model.layers[0]
    mlp = modules.SwiGLUMLP(32, 48)
    mlp.load_state_dict(layer.mlp.state_dict())
    torch.testing.assert_close(mlp(x), layer.mlp(x))
    norm = modules.RMSNorm(32, eps=layer.input_layernorm.variance_epsilon)
    norm.load_state_dict(layer.input_layernorm.state_dict())
    torch.testing.assert_close(norm(x), layer.input_layernorm(x))
    attention = modules.CausalSelfAttention(
        32,
        4,
        n_kv_head=2,
        head_size=16,
        bias=False,
        qk_norm=name == "qwen3",
        layout="llama",
    )
    attention.load_state_dict(layer.self_attn.state_dict())
    cos, sin = model.rotary_emb(x, torch.arange(7)[None])
    expected = layer.self_attn(x, position_embeddings=(cos, sin), attention_mask=None)[0]
    rope = [table[0, :, :8] for table in (cos, sin)]
    torch.testing.assert_close(attention(x, rope=rope), expected)


# --- errors


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: modules.LayerNorm((2, 8)), r"one axis, got \(2, 8\)"),
        (lambda: modules.RMSNorm((2, 8)), r"one axis, got \(2, 8\)"),
        (lambda: modules.GELUMLP(8, 8, layout="gpt"), "unknown layout 'gpt'; did you mean 'gpt2'"),
        (lambda: modules.CausalSelfAttention(8, 3), "n_head must divide d_model 8, got 3"),
        (lambda: modules.CausalSelfAttention(8, 0), "n_head must be at least 1, got 0"),
        (lambda: modules.CausalSelfAttention(8, 2, n_kv_head=0), "n_kv_head must be at least 1"),
        (lambda: modules.CausalSelfAttention(8, 2, head_size=0), "head_size must be at least 1"),
        (lambda: modules.CausalSelfAttention(8, 4, n_kv_head=3), "must divide n_head 4, got 3"),
        (lambda: modules.CausalSelfAttention(8, 2, qk_norm=True), "qk_norm needs layout 'llama'"),
        (lambda: modules.CausalSelfAttention(512, 1), "head size must be from 1 to 256, got 512"),
        (lambda: modules.CausalSelfAttention(0, 2), "d_model must be at least 1, got 0"),
        (lambda: modules.GELUMLP(8, 0), "d_hidden must be at least 1, got 0"),
        (lambda: modules.SwiGLUMLP(-8, 8), "d_model must be at least 1, got -8"),
        (lambda: modules.LinearCrossEntropyLoss(8, 0), "vocab_size must be at least 1, got 0"),
    ],
)
def test_bad_sizes_raise(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("name", "sizes", "options", "message"),
    [
        ("LayerNorm", (8,), {"eps": -1.0}, "eps must be at least 0, got -1.0"),
        ("RMSNorm", (8,), {"eps": float("nan")}, "eps must be at least 0, got nan"),
        ("RMSNorm", (8,), {"eps": "small"}, "eps must be float | None, got 'small'"),
        ("GELUMLP", (8, 8), {"approximate": "sigmoid"}, "unknown approximate 'sigmoid'"),
        ("GELUMLP", (8, 8), {"recompute": "yes"}, "recompute must be bool, got 'yes'"),
        ("GELUMLP", (8.0, 8), {}, "d_model must be int, got 8.0"),
        ("CausalSelfAttention", (8, 2), {"window": 0}, "window must be None or at least 1"),
        ("CausalSelfAttention", (8, 2), {"window": True}, "window must be int | None, got True"),
        ("CausalSelfAttention", (8, 2), {"softcap": -1.0}, "softcap must be None, 0"),
        ("CausalSelfAttention", (8, 2), {"dropout_p": 1.0}, "dropout_p must be in [0, 1)"),
        ("LinearCrossEntropyLoss", (8, 9), {"reduction": "meen"}, "unknown reduction 'meen'"),
        ("LinearCrossEntropyLoss", (8, 9), {"z_loss": -1.0}, "z_loss must be from 0"),
        ("LinearCrossEntropyLoss", (8, 9), {"label_smoothing": 2.0}, "label_smoothing must be"),
        ("LinearCrossEntropyLoss", (8, 9), {"ignore_index": None}, "ignore_index must be int"),
    ],
)
def test_constructors_check_their_options(name, sizes, options, message):
    with pytest.raises(ValueError, match=f"^{name}: {re.escape(message)}"):
        getattr(modules, name)(*sizes, **options)


def test_a_constructor_with_dropout_leaves_the_random_numbers_as_they_were():
    """The weights after it must not depend on dropout."""
    torch.manual_seed(0)
    expected = modules.CausalSelfAttention(8, 2), torch.rand(1)
    torch.manual_seed(0)
    found = modules.CausalSelfAttention(8, 2, dropout_p=0.5), torch.rand(1)
    assert torch.equal(found[0].c_proj.weight, expected[0].c_proj.weight)
    assert torch.equal(found[1], expected[1])
