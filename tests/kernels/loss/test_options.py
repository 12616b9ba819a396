"""LossOptions: its defaults, and how operators take it."""

import dataclasses
import inspect

import pytest
import torch

from tritium.kernels import cross_entropy, linear_cross_entropy
from tritium.kernels.loss.options import LossOptions

pytestmark = pytest.mark.plain


@pytest.mark.parametrize("function", [cross_entropy, linear_cross_entropy])
def test_public_functions_have_the_fields_and_defaults_of_the_options(function):
    parameters = inspect.signature(function).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    keywords.pop("vocab_size", None)  # describes the weight of linear_cross_entropy
    assert not keywords.pop("return_lse")
    assert not keywords.pop("return_correct")
    assert keywords == dataclasses.asdict(LossOptions())


@pytest.mark.parametrize(
    "name",
    [
        "cross_entropy_fwd",
        "cross_entropy_bwd",
        "linear_cross_entropy_fwd",
        "linear_cross_entropy_rows_bwd",
    ],
)
def test_schemas_hold_the_fields_of_the_options(name):
    schema = str(getattr(torch.ops.tritium, name).default._schema)
    fields = (
        "SymInt ignore_index, float label_smoothing, float z_loss, float softcap, str reduction"
    )
    assert fields in schema
