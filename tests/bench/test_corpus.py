"""The synthetic corpus has near duplicates, and each stage gets a speed."""

import pytest

from tritium.bench.corpus import main

pytestmark = pytest.mark.plain


def test_every_stage_is_measured(capsys):
    pytest.importorskip("rensa")
    main(["--megabytes", "2", "--stages", "0.5", "--tokenizer", "bytes"])
    out = capsys.readouterr().out
    assert "dropped by near duplicates: 25 documents" in out
    assert "MB of memory above the start" in out
    for stage in ("read", "filter", "near duplicates", "tokenize", "write"):
        assert f"\n{stage} " in out
