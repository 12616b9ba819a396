import gzip
import json
import urllib.request

import pytest

from tritium.train.data.build import build
from tritium.train.data.dataset import read_info
from tritium.train.data.documents import sources

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
    assert "dropped 1 duplicate document, skipped 1 file" in out

    at = tiny.index("--data")
    words = tiny[:at] + tiny[at + 4 :]  # without --data and --tokenizer
    status, _, err = tritium(*words, "--data", dataset)
    assert status == 0, err
    options = ("--max-new-tokens", 8, "--seed", 3)
    status, out, err = tritium("sample", tmp_path / "run", "--prompt", "# Title", *options)
    assert status == 0, err
    assert out.startswith("# Title")
    assert tritium("sample", tmp_path / "run", "--prompt", "# Title", *options)[1] == out


def test_build_reports_what_it_dropped(tritium, tmp_path):
    texts = [f"Document {i} says {i * i}, and nothing else." for i in range(150)]
    lines = [json.dumps({"text": text}) + "\n" for text in [*texts, "short", "ha ha " * 90]]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    words = ["data", "build", tmp_path / "out", tmp_path / "a.jsonl", "--tokenizer", "bytes"]
    words += ["--filter", "length=20", "repetition", "--threads", "2"]
    status, out, err = tritium(*words)
    assert status == 0, err
    assert "dropped by length: 1 document, 5 characters" in out
    assert f"    {tmp_path / 'a.jsonl'}:151 (5): short" in out
    record = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert record["filters"] == {"length": 20, "repetition": 0.3}
    assert [each["documents"] for each in record["dropped"]] == [1, 1]
    assert read_info(tmp_path / "out").dropped[0].reason == "length"


def test_bad_selections_are_one_line(error_of, corpus, tmp_path):
    words = ("data", "build", tmp_path / "out", corpus)
    assert "unknown filter 'lenght'" in error_of(*words, "--filter", "lenght")
    assert error_of(*words, "--weights", "-1").startswith("tritium: --weights: expected numbers")
    assert "got 0 0" in error_of(*words, tmp_path, "--weights", "0", "0")
    assert "--near-duplicates: expected 0" in error_of(*words, "--near-duplicates", "2")
    assert "--threads: expected 1 or more" in error_of(*words, "--threads", "0")
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": \n')
    line = error_of("data", "build", tmp_path / "out", tmp_path / "bad.jsonl", "--filter", "length")
    assert "bad.jsonl:2: expected one JSON object per line" in line
    assert not (tmp_path / "out").exists()


def test_named_corpus_without_network_is_one_line(error_of, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setenv("TRITIUM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(urllib.request, "urlopen", fail)
    monkeypatch.setattr(sources, "_file_system", fail)
    monkeypatch.chdir(tmp_path)
    line = error_of("data", "build", tmp_path / "out", "fineweb-edu-10b", "--tokenizer", "bytes")
    assert "fineweb-edu-10b: expected to reach the network, got OSError; connect, or get" in line
    line = error_of("train", "shakespeare-char", "--out", tmp_path / "run")
    assert "get https://raw.githubusercontent.com/karpathy/char-rnn/" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == []


def test_verify_checks_every_shard(tritium, error_of, tmp_path):
    (tmp_path / "a.txt").write_text("some words " * 100)
    dataset = tmp_path / "dataset"
    build(dataset, [tmp_path / "a.txt"], "bytes", shard_tokens=300, progress=False)
    status, out, _ = tritium("data", "verify", dataset)
    assert status == 0
    assert f"{dataset}: 5 shards with 1,100 tokens match their checksums; all" in out
    assert "train: 1 document, 990 tokens, 990 bytes" in out
    for name in ("train-00001.bin", "val-00000.bin"):
        content = bytearray((dataset / name).read_bytes())
        content[-1] ^= 1
        (dataset / name).write_bytes(content)
    (dataset / "train-00003.bin").unlink()
    line = error_of("data", "verify", dataset)
    assert "train-00001.bin: damaged: expected token checksum" in line
    assert line.endswith("also damaged: train-00003.bin, val-00000.bin")
    assert "expected a dataset folder" in error_of("data", "verify", tmp_path)


def test_exported_shards_build_the_same_dataset(tritium, tmp_path):
    (tmp_path / "a.txt").write_text("some words " * 100)
    build(tmp_path / "one", [tmp_path / "a.txt"], "bytes", progress=False)
    status, out, err = tritium("data", "export", tmp_path / "one", tmp_path / "bins")
    assert status == 0, err
    assert f"{tmp_path / 'bins' / 'bins_train_*.bin'}: 991 tokens" in out
    words = ("data", "build", tmp_path / "two", tmp_path / "bins", "--tokenizer", "bytes")
    status, out, err = tritium(*words)
    assert status == 0, err
    assert "train: 1 document, 991 tokens, 990 bytes" in out
