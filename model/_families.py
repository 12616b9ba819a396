"""How families of published models describe themselves and name their weights. A row per family.

    gpt2       GPT2LMHeadModel of transformers. Weights of linear layers are stored as (in, out)
    llama      LlamaForCausalLM of transformers. Queries, keys and values have one matrix each
    mistral    llama with a window
    qwen2      llama with biases of queries, keys and values only
    qwen3      llama with QK-norm
    nanogpt    a checkpoint of nanoGPT. Weights of linear layers are stored as (out, in)

A row maps the fields of a family's configuration to GPTConfig and back, and each of our parameter
names to the names in the file. Several names mean that our weight is their rows, one after another.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .config import DROPOUTS, GPTConfig

Fields = dict[str, Any]
"""The content of a config.json."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of published models."""

    architecture: str | None
    """The class of transformers that opens it, None if there is none."""
    read_config: Callable[[Fields], GPTConfig]
    """Returns the configuration. Raises KeyError for a missing field."""
    write_config: Callable[[GPTConfig], Fields] | None
    """Returns the fields without those that all families share. None: the family is only read."""
    required: dict[str, Any]
    """Values that GPT requires. A missing field counts as this value."""
    traits: dict[str, tuple]
    """The values of _traits(config) that the family has. A missing trait may have any value."""
    names: Callable[[str], tuple[str, ...]]
    """Names in the file, without `prefix`, of one of our parameters."""
    prefix: str
    """Begins all names. Some files leave it out."""
    transposed: re.Pattern | None
    """Our names of weights that the file stores as (in, out)."""
    dropped: re.Pattern
    """Names, without `prefix`, of buffers that are not weights."""


# --- GPT-2

_LINEAR_WEIGHT = re.compile(r"(c_attn|c_proj|c_fc)\.weight$")
# transformers' names of activations: GELU in the tanh form, exact GELU, relu(x)^2.
_ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_exact",
    "relu2": "relu2",
}
# The first name of each MLP is the one to write.
_ACTIVATION_OF_MLP = {mlp: name for name, mlp in reversed(_ACTIVATIONS.items())}
# Missing probabilities are 0.1, as in transformers.
_GPT2_DROPOUT = 0.1


def _read_gpt2(fields: Fields) -> GPTConfig:
    activation = fields.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        raise InputError(
            f"activation_function: expected {' or '.join(_ACTIVATIONS)}, got {activation!r}; "
            "tritium has no such MLP"
        )
    return GPTConfig(
        n_layer=fields["n_layer"],
        n_head=fields["n_head"],
        d_model=fields["n_embd"],
        d_hidden=fields.get("n_inner"),
        mlp=_ACTIVATIONS[activation],
        vocab_size=fields["vocab_size"],
        context_tokens=fields.get("n_positions") or fields["n_ctx"],
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        tied_head=bool(fields.get("tie_word_embeddings", True)),
        dropout=fields.get("resid_pdrop", _GPT2_DROPOUT),
        embedding_dropout=fields.get("embd_pdrop", _GPT2_DROPOUT),
        attention_dropout=fields.get("attn_pdrop", _GPT2_DROPOUT),
    )


def _write_gpt2(config: GPTConfig) -> Fields:
    return {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.d_model,
        "n_inner": config.d_hidden,
        "vocab_size": config.vocab_size,
        "n_positions": config.context_tokens,
        "n_ctx": config.context_tokens,
        "activation_function": _ACTIVATION_OF_MLP[config.mlp],
        "layer_norm_epsilon": config.eps,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.embedding_dropout,
        "attn_pdrop": config.attention_dropout,
        "scale_attn_weights": True,
        "tie_word_embeddings": config.tied_head,
    }


# --- Llama, and families that differ from it in few options

_LLAMA_NAMES = {
    "wte.weight": ("embed_tokens.weight",),
    "ln_1.weight": ("input_layernorm.weight",),
    "attn.c_attn.weight": tuple(f"self_attn.{name}_proj.weight" for name in "qkv"),
    "attn.c_attn.bias": tuple(f"self_attn.{name}_proj.bias" for name in "qkv"),
    "attn.c_proj.weight": ("self_attn.o_proj.weight",),
    "attn.c_proj.bias": ("self_attn.o_proj.bias",),
    "attn.q_norm.weight": ("self_attn.q_norm.weight",),
    "attn.k_norm.weight": ("self_attn.k_norm.weight",),
    "ln_2.weight": ("post_attention_layernorm.weight",),
    "mlp.c_gate.weight": ("mlp.gate_proj.weight",),
    "mlp.c_fc.weight": ("mlp.up_proj.weight",),
    "mlp.c_proj.weight": ("mlp.down_proj.weight",),
    "ln_f.weight": ("norm.weight",),
    "lm_head.weight": ("lm_head.weight",),
    "score.weight": ("score.weight",),
}


def _llama_names(name: str) -> tuple[str, ...]:
    """h.3.attn.c_proj.weight -> layers.3.self_attn.o_proj.weight"""
    if not name.startswith("h."):
        return _LLAMA_NAMES[name]
    _, layer, rest = name.split(".", 2)
    return tuple(f"layers.{layer}.{theirs}" for theirs in _LLAMA_NAMES[rest])


def _read_llama(fields: Fields, **options: Any) -> GPTConfig:
    """Return the configuration. `options` are the options in which the family differs."""
    # transformers 5 moved RoPE's settings into one field.
    rope = fields.get("rope_parameters") or {"rope_theta": fields.get("rope_theta", 10_000.0)}
    for settings in (rope, fields.get("rope_scaling") or {}):
        rope_type = settings.get("rope_type") or settings.get("type") or "default"
        if rope_type != "default":
            raise InputError(
                f"rope_type: expected default, got {rope_type!r}; tritium does not scale RoPE"
            )
    for layer_type in fields.get("layer_types") or ():
        if layer_type != "full_attention":
            raise InputError(
                f"layer_types: expected full_attention in all layers, got {layer_type!r}; "
                "tritium's layers are equal"
            )
    heads = fields["num_attention_heads"]
    head_size = fields["hidden_size"] // heads
    given_size = fields.get("head_dim") or head_size
    if given_size != head_size:
        raise InputError(
            f"head_dim: expected hidden_size / num_attention_heads ({head_size}), got "
            f"{given_size}; tritium has no other head size"
        )
    return GPTConfig(
        n_layer=fields["num_hidden_layers"],
        n_head=heads,
        n_kv_head=fields.get("num_key_value_heads"),
        d_model=fields["hidden_size"],
        d_hidden=fields["intermediate_size"],
        vocab_size=fields["vocab_size"],
        context_tokens=fields["max_position_embeddings"],
        bias=bool(fields.get("attention_bias", False)),
        # A missing field means false, as in transformers.
        tied_head=bool(fields.get("tie_word_embeddings", False)),
        position="rotary",
        rope_base=float(rope["rope_theta"]),
        norm="rms",
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        mlp="swiglu",
        attention_dropout=fields.get("attention_dropout", 0.0),
        **options,
    )


def _write_llama(config: GPTConfig) -> Fields:
    return {
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_feedforward,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_tokens,
        "hidden_act": "silu",
        "rms_norm_eps": config.eps,
        # Both spellings: of transformers 5 and of earlier versions.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "rope_theta": config.rope_base,
        "attention_dropout": config.attention_dropout,
        "tie_word_embeddings": config.tied_head,
    }


def _like_llama(
    architecture: str,
    *,
    read_config: Callable[[Fields], GPTConfig],
    fields: Callable[[GPTConfig], Fields],
    required: dict[str, Any],
    traits: dict[str, tuple],
) -> Family:
    """Return the row of a family that differs from Llama in the given fields and traits."""
    return Family(
        architecture=architecture,
        read_config=read_config,
        write_config=lambda config: _write_llama(config) | fields(config),
        required={"hidden_act": "silu", "mlp_bias": False, **required},
        traits=_NO_OPTIONS
        | {"position": ("rotary",), "norm": ("rms",), "mlp": ("swiglu",), "biases": ("none",)}
        | traits,
        names=_llama_names,
        prefix="model.",
        transposed=None,
        dropped=re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq$"),
    )


# --- nanoGPT


def _read_nanogpt(fields: Fields) -> GPTConfig:
    return GPTConfig(
        n_layer=fields["n_layer"],
        n_head=fields["n_head"],
        d_model=fields["n_embd"],
        vocab_size=fields["vocab_size"],
        context_tokens=fields["block_size"],
        bias=fields["bias"],
        mlp="gelu_exact",
        # nanoGPT has one probability for all three.
        **dict.fromkeys(DROPOUTS, fields.get("dropout", 0.0)),
    )


def _same_name(name: str) -> tuple[str, ...]:
    return (name,)


# --- the table


def _traits(config: GPTConfig) -> dict[str, Any]:
    """Return what distinguishes families. Probabilities of dropout do not: they only train."""
    biases = {
        (True, True): "all",
        (False, False): "none",
        (False, True): "queries, keys and values",
        (True, False): "all except queries, keys and values",
    }
    return {
        "position": config.position,
        "norm": config.norm,
        "mlp": config.mlp,
        "biases": biases[config.bias, config.has_qkv_bias],
        "grouped heads": config.kv_heads != config.n_head,
        "window": config.window is not None,
        "qk_norm": config.qk_norm,
        "softcap": config.softcap > 0,
        "head_softcap": config.head_softcap > 0,
        "prefix": config.prefix_tokens > 0,
    }


_NO_OPTIONS = dict.fromkeys(("window", "qk_norm", "softcap", "head_softcap", "prefix"), (False,))
_GPT2_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)$")

FAMILIES = {
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        read_config=_read_gpt2,
        write_config=_write_gpt2,
        required={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "add_cross_attention": False,
        },
        traits=_NO_OPTIONS
        | {
            "position": ("learned",),
            "norm": ("layer",),
            "mlp": tuple(dict.fromkeys(_ACTIVATIONS.values())),
            "biases": ("all",),
            "grouped heads": (False,),
        },
        names=_same_name,
        prefix="transformer.",
        transposed=_LINEAR_WEIGHT,
        dropped=_GPT2_BUFFERS,
    ),
    "llama": _like_llama(
        "LlamaForCausalLM",
        read_config=_read_llama,
        fields=lambda config: {"attention_bias": config.bias, "mlp_bias": False},
        required={},
        traits={"biases": ("none", "all")},
    ),
    "mistral": _like_llama(
        "MistralForCausalLM",
        # Missing fields have the defaults of transformers, here and below.
        read_config=lambda fields: _read_llama(
            {"num_key_value_heads": 8} | fields, window=fields.get("sliding_window", 4096)
        ),
        fields=lambda config: {"sliding_window": config.window},
        required={"attention_bias": False},
        traits={"window": (True, False)},
    ),
    "qwen2": _like_llama(
        "Qwen2ForCausalLM",
        read_config=lambda fields: _read_llama({"num_key_value_heads": 32} | fields, qkv_bias=True),
        fields=lambda config: {"use_sliding_window": False},
        required={"attention_bias": False, "use_sliding_window": False},
        traits={"biases": ("queries, keys and values",)},
    ),
    "qwen3": _like_llama(
        "Qwen3ForCausalLM",
        read_config=lambda fields: _read_llama(
            {"num_key_value_heads": 32, "head_dim": 128} | fields, qk_norm=True
        ),
        fields=lambda config: {"attention_bias": config.bias, "use_sliding_window": False},
        required={"use_sliding_window": False},
        traits={"biases": ("none", "all"), "qk_norm": (True,)},
    ),
    "nanogpt": Family(
        architecture=None,
        read_config=_read_nanogpt,
        write_config=None,
        required={},
        traits={},
        names=_same_name,
        prefix="transformer.",
        transposed=None,
        dropped=_GPT2_BUFFERS,
    ),
}


def family_of(config: GPTConfig) -> str:
    """Return the family whose architecture a model has.

    Raises: InputError if no family of transformers has it. It names the nearest family, and what
        differs.
    """
    traits = _traits(config)
    differences = {
        name: [trait for trait, values in row.traits.items() if traits[trait] not in values]
        for name, row in FAMILIES.items()
        if row.write_config is not None
    }
    nearest = min(differences, key=lambda name: len(differences[name]))
    if not differences[nearest]:
        return nearest
    needs = FAMILIES[nearest].traits
    expected = "; ".join(
        f"{trait}: expected {' or '.join(map(_describe, needs[trait]))}, "
        f"got {_describe(traits[trait])}"
        for trait in differences[nearest]
    )
    raise InputError(
        f"{expected}; no model of transformers that tritium writes fits, the nearest is {nearest}"
    )


def _describe(value: str | bool) -> str:
    return {True: "yes", False: "no"}.get(value, str(value))
