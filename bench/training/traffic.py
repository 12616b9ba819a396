"""tritium bench traffic: count the bytes that a GPT-2 block moves per token. No GPU is needed.

Compares tritium's block, the same block in plain eager PyTorch (baseline.py), and the least
possible. Nothing is timed. The blocks run forward and backward on tensors without data, with
parameters in bfloat16. Each ATen operator and each Triton kernel reads and writes its tensors once;
repeated reads are taken to come from a cache. The eager block's attention is PyTorch's fused
operator for CPUs, whose inputs and outputs are those of a fused GPU kernel. Bytes that such a
kernel moves inside are not counted. tritium's attention backward reads q, k, v and do in two
kernels: both count. "one pass" is the same block with the backward of attention in one pass, which
is not the default: one kernel reads do and o for delta, another one reads q, k, v and do.

The backward in one pass adds up dq in a float32 buffer of 132 T K numbers, 35 MB for T = 1,024. It
should stay in the L2 cache, so it counts once per step, as if written back once. Through the L2
cache it moves 13 kB per token at T = 1,024 and D = 768: 56 of 72 pairs of tiles add 16 kB, 14 load
16 kB. If all of it missed the cache, memory would move 24 kB more, 16 D elements.

Two batch sizes are run. The difference gives the bytes per token. The rest are bytes per step:
weights, their gradients and partial sums.

The least has three units of work: addition and norm, matmul, attention. GELU is part of a matmul.
The gradient of a bias is summed by a unit that reads or writes the summed tensor anyway. Every
tensor between two units is written once, and read once by each unit that needs it. Row statistics
are computed again. In elements per token, reads + writes:

    forward    norms       2 (2 D + 2 D)            branch, stream; their sum, y
               qkv         D + 3 D
               attention   3 D + D                  and lse written
               projection  D + D
               MLP         D + F,  F + D            only h is stored; GELU when h is read
               sum         20 D + 2 F               and lse
    backward   MLP         D + F + F                dy, h; dh
                           D + F                    dy, h for dw2
                           F + D                    dh; dx
                           F + D                    dh, x for dw1
               norms       2 (3 D + D)              dy, gradient of the stream, h; dx
               projection  D + D,  2 D              dy read for dx and for dw
               attention   5 D + 3 D                do, o, q, k, v; dqkv; and lse read
               qkv         3 D + D,  3 D + D
               sum         32 D + 5 F               and lse

If the matmul before the norm did the addition, the forward would move 2 D less.

The block of gpt2 is counted again with each option that changes what it computes. Window, softcap
and dropout are part of the kernels that move the tensors anyway.

Shapes     D model width, F = 4 D, H heads, lse (B, H, T) float32
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.tools.tensor_descriptor import TensorDescriptor

from ...model import PRESETS, GPTConfig, gpt
from ...model.choices import POSITIONS
from ...model.context import dropout_seeds
from ...model.layers import Branch
from ...model.positions import rope_tables
from ...train.commands.cli import parse
from ..codegen.launches import Launch, RunLaunchers, record_launches
from ..ops.attention import backward_in
from ..record import check_writable, provenance, write_record
from ..report import traffic_table
from . import baseline

PRESET_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
DTYPE = torch.bfloat16
# Options of the model that change what a block computes.
OPTIONS: dict[str, dict[str, Any]] = {
    "window 256": {"window": 256},
    "softcap 50": {"softcap": 50.0},
    "dropout 0.1": {"dropout": 0.1, "attention_dropout": 0.1},
    "rotary": {"position": "rotary"},
    "QK-norm": {"qk_norm": True},
    "rotary, QK-norm": {"position": "rotary", "qk_norm": True},
}
# Sequences per step in the two counts. Launches are planned by size, so these are realistic.
SEQUENCES = (32, 64)

# Operators that allocate memory without writing it.
ALLOCATING = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
# Operators that overwrite their first argument without reading it.
OVERWRITING = ("copy_", "_foreach_copy_", "fill_", "zero_")

# Direction -> bytes by name of the operator or kernel.
Passes = dict[str, Counter[str]]


@dataclass(frozen=True, kw_only=True)
class TrafficOptions:
    """Options of `tritium bench traffic`."""

    out: str | None = None
    """Also write the figures to this file, as JSON."""


# --- counting bytes


class Moved(TorchDispatchMode):
    """Count the bytes that ATen operators read and write, by name, in `nbytes`.

    Each input and output tensor counts once. Views and allocations count nothing. Expanded tensors
    count the elements that are stored.
    """

    def __init__(self):
        super().__init__()
        self.nbytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "aten":
            with self:
                output = function.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        # PyTorch 2.11 has no shape function for a matmul into a wider dtype.
        is_wider_matmul = function._overloadname == "dtype_out"
        output = kwargs["out"] if is_wider_matmul else function(*args, **kwargs)
        self.nbytes[function._opname] += _moved_by_operator(function, args, kwargs, output)
        return output


def _moved_by_operator(function, args: tuple, kwargs: dict[str, Any], output: Any) -> int:
    if function._opname in ALLOCATING:
        return 0
    inputs, parameters = _tensors((args, kwargs)), function._schema.arguments
    values = dict(zip((p.name for p in parameters), args, strict=False)) | kwargs
    written = _tensors([values.get(p.name) for p in parameters if p.is_write])
    overwritten = _tensors([values.get(p.name) for p in parameters if p.is_out])
    if function._opname in OVERWRITING:
        overwritten = written
    input_storages = {x.untyped_storage()._cdata for x in inputs}
    written += [x for x in _tensors(output) if x.untyped_storage()._cdata not in input_storages]
    if not written:
        return 0  # a view
    # A tensor that is passed twice is read once.
    read = {
        _region(x): stored_bytes(x) for x in inputs if not any(x is other for other in overwritten)
    }
    return sum(read.values()) + sum(map(stored_bytes, written))


def moved_by_launch(launch: Launch) -> int:
    """Return the bytes of a launch's tensors.

    Each argument counts once: a kernel here reads a tensor or writes it. Repeated reads are taken
    to come from a cache.
    """
    arguments = (
        value.base if isinstance(value, TensorDescriptor) else value
        for value in launch.arguments.values()
    )
    return sum(map(stored_bytes, _tensors(list(arguments))))


def moved(call: Callable[[], Any]) -> tuple[Any, Counter[str]]:
    """Run `call` as on a GPU of sm_90, with kernels recorded instead of run.

    Returns: its result, and the bytes moved by name of the operator or kernel.
    """
    # RunLaunchers is entered last: Moved then sees the operators inside the launchers.
    with record_launches("sm_90") as launches, Moved() as seen, RunLaunchers():
        output = call()
    for launch in launches:
        seen.nbytes[launch.kernel.__name__] += moved_by_launch(launch)
    return output, +seen.nbytes


def stored_bytes(x: Tensor) -> int:
    """Return the bytes of a tensor, where expanded axes count as one element."""
    sizes = (1 if stride == 0 else size for size, stride in zip(x.shape, x.stride(), strict=True))
    return math.prod(sizes) * x.element_size()


def _region(x: Tensor) -> tuple:
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


# --- blocks


def least(config: GPTConfig, itemsize: int) -> dict[str, int]:
    """Return the least bytes per token, by the formulas at the top of this file."""
    D, F = config.d_model, config.d_feedforward
    lse_bytes = 4 * config.n_head
    return {
        "forward": (20 * D + 2 * F) * itemsize + lse_bytes,
        "backward": (32 * D + 5 * F) * itemsize + lse_bytes,
    }


def one_pass_passes(config: GPTConfig, sequences: int) -> Passes:
    """Count the bytes that tritium's block moves with the backward of attention in one pass."""
    with backward_in("one pass"):
        return tritium_passes(config, sequences)


def tritium_passes(config: GPTConfig, sequences: int) -> Passes:
    """Count the bytes that tritium's block moves for `sequences` sequences of the full context."""
    with torch.device("meta"):
        block = gpt.Block(config, layer=0).to(DTYPE)
    tokens = sequences * config.context_tokens
    y, stream, dy = (_tensor(tokens, config.d_model, device="meta") for _ in range(3))
    # The first norm returns the gradient of the bias of the MLP before it. The bias of this block's
    # MLP gets its gradient from the norm after the block, which is not part of the count.
    branch = Branch(y, _tensor(config.d_model, device="meta"))
    context = _context(config, sequences)
    parameters = [each for each in block.parameters() if each is not block.mlp.c_proj.bias]

    def forward() -> tuple[Tensor, Tensor]:
        branch_after, stream_after = block(branch, stream, context)
        return branch_after.y, stream_after

    return _passes(forward, (*branch, stream, *parameters), dy)


def _context(config: GPTConfig, sequences: int) -> gpt.ForwardContext:
    """Return the context of a forward in training, on the meta device."""
    rope = seeds = None
    if POSITIONS[config.position].rotates:
        position = torch.empty(config.context_tokens, dtype=torch.int64, device="meta")
        rope = rope_tables(position, config.head_size, config.rope_base)
    if config.dropout or config.attention_dropout:
        seeds = dropout_seeds(torch.empty((), dtype=torch.int64, device="meta"), n_layer=1)
    return gpt.ForwardContext(
        (sequences, config.context_tokens),
        rope=rope,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        seeds=seeds,
    )


def eager_passes(config: GPTConfig, sequences: int) -> Passes:
    """Count the bytes that the plain PyTorch block moves.

    Its fake tensors are on a CPU: there is no fused attention on meta.
    """
    with FakeTensorMode():
        block = baseline.Block(config)
        weights = {name: x.to(DTYPE) for name, x in block.state_dict().items()}
        block.load_state_dict(weights, assign=True)
        x, dy = (_tensor(sequences, config.context_tokens, config.d_model) for _ in range(2))
        return _passes(lambda: (block(x, None),), (x, *block.parameters()), dy)


def _passes(forward, inputs: Sequence[Tensor], dy: Tensor) -> Passes:
    outputs, forward_bytes = moved(forward)
    grads = [dy] * len(outputs)
    _, backward_bytes = moved(lambda: torch.autograd.grad(outputs, inputs, grads))
    return {"forward": forward_bytes, "backward": backward_bytes}


def _tensor(*shape: int, device: str = "cpu") -> Tensor:
    return torch.empty(shape, dtype=DTYPE, device=device, requires_grad=True)


def per_token(small: Counter[str], large: Counter[str], tokens: Sequence[int]) -> dict[str, Any]:
    """Split counts at two numbers of tokens into bytes per token and bytes per step."""
    operators = {name: (large[name] - small[name]) // (tokens[1] - tokens[0]) for name in large}
    token_bytes = sum(operators.values())
    return {
        "token_bytes": token_bytes,
        "step_bytes": small.total() - token_bytes * tokens[0],
        "token_bytes_of": {name: nbytes for name, nbytes in operators.items() if nbytes},
    }


def counts_of(passes: Callable[[GPTConfig, int], Passes], config: GPTConfig) -> dict[str, Any]:
    """Return the bytes of a block per token and per step, by direction."""
    tokens = [sequences * config.context_tokens for sequences in SEQUENCES]
    small, large = (passes(config, sequences) for sequences in SEQUENCES)
    return {direction: per_token(small[direction], large[direction], tokens) for direction in small}


def block_row(preset: str) -> dict[str, Any]:
    """Count the bytes of one preset's block."""
    config = PRESETS[preset]
    return {
        "preset": preset,
        "d_model": config.d_model,
        "least": least(config, DTYPE.itemsize),
        "tritium": counts_of(tritium_passes, config),
        "one_pass": counts_of(one_pass_passes, config),
        "eager": counts_of(eager_passes, config),
    }


def option_row(options: dict[str, Any]) -> dict[str, Any]:
    """Count the bytes of gpt2's block with other options."""
    return counts_of(tritium_passes, replace(PRESETS["gpt2"], **options))


def figures() -> dict[str, Any]:
    """Return the figures of the record."""
    return {
        "dtype": str(DTYPE),
        "itemsize": DTYPE.itemsize,
        "sequences": SEQUENCES,
        "blocks": [block_row(preset) for preset in PRESET_NAMES],
        "options": {name: option_row(options) for name, options in OPTIONS.items()},
    }


def main(argv: Sequence[str]) -> int:
    """Run `tritium bench traffic`. Returns: exit status."""
    about = "Count the bytes that a block moves per token."
    options = parse(TrafficOptions, argv, prog="tritium bench traffic", description=about)
    out = check_writable(options.out)
    found = figures()
    print(traffic_table({**provenance(), **found}))
    if out:
        write_record(out, "traffic", found)
    return 0
