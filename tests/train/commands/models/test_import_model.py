"""tritium import, and what its folder is good for: sample, train --init-from, export."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model.test_gguf import write_gguf
from tests.model.test_weights import change_config
from tests.train.data.tokenizers.test_published import byte_level
from tritium.model import GPT, GPTConfig, hub
from tritium.train.run.models import open_model

pytestmark = pytest.mark.plain
transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder with a tokenizer of fewer tokens than the model has."""
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=16, vocab_size=500, n_positions=16,
        bos_token_id=0, eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    byte_level(tmp_path / "model")
    return tmp_path / "model"


def test_an_imported_folder_has_the_same_weights_tokenizer_and_ids(folder, tritium, tmp_path):
    out = tmp_path / "out"
    status, printed, err = tritium("import", folder, out)
    assert status == 0, err
    assert f"sample {out}" in printed
    expected, found = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (out / name).read_bytes()
    ids = json.loads((out / "config.json").read_bytes())
    assert (ids["bos_token_id"], ids["eos_token_id"]) == (0, 1)


def test_a_run_from_an_imported_model_uses_and_exports_its_tokenizer(
    folder, tiny, tritium, error_of, tmp_path
):
    own = ("--n-layer", "--n-head", "--d-model", "--context-tokens", "--tokenizer")
    pairs = zip(tiny[2::2], tiny[3::2], strict=True)
    words = [word for pair in pairs if pair[0] not in own for word in pair]
    words = ["train", "laptop", *words, "--init-from", folder]
    line = error_of(*words, "--tokenizer", "bytes")
    assert "--tokenizer: expected model of" in line
    status, _, err = tritium(*words)
    assert status == 0, err
    run = open_model(tmp_path / "run")
    assert run.config.vocab_size == 500
    assert run.tokenizer().end_of_text == 1
    assert tritium("train", "--resume", tmp_path / "run")[0] == 0

    assert tritium("export", tmp_path / "run", tmp_path / "out")[0] == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (other.config.bos_token_id, other.config.eos_token_id) == (0, 1)


def test_a_checkpoint_of_nanogpt_takes_a_tokenizer(folder, tritium, error_of, tmp_path):
    model = GPT.from_pretrained(folder)
    names = {f"transformer.{name}": value for name, value in model.state_dict().items()}
    names["transformer.wte.weight"] = names["transformer.wte.weight"][:500].clone()
    shape = {
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 16,
        "block_size": 16,
        "bias": True,
        "vocab_size": 500,
    }
    torch.save({"model": names, "model_args": shape}, tmp_path / "ckpt.pt")
    words = ("import", tmp_path / "ckpt.pt", tmp_path / "out")
    assert tritium(*words, "--tokenizer", folder)[0] == 0
    assert open_model(tmp_path / "out").tokenizer().end_of_text == 1
    assert "expected a model with a tokenizer" in error_of("sample", tmp_path / "ckpt.pt")


def test_a_quantized_gguf_file_is_imported_with_a_note(tritium, tmp_path):
    gguf = pytest.importorskip("gguf")
    config = transformers.LlamaConfig(
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, hidden_size=32,
        intermediate_size=64, vocab_size=77, max_position_embeddings=16, tie_word_embeddings=True,
    )  # fmt: skip
    other = transformers.LlamaForCausalLM(config)
    quantize = gguf.GGMLQuantizationType.Q8_0
    write_gguf(tmp_path / "model.gguf", "llama", other, quantize=quantize)
    status, printed, err = tritium("import", tmp_path / "model.gguf", tmp_path / "out")
    assert status == 0, err
    assert "F32, Q8_0: quantized values become float32" in printed
    assert open_model(tmp_path / "out").config.n_kv_head == 1


class Evil:
    def __reduce__(self):
        return os.system, ("exit 1",)


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def change_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def write_evil_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"wte.weight": Evil()}, folder / "pytorch_model.bin")


def write_index(folder):
    truncate(folder)
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    index = {"weight_map": {"transformer.wte.weight": "shard.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "expected a run, a checkpoint"),
        (truncate, "model.safetensors: damaged"),
        (write_index, "shard.safetensors: damaged"),
        (
            lambda folder: change_tensors(folder, lambda x: x.pop("transformer.ln_f.bias")),
            "expected a tensor ln_f.bias, found none",
        ),
        (
            lambda folder: change_tensors(folder, lambda x: x.update(more=torch.ones(1))),
            "expected only tensors of the model, got more",
        ),
        (lambda folder: change_config(folder, n_embd=18), "expected wte.weight of shape (500, 18)"),
        (lambda folder: change_config(folder, model_type="bert"), "expected model_type gpt2"),
        (
            lambda folder: change_config(folder, add_cross_attention=True),
            "add_cross_attention: expected False",
        ),
        (write_evil_pickle, "pytorch_model.bin: expected a file of torch.save with tensors only"),
    ],
)
def test_bad_models_are_one_line_and_nothing_is_written(
    damage, message, folder, error_of, tmp_path
):
    damage(folder)
    assert message in error_of("import", folder, tmp_path / "a" / "out")
    assert not (tmp_path / "a").exists()


def test_bad_options_are_one_line(folder, error_of, tiny, tritium, tmp_path, monkeypatch):
    out = tmp_path / "out"
    line = error_of("import", folder, out, "--revision", "v1")
    assert "--revision: expected it with OWNER/NAME" in line
    config = json.loads((folder / "config.json").read_bytes())
    small = GPT.from_pretrained(folder).config
    GPT(type(small)(**{**vars(small), "vocab_size": 300})).save_pretrained(tmp_path / "small")
    line = error_of("import", tmp_path / "small", out, "--tokenizer", folder)
    assert "--tokenizer: expected at most 300 tokens" in line
    assert config["vocab_size"] == 500
    assert "needs no corpus, got bpe:300" in error_of(
        "import", folder, out, "--tokenizer", "bpe:300"
    )

    def no_network(name, revision):
        raise hub.InputError(f"{name}: expected a model that huggingface.co has, got {revision}")

    monkeypatch.setattr("tritium.train.commands.models.import_model.download", no_network)
    assert "owner/name: expected a model" in error_of("import", "owner/name", out)
    assert tritium(*tiny)[0] == 0
    assert "expected a published model, got a run" in error_of("import", tmp_path / "run", out)
    assert not out.exists()


def test_an_import_without_a_tokenizer_says_once_how_to_name_one(tritium, tmp_path):
    config = GPTConfig(n_layer=1, n_head=2, d_model=8, vocab_size=300, context_tokens=8)
    GPT(config).save_pretrained(tmp_path / "model")
    status, out, err = tritium("import", tmp_path / "model", tmp_path / "out")
    assert status == 0, err
    hint = "expected a model with a tokenizer, found none; name it with --tokenizer"
    assert out == f"{tmp_path / 'out'}: {hint}\n"
