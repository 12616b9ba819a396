import contextlib
import dataclasses
import importlib
import inspect

import pytest
import torch

from tritium.bench.codegen.table import operator_launches
from tritium.bench.ops import OPERATORS
from tritium.bench.ops.tune import VARIANTS, Variant, main, tune
from tritium.bench.record import read_record
from tritium.errors import InputError
from tritium.kernels.attention import launch as attention_launch

pytestmark = pytest.mark.plain

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_replace_a_value_by_another_of_its_type(name):
    for variant in VARIANTS[name]:
        module, attribute = variant.target.rsplit(".", 1)
        shipped = getattr(importlib.import_module(f"tritium.kernels.{module}"), attribute)
        # A plan may be wrapped in a cache.
        assert type(inspect.unwrap(variant.value)) is type(inspect.unwrap(shipped))
        assert variant.value != shipped
    assert len({variant.name for variant in VARIANTS[name]}) == len(VARIANTS[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_changes_a_launch(name):
    operator = OPERATORS[name]

    def sizes(shape):
        launches = operator_launches(operator, shape, torch.bfloat16, "sm_90")
        return [
            (launch.kernel.__name__, launch.grid, _numbers(launch.arguments)) for launch in launches
        ]

    left = {variant.name: variant for variant in VARIANTS[name]}
    for shape in operator.shapes:
        shipped = sizes(shape)
        for variant in list(left.values()):
            with variant.active(), contextlib.suppress(ValueError):  # one pass: not every shape
                if sizes(shape) != shipped:
                    del left[variant.name]
    assert not list(left)


def _numbers(arguments):
    return {name: value for name, value in arguments.items() if isinstance(value, int | float)}


def test_chunks_have_the_rows_in_their_name_at_every_size():
    chunks = [v for v in VARIANTS["linear_cross_entropy"] if v.name.startswith("chunks")]
    assert chunks
    for variant in chunks:
        for N in (1024, 65_536):
            assert variant.name == f"chunks of {variant.value(N, 50_304, 768, 132)} rows"


def test_a_variant_is_active_only_during_its_call():
    shipped = attention_launch.L2_BYTES
    variant = Variant(name="tiny", target="attention.launch.L2_BYTES", value=1)
    assert variant.active()(lambda add: attention_launch.L2_BYTES + add)(2) == 3
    assert shipped == attention_launch.L2_BYTES


def test_correct_variants_are_timed_in_each_direction_and_wrong_ones_named():
    layer_norm, seen = OPERATORS["layer_norm"], set()

    def ours(**inputs):
        seen.add(attention_launch.L2_BYTES)
        return layer_norm.ours(**inputs) * (2 if attention_launch.L2_BYTES == 7 else 1)

    operator = dataclasses.replace(layer_norm, ours=ours)
    variants = [
        Variant(name=str(size), target="attention.launch.L2_BYTES", value=size) for size in (7, 8)
    ]
    entry = tune(operator, variants, (8, 64), torch.float32, CPU, 1)
    assert set(entry["seconds"]) == {"as shipped", "8"}
    for samples in entry["seconds"].values():
        assert set(samples) == {"forward", "backward", "both"}
    assert list(entry["failed"]) == ["7"]
    assert "off by" in entry["failed"]["7"]
    assert seen == {7, 8, attention_launch.L2_BYTES}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rotary"], "unknown operator with variants 'rotary'; "),
        (["gelu_mlp", "--rounds", "0"], "rounds: expected 1 or more, got 0"),
        (["gelu_mlp", "--variant", "cubals"], "unknown variant 'cubals'; did you mean 'cublas'"),
        pytest.param(
            ["gelu_mlp"],
            "expected a GPU, found none",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_options_raise(words, message):
    with pytest.raises(InputError, match=message):
        main(words)


def test_chosen_variants_are_rehearsed_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "tune.json"
    words = [
        "--device",
        "cpu",
        "--shape",
        "8x64",
        "--rounds",
        "1",
        "--variant",
        "tile_elements 1024",
    ]
    assert main(["layer_norm", *words, "--out", str(out)]) == 0
    (entry,) = read_record(out, "tune")["entries"]
    assert set(entry["seconds"]) == {"as shipped", "tile_elements 1024"}
    assert "tile_elements 1024" in capsys.readouterr().out
