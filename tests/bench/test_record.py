import json
from pathlib import Path

import pytest
import torch

from tritium.bench import record
from tritium.bench.record import kind_of, provenance, read_record, writable, write_record
from tritium.errors import InputError

pytestmark = pytest.mark.plain


def test_a_record_comes_back_with_where_it_was_made(tmp_path):
    path = tmp_path / "new" / "x.json"
    write_record(path, "kernels", {"rows": [1, 2]})
    found = read_record(path, "kernels")
    assert found["rows"] == [1, 2]
    assert found["torch"] == torch.__version__
    assert set(provenance()) <= set(found)


def test_kinds_are_told_apart_and_paths_tried_before_the_work(tmp_path):
    write_record(tmp_path / "x.json", "train", {})
    (tmp_path / "y.json").write_text("not json")
    (tmp_path / "z.json").write_text("[1]")
    assert [kind_of(tmp_path / name) for name in ("x.json", "y.json", "z.json")] == [
        "train",
        None,
        None,
    ]
    assert writable(tmp_path / "new" / "a.json") == tmp_path / "new" / "a.json"
    assert not list((tmp_path / "new").iterdir())
    for bad, why in (
        (tmp_path, "a folder"),
        (Path("/proc/a.json"), ": "),
        (tmp_path / "y.json" / "a.json", ": "),
    ):
        with pytest.raises(
            InputError,
            match=f"expected a file that can be written, got{why if why == ': ' else ' ' + why}",
        ):
            writable(bad)


def test_another_kind_format_or_no_json_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_record(path, "kernels", {})
    with pytest.raises(
        InputError,
        match=r"expected a record of kind 'codegen', format 1, got kind 'kernels', format 1",
    ):
        read_record(path, "codegen")
    monkeypatch.setattr(record, "FORMAT", 2)
    with pytest.raises(InputError, match="format 2, got kind 'kernels', format 1; measure again"):
        read_record(path, "kernels")
    for text in ("[1, 2]", "not json", json.dumps({"rows": []})):
        path.write_text(text)
        with pytest.raises(InputError, match=r"x\.json: expected"):
            read_record(path, "kernels")
