"""Each row of POSITIONS tells the order of tokens, and the tables hold the documented angles."""

import math
from dataclasses import replace

import pytest
import torch

from tests.model.models import SMALL
from tritium.model import GPT
from tritium.model.choices import POSITIONS
from tritium.model.positions import rope_tables

pytestmark = pytest.mark.plain


@pytest.mark.parametrize("name", POSITIONS)
def test_order_of_earlier_tokens_matters(name):
    """In one block without positions, the last token would see the earlier ones as a set."""
    torch.manual_seed(0)
    model = GPT(replace(SMALL, position=name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    logits = model(torch.tensor([[1, 2, 3, 4], [3, 1, 2, 4]]))[:, -1]
    assert not torch.allclose(logits[0], logits[1], rtol=1e-3)


def test_rope_tables_hold_the_angle_of_each_position_and_pair():
    position = torch.tensor([0, 1, 7, 1000])
    cos, sin = rope_tables(position, head_size=8, base=500.0)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (4, 4)
    for row, p in enumerate(position.tolist()):
        for pair in range(4):
            angle = p / 500.0 ** (2 * pair / 8)
            # A float32 angle near 1000 has an error of up to 3e-5, half a unit in the last place.
            assert cos[row, pair].item() == pytest.approx(math.cos(angle), abs=5e-5)
            assert sin[row, pair].item() == pytest.approx(math.sin(angle), abs=5e-5)


def test_rope_tables_take_the_positions_of_each_sequence():
    """Packed documents restart their positions, so positions are (B, T)."""
    position = torch.tensor([[0, 1, 2, 3], [2, 3, 0, 1]])
    tables = rope_tables(position, head_size=8, base=500.0)
    for table, expected in zip(
        tables, rope_tables(torch.arange(4), head_size=8, base=500.0), strict=True
    ):
        assert table.shape == (2, 4, 4)
        assert torch.equal(table, expected[position])
