"""Variants of launch sizes: what they replace, for how long, and that a wrong one is refused."""

import dataclasses
import importlib

import pytest
import torch

from tritium.bench.ops import OPERATORS
from tritium.bench.ops.tune import VARIANTS, Variant, main, tune
from tritium.errors import InputError
from tritium.kernels.norm import launch as norm_launch

pytestmark = pytest.mark.plain

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_replace_what_is_there_by_something_else_of_its_kind(name):
    assert OPERATORS[name].launches
    for variant in VARIANTS[name]:
        module, attribute = variant.target.rsplit(".", 1)
        shipped = getattr(importlib.import_module(f"tritium.kernels.{module}"), attribute)
        assert type(variant.value) is type(shipped)
        assert variant.value != shipped
    assert len({variant.name for variant in VARIANTS[name]}) == len(VARIANTS[name])


def test_a_variant_holds_for_as_long_as_its_call():
    shipped = norm_launch.TILE_ELEMENTS
    variant = Variant(name="tiny", target="norm.launch.TILE_ELEMENTS", value=1)
    assert variant.during(lambda add: norm_launch.TILE_ELEMENTS + add)(2) == 3
    assert shipped == norm_launch.TILE_ELEMENTS


def test_right_variants_are_timed_in_each_direction_and_wrong_ones_refused():
    layer_norm, seen = OPERATORS["layer_norm"], set()

    def ours(**inputs):
        seen.add(norm_launch.TILE_ELEMENTS)
        return layer_norm.ours(**inputs) * (2 if norm_launch.TILE_ELEMENTS == 7 else 1)

    operator = dataclasses.replace(layer_norm, ours=ours)
    variants = [
        Variant(name=str(size), target="norm.launch.TILE_ELEMENTS", value=size)
        for size in (7, 8)
    ]
    entry = tune(operator, variants, (8, 64), torch.float32, CPU, 1)
    assert set(entry["seconds"]) == {"as shipped", "8"}
    assert all(
        set(samples) == {"forward", "backward", "both"} for samples in entry["seconds"].values()
    )
    assert list(entry["refused"]) == ["7"]
    assert "off by" in entry["refused"]["7"]
    assert seen == {7, 8, norm_launch.TILE_ELEMENTS}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rotary"], "no operator with variants 'rotary'; near: "),
        (["gelu_mlp", "--rounds", "0"], "--rounds: expected 1 or more, got 0"),
        pytest.param(
            ["gelu_mlp"],
            "expected a GPU, found none",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_input(words, message):
    with pytest.raises(InputError, match=message):
        main(words)
