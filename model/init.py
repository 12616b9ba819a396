"""GPT-2's initialization: normal weights, smaller where a block adds to the residual stream.

Source     Radford et al. 2019, "Language models are unsupervised multitask learners", section 2.3
"""

import math

import torch
from torch import nn

STANDARD_DEVIATION = 0.02


@torch.no_grad()
def init_weights(model: nn.Module, n_layer: int) -> None:
    """Fill every parameter of a GPT in place, with the default random generator of its device.

    Matrices: standard deviation 0.02. The 2 n_layer projections that add to the residual stream:
    0.02 / sqrt(2 n_layer), so that the variance of the stream does not grow with depth.
    Norm weights: 1. Biases: 0.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        elif name.endswith("c_proj.weight"):
            parameter.normal_(0.0, STANDARD_DEVIATION / math.sqrt(2 * n_layer))
        else:
            parameter.normal_(0.0, STANDARD_DEVIATION)
