import os

import pytest
import torch

from tritium.train import plan as plan_module
from tritium.train.commands.training._plan_text import describe
from tritium.train.plan import PlanOptions, make_plan

pytestmark = pytest.mark.plain


def test_price_is_time_times_gpus(tritium):
    words = ("plan", "gpt2", "--gpu", "h100", "--gpus", 8, "--tokens", "10B", "--price", 2.5)
    _, out, _ = tritium(*words)
    seconds = make_plan(PlanOptions(recipe="gpt2", gpu="h100", gpus=8)).seconds()
    hours = [each * 1e10 / 524_288 / 3600 for each in seconds]
    low, high = (float(word) for word in out.split("price")[1].split(",")[0].split(" to "))
    assert (low, high) == pytest.approx([8 * 2.5 * each for each in hours], rel=5e-3)


def test_first_line_is_about_memory_and_last_about_speed(tritium):
    status, out, err = tritium(
        "plan", "gpt2", "--gpu", "h100", "--gpus", 8, "--tokens", "10B", "--price", 2.5
    )
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("gpt2 on 8 x h100: fits, ")
    assert "at most 64 sequences at once" in lines[0]
    assert lines[-1].startswith("less than 3,")
    for words in (
        "524,288 tokens; on each device 2 x 32 sequences of 1,024 tokens",
        "10,000,000,000 tokens",
        "hours",
        "MFU",
        "at 2.5 per GPU and hour",
        "an estimate",
    ):
        assert words in out


def test_the_parts_of_the_memory_add_up_to_what_the_first_line_says(tritium):
    lines = tritium("plan", "gpt2", "--gpu", "h100", "--micro-batch-size", 16)[1].splitlines()
    (total,) = (line for line in lines if line.startswith("  total"))
    assert f"fits, {' '.join(total.split()[1:3])} of " in lines[0]


def test_plan_says_the_epochs(tritium):
    for adapter in ((), ("--lora", 8)):
        out = tritium("plan", "gpt2-fineweb", "--gpu", "h100", *adapter)[1]
        assert "data       about 0.97 epochs: 9,890,693,120 tokens from a corpus of" in out
        rows = [line.split()[0] for line in out.splitlines() if line]
        assert rows.index("data") == rows.index("step") + 1
    out = tritium("plan", "shakespeare-char-gpu", "--gpu", "h100")[1]
    assert "data       about 24.5 epochs" in out
    assert "above 4 a model learns less from each" in out


def test_the_time_with_a_prefix_does_not_depend_on_the_number_of_frozen_weights(monkeypatch):
    plan = make_plan(PlanOptions(recipe="gpt2", gpu="h100", prefix_tokens=24))
    seconds = plan.seconds()
    monkeypatch.setattr(plan_module, "parameters", lambda config: 10**15)
    assert plan.seconds() == seconds


def test_a_prefix_takes_the_place_of_tokens_and_is_all_that_is_trained(tritium, error_of):
    words = ("plan", "gpt2", "--gpu", "h100", "--prefix-tokens", 24)
    status, out, err = tritium(*words)
    assert status == 0, err
    weights = 24 * 12 * 2 * 768
    assert f"training   a prefix of 24 tokens: {weights:,} weights" in out
    assert "sequences of 1,000 tokens" in out
    plan = make_plan(PlanOptions(recipe="gpt2", gpu="h100", prefix_tokens=24))
    full = make_plan(PlanOptions(recipe="gpt2", gpu="h100"))
    assert plan.memory(1)["optimizer"] == 8 * weights
    assert plan.seconds()[1] < 0.8 * full.seconds()[1]
    line = error_of(*words, "--lora", 8)
    assert "--prefix-tokens: expected no LoRA with a prefix, got both" in line
    line = error_of(*words[:-1], 1024)
    assert "--prefix-tokens: expected less than the context of 1024 tokens, got 1024" in line


def test_plan_that_does_not_fit_suggests_a_micro_batch(tritium):
    status, out, _ = tritium("plan", "gpt2-xl", "--gpu", "h100", "--micro-batch-size", 64)
    assert status == 0
    assert "48 layers of 1600" in out
    assert "does not fit" in out.splitlines()[0]
    assert "--micro-batch-size 16 does (at most" in out.splitlines()[0]
    assert (
        "nor does a single sequence"
        in tritium("plan", "gpt2-xl", "--gpu", "rtx-4090")[1].splitlines()[0]
    )


def test_plan_that_does_not_fit_suggests_activation_checkpointing(tritium):
    words = ["plan", "gpt2-xl", "--gpu", "h100", "--micro-batch-size"]
    assert (
        "(at most 16 at once), and so does --recompute selective"
        in tritium(*words, 64)[1].splitlines()[0]
    )
    assert (
        "fits" in tritium(*words, 64, "--recompute", "selective")[1].splitlines()[0].split(": ")[1]
    )
    assert "recompute" not in tritium(*words, 512)[1].splitlines()[0]
    long = [
        "plan",
        "gpt2-medium",
        "--gpu",
        "rtx-4090",
        "--context-tokens",
        32_768,
        "--micro-batch-size",
        1,
    ]
    assert (
        "nor does a single sequence; one does with --recompute selective"
        in tritium(*long)[1].splitlines()[0]
    )
    # Also if more than one would not.
    assert (
        "nor does a single sequence; one does with --recompute selective"
        in tritium(*long[:-1], 16)[1].splitlines()[0]
    )


def test_small_model_is_bound_by_launches(tritium):
    assert (
        "launching the kernels"
        in tritium("plan", "shakespeare-char", "--gpu", "h100")[1].splitlines()[-1]
    )


def test_plan_states_the_memory_of_the_cache_of_generation(tritium):
    out = tritium("plan", "gpt2", "--gpu", "h100")[1]  # 2 x 12 layers x 1,024 x 768 x 2 bytes
    assert "generation 37.75 MB of keys and values per sequence of 1,024 tokens in 16 bits" in out


def test_without_a_gpu_the_plan_has_memory_and_no_time(tritium, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = tritium("plan", "laptop")
    assert status == 0, err
    assert "CPU: fits" in out
    assert "limits of this device are not known" in out.splitlines()[-1]
    assert make_plan(PlanOptions(recipe="laptop")).machine.memory_bytes > 1e9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpt-2"], "unknown recipe 'gpt-2'; did you mean 'gpt2'"),
        (
            ["gpt2", "--gpu", "a100"],
            "unknown GPU 'a100'; did you mean 'h100' or 'a100-80gb' or 'a100-40gb'?",
        ),
        (["gpt2", "--gpu", "h100", "--gpus", "0"], "--gpus: expected 1 or more, got 0"),
        (
            ["gpt2", "--gpu", "h100", "--gpus", "3"],
            "--tokens-per-step: expected a multiple of 3 GPUs x 1024 tokens, got 524288; take 525",
        ),
        (
            ["gpt2", "--gpu", "h100", "--tokens", "many"],
            "--tokens: expected a number of tokens such as 10B",
        ),
        (
            ["gpt2", "--gpu", "h100", "--tokens", "0"],
            "--tokens: expected a number of tokens such as 10B",
        ),
        (
            ["gpt2", "--gpu", "h100", "--tokens-per-step", "1000"],
            "expected a multiple of 1 GPUs x 1024 tokens, got 1000",
        ),
        (
            ["gpt2", "--gpu", "h100", "--price", "-1"],
            "--price: expected 0 or more, and finite, got -1.0",
        ),
        (
            ["gpt2", "--gpu", "h100", "--price", "nan"],
            "--price: expected 0 or more, and finite, got nan",
        ),
        (
            ["gpt2", "--gpu", "h100", "--micro-batch-size", "48"],
            "--micro-batch-size: expected a divisor of the 512 sequences per step on each GPU",
        ),
        (
            ["gpt2", "--gpu", "h100", "--context-tokens", "0"],
            "--context-tokens: expected 1 or more, got 0",
        ),
        (["gpt2", "--gpuz", "2"], "did you mean --gpu"),
        ([], "see tritium plan --help"),
    ],
)
def test_bad_option_is_one_line(words, message, error_of):
    assert message in error_of("plan", *words)


def test_several_cpus_are_an_error(error_of, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--gpus: expected 1 on a machine without a GPU, got 2" in error_of(
        "plan", "laptop", "--gpus", "2"
    )


def test_machine_with_unknown_memory_is_an_error(error_of, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delattr(os, "sysconf")
    assert "name one, such as h100" in error_of("plan", "laptop")


def test_rates_of_another_generation_are_named():
    plan = make_plan(PlanOptions(recipe="gpt2", gpu="l40s"))
    assert "rates of hopper assumed for ada" in "\n".join(describe(plan, "gpt2", None))
