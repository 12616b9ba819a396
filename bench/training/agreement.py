"""Check that a model computes the same function as the baseline, up to rounding.

The speeds of different models cannot be compared, so this comes before any timing. Loss and
gradients of the first batch may differ by as much as rounding explains:

    roundings   From embedding to logit a value is rounded R = 11 L + 3 times, in L blocks. Each
                rounding has a relative error of at most u = eps / 2 of the matmuls' dtype, plus
                sqrt(F) eps / 2 of float32 for the sum inside the longest matmul. In two programs
                they add up like a random walk: a logit differs by r = sqrt(2 R) u of the largest.
    loss        |l - l'| <= 2 r max|logit| + (8 + sqrt(N)) eps l, with eps of float32. The gradient
                of a token's loss with respect to its logits is p - onehot, whose absolute sum is at
                most 2. The mean adds up N tokens.
    gradients   |g - g'| <= sqrt(3) r |g|, over all parameters at once. The backward has twice as
                many roundings as the forward.

In bfloat16 the bound of the gradients is the sharper one. With 4 layers of 256 on a CPU a correct
baseline differs by 0.004. A baseline without causal mask, or with ReLU, differs by 0.4 or more. The
bound is 0.07. Later losses are shown and not checked: the first steps of AdamW are as large as the
learning rate, even where a gradient is only rounding noise.
"""

import math

import torch
from torch import Tensor

from ...errors import InputError
from ...train.config import TrainConfig
from ...train.data.loader import Batch
from ...train.precision import choose_dtype
from .implementations import TrainedModel

# Norm, qkv, probabilities, sum of values, projection, addition; norm, matmul, GELU, matmul,
# addition.
ROUNDINGS_PER_BLOCK = 11
# Embedding, last norm, logits.
OTHER_ROUNDINGS = 3


def check_agreement(
    config: TrainConfig, model: TrainedModel, baseline: TrainedModel, batch: Batch
) -> dict[str, float]:
    """Compare loss and gradients of a batch with the baseline's.

    Returns: loss_gap, loss_bound, gradient_gap and gradient_bound. Gradients are relative.
    Raises: InputError if a gap is larger than its bound.
    """
    loss, gradients = model.gradients(batch)
    baseline_loss, baseline_gradients = baseline.gradients(batch)
    network = baseline.trainer.working
    device = network.wte.weight.device
    with torch.no_grad():
        largest_logit = network(batch[:1].on(device)[0]).abs().max().item()

    dtype = choose_dtype(config.execution.precision, device)
    eps = torch.finfo(torch.float32).eps
    rounding = torch.finfo(dtype).eps / 2 + math.sqrt(model.shape.d_feedforward) * eps / 2
    roundings = ROUNDINGS_PER_BLOCK * model.shape.n_layer + OTHER_ROUNDINGS
    walk = math.sqrt(2 * roundings) * rounding
    sum_rounding = (8 + math.sqrt(batch.inputs.numel())) * eps
    found = {
        "loss_gap": abs(loss.double().item() - baseline_loss.double().item()),
        "loss_bound": 2 * walk * largest_logit + sum_rounding * abs(baseline_loss.item()),
        "gradient_gap": _relative_gap(gradients, baseline_gradients),
        "gradient_bound": math.sqrt(3) * walk,
    }
    for quantity in ("loss", "gradient"):
        gap, bound = found[f"{quantity}_gap"], found[f"{quantity}_bound"]
        if not gap <= bound:  # not >: NaN must not pass
            raise InputError(
                f"bench train: expected the {quantity} of {model.name} on the first batch to "
                f"differ from the baseline's by rounding, up to {bound:.2g}, got {gap:.2g} (losses "
                f"{loss.item():.6f} and {baseline_loss.item():.6f}); one of the two is wrong, run "
                "the tests"
            )
    return found


def _relative_gap(gradients: dict[str, Tensor], baseline: dict[str, Tensor]) -> float:
    """Return |g - g'| / |g'| over all parameters."""
    gap = sum((g - baseline[name]).double().square().sum() for name, g in gradients.items())
    norm = sum(baseline[name].double().square().sum() for name in gradients)
    return (gap / norm).sqrt().item()
