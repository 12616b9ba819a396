"""LoRA: the layer, which weights train, merging, and the files of PEFT."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model.models import LLAMA, SMALL, random_model
from tritium.errors import InputError
from tritium.model import GPT, lora
from tritium.model.config import AdapterOptions
from tritium.model.lora import (
    add_lora,
    base_sha256,
    check_adapter,
    is_lora,
    lora_layers,
    lora_parameters,
    merge_adapter,
    merge_lora,
    save_adapter,
)

pytestmark = pytest.mark.plain

CONFIGS = {
    "gelu": SMALL,
    "gelu_exact": replace(SMALL, mlp="gelu_exact"),
    "relu2": replace(SMALL, mlp="relu2"),
    "grouped heads": replace(SMALL, n_kv_head=2),
    "llama": replace(LLAMA, n_kv_head=2, tied_head=False),
}
OPTIONS = AdapterOptions(lora=3, lora_alpha=6.0)
TOKENS = torch.arange(40).view(2, 20) % SMALL.vocab_size


def adapted(config=SMALL, options=OPTIONS) -> GPT:
    """Return a float64 model with LoRA whose B is not 0."""
    model = random_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    add_lora(model, options)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(0.0, 0.1)
    return model.double().eval()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_model_with_new_lora_computes_the_same(config):
    model = random_model(config).eval()
    expected = model(TOKENS)
    add_lora(model, OPTIONS)
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_only_lora_has_gradients(config):
    model = adapted(config)
    assert {name for name, each in model.named_parameters() if each.requires_grad} == {
        name for name, _ in model.named_parameters() if is_lora(name)
    }
    model(TOKENS, TOKENS).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == is_lora(name), name
        assert not is_lora(name) or parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_merged_model_computes_the_same_and_trains_all_weights(config):
    model = adapted(config)
    expected = model(TOKENS)
    names = set(random_model(config).state_dict())
    merge_lora(model)
    assert set(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-12, atol=1e-12)
    assert model.adapter is None


def test_a_merged_layer_shares_no_weight_with_the_frozen_one():
    layer = adapted().h[0].attn.c_attn
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for parameter in layer.merged().parameters():
        parameter.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_gradients_are_those_of_the_merged_weight():
    """dA = s B^T dW and dB = s dW A^T, where dW is the gradient of the merged weight."""
    model = adapted()
    model(TOKENS, TOKENS).backward()
    layer = model.h[1].mlp.c_fc
    merged = adapted()
    merge_lora(merged)
    merged(TOKENS, TOKENS).backward()
    dW = merged.h[1].mlp.c_fc.weight.grad
    torch.testing.assert_close(layer.lora_A.grad, 2.0 * layer.lora_B.T @ dW)
    torch.testing.assert_close(layer.lora_B.grad, 2.0 * dW @ layer.lora_A.T)


def test_generation_with_a_cache_uses_lora():
    model = adapted()
    found = model.generate(TOKENS[:, :5], 6, temperature=0.0)
    merge_lora(model)
    assert torch.equal(found, model.generate(TOKENS[:, :5], 6, temperature=0.0))


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_dropout_is_a_function_of_the_seed(recompute):
    options = AdapterOptions(lora=2, lora_dropout=0.5)
    torch.manual_seed(0)
    model = GPT(SMALL, recompute=recompute)
    add_lora(model, options)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(0.0, 0.1)
    losses = [model(TOKENS, TOKENS, dropout_seed=torch.tensor(seed)) for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    plain = model.eval()(TOKENS, TOKENS)
    assert plain == model(TOKENS, TOKENS, dropout_seed=torch.tensor(1)) != losses[0]
    losses[0].backward()  # with `block` it draws the same mask again
    grad = model.h[0].mlp.c_fc.lora_A.grad.clone()
    model.train().zero_grad()
    add = GPT(SMALL)
    add_lora(add, options)
    add.load_state_dict(model.state_dict())
    add(TOKENS, TOKENS, dropout_seed=torch.tensor(1)).backward()
    torch.testing.assert_close(grad, add.h[0].mlp.c_fc.lora_A.grad)


def test_dropout_keeps_the_mean_of_the_input():
    y = lora._drop(torch.ones(400, 50), 0.25, torch.tensor(3))
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert y.mean().item() == pytest.approx(1.0, abs=0.02)


# --- targets


@pytest.mark.parametrize(
    ("config", "targets", "ends"),
    [
        (SMALL, (), {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        (SMALL, ("c_proj",), {"attn.c_proj", "mlp.c_proj"}),
        (SMALL, ("attn.c_proj", "c_fc"), {"attn.c_proj", "mlp.c_fc"}),
        (LLAMA, ("o_proj", "gate_proj", "down_proj"), {"attn.c_proj", "mlp.c_gate", "mlp.c_proj"}),
        (LLAMA, ("q_proj", "v_proj", "k_proj"), {"attn.c_attn"}),
    ],
)
def test_targets_name_layers_by_their_end(config, targets, ends):
    found = list(lora_layers(config, targets))
    assert found == [name for name in lora_layers(config) if name.split(".", 2)[2] in ends]
    assert len(found) == config.n_layer * len(ends)


def test_a_target_can_name_one_layer():
    assert lora_layers(SMALL, ("h.1.mlp.c_fc",)) == {"h.1.mlp.c_fc": (128, 32)}


@pytest.mark.parametrize(
    ("config", "targets", "message"),
    [
        (SMALL, ("c_atn",), "lora_targets: unknown layer 'c_atn'; did you mean 'c_attn'?"),
        (SMALL, ("q_proj",), "unknown layer 'q_proj'; did you mean 'c_attn'?"),
        (SMALL, ("o_proj",), "unknown layer 'o_proj'; did you mean 'attn.c_proj'?"),
        (SMALL, ("wte",), "unknown layer 'wte'"),
        (SMALL, ("proj",), "unknown layer 'proj'"),
        (LLAMA, ("q_proj", "v_proj"), "expected all of q_proj, k_proj, v_proj"),
    ],
)
def test_unknown_targets_raise(config, targets, message):
    with pytest.raises(InputError, match="lora_targets: ") as error:
        add_lora(GPT(config), replace(OPTIONS, lora_targets=targets))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": -1}, "lora: expected a rank of 0 or more, got -1"),
        ({"lora": 2, "lora_alpha": 0.0}, "lora_alpha: expected a number above 0"),
        ({"lora": 2, "lora_dropout": 1.0}, "lora_dropout: expected a number in"),
        ({"lora_targets": ("c_attn",)}, "lora_targets: expected a rank with `lora`"),
    ],
)
def test_options_out_of_range_raise(options, message):
    with pytest.raises(InputError, match=message):
        AdapterOptions(**options)


def test_without_lora_every_recomputation_fits():
    check_adapter(AdapterOptions(), SMALL, "gelu")
    with pytest.raises(InputError, match="recompute: expected none, selective or block with LoRA"):
        check_adapter(AdapterOptions(lora=1), SMALL, "gelu")


def test_a_rank_above_the_size_of_a_layer_raises():
    check_adapter(AdapterOptions(lora=32), SMALL, "none")
    message = r"lora: expected a rank of at most 32, .* h.0.attn.c_attn .*, got "
    with pytest.raises(InputError, match=message + "33"):
        check_adapter(AdapterOptions(lora=33), SMALL, "none")
    with pytest.raises(InputError, match=message + "1000000000"):
        add_lora(random_model(), AdapterOptions(lora=10**9))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_lora_parameters_counts_the_trained_elements(config):
    model = adapted(config)
    trained = [each for each in model.parameters() if each.requires_grad]
    assert lora_parameters(config, OPTIONS) == sum(each.numel() for each in trained)
    assert lora_parameters(config, None) == 0


# --- the files of PEFT


@pytest.mark.parametrize("name", ["gelu", "llama"])
def test_a_saved_adapter_is_merged_into_its_base(name, tmp_path):
    options = replace(OPTIONS, lora_targets=("c_attn", "mlp.c_proj"))
    model = adapted(CONFIGS[name], options).float()
    base = adapted(CONFIGS[name], options).float()
    save_adapter(model, tmp_path / "adapter", base="base")
    for layer in base.modules():
        if hasattr(layer, "lora_B"):
            layer.lora_B.data.zero_()
    merge_lora(base)
    merge_adapter(base, tmp_path / "adapter")
    torch.testing.assert_close(base(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-5)


def test_the_files_of_an_adapter_have_its_dropout(tmp_path):
    model = adapted(options=replace(OPTIONS, lora_dropout=0.25)).float()
    save_adapter(model, tmp_path / "adapter", base="base")
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["lora_dropout"] == 0.25


def test_the_files_of_an_adapter_name_each_layer_unless_all_blocks_have_lora(tmp_path):
    """PEFT adds LoRA to all layers whose names end like a target."""
    options = replace(OPTIONS, lora_targets=("c_attn", "h.0.mlp.c_fc", "h.2.mlp.c_fc"))
    model = adapted(replace(SMALL, n_layer=3), options).float()
    save_adapter(model, tmp_path / "adapter", base="base")
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    names = ["attn.c_attn", "transformer.h.0.mlp.c_fc", "transformer.h.2.mlp.c_fc"]
    assert sorted(fields["target_modules"]) == names


def test_an_adapter_of_another_model_raises(tmp_path):
    model = adapted().float()
    save_adapter(model, tmp_path / "adapter", base="base")
    with pytest.raises(InputError, match="belongs to another model of the same shape"):
        merge_adapter(random_model(SMALL, seed=1), tmp_path / "adapter")
    wide = replace(SMALL, d_model=64)
    with pytest.raises(InputError, match=r"lora_A \(r, 64\).*got \(3, 32\).*another model"):
        merge_adapter(random_model(wide), tmp_path / "adapter")
    with pytest.raises(InputError, match=r"model of 1 blocks, got .*h\.1\."):
        merge_adapter(random_model(replace(SMALL, n_layer=1)), tmp_path / "adapter")


def test_damaged_and_unsupported_adapters_raise(tmp_path):
    folder = tmp_path / "adapter"
    save_adapter(adapted().float(), folder, base="base")
    file = folder / "adapter_config.json"
    fields = json.loads(file.read_text())
    model = random_model()
    changes = [
        ({"use_dora": True}, "use_dora: expected none, got True"),
        ({"bias": "all"}, "bias: expected 'none', got 'all'"),
        ({"peft_type": "IA3"}, "peft_type LORA or PREFIX_TUNING, got 'IA3'"),
        ({"lora_alpha": "x"}, "lora_alpha: expected a number, got 'x'"),
        ({"lora_alpha": math.inf}, "lora_alpha: expected a number, got inf"),
        ({"init_lora_weights": "pissa_niter_4"}, "expected LoRA of unchanged weights"),
        ({"r": 99}, "r: expected 3, as base_model"),
    ]
    for change, message in changes:
        file.write_text(json.dumps(fields | change))
        with pytest.raises(InputError, match=message):
            merge_adapter(model, folder)
    file.write_text(json.dumps(fields))
    tensors = load_file(folder / "adapter_model.safetensors")
    empty = {key: value[:0] if "lora_A" in key else value[:, :0] for key, value in tensors.items()}
    short = {key: value[:-1] if "lora_B" in key else value for key, value in tensors.items()}
    for changed in (empty, short):
        save_file(changed, folder / "adapter_model.safetensors")
        with pytest.raises(InputError, match="expected lora_A"):
            merge_adapter(model, folder)
    file.write_text("{")
    with pytest.raises(InputError, match="expected the configuration of an adapter"):
        merge_adapter(model, folder)
    file.write_text(json.dumps(fields))
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="damaged"):
        merge_adapter(model, folder)


def test_the_hash_does_not_depend_on_lora():
    model = random_model()
    before = base_sha256(model)
    add_lora(model, OPTIONS)
    assert base_sha256(model) == before


def test_the_hash_does_not_depend_on_padded_rows_of_the_vocabulary():
    model = random_model()
    other = random_model()
    rows = torch.zeros(3, SMALL.d_model)
    other.wte.weight = torch.nn.Parameter(torch.cat([model.wte.weight.detach(), rows]))
    assert base_sha256(other) == base_sha256(model)


def test_a_new_layer_draws_both_signs_of_a():
    layer = adapted().h[0].attn.c_attn
    bound = 1 / math.sqrt(SMALL.d_model)
    assert -bound <= layer.lora_A.min() < -bound / 2
    assert bound / 2 < layer.lora_A.max() <= bound


def test_rslora_divides_alpha_by_the_root_of_the_rank(tmp_path):
    model = adapted().float()
    folder = tmp_path / "adapter"
    save_adapter(model, folder, base="base")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_rslora": True}))
    layer = model.h[0].attn.c_attn
    change = OPTIONS.alpha / math.sqrt(OPTIONS.lora) * (layer.lora_B @ layer.lora_A).detach()
    expected = layer.weight + change
    for each in model.modules():
        if isinstance(each, lora.LoraLinear):
            each.lora_B.data.zero_()
    merge_lora(model)
    merge_adapter(model, folder)
    torch.testing.assert_close(model.h[0].attn.c_attn.weight.detach(), expected)


# --- PEFT itself, in both directions


@pytest.mark.parametrize("name", ["gelu", "llama"])
def test_peft_computes_the_same_logits_from_our_adapter(name, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    options = replace(OPTIONS, lora_targets=("c_attn", "attn.c_proj", "c_fc", "h.0.mlp.c_proj"))
    model = adapted(CONFIGS[name], options).float()
    base = adapted(CONFIGS[name], options).float()
    for layer in base.modules():
        if hasattr(layer, "lora_B"):
            layer.lora_B.data.zero_()
    merge_lora(base)
    base.save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "targets"),
    [("gelu", ["c_attn", "c_proj"]), ("llama", ["q_proj", "v_proj", "up_proj"])],
)
def test_we_compute_the_same_logits_from_an_adapter_of_peft(name, targets, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = random_model(CONFIGS[name])
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(0.3)
    base.eval().save_pretrained(tmp_path / "base")
    settings = {"r": 4, "lora_alpha": 6, "target_modules": targets, "use_rslora": True}
    config = peft.LoraConfig(fan_in_fan_out=name == "gelu", task_type="CAUSAL_LM", **settings)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(theirs, config).eval()
    for key, parameter in theirs.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(0.0, 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    merge_adapter(base, Path(tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(base(TOKENS), theirs(TOKENS).logits, rtol=0, atol=1e-5)
