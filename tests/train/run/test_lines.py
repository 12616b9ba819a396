import json

import pytest

from tritium.train.run.lines import parse_line

pytestmark = pytest.mark.plain


def test_lines_of_training_and_of_evaluations_are_read():
    for line in (
        {"step": 3, "loss": 2.5, "lr": 0.1, "grad_norm": None},
        {"step": 4, "val_loss": 2},
    ):
        assert parse_line(json.dumps(line)) == line


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[1]",
        '{"step": 1e999, "loss": 1}',
        '{"step": 1.5, "loss": 1}',
        '{"step": 1, "loss": "x"}',
        '{"step": 1, "loss": NaN}',
        '{"step": -1, "val_loss": 1}',
        '{"step": 1, "val_loss": 1, "val_bits_per_byte": "x"}',
        '{"step": 1, "loss": 1, "lr": 1, "grad_norm": 1, "tokens": "x"}',
        '{"step": 1, "loss": 1, "lr": 1, "grad_norm": 1, "tokens_per_second": "y"}',
        f'{{"step": {10**30}, "loss": 1}}',
        '{"step": 1}',
        '{"loss": 1}',
        "[" * 100_000,
    ],
    ids=lambda line: line[:70],
)
def test_any_other_line_is_none(line):
    assert parse_line(line) is None
