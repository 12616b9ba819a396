"""Loss on held-out text, in the three units people compare."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import GPT
from .config import DIVERGED, InputError
from .device import compute_dtype
from .loader import IGNORED


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


@torch.no_grad()
def evaluate(model: GPT, batches: Iterable[tuple[Tensor, Tensor]], *, bytes_per_token: float) -> Evaluation | None:
    """Mean cross-entropy over the targets of all batches, each target counted once.

    Args:
        batches: (tokens, targets) (B, T) int64 on the CPU; targets of -100 do not count.
        bytes_per_token: of the text behind them.
    Returns: the evaluation; None if there was no batch.
    Raises: InputError if the loss is not finite.
    """
    device = model.wte.weight.device
    total, count = torch.zeros((), dtype=torch.float64), 0
    for tokens, targets in batches:
        counted = int((targets != IGNORED).sum())
        with compute_dtype(device):
            loss = model(tokens.to(device), targets.to(device))
        total += loss.cpu().double() * counted
        count += counted
    if not count:
        return None
    loss = total.item() / count
    if not math.isfinite(loss):
        raise InputError(f"{DIVERGED} (validation loss is {loss})")
    return Evaluation(loss=loss, bits_per_byte=loss / math.log(2) / bytes_per_token, tokens=count)
