import pytest
import torch

from tritium.errors import InputError
from tritium.model import GPTConfig
from tritium.train.distributed.tensor_parallel import check_tensor_parallel, row_order

pytestmark = pytest.mark.plain


def test_a_ranks_rows_are_the_queries_keys_and_values_of_its_heads():
    # Heads of 2: queries are rows 0 to 7, keys 8 to 11, values 12 to 15.
    config = GPTConfig(n_head=4, n_kv_head=2, d_model=8)
    first, second = row_order(config, 2).chunk(2)
    assert first.tolist() == [0, 1, 2, 3, 8, 9, 12, 13]
    assert second.tolist() == [4, 5, 6, 7, 10, 11, 14, 15]
    assert torch.equal(row_order(config, 1), torch.arange(16))


def test_sizes_that_ranks_cannot_divide_raise():
    config = GPTConfig(n_head=6, n_kv_head=3, d_model=48)
    check_tensor_parallel(config, torch.bfloat16, 3)
    with pytest.raises(InputError, match="tensor_parallel: expected a divisor of the 6 heads"):
        check_tensor_parallel(config, torch.float32, 4)
    with pytest.raises(InputError, match="divisor of the 3 key and value heads of a block, got 2"):
        check_tensor_parallel(config, torch.float32, 2)
    with pytest.raises(InputError, match="`precision` bfloat16 or float32 with it, got float16"):
        check_tensor_parallel(config, torch.float16, 3)
