"""A training step: gradients of a batch summed over micro-batches, then the optimizer. Shared by the loop and the bench.

    batch on the CPU -> micro-batches on the device -> working copy's loss, backward -> float32 gradients of the model -> update
                                                        of the masters -> working copy cast anew

Nothing between the first and the last of these waits for the device: what the host must know of a batch (how many targets
count, where documents begin) it reads off the batch on the CPU, and loss and norm of the gradients are left on the device. Of
several ranks each has a part of the batch; their engine (train/sharding.py) sums the gradients during the last micro-batch's
backward.
"""

import contextlib
import gc
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..kernels.core.triton import HAS_TRITON
from ..model import GPT
from .config import TrainConfig
from .data.loader import Batch
from .distributed.engines import gather_weights, micro_step, replicate
from .distributed.world import SINGLE_PROCESS, World
from .evaluate import Evaluation, batch_loss, evaluate
from .optim import Optimizer
from .precision import choose_dtype, narrowed, refresh, working_copy


def is_compiled_on(device: torch.device) -> bool:
    """Whether --compile auto compiles: on CUDA, whose code Triton makes."""
    return device.type == "cuda" and HAS_TRITON


def is_compiled(config: TrainConfig, device: torch.device) -> bool:
    """Whether a run compiles."""
    return (
        is_compiled_on(device)
        if config.execution.compile == "auto"
        else config.execution.compile == "on"
    )


@contextlib.contextmanager
def quiet_collector():
    """Keep Python's garbage collector out of the steps inside: what is there already is never looked at again, and new garbage
    waits for a gc.collect() of the caller. Tensors do not: a step makes no cycles that hold any.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


class Trainer:
    """A model in training.

    Args:
        model: float32 weights on their device, as a checkpoint has them; sharded if they are to be.
        optimizer: of this model.
        config: precision, micro-batch, whether to compile.
        separator: the token that begins a document where documents do not see one another; None: rows are documents.
        world: ranks that train it together.
    Attributes:
        model, optimizer, separator, world: as given.
        dtype: of products.
        working: what computes, the model itself or its copy in the run's precision; for evaluations and samples too.
            These run it uncompiled, as their sizes vary: forward and loss of a micro-batch are the one graph ever compiled.
        is_compiled: whether that is done, in the first step.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, config: TrainConfig, *, separator: int | None = None,
        world: World = SINGLE_PROCESS,
    ):  # fmt: skip
        self.model, self.optimizer, self.separator, self.world = model, optimizer, separator, world
        self._micro_batch = world.micro_batch(config)
        device = model.wte.weight.device
        self.dtype = choose_dtype(config.execution.precision, device)
        if world.engine is None:
            self.working = working_copy(model, self.dtype)
        else:
            self.working = (
                model
                if world.engine == "fsdp" or self.dtype == torch.float32
                else narrowed(model, self.dtype)
            )
        self.is_compiled = is_compiled(config, device)
        is_one_graph = (
            self.is_compiled and world.engine != "fsdp"
        )  # of which `shard` compiles the parts
        self._network = replicate(
            torch.compile(self.working, fullgraph=True) if is_one_graph else self.working, world
        )

    def backward(self, batch: Batch, num_targets: int | None = None) -> Tensor:
        """Add to the gradients of `model` those of the mean loss over all counted targets of a batch.

        Args:
            num_targets: targets that count in the batch of all ranks; default: in this one.
        Returns: that loss, of all ranks, () float32 on the device.
        """
        num_targets = batch.num_targets.sum() if num_targets is None else num_targets
        total = torch.zeros((), device=self.model.wte.weight.device)
        for start in range(0, len(batch), self._micro_batch):
            part = batch[start : start + self._micro_batch]
            # The model's loss is the mean over its own targets: weighed by their share, the sum is the batch's mean.
            # Engines take the mean of the ranks' gradients, where their sum is meant.
            share = float(part.num_targets.sum() / num_targets) * self.world.data_ranks
            with micro_step(
                self._network, self.world, is_last=start + self._micro_batch >= len(batch)
            ):
                loss = batch_loss(self._network, part, self.separator) * share
                self.optimizer.scaler.scale(loss).backward()
            total += loss.detach()
        return self.world.mean(total)

    def update(self, lr: float) -> Tensor:
        """Take an optimizer step with the gradients; returns their norm as Optimizer.update does."""
        grad_norm = self.optimizer.update(lr)
        if self.world.engine is None:
            refresh(self.working, self.model)
        return grad_norm

    def evaluate(self, batches: Iterable[Batch], *, bytes_per_token: float) -> Evaluation | None:
        """As evaluate of a model that is read as this one is."""
        return evaluate(
            self.working,
            batches,
            bytes_per_token=bytes_per_token,
            separator=self.separator,
            world=self.world,
        )

    def on_first_rank(self) -> GPT | None:
        """What samples on the first rank alone; None on the others, whose help it needs. Until the next update."""
        if self.world.engine is None:
            return self.working
        weights = gather_weights(self.model, self.world)
        if not self.world.is_rank0:
            return None
        with torch.device("meta"):  # nothing is drawn
            model = GPT(self.model.config)
        model.load_state_dict(weights, assign=True)
        return working_copy(model.to(next(self.model.parameters()).device), self.dtype)
