"""The processes that train one model together, and how they agree on errors and results.

    ranks       rank = (replica * shards + shard) * tensor ranks + tensor rank: a DeviceMesh of
                three dimensions
    data        ranks with the same data rank, rank // tensor ranks, read the same rows
    agreement   errors, small objects and signals go through gloo between CPUs, so no device waits
                for them; tensors of the training go through NCCL on CUDA

launch.py connects the processes. engines.py defines how they share the model.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ...errors import InputError, describe_os_error
from ..machine.device import choose_device
from .heartbeat import Heartbeat

Result = TypeVar("Result")


class World:
    """All processes of a run, as one of them sees them.

    Args:
        rank: number of this process, from 0.
        size: number of processes.
        local_rank: number of this process within its node.
        local_size: number of processes within its node.
        is_distributed: whether torchrun started the process, even if it started only one.
        engine: name in ENGINES (choices.py) of how the ranks share the model.
        shard_ranks: ranks that together hold one copy of the weights.
        tensor_ranks: ranks that together compute each layer.
        sharded_checkpoints: on, off or auto, as in options.Launch.
    Attributes:
        heartbeat: notices ranks that die or hang; None in a single process.
    """

    def __init__(
        self,
        *,
        rank: int = 0,
        size: int = 1,
        local_rank: int = 0,
        local_size: int = 1,
        is_distributed: bool = False,
        engine: str = "single",
        shard_ranks: int = 1,
        tensor_ranks: int = 1,
        sharded_checkpoints: str = "off",
    ):
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.local_size = local_size
        self.is_distributed = is_distributed
        self.engine = engine
        self.shard_ranks = shard_ranks
        self.tensor_ranks = tensor_ranks
        self.sharded_checkpoints = sharded_checkpoints
        self.is_rank0 = rank == 0
        self.data_rank = rank // tensor_ranks
        self.data_ranks = size // tensor_ranks
        self.heartbeat: Heartbeat | None = None
        self._pending_flag: tuple[dist.Work, Tensor] | None = None

    def device(self, name: str) -> torch.device:
        """Return the device of this rank. Under torchrun: the GPU whose number is the local rank.

        Args:
            name: the option `device`.
        Raises: InputError if there is no such device, or if `name` is a single GPU such as cuda:1.
        """
        if not self.is_distributed:
            return choose_device(name)
        if name not in ("auto", "cpu", "cuda"):
            raise InputError(
                "device: expected cpu or cuda under torchrun, which gives each rank its own, "
                f"got {name}"
            )
        device = choose_device(name)
        if device.type != "cuda":
            return device
        found = torch.cuda.device_count()
        if self.local_size > found:
            raise InputError(
                f"torchrun: expected at most as many ranks as the {found} GPUs here, "
                f"got {self.local_size}"
            )
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device

    def mesh(self, device_type: str) -> DeviceMesh:
        """Return all ranks as (replicas, shards, tensor)."""
        shape = (self.data_ranks // self.shard_ranks, self.shard_ranks, self.tensor_ranks)
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=("replicas", "shards", "tensor"))
        if self.tensor_ranks > 1:
            # PyTorch needs one flat dimension to sum the norm of a tensor divided along both.
            mesh["shards", "tensor"]._flatten()
        return mesh

    # --- progress, for the heartbeat

    def mark(self, step: int | None = None) -> None:
        """Note that this rank makes progress, and the number of complete steps.

        After the first step, a rank without marks counts as hung after some seconds.
        """
        if self.heartbeat is not None:
            self.heartbeat.mark(step)

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Allow this rank half an hour without marks, inside the context."""
        if self.heartbeat is None:
            yield
        else:
            with self.heartbeat.patient():
                yield

    # --- agreement: every rank must call these at the same places

    def run_on_all_ranks(self, work: Callable[[], Result]) -> Result:
        """Run `work` on every rank and return its result.

        Raises: InputError on all ranks if one of them raised InputError or OSError.
        """
        if self.size == 1:
            return work()
        result = None
        error = None
        errors = [None] * self.size
        with self.patient():
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
        """Run `work` on rank 0; all ranks return its result, a small object, or raise its error."""
        result = [self.run_on_all_ranks(lambda: work() if self.is_rank0 else None)]
        if self.size > 1:
            dist.broadcast_object_list(result, src=0)
        return result[0]

    def on_each_node(self, work: Callable[[], Result]) -> Result:
        """Run `work` on one rank of each node, then on the others, which find the files it made."""
        is_first = self.local_rank == 0
        result = self.run_on_all_ranks(lambda: work() if is_first else None)
        return self.run_on_all_ranks(lambda: result if is_first else work())

    def check_same_on_all_ranks(self, name: str, value: object) -> None:
        """Raise InputError unless `value` is the same on all ranks."""
        if self.size == 1:
            return
        values = [None] * self.size
        dist.all_gather_object(values, value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise InputError(
                    f"{name}: expected the same on all ranks, got {values[0]} on rank 0, "
                    f"{other} on rank {rank}; make the nodes alike"
                )

    def any_rank(self, flag: bool) -> bool:
        """Return whether `flag` was true on any rank in the previous call.

        The answer comes one call late, so that no rank waits for the slowest rank. A single
        process gets its own flag at once.
        """
        if self.size == 1:
            return flag
        self.mark()
        pending = self._pending_flag
        flags = torch.tensor(int(flag))
        self._pending_flag = (dist.all_reduce(flags, op=dist.ReduceOp.MAX, async_op=True), flags)
        if pending is None:
            return False
        work, answer = pending
        work.wait()
        return bool(answer)

    def mean(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its mean over ranks, and return it."""
        if self.size > 1:
            self.mark()
            dist.all_reduce(tensor)
            tensor /= self.size
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by the tensor of rank 0, and return it."""
        if self.size > 1:
            self.mark()
            dist.broadcast(tensor, src=0)
        return tensor

    def leave(self) -> None:
        """Close the connection. All ranks must call it."""
        if self._pending_flag is not None:
            self._pending_flag[0].wait()
        if self.heartbeat is not None:
            self.heartbeat.leave()
        # Free models now. A model that is freed later would release the last reference to the
        # connection and wait for its threads, which themselves wait for Python.
        gc.collect()
        dist.destroy_process_group()


SINGLE_PROCESS = World()
