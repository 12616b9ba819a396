"""Compute the loss of a batch, and evaluate: mean loss, perplexity and bits per byte."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import DivergedError
from ..model import GPT
from .config import DIVERGED
from .data.loader import Batch
from .distributed.world import SINGLE_PROCESS, World

# exp() of a larger number is infinite in float64.
_MAX_EXPONENT = 709


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The mean loss over held-out data, and other measures of it."""

    loss: float
    """Mean over the targets. Nats per token, if the targets are tokens."""
    bits_per_byte: float | None = None
    """Bits per byte of UTF-8 text: comparable across tokenizers. None: not known."""
    tokens: int
    """Number of targets."""
    unit: str = "token"
    """The name of a target: token, text or pair."""
    more: dict[str, float] = field(default_factory=dict)
    """Other measures by their names, such as accuracy."""

    @property
    def perplexity(self) -> float | None:
        """exp(loss), or infinity. None if the targets are not tokens."""
        if self.unit != "token":
            return None
        return exp_or_inf(self.loss)

    def values(self) -> dict[str, float]:
        """Return the values by their keys in metrics.jsonl."""
        values = {
            "val_loss": self.loss,
            "val_perplexity": self.perplexity,
            "val_bits_per_byte": self.bits_per_byte,
            **{f"val_{name}": value for name, value in self.more.items()},
        }
        return {name: value for name, value in values.items() if value is not None}

    def describe(self) -> str:
        """Return the loss and the other measures in one line."""
        line = f"validation loss {self.loss:.4f}"
        if self.perplexity is not None:
            line += f", perplexity {self.perplexity:.2f}"
        if self.bits_per_byte is not None:
            line += f", {self.bits_per_byte:.3f} bits per byte"
        return line + "".join(f", {name} {value:.4f}" for name, value in self.more.items())


def exp_or_inf(nats: float) -> float:
    """Return exp(nats); infinity if it is too large for a float64."""
    return math.exp(nats) if nats < _MAX_EXPONENT else math.inf


def batch_loss(model: nn.Module, batch: Batch, dropout_seed: int | None = None) -> Tensor:
    """Return the mean loss over the targets of a batch.

    Args:
        model: the model of a task, compiled or not.
        batch: a batch of this task.
        dropout_seed: as for GPT.
    Returns: () float32 on the model's device; 0 without targets.
    """
    device = next(model.parameters()).device
    return model(**batch.model_inputs(device, dropout_seed))


@torch.no_grad()
def evaluate(
    model: GPT,
    batches: Iterable[Batch],
    *,
    bytes_per_token: float | None = None,
    world: World = SINGLE_PROCESS,
) -> Evaluation | None:
    """Return the mean loss over all targets of all batches, on all ranks.

    A smaller last batch counts too.

    Args:
        batches: the batches of this rank. All ranks have the same number of batches.
        bytes_per_token: mean length of a token in the text. None: bits per byte are not known.
        world: ranks that evaluate together.
    Returns: the evaluation; None without targets.
    Raises: DivergedError if the loss is not finite.
    """
    losses = []
    counts = []
    was_training = model.training
    model.eval()
    for batch in batches:
        losses.append(batch_loss(model, batch))
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
        bits_per_byte=loss / math.log(2) / bytes_per_token if bytes_per_token else None,
        tokens=round(count * world.data_ranks),
    )
