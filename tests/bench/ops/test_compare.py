import time
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure

from tritium.bench.ops import OPERATORS, compare
from tritium.bench.ops.case import Implementation
from tritium.bench.ops.compare import main
from tritium.bench.ops.plot import plot_operator
from tritium.bench.record import read_record
from tritium.errors import InputError
from tritium.kernels import layer_norm

pytestmark = pytest.mark.plain

CPU = torch.device("cpu")


def on_cpu(operator, *shapes, rounds=1, out):
    words = [operator, "--shape", *shapes, "--rounds", str(rounds), "--device", "cpu"]
    return main([*words, "--out", str(out)])


def entries_of(out):
    return read_record(out / "kernels.json", "kernels")["entries"]


@pytest.fixture
def plant(monkeypatch):
    """Replace the other implementations of layer_norm."""

    def plant(**calls):
        others = tuple(Implementation(name=name, call=call) for name, call in calls.items())
        operator = replace(OPERATORS["layer_norm"], others=others)
        monkeypatch.setitem(compare.OPERATORS, "layer_norm", operator)

    return plant


def test_a_slow_implementation_takes_longer_and_a_wrong_one_is_not_timed(plant, tmp_path, capsys):
    def slow(x, weight, bias):
        time.sleep(0.02)
        return layer_norm(x, weight, bias)

    plant(slow=slow, wrong=lambda x, weight, bias: layer_norm(x, weight, bias) * 1.001)
    assert on_cpu("layer_norm", "32x64", rounds=3, out=tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "FAILED: output 0 is off by" in shown
    assert "missing: needs a GPU" in shown
    assert "No GPU" in shown
    record = read_record(tmp_path / "out" / "kernels.json", "kernels")
    (entry,) = record["entries"]
    medians = {
        (row["implementation"], row["direction"]): row["seconds"]["median"] for row in entry["rows"]
    }
    assert medians["slow", "forward"] > 0.02 > medians["tritium", "forward"]
    assert list(entry["failed"]) == ["wrong"]
    assert ("wrong", "forward") not in medians
    # Tensors read and written, of (32, 64) float32.
    tensors = {"forward": 2, "backward": 3, "both": 5}
    for row in entry["rows"]:
        nbytes = tensors[row["direction"]] * 32 * 64 * 4
        assert row["rate"] == pytest.approx(nbytes / row["seconds"]["median"])
        assert row["share"] == pytest.approx(row["rate"] / record["ceilings"]["bytes_per_second"])
    assert (tmp_path / "out" / "layer_norm.png").stat().st_size > 10_000


def test_matmuls_are_compared_with_the_limit_of_flops():
    limits = {"bytes_per_second": 1e9, "flops_per_second": 4e9}
    entry = compare.measure(
        OPERATORS["linear"], (8, 16, 32), torch.float32, CPU, limits, 1, without=("torch.compile",)
    )
    flops = {"forward": 2 * 8 * 16 * 32, "backward": 4 * 8 * 16 * 32, "both": 6 * 8 * 16 * 32}
    for row in entry["rows"]:
        rate = flops[row["direction"]] / row["seconds"]["median"]
        assert row["share"] == pytest.approx(rate / 4e9)


def test_rates_and_the_ceiling_are_drawn_in_one_unit(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    row = {"implementation": "tritium", "direction": "forward"}
    entries = [
        {"operator": "linear", "label": "N=8", "bound": "flops", "rows": [row | {"rate": rate}]}
        for rate in (2e12, 3e12)
    ]
    plot_operator(entries, {"bytes_per_second": 1e9, "flops_per_second": 4e12}, tmp_path)
    (axes,) = drawn[0].axes
    rates, ceiling = axes.lines
    assert list(rates.get_ydata()) == [2, 3]
    assert list(ceiling.get_ydata()) == [4, 4]
    assert axes.get_ylabel() == "TFLOP/s"


def test_a_failure_at_the_full_shape_is_named_and_the_others_are_timed(plant, tmp_path):
    def only_small(x, weight, bias):
        if len(x) > 4099:
            raise torch.OutOfMemoryError("no more")
        return layer_norm(x, weight, bias)

    plant(small=only_small)
    assert on_cpu("layer_norm", "4100x16", out=tmp_path) == 0
    (entry,) = entries_of(tmp_path)
    assert entry["failed"] == {"small": "forward failed: OutOfMemoryError: no more"}
    timed = {row["implementation"] for row in entry["rows"]}
    assert timed == {"tritium", "eager", "tritium again"}


def test_a_shape_that_runs_out_of_memory_is_skipped(monkeypatch, tmp_path, capsys):
    original = compare.time_in_turn

    def out_of_memory(calls, device, *, rounds):
        result = next(iter(calls.values()))(0)  # y, or the gradients, of which x's is the first
        if len(result if isinstance(result, torch.Tensor) else result[0]) == 3:
            raise torch.OutOfMemoryError("no more")
        return original(calls, device, rounds=rounds)

    monkeypatch.setattr(compare, "time_in_turn", out_of_memory)
    assert on_cpu("layer_norm", "3x8", "5x8", out=tmp_path) == 0
    assert "layer_norm  M=3 N=8: out of memory" in capsys.readouterr().out
    assert [entry["shape"] for entry in entries_of(tmp_path)] == [[5, 8]]
    assert on_cpu("layer_norm", "3x8", out=tmp_path) == 0, "there is nothing to plot"


def test_a_compiled_implementation_runs_repeatedly_in_every_direction():
    operator = OPERATORS["layer_norm"]
    operator.implementations()  # configures torch.compile
    compiled = torch.compile(
        lambda **inputs: operator.eager(**inputs), backend="aot_eager", dynamic=False
    )
    sets = [operator.make_inputs((8, 16), torch.float32, CPU) for _ in range(2)]
    for direction in compare.DIRECTIONS:
        run = compare.timed(compiled, sets, direction)
        for number in range(4):
            run(number)
    assert torch._functorch.config.donated_buffer is False


def test_an_operator_for_inference_is_timed_forward_only(tmp_path, capsys):
    assert on_cpu("attention_decode", "1x1x40x2x1x16", out=tmp_path) == 0
    (entry,) = entries_of(tmp_path)
    assert {row["direction"] for row in entry["rows"]} == {"forward"}
    assert {"tritium", "eager", "sdpa"} <= {row["implementation"] for row in entry["rows"]}
    assert not entry["failed"]
    assert (tmp_path / "attention_decode.png").exists()
    assert "backward" not in capsys.readouterr().out


def test_the_backward_uses_every_input_set_in_turn():
    operator = OPERATORS["layer_norm"]
    sets = [operator.make_inputs((4, 8), torch.float32, CPU) for _ in range(3)]
    run = compare.timed(operator.ours, sets, "backward")
    first, second, fourth = run(0), run(1), run(3)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[0], fourth[0])


def test_the_gradient_of_a_loss_is_one():
    operator = OPERATORS["cross_entropy"]
    sets = [operator.make_inputs((4, 8), torch.float32, CPU)]
    (gradient,) = compare.timed(operator.ours, sets, "both")(0)
    loss = operator.ours(**sets[0])
    leaves = [each for each in sets[0].values() if each.requires_grad]
    assert torch.equal(gradient, torch.autograd.grad(loss, leaves)[0])


@pytest.mark.parametrize("direction", ["backward", "both"])
def test_gradients_of_the_outputs_are_not_made_while_the_time_is_taken(direction):
    operator = OPERATORS["layer_norm"]
    sets = [operator.make_inputs((4, 8), torch.float32, CPU) for _ in range(2)]
    run = compare.timed(operator.eager, sets, direction)
    with torch.profiler.profile(record_shapes=True) as record:
        run(0)
    names = [event.name for event in record.events() if [4, 8] in event.input_shapes]
    assert "aten::native_layer_norm_backward" in names
    assert not {"aten::ones_like", "aten::randn_like", "aten::normal_"} & {*names}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layernorm"], "unknown operator 'layernorm'; did you mean 'layer_norm'"),
        (
            ["layer_norm", "--shape", "12"],
            r"--shape: expected MxN for layer_norm, such as 256x768, got '12'",
        ),
        (["layer_norm", "--shape", "axb"], "got 'axb'"),
        (["layer_norm", "--shape", "0x5"], "got '0x5'"),
        (["layer_norm", "--shape", "²x8"], "got '²x8'"),
        (["--rounds", "0"], "rounds: expected 1 or more, got 0"),
        (["--device", "tpu9"], "device: expected a device"),
        (["--dtype", "int8"], "invalid choice"),
        (["--without", "torch.compiler"], "unknown implementation .*; did you mean 'torch.compile"),
    ],
)
def test_bad_options_raise(words, message):
    with pytest.raises(InputError, match=message):
        main(words)


def test_implementations_are_left_out_by_name(plant, tmp_path):
    plant(other=layer_norm)
    assert on_cpu("layer_norm", "8x16", "--without", "other", "eager", out=tmp_path) == 0
    (entry,) = entries_of(tmp_path)
    assert {row["implementation"] for row in entry["rows"]} == {"tritium", "tritium again"}
    assert "other" not in entry["missing"]
    assert {row["seconds"]["timed_by"] for row in entry["rows"]} == {"host clock"}
