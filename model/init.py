"""GPT-2's initialization: normal weights of deviation 0.02, smaller where a block adds to the residual stream.

Source     Radford et al. 2019, "Language models are unsupervised multitask learners", section 2.3
"""

import math

import torch
from torch import nn

DEVIATION = 0.02


@torch.no_grad()
def init_weights(model: nn.Module, n_layer: int) -> None:
    """Fill every parameter of a GPT in place, drawing from PyTorch's default generator of its device.

    Matrices: normal with deviation 0.02; the 2 n_layer projections onto the residual stream: 0.02 / sqrt(2 n_layer), so that
    the stream's variance does not grow with depth. Gains one, biases zero.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        elif name.endswith("c_proj.weight"):
            parameter.normal_(0.0, DEVIATION / math.sqrt(2 * n_layer))
        else:
            parameter.normal_(0.0, DEVIATION)
