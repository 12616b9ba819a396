"""The model, compared with Hugging Face's GPT-2 and Llama and with itself."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from tests.model.models import LLAMA, SMALL, random_model
from tritium.kernels.embedding import order_of
from tritium.model import GPT, GPTConfig
from tritium.model.generation import KVCache

EMBEDDING = sys.modules[order_of.__module__]._fwd
V = SMALL.vocab_size


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(1))


# --- Hugging Face


def load_hugging_face(other: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Load all weights of a Hugging Face model, whose head shares the embedding's weight."""
    missing, unexpected = other.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    other.tie_weights()


def hugging_face_gpt2(model: GPT):
    """Return Hugging Face's GPT-2 with the weights of `model`."""
    transformers = pytest.importorskip("transformers")
    config = model.config
    other = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.d_model,
            vocab_size=config.vocab_size,
            n_positions=config.context_tokens,
            attn_implementation="eager",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ).double()
    weights = {}
    for name, value in model.state_dict().items():
        if name == "wte.weight":
            value = value[: config.vocab_size]
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            value = value.t()  # the checkpoints store matrices as (in, out)
        weights["transformer." + name] = value
    load_hugging_face(other, weights)
    return other


def hugging_face_llama(model: GPT):
    """Return Hugging Face's Llama with the weights of `model`."""
    transformers = pytest.importorskip("transformers")
    config = model.config
    other = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=config.d_model,
            intermediate_size=config.d_feedforward,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.kv_heads,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.context_tokens,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            attn_implementation="eager",
        )
    ).double()
    weights = {
        "model.embed_tokens.weight": model.wte.weight[: config.vocab_size],
        "model.norm.weight": model.ln_f.weight,
    }
    kv_width = config.kv_heads * config.head_size
    for layer, block in enumerate(model.h):
        q, k, v = block.attn.c_attn.weight.split([config.d_model, kv_width, kv_width])
        of_block = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": block.attn.c_proj.weight,
            "mlp.gate_proj": block.mlp.c_gate.weight,
            "mlp.up_proj": block.mlp.c_fc.weight,
            "mlp.down_proj": block.mlp.c_proj.weight,
            "input_layernorm": block.ln_1.weight,
            "post_attention_layernorm": block.ln_2.weight,
        }
        for name, weight in of_block.items():
            weights[f"model.layers.{layer}.{name}.weight"] = weight
    load_hugging_face(other, weights)
    return other


@pytest.mark.plain
def test_logits_loss_and_gradients_match_hugging_face_gpt2():
    model = random_model().double()
    other = hugging_face_gpt2(model)
    tokens = random_tokens(3, 24)
    torch.testing.assert_close(model(tokens), other(tokens).logits, rtol=1e-9, atol=1e-9)

    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    # Hugging Face's own loss is rounded to float32.
    logits = other(tokens[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)

    theirs = other.transformer
    for got, expected in (
        (model.wte.weight.grad[:V], theirs.wte.weight.grad),
        (model.h[0].ln_1.bias.grad, theirs.h[0].ln_1.bias.grad),
        (model.h[1].attn.c_attn.weight.grad, theirs.h[1].attn.c_attn.weight.grad.t()),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.plain
@pytest.mark.parametrize("n_kv_head", [None, 2])
def test_logits_match_hugging_face_llama(n_kv_head):
    model = random_model(replace(LLAMA, n_kv_head=n_kv_head)).double()
    other = hugging_face_llama(model)
    tokens = random_tokens(3, 24)
    # RoPE's cosines and sines are float32 in both models.
    torch.testing.assert_close(model(tokens), other(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.plain
def test_parameter_names_are_those_of_the_gpt2_checkpoints():
    model = GPT(GPTConfig(n_layer=1, n_head=1, d_model=8, vocab_size=8, context_tokens=4))
    expected = {"wte.weight", "wpe.weight"}
    for module in (
        "h.0.ln_1",
        "h.0.attn.c_attn",
        "h.0.attn.c_proj",
        "h.0.ln_2",
        "h.0.mlp.c_fc",
        "h.0.mlp.c_proj",
        "ln_f",
    ):
        expected |= {f"{module}.weight", f"{module}.bias"}
    assert {name for name, _ in model.named_parameters()} == expected


# --- layers and sizes


@pytest.mark.parametrize("config", [SMALL, LLAMA], ids=["gpt2", "llama"])
def test_every_parameter_gets_a_finite_gradient_on_the_device(config, device):
    model = random_model(config).to(device)
    tokens = torch.randint(V, (2, 12), device=device)
    model(tokens, tokens).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_model_without_biases_matches_model_with_biases_of_zero(device):
    config = GPTConfig(n_layer=2, n_head=2, d_model=16, vocab_size=50, context_tokens=8)
    biased = GPT(config).to(device)  # initial biases are zero
    model = GPT(replace(config, bias=False)).to(device)
    biased.load_state_dict(model.state_dict(), strict=False)
    expected = dict(biased.named_parameters())
    names = {name for name, _ in model.named_parameters()}
    assert names == {name for name in expected if not name.endswith("bias")}

    tokens = torch.randint(50, (2, 8), device=device)
    loss = model(tokens, tokens)
    expected_loss = biased(tokens, tokens)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)

    loss.backward()
    expected_loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-7)


@pytest.mark.plain
def test_padding_rows_never_get_probability():
    model = random_model()
    assert model.wte.weight.shape[0] == 128
    with torch.no_grad():
        model.wte.weight[V:] = 1e4  # would win every softmax
    tokens = torch.randint(V, (2, 8))
    assert model(tokens).shape == (2, 8, V)
    loss = model(tokens, tokens)
    assert loss < 50
    loss.backward()
    assert not model.wte.weight.grad[V:].any()


@pytest.mark.plain
def test_grouped_heads_match_repeated_full_heads():
    grouped = random_model(replace(SMALL, n_kv_head=2))
    full = GPT(SMALL)
    weights = grouped.state_dict()
    for layer in range(SMALL.n_layer):
        for part in ("weight", "bias"):
            name = f"h.{layer}.attn.c_attn.{part}"
            q, k, v = weights[name].split([32, 16, 16])
            repeated = [
                x.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1) for x in (k, v)
            ]
            weights[name] = torch.cat([q, *repeated])
    full.load_state_dict(weights)
    tokens = torch.randint(V, (2, 10))
    torch.testing.assert_close(grouped(tokens), full(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.plain
def test_more_tokens_than_the_context_raise():
    with pytest.raises(ValueError, match="context_tokens is 24, got 25 tokens"):
        random_model()(torch.zeros(1, 25, dtype=torch.int64))


# --- packed documents


@pytest.mark.plain
@pytest.mark.parametrize(
    "config",
    [SMALL, LLAMA, replace(SMALL, position="sinusoidal", window=3)],
    ids=["gpt2", "llama", "sinusoidal_window"],
)
def test_packed_documents_match_separate_documents(config, device):
    model = random_model(config).to(device)
    parameters = list(model.parameters())
    lengths = (5, 0, 7, 1, 11)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    tokens = torch.randint(V, (2, 12), device=device)
    targets = torch.randint(V, (2, 12), device=device)
    documents = [
        (document[None], target[None])
        for document, target in zip(
            tokens.flatten().split(lengths), targets.flatten().split(lengths), strict=True
        )
        if len(document)
    ]

    logits = model(tokens, cu_seqlens=cu_seqlens).flatten(0, 1)
    expected = torch.cat([model(document)[0] for document, _ in documents])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)

    # A document's loss is a mean over its tokens.
    loss = model(tokens, targets, cu_seqlens=cu_seqlens)
    losses = [model(document, target) * target.numel() / 24 for document, target in documents]
    gradients = torch.autograd.grad(loss, parameters)
    expected = torch.autograd.grad(sum(losses), parameters)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.plain
def test_packed_documents_with_a_cache_raise():
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="GPT: expected cu_seqlens or a cache, got both"):
        random_model()(tokens, cu_seqlens=cu_seqlens, cache=KVCache(SMALL, 1))


@pytest.mark.plain
@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([0, 12, 24], "cu_seqlens must rise from 0 to the 30 tokens of the batch, got .*, 24]"),
        ([3, 30], "cu_seqlens must rise from 0 to the 30 tokens of the batch, got .3, 30]"),
        ([0, 20, 10, 30], "cu_seqlens must rise from 0 to the 30 tokens of the batch"),
        ([0, 30], "context_tokens is 24, got a document of 30 tokens; shorten the document"),
    ],
)
def test_documents_that_do_not_fit_raise(edges, message):
    cu_seqlens = torch.tensor(edges, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"^GPT: {message}"):
        random_model()(random_tokens(2, 15), cu_seqlens=cu_seqlens)


# --- the weight that the embedding and the head share


@pytest.fixture
def operators_on_the_cpu(monkeypatch):
    """Run the operators of the embedding also where PyTorch functions would replace them."""
    monkeypatch.setattr(EMBEDDING, "_composite_if", lambda *_: False)


def gradients(model, *arguments, **options) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    loss = model(*arguments, **options)
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.plain
@pytest.mark.usefixtures("operators_on_the_cpu")
@pytest.mark.parametrize("mode", ["none", "block"])
@pytest.mark.parametrize("config", [SMALL, LLAMA], ids=["gpt2", "llama"])
def test_shared_gradient_matches_that_of_two_lookups(config, mode, monkeypatch):
    """In float64, with documents and with activation checkpointing."""
    tokens = random_tokens(2, 12)
    cu_seqlens = torch.tensor([0, 5, 12, 24], dtype=torch.int32)
    model = GPT(config, recompute=mode)
    model.load_state_dict(random_model(config).state_dict())
    model.double()
    for options in ({}, {"cu_seqlens": cu_seqlens}):
        got = gradients(model, tokens, tokens.flip(1), **options)
        with monkeypatch.context() as patch:
            patch.setattr(EMBEDDING, "_composite_if", lambda *_: True)
            expected = gradients(model, tokens, tokens.flip(1), **options)
        for name, value in got.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("operators_on_the_cpu")
def test_order_of_the_tokens_changes_no_bit(device):
    model = random_model().to(device)
    model.compute_dtype = torch.bfloat16
    for block in model.h:
        block.to(torch.bfloat16)
    tokens = random_tokens(2, 12).to(device)
    order = order_of(tokens.cpu()).int().to(device)
    got = gradients(model, tokens, tokens, token_order=order)
    expected = gradients(model, tokens, tokens)
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert got["wte.weight"].dtype == torch.float32


@pytest.mark.plain
@pytest.mark.parametrize("backend", [pytest.param("aot_eager", marks=pytest.mark.slow), "inductor"])
def test_gradients_of_a_compiled_model_are_bitwise_equal_in_each_run(backend):
    """Inductor's own gradient of an embedding uses atomics, which add in any order."""
    model = random_model()
    tokens = torch.randint(8, (4, 24), generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    order = order_of(tokens)
    first = gradients(compiled, tokens, tokens, token_order=order)
    for _ in range(3):
        again = gradients(compiled, tokens, tokens, token_order=order)
        assert all(torch.equal(first[name], again[name]) for name in first)
    expected = gradients(model, tokens, tokens)
    for name, value in expected.items():
        torch.testing.assert_close(first["_orig_mod." + name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("options", "has_documents"),
    [
        pytest.param({}, False, marks=pytest.mark.slow),
        ({"tied_head": False}, True),
        ({"dropout": 0.1, "embedding_dropout": 0.1}, False),
    ],
    ids=str,
)
def test_compiled_gradients_have_no_operator_that_adds_with_atomics(options, has_documents):
    """Such an operator adds in any order on a GPU. The graph does not depend on the device."""
    torch._dynamo.reset()
    backward = []

    def keep(graph, _):
        backward.extend(f"{node.target} {node.args}" for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=keep
    )
    model = random_model(replace(SMALL, **options))
    tokens = random_tokens(2, 12)
    documents = {}
    if has_documents:
        documents["cu_seqlens"] = torch.tensor([0, 5, 12, 24], dtype=torch.int32)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled(tokens, tokens, token_order=order_of(tokens), **documents).backward()
    assert any("embedding_" in name for name in backward), backward
    for name in ("embedding_dense_backward", "index_put", "scatter", "index_add"):
        assert not [found for found in backward if name in found]


# --- compilation, training, several processes


@pytest.mark.plain
@pytest.mark.parametrize(
    "config", [SMALL, pytest.param(LLAMA, marks=pytest.mark.slow)], ids=["gpt2", "llama"]
)
def test_model_compiles_as_one_graph(config):
    model = random_model(config)
    tokens = torch.randint(V, (2, 12))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, tokens), model(tokens, tokens))


@pytest.mark.plain
def test_losses_and_logits_of_some_rows_match_the_forward(device):
    model = random_model(SMALL).to(device)
    tokens = random_tokens(2, 7).to(device)
    with torch.no_grad():
        y, head = model.hidden(tokens[:, :-1])
        rows = torch.tensor([1, 4, 11], device=device)
        logits = model(tokens[:, :-1]).flatten(0, 1)[rows]
        torch.testing.assert_close(model.logits(y[rows], head), logits)
        targets = tokens[:, 1:].flatten()[rows]
        expected = F.cross_entropy(logits, targets, reduction="none")
        torch.testing.assert_close(model.losses(y[rows], head, targets), expected)


@pytest.mark.plain
def test_thirty_steps_match_a_head_that_computes_all_logits(device, monkeypatch):
    def train() -> list[float]:
        torch.manual_seed(0)
        model = GPT(SMALL).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        tokens = random_tokens(4, 25).to(device)
        losses = []
        for _ in range(30):
            loss = model(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    losses = train()
    assert losses[-1] < 0.95 * losses[0]
    monkeypatch.setattr(
        "tritium.model.gpt.linear_cross_entropy",
        lambda x, weight, target, softcap, vocab_size, reduction: F.cross_entropy(
            F.linear(x, weight[:vocab_size]), target, reduction=reduction
        ),
    )
    torch.testing.assert_close(losses, train(), rtol=1e-5, atol=0)


@pytest.mark.plain
@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path):
    """DDP and FSDP2 must handle the weight that the embedding and the head share."""
    program = Path(__file__).with_name("two_processes.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), str(rank), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


def test_tokens_in_the_padding_rows_raise_on_the_cpu():
    config = GPTConfig(n_layer=1, n_head=1, d_model=8, vocab_size=50, context_tokens=4)
    model = GPT(config)
    assert config.padded_vocab_size > 50
    model(torch.tensor([[49, 0]]))
    for tokens in ([[50, 0]], [[0, config.padded_vocab_size - 1]]):
        with pytest.raises(IndexError, match="tokens must be below the vocabulary 50, got"):
            model(torch.tensor(tokens))
