"""Loss of a batch, and on held-out text, in the three units people compare."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import GPT
from .config import DIVERGED, InputError
from .device import compute_dtype
from .loader import IGNORED, document_starts


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


def batch_loss(model: GPT, tokens: Tensor, targets: Tensor, separator: int | None) -> Tensor:
    """Mean cross-entropy of a batch as the model's device computes it.

    Args:
        tokens, targets: (B, T) int64 on the CPU; targets of -100 do not count.
        separator: the token that begins a document, none of which then sees another; None: a row is one document.
    Returns: () float32 on the model's device, in nats a token.
    """
    device = model.wte.weight.device
    cu_seqlens = None if separator is None else document_starts(tokens, separator).to(device, non_blocking=True)
    with compute_dtype(device):
        return model(tokens.to(device, non_blocking=True), targets.to(device, non_blocking=True), cu_seqlens=cu_seqlens)


@torch.no_grad()
def evaluate(
    model: GPT, batches: Iterable[tuple[Tensor, Tensor]], *, bytes_per_token: float, separator: int | None = None
) -> Evaluation | None:
    """Mean cross-entropy over the targets of all batches, each target counted once.

    Args:
        batches: (tokens, targets) (B, T) int64 on the CPU; targets of -100 do not count.
        separator: as for batch_loss.
        bytes_per_token: of the text behind them.
    Returns: the evaluation; None if there was no batch.
    Raises: InputError if the loss is not finite.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for tokens, targets in batches:
        counted = int((targets != IGNORED).sum())
        total += batch_loss(model, tokens, targets, separator).cpu().double() * counted
        count += counted
    if not count:
        return None
    loss = total.item() / count
    if not math.isfinite(loss):
        raise InputError(f"{DIVERGED} (validation loss is {loss})")
    return Evaluation(loss=loss, bits_per_byte=loss / math.log(2) / bytes_per_token, tokens=count)
