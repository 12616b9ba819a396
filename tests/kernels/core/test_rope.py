"""Checks and layout of RoPE's tables. Each operator that rotates tests its own messages."""

import pytest
import torch

from tritium.kernels.core.rope import as_tables, check_tables

pytestmark = pytest.mark.plain


@pytest.mark.parametrize("shape", [(3, 4), (7, 4), (2, 3, 4)])
def test_tables_per_position_and_per_token_are_valid(shape):
    x = torch.ones(2, 3, 5)
    check_tables("op", torch.ones(shape), torch.ones(shape).double(), 4, x, "x")


@pytest.mark.parametrize("shape", [(2, 4), (3, 5), (1, 3, 4), (4,)])
def test_tables_of_other_shapes_raise(shape):
    x = torch.ones(2, 3, 5)
    message = r"^op: sin must be floating point \(3 or more, 4\) or \(2, 3, 4\) to match qkv"
    with pytest.raises(ValueError, match=message):
        check_tables("op", torch.ones(3, 4), torch.ones(shape), 4, x, "qkv")


def test_tables_of_kernels_are_float32_with_a_unit_last_stride():
    table = torch.rand(4, 6, dtype=torch.float64).t()
    cos, sin = as_tables(table, table.bfloat16(), torch.float32)
    assert (cos.dtype, sin.dtype) == (torch.float32, torch.bfloat16)
    assert (cos.stride(-1), sin.stride(-1)) == (1, 1)
    assert torch.equal(cos, table.float())
    same, _ = as_tables(table, table, torch.float64)
    assert same.dtype == torch.float64
