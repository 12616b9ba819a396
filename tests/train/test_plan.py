"""The planner against published runs and against what training really allocates."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tritium.kernels.core.device import CEILINGS
from tritium.model import GPT, PRESETS, GPTConfig
from tritium.model.cost import flops_per_token, step_bytes
from tritium.train import plan as planner
from tritium.train.config import TrainConfig
from tritium.train.data.loader import Batch
from tritium.train.plan import RESERVE, Machine, Plan, PlanOptions, describe, make_plan
from tritium.train.recipes import RECIPES
from tritium.train.trainer import single_trainer

pytestmark = pytest.mark.plain

# --- memory

DEEP = GPTConfig(n_layer=6, n_head=4, d_model=256, vocab_size=300, context_tokens=128)
WIDE = GPTConfig(n_layer=4, n_head=2, d_model=128, vocab_size=1000, context_tokens=128)
LLAMA = replace(DEEP, position="rotary", norm="rms", mlp="swiglu", bias=False)
LARGE_VOCABULARY = GPTConfig(
    n_layer=2, n_head=1, d_model=64, vocab_size=5000, context_tokens=64, bias=False
)


def measured_peak(
    config: GPTConfig, batch: int, micro_batch: int, precision: str, recompute: str = "none"
) -> int:
    """Bytes of all tensors at the fullest moment of the second step, as PyTorch's allocator counts them."""
    model = GPT(config, recompute=recompute)
    options = TrainConfig.from_options(
        batch_size=batch, micro_batch_size=micro_batch, precision=precision
    )
    trainer = single_trainer(model, options)
    batch = Batch(
        torch.randint(config.vocab_size, (batch, config.context_tokens + 1)),
        np.full(batch, config.context_tokens),
    )

    def step():
        trainer.backward(batch)
        trainer.update(1e-3)

    step()  # afterwards there are moments, and nothing else but the weights and their copies
    states = [value for state in trainer.optimizer.states().values() for value in state.values()]
    kept = {*model.parameters(), *trainer.working.parameters(), *states}
    held = sum(tensor.untyped_storage().nbytes() for tensor in kept)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = [
        event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert sum(changes) == 0, "a step leaves as much as it found"
    return held + max(itertools.accumulate(changes))


@pytest.fixture
def library_defaults():
    """oneDNN's scratch, no part of the formula, grows with threads and with the setting that training leaves in the process."""
    products = torch.backends.mkldnn.matmul
    precision, threads = products.fp32_precision, torch.get_num_threads()
    products.fp32_precision = "none"
    torch.set_num_threads(1)
    yield
    products.fp32_precision = precision
    torch.set_num_threads(threads)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("config", "batch", "micro_batch"),
    [
        (DEEP, 4, 4),  # fullest in the last MLP's backward
        (DEEP, 4, 2),
        (replace(DEEP, context_tokens=16), 1, 1),  # fullest with all gradients formed
        (WIDE, 8, 8),  # fullest in the head, in several chunks
        (WIDE, 8, 2),
        (LARGE_VOCABULARY, 4, 4),
        (LARGE_VOCABULARY, 4, 1),
        (LLAMA, 4, 4),
        (LLAMA, 4, 2),
    ],
)
def test_formula_is_the_measured_peak(config, batch, micro_batch, precision, library_defaults):
    accumulates, itemsize = micro_batch < batch, getattr(torch, precision).itemsize
    parts = step_bytes(
        config, micro_batch, config.context_tokens, itemsize, accumulates=accumulates
    )
    assert (
        0.98 <= sum(parts.values()) / measured_peak(config, batch, micro_batch, precision) <= 1.02
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("config", "batch", "micro_batch", "recompute"),
    [
        (DEEP, 4, 4, "gelu"),
        (DEEP, 4, 2, "selective"),
        (DEEP, 4, 4, "selective"),
        (DEEP, 4, 4, "block"),
        (LLAMA, 4, 2, "block"),
        (LARGE_VOCABULARY, 4, 4, "block"),
    ],
)
def test_formula_is_the_measured_peak_where_blocks_are_computed_again(
    config, batch, micro_batch, recompute, precision, library_defaults
):
    accumulates, itemsize = micro_batch < batch, getattr(torch, precision).itemsize
    sizes = (config, micro_batch, config.context_tokens, itemsize)
    parts = step_bytes(*sizes, accumulates=accumulates, recompute=recompute)
    assert (
        0.98
        <= sum(parts.values()) / measured_peak(config, batch, micro_batch, precision, recompute)
        <= 1.02
    )
    assert (
        sum(parts.values()) < sum(step_bytes(*sizes, accumulates=accumulates).values())
        or config is LARGE_VOCABULARY
    )


def test_largest_micro_batch_is_the_last_that_fits():
    plan = make_plan(PlanOptions(recipe="gpt2-xl", gpu="h100", gpus=8))
    most = plan.largest_micro_batch()
    assert 1 < most < plan.sequences
    assert plan.fits(most)
    assert not plan.fits(most + 1)
    budget = (1 - RESERVE) * plan.machine.memory_bytes
    assert sum(plan.memory(most).values()) <= budget < sum(plan.memory(most + 1).values())


def test_a_whole_step_that_fits_needs_no_accumulation():
    plan = make_plan(PlanOptions(recipe="laptop", gpu="h100"))
    assert plan.largest_micro_batch() == plan.sequences == 8
    assert plan.memory(8)["gradients"] == 0 < plan.memory(4)["gradients"]


# --- time


@pytest.mark.parametrize(
    ("recipe", "gpu", "tokens_per_step", "seconds"),
    [
        ("gpt2", "a100-80gb", "524288", 0.300),  # llm.c, scripts/run_gpt2_124M.sh
        ("gpt2", "h100", "524288", 0.140),  # llm.c, modded-nanogpt's record 1
        ("gpt2-xl", "h100", "1048576", 2.8),  # llm.c, scripts/run_gpt2_1558M.sh
    ],
)
def test_published_runs_lie_in_the_range(recipe, gpu, tokens_per_step, seconds):
    plan = make_plan(PlanOptions(recipe=recipe, gpu=gpu, gpus=8, tokens_per_step=tokens_per_step))
    low, high = plan.seconds()
    assert low < seconds < high <= 2.5 * low


@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize("gpu", CEILINGS)
def test_ranges_are_useful_and_below_the_peak(gpu, gpus):
    for recipe in PRESETS:
        plan = make_plan(PlanOptions(recipe=recipe, gpu=gpu, gpus=gpus))
        low, high = plan.seconds()
        assert low < high <= 2.5 * low
        flops = flops_per_token(plan.model, plan.context_tokens) * plan.tokens_per_step
        assert flops / low < gpus * CEILINGS[gpu].bf16_flops
        assert not plan.is_launch_bound()


def test_a_step_is_the_sum_of_its_terms(tritium):
    """gpt2 on 8 H100, worked out with the numbers themselves: 65,536 tokens each, in two micro-batches."""
    good, poor = make_plan(PlanOptions(recipe="gpt2", gpu="h100", gpus=8)).seconds()
    assert poor == pytest.approx(
        6 * 123_653_376 * 65_536 / 600e12
        + 7 * 12 * 768 * 1024 * 65_536 / 192e12
        + 65_536 * (12 * 768 * 158 + 50_257 * 8) / (0.75 * 3.35e12)
        + (124_439_808 * 40 + 84_934_656 * (6 + 2 * 10) + 2 * 50_257 * 768 * 24) / (0.75 * 3.35e12)
        + 2 * 7 / 8 * 4 * 124_439_808 / (0.75 * 450e9)
    )
    assert good == pytest.approx(
        6 * 123_653_376 * 65_536 / 750e12
        + 7 * 12 * 768 * 1024 * 65_536 / 400e12
        + 65_536 * 12 * 768 * 56 / (0.9 * 3.35e12)
        + (124_439_808 * 28 + 84_934_656 * (6 + 2 * 10) + 2 * 50_257 * 768 * 24) / (0.9 * 3.35e12)
    )
    _, out, _ = tritium(
        "plan", "gpt2", "--gpu", "h100", "--gpus", 8, "--tokens", "10B", "--price", 2.5
    )
    hours = [seconds * 1e10 / 524_288 / 3600 for seconds in (good, poor)]
    low, high = (float(word) for word in out.split("price")[1].split(",")[0].split(" to "))
    assert (low, high) == pytest.approx([8 * 2.5 * each for each in hours], rel=5e-3)


def test_more_gpus_are_faster_and_pay_for_the_reduction():
    one, eight = (make_plan(PlanOptions(recipe="gpt2", gpu="h100", gpus=gpus)) for gpus in (1, 8))
    for a, b in zip(one.seconds(), eight.seconds(), strict=True):
        assert b < a < 8 * b
    slow = make_plan(PlanOptions(recipe="gpt2", gpu="h100-pcie", gpus=8)).seconds()[1]
    fast = replace(
        CEILINGS["h100-pcie"], link_bytes_per_second=CEILINGS["h100"].link_bytes_per_second
    )
    plan = make_plan(PlanOptions(recipe="gpt2", gpu="h100-pcie", gpus=8))
    assert replace(plan, machine=replace(plan.machine, ceiling=fast)).seconds()[1] < slow


# --- the command


def test_presets_are_planned_as_published_and_recipes_by_their_tokenizer():
    sizes = {
        name: make_plan(PlanOptions(recipe=name, gpu="h100")).model.vocab_size for name in RECIPES
    }
    assert sizes.pop("laptop") == 4096
    assert sizes.pop("shakespeare-char") == 66
    assert set(sizes.values()) == {50_257}


def test_the_answer_begins_with_memory_and_ends_with_speed(tritium):
    status, out, err = tritium(
        "plan", "gpt2", "--gpu", "h100", "--gpus", 8, "--tokens", "10B", "--price", 2.5
    )
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("gpt2 on 8 x h100: fits, ")
    assert "at most 64 sequences at once" in lines[0]
    assert lines[-1].startswith("a run at less than 3,")
    for words in (
        "524,288 tokens",
        "10,000,000,000 tokens",
        "hours",
        "MFU",
        "at 2.5 for a GPU and hour",
        "an estimate",
    ):
        assert words in out


def test_what_does_not_fit_says_what_to_change(tritium):
    status, out, _ = tritium("plan", "gpt2-xl", "--gpu", "h100", "--micro-batch-size", 64)
    assert status == 0
    assert "does not fit" in out.splitlines()[0]
    assert "--micro-batch-size 16 does (at most" in out.splitlines()[0]
    assert (
        "nor does a single sequence"
        in tritium("plan", "gpt2-xl", "--gpu", "rtx-4090")[1].splitlines()[0]
    )


def test_recomputation_is_suggested_where_it_makes_room(tritium):
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


def test_recomputing_costs_a_forward():
    plans = [
        make_plan(PlanOptions(recipe="gpt2", gpu="h100", recompute=mode))
        for mode in ("none", "gelu", "selective", "block")
    ]
    none, gelu, selective, block = (plan.seconds()[0] for plan in plans)
    assert none == gelu
    assert selective - none == pytest.approx(2 * 84_934_656 * 524_288 / 750e12)
    assert block - selective == pytest.approx(2 * 12 * 768 * 1024 * 524_288 / 400e12)


def test_a_small_model_is_bound_by_launches(tritium):
    assert (
        "bound by launching kernels"
        in tritium("plan", "shakespeare-char", "--gpu", "h100")[1].splitlines()[-1]
    )


def test_without_a_gpu_memory_is_this_machines_and_no_time_is_claimed(tritium, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = tritium("plan", "laptop")
    assert status == 0, err
    assert "CPU: fits" in out
    assert "no ceilings known" in out.splitlines()[-1]
    assert make_plan(PlanOptions(recipe="laptop")).machine.memory_bytes > 1e9


@pytest.mark.parametrize(
    ("name", "is_known"), [("NVIDIA A100-SXM4-80GB", True), ("NVIDIA GeForce GT 710", False)]
)
def test_the_present_gpu_is_planned_for(name, is_known, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda _: type("Properties", (), {"total_memory": 85 * 10**9}),
    )
    plan = make_plan(PlanOptions(recipe="gpt2"))
    assert plan.machine == Machine(
        name=name,
        gpus=1,
        memory_bytes=85 * 10**9,
        itemsize=2,
        ceiling=CEILINGS["a100-80gb"] if is_known else None,
    )
    assert (plan.seconds() is not None) == is_known


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("10B", 10**10),
        ("500M", 5 * 10**8),
        ("1.5e9", 15 * 10**8),
        ("524,288", 524_288),
        ("2.5k", 2500),
    ],
)
def test_tokens_as_people_write_them(text, count):
    assert make_plan(PlanOptions(recipe="gpt2", gpu="h100", tokens=text)).tokens == count


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpt-2"], "unknown recipe 'gpt-2'; did you mean 'gpt2'"),
        (
            ["gpt2", "--gpu", "a100"],
            "--gpu: expected a GPU of known ceilings, got 'a100'; near: h100, a100-80gb, a100-40gb",
        ),
        (["gpt2", "--gpu", "h100", "--gpus", "0"], "--gpus: expected 1 or more, got 0"),
        (
            ["gpt2", "--gpu", "h100", "--gpus", "3"],
            "expected a multiple of 3 GPUs x 1024 tokens, got 524288; take 525312",
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
            "a divisor of the 512 sequences that a GPU has in a step",
        ),
        (
            ["gpt2", "--gpu", "h100", "--context-tokens", "0"],
            "--context-tokens: expected 1 or more, got 0",
        ),
        (["gpt2", "--gpuz", "2"], "near: --gpu"),
        ([], "see tritium plan --help"),
    ],
)
def test_bad_options_are_one_line(words, message, refused):
    assert message in refused("plan", *words)


def test_two_cpus_are_refused(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--gpus: expected 1 on a machine without a GPU, got 2" in refused(
        "plan", "laptop", "--gpus", "2"
    )


def test_a_machine_that_does_not_tell_its_memory_needs_a_name(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delattr(planner.os, "sysconf")
    assert "name one, such as h100" in refused("plan", "laptop")


def test_rates_taken_from_another_generation_are_named():
    plan = make_plan(PlanOptions(recipe="gpt2", gpu="l40s"))
    assert isinstance(plan, Plan)
    assert "shares of ada taken as hopper's" in "\n".join(describe(plan, "gpt2", None))
