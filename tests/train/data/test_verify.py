"""verify_dataset finds damaged shards and counts that do not match."""

import json

import pytest

from tritium.errors import InputError
from tritium.train.data.build import build
from tritium.train.data.shards import write_shard
from tritium.train.data.verify import verify_dataset
from tritium.train.storage.files import seal

pytestmark = pytest.mark.plain


@pytest.fixture
def dataset(tmp_path):
    lines = [json.dumps({"text": f"Größe {i}"}) + "\n" for i in range(150)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    build(tmp_path / "out", [tmp_path / "a.jsonl"], "bytes", shard_tokens=300, progress=False)
    return tmp_path / "out"


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "bpe:265"])
def test_datasets_of_few_and_many_documents_pass(tmp_path, dataset, tokenizer):
    verify_dataset(dataset)
    (tmp_path / "b.txt").write_text("größer als vorher, " * 30)
    build(tmp_path / "few", [tmp_path / "b.txt"], tokenizer, progress=False)
    assert verify_dataset(tmp_path / "few").info.train.documents == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("documents", r"expected 1\d\d train documents, got 1\d\d end-of-text tokens"),
        ("bytes", r"expected 1,\d{3} bytes of train text, its tokens have 1,\d{3}"),
        ("tokens", r"expected 1\d{3} train tokens, its shards hold"),
    ],
)
def test_wrong_count_raises(dataset, name, message):
    record = json.loads((dataset / "dataset.json").read_text())
    record.pop("sha256")
    record["train"][name] += 2
    (dataset / "dataset.json").write_bytes(seal(record))
    with pytest.raises(InputError, match=message):
        verify_dataset(dataset)


def test_vocabulary_of_a_shard_is_checked(dataset):
    record = json.loads((dataset / "dataset.json").read_text())
    shard = dataset / record["train"]["shards"][0]
    write_shard(shard, [300] * 300, 400, record["tokenizer_sha256"])
    with pytest.raises(InputError, match="expected a vocabulary of 257 tokens, got 400"):
        verify_dataset(dataset)


def test_every_damaged_shard_is_named(dataset):
    for name in ("train-00001.bin", "val-00000.bin"):
        content = bytearray((dataset / name).read_bytes())
        content[-1] ^= 1
        (dataset / name).write_bytes(content)
    with pytest.raises(InputError, match=r"train-00001.bin: damaged.*; also damaged: val-00000.b"):
        verify_dataset(dataset)


def test_a_record_with_fewer_documents_than_the_shards_raises(dataset):
    record = json.loads((dataset / "dataset.json").read_text())
    record.pop("sha256")
    record["train"]["documents"] -= 1
    (dataset / "dataset.json").write_bytes(seal(record))
    with pytest.raises(InputError, match="documents"):
        verify_dataset(dataset)
