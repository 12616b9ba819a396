"""Record the work of a training step: operators, kernels, their bytes and FLOPs, without a GPU.

The trainer's own step runs on tensors without data, as on a GPU of sm_90 with matmuls in bfloat16.
So the list of operators is that of the real step. It is a step of one GPU without torch.compile.

    bytes    traffic.py: every operator and kernel reads or writes each of its tensors once; a
             kernel that overwrites a tensor reads and writes it
    FLOPs    2 M N K of each matmul. Attention: 2 to 5 matmuls over the pairs of query and key that
             the mask shows. All other FLOPs count as 0
"""

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch

from ...kernels.attention.causal import cost as attention_cost
from ...model import GPT, GPTConfig
from ...train.config import TrainConfig
from ...train.data.loader import Batch
from ...train.distributed.engines import SingleProcess
from ...train.distributed.world import SINGLE_PROCESS
from ...train.execution import Execution
from ...train.optim import Optimizer
from ...train.run.profile import OTHER, part_of_name
from ...train.trainer import Trainer
from ..codegen.launches import Launch, RunLaunchers, record_launches
from .traffic import Moved, moved_by_launch, stored_bytes

DTYPE = torch.bfloat16
# Matmuls per attention kernel. In two passes both kernels compute the scores and dp.
ATTENTION_MATMULS = {
    "_causal_attention_fwd_kernel": 2,
    "_causal_attention_bwd_dq_kernel": 3,
    "_causal_attention_bwd_dkdv_kernel": 4,
    "_causal_attention_bwd_one_pass_kernel": 5,
}
# Kernels that overwrite an argument after reading it.
_IN_PLACE = {"_cross_entropy_fwd_bwd_kernel": "logits_ptr"}
# ATen matmuls, and the place of their first operand.
_MATMULS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1}


@dataclass(frozen=True, kw_only=True)
class Work:
    """One call of an ATen operator, or one launch of a Triton kernel."""

    operators: tuple[str, ...]
    """The operator that a profile names, after the operator that called it, if any."""
    kernel: str
    """Name of the kernel, or of the ATen operator."""
    nbytes: int
    flops: int = 0
    sizes: tuple[int, ...] = ()
    """M, N, K of a matmul."""
    launch: Launch | None = None
    is_pointwise: bool = False
    """Whether torch.compile could fuse it with its neighbours."""

    @property
    def part(self) -> str:
        """The part of a step to which a profile would assign it."""
        parts = (part_of_name(name) for name in (*self.operators, self.kernel))
        return next((part for part in parts if part), OTHER)


class Traced(Moved):
    """Record the ATen operators that run, and the launches that `Launchers` reports."""

    def __init__(self):
        super().__init__()
        self.work: list[Work] = []
        self.operators: tuple[str, ...] = ()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = len(self.work)
        before = self.nbytes.total()
        output = super().__torch_dispatch__(function, types, args, kwargs)
        nbytes = self.nbytes.total() - before
        # A composite operator has recorded its parts already. A view moves nothing.
        if nbytes and len(self.work) == known:
            name = function._opname
            sizes = _matmul_sizes(name, args)
            self.work.append(
                Work(
                    operators=(*self.operators, f"aten::{name}"),
                    kernel=name,
                    nbytes=nbytes - _unwritten(name, args, kwargs or {}),
                    flops=2 * math.prod(sizes) if sizes else 0,
                    sizes=sizes[-3:],
                    is_pointwise=not self.operators and _is_pointwise(function),
                )
            )
        return output

    def add_launch(self, launch: Launch) -> None:
        """Record a launch inside the current operator."""
        arguments = launch.arguments
        name = launch.kernel.__name__
        sizes = tuple(arguments[size] for size in "MNK") if name == "_gemm_kernel" else ()
        flops = 2 * math.prod(sizes) if sizes else _attention_flops(name, arguments)
        overwritten = arguments.get(_IN_PLACE.get(name))
        read = 0 if overwritten is None else stored_bytes(overwritten)
        self.work.append(
            Work(
                operators=self.operators,
                kernel=name,
                nbytes=moved_by_launch(launch) + read,
                flops=flops,
                sizes=sizes,
                launch=launch,
            )
        )


class Launchers(RunLaunchers):
    """Run tritium's launchers, and report each operator and its launches to a `Traced`."""

    def __init__(self, traced: Traced, launches: list[Launch]):
        super().__init__()
        self._traced = traced
        self._launches = launches

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace != "tritium":
            return super().__torch_dispatch__(function, types, args, kwargs)
        outer = self._traced.operators
        self._traced.operators = (*outer, f"tritium::{function._opname}")
        known = len(self._launches)
        output = super().__torch_dispatch__(function, types, args, kwargs)
        for launch in self._launches[known:]:
            self._traced.add_launch(launch)
        self._traced.operators = outer
        return output


def trace(call: Callable[[], Any]) -> list[Work]:
    """Run `call` as on a GPU of sm_90, with kernels recorded instead of run. Return its work."""
    # Launchers is entered last: Traced then sees the operators inside the launchers.
    with record_launches("sm_90") as launches, Traced() as traced, Launchers(traced, launches):
        call()
    return traced.work


def step_work(
    model: GPTConfig, config: TrainConfig, micro_batch: int, micro_batches: int
) -> list[tuple[Work, int]]:
    """Return the work of a training step, and how often each piece is done.

    Args:
        model: shape of the model.
        config: options of the run: optimizer, clipping, activation checkpointing.
        micro_batch: sequences per forward and backward.
        micro_batches: forwards and backwards per step.
    """
    trainer = _meta_trainer(model, config, micro_batch)

    def backward(count: int) -> list[Work]:
        """Return the work of the forwards and backwards of `count` micro-batches."""
        rows = count * micro_batch
        windows = torch.zeros(rows, model.context_tokens + 1, dtype=torch.int64)
        # The loader sorts the tokens on the host.
        orders = torch.empty((rows, model.context_tokens), dtype=torch.int32, device="meta")
        batch = Batch(windows, np.full(rows, model.context_tokens), orders, micro_batch)
        return trace(lambda: trainer.backward(batch))

    with _as_on_cuda():
        first = backward(1)
        trainer.update(0.0)  # allocates the optimizer's state
        # The first micro-batch sets gradients, all later ones add to them. The update needs the
        # gradients of a whole step.
        both = backward(2) if micro_batches > 1 else backward(1)
        update = trace(lambda: trainer.update(0.0))
    later = both[len(first) :]
    return [
        *((work, 1) for work in first),
        *((work, micro_batches - 1) for work in later),
        *((work, 1) for work in update),
    ]


def _meta_trainer(model: GPTConfig, config: TrainConfig, micro_batch: int) -> Trainer:
    """Return a trainer whose weights have no data."""
    execution = Execution(
        world=SINGLE_PROCESS,
        device=torch.device("meta"),
        dtype=DTYPE,
        is_compiled=False,
        micro_batch=micro_batch,
    )
    with torch.device("meta"):
        network = GPT(model, recompute=config.execution.recompute)
    engine = SingleProcess(network, execution)
    return Trainer(engine, Optimizer(engine, config))


@contextmanager
def _as_on_cuda() -> Iterator[None]:
    """Make the optimizer and clipping choose the implementations of CUDA for tensors on meta."""
    # torch.optim hides its submodules, so that they are not its attributes.
    optimizer = importlib.import_module("torch.optim.optimizer")
    foreach = importlib.import_module("torch.utils._foreach_utils")
    fused = "_get_fused_kernels_supported_devices"
    several = "_get_foreach_kernels_supported_devices"
    with (
        mock.patch.object(optimizer, fused, return_value=["meta"]),
        mock.patch.object(foreach, several, return_value=["meta"]),
    ):
        yield


def _matmul_sizes(name: str, args: tuple) -> tuple[int, ...]:
    """Return (M, N, K) of a matmul, after its batch axes if it has any; else ()."""
    place = _MATMULS.get(name.rstrip("_"))
    if place is None:
        return ()
    a, b = args[place : place + 2]
    return (*a.shape[:-1], b.shape[-1], a.shape[-1])


def _attention_flops(kernel: str, arguments: dict[str, Any]) -> int:
    """Return the FLOPs of an attention kernel; 0 for other kernels."""
    matmuls = ATTENTION_MATMULS.get(kernel)
    if matmuls is None:
        return 0
    # Programs of dk and dv own a key head, those of other kernels a query head.
    owns_keys = kernel.endswith("dkdv_kernel")
    heads = arguments["heads"] * (arguments["group"] if owns_keys else 1)
    T, K = arguments["T"], arguments["HEAD"]
    # The backward in one pass has as many keys as queries, and no window.
    S, window = arguments.get("S", T), arguments.get("window")
    two = attention_cost(heads, T, S, 1, 1, K, 2, window=window)["fwd_flops"]
    return two // 2 * matmuls


def _unwritten(name: str, args: tuple, kwargs: dict[str, Any]) -> int:
    """Return bytes that a schema marks as written, although the kernel does not write them."""
    if name == "_fused_adamw_" and kwargs.get("grad_scale") is None:
        return sum(gradient.nbytes for gradient in args[1])
    return 0


def _is_pointwise(function) -> bool:
    is_copy = function._opname in ("_to_copy", "copy_", "clone")
    return is_copy or torch.Tag.pointwise in function.tags
