"""Compute the loss of a batch, and evaluate: nats per token, perplexity and bits per byte."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import DivergedError
from ..model import GPT
from .config import DIVERGED
from .data.loader import Batch, copy_to_device, document_starts
from .distributed.world import SINGLE_PROCESS, World

# exp() of a larger number is infinite in float64.
_MAX_EXPONENT = 709


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The mean loss over some text."""

    loss: float
    """Nats per token."""
    bits_per_byte: float
    """Bits per byte of UTF-8 text: comparable across tokenizers."""
    tokens: int
    """Number of targets."""

    @property
    def perplexity(self) -> float:
        """exp(loss), or infinity."""
        return math.exp(self.loss) if self.loss < _MAX_EXPONENT else math.inf


def batch_loss(
    model: nn.Module, batch: Batch, separator: int | None, dropout_seed: int | None = None
) -> Tensor:
    """Return the mean cross-entropy over the targets of a batch.

    Args:
        model: a GPT, compiled or not.
        separator: token that begins a document. Documents do not attend to each other. None: each
            row is one document.
        dropout_seed: as for GPT.
    Returns: () float32 on the model's device, nats per token; 0 without targets.
    """
    device = next(model.parameters()).device
    return model(**model_inputs(batch, device, separator, dropout_seed))


def model_inputs(
    batch: Batch, device: torch.device, separator: int | None, dropout_seed: int | None
) -> dict[str, Tensor]:
    """Return the arguments of GPT.forward for a batch, on `device`; arguments: see batch_loss."""
    tokens, targets = batch.on(device)
    inputs = {"tokens": tokens, "targets": targets}
    if batch.token_order is not None:
        inputs["token_order"] = copy_to_device(batch.token_order, device)
    if dropout_seed is not None:
        inputs["dropout_seed"] = torch.full((), dropout_seed, dtype=torch.int64, device=device)
    if separator is not None:
        cu_seqlens = copy_to_device(document_starts(batch.inputs, separator), device)
        # Its length differs between batches: compile once for any length.
        torch._dynamo.mark_dynamic(cu_seqlens, 0)
        inputs["cu_seqlens"] = cu_seqlens
    return inputs


@torch.no_grad()
def evaluate(
    model: GPT,
    batches: Iterable[Batch],
    *,
    bytes_per_token: float,
    separator: int | None = None,
    world: World = SINGLE_PROCESS,
) -> Evaluation | None:
    """Return the mean cross-entropy over all targets of all batches, on all ranks.

    Nothing is dropped.

    Args:
        batches: the batches of this rank. All ranks have the same number of batches.
        bytes_per_token: mean length of a token in the text.
        separator: as in batch_loss.
        world: ranks that evaluate together.
    Returns: the evaluation; None without targets.
    Raises: DivergedError if the loss is not finite.
    """
    losses = []
    counts = []
    was_training = model.training
    model.eval()
    for batch in batches:
        losses.append(batch_loss(model, batch, separator))
        counts.append(int(batch.num_targets.sum()))
    model.train(was_training)
    # Read all losses at the end, so that nothing waits for the device between batches.
    means = torch.stack(losses).tolist() if losses else []
    total = sum(mean * count for mean, count in zip(means, counts, strict=True))
    sums = torch.tensor([total, sum(counts)], dtype=torch.float64)
    total, count = world.mean(sums).tolist()
    if not count:
        return None
    loss = total / count
    if not math.isfinite(loss):
        raise DivergedError(f"{DIVERGED} (validation loss is {loss})")
    return Evaluation(
        loss=loss,
        bits_per_byte=loss / math.log(2) / bytes_per_token,
        tokens=round(count * world.data_ranks),
    )
