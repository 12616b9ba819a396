import time
from dataclasses import replace

import pytest
import torch

from tritium.bench.ops import OPERATORS
from tritium.bench.ops import compare as contest
from tritium.bench.ops.case import Contestant
from tritium.bench.ops.compare import main, refusal
from tritium.bench.record import read_record
from tritium.errors import InputError
from tritium.kernels import layer_norm

pytestmark = pytest.mark.plain

CPU = torch.device("cpu")


def slow(x, weight, bias):
    time.sleep(0.02)
    return layer_norm(x, weight, bias)


def wrong(x, weight, bias):
    return layer_norm(x, weight, bias) * 1.001


class WrongGradient(torch.autograd.Function):
    """The right output, and a gradient of x that misses the term of the mean."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return layer_norm(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        xhat = layer_norm(x, torch.ones_like(weight))
        return dy * weight / x.std(-1, correction=0, keepdim=True), (dy * xhat).sum(0), dy.sum(0)


def one_bad_element(x, weight, bias):
    y = layer_norm(x, weight, bias)
    return y + torch.zeros_like(y).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(0.01))


def raising(x, weight, bias):
    raise RuntimeError("no kernel image\nis available")


@pytest.fixture
def planted(monkeypatch):
    """layer_norm with contestants of our making beside the real ones."""

    def plant(**calls):
        peers = tuple(Contestant(name=name, call=call) for name, call in calls.items())
        operator = replace(OPERATORS["layer_norm"], peers=peers)
        monkeypatch.setitem(contest.OPERATORS, "layer_norm", operator)
        return operator

    return plant


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (wrong, r"output 0 is off by"),
        (WrongGradient.apply, r"dx is off by"),
        (one_bad_element, r"output 0 is off by 0\.01 at most"),
        (raising, r"RuntimeError: no kernel image$"),
        (
            lambda x, weight, bias: layer_norm(x, weight, bias)[:1],
            r"(output 0 is \(1, 64\), expected|RuntimeError)",
        ),
        (lambda x, weight, bias: layer_norm(x, weight, bias) * float("nan"), r"off by nan"),
    ],
)
def test_what_is_wrong_is_refused_with_the_reason(call, why):
    import re

    found = refusal(
        OPERATORS["layer_norm"], Contestant(name="planted", call=call), (32, 64), torch.float32, CPU
    )
    assert re.search(why, found)


def with_eps(x, weight, bias):
    return layer_norm(x, weight, bias, eps=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "call", [with_eps, lambda x, weight, bias: layer_norm(x, weight, bias) * 1.01]
)
def test_half_a_percent_is_too_much_in_sixteen_bits(call, dtype):
    found = refusal(
        OPERATORS["layer_norm"], Contestant(name="planted", call=call), (32, 64), dtype, CPU
    )
    assert "output 0 is off by" in found


def test_what_fails_at_the_full_shape_alone_is_named_and_the_others_are_timed(planted, tmp_path):
    def only_small(x, weight, bias):
        if len(x) > 4099:
            raise torch.OutOfMemoryError("no more")
        return layer_norm(x, weight, bias)

    planted(small=only_small)
    assert (
        main(
            [
                "layer_norm",
                "--shape",
                "4100x16",
                "--rounds",
                "1",
                "--device",
                "cpu",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    (entry,) = read_record(tmp_path / "kernels.json", "kernels")["entries"]
    assert entry["refused"] == {"small": "forward failed: OutOfMemoryError: no more"}
    assert {row["contestant"] for row in entry["rows"]} == {"tritium", "eager", "tritium again"}


def test_where_all_do_not_fit_together_the_other_shapes_are_measured(monkeypatch, tmp_path, capsys):
    original = contest.time_in_turn

    def full(calls, device, *, rounds):
        made = next(iter(calls.values()))(0)  # y, or the gradients, x's first
        if len(made if isinstance(made, torch.Tensor) else made[0]) == 3:
            raise torch.OutOfMemoryError("no more")
        return original(calls, device, rounds=rounds)

    monkeypatch.setattr(contest, "time_in_turn", full)
    words = [
        "layer_norm",
        "--shape",
        "3x8",
        "5x8",
        "--rounds",
        "1",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    assert main(words) == 0
    assert "layer_norm  M=3 N=8: out of memory" in capsys.readouterr().out
    assert [
        entry["shape"] for entry in read_record(tmp_path / "kernels.json", "kernels")["entries"]
    ] == [[5, 8]]
    assert main([*words[:2], "3x8", *words[4:]]) == 0, "nothing to plot"


def test_a_compiled_contestant_is_timed_in_every_direction():
    operator = OPERATORS["layer_norm"]
    operator.contestants()  # sets what a kept graph needs
    compiled = torch.compile(
        lambda **inputs: operator.eager(**inputs), backend="aot_eager", dynamic=False
    )
    sets = [operator.inputs((8, 16), torch.float32, CPU) for _ in range(2)]
    for direction in contest.DIRECTIONS:
        run = contest.timed(compiled, sets, direction)
        for number in range(4):
            run(number)
    assert torch._functorch.config.donated_buffer is False


def test_an_operator_for_inference_is_timed_forward_only(tmp_path, capsys):
    assert (
        main(
            [
                "attention_decode",
                "--device",
                "cpu",
                "--rounds",
                "1",
                "--shape",
                "1x1x40x2x1x16",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    entry = read_record(tmp_path / "kernels.json", "kernels")["entries"][0]
    assert {row["direction"] for row in entry["rows"]} == {"forward"}
    assert {"tritium", "eager", "sdpa"} <= {row["contestant"] for row in entry["rows"]}
    assert not entry["refused"]
    assert (tmp_path / "attention_decode.png").exists()
    assert "backward" not in capsys.readouterr().out


def test_each_input_set_has_its_turn_in_the_backward():
    operator = OPERATORS["layer_norm"]
    sets = [operator.inputs((4, 8), torch.float32, CPU) for _ in range(3)]
    run = contest.timed(operator.ours, sets, "backward")
    first, second, again = run(0), run(1), run(3)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[0], again[0])


def test_a_slow_variant_is_reported_slower_and_a_wrong_one_refused(planted, tmp_path, capsys):
    planted(slow=slow, wrong=wrong)
    assert (
        main(
            [
                "layer_norm",
                "--shape",
                "32x64",
                "--rounds",
                "3",
                "--device",
                "cpu",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "REFUSED: output 0 is off by" in shown
    assert "absent: needs a GPU" in shown
    assert "No GPU" in shown
    record = read_record(tmp_path / "out" / "kernels.json", "kernels")
    (entry,) = record["entries"]
    medians = {
        (row["contestant"], row["direction"]): row["seconds"]["median"] for row in entry["rows"]
    }
    assert medians["slow", "forward"] > 0.02 > medians["tritium", "forward"]
    assert "wrong" in entry["refused"]
    assert not any(row["contestant"] == "wrong" for row in entry["rows"])
    for row in entry["rows"]:
        work = 3 if row["direction"] == "backward" else 2 if row["direction"] == "forward" else 5
        assert row["rate"] == pytest.approx(work * 32 * 64 * 4 / row["seconds"]["median"])
        assert row["share"] == pytest.approx(row["rate"] / record["ceilings"]["bytes_per_second"])
    assert (tmp_path / "out" / "layer_norm.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layernorm"], "no operator 'layernorm'; near: layer_norm"),
        (
            ["layer_norm", "--shape", "12"],
            r"--shape: expected MxN for layer_norm, such as 256x768, got '12'",
        ),
        (["layer_norm", "--shape", "axb"], "got 'axb'"),
        (["layer_norm", "--shape", "0x5"], "got '0x5'"),
        (["layer_norm", "--shape", "²x8"], "got '²x8'"),
        (["--rounds", "0"], "--rounds: expected 1 or more, got 0"),
        (["--device", "tpu9"], "--device: expected a device"),
        (["--dtype", "int8"], "invalid choice"),
    ],
)
def test_bad_input(words, message):
    with pytest.raises(InputError, match=message):
        main(words)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        main(
            [
                "layer_norm",
                "--shape",
                "2x8",
                "--rounds",
                "1",
                "--device",
                "cpu",
                "--out",
                str(tmp_path / "file" / "out"),
            ]
        )
