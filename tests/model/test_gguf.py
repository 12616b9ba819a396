"""GGUF files that the package gguf writes, as llama.cpp converts models of transformers."""

import numpy as np
import pytest
import torch

from tests.model.test_weights import published
from tritium.errors import InputError
from tritium.model import GPT

pytestmark = pytest.mark.plain
gguf = pytest.importorskip("gguf")


def write_gguf(
    file, kind, other, dtype=np.float32, quantize=None, has_kv_heads=True, more=None, **metadata
):
    """Write a model of transformers as llama.cpp does, which permutes the rows of q and k.

    Args: more: further tensors by name.
    """
    config = other.config
    writer = gguf.GGUFWriter(file, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if kind == "llama":
        writer.add_feed_forward_length(config.intermediate_size)
        if has_kv_heads:
            writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    else:
        writer.add_feed_forward_length(config.n_inner)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    for name, value in metadata.items():
        writer.add_string(name, value)
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "gpt2": gguf.MODEL_ARCH.GPT2}[kind]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, value in other.state_dict().items():
        if name == "lm_head.weight":
            continue
        value = value.float().numpy()
        heads = {"q": config.num_attention_heads, "k": getattr(config, "num_key_value_heads", 0)}
        for part, count in heads.items():
            if f"{part}_proj" in name:
                halves = value.reshape(count, 2, -1, value.shape[-1])
                value = halves.swapaxes(1, 2).reshape(value.shape)
        if kind == "gpt2" and value.ndim == 2 and ".h." in name:
            value = np.ascontiguousarray(value.T)
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if quantize and value.ndim == 2 and "blk" in theirs:
            data = gguf.quants.quantize(value, quantize)
            writer.add_tensor(theirs, data, raw_dtype=quantize)
        else:
            writer.add_tensor(theirs, value.astype(dtype if value.ndim == 2 else np.float32))
    for name, value in (more or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_logits_match_transformers(kind, dtype, tmp_path):
    other = published(kind)
    other = other.half().float() if dtype == np.float16 else other
    write_gguf(tmp_path / "model.gguf", kind, other, dtype)
    model = GPT.from_pretrained(tmp_path / "model.gguf")
    assert model.wte.weight.dtype == torch.float32
    assert model.config.norm_eps == 3e-5
    tokens = torch.randint(77, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), other(tokens).logits, rtol=1e-4, atol=1e-4)


def test_without_a_number_of_key_heads_there_are_as_many_as_query_heads(tmp_path):
    other = published("llama_mha")
    write_gguf(tmp_path / "model.gguf", "llama", other, has_kv_heads=False)
    tokens = torch.randint(77, (2, 32))
    with torch.no_grad():
        logits = GPT.from_pretrained(tmp_path / "model.gguf")(tokens)
        torch.testing.assert_close(logits, other(tokens).logits, rtol=1e-4, atol=1e-4)


def test_quantized_values_become_float32(tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, hidden_size=64,
        intermediate_size=96, vocab_size=77, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    other = transformers.LlamaForCausalLM(config)
    quantize = gguf.GGMLQuantizationType.Q8_0
    write_gguf(tmp_path / "model.gguf", "llama", other, quantize=quantize)
    model = GPT.from_pretrained(tmp_path / "model.gguf")
    expected = torch.cat(
        [getattr(other.model.layers[0].self_attn, f"{x}_proj").weight for x in "qkv"]
    )
    found = model.h[0].attn.c_attn.weight
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < expected.abs().max() / 127


def test_files_that_do_not_fit_are_one_line(tmp_path):
    file = tmp_path / "model.gguf"
    write_gguf(file, "llama", published("llama"), **{"llama.rope.scaling.type": "yarn"})
    with pytest.raises(InputError, match=r"rope\.scaling\.type: expected none, got 'yarn'"):
        GPT.from_pretrained(file)
    write_gguf(file, "llama", published("llama"), more={"rope_freqs.weight": np.ones(4, "f4")})
    with pytest.raises(InputError, match=r"expected none, got 'rope_freqs\.weight'"):
        GPT.from_pretrained(file)
    write_gguf(file, "llama", published("llama"), more={"output.weight": np.ones((77, 48))})
    with pytest.raises(InputError, match=r"output\.weight: expected float .* got F64"):
        GPT.from_pretrained(file)
    write_gguf(file, "llama", published("llama"), has_kv_heads=False)
    with pytest.raises(InputError, match=r"attn_k\.weight: expected an even number of rows for"):
        GPT.from_pretrained(file)
    write_gguf(file, "llama", published("llama"))
    content = file.read_bytes()
    file.write_bytes(content.replace(b"llama", b"qwen9"))
    with pytest.raises(
        InputError, match=r"expected general\.architecture gpt2 or llama, got 'qwen9'"
    ):
        GPT.from_pretrained(file)
    not_utf8 = content.replace(b"llama", b"\x80lama", 1)
    for damaged in (content[:-5000], content[:300], not_utf8, b"", b"no GGUF file at all"):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"model\.gguf: damaged, or not a GGUF file") as error:
            GPT.from_pretrained(file)
        assert "\n" not in str(error.value)
