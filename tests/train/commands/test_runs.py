import pytest

from tritium.train.storage.lock import FolderLock

pytestmark = pytest.mark.plain


def test_each_run_has_a_line_with_its_status(tritium, error_of, tiny, tmp_path):
    assert "expected runs in this folder, found none" in error_of("runs", tmp_path)
    assert tritium(*tiny, "--steps", 2)[0] == 0
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    (tmp_path / "exported").mkdir()  # a model of transformers is not listed
    (tmp_path / "exported" / "config.json").write_text('{"model_type": "gpt2"}')
    status, out, _ = tritium("runs", tmp_path)
    assert status == 0
    head, broken, run = out.splitlines()
    assert head.split() == [
        *("run", "task", "parameters", "steps", "tokens", "loss", "bits", "per", "byte"),
        *("tokens/s", "status"),
    ]
    assert "expected what `tritium train` wrote there" in broken
    assert run.split()[1] == "pretrain"
    assert "2 of 2" in run
    assert run.endswith("  finished")
    with FolderLock(tmp_path / "run"):
        assert tritium("runs", tmp_path / "run")[1].endswith("  training\n")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "val_loss": 1, "val_bits_per_byte": "x"}\n')
    status, out, _ = tritium("runs", tmp_path / "run")
    assert status == 0
    assert "  finished; metrics.jsonl: 1 of " in out
    assert out.endswith(" lines cannot be read and are left out\n")
