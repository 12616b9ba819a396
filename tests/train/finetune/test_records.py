import json
from dataclasses import replace

import numpy as np
import pytest

from tritium.errors import InputError
from tritium.train.config import TrainConfig
from tritium.train.distributed.world import World
from tritium.train.execution import resolve
from tritium.train.finetune.records import (
    RecordLoader,
    fit_epochs,
    read_records,
    record_batches,
    row_tokens,
    split,
)

pytestmark = pytest.mark.plain


class Items:
    """Rows with a number and as many targets each."""

    def __init__(self, numbers):
        self.num_targets = np.asarray(numbers)

    def __len__(self) -> int:
        return len(self.num_targets)

    def __getitem__(self, rows) -> "Items":
        return Items(self.num_targets[rows])

    def without_targets(self) -> "Items":
        return Items(np.zeros_like(self.num_targets))


def config(**options) -> TrainConfig:
    return TrainConfig.from_options(task="instruct", **{"batch_size": 4, "device": "cpu"} | options)


def executions(config: TrainConfig, ranks: int) -> list:
    one = resolve(config)
    worlds = [World(rank=rank, size=ranks) for rank in range(ranks)]
    return [replace(one, world=world, micro_batch=2) for world in worlds]


def test_json_lists_and_jsonl_hold_the_same_records(tmp_path):
    items = [{"a": 1}, {"b": "ö"}]
    (tmp_path / "list.json").write_text(json.dumps(items, indent=2))
    lines = "\n\n".join(map(json.dumps, items))
    (tmp_path / "lines.jsonl").write_text(lines)
    listed, lined = (read_records(tmp_path / name) for name in ("list.json", "lines.jsonl"))
    assert [item for _, item in listed] == [item for _, item in lined] == items
    assert listed[1][0].endswith("list.json: record 2")
    assert lined[1][0].endswith("lines.jsonl:3")


def test_a_byte_order_mark_is_skipped(tmp_path):
    for content in ('{"a": 1}\n', '[{"a": 1}]'):
        (tmp_path / "f").write_text(content, encoding="utf-8-sig")
        assert [item for _, item in read_records(tmp_path / "f")] == [{"a": 1}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f: expected a JSON object per line, got an empty file"),
        ("[]", "f: expected a list of records, got an empty list"),
        ('{"a": 1}\n{"a": \n', "f:2: expected a JSON object, got"),
        ('[{"a": 1},\n {"a": }]', "f:2: expected JSON, got Expecting value"),
        ('[{"a": 1}, 2]', "f: record 2: expected a JSON object, got 2"),
        (f'[{{"a": {"1" * 5000}}}]', "f: expected a list of records, got a number: Exceeds"),
        ("[" * 100_000, "f: expected a list of records, got one nested too deeply"),
        ('{"a": "\udc80"}', "f: expected UTF-8 text"),
    ],
)
def test_a_file_that_cannot_be_parsed_raises_with_its_line(text, message, tmp_path):
    (tmp_path / "f").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=message):
        read_records(tmp_path / "f")


def test_splits_have_no_record_in_common_and_depend_on_the_seed():
    parts = split(1100, val_fraction=0.05, test_fraction=0.1, seed=1)
    assert [len(part) for part in parts] == [935, 55, 110]
    assert sorted(np.concatenate(parts)) == list(range(1100))
    again, other = (split(1100, val_fraction=0.05, test_fraction=0.1, seed=s) for s in (1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not np.array_equal(parts[2], other[2])
    assert [len(part) for part in split(2, val_fraction=0, test_fraction=0, seed=0)] == [1, 1, 0]
    with pytest.raises(InputError, match="data: expected at least 2 records, got 1"):
        split(1, val_fraction=0.1, test_fraction=0, seed=0)
    with pytest.raises(InputError, match="data: expected at least 3 records, got 2"):
        split(2, val_fraction=0.5, test_fraction=0.4, seed=0)


def test_epochs_become_steps_and_one_evaluation_each():
    fitted = fit_epochs(config(epochs=3.0, warmup_steps=50), rows=41)
    assert (fitted.steps, fitted.report.eval_interval, fitted.warmup_steps) == (30, 10, 3)
    fitted = fit_epochs(config(epochs=None, steps=20, warmup_steps=50), rows=41)
    assert (fitted.steps, fitted.report.eval_interval, fitted.warmup_steps) == (20, 10, 2)
    fitted = fit_epochs(config(epochs=3.0, batch_size=8), rows=188)  # 23.5 steps per epoch
    assert (fitted.steps, fitted.report.eval_interval) == (72, 24)
    fitted = fit_epochs(config(epochs=None, steps=7, evals_per_epoch=2), rows=41)
    assert (fitted.steps, fitted.report.eval_interval) == (7, 5)
    assert fit_epochs(config(epochs=1.5), rows=41).steps == 15
    assert fit_epochs(config(epochs=0.01), rows=1).steps == 1


def test_each_epoch_reads_every_row_once_and_a_step_knows_all_its_targets():
    rows = Items(np.arange(10))
    for ranks in (1, 2):
        loaders = [RecordLoader(rows, config(), each, 8) for each in executions(config(), ranks)]
        read = []
        for step in range(5):
            batches = [loader.batch(step).num_targets for loader in loaders]
            read += np.concatenate(batches).tolist()
            assert {loader.num_targets(step) for loader in loaders} == {sum(read[-4:])}
        assert sorted(read[:10]) == sorted(read[10:]) == list(range(10))
        assert read[:10] != read[10:]


def test_tensor_ranks_read_the_same_rows():
    rows, one = Items(np.arange(10)), resolve(config())
    worlds = [World(rank=rank, size=2, engine="fsdp", tensor_ranks=2) for rank in range(2)]
    loaders = [RecordLoader(rows, config(), replace(one, world=each), 8) for each in worlds]
    for step in range(5):
        first, second = (loader.batch(step).num_targets.tolist() for loader in loaders)
        assert first == second


def test_all_ranks_have_the_same_number_of_evaluation_batches():
    rows = Items(np.arange(1, 6))
    both = [list(record_batches(rows, each)) for each in executions(config(), 2)]
    found = [[each.num_targets.tolist() for each in batches] for batches in both]
    assert found == [[[1, 2], [5]], [[3, 4], [0]]]


def test_rows_are_at_most_as_long_as_the_context():
    assert row_tokens(config(context_tokens=64)) == 64
    assert row_tokens(config(context_tokens=64, row_tokens=16)) == 16
    with pytest.raises(InputError, match="row_tokens: expected at most the context of 64 tokens"):
        row_tokens(config(context_tokens=64, row_tokens=65))
