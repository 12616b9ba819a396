"""Each field of transformers is read, checked, or known not to change the forward."""

from dataclasses import replace
from pathlib import Path

import pytest

from tritium.errors import InputError
from tritium.model import GPTConfig
from tritium.model._families import FAMILIES, family_of
from tritium.model.config import DROPOUTS
from tritium.model.weights import Source

pytestmark = pytest.mark.plain

# --- fields

IGNORED = {
    # names, output and storage
    "transformers_version", "architectures", "model_type", "_name_or_path", "dtype", "return_dict",
    "output_hidden_states", "output_attentions", "use_cache", "initializer_range",
    # other heads than that of a language model
    "id2label", "label2id", "problem_type", "summary_type", "summary_use_proj",
    "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    # the ids of special tokens. The embedding of pad_token_id is a row like others
    "bos_token_id", "eos_token_id", "pad_token_id",
    # nothing that these models read
    "chunk_size_feed_forward", "is_encoder_decoder", "pretraining_tp", "max_window_layers",
    # the window of qwen2 and qwen3, without use_sliding_window
    "sliding_window",
}  # fmt: skip
UNSUPPORTED = {
    "gpt2": {
        "activation_function": "relu", "scale_attn_weights": False, "add_cross_attention": True,
        "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True,
    },
    "llama": {
        "hidden_act": "gelu", "mlp_bias": True, "head_dim": 16,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4},
    },
    "qwen2": {
        "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"],
    },
}  # fmt: skip
UNSUPPORTED["mistral"] = UNSUPPORTED["llama"] | {"attention_bias": True}
UNSUPPORTED["qwen3"] = UNSUPPORTED["qwen2"]


def fields_of(kind: str) -> dict:
    """The configuration that transformers writes for a family, with all defaults."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoConfig.for_model(kind).to_dict()


@pytest.mark.parametrize(
    ("kind", "field"), [(kind, field) for kind, fields in UNSUPPORTED.items() for field in fields]
)
def test_a_field_with_a_value_that_tritium_does_not_have_is_named(kind, field):
    fields = fields_of(kind) | {field: UNSUPPORTED[kind][field]}
    name = "rope_type" if field == "rope_parameters" else field
    with pytest.raises(InputError, match=f"model: {name}: expected"):
        Source(Path("model"), FAMILIES[kind], fields, {})


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_every_other_field_of_transformers_is_read_or_does_not_change_the_forward(kind):
    """A field that a new version of transformers adds fails here until somebody has looked."""

    read = set()

    class Noted(dict):
        def __getitem__(self, name):
            read.add(name)
            return super().__getitem__(name)

        def get(self, name, default=None):
            read.add(name)
            return super().get(name, default)

        def __ror__(self, defaults):
            return Noted(defaults | dict(self))

    fields = Noted(fields_of(kind))
    Source(Path("model"), FAMILIES[kind], fields, {})
    assert set(fields) - read <= IGNORED


# --- families


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "rms"}, "^norm: expected layer, got rms; no model .* the nearest is gpt2$"),
        ({"n_kv_head": 1}, "^grouped heads: expected no, got yes; .* gpt2"),
        ({"window": 4, "softcap": 1.0}, "^window: expected no, got yes; softcap: expected no"),
        ({"bias": False}, "^biases: expected all, got none; "),
        (
            {"position": "rotary", "norm": "rms", "mlp": "swiglu", "qk_norm": True, "window": 4},
            "^window: expected no, got yes; .* qwen3",
        ),
    ],
)
def test_a_model_that_transformers_does_not_have_raises_and_names_what_differs(options, message):
    with pytest.raises(InputError, match=message):
        family_of(GPTConfig(**options))


def test_probabilities_of_dropout_do_not_choose_the_family():
    config = GPTConfig(position="rotary", norm="rms", mlp="swiglu", bias=False)
    assert family_of(replace(config, **dict.fromkeys(DROPOUTS, 0.1))) == "llama"
