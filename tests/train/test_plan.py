"""The plan, compared with published runs and with the memory that training allocates."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tritium.model import GPT, PRESETS, GPTConfig
from tritium.model.config import AdapterOptions
from tritium.model.cost import flops_per_token, step_bytes
from tritium.model.lora import add_lora, lora_parameters
from tritium.train.choices import OPTIMIZERS
from tritium.train.config import TrainConfig
from tritium.train.data.loader import Batch
from tritium.train.distributed.world import SINGLE_PROCESS
from tritium.train.machine.gpus import CEILINGS
from tritium.train.machine.memory import RESERVE
from tritium.train.plan import Machine, PlanOptions, make_plan, plan_of_run
from tritium.train.recipes import RECIPES
from tritium.train.trainer import Trainer, single_trainer

pytestmark = pytest.mark.plain

# --- memory

DEEP = GPTConfig(n_layer=6, n_head=4, d_model=128, vocab_size=300, context_tokens=128)
WIDE = GPTConfig(n_layer=4, n_head=2, d_model=128, vocab_size=1000, context_tokens=128)
LLAMA = replace(DEEP, position="rotary", norm="rms", mlp="swiglu", bias=False)
LARGE_VOCABULARY = GPTConfig(
    n_layer=2, n_head=1, d_model=64, vocab_size=5000, context_tokens=64, bias=False
)


def trained(config: GPTConfig, **options) -> tuple[Trainer, Callable[[], None]]:
    """Return a trainer after one step, and a function that runs one more step."""
    # The definition of attention in 16 bits has scratch memory that no kernel has.
    attention = "sdpa" if options.get("precision") == "bfloat16" else "tritium"
    model = GPT(config, attention=attention, recompute=options.get("recompute", "none"))
    run = TrainConfig.from_options(**options)
    if run.adapter.lora:
        add_lora(model, run.adapter)
    trainer = single_trainer(model, run)
    batch = Batch(
        torch.randint(config.vocab_size, (run.batch_size, config.context_tokens + 1)),
        np.full(run.batch_size, config.context_tokens),
    )

    def step() -> None:
        trainer.backward(batch)
        trainer.update(1e-3)

    step()
    return trainer, step


def states(trainer: Trainer) -> list[torch.Tensor]:
    return [value for state in trainer.optimizer.states().values() for value in state.values()]


def memory_changes(roots: list) -> list[int]:
    """Return the bytes that each event of a profile allocates, or frees if negative, in order.

    PyTorch's allocator remembers the addresses of earlier profiles in this process. If a new tensor
    has such an address, the profiler reports that it is freed, but not that it was allocated.
    """
    events, rest = [], list(roots)
    while rest:
        event = rest.pop()
        rest += event.children
        if event.typed[0] == torch._C._profiler._EventType.Allocation:
            events.append((event.start_time_ns, event.typed[1].ptr, event.typed[1].alloc_size))
    changes, allocated = [], set()
    for _, address, size in sorted(events, key=lambda event: event[0]):
        if size > 0:
            allocated.add(address)
        elif address not in allocated:
            continue
        else:
            allocated.remove(address)
        changes.append(size)
    return changes


def measured_peak(config: GPTConfig, **options) -> int:
    """Bytes of all tensors at the fullest moment of the second step, by PyTorch's allocator."""
    trainer, step = trained(config, **options)
    # Between steps there are weights, their copies and the optimizer's state.
    kept = {*trainer.model.parameters(), *trainer.working.parameters(), *states(trainer)}
    kept_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept)
    # A step keeps its loss, and whether it was skipped. Free those of the first step.
    trainer._loss = trainer.optimizer.skipped = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    changes = memory_changes(record.profiler.kineto_results.experimental_event_tree())
    assert sum(changes) == 2 * 4, "a step frees all else that it allocates"
    return kept_bytes + max(itertools.accumulate(changes))


@pytest.fixture
def library_defaults():
    """oneDNN with its default settings and one thread: its scratch memory is not in the formula."""
    matmul = torch.backends.mkldnn.matmul
    precision = matmul.fp32_precision
    threads = torch.get_num_threads()
    matmul.fp32_precision = "none"
    torch.set_num_threads(1)
    yield
    matmul.fp32_precision = precision
    torch.set_num_threads(threads)


SLOW = ("float32", "bfloat16")
SLOW_IN_BFLOAT16 = ("bfloat16",)  # matmuls of 16 bits are slow on a CPU


def in_each_precision(*case, slow=()):
    """A case in each precision. The plain run leaves out the precisions `slow`."""
    return [
        pytest.param(*case, precision, marks=[pytest.mark.slow] * (precision in slow))
        for precision in ("float32", "bfloat16")
    ]


@pytest.mark.parametrize(
    ("config", "batch", "micro_batch", "precision"),
    [
        # fullest in the backward of the last MLP
        *in_each_precision(DEEP, 4, 4, slow=SLOW_IN_BFLOAT16),
        *in_each_precision(DEEP, 4, 2, slow=SLOW),
        # fullest at the end of the backward
        *in_each_precision(replace(DEEP, context_tokens=16), 1, 1),
        # fullest in the head, in several chunks of 256 rows
        *in_each_precision(replace(LARGE_VOCABULARY, vocab_size=1 << 14), 12, 12),
        # fullest in the head, in one chunk
        *in_each_precision(WIDE, 8, 8, slow=SLOW_IN_BFLOAT16),
        *in_each_precision(WIDE, 8, 2, slow=SLOW),
        *in_each_precision(LARGE_VOCABULARY, 4, 4, slow=SLOW),
        *in_each_precision(LARGE_VOCABULARY, 4, 1),
        *in_each_precision(replace(LARGE_VOCABULARY, tied_head=False), 4, 4),
        *in_each_precision(replace(LARGE_VOCABULARY, tied_head=False), 4, 1, slow=SLOW),
        *in_each_precision(LLAMA, 4, 4, slow=SLOW),
        *in_each_precision(LLAMA, 4, 2, slow=SLOW_IN_BFLOAT16),
        # fullest in the weight gradients of the last MLP
        *in_each_precision(replace(LLAMA, n_layer=1, d_hidden=1024, context_tokens=64), 2, 1),
        *in_each_precision(replace(DEEP, dropout=0.1, embedding_dropout=0.1), 4, 4),
        *in_each_precision(replace(DEEP, mlp="relu2", qk_norm=True), 4, 4, slow=SLOW_IN_BFLOAT16),
    ],
)
def test_formula_matches_the_measured_peak(config, batch, micro_batch, precision, library_defaults):
    itemsize = getattr(torch, precision).itemsize
    sizes = (config, micro_batch, config.context_tokens, itemsize)
    formula = sum(step_bytes(*sizes, accumulates=micro_batch < batch).values())
    peak = measured_peak(
        config, batch_size=batch, micro_batch_size=micro_batch, precision=precision
    )
    assert 0.98 <= formula / peak <= 1.02


LORA = {"lora": 4, "init_from": "a model"}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_lora_has_the_optimizer_state_and_gradients_of_the_formula(precision):
    trainer, _ = trained(DEEP, batch_size=2, precision=precision, **LORA)
    batch = Batch(torch.zeros(2, DEEP.context_tokens + 1, dtype=int), np.full(2, 128))
    trainer.backward(batch)
    gradients = sum(
        each.grad.nbytes for each in trainer.model.parameters() if each.grad is not None
    )
    moments = sum(value.nbytes for value in states(trainer) if value.ndim)
    itemsize = getattr(torch, precision).itemsize
    adapter = AdapterOptions(lora=4)
    parts = step_bytes(DEEP, 2, 128, itemsize, accumulates=True, adapter=adapter)
    assert parts["gradients"] == gradients == 4 * lora_parameters(DEEP, adapter)
    assert parts["optimizer"] == moments == 2 * gradients
    assert parts["weights"] == sum(each.nbytes for each in trainer.model.parameters())


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (DEEP, {}),
        (LARGE_VOCABULARY, {}),
        pytest.param(DEEP, {"lora_dropout": 0.1}, marks=pytest.mark.slow),
        pytest.param(DEEP, {"recompute": "block"}, marks=pytest.mark.slow),
        pytest.param(LLAMA, {}, marks=pytest.mark.slow),
    ],
)
def test_lora_needs_at_most_the_memory_of_the_formula(config, options, library_defaults):
    run = TrainConfig.from_options(**LORA | options)
    sizes = (config, 4, config.context_tokens, 4)
    formula = step_bytes(
        *sizes, accumulates=False, adapter=run.adapter, recompute=run.execution.recompute
    )
    peak = measured_peak(config, batch_size=4, **LORA | options)
    assert 1.0 <= sum(formula.values()) / peak <= 1.25


@pytest.mark.parametrize(
    ("config", "batch", "micro_batch", "recompute", "precision"),
    [
        *in_each_precision(DEEP, 4, 4, "gelu", slow=SLOW_IN_BFLOAT16),
        *in_each_precision(DEEP, 4, 2, "selective", slow=SLOW_IN_BFLOAT16),
        *in_each_precision(DEEP, 4, 4, "selective", slow=SLOW),
        *in_each_precision(DEEP, 4, 4, "block", slow=SLOW),
        *in_each_precision(LLAMA, 4, 2, "block"),
        *in_each_precision(LARGE_VOCABULARY, 4, 4, "block"),
    ],
)
def test_formula_matches_the_measured_peak_with_activation_checkpointing(
    config, batch, micro_batch, recompute, precision, library_defaults
):
    itemsize = getattr(torch, precision).itemsize
    sizes = (config, micro_batch, config.context_tokens, itemsize)
    accumulates = micro_batch < batch
    formula = sum(step_bytes(*sizes, accumulates=accumulates, recompute=recompute).values())
    peak = measured_peak(
        config,
        batch_size=batch,
        micro_batch_size=micro_batch,
        precision=precision,
        recompute=recompute,
    )
    assert 0.98 <= formula / peak <= 1.02
    without = sum(step_bytes(*sizes, accumulates=accumulates).values())
    assert formula < without or config is LARGE_VOCABULARY


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer_bytes_match_the_state(optimizer):
    config = replace(DEEP, n_layer=2)
    trainer, _ = trained(config, batch_size=1, optimizer=optimizer)
    # Without the step counts, one number per parameter.
    measured = sum(4 * tensor.numel() for tensor in states(trainer) if tensor.ndim)
    plan = make_plan(PlanOptions(recipe="laptop", gpu="h100"))
    plan = replace(plan, model=config, optimizer=optimizer)
    assert plan.memory(1)["optimizer"] == measured


def test_the_name_of_a_gpu_may_have_capital_letters():
    plans = [make_plan(PlanOptions(recipe="gpt2", gpu=name)) for name in ("h100", "H100")]
    assert plans[0] == plans[1]


def test_largest_micro_batch_is_the_last_that_fits():
    plan = make_plan(PlanOptions(recipe="gpt2-xl", gpu="h100", gpus=8))
    most = plan.largest_micro_batch()
    assert 1 < most < plan.sequences
    assert plan.fits(most)
    assert not plan.fits(most + 1)
    budget = (1 - RESERVE) * plan.machine.memory_bytes
    assert sum(plan.memory(most).values()) <= budget < sum(plan.memory(most + 1).values())


def test_step_in_one_micro_batch_holds_no_gradients_in_the_forward():
    plan = make_plan(PlanOptions(recipe="laptop", gpu="h100"))
    assert plan.largest_micro_batch() == plan.sequences == 16
    assert plan.memory(16)["gradients"] == 0 < plan.memory(8)["gradients"]


# --- time


@pytest.mark.parametrize(
    ("recipe", "gpu", "tokens_per_step", "seconds"),
    [
        ("gpt2", "a100-80gb", "524288", 0.300),  # llm.c, scripts/run_gpt2_124M.sh
        ("gpt2", "h100", "524288", 0.140),  # llm.c, modded-nanogpt's record 1
        ("gpt2-xl", "h100", "1048576", 2.8),  # llm.c, scripts/run_gpt2_1558M.sh
    ],
)
def test_published_step_times_lie_in_the_range(recipe, gpu, tokens_per_step, seconds):
    plan = make_plan(PlanOptions(recipe=recipe, gpu=gpu, gpus=8, tokens_per_step=tokens_per_step))
    low, high = plan.seconds()
    assert low < seconds < high <= 2.5 * low


@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize("gpu", CEILINGS)
def test_range_is_narrow_and_below_the_peak(gpu, gpus):
    for recipe in PRESETS:
        plan = make_plan(PlanOptions(recipe=recipe, gpu=gpu, gpus=gpus))
        low, high = plan.seconds()
        assert low < high <= 2.5 * low
        flops = flops_per_token(plan.model, plan.context_tokens) * plan.tokens_per_step
        assert flops / low < gpus * CEILINGS[gpu].bf16_flops
        assert not plan.is_launch_bound()


def test_step_time_is_the_sum_of_its_terms():
    """gpt2 on 8 H100, in numbers: 65,536 tokens per GPU in two micro-batches."""
    good, poor = make_plan(PlanOptions(recipe="gpt2", gpu="h100", gpus=8)).seconds()
    assert poor == pytest.approx(
        6 * 123_653_376 * 65_536 / 600e12
        + 7 * 12 * 768 * 1024 * 65_536 / 192e12
        + 65_536 * (12 * 768 * 158 + 50_257 * 8) / (0.75 * 3.35e12)
        + (124_439_808 * 40 + 84_934_656 * (6 + 2 * 10) + 2 * 50_257 * 768 * 26) / (0.75 * 3.35e12)
        + 2 * 7 / 8 * 4 * 124_439_808 / (0.75 * 450e9)
    )
    assert good == pytest.approx(
        6 * 123_653_376 * 65_536 / 750e12
        + 7 * 12 * 768 * 1024 * 65_536 / 400e12
        + 65_536 * 12 * 768 * 56 / (0.9 * 3.35e12)
        + (124_439_808 * 28 + 84_934_656 * (6 + 2 * 10) + 2 * 50_257 * 768 * 26) / (0.9 * 3.35e12)
    )


def test_frozen_weights_take_two_thirds_of_the_matmuls_of_trained_ones():
    times = []
    for rank in (0, 8):
        plan = make_plan(PlanOptions(recipe="gpt2", gpu="h100", lora=rank))
        machine = replace(CEILINGS["h100"], bytes_per_second=math.inf)
        times.append(replace(plan, machine=replace(plan.machine, ceiling=machine)).seconds()[0])
    flops = 2 * 123_653_376 - 6 * 1_179_648  # per token
    assert times[0] - times[1] == pytest.approx(flops * 524_288 / 750e12)


def test_more_gpus_are_faster_but_not_in_proportion():
    one, eight = (make_plan(PlanOptions(recipe="gpt2", gpu="h100", gpus=gpus)) for gpus in (1, 8))
    for a, b in zip(one.seconds(), eight.seconds(), strict=True):
        assert b < a < 8 * b
    slow = make_plan(PlanOptions(recipe="gpt2", gpu="h100-pcie", gpus=8)).seconds()[1]
    fast = replace(
        CEILINGS["h100-pcie"], link_bytes_per_second=CEILINGS["h100"].link_bytes_per_second
    )
    plan = make_plan(PlanOptions(recipe="gpt2", gpu="h100-pcie", gpus=8))
    assert replace(plan, machine=replace(plan.machine, ceiling=fast)).seconds()[1] < slow


# --- options


def test_recipes_have_the_vocabulary_of_their_tokenizers():
    sizes = {
        name: make_plan(PlanOptions(recipe=name, gpu="h100")).model.vocab_size for name in RECIPES
    }
    assert sizes.pop("laptop") == 4096
    assert sizes.pop("shakespeare-char") == sizes.pop("shakespeare-char-gpu") == 66
    assert set(sizes.values()) == {50_257}


def test_activation_checkpointing_adds_a_forward():
    plans = [
        make_plan(PlanOptions(recipe="gpt2", gpu="h100", recompute=mode))
        for mode in ("none", "gelu", "selective", "block")
    ]
    none, gelu, selective, block = (plan.seconds()[0] for plan in plans)
    assert none == gelu
    assert selective - none == pytest.approx(2 * 84_934_656 * 524_288 / 750e12)
    assert block - selective == pytest.approx(2 * 12 * 768 * 1024 * 524_288 / 400e12)


@pytest.mark.parametrize(
    ("name", "is_known"), [("NVIDIA A100-SXM4-80GB", True), ("NVIDIA GeForce GT 710", False)]
)
def test_default_machine_is_the_gpu_of_this_machine(name, is_known, monkeypatch):
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
        ("524_288", 524_288),
        ("2.5k", 2500),
    ],
)
def test_tokens_accept_suffixes_and_separators(text, count):
    assert make_plan(PlanOptions(recipe="gpt2", gpu="h100", tokens=text)).tokens == count


def test_the_plan_of_a_run_has_the_tokens_of_its_steps():
    train = TrainConfig.from_options(steps=5, batch_size=4, context_tokens=16, device="cpu")
    plan = plan_of_run(SimpleNamespace(train=train, model=train.gpt(300)), SINGLE_PROCESS)
    assert plan.tokens == 5 * plan.tokens_per_step == 5 * 4 * 16
