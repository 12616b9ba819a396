"""The text of `tritium plan`, and of the message for a run that is out of memory."""

from dataclasses import replace

from ....errors import plural
from ....model.choices import RECOMPUTATIONS
from ....model.cost import adapter_elements, cache_bytes, flops_per_token, parameters
from ...choices import ENGINES
from ...distributed.world import World
from ...machine.memory import RESERVE
from ...plan import DEFAULT_GENERATION, MATMUL_RATES, Plan, largest_divisor, plan_of_run
from ...run.folder import RunRecord

_MEMORY_NOTES = {
    "weights": "float32",
    "copies": "of the weights in bf16, for matmuls",
    "gradients": "float32",
    "optimizer": "state, float32",
    "activations": "kept for the backward",
    "head": "a chunk of logits, gradients of the embedding",
    "temporaries": "of the backward",
    "process": "context and libraries: an estimate",
}


def describe(plan: Plan, name: str, price: float | None) -> list[str]:
    """Return the lines that `tritium plan` prints."""
    model = plan.model
    machine = plan.machine
    where = machine.name if machine.gpus == 1 else f"{machine.gpus} x {machine.name}"
    micro_batches = plan.sequences // plan.micro_batch
    cache = cache_bytes(model, 1, plan.context_tokens, machine.itemsize)
    trained = adapter_elements(model, plan.adapter)
    what = f"LoRA of rank {plan.adapter.lora}"
    if model.prefix_tokens:
        what = f"a prefix of {plural(model.prefix_tokens, 'token')}"
    adapter = [f"training   {what}: {trained:,} weights"] if trained else []
    return [
        f"{name} on {where}: {_verdict(plan)}",
        "",
        f"model      {parameters(model):,} parameters: "
        f"{plural(model.n_layer, 'layer')} of {model.d_model}, vocabulary of {model.vocab_size:,}",
        *adapter,
        f"step       {plan.tokens_per_step:,} tokens; on each device {micro_batches} x "
        f"{plural(plan.micro_batch, 'sequence')} of {plan.context_tokens:,} tokens",
        f"generation {_size(cache)} of keys and values per sequence of {plan.context_tokens:,} "
        f"tokens in {8 * machine.itemsize} bits",
        "",
        *_describe_memory(plan),
        "",
        *_describe_time(plan, price),
    ]


def what_fits(record: RunRecord, world: World) -> str:
    """Return the message for a run that ran out of memory: its plan on this machine."""
    plan = plan_of_run(record, world)
    unsharded = ", without sharding," if ENGINES[world.engine].engine.shards_memory else ""
    advice = ""
    if plan.fits(plan.micro_batch):
        advice = "; free other memory of the device, or resume with a smaller --micro-batch-size"
    return (
        f"out of memory: by the formulas of `tritium plan`{unsharded} a step "
        f"{_verdict(plan)}{advice}"
    )


def _verdict(plan: Plan) -> str:
    """Whether the plan fits, and if not, what to change."""
    need = sum(plan.memory(plan.micro_batch).values())
    sizes = f"{_size(need)} of {_size(plan.machine.memory_bytes)}"
    most = plan.largest_micro_batch()
    if plan.fits(plan.micro_batch):
        all_of_a_step = " (all of a step)" if most == plan.sequences else ""
        return f"fits, {sizes}; at most {plural(most, 'sequence')} at once{all_of_a_step}"
    if most:
        smaller = largest_divisor(plan.sequences, most)
        mode = _cheapest_recompute(plan, plan.micro_batch)
        also = f", and so does --recompute {mode}" if mode else ""
        return (
            f"does not fit, {sizes}; --micro-batch-size {smaller} does "
            f"(at most {most} at once){also}"
        )
    mode = _cheapest_recompute(plan, 1)
    hint = (
        f"one does with --recompute {mode}"
        if mode
        else "take more memory, a smaller model or fewer --context-tokens"
    )
    return f"does not fit, {sizes}, nor does a single sequence; {hint}"


def _cheapest_recompute(plan: Plan, micro_batch: int) -> str | None:
    """The cheapest activation checkpointing with which a micro-batch fits, or None."""
    for mode, row in RECOMPUTATIONS.items():
        if row.fits(plan.model) and replace(plan, recompute=mode).fits(micro_batch):
            return mode
    return None


def _describe_memory(plan: Plan) -> list[str]:
    parts = plan.memory(plan.micro_batch)
    lines = ["peak memory of each device during a step, by formula:"]
    for name, note in _MEMORY_NOTES.items():
        if parts[name]:
            lines.append(f"  {name:12}{_size(parts[name]):>10}  {note}")
    total = _size(sum(parts.values()))
    note = f"{RESERVE:.0%} of the memory has to stay free: an estimate"
    return [*lines, f"  {'total':12}{total:>10}  {note}"]


def _describe_time(plan: Plan, price: float | None) -> list[str]:
    seconds = plan.seconds()
    if seconds is None:
        return ["time: the limits of this device are not known; name a GPU with --gpu"]
    known = plan.machine.ceiling
    gpus = plan.machine.gpus
    fast, slow = (plan.tokens_per_step / each for each in seconds)
    total = (plan.tokens / fast, plan.tokens / slow)

    # rows of the table
    flops = flops_per_token(plan.model, plan.context_tokens, plan.adapter) / (
        gpus * known.bf16_flops
    )
    rows = {
        "step": _time_range(*seconds),
        "tokens/s": f"{_number(slow)} to {_number(fast)}",
        "MFU": f"{slow * flops:.0%} to {fast * flops:.0%}",
        f"{plan.tokens:,} tokens": _time_range(*total),
    }
    if price is not None:
        low, high = (each / 3600 * gpus * price for each in total)
        rows["price"] = f"{_number(low)} to {_number(high)}, at {price:g} per GPU and hour"

    # the lines before and after it
    title = "time, estimated from the limits of the device, without launches, data and evaluations"
    if known.generation not in MATMUL_RATES:
        title += f"; rates of {DEFAULT_GENERATION} assumed for {known.generation}"
    last = f"less than {_number(slow)} tokens/s on this hardware means that speed is lost somewhere"
    if plan.is_launch_bound():
        last = (
            "launching the kernels of so small a micro-batch takes longer than running them: "
            "expect a slower step"
        )
    width = max(map(len, rows)) + 2
    table = [f"  {name:{width}}{row}" for name, row in rows.items()]
    return [f"{title}:", *table, "", last]


def _time_range(low: float, high: float) -> str:
    """Format a range of seconds, in hours, seconds or milliseconds."""
    unit, seconds = ("hours", 3600) if high >= 360 else ("s", 1) if high >= 1 else ("ms", 1e-3)
    return f"{_number(low / seconds)} to {_number(high / seconds)} {unit}"


def _number(number: float) -> str:
    """Format with three digits, because an estimate is not more precise."""
    return f"{number:.3g}" if number < 100 else f"{float(f'{number:.3g}'):,.0f}"


def _size(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.2f} MB"
