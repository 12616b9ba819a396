import string

import pytest
import torch

from tritium.errors import InputError
from tritium.model import GPT, GPTConfig
from tritium.train.data.tokenizers.tokenizer import from_spec
from tritium.train.run.models import open_model

pytestmark = pytest.mark.plain


def test_a_run_and_its_checkpoints_open(tritium, tiny, tmp_path):
    assert tritium(*tiny)[0] == 0
    run = tmp_path / "run"
    newest, last, earlier = (
        open_model(path)
        for path in (run, run / "checkpoints" / "step-20", run / "checkpoints" / "step-10")
    )
    assert newest.checkpoint == last.checkpoint == run / "checkpoints" / "step-20"
    assert newest.run == last.run == earlier.run == run
    assert newest.tokenizer().name == "bytes"
    weights = [each.load().wte.weight for each in (newest, last, earlier)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_another_tokenizer_for_a_run_must_have_its_tokens(tritium, tiny, tmp_path):
    assert tritium(*tiny, "--tokenizer", "bpe:300")[0] == 0
    run = open_model(tmp_path / "run")
    with pytest.raises(
        InputError, match=r"expected the 300 tokens of bpe:300, .* the 257 of bytes"
    ):
        run.tokenizer("bytes")
    from_spec("bpe:300", lambda: [string.printable * 50]).save(tmp_path / "other.json")
    with pytest.raises(InputError, match=r"expected the 300 tokens of .* the 300 of bpe:300"):
        run.tokenizer(str(tmp_path / "other.json"))
    copy = tmp_path / "copy.json"
    copy.write_bytes(run.tokenizer_path.read_bytes())
    run.tokenizer_path.write_text("damaged")
    assert run.tokenizer(str(copy)).name == "bpe:300"
    run.tokenizer_path.unlink()
    assert run.tokenizer(str(copy)).name == "bpe:300"
    from_spec("bytes", list).save(run.tokenizer_path)  # the tokenizer of another dataset
    assert run.tokenizer(str(copy)).name == "bpe:300"


def test_a_folder_of_transformers_opens_without_a_tokenizer(tmp_path):
    model = GPT(GPTConfig(n_layer=1, n_head=2, d_model=16, vocab_size=50, context_tokens=8))
    model.save_pretrained(tmp_path / "out")
    found = open_model(tmp_path / "out")
    assert torch.equal(found.load().wte.weight[:50], model.wte.weight[:50])
    assert found.run is None
    with pytest.raises(InputError, match=r"out: expected a model with a tokenizer"):
        found.tokenizer()
    with pytest.raises(InputError, match="expected a run, a checkpoint"):
        open_model(tmp_path / "none")


def test_a_folder_with_a_damaged_config_is_named_as_such(tmp_path):
    (tmp_path / "config.json").write_text("{")
    message = "got a folder whose config.json is of another program, or damaged; get it again"
    with pytest.raises(InputError, match=message):
        open_model(tmp_path)
