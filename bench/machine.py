"""tritium bench machine: the limits of this machine, and whether a training step is repeatable.

The limits are the speed of a large copy and of a large matmul. Then the first step of a recipe is
done twice, from equal weights and with equal batches. The weights after it must be equal bit for
bit: their hashes are compared, without and, on a GPU, with torch.compile.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import tyro

from ..errors import check_positive
from ..model import GPT, GPTConfig
from ..train.commands.cli import parse
from ..train.config import TrainConfig
from ..train.data.tokenizers.tokenizer import vocab_size_of
from ..train.execution import compiles_on
from ..train.machine.device import choose_device, choose_matmul
from ..train.precision import choose_dtype
from ..train.recipes import default_recipe, recipe
from .record import check_writable, write_record
from .timing import ceilings
from .training.implementations import TrainedModel
from .training.training import random_batch


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """Options of `tritium bench machine`."""

    recipe: tyro.conf.Positional[str | None] = None
    """Recipe whose step is repeated; default: gpt2 on a GPU, else laptop."""
    micro_batch_size: int | None = None
    """Sequences of the step; default: the recipe's micro-batch."""
    device: str = "auto"
    """cpu, cuda ...; auto: CUDA if there is a GPU."""
    out: str | None = None
    """Also write the figures to this file, as JSON."""


def step_hash(config: TrainConfig, shape: GPTConfig, device: torch.device, compiled: bool) -> str:
    """Train one step from the seed's weights. Return a hash of the weights after it."""
    torch.manual_seed(config.seed)
    model = GPT(shape).to(device)
    trained = TrainedModel("tritium", model, config, compiled=compiled)
    trained.step(random_batch(config, shape, 0))
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def main(argv: Sequence[str]) -> int:
    """Run `tritium bench machine`. Returns: exit status, 1 if a step is not repeatable."""
    about = "Measure the limits of this machine, and train one step twice."
    options = parse(MachineOptions, argv, prog="tritium bench machine", description=about)
    name = options.recipe or default_recipe()
    config = recipe(name)
    check_positive(options, "micro_batch_size")
    micro_batch = options.micro_batch_size or config.micro_batch
    config = config.with_options(micro_batch_size=micro_batch, batch_size=micro_batch)
    shape = config.gpt(vocab_size_of(config.tokenizer))
    out = check_writable(options.out)
    device = choose_device(options.device)
    choose_matmul(device)

    figures: dict[str, Any] = {"device": device.type, "recipe": name, "micro_batch": micro_batch}
    figures["ceilings"] = limits = ceilings(device, choose_dtype("auto", device))
    print(
        f"copy {limits['bytes_per_second'] / 1e12:.3f} TB/s, "
        f"matmul {limits['flops_per_second'] / 1e12:,.2f} TFLOP/s"
    )
    figures["step_hashes"] = hashes = {}
    for compiled in (False, True) if compiles_on(device) else (False,):
        label = "compiled" if compiled else "eager"
        hashes[label] = [step_hash(config, shape, device, compiled) for _ in range(2)]
        verdict = "equal" if hashes[label][0] == hashes[label][1] else "NOT EQUAL"
        print(f"weights after two equal steps, {label}: {verdict} ({', '.join(hashes[label])})")
        if out:
            write_record(out, "machine", figures)
    return 0 if all(first == second for first, second in hashes.values()) else 1
