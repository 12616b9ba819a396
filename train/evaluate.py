"""Loss of a batch, and on held-out text, in the three units people compare."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..model import GPT
from .config import DIVERGED
from .data.loader import Batch, copy_to_device, document_starts
from .distributed.world import SINGLE_PROCESS, World


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """loss: nats a token.   bits_per_byte: of the UTF-8 text, comparable across tokenizers.   tokens: how many were scored."""

    loss: float
    bits_per_byte: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that leaves float64."""
        return math.exp(self.loss) if self.loss < 709 else math.inf


def batch_loss(model: nn.Module, batch: Batch, separator: int | None) -> Tensor:
    """Mean cross-entropy of a batch.

    Args:
        model: a GPT, or what wraps one.
        separator: the token that begins a document, none of which then sees another; None: a row is one document.
    Returns: () float32 on the model's device, in nats a token.
    """
    device, documents = next(model.parameters()).device, {}
    if separator is not None:
        documents["cu_seqlens"] = copy_to_device(document_starts(batch.inputs, separator), device)
        # The one size that differs between batches: code compiled for any.
        torch._dynamo.mark_dynamic(documents["cu_seqlens"], 0)
    return model(*batch.on(device), **documents)


@torch.no_grad()
def evaluate(
    model: GPT,
    batches: Iterable[Batch],
    *,
    bytes_per_token: float,
    separator: int | None = None,
    world: World = SINGLE_PROCESS,
) -> Evaluation | None:
    """Mean cross-entropy over the targets of all batches, each target counted once.

    Args:
        batches: as many on every rank.
        separator: as for batch_loss.
        bytes_per_token: of the text behind them.
        world: ranks that have a part of the batches each.
    Returns: the evaluation; None if there was no batch.
    Raises: InputError if the loss is not finite.
    """
    losses, counts = [], []
    for batch in batches:
        losses.append(batch_loss(model, batch, separator))
        counts.append(int(batch.num_targets.sum()))
    # Read at the end: until then nothing waits for the device. The mean over no targets is 0.
    means = torch.stack(losses).tolist() if losses else []
    total = sum(loss * count for loss, count in zip(means, counts, strict=True))
    total, count = world.mean(torch.tensor([total, sum(counts)], dtype=torch.float64)).tolist()
    if not count:
        return None
    loss = total / count
    if not math.isfinite(loss):
        raise InputError(f"{DIVERGED} (validation loss is {loss})")
    return Evaluation(
        loss=loss,
        bits_per_byte=loss / math.log(2) / bytes_per_token,
        tokens=round(count * world.data_ranks),
    )
