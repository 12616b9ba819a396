"""The model against Hugging Face's GPT-2, its padding, its packing of heads."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tritium.model import GPT, GPTConfig
from tritium.model.generate import KVCache

SMALL = GPTConfig(n_layer=2, n_head=4, d_model=32, vocab_size=90, context_tokens=24)
LLAMA = replace(SMALL, position="rotary", norm="rms", mlp="swiglu", bias=False)


def random_model(config=SMALL, seed=0) -> GPT:
    """A model whose gains and biases are random too: fresh ones would hide a bias that is never added."""
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    return model


def hugging_face(model: GPT):
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
        value = value[: config.vocab_size] if name == "wte.weight" else value
        matrix = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        weights["transformer." + name] = (value.t() if matrix else value).double()
    missing, unexpected = other.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    other.tie_weights()
    return other


@pytest.mark.plain
def test_logits_loss_and_gradients_are_those_of_hugging_face():
    model = random_model().double()
    other = hugging_face(model)
    tokens = torch.randint(SMALL.vocab_size, (3, 24), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(tokens), other(tokens).logits, rtol=1e-9, atol=1e-9)

    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    # Not its own loss: that is rounded to float32.
    expected = F.cross_entropy(other(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        model.wte.weight.grad[:90], other.transformer.wte.weight.grad, rtol=1e-8, atol=1e-10
    )
    torch.testing.assert_close(
        model.h[0].ln_1.bias.grad, other.transformer.h[0].ln_1.bias.grad, rtol=1e-8, atol=1e-10
    )
    torch.testing.assert_close(
        model.h[1].attn.c_attn.weight.grad,
        other.transformer.h[1].attn.c_attn.weight.grad.t(),
        rtol=1e-8,
        atol=1e-10,
    )


@pytest.mark.parametrize("config", [SMALL, LLAMA])
def test_runs_forward_and_backward_on_this_device(config, device):
    model = random_model(config).to(device)
    tokens = torch.randint(90, (2, 12), device=device)
    model(tokens, tokens).backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all()
        for parameter in model.parameters()
    )


@pytest.mark.plain
def test_names_are_those_of_the_checkpoint():
    names = {
        name
        for name, _ in GPT(
            GPTConfig(n_layer=1, n_head=1, d_model=8, vocab_size=8, context_tokens=4)
        ).named_parameters()
    }
    block = [f"{part}.{kind}" for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj") for kind in
             ("weight", "bias")]  # fmt: skip
    assert names == {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"} | {
        "h.0." + name for name in block
    }


def test_without_biases_it_is_the_model_whose_biases_are_zero(device):
    sizes = {"n_layer": 2, "n_head": 2, "d_model": 16, "vocab_size": 50, "context_tokens": 8}
    model, biased = (
        GPT(GPTConfig(**sizes, bias=False)).to(device),
        GPT(GPTConfig(**sizes)).to(device),
    )
    names = {name for name, _ in model.named_parameters()}
    assert {name for name, _ in biased.named_parameters()} - names == {
        name for name, _ in biased.named_parameters() if name.endswith("bias")
    }
    biased.load_state_dict(model.state_dict(), strict=False)  # fresh biases are zero
    tokens = torch.randint(50, (2, 8), device=device)
    losses = model(tokens, tokens), biased(tokens, tokens)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for loss in losses:
        loss.backward()
    theirs = dict(biased.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-7)


@pytest.mark.plain
def test_padding_never_gets_probability():
    model = random_model()
    assert model.wte.weight.shape[0] == 128
    with torch.no_grad():
        model.wte.weight[90:] = 1e4  # would win every softmax
    tokens = torch.randint(90, (2, 8))
    assert model(tokens).shape == (2, 8, 90)
    loss = model(tokens, tokens)
    assert loss < 50
    loss.backward()
    assert torch.equal(model.wte.weight.grad[90:], torch.zeros(38, 32))


@pytest.mark.plain
@pytest.mark.parametrize("n_kv_head", [None, 2])
def test_what_llama_changed_is_what_hugging_face_computes(n_kv_head):
    transformers = pytest.importorskip("transformers")
    config = replace(LLAMA, n_kv_head=n_kv_head)
    model = random_model(config).double()
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
    for index, block in enumerate(model.h):
        kv = config.kv_heads * config.head_size
        q, k, v = block.attn.c_attn.weight.split([config.d_model, kv, kv])
        attention = {"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": block.attn.c_proj.weight}
        mlp = {
            "gate_proj": block.mlp.c_gate,
            "up_proj": block.mlp.c_fc,
            "down_proj": block.mlp.c_proj,
        }
        norms = {"input_layernorm": block.ln_1, "post_attention_layernorm": block.ln_2}
        for name, weight in {
            **{f"self_attn.{name}": weight for name, weight in attention.items()},
            **{f"mlp.{name}": part.weight for name, part in mlp.items()},
            **{name: part.weight for name, part in norms.items()},
        }.items():
            weights[f"model.layers.{index}.{name}.weight"] = weight
    missing, unexpected = other.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    other.tie_weights()
    tokens = torch.randint(config.vocab_size, (3, 24), generator=torch.Generator().manual_seed(1))
    # Its tables of angles are float32.
    torch.testing.assert_close(model(tokens), other(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.plain
def test_grouped_heads_are_full_heads_that_repeat():
    grouped = random_model(replace(SMALL, n_kv_head=2))
    full = GPT(SMALL)
    weights = grouped.state_dict()
    for layer in range(2):
        for kind in ("weight", "bias"):
            name = f"h.{layer}.attn.c_attn.{kind}"
            q, k, v = weights[name].split([32, 16, 16])
            k, v = (
                part.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
                for part in (k, v)
            )
            weights[name] = torch.cat([q, k, v])
    full.load_state_dict(weights)
    tokens = torch.randint(90, (2, 10))
    torch.testing.assert_close(grouped(tokens), full(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.plain
@pytest.mark.parametrize("config", [SMALL, LLAMA])
def test_documents_of_a_batch_are_what_they_are_alone(config, device):
    """Logits, and gradients of a loss over all of them."""
    model = random_model(config).to(device)
    tokens = torch.randint(SMALL.vocab_size, (2, 12), device=device)
    lengths = (5, 0, 7, 1, 11)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    got = model(tokens, cu_seqlens=cu_seqlens)
    alone = [
        model(document[None])[0] for document in tokens.flatten().split(lengths) if len(document)
    ]
    torch.testing.assert_close(got.flatten(0, 1), torch.cat(alone), rtol=1e-4, atol=1e-5)
    targets = torch.randint(SMALL.vocab_size, (2, 12), device=device)
    grads = torch.autograd.grad(
        model(tokens, targets, cu_seqlens=cu_seqlens), list(model.parameters())
    )
    losses = [
        model(document[None], target[None]) * len(document) / 24
        for document, target in zip(
            tokens.flatten().split(lengths), targets.flatten().split(lengths), strict=True
        )
        if len(document)
    ]
    for a, b in zip(grads, torch.autograd.grad(sum(losses), list(model.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_documents_and_a_cache_are_an_error():
    model, tokens = random_model(), torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="GPT: expected cu_seqlens or a cache, got both"):
        model(tokens, cu_seqlens=torch.tensor([0, 4], dtype=torch.int32), cache=KVCache(SMALL))


@pytest.mark.parametrize("config", [SMALL, LLAMA])
def test_compiles_as_one_graph(config):
    model = random_model(config)
    tokens = torch.randint(90, (2, 12))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, tokens), model(tokens, tokens))


@pytest.mark.plain
def test_training_goes_as_with_a_plain_head(device, monkeypatch):
    """Thirty steps to the same losses, to float32's rounding."""

    def losses():
        torch.manual_seed(0)
        model = GPT(SMALL).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        tokens = torch.randint(
            SMALL.vocab_size, (4, 25), generator=torch.Generator().manual_seed(1)
        ).to(device)
        for _ in range(30):
            loss = model(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()

    fused = list(losses())
    monkeypatch.setattr(
        "tritium.model.gpt.linear_cross_entropy",
        lambda x, weight, target: F.cross_entropy(F.linear(x, weight), target),
    )
    assert fused[-1] < 0.95 * fused[0]
    torch.testing.assert_close(fused, list(losses()), rtol=1e-5, atol=0)


@pytest.mark.plain
def test_two_processes_have_the_gradients_of_one(tmp_path):
    """Replicated and sharded; the head's weight, which is the embedding's too, is a plain tensor inside."""
    program = [sys.executable, str(Path(__file__).parent / "two_processes.py")]
    both = [
        subprocess.Popen(
            [*program, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


@pytest.mark.plain
def test_too_many_tokens_are_an_error():
    with pytest.raises(ValueError, match="context_tokens is 24, got 25 tokens"):
        random_model()(torch.zeros(1, 25, dtype=torch.int64))
