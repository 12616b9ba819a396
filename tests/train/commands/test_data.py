import gzip
import json

import pytest

from tritium.train.data.build import build

pytestmark = pytest.mark.plain


def test_help_without_words_is_the_help_of_build(tritium):
    status, out, _ = tritium("data")
    assert status == 0
    assert "usage: tritium data build" in out
    assert "OUT_DIR" in out
    assert tritium("data", "build", "--help")[1] == out


def test_unknown_command_suggests_build(error_of):
    assert "unknown command 'data biuld'; did you mean 'data build'?" in error_of("data", "biuld")


def test_bad_option_is_named_as_flag(error_of, corpus, tmp_path):
    line = error_of("data", "build", tmp_path / "out", corpus, "--held-out", "2")
    assert line.startswith("tritium: --held-out: expected a number between 0 and 1, got 2.0")
    assert not (tmp_path / "out").exists()


def test_built_dataset_trains_and_samples(tritium, tiny, corpus, tmp_path):
    more = tmp_path / "more"
    more.mkdir()
    for i in range(150):
        (more / f"{i}.md").write_text(f"# Title {i}\n\nSome words about number {i}.\n")
    (more / "copy.md").write_text((more / "0.md").read_text())
    (more / "picture.txt").write_bytes(b"\0\1\2")
    with gzip.open(more / "lines.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "a line of json"}) + "\n")
    dataset = tmp_path / "dataset"
    status, out, err = tritium("data", "build", dataset, more, corpus, "--tokenizer", "bpe:300")
    assert status == 0, err
    assert "dropped 1 duplicate documents, skipped 1 files" in out

    at = tiny.index("--data")
    words = tiny[:at] + tiny[at + 4 :]  # without --data and --tokenizer
    status, _, err = tritium(*words, "--data", dataset)
    assert status == 0, err
    options = ("--max-new-tokens", 8, "--seed", 3)
    status, out, err = tritium("sample", tmp_path / "run", "--prompt", "# Title", *options)
    assert status == 0, err
    assert out.startswith("# Title")
    assert tritium("sample", tmp_path / "run", "--prompt", "# Title", *options)[1] == out


def test_verify_checks_every_shard(tritium, error_of, tmp_path):
    (tmp_path / "a.txt").write_text("some words " * 100)
    dataset = tmp_path / "dataset"
    build(dataset, [tmp_path / "a.txt"], "bytes", shard_tokens=300, progress=False)
    status, out, _ = tritium("data", "verify", dataset)
    assert status == 0
    assert f"{dataset}: 5 shards with 1,100 tokens match their checksums" in out
    for name in ("train-00001.bin", "val-00000.bin"):
        content = bytearray((dataset / name).read_bytes())
        content[-1] ^= 1
        (dataset / name).write_bytes(content)
    (dataset / "train-00003.bin").unlink()
    line = error_of("data", "verify", dataset)
    assert "train-00001.bin: damaged: expected token checksum" in line
    assert line.endswith("2 more shards are damaged: train-00003.bin, val-00000.bin")
    assert "expected a dataset folder" in error_of("data", "verify", tmp_path)
