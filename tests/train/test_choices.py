import pytest

from tritium.errors import InputError
from tritium.train.choices import ENGINES, OPTIMIZERS, check_optimizer

pytestmark = pytest.mark.plain


@pytest.mark.parametrize("table", [OPTIMIZERS, ENGINES])
def test_every_row_finds_its_implementation(table):
    assert all(callable(row.load()) for row in table.values())


def test_an_optimizer_without_tensor_parallelism_raises_with_the_names_of_fields():
    check_optimizer("muon", tensor_ranks=1)
    with pytest.raises(InputError, match="got muon; set `tensor_parallel` to 1"):
        check_optimizer("muon", tensor_ranks=2)
