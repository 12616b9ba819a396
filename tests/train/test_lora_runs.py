"""Runs with LoRA: what is trained, stored, resumed and exported."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tritium.errors import InputError
from tritium.model import GPT
from tritium.model.lora import is_lora
from tritium.train.api import load
from tritium.train.run.models import open_model

pytestmark = pytest.mark.plain

LORA = ("--lora", 2, "--lora-alpha", 4, "--lora-dropout", 0.1, "--lr", 0.01)


def tensors(run, step=20, file="model"):
    return load_file(run / "checkpoints" / f"step-{step}" / f"{file}.safetensors")


@pytest.fixture
def words(tiny, tritium, tmp_path):
    """The command of a run with LoRA, tmp_path/lora, that starts from the run tmp_path/run."""
    assert tritium(*tiny)[0] == 0
    out = tmp_path / "lora"
    return [*tiny, *LORA, "--init-from", tmp_path / "run", "--out", out]


def test_a_run_trains_only_lora_and_resumes_bitwise(words, tritium, tmp_path):
    status, _, err = tritium(*words)
    assert status == 0, err
    run = tmp_path / "lora"
    before, after = tensors(run, 0), tensors(run)
    assert {name for name in after if not torch.equal(before[name], after[name])} == {
        name for name in after if is_lora(name)
    }
    first = tensors(tmp_path / "run")
    assert all(torch.equal(value, after[name]) for name, value in first.items())
    assert {name.rpartition(".")[0] for name in tensors(run, file="optimizer")} == {
        name for name in after if is_lora(name)
    }
    shutil.rmtree(run / "checkpoints" / "step-20")
    assert tritium("train", "--resume", run)[0] == 0
    assert all(torch.equal(value, after[name]) for name, value in tensors(run).items())


def test_fsdp_writes_checkpoints_if_a_parameter_has_fewer_rows_than_ranks(words, launch, tmp_path):
    more = ("--parallel", "fsdp", "--batch-size", 6, "--steps", 2)
    status, _, errors = launch(3, *words[1:], *more)
    assert status == [0, 0, 0], errors
    assert tensors(tmp_path / "lora", 2)


def test_run_export_and_adapter_are_the_same_model(words, tritium, tmp_path):
    assert tritium(*words)[0] == 0
    run = tmp_path / "lora"
    assert tritium("export", run, tmp_path / "merged")[0] == 0
    status, out, err = tritium("export", run, tmp_path / "adapter", "--adapter")
    assert status == 0, err
    assert "PeftModel.from_pretrained" in out
    tokens = torch.arange(16)[None] + 97
    expected = open_model(run).load()(tokens)
    base = open_model(tmp_path / "run").load()(tokens)
    assert (expected - base).abs().max() > 1e-3
    for folder in (tmp_path / "merged", tmp_path / "adapter"):
        torch.testing.assert_close(open_model(folder).load()(tokens), expected)
    options = ("--prompt", "the", "--seed", 1, "--max-new-tokens", 8)
    texts = {tritium("sample", path, *options)[1] for path in (run, tmp_path / "adapter")}
    assert len(texts) == 1


def test_an_adapter_of_weights_in_16_bits_is_added_in_float32(tiny, tritium, tmp_path):
    assert tritium(*tiny, "--steps", 1)[0] == 0
    open_model(tmp_path / "run").load().bfloat16().save_pretrained(tmp_path / "base")
    assert open_model(tmp_path / "base").load().wte.weight.dtype == torch.bfloat16
    words = ("--init-from", tmp_path / "base", "--out", tmp_path / "lora", "--steps", 2)
    assert tritium(*tiny, *LORA, *words)[0] == 0
    assert tritium("export", tmp_path / "lora", tmp_path / "adapter", "--adapter")[0] == 0
    tokens = torch.arange(16)[None] + 97
    found, expected = (open_model(tmp_path / name).load()(tokens) for name in ("adapter", "lora"))
    torch.testing.assert_close(found, expected)


def test_an_adapter_names_its_base_from_any_working_directory(
    words, tritium, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words[words.index("--init-from") + 1] = "run"
    assert tritium(*words, "--steps", 1)[0] == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert tritium("export", tmp_path / "lora", tmp_path / "adapter", "--adapter")[0] == 0
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(tmp_path / "run")


def test_peft_opens_the_adapter_of_a_run(words, tritium, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    assert tritium(*words)[0] == 0
    assert tritium("export", tmp_path / "run", tmp_path / "base")[0] == 0
    assert tritium("export", tmp_path / "lora", tmp_path / "adapter", "--adapter")[0] == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    tokens = torch.arange(16)[None] + 97
    with torch.no_grad():
        expected = theirs(tokens).logits
        found = open_model(tmp_path / "lora").load()(tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_prefix_is_trained_resumed_exported_and_loaded(tiny, tritium, error_of, tmp_path):
    assert tritium(*tiny)[0] == 0
    run = tmp_path / "prefix"
    words = [
        *tiny,
        "--prefix-tokens",
        3,
        "--lr",
        0.1,
        "--init-from",
        tmp_path / "run",
        "--out",
        run,
    ]
    status, _, err = tritium(*words)
    assert status == 0, err
    before, after = tensors(run, 0), tensors(run)
    assert [name for name in after if not torch.equal(before[name], after[name])] == ["prefix"]
    assert set(tensors(run, file="optimizer")) == {
        "prefix.exp_avg",
        "prefix.exp_avg_sq",
        "prefix.step",
    }
    shutil.rmtree(run / "checkpoints" / "step-20")
    assert tritium("train", "--resume", run)[0] == 0
    assert torch.equal(tensors(run)["prefix"], after["prefix"])

    status, _, err = tritium("export", run, tmp_path / "adapter", "--adapter")
    assert status == 0, err
    tokens = torch.arange(13)[None] + 97
    expected = open_model(run).load()(tokens)
    assert torch.equal(open_model(tmp_path / "adapter").load()(tokens), expected)
    with pytest.raises(InputError, match="expected a run, got an adapter"):
        open_model(tmp_path / "adapter").load_with_adapter()
    with pytest.raises(InputError, match="expected the folder of a run, got an adapter"):
        load(tmp_path / "adapter").resume()  # not the run of the model
    options = ("--prompt", "t", "--seed", 1, "--max-new-tokens", 30)
    texts = {tritium("sample", path, *options)[1] for path in (run, tmp_path / "adapter")}
    assert len(texts) == 1
    line = error_of("export", run, tmp_path / "merged")
    assert "expected a model without a prefix, got 3 prefix tokens" in line
    assert line.endswith("add --adapter")
    assert "--prefix-tokens: expected no LoRA with a prefix" in error_of(
        *words, "--lora", 2, "--out", tmp_path / "both"
    )
    line = error_of(*words, "--document-mask", "--out", tmp_path / "packed")
    assert (
        "--prefix-tokens: expected rows of one document, got packed ones; turn --document-mask off"
        in line
    )
    line = error_of(*words, "--prefix-tokens", 16, "--out", tmp_path / "long")
    assert "--prefix-tokens: expected less than the context of 16 tokens, got 16" in line


def test_bad_options_are_one_line(words, tiny, error_of, tritium, tmp_path):
    line = error_of(*words, "--lora-targets", "c_atn")
    assert "--lora-targets: unknown layer 'c_atn'; did you mean 'c_attn'?" in line
    line = error_of(*words, "--recompute", "gelu")
    assert "--recompute: expected none, selective or block with LoRA" in line
    other = ("--out", tmp_path / "lora")
    assert "--lora: expected a trained model to start from" in error_of(*tiny, *other, "--lora", 2)
    line = error_of(*tiny, *other, "--lora-alpha", 2)
    assert "--lora-alpha: expected a rank with --lora" in line
    assert not (tmp_path / "lora").exists()
    line = error_of("export", tmp_path / "run", tmp_path / "out", "--adapter")
    assert "expected a run that trained LoRA or a prefix" in line
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_its_model_is_one_line(words, tritium, error_of, tmp_path):
    assert tritium(*words)[0] == 0
    assert tritium("export", tmp_path / "lora", tmp_path / "adapter", "--adapter")[0] == 0
    # Another model of the same shape, then none.
    torch.manual_seed(1)
    config = open_model(tmp_path / "run").config
    (tmp_path / "run").rename(tmp_path / "moved")
    GPT(config).save_pretrained(tmp_path / "run")
    sample = ("sample", tmp_path / "adapter", "--tokenizer", "bytes")
    assert "another model of the same shape" in error_of(*sample)
    shutil.rmtree(tmp_path / "run")
    assert "base_model_name_or_path: expected the folder of a model" in error_of(*sample)
