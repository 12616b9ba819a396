import json

import pytest

from tritium.errors import InputError
from tritium.train.config import TrainConfig
from tritium.train.data.build import build
from tritium.train.data.dataset import open_dataset
from tritium.train.run.folder import check_folder_unused, claim_folder, read_run

pytestmark = pytest.mark.plain

CONFIG = TrainConfig.from_options(steps=7, n_layer=2, data=("a.txt", "b.txt"))


@pytest.fixture
def dataset(corpus, tmp_path):
    build(tmp_path / "dataset", [corpus], "bytes", progress=False)
    return open_dataset(tmp_path / "dataset")


@pytest.fixture
def run(tmp_path, dataset):
    claim_folder(tmp_path / "run", CONFIG, dataset)
    return tmp_path / "run"


def test_round_trip(run, dataset):
    record = read_run(run)
    assert record.train == CONFIG
    assert record.model == CONFIG.gpt(257)
    assert record.dataset == dataset.path.resolve()
    assert record.tokenizer_sha256 == dataset.tokenizer.sha256


def test_a_folder_is_claimed_once(run, dataset, tmp_path):
    with pytest.raises(InputError, match="this one is a run already"):
        claim_folder(run, CONFIG, dataset)
    (tmp_path / "other").mkdir()
    check_folder_unused(tmp_path / "other")
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="this one is in use"):
        check_folder_unused(tmp_path / "other")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"train": {}}', b'{"train": 3}']
)
def test_damaged_configurations(run, content):
    (run / "config.json").write_bytes(content)
    with pytest.raises(
        InputError,
        match=r"config\.json: expected what `tritium train` wrote there, got something else",
    ):
        read_run(run)


@pytest.mark.parametrize(
    "change",
    [
        ("train", "steps", None),
        ("train", "steps", "x"),
        ("train", "colour", 1),
        ("model", "n_head", 7),
    ],
)
def test_changed_configurations(run, change):
    part, key, value = change
    record = json.loads((run / "config.json").read_text())
    if value is None:
        del record[part][key]
    else:
        record[part][key] = value
    (run / "config.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"config\.json: expected"):
        read_run(run)


def test_no_run(tmp_path):
    with pytest.raises(InputError, match="expected the folder of a run"):
        read_run(tmp_path)
