"""AdamW with weight decay where it belongs, on matrices and not on gains and biases, and what a step does with gradients."""

import torch
from torch import Tensor, nn

from .config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """PyTorch's fused AdamW over every parameter of `model`, in a decayed and an undecayed group.

    Matrices and embeddings decay by config.weight_decay, vectors do not. The learning rate is set anew each step.
    """
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    undecayed = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def update(optimizer: torch.optim.Optimizer, *, lr: float, grad_clip: float) -> Tensor:
    """Clip the gradients to a global norm (0: do not), take a step and drop them. Returns: the norm before clipping, ()."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or float("inf"))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm
