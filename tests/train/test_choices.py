import pytest

from tritium.train.choices import ENGINES, OPTIMIZERS

pytestmark = pytest.mark.plain


@pytest.mark.parametrize("table", [OPTIMIZERS, ENGINES])
def test_every_row_finds_its_implementation(table):
    assert all(callable(row.load()) for row in table.values())
