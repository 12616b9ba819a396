import pytest
import torch

from tritium.errors import InputError
from tritium.model import GPT, GPTConfig
from tritium.train.run.models import open_model

pytestmark = pytest.mark.plain


def test_a_run_and_its_checkpoints_open(tritium, tiny, tmp_path):
    assert tritium(*tiny)[0] == 0
    run = tmp_path / "run"
    newest, last, earlier = (
        open_model(path)
        for path in (run, run / "checkpoints" / "step-20", run / "checkpoints" / "step-10")
    )
    assert (newest.steps, last.steps, earlier.steps) == (20, 20, 10)
    assert newest.run == last.run == earlier.run == run
    assert newest.tokenizer.name == "bytes"
    assert torch.equal(newest.model.wte.weight, last.model.wte.weight)
    assert not torch.equal(newest.model.wte.weight, earlier.model.wte.weight)


def test_a_folder_of_transformers_opens_without_a_tokenizer(tmp_path):
    model = GPT(GPTConfig(n_layer=1, n_head=2, d_model=16, vocab_size=50, context_tokens=8))
    model.save_pretrained(tmp_path / "out")
    found = open_model(tmp_path / "out")
    assert torch.equal(found.model.wte.weight[:50], model.wte.weight[:50])
    assert found.run is None
    with pytest.raises(InputError, match=r"out: expected a tokenizer that tritium reads"):
        found.require_tokenizer()
    with pytest.raises(InputError, match="expected the folder of a run"):
        open_model(tmp_path / "none")
