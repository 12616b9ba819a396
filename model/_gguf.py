"""Read GGUF files, llama.cpp's format, of the architectures gpt2 and llama.

The metadata is converted to transformers' config.json. Tensors take transformers' names.
So _families.py alone describes the families. Tensors of float32, float16 or bfloat16 stay as they
are if all have the same dtype. Otherwise, and if they are quantized, they become float32.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError

# Family -> field of transformers -> key of the metadata, after the name of the architecture.
_FIELDS = {
    "gpt2": {
        "n_layer": "block_count",
        "n_head": "attention.head_count",
        "n_embd": "embedding_length",
        "n_inner": "feed_forward_length",
        "n_positions": "context_length",
        "layer_norm_epsilon": "attention.layer_norm_epsilon",
    },
    "llama": {
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "max_position_embeddings": "context_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "rope_theta": "rope.freq_base",
        "head_dim": "attention.key_length",
    },
}
# Family -> part of a name -> the same part in transformers.
_NAMES = {
    "gpt2": {
        "token_embd": "wte",
        "position_embd": "wpe",
        "output_norm": "ln_f",
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
    "llama": {
        "token_embd": "embed_tokens",
        "output_norm": "norm",
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
}
_LAYERS = {"gpt2": "h", "llama": "layers"}
_TENSOR = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
_IS_LINEAR = re.compile(r"blk\.\d+\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight")


def read_gguf(
    file: Path,
) -> tuple[str, dict[str, Any], dict[str, Callable[[], Tensor]], str | None]:
    """Read the metadata of a GGUF file.

    Returns: the name of the family; the fields of a config.json; a function per tensor that reads
        it; a sentence about changed values, or None.
    Raises: InputError if the file is damaged or its architecture is not supported, or if the
        package gguf is not installed.
    """
    meta, tensors = _open(file)
    family = meta.get("general.architecture")
    if family not in _FIELDS:
        raise InputError(
            f"{file}: expected general.architecture {' or '.join(_FIELDS)}, got {family!r}"
        )
    try:
        fields = _fields(family, meta, tensors)
    except KeyError as error:
        raise InputError(f"{file}: expected {error} in its metadata, found none") from None
    except InputError as error:
        raise InputError(f"{file}: {error}") from None

    types = sorted({tensor.tensor_type.name for tensor in tensors.values()})
    is_float = set(types) <= {"F32", "F16", "BF16"}
    heads = {
        "attn_q": fields.get("num_attention_heads"),
        # A file may leave out the number of key heads: then there are as many as query heads.
        "attn_k": fields.get("num_key_value_heads", fields.get("num_attention_heads")),
    }
    read = {}
    for name, tensor in tensors.items():
        read[_their_name(family, name)] = _reader(tensor, family, heads, keep=len(types) == 1)
    note = None
    if not is_float:
        note = f"{file}: {', '.join(types)}: quantized values become float32"
    elif len(types) > 1:
        note = f"{file}: {', '.join(types)}: all values become float32, without rounding"
    return family, fields, read, note


def _open(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metadata and the tensors of a file by their names."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise InputError(
            f"{file}: expected the package gguf, which reads this file, found none; "
            "pip install 'tritium[hf]'"
        ) from None
    try:
        reader = GGUFReader(file)
        # Longer arrays, such as the vocabulary, are not needed and are slow to convert.
        short = {name: field for name, field in reader.fields.items() if len(field.data) < 100}
        meta = {name: field.contents() for name, field in short.items()}
        return meta, {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # damaged files raise many types
        raise InputError(
            f"{file}: damaged, or not a GGUF file ({type(error).__name__}); get it again"
        ) from None


def _fields(family: str, meta: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    scaling = meta.get(f"{family}.rope.scaling.type", "none")
    if "rope_freqs.weight" in tensors:  # llama.cpp writes the factors of Llama 3 as a tensor
        scaling = "rope_freqs.weight"
    if scaling != "none":
        raise InputError(
            f"rope.scaling.type: expected none, got {scaling!r}; tritium does not scale RoPE"
        )
    fields = {}
    for theirs, key in _FIELDS[family].items():
        value = meta.get(f"{family}.{key}")
        if isinstance(value, float):
            value = float(str(np.float32(value)))  # 1e-5, not the nearest float32 in float64
        if value is not None:
            fields[theirs] = value
    head_size = meta.get(f"{family}.rope.dimension_count")
    if family == "llama" and head_size is not None:
        fields.setdefault("head_dim", head_size)
    if family == "gpt2":  # the metadata has no dropout
        fields |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    if "token_embd.weight" not in tensors:
        raise KeyError("token_embd.weight")
    fields["vocab_size"] = int(tensors["token_embd.weight"].shape[-1])
    fields["tie_word_embeddings"] = "output.weight" not in tensors
    for name in ("bos", "eos", "padding"):
        role = {"padding": "pad"}.get(name, name)
        fields[f"{role}_token_id"] = meta.get(f"tokenizer.ggml.{name}_token_id")
    fields["has_tokenizer"] = "tokenizer.ggml.model" in meta
    return fields


def _their_name(family: str, name: str) -> str:
    """blk.3.attn_q.weight -> layers.3.self_attn.q_proj.weight. Unknown names stay as they are."""
    if name == "output.weight":
        return "lm_head.weight"
    match = _TENSOR.fullmatch(name)
    if match is None or match[2] not in _NAMES[family]:
        return name
    layer = "" if match[1] is None else f"{_LAYERS[family]}.{match[1]}."
    return f"{layer}{_NAMES[family][match[2]]}.{match[3]}"


def _reader(tensor, family: str, heads: dict[str, int | None], keep: bool) -> Callable[[], Tensor]:
    """Return the function that reads a tensor, as transformers would store it."""

    def read() -> Tensor:
        value = _values(tensor)
        value = value if keep else value.float()
        part = tensor.name.split(".")[-2]
        if family == "llama" and part in heads and heads[part]:
            # llama.cpp interleaves the two halves of each head for its form of RoPE.
            try:
                pairs = value.view(heads[part], -1, 2, *value.shape[1:])
            except RuntimeError:
                raise InputError(
                    f"{tensor.name}: expected an even number of rows for each of {heads[part]} "
                    f"heads, got the shape {tuple(value.shape)}; check attention.head_count and "
                    "attention.head_count_kv"
                ) from None
            value = pairs.transpose(1, 2).reshape(value.shape)
        if family == "gpt2" and _IS_LINEAR.fullmatch(tensor.name):
            value = value.t()
        return value

    return read


def _values(tensor) -> Tensor:
    from gguf.quants import dequantize

    dtype = tensor.tensor_type.name
    shape = tuple(reversed(tensor.shape.tolist()))
    if dtype == "BF16":
        return torch.from_numpy(tensor.data.view(np.int16).copy()).view(torch.bfloat16).view(shape)
    if dtype in ("F32", "F16"):
        return torch.from_numpy(tensor.data.copy()).view(shape)
    try:
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).view(shape)
    except NotImplementedError:
        raise InputError(
            f"{tensor.name}: expected float or quantized values that the package gguf "
            f"dequantizes, got {dtype}"
        ) from None
