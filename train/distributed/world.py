"""The processes that train one model together, as torchrun starts them; one alone is a world with nothing to agree on.

    ranks       rank = (replica · shards + shard) · tensor ranks + tensor rank: a DeviceMesh of these three dimensions
    data        by data rank = rank // tensor ranks: ranks that share layers are neighbours and read the same rows
    agreement   errors, small objects and signals travel between CPUs through gloo, so that no device waits for them;
                tensors of the training through NCCL on CUDA

What the ranks share of a model is in train/sharding.py.
"""

import contextlib
import datetime
import functools
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ...errors import InputError, describe_os_error
from ..config import TrainConfig
from ..device import choose_device

Result = TypeVar("Result")
# All that torchrun tells a process. Clusters set MASTER_ADDR and MASTER_PORT for other programs too.
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_STORE = ("MASTER_ADDR", "MASTER_PORT")
# One rank may build a dataset while others wait. Ranks that died are found sooner, by torchrun.
_PATIENCE = datetime.timedelta(minutes=30)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Options of `tritium train` that belong to the launch and not to the run: a run may be resumed with others."""

    parallel: Literal["auto", "ddp", "zero1", "fsdp"] = "auto"
    """What ranks divide: the batch; with zero1 optimizer state too; with fsdp weights too. auto: ddp or what others need."""
    shard_ranks: int | None = None
    """With fsdp, ranks that hold a copy of the weights together, such as a node's. Default: all."""
    tensor_parallel: int = 1
    """With fsdp, neighbouring ranks that compute each layer together."""


class World:
    """This process among those that train together.

    Args:
        rank, size: of this process, and how many there are.
        local_rank, local_size: the same within the node.
        engine: ddp, zero1 or fsdp; None: a process alone.
        shard_ranks, tensor_ranks: as in Launch, settled.
    """

    def __init__(
        self, *, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1, engine: str | None = None,
        shard_ranks: int = 1, tensor_ranks: int = 1,
    ):  # fmt: skip
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self.engine, self.shard_ranks, self.tensor_ranks = engine, shard_ranks, tensor_ranks
        self.is_rank0 = rank == 0
        self.data_ranks, self.data_rank = size // tensor_ranks, rank // tensor_ranks
        self._asked: tuple[dist.Work, Tensor] | None = None

    def device(self, name: str) -> torch.device:
        """The device that --device means for this rank: under torchrun the node's GPU of its number.

        Raises: InputError if there is none, or if the option names one for all ranks.
        """
        if self.engine is None:
            return choose_device(name)
        if name not in ("auto", "cpu", "cuda"):
            raise InputError(
                f"device: expected cpu or cuda under torchrun, which gives each rank its own, got {name}"
            )
        device = choose_device(name)
        if device.type == "cuda":
            if self.local_size > (found := torch.cuda.device_count()):
                raise InputError(
                    f"torchrun: expected at most as many ranks as the {found} GPUs here, got {self.local_size}"
                )
            device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(device)
        return device

    @functools.cache  # noqa: B019 - lives as long as the process
    def mesh(self, device_type: str) -> DeviceMesh:
        """All ranks as (replicas, shards, tensor)."""
        shape = (self.data_ranks // self.shard_ranks, self.shard_ranks, self.tensor_ranks)
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=("replicas", "shards", "tensor"))
        if self.tensor_ranks > 1:
            mesh[
                "shards", "tensor"
            ]._flatten()  # PyTorch asks for it: norms of what both divide are then one sum
        return mesh

    def micro_batch(self, config: TrainConfig) -> int:
        """Sequences at once on each rank. Raises: InputError if the batch does not divide by ranks and these."""
        each, left = divmod(config.batch_size, self.data_ranks)
        micro = config.execution.micro_batch_size or each
        if left or each == 0 or each % micro:
            by = f"{self.data_ranks} ranks" + (
                f" times micro-batches of {micro}" if config.execution.micro_batch_size else ""
            )
            raise InputError(f"batch_size: expected a multiple of {by}, got {config.batch_size}")
        return micro

    def run_on_all_ranks(self, work: Callable[[], Result]) -> Result:
        """Run `work` on every rank; what a user or the system did wrong on one is an InputError on all."""
        if self.size == 1:
            return work()
        result, error, errors = None, None, [None] * self.size
        try:
            result = work()
        except InputError as caught:
            error = str(caught)
        except OSError as caught:
            error = describe_os_error(caught)
        dist.all_gather_object(errors, error)
        if any(errors):
            raise InputError(next(filter(None, errors)))
        return result

    def on_rank0(self, work: Callable[[], Result]) -> Result:
        """Run `work` on the first rank; its result, small, or its error reaches all."""
        result = [self.run_on_all_ranks(lambda: work() if self.is_rank0 else None)]
        if self.size > 1:
            dist.broadcast_object_list(result, src=0)
        return result[0]

    def check_same_on_all_ranks(self, what: str, found: object) -> None:
        """Raise InputError unless all ranks found the same."""
        if self.size > 1:
            others = [None] * self.size
            dist.all_gather_object(others, found)
            if differing := [rank for rank, other in enumerate(others) if other != others[0]]:
                raise InputError(
                    f"{what}: expected the same on all ranks, got {others[0]} on rank 0, {others[differing[0]]} on rank "
                    f"{differing[0]}; make the nodes alike"
                )

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` was true on any rank the last time all of them asked; alone, whether it is.

        An answer is fetched one call late, so that no rank waits for the slowest: its host goes on and its device has work.
        """
        if self.size == 1:
            return flag
        asked, answer = self._asked, False
        flags = torch.tensor(int(flag))
        self._asked = (dist.all_reduce(flags, op=dist.ReduceOp.MAX, async_op=True), flags)
        if asked is not None:
            asked[0].wait()
            answer = bool(asked[1])
        return answer

    def leave(self) -> None:
        """Part from the others, when all do."""
        if self._asked is not None:
            self._asked[0].wait()
        # Else a model's engine may be what lets go of the connection last, and wait for its threads while they wait for Python.
        gc.collect()
        dist.destroy_process_group()

    def mean(self, value: Tensor) -> Tensor:
        """Mean over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value


SINGLE_PROCESS = World()


class Signals:
    """Turns the first SIGINT or SIGTERM on any rank into a note, read between steps and between batches of an evaluation.

    A second SIGINT interrupts at once, but not under torchrun, which passes on the terminal's.
    """

    def __init__(self, world: World):
        self._world, self._noted, self._agreed = world, False, False

    @property
    def received(self) -> bool:
        """Whether a rank has noted one; asked on all ranks at the same places."""
        self._agreed = self._agreed or self._world.any_rank(self._noted)
        return self._agreed

    def __enter__(self) -> "Signals":
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        if self._noted and number == signal.SIGINT and self._world.size == 1:
            raise KeyboardInterrupt
        self._noted = True
        if is_local_rank0():
            print("stopping; a checkpoint will be written", file=sys.stderr)


@contextlib.contextmanager
def join(launch: Launch) -> Iterator[World]:
    """The world that torchrun's variables describe, connected while the context lasts.

    Raises: InputError for variables or options that do not fit together.
    """
    ranks = _ranks()
    if ranks is None:
        if launch != Launch():
            raise InputError(
                "--parallel, --shard-ranks, --tensor-parallel: expected torchrun to start the program; see --help"
            )
        yield SINGLE_PROCESS
        return
    world = World(**ranks, **_settled(launch, ranks["size"]))
    backend = (
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    )
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield world
    except (
        InputError
    ) as error:  # the same on all ranks; after any other error the rest may be waiting for this one
        traceback.clear_frames(error.__traceback__)
        world.leave()
        raise
    world.leave()


def is_local_rank0() -> bool:
    """Whether this process says what all of its node have to say: it does where torchrun started none."""
    return "RANK" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"


def _ranks() -> dict[str, int] | None:
    """World's first four arguments; None without torchrun."""
    if not any(name in os.environ for name in _RANKS):
        return None
    if missing := [name for name in (*_RANKS, *_STORE) if name not in os.environ]:
        raise InputError(
            f"torchrun: expected {', '.join((*_RANKS, *_STORE))} together, {missing[0]} is not set; start with torchrun, or "
            f"unset {next(name for name in _RANKS if name in os.environ)}"
        )
    try:
        rank, size, local_rank, local_size, port = (
            int(os.environ[name]) for name in (*_RANKS, "MASTER_PORT")
        )
        if not (0 <= rank < size and 0 <= local_rank < local_size <= size and 0 < port < 1 << 16):
            raise ValueError
    except ValueError:
        found = ", ".join(f"{name}={os.environ[name]}" for name in (*_RANKS, "MASTER_PORT"))
        message = f"torchrun: expected ranks from 0 below their number and a port, got {found}; start with torchrun"
        raise InputError(message) from None
    return {"rank": rank, "size": size, "local_rank": local_rank, "local_size": local_size}


def _settled(launch: Launch, size: int) -> dict[str, str | int]:
    """World's last three arguments. Raises: InputError if the options do not fit together or the number of ranks."""
    tensor_ranks, shards = launch.tensor_parallel, launch.shard_ranks
    engine = launch.parallel
    if engine == "auto":
        engine = "ddp" if shards is None and tensor_ranks == 1 else "fsdp"
    if engine != "fsdp" and (shards is not None or tensor_ranks != 1):
        name = "--shard-ranks" if shards is not None else "--tensor-parallel"
        raise InputError(
            f"{name}: expected --parallel fsdp with it, got {engine}; leave one of them out"
        )
    if tensor_ranks < 1 or size % tensor_ranks:
        raise InputError(
            f"--tensor-parallel: expected a divisor of the {size} ranks, got {tensor_ranks}"
        )
    data_ranks = size // tensor_ranks
    shards = data_ranks if shards is None else shards
    if shards < 1 or data_ranks % shards:
        raise InputError(
            f"--shard-ranks: expected a divisor of the {data_ranks} ranks that divide the batch, got {shards}"
        )
    return {"engine": engine, "shard_ranks": shards, "tensor_ranks": tensor_ranks}
