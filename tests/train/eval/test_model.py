from dataclasses import replace

import pytest
import torch

from tritium.errors import InputError
from tritium.model import GPT, GPTConfig
from tritium.train.eval.model import OpenedModel
from tritium.train.machine.options import OpenOptions
from tritium.train.run.models import SavedModel

pytestmark = pytest.mark.plain


def test_a_model_without_tokenizer_opens_in_the_chosen_precision(tmp_path, monkeypatch):
    config = GPTConfig(n_layer=1, n_head=1, d_model=8, vocab_size=300, context_tokens=8)
    GPT(config).save_pretrained(tmp_path / "model")
    options = OpenOptions(device="cpu", precision="bfloat16")
    model = OpenedModel.open(tmp_path / "model", options)
    assert not model.gpt.training
    assert model.gpt(torch.zeros(1, 2, dtype=torch.int64)).dtype == torch.bfloat16
    assert model.tokenizer is None
    record = model.record()
    assert record["tokenizer"] is None
    assert record["precision"] == "bfloat16"
    assert list(record["model"]["sha256"]) == ["model.safetensors"]
    with pytest.raises(InputError, match="expected a model with a tokenizer"):
        model.needed_tokenizer()
    monkeypatch.setattr(SavedModel, "load", lambda self: pytest.fail("read the weights"))
    with pytest.raises(InputError, match="expected a model with a tokenizer"):
        OpenedModel.open(tmp_path / "model", options, needs_tokenizer=True)
    monkeypatch.undo()
    named = OpenedModel.open(tmp_path / "model", replace(options, tokenizer="bytes"))
    assert named.needed_tokenizer().name == "bytes"
