"""tritium bench traffic: bytes that a GPT-2 block moves per token beside plain eager PyTorch and the least possible.

Counted from what runs, not timed: one tritium.model.gpt.Block and one baseline.Block go forward and backward on tensors that
hold nothing, parameters in bfloat16 too. Each ATen operator reads and writes its tensors once, each Triton kernel likewise:
what is read again comes out of a cache. The baseline's attention is PyTorch's fused one for CPUs, which takes and gives what a
fused GPU kernel does; what such a kernel moves inside is not counted, where ours has both kernels of its backward counted. Two
batches are run: what they differ by belongs to tokens, the rest to each step, however many tokens it has: weights, their
gradients, partial sums.

The least, with these units of work: addition and norm, matrix product, attention; GELU and the sums for biases ride in a
product. What lies between two units is written once and read once by each that needs it; rows' statistics are formed again.
In elements a token, each unit as reads + writes:

    forward    norms       2 (2 D + 2 D)            branch, stream; their sum, y
               qkv         D + 3 D
               attention   3 D + D                  and lse out
               projection  D + D
               perceptron  D + F,  F + D            only h is kept: GELU is computed where h is read
               together    20 D + 2 F               and lse
    backward   perceptron  D + F + F                dy, h; dh
                           D + F                    dy, h for dw2
                           F + D                    dh; dx
                           F + D                    dh, x for dw1
               norms       2 (3 D + D)              dy, the stream's gradient, h; dx
               projection  D + D,  2 D              dy read for dx and for dw
               attention   5 D + 3 D                do, o, q, k, v; dqkv; and lse in
               qkv         3 D + D,  3 D + D
               together    32 D + 5 F               and lse

(An addition in the product before it, rather than in the norm behind it, would save D more, twice, in the forward.)

Memory of the perceptron, in tensors of (N, F): kept between forward and backward beside x, weights and y; the most there at
once in both, and allocated in all, beside x, weights and biases. What does not grow with the tokens is left out.

Shapes     D model width, F = 4 D, H heads, lse (B, H, T) float32
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from ...kernels import gelu_mlp
from ...model import PRESETS, GPTConfig, gpt
from ...train.commands.cli import parse
from ..record import provenance, writable, write_record
from ..report import traffic_tables
from . import baseline
from .memory import held, moved

PRESET_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
DTYPE = torch.bfloat16
# Sequences of a step in the two counts: what real training has on a GPU, since launches are planned by size.
SEQUENCES = (32, 64)

Passes = dict[str, Counter[str]]


@dataclass(frozen=True, kw_only=True)
class TrafficOptions:
    """Options of `tritium bench traffic`."""

    out: str | None = None
    """Also write the figures as JSON."""


def least(config: GPTConfig, itemsize: int) -> dict[str, int]:
    """Bytes a token of the formulas above."""
    D, F, lse = config.d_model, config.d_feedforward, 4 * config.n_head
    return {
        "forward": (20 * D + 2 * F) * itemsize + lse,
        "backward": (32 * D + 5 * F) * itemsize + lse,
    }


def tritium_passes(config: GPTConfig, sequences: int) -> Passes:
    """Bytes that tritium's block moves for so many sequences of the whole context, by operator or kernel."""
    with torch.device("meta"):
        block = gpt.Block(config, layer=0).to(DTYPE)
    tokens = sequences * config.context_tokens
    branch, stream, dy = (_tensor(tokens, config.d_model, device="meta") for _ in range(3))
    reading = gpt.ForwardContext((sequences, config.context_tokens))
    return _passes(
        lambda: block(branch, stream, reading), (branch, stream, *block.parameters()), dy
    )


def eager_passes(config: GPTConfig, sequences: int) -> Passes:
    """The same of the plain block. It is told that it is on a CPU: on meta there is no fused attention."""
    with FakeTensorMode():
        block = baseline.Block(config)
        block.load_state_dict(
            {name: x.to(DTYPE) for name, x in block.state_dict().items()}, assign=True
        )
        x, dy = (_tensor(sequences, config.context_tokens, config.d_model) for _ in range(2))
        return _passes(lambda: (block(x, None),), (x, *block.parameters()), dy)


def _passes(forward, inputs: Sequence[Tensor], dy: Tensor) -> Passes:
    outputs, there = moved(forward)
    _, back = moved(lambda: torch.autograd.grad(outputs, inputs, [dy] * len(outputs)))
    return {"forward": there, "backward": back}


def _tensor(*shape: int, device: str = "cpu") -> Tensor:
    return torch.empty(shape, dtype=DTYPE, device=device, requires_grad=True)


def of_tokens(small: Counter[str], large: Counter[str], tokens: Sequence[int]) -> dict[str, Any]:
    """Split two counts at two numbers of tokens: bytes a token, bytes a step, and those a token by operator."""
    operators = {name: (large[name] - small[name]) // (tokens[1] - tokens[0]) for name in large}
    token_bytes = sum(operators.values())
    return {
        "token_bytes": token_bytes,
        "step_bytes": small.total() - token_bytes * tokens[0],
        "token_bytes_of": {name: nbytes for name, nbytes in operators.items() if nbytes},
    }


def block_row(preset: str) -> dict[str, Any]:
    """What is counted of one preset's block."""
    config = PRESETS[preset]
    row = {"preset": preset, "d_model": config.d_model, "least": least(config, DTYPE.itemsize)}
    tokens = [sequences * config.context_tokens for sequences in SEQUENCES]
    for name, passes in {"tritium": tritium_passes, "eager": eager_passes}.items():
        small, large = (passes(config, sequences) for sequences in SEQUENCES)
        row[name] = {
            direction: of_tokens(small[direction], large[direction], tokens) for direction in small
        }
    return row


def mlp_rows(preset: str) -> list[dict[str, Any]]:
    """Memory of the perceptron of one preset in tensors of (N, F), a row for each way to write it."""
    config = PRESETS[preset]
    D, F = config.d_model, config.d_feedforward
    with torch.device("meta"):
        layers = nn.Sequential(nn.Linear(D, F), nn.GELU(approximate="tanh"), nn.Linear(F, D)).to(
            DTYPE
        )
    weights = tuple(layers.parameters())
    ways = {
        "nn.Sequential(Linear, GELU, Linear)": layers,
        "gelu_mlp": lambda x: gelu_mlp(x, *weights),
        "gelu_mlp(recompute=True)": lambda x: gelu_mlp(x, *weights, recompute=True),
    }
    rows = []
    for name, way in ways.items():
        counts = []
        for sequences in SEQUENCES:
            x = _tensor(sequences * config.context_tokens, D, device="meta")
            counts.append(held(lambda way=way, x=x: way(x), (x, *weights)))
        unit = (SEQUENCES[1] - SEQUENCES[0]) * config.context_tokens * F * DTYPE.itemsize
        small, large = counts
        rows.append(
            {
                "preset": preset,
                "way": name,
                **{key: (large[key] - small[key]) / unit for key in small},
            }
        )
    return rows


def figures() -> dict[str, Any]:
    """The record's figures."""
    return {
        "dtype": str(DTYPE),
        "itemsize": DTYPE.itemsize,
        "sequences": SEQUENCES,
        "blocks": [block_row(preset) for preset in PRESET_NAMES],
        "mlp": [row for preset in PRESET_NAMES for row in mlp_rows(preset)],
    }


def main(argv: Sequence[str]) -> int:
    """Run `tritium bench traffic`. Returns: exit status."""
    options = parse(
        TrafficOptions,
        argv,
        prog="tritium bench traffic",
        description="Count the bytes that a block moves.",
    )
    out = None if options.out is None else writable(Path(options.out))
    found = figures()
    print(traffic_tables({**provenance(), **found}))
    if out:
        write_record(out, "traffic", found)
    return 0
