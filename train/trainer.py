"""A training step: gradients of a batch summed over micro-batches, then the optimizer. Shared by the loop and the bench.

    batch on the CPU -> micro-batches on the device -> working copy's loss, backward -> float32 gradients of the model -> update
                                                        of the masters -> working copy cast anew

Nothing between the first and the last of these waits for the device: what the host must know of a batch (how many targets
count, where documents begin) it reads off CPU tensors, and loss and norm of the gradients are left on the device. Several
devices have to sum the gradients of `model` between `backward` and `update`, and nothing else.
"""

import contextlib
import gc

import torch
from torch import Tensor, nn

from ..kernels._triton import HAS_TRITON
from .config import TrainConfig
from .evaluate import batch_loss
from .loader import IGNORED
from .optim import Optimizer
from .precision import choose_dtype, refresh, working_copy


def is_compiled_on(device: torch.device) -> bool:
    """Whether --compile auto compiles: on CUDA, whose code Triton makes."""
    return device.type == "cuda" and HAS_TRITON


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
        model: float32 weights on their device, as a checkpoint has them.
        optimizer: of this model.
        config: precision, micro-batch, whether to compile.
        separator: the token that begins a document where documents do not see one another; None: rows are documents.
    Attributes:
        model, optimizer, separator: as given.
        working: what computes, the model itself or its copy in the run's precision; for evaluations and samples too.
            These run it uncompiled, as their sizes vary: forward and loss of a micro-batch are the one graph ever compiled.
        is_compiled: whether that is done, in the first step.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, config: TrainConfig, *, separator: int | None = None):
        self.model, self.optimizer, self.separator, self._micro_batch = model, optimizer, separator, config.micro_batch
        device = model.wte.weight.device
        self.working = working_copy(model, choose_dtype(config.precision, device))
        self.is_compiled = is_compiled_on(device) if config.compile == "auto" else config.compile == "on"
        self._network = torch.compile(self.working, fullgraph=True) if self.is_compiled else self.working

    def backward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Add to the gradients of `model` those of the mean loss over all counted targets of a batch.

        Args:
            tokens, targets: (B, T) int64 on the CPU, as a Loader gives them.
        Returns: that loss, () float32 on the device.
        """
        # In numpy: no tensor of the device can slip in and be waited for.
        counted = (targets.numpy() != IGNORED).sum(axis=1)
        total = torch.zeros((), device=self.model.wte.weight.device)
        for start in range(0, len(tokens), self._micro_batch):
            rows = slice(start, start + self._micro_batch)
            # The model's loss is the mean over its own targets: weighed by their share, the sum is the batch's mean.
            share = float(counted[rows].sum() / counted.sum())
            loss = batch_loss(self._network, tokens[rows], targets[rows], self.separator) * share
            self.optimizer.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def update(self, lr: float) -> Tensor:
        """Take an optimizer step with the gradients; returns their norm as Optimizer.update does."""
        grad_norm = self.optimizer.update(lr)
        refresh(self.working, self.model)
        return grad_norm
