"""Patched models of transformers compute what they did before, and unpatch restores them."""

import copy
import functools
import inspect
import os
import pickle
import subprocess
import sys
import types

import pytest
import torch
import torch._dynamo.testing
from torch import nn

transformers = pytest.importorskip("transformers")

from tritium.kernels.integrations import (  # noqa: E402
    _transformers_attention,
    _transformers_forward,
)
from tritium.kernels.integrations.transformers import (  # noqa: E402
    FAMILIES,
    patch,
    patch_classes,
    unpatch,
    unpatch_classes,
)

pytestmark = pytest.mark.plain

V = 97
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": V}
DROPOUTS = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GROUPED = {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
OPTIONS = {
    "gpt2": {"n_positions": 64, **DROPOUTS},
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 5},
    "qwen2": {
        **GROUPED,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": {**GROUPED, "head_dim": 8},
}


def build(name: str, **options) -> nn.Module:
    """Make a small model in evaluation mode, with weights so large that errors are visible."""
    config = transformers.AutoConfig.for_model(name, **SIZES, **IDS, **OPTIONS[name] | options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(3, V, (3, 12))


@pytest.fixture
def left_padding() -> torch.Tensor:
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :4] = 0
    mask[1, :1] = 0
    return mask


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return grads


def inputs_of(layout: str, tokens: torch.Tensor, left_padding: torch.Tensor) -> dict:
    if layout == "plain":
        return {}
    if layout == "packed":
        position = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2]]).expand(3, 12)
        return {"position_ids": position, "use_cache": False}
    mask = left_padding if layout == "left" else left_padding.flip(1)
    return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize("layout", ["plain", "packed", "left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_match(name, layout, tokens, left_padding):
    model = build(name)
    inputs = inputs_of(layout, tokens, left_padding)
    expected = model(tokens, **inputs).logits
    got = patch(model)(tokens, **inputs).logits
    real = inputs.get("attention_mask", torch.ones_like(tokens)).bool()
    torch.testing.assert_close(got[real], expected[real])


@pytest.mark.parametrize("layout", ["plain", "left"])
@torch.no_grad()
def test_scaling_of_a_layer_is_used(layout, tokens, left_padding):
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.8
    inputs = {"attention_mask": left_padding} if layout == "left" else {}
    real = left_padding.bool() if layout == "left" else torch.ones_like(tokens).bool()
    expected = model(tokens, **inputs).logits[real]
    torch.testing.assert_close(patch(model)(tokens, **inputs).logits[real], expected)
    assert not torch.allclose(patch(build("llama"))(tokens, **inputs).logits[real], expected)


@torch.no_grad()
def test_cu_seqlens_of_flash_attention_separate_documents(tokens):
    model = patch(build("llama"))
    row = tokens.view(1, 36)
    position = torch.arange(36)[None] % 12
    expected = model(row, position_ids=position, use_cache=False).logits
    cu_seqlens = torch.tensor([0, 12, 24, 36])
    # With a cache transformers does not detect documents.
    got = model(row, position_ids=position, use_cache=True, cu_seq_lens_q=cu_seqlens).logits
    torch.testing.assert_close(got, expected)


@torch.no_grad()
def test_the_kernels_are_called(tokens, monkeypatch):
    called = []

    def spy(*args, **kwargs):
        called.append("attention")
        return torch.zeros(3, 12, 4, 8)

    monkeypatch.setattr(_transformers_attention, "causal_attention", spy)
    patch(build("gpt2"))(tokens)
    assert called == ["attention"] * 2


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen2"])
def test_generate_gives_the_same_tokens(name, cache, tokens, left_padding):
    model = build(name)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": left_padding}
    if cache == "static":
        options["cache_implementation"] = "static"
    expected = model.generate(tokens, **options)
    assert torch.equal(patch(model).generate(tokens, **options), expected)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_several_new_tokens_with_padding_match(name, tokens, left_padding):
    """Two forwards with one cache, with padding between tokens, with and without gradients."""
    model = build(name)
    left_padding[2, 8] = 0

    def run() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        first = model(tokens[:, :7], attention_mask=left_padding[:, :7], use_cache=True)
        cache = first.get("cache", first.get("past_key_values"))
        key = "cache" if "cache" in first else "past_key_values"
        rest = {"attention_mask": left_padding, key: cache}
        y = model(tokens[:, 7:], **rest).logits[left_padding[:, 7:].bool()]
        grad = None
        if torch.is_grad_enabled():
            y.logsumexp(-1).sum().backward()
            grad = model.get_input_embeddings().weight.grad.clone()
            model.zero_grad(set_to_none=True)
        return y.detach(), grad

    expected = run()
    patch(model)
    for got, other in zip(run(), expected, strict=True):
        torch.testing.assert_close(got, other, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(run()[0], expected[0])


# --- the loss


LOSSES = {
    "mean": {},
    "num_items_in_batch": {"num_items_in_batch": torch.tensor(31)},
    "ignore_index": {"ignore_index": 7},
    "shift_labels": {"shift_labels": torch.arange(36).view(3, 12)},
}


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_loss_and_gradients_match_without_logits(name, options, tokens):
    model = build(name).train()
    labels = tokens.clone()
    labels[:, 3] = options.get("ignore_index", -100)
    expected = model(tokens, labels=labels, **options).loss
    expected.backward()
    expected_grads = gradients(model)
    output = patch(model)(tokens, labels=labels, **options)
    output.loss.backward()
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected)
    for key, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected_grads[key], msg=lambda text, key=key: key + text)


def test_the_loss_uses_the_bias_of_the_head(tokens):
    model = build("llama").train()
    model.lm_head.bias = nn.Parameter(torch.linspace(-2, 2, V))
    expected = model(tokens, labels=tokens).loss
    torch.testing.assert_close(patch(model)(tokens, labels=tokens).loss, expected)


def test_logits_are_returned_on_request_and_in_evaluation(tokens):
    model = patch(build("llama")).train()
    assert model(tokens).logits.shape == (3, 12, V)
    assert model(tokens, labels=tokens, skip_logits=False).logits.shape == (3, 12, V)
    assert model(tokens, labels=tokens, return_dict=False)[0].shape == ()
    model.eval()
    assert model(tokens, labels=tokens).logits.shape == (3, 12, V)
    output = model(tokens, labels=tokens, skip_logits=True)
    assert output.logits is None
    torch.testing.assert_close(output.loss, model(tokens, labels=tokens).loss)


@pytest.mark.parametrize("value", ["no", 0, torch.tensor(False)], ids=["text", "int", "tensor"])
def test_skip_logits_must_be_a_bool(value, tokens):
    model = patch(build("gpt2")).train()
    with pytest.raises(ValueError, match="GPT2LMHeadModel: skip_logits must be None, True or Fals"):
        model(tokens, labels=tokens, skip_logits=value)


def test_logits_to_keep_needs_labels_for_the_kept_positions(tokens):
    model = patch(build("gpt2")).train()
    targets = tokens[:, 3:]
    full = model(tokens, labels=tokens, shift_labels=tokens).loss
    kept = model(tokens, labels=tokens, shift_labels=targets, logits_to_keep=9).loss
    assert kept.shape == full.shape == ()
    keep = torch.arange(3, 12)
    again = model(tokens, labels=tokens, shift_labels=targets, logits_to_keep=keep).loss
    assert torch.equal(kept, again)
    with pytest.raises(ValueError, match=r"labels must be \(3, 9\).*got \(3, 12\)"):
        model(tokens, labels=tokens, logits_to_keep=9)


def test_a_loss_function_of_the_user_is_called(tokens):
    model = patch(build("gpt2")).train()
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.new_tensor(5.0)
    assert model(tokens, labels=tokens).loss == 5


# --- training


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradient_checkpointing_gives_the_same_gradients(name, use_reentrant, tokens):
    model = patch(build(name)).train()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    expected = gradients(model)
    unpatch(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    patch(model)
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    for key, grad in gradients(model).items():
        assert torch.equal(grad, expected[key]), key


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_autocast_matches_in_bfloat16(name, tokens):
    model = build(name).train()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(tokens, labels=tokens).loss
        got = patch(model)(tokens, labels=tokens).loss
    got.backward()
    torch.testing.assert_close(got.bfloat16(), expected.bfloat16())
    assert all(grad.isfinite().all() for grad in gradients(model).values())


@pytest.mark.parametrize("layout", ["plain", "left"])
@torch.no_grad()
def test_attention_dropout_applies_in_training_only(layout, tokens, left_padding):
    model = patch(build("llama", attention_dropout=0.5))
    inputs = inputs_of(layout, tokens, left_padding)
    assert torch.equal(model(tokens, **inputs).logits, model(tokens, **inputs).logits)
    model.train()
    assert not torch.equal(model(tokens, **inputs).logits, model(tokens, **inputs).logits)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_decoding_with_a_static_cache_matches(tokens, left_padding):
    """Chunks of 7 and 5 tokens, with padding in the first."""
    model = patch(build("llama"))
    compiled = torch.compile(model, backend="eager", dynamic=False)
    expected = model(tokens, attention_mask=left_padding).logits
    cache = transformers.StaticCache(config=model.config, max_batch_size=3, max_cache_len=20)
    names = inspect.signature(model.forward).parameters
    options = {"cache" if "cache" in names else "past_key_values": cache}
    for start, end in ((0, 7), (7, 12)):
        if "cache_position" in names:
            options["cache_position"] = torch.arange(start, end)
        mask = left_padding[:, :end]
        position = torch.arange(start, end)[None]
        got = compiled(
            tokens[:, start:end], attention_mask=mask, position_ids=position, **options
        ).logits
        real = mask[:, start:].bool()
        torch.testing.assert_close(got[real], expected[:, start:end][real])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "packed", "left"])
@torch.no_grad()
def test_one_graph_under_compile(layout, tokens, left_padding):
    model = patch(build("llama"))
    inputs = inputs_of(layout, tokens, left_padding)
    real = inputs.get("attention_mask", torch.ones_like(tokens)).bool()
    expected = model(tokens, **inputs).logits[real]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, **inputs).logits[real], expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_one_compilation_serves_all_shapes(mode):
    model = patch(build("gpt2")).train(mode == "train")
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    for shape in ((2, 12), (3, 17), (5, 9)):
        tokens = torch.randint(3, V, shape)
        labels = {"labels": tokens} if mode == "train" else {}
        found = compiled(input_ids=tokens, **labels)
        expected = model(input_ids=tokens, **labels)
        name = "loss" if mode == "train" else "logits"
        torch.testing.assert_close(found[name], expected[name])
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("name", "data", "steps"),
    [
        ("gpt2", "packed", 4),
        *(
            pytest.param(name, data, 50, marks=pytest.mark.slow)
            for name in ("gpt2", "llama")
            for data in ("padded", "packed")
        ),
    ],
)
def test_trainer_gives_the_same_losses(name, data, steps, tmp_path):
    """Steps of two micro-batches."""
    pytest.importorskip("accelerate")
    torch.manual_seed(1)
    lengths = torch.randint(4, 24, (200,)).tolist()
    rows = [{"input_ids": torch.randint(3, V, (length,)).tolist()} for length in lengths]

    def pad(rows: list[dict]) -> dict[str, torch.Tensor]:
        """Pad every second sequence on the left, the others on the right."""
        width = max(len(row["input_ids"]) for row in rows)
        batch = {"input_ids": torch.zeros(len(rows), width, dtype=torch.long)}
        batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        for i, row in enumerate(rows):
            ids = torch.tensor(row["input_ids"])
            place = slice(width - len(ids), width) if i % 2 else slice(0, len(ids))
            batch["input_ids"][i, place] = batch["labels"][i, place] = ids
            batch["attention_mask"][i, place] = 1
        return batch

    def train(is_patched: bool) -> torch.Tensor:
        model = build(name)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        losses = []

        class Recorder(transformers.Trainer):  # the log rounds losses to 4 digits in 4.56
            def training_step(self, *args, **kwargs):
                losses.append(super().training_step(*args, **kwargs).item())
                return torch.tensor(losses[-1])

        trainer = Recorder(
            model=patch(model) if is_patched else model,
            args=arguments,
            train_dataset=rows,
            data_collator=pad if data == "padded" else transformers.DataCollatorWithFlattening(),
        )
        trainer.train()
        return torch.tensor(losses, dtype=torch.float64).view(steps, 2).sum(1)

    difference = (train(True) - train(False)).abs().max().item()
    print(f"{name}, {data}: largest difference of a loss {difference:.1e} nats")
    assert difference <= 1e-5


# --- leaving


def layout_of(model: nn.Module) -> list:
    return [(name, type(m), sorted(vars(m))) for name, m in model.named_modules()]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_unpatch_restores_the_model_bitwise(name, tokens, left_padding):
    model = build(name)
    before = layout_of(model), model.config.to_dict(), model.config._attn_implementation
    weights = copy.deepcopy(model.state_dict())
    expected = model(tokens, attention_mask=left_padding).logits
    patch(model)
    assert model.config.to_dict() == before[1]
    assert model.state_dict().keys() == weights.keys()
    unpatch(model)
    assert before == (
        layout_of(model),
        model.config.to_dict(),
        model.config._attn_implementation,
    )
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(tokens, attention_mask=left_padding).logits, expected)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_copies_are_patched_and_can_be_unpatched(name, tokens):
    model = build(name)
    original = model(tokens).logits
    expected = patch(model)(tokens).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert torch.equal(other(tokens).logits, expected)
        assert torch.equal(unpatch(other)(tokens).logits, original)


@pytest.mark.slow
def test_a_new_process_can_unpickle_a_patched_model(tokens, tmp_path):
    """It imports only what the pickle names."""
    model = patch(build("gpt2")).eval()
    file = tmp_path / "model.pickle"
    file.write_bytes(pickle.dumps((model, tokens)))
    code = (
        "import pickle, sys; model, tokens = pickle.load(open(sys.argv[1], 'rb'));"
        "pickle.dump(model(tokens).logits.detach(), open(sys.argv[1], 'wb'))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(file)], env=environment, check=True)
    torch.testing.assert_close(pickle.loads(file.read_bytes()), model(tokens).logits)


@torch.no_grad()
def test_parts_can_be_chosen_and_patched_again(tokens):
    model = build("gpt2")
    expected = model(tokens).logits
    patch(model, ["norm"])
    assert model.config._attn_implementation == "sdpa"
    assert (
        type(model.transformer.h[0].mlp).forward is type(build("gpt2").transformer.h[0].mlp).forward
    )
    patch(model)
    assert model.config._attn_implementation == "tritium"
    unpatch(model)
    assert torch.equal(model(tokens).logits, expected)
    with pytest.raises(ValueError, match="expected a patched model"):
        unpatch(model)


def test_patch_classes_patches_models_that_are_built(tmp_path):
    build("llama").save_pretrained(tmp_path)
    patch_classes(["llama"])
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert model.config._attn_implementation == "tritium"
        assert build("llama", attn_implementation="eager").config._attn_implementation == "eager"
        assert build("gpt2").config._attn_implementation == "sdpa"
        model.save_pretrained(tmp_path / "again")
    finally:
        unpatch_classes()
    assert "tritium" not in (tmp_path / "again" / "config.json").read_text()
    assert build("llama").config._attn_implementation == "sdpa"
    assert unpatch(model).config._attn_implementation == "sdpa"


# --- layers of other libraries


def test_a_wrapped_layer_is_called(tokens):
    """An adapter in place of a layer, and a hook on a layer, keep their effect."""
    model = patch(build("gpt2"))
    mlp = model.transformer.h[0].mlp

    class Adapter(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) + 1

    calls = []
    before = mlp(torch.zeros(1, 2, 32))
    mlp.c_proj = Adapter(mlp.c_proj)
    torch.testing.assert_close(mlp(torch.zeros(1, 2, 32)), before + 1)
    model.transformer.h[0].ln_2.register_forward_hook(lambda *_: calls.append("norm"))
    model.lm_head.register_forward_hook(lambda *_: calls.append("head"))
    model.train()(tokens, labels=tokens)
    assert calls == ["norm", "head"]


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("gpt2", "transformer.h.0.ln_2"),
        ("llama", "model.layers.0.post_attention_layernorm"),
    ],
)
def test_a_hook_on_a_norm_gets_its_output_and_can_change_it(kind, path, tokens):
    model = build(kind)
    model.get_submodule(path).register_forward_hook(lambda module, inputs, y: 2 * y)
    with torch.no_grad():
        expected = model(tokens).logits
        found = patch(model)(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_other_heads_keep_their_loss(tokens):
    config = transformers.LlamaConfig(**SIZES, **GROUPED, **IDS, num_labels=3)
    model = transformers.LlamaForSequenceClassification(config)
    labels = torch.tensor([0, 1, 2])
    expected = model(tokens, labels=labels).loss
    torch.testing.assert_close(patch(model)(tokens, labels=labels).loss, expected)


# --- what is not supported


def with_attribute(model: nn.Module, path: str, name: str, value: object) -> nn.Module:
    setattr(model.get_submodule(path), name, value)
    return model


def with_buffer(model: nn.Module, path: str, name: str, value: torch.Tensor) -> nn.Module:
    model.get_submodule(path).register_buffer(name, value)
    return model


class OwnGPT2(transformers.GPT2LMHeadModel):
    pass


class OwnMLP(type(build("gpt2").transformer.h[0].mlp)):
    pass


def with_own_mlp() -> nn.Module:
    model = build("gpt2")
    model.transformer.h[0].mlp.__class__ = OwnMLP
    return model


def with_replaced_forward() -> nn.Module:
    model = build("gpt2")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    model.forward = types.MethodType(lambda self, *args: None, model)
    return model


UNSUPPORTED = {
    "not a model": (lambda: nn.Linear(2, 2), "expected a PreTrainedModel, got Linear"),
    "family": (
        lambda: transformers.OPTModel(
            transformers.OPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        ),
        "OPTModel: unknown model type 'opt'",
    ),
    "own class": (lambda: OwnGPT2(build("gpt2").config), "OwnGPT2 must be a class of"),
    "own module": (with_own_mlp, "expected GPT2MLP, got the subclass OwnMLP"),
    "own forward": (with_replaced_forward, "expected the forward of its class"),
    "scale by layer": (
        lambda: build("gpt2", scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx must be False, got True",
    ),
    "reorder": (
        lambda: build("gpt2", reorder_and_upcast_attn=True),
        "reorder_and_upcast_attn must be False, got True",
    ),
    "cross attention": (
        lambda: build("gpt2", add_cross_attention=True),
        "unknown attribute 'crossattention'",
    ),
    "activation": (
        lambda: build("gpt2", activation_function="relu"),
        "GPT2MLP 'transformer.h.0.mlp': unknown activation 'ReLU'",
    ),
    "activation of llama": (
        lambda: build("llama", hidden_act="gelu"),
        "LlamaMLP 'model.layers.0.mlp': unknown activation 'GELUActivation'",
    ),
    "attribute": (
        lambda: with_attribute(build("llama"), "model.layers.1.self_attn", "sinks", 1),
        "LlamaAttention 'model.layers.1.self_attn': unknown attribute 'sinks'",
    ),
    "buffer": (
        lambda: with_buffer(build("llama"), "model.layers.1.self_attn", "sinks", torch.ones(4)),
        "LlamaAttention 'model.layers.1.self_attn': unknown attribute 'sinks'",
    ),
    "axes of a norm": (
        lambda: with_attribute(build("gpt2"), "transformer.ln_f", "normalized_shape", (4, 8)),
        r"expected one normalized axis, got \(4, 8\)",
    ),
    "bidirectional": (
        lambda: with_attribute(build("llama"), "model.layers.0.self_attn", "is_causal", False),
        "is_causal must be True, got False",
    ),
}


@pytest.mark.parametrize(("make", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_an_unsupported_model_raises_and_stays_as_it_was(make, message):
    model = make()
    before = layout_of(model)
    with pytest.raises(ValueError, match=message):
        patch(model)
    assert layout_of(model) == before


def test_a_module_keeps_its_reference_to_its_forward_if_a_later_module_raises():
    """transformers 4.56 leaves such references."""
    model = build("gpt2")
    first, last = model.transformer.h[0].mlp, model.transformer.h[1].mlp
    first.forward, last.scale = first.forward, 2
    with pytest.raises(ValueError, match="unknown attribute 'scale'"):
        patch(model)
    assert "forward" in vars(first)
    del last.scale
    patch(model)
    assert "forward" not in vars(first)


def test_each_forward_has_a_patched_class_of_its_own():
    forwards = (_transformers_forward.gpt2_mlp_forward, _transformers_forward.llama_mlp_forward)
    classes = [_transformers_forward.patched_class(OwnMLP, forward) for forward in forwards]
    assert classes[0] is not classes[1]
    assert classes[0] is _transformers_forward.patched_class(OwnMLP, forwards[0])


def test_a_patched_model_stays_patched_if_patching_again_raises():
    model = patch(build("gpt2"))
    model.transformer.h[0].mlp.scale = 2
    before = layout_of(model)
    with pytest.raises(ValueError, match="unknown attribute 'scale'"):
        patch(model)
    assert layout_of(model) == before


def test_unpatch_of_a_derived_class_raises():
    model = patch(build("gpt2"))
    block = model.transformer.h[0]
    block.__class__ = type("FSDPBlock", (type(block),), {})
    with pytest.raises(ValueError, match="got its subclass FSDPBlock; unpatch before fully_shard"):
        unpatch(model)


def test_unknown_parts_and_families_raise():
    with pytest.raises(ValueError, match="unknown part 'norms'; did you mean 'norm'"):
        patch(build("gpt2"), ["norms"])
    with pytest.raises(ValueError, match="parts must be a list of names, got 'norm'"):
        patch(build("gpt2"), "norm")
    with pytest.raises(ValueError, match="the part 'residual' needs 'norm'"):
        patch(build("gpt2"), ["mlp", "residual"])
    with pytest.raises(ValueError, match="unknown family 'lama'; did you mean 'llama'"):
        patch_classes(["lama"])
    with pytest.raises(ValueError, match="families must be a list of names, got 'llama'"):
        patch_classes("llama")
    with pytest.raises(ValueError, match="expected a patched model, got NoneType"):
        unpatch(None)


FORWARDS = {
    "output_attentions": ({"output_attentions": True}, "output_attentions=True is not supported"),
    "4-d mask": (
        {"attention_mask": torch.zeros(3, 1, 12, 12)},
        r"attention_mask must be \(B, T\).*got \(3, 1, 12, 12\)",
    ),
    "cross attention": (
        {"encoder_hidden_states": torch.zeros(3, 4, 32)},
        "encoder_hidden_states is not supported",
    ),
}


@pytest.mark.parametrize(("options", "message"), FORWARDS.values(), ids=FORWARDS)
def test_an_unsupported_forward_raises(options, message, tokens):
    with pytest.raises(NotImplementedError, match=message):
        patch(build("gpt2"))(tokens, **options)


def test_attention_weights_that_the_configuration_asks_for_raise(tokens):
    model = patch(build("gpt2", output_attentions=True))
    with pytest.raises(NotImplementedError, match="output_attentions=True is not supported"):
        model(tokens)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("head_mask", torch.ones(4)),
        ("output_attentions", True),
        ("s_aux", torch.zeros(4)),
        ("position_bias", torch.zeros(1, 4, 12, 12)),
        ("softcap", 30.0),
    ],
)
def test_unsupported_arguments_of_attention_raise(argument, value):
    model = patch(build("gpt2"))
    q = torch.zeros(3, 4, 12, 8)
    attention = functools.partial(
        _transformers_attention.attention, model.transformer.h[0].attn, q, q, q, None
    )
    with pytest.raises(NotImplementedError, match=f"GPT2Attention: {argument} is not supported"):
        attention(**{argument: value})
    attention(**{argument: None})


def test_a_window_with_padding_between_tokens_raises(tokens, left_padding):
    left_padding[2, 6] = 0
    with pytest.raises(NotImplementedError, match="a sliding window needs sequences without"):
        patch(build("mistral"))(tokens, attention_mask=left_padding)


@pytest.mark.parametrize("option", ["or_mask_function", "and_mask_function"])
def test_an_unknown_mask_raises(option, tokens):
    from transformers.masking_utils import create_causal_mask

    config = patch(build("llama")).config
    x = torch.zeros(3, 12, 32)
    names = {"inputs_embeds": x}
    parameters = inspect.signature(create_causal_mask).parameters
    if "input_embeds" in parameters:
        names = {"input_embeds": x, "cache_position": torch.arange(12)}
    cache = "cache" if "cache" in parameters else "past_key_values"
    with pytest.raises(NotImplementedError, match="attention must be causal"):
        create_causal_mask(
            config=config,
            attention_mask=None,
            **names,
            **{cache: None, option: lambda b, h, q, k: q >= 0},
        )


def test_a_mask_moves_to_another_device():
    mask = _transformers_attention.KeyMask(keys=3, real=torch.ones(2, 3, dtype=torch.bool))
    assert mask.to("meta").real.device.type == "meta"
    assert mask.to("meta").keys == 3
