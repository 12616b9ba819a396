from typing import get_args, get_type_hints

import pytest

from tritium.model.choices import RECOMPUTATIONS
from tritium.train.machine.options import Launch, PlanOptions

pytestmark = pytest.mark.plain


def test_options_offer_the_rows_of_the_tables():
    assert get_args(get_type_hints(Launch)["parallel"]) == ("auto", "ddp", "zero1", "fsdp")
    recompute, none = get_args(get_type_hints(PlanOptions)["recompute"])
    assert get_args(recompute) == tuple(RECOMPUTATIONS)
    assert none is type(None)
