"""A training step: gradients of a batch summed over micro-batches, then the optimizer.

    batch on the CPU -> micro-batches on the device -> loss and backward of the working model
        -> float32 gradients of the masters, averaged over ranks -> optimizer -> working model

Nothing in a step waits for the device. The host reads the number of targets and the starts of
documents from the batch on the CPU; losses and gradient norms stay on the device. Each rank has its
part of the batch. Ranks exchange gradients during the backward of the last micro-batch only.
"""

import contextlib
import gc

import numpy as np
import torch
from torch import Tensor, nn

from .config import TrainConfig
from .data.loader import Batch
from .distributed.engines import SingleProcess
from .evaluate import batch_loss
from .execution import resolve
from .machine.cuda_graph import Recorded
from .optim import Optimizer


@contextlib.contextmanager
def quiet_collector():
    """Disable Python's garbage collector inside the context, so that it does not interrupt steps.

    Existing objects are never examined again. New garbage stays until the caller runs gc.collect().
    Tensors are freed at once, because a step makes no reference cycles that hold tensors.
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
    """Computes gradients and updates a model, one batch per step.

    Args:
        engine: the model, and how ranks share it.
        optimizer: the optimizer of the engine's model.
        seed: seed of dropout.
    Attributes:
        model, working: the engine's float32 masters, and the model that computes.
    """

    def __init__(
        self,
        engine: SingleProcess,
        optimizer: Optimizer,
        *,
        seed: int = 0,
    ):
        self.engine = engine
        self.optimizer = optimizer
        self.seed = seed
        self.model = engine.model
        self.working = engine.working
        self._loss: Tensor | None = None
        # None without graphs: the object is part of a reference cycle, so the tensors would stay
        # until the collector runs.
        self._recorded: _RecordedMicroSteps | None = None
        if engine.execution.cuda_graph:
            self._recorded = _RecordedMicroSteps(engine, optimizer)

    def backward(self, batch: Batch, num_targets: int | None = None, *, step: int = 0) -> Tensor:
        """Compute the gradients of the mean loss over all targets of a batch.

        Args:
            batch: this rank's rows.
            num_targets: targets in the batches of all ranks. Default: in this batch.
            step: number of the step. Dropout differs between steps.
        Returns: the loss over all ranks, () float32 on the device.
        """
        execution = self.engine.execution
        num_targets = batch.num_targets.sum() if num_targets is None else num_targets
        total = torch.zeros((), device=execution.device)
        self.engine.begin_step()
        for start in range(0, len(batch), execution.micro_batch):
            part = batch[start : start + execution.micro_batch]
            # The model returns the mean over the targets of this part. Weighted by the part's
            # fraction of all targets, the parts sum to the mean over the batch. Engines average
            # gradients over ranks. Multiplied by data_ranks, the average becomes a sum.
            loss_weight = float(part.num_targets.sum() / num_targets) * execution.world.data_ranks
            self.engine.begin_micro_step(is_last=start + execution.micro_batch >= len(batch))
            seed = self._dropout_seed(step, execution.world.data_rank * len(batch) + start)
            total += self._micro_step(part, loss_weight, seed, is_first=start == 0)
        self.engine.finish_gradients()
        self._loss = execution.world.mean(total)
        return self._loss

    def _micro_step(
        self, part: Batch, loss_weight: float, seed: int | None, *, is_first: bool
    ) -> Tensor:
        """Run forward and backward of a micro-batch. Returns: its weighted loss."""
        execution = self.engine.execution
        is_recorded = self._recorded is not None and self.engine.can_record
        if is_recorded and len(part) == execution.micro_batch:
            inputs = part.model_inputs(execution.device, seed)
            return self._recorded(is_first, loss_weight=loss_weight, **inputs)
        loss = batch_loss(self.engine.network, part, seed) * loss_weight
        self.optimizer.scaler.scale(loss).backward()
        return loss.detach()

    @property
    def kept_gradients(self) -> list[Tensor]:
        """Gradients that stay allocated between steps: those of a CUDA graph."""
        return [] if self._recorded is None else self._recorded.gradients

    def _dropout_seed(self, step: int, row: int) -> int | None:
        """Return the seed of dropout for the micro-batch that begins at a row of the step's batch.

        It is a function of the arguments and the run's seed, so a resumed run drops the same.
        None: the model drops nothing.
        """
        if not getattr(self.model, "has_dropout", False):  # the bench trains models of others
            return None
        state = np.random.SeedSequence((self.seed, step, row)).generate_state(1, np.uint64)
        return int(state[0]) >> 2  # less than 2^62

    def update(self, lr: float) -> Tensor:
        """Take an optimizer step. Returns: the gradient norm, as Optimizer.update does."""
        grad_norm = self.optimizer.update(lr, self._loss)
        self.engine.refresh_working(trained_only=True)
        return grad_norm

    def is_finite(self) -> bool:
        """Return whether all weights and the optimizer state are finite. All ranks must call it."""
        states = self.optimizer.states().values()
        tensors = [value for state in states for value in state.values()]
        tensors += [parameter.detach() for parameter in self.model.parameters()]
        local = [each.to_local() if hasattr(each, "to_local") else each for each in tensors]
        # FSDP gives some ranks no rows of a parameter that has fewer rows than there are ranks.
        local = [each for each in local if each.numel()]
        largest = torch.stack(torch._foreach_norm(local, torch.inf)).max()
        num_bad = largest.isfinite().logical_not().float()
        return self.engine.world.mean(num_bad).item() == 0


class _RecordedMicroSteps:
    """Forward and backward of a micro-batch as two CUDA graphs.

    The graph of the first micro-batch of a step leaves new gradients, always in the same memory.
    The graph of all others adds to them.
    """

    def __init__(self, engine: SingleProcess, optimizer: Optimizer):
        self._engine = engine
        self._optimizer = optimizer
        device = engine.execution.device
        self.first = Recorded(self._micro_step, device)
        self.later = Recorded(self._micro_step, device, after=self.first)
        self._parameters = [each for each in engine.model.parameters() if each.requires_grad]
        # Their gradients in the memory of the first graph.
        self.gradients: list[Tensor] = []

    def __call__(self, is_first: bool, **inputs: Tensor | float) -> Tensor:
        """Run a micro-batch. Returns: its weighted loss, which the next call overwrites."""
        if not is_first:
            return self.later(**inputs)
        loss = self.first(**inputs)
        if self.first.is_recorded:
            if not self.gradients:
                self.gradients = [each.grad for each in self._parameters]
            for parameter, gradient in zip(self._parameters, self.gradients, strict=True):
                parameter.grad = gradient
        return loss

    def _micro_step(self, loss_weight: Tensor, **inputs: Tensor) -> Tensor:
        loss = self._engine.network(**inputs) * loss_weight
        self._optimizer.scaler.scale(loss).backward()
        return loss.detach()


def single_trainer(model: nn.Module, config: TrainConfig) -> Trainer:
    """Return a trainer of `model` in this process, on the device that the model is on."""
    device = next(model.parameters()).device
    engine = SingleProcess(model, resolve(config.with_options(device=str(device))))
    return Trainer(engine, Optimizer(engine, config), seed=config.seed)
