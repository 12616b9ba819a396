"""Models of transformers and nanoGPT go in and come out with the same bits."""

import copy
import itertools
import json
import math
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tritium.errors import InputError
from tritium.model import GPT, PRESETS, GPTConfig
from tritium.model._families import FAMILIES
from tritium.model.config import DROPOUTS
from tritium.model.weights import tensors_of

pytestmark = pytest.mark.plain
transformers = pytest.importorskip("transformers")

DATA = Path(os.environ.get("TRITIUM_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
TRAINED = DATA / "mgm-gpt2"  # a real model, in pytorch_model.bin, with biases and masks as buffers
needs_trained = pytest.mark.skipif(
    not TRAINED.exists(), reason="needs mgm-gpt2 in ../shared/data or $TRITIUM_DATA"
)

GPT2 = {
    "n_layer": 2, "n_head": 4, "n_embd": 48, "n_inner": 100, "vocab_size": 77, "n_positions": 32,
    "layer_norm_epsilon": 3e-5, "resid_pdrop": 0.1, "embd_pdrop": 0.2, "attn_pdrop": 0.3,
}  # fmt: skip
LLAMA = {
    "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48,
    "intermediate_size": 100, "vocab_size": 77, "max_position_embeddings": 32, "rms_norm_eps": 3e-5,
    "rope_theta": 5e4, "head_dim": 8, "attention_dropout": 0.2,
}  # fmt: skip
OTHERS = {
    "gpt2": transformers.GPT2Config(**GPT2),
    "gpt2_untied": transformers.GPT2Config(**GPT2, tie_word_embeddings=False),
    "gpt2_gelu_exact": transformers.GPT2Config(**GPT2, activation_function="gelu"),
    "gpt2_relu2": transformers.GPT2Config(**GPT2, activation_function="relu2"),
    "llama": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "llama_mha": transformers.LlamaConfig(
        **LLAMA | {"num_key_value_heads": 6, "tie_word_embeddings": True}
    ),
    "llama_untied": transformers.LlamaConfig(**LLAMA),
    "llama_bias": transformers.LlamaConfig(**LLAMA, attention_bias=True),
    "mistral": transformers.MistralConfig(**LLAMA, sliding_window=7),
    "qwen2": transformers.Qwen2Config(**LLAMA, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**LLAMA),
} | {
    f"{name}_heads": transformers.GPT2Config(
        n_layer=1, n_head=heads, n_embd=8 * heads, vocab_size=77, n_positions=32
    )
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    for heads in (PRESETS[name].n_head,)
}


def published(kind: str):
    """A model of transformers whose weights are all random."""
    torch.manual_seed(0)
    other = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(OTHERS[kind])).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_(std=0.1)
    return other


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "relu2"])
def test_the_activation_of_gpt2_is_read_and_written(name, tmp_path):
    config = FAMILIES["gpt2"].read_config(
        transformers.GPT2Config(**GPT2, activation_function=name).to_dict()
    )
    assert config.mlp == {"gelu": "gelu_exact", "gelu_new": "gelu", "relu2": "relu2"}[name]
    assert FAMILIES["gpt2"].write_config(config)["activation_function"] == name


# --- the same numbers


@needs_trained
def test_a_trained_gpt2_has_the_logits_loss_and_gradients_of_transformers():
    model = GPT.from_pretrained(TRAINED)
    other = transformers.GPT2LMHeadModel.from_pretrained(TRAINED).eval()
    tokens = torch.randint(5, 9_669, (2, 96), generator=torch.Generator().manual_seed(0))
    assert (model(tokens) - other(tokens).logits).abs().max() < 2e-5

    model(tokens[:, :-1], tokens[:, 1:]).backward()
    other(tokens, labels=tokens).loss.backward()
    gradients = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        expected = gradients[f"transformer.{name}"].grad
        found = parameter.grad[: len(expected)] if name == "wte.weight" else parameter.grad
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            expected = expected.t()
        assert (found - expected).norm() <= 1e-4 * expected.norm(), name


@needs_trained
def test_a_trained_gpt2_generates_the_greedy_tokens_of_transformers():
    model = GPT.from_pretrained(TRAINED)
    other = transformers.GPT2LMHeadModel.from_pretrained(TRAINED).eval()
    prompt = torch.tensor([[2, 57, 1033, 801]])
    expected = other.generate(
        prompt, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    found = model.generate(prompt, 40, temperature=0.0)
    assert found[0, -40:].tolist() == expected[0, -40:].tolist()


@pytest.mark.parametrize("kind", OTHERS)
def test_logits_loss_and_gradients_match_transformers(kind, tmp_path):
    """Shapes, constants and options that are not the defaults, and the heads of all GPT-2s."""
    other = published(kind)
    other.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    tokens = torch.randint(77, (2, 32), generator=torch.Generator().manual_seed(0))
    assert (model(tokens) - other(tokens).logits).abs().max() < 2e-5

    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    expected_loss = other(tokens, labels=tokens).loss
    expected_loss.backward()
    assert abs(loss - expected_loss) <= 1e-4 * expected_loss
    expected = {name: parameter.grad for name, parameter in other.named_parameters()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    family = FAMILIES[other.config.model_type]
    found = dict(tensors_of(gradients, model.config, family))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


# --- the same bits


@pytest.mark.parametrize(
    ("kind", "dtype", "max_shard_bytes"),
    [
        *itertools.product(
            ["gpt2", "llama_untied"], [torch.float32, torch.bfloat16], [10**9, 20_000]
        ),
        *((kind, torch.float32, 10**9) for kind in OTHERS if kind not in ("gpt2", "llama_untied")),
    ],
)
def test_a_model_comes_out_with_the_bits_it_went_in_with(kind, dtype, max_shard_bytes, tmp_path):
    other = published(kind).to(dtype)
    shard_size = "20KB" if max_shard_bytes < 10**9 else "1GB"
    other.save_pretrained(tmp_path / "in", max_shard_size=shard_size)
    model = GPT.from_pretrained(tmp_path / "in")
    model.save_pretrained(tmp_path / "out", max_shard_bytes=max_shard_bytes)
    is_sharded = (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert is_sharded == (max_shard_bytes < 10**9)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_weights(other, again)
    assert type(again) is type(other)
    for field in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"):
        assert getattr(again.config, field, None) == getattr(other.config, field, None), field
    assert_same_weights(model, GPT.from_pretrained(tmp_path / "out"))
    assert GPT.from_pretrained(tmp_path / "out").config == model.config


@needs_trained
def test_a_trained_gpt2_in_a_bin_file_comes_out_with_the_same_bits(tmp_path):
    GPT.from_pretrained(TRAINED).save_pretrained(tmp_path / "out")
    expected = torch.load(TRAINED / "pytorch_model.bin", map_location="cpu")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    assert all(name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight"))
               for name in expected.keys() - found.keys())  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_bin_files_in_shards_and_names_without_a_prefix_are_read(kind, tmp_path):
    other = published(kind)
    other.config.save_pretrained(tmp_path)
    weights = {
        name.removeprefix("transformer.").removeprefix("model."): value
        for name, value in other.state_dict().items()
        if name != "lm_head.weight"
    }
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"pytorch_model-{number}.bin"
        torch.save({name: weights[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    tokens = torch.randint(77, (1, 32))
    with torch.no_grad():
        torch.testing.assert_close(
            GPT.from_pretrained(tmp_path)(tokens), other(tokens).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_nanogpt_is_read(bias, tmp_path):
    dropouts = dict.fromkeys(DROPOUTS, 0.1)
    shape = {"n_layer": 2, "n_head": 2, "d_model": 16, "vocab_size": 50, "context_tokens": 8}
    config = GPTConfig(**shape, bias=bias, mlp="gelu_exact", **dropouts)
    model = GPT(config)
    weights = model.state_dict()
    weights["wte.weight"] = weights["wte.weight"][:50]
    names = {f"_orig_mod.transformer.{name}": value for name, value in weights.items()}
    names["_orig_mod.lm_head.weight"] = weights["wte.weight"]
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "bias": bias, "vocab_size": 50, "dropout": 0.1}  # fmt: skip  # noqa: E501
    torch.save({"model": names, "model_args": shape, "iter_num": 5}, tmp_path / "ckpt.pt")
    found = GPT.from_pretrained(tmp_path / "ckpt.pt")
    assert found.config == config
    for name, value in weights.items():
        assert torch.equal(found.state_dict()[name][: len(value)], value)


def test_padding_rows_of_the_vocabulary_do_not_come_out(tmp_path):
    model = GPT(GPTConfig(n_layer=1, n_head=2, d_model=16, vocab_size=65, context_tokens=8))
    model.save_pretrained(tmp_path / "out", end_of_text=64)
    assert load_file(tmp_path / "out/model.safetensors")["transformer.wte.weight"].shape == (65, 16)
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == 64


# --- bad input


@pytest.fixture
def folder(tmp_path):
    published("gpt2").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "bert"}, "expected model_type gpt2, llama, mistral, .*, got 'bert'"),
        ({"tie_word_embeddings": False}, r"expected a tensor lm_head\.weight, found none"),
        ({"n_embd": 50}, r"got something else \(d_model: expected a multiple of n_head, 4, got 50"),
        ({"n_embd": 52}, r"expected wte\.weight of shape \(77, 52\) .*, got \(77, 48\)"),
        ({"vocab_size": 78}, r"expected wte\.weight of shape \(78, 48\)"),
        ({"n_layer": 3}, r"expected a tensor h\.2\.ln_1\.weight, found none"),
        ({"n_layer": 1}, r"expected only tensors of the model, got h\.1\.attn"),
        ({"n_layer": 100}, "expected weights of the .* parameters in its configuration, got"),
        ({"n_head": "four"}, "config"),
    ],
)  # fmt: skip
def test_configurations_that_do_not_fit_are_one_line(fields, message, folder):
    change_config(folder, **fields)
    with pytest.raises(InputError, match=message) as error:
        GPT.from_pretrained(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_parameters": None}, "yarn"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "llama3"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
            "got 'linear'",
        ),
        # the name before transformers 4.43
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "got 'dynamic'"),
        ({"rope_parameters": "x"}, "expected the configuration of a model"),
        ({"tie_word_embeddings": None}, r"expected a tensor lm_head\.weight, found none"),
        ({"num_attention_heads": 0}, "expected the configuration of a model"),
        ({"head_dim": 16}, r"head_dim: expected hidden_size / num_attention_heads \(8\), got 16"),
        ({"hidden_size": math.nan, "head_dim": None}, r"head_dim: expected .* \(nan\), got nan"),
        (
            {"num_attention_heads": "x", "head_dim": 2**31},
            "expected the configuration of a model",
        ),
    ],
)
def test_llamas_with_other_parts_are_one_line(fields, message, tmp_path):
    published("llama").save_pretrained(tmp_path)
    change_config(tmp_path, **fields)
    with pytest.raises(InputError, match=message):
        GPT.from_pretrained(tmp_path)


def test_damaged_files_are_one_line(folder, tmp_path):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors: damaged"):
        GPT.from_pretrained(folder)
    tensors = load_file(Path(save(content, tmp_path / "copy")))
    save_file({name: x for name, x in tensors.items() if "ln_f.bias" not in name}, weights)
    with pytest.raises(InputError, match=r"expected a tensor ln_f\.bias, found none"):
        GPT.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(InputError, match=r"expected model\.safetensors or pytorch_model\.bin"):
        GPT.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"expected a folder with config\.json"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer.ln_f.bias": torch.ones(48, 1)}, r"expected ln_f\.bias to have 1 axis of"),
        ({"transformer.wte.weight": torch.ones(77, 48).int()}, r"got torch\.int32 \(77, 48\)"),
        ({"transformer.ln_f.bias": torch.ones(48).half()}, "expected tensors of one dtype"),
        ({"lm_head.weight": torch.ones(77, 48)}, "expected a head that shares the weight"),
    ],
)
def test_tensors_that_do_not_fit_are_one_line(changes, message, folder):
    weights = folder / "model.safetensors"
    save_file(load_file(weights) | changes, weights)
    with pytest.raises(InputError, match=message):
        GPT.from_pretrained(folder)


def test_parts_of_one_weight_with_other_widths_are_one_line(tmp_path):
    published("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    name = "model.layers.0.self_attn.k_proj.weight"
    narrow = load_file(weights)[name][:, 1:].contiguous()
    save_file(load_file(weights) | {name: narrow}, weights)
    with pytest.raises(InputError, match=r"expected h\.0\.attn\.c_attn\.weight of shape .* and "):
        GPT.from_pretrained(tmp_path)


def save(content: bytes, path: Path) -> Path:
    path.write_bytes(content)
    return path


class Evil:
    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.mark.parametrize("content", [{"wte.weight": Evil()}, {5: torch.ones(1)}, [1]])
def test_a_pickle_with_other_things_than_tensors_is_one_line(content, folder):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin: expected"):
        GPT.from_pretrained(folder)


def test_nothing_is_written_for_a_bad_model_or_into_a_used_folder(tmp_path):
    config = GPTConfig(n_layer=1, n_head=2, d_model=16, vocab_size=50, context_tokens=8)
    with pytest.raises(InputError, match="norm: expected layer, got rms"):
        GPT(replace(config, norm="rms")).save_pretrained(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="expected a new or empty folder"):
        GPT(config).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_pickle_of_an_old_protocol_raises_without_a_warning(folder, recwarn):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}, protocol=4))
    with pytest.raises(InputError, match=r"expected a file of torch\.save with tensors only"):
        GPT.from_pretrained(folder)
    assert not recwarn.list


def test_a_shard_outside_the_folder_raises(folder):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"weight_map": {"wte.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"outside\.safetensors next to it, found none"):
        GPT.from_pretrained(folder)
