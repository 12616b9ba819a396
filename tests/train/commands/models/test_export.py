import json
import re
import shlex

import pytest
import torch

from tritium.train.commands.models import _model_folder
from tritium.train.run.folder import read_run
from tritium.train.run.models import open_model

pytestmark = pytest.mark.plain
transformers = pytest.importorskip("transformers")


@pytest.fixture
def run(tritium, tiny, tmp_path):
    assert tritium(*tiny)[0] == 0
    return tmp_path / "run"


def test_an_exported_run_opens_in_transformers_and_generates_the_same_tokens(
    run, tritium, tmp_path
):
    status, out, err = tritium("export", run, tmp_path / "out")
    assert status == 0, err
    assert "AutoModelForCausalLM" in out
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    trained = open_model(run)
    ids = torch.tensor([trained.tokenizer().encode("the quick").tolist()])
    assert tokenizer("the quick")["input_ids"] == ids[0].tolist()
    expected = other.generate(
        ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    found = trained.load().generate(ids, 6, temperature=0.0)
    assert found[0, -6:].tolist() == expected[0, -6:].tolist()

    card = (tmp_path / "out" / "README.md").read_text()
    assert "| steps | 20 of 20 |" in card
    assert "| tokens per step | 64 |" in card
    assert card.count("validation loss") == 1, "that of the last step"
    assert re.search(r"validation loss [|] [\d.]+ nats per token [|]", card)


def test_the_card_of_a_preference_run_has_no_loss_per_token(tiny, tritium, tmp_path):
    assert tritium(*tiny, "--context-tokens", 48, "--steps", 2)[0] == 0
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 10
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    out = tmp_path / "prefer"
    words = ("--data", tmp_path / "pairs.json", "--steps", 1, "--out", out)
    status, _, err = tritium("finetune", "prefer", tmp_path / "run", *words)
    assert status == 0, err
    status, _, err = tritium("export", out, tmp_path / "out")
    assert status == 0, err
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"validation loss [|] [\d.]+ nats [|]", card)


def test_sample_gives_the_same_text_from_run_checkpoint_and_export(run, tritium, tmp_path):
    assert tritium("export", run, tmp_path / "out")[0] == 0
    texts = [
        tritium("sample", path, "--prompt", "the", "--seed", 1, "--max-new-tokens", 8)[1]
        for path in (run, run / "checkpoints" / "step-20", tmp_path / "out")
    ]
    assert texts[0].startswith("the")
    assert texts[0] == texts[1] == texts[2]
    earlier = run / "checkpoints" / "step-10"
    assert tritium("export", earlier, tmp_path / "earlier", "--dtype", "bfloat16")[0] == 0
    card = (tmp_path / "earlier" / "README.md").read_text()
    assert "| steps | 10 of 20 |" in card
    command = re.search(r"command [|] `tritium (train .*)`", card)[1]
    again = tmp_path / "again"
    assert tritium(*shlex.split(command), "--out", again)[0] == 0
    assert read_run(again).train.with_options(out=str(run)) == read_run(run).train
    assert json.loads((tmp_path / "earlier" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_failed_export_leaves_nothing(run, tritium, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(_model_folder, "save_for_transformers", fail)
    assert tritium("export", run, tmp_path / "a" / "b")[0] == 2
    assert not (tmp_path / "a").exists()
    (tmp_path / "empty").mkdir()
    assert tritium("export", run, tmp_path / "empty")[0] == 2
    assert not list((tmp_path / "empty").iterdir())


def test_the_tokenizer_of_a_published_folder_is_copied(run, tritium, tmp_path):
    assert tritium("export", run, tmp_path / "first")[0] == 0
    (tmp_path / "first" / "tritium_tokenizer.json").unlink()
    assert tritium("export", tmp_path / "first", tmp_path / "second")[0] == 0
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / "second")
    assert len(other) == 257


def test_bad_input_is_one_line_and_writes_nothing(run, error_of, tmp_path):
    before = sorted(path.name for path in tmp_path.iterdir())
    assert "expected a run, a checkpoint" in error_of("export", tmp_path / "none", tmp_path / "out")
    assert "expected a new or empty folder" in error_of("export", run, run)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    (run / "checkpoints" / "step-20" / "model.safetensors").write_bytes(b"")
    assert "damaged" in error_of("export", run, tmp_path / "out")
    # The folder is checked before the weights are read.
    assert "expected a new or empty folder" in error_of("export", run, run)
    assert not (tmp_path / "out").exists()


def test_a_run_of_a_file_whose_name_is_not_utf8_is_exported(tritium, tiny, tmp_path):
    data = tmp_path / "t\udcef.txt"
    data.write_text("the quick brown fox\n" * 200)
    assert tritium(*tiny, "--data", data)[0] == 0
    assert tritium("export", tmp_path / "run", tmp_path / "out")[0] == 0
    assert "t?.txt |" in (tmp_path / "out" / "README.md").read_text()


def test_an_export_below_a_file_names_the_file(run, tritium, tmp_path):
    (tmp_path / "file").write_text("keep")
    for words in ((), ("--adapter",)):
        status, _, err = tritium("export", run, tmp_path / "file" / "out", *words)
        assert status == 2
        assert err.endswith(f"got the file {tmp_path / 'file'}; choose another\n")
    assert (tmp_path / "file").read_text() == "keep"
