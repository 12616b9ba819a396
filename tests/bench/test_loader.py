import sys

import numpy as np
import pytest

from tritium.bench.loader import SHAPES, main, measure
from tritium.train.shards import TokenStream

pytestmark = pytest.mark.plain


def test_rates_are_positive_and_count_every_token():
    result = measure(TokenStream([np.zeros(5000, np.uint16)]), 4, 16, seconds=0.05)
    assert result["tokens_per_second"] > 0
    assert result["jump_milliseconds"] > 0


def test_a_line_for_each_shape(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["loader", "--tokens", "200000"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(SHAPES)
    assert all("M tokens/s" in line for line in lines)
