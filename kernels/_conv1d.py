"""The linear layers of modules.py."""

import torch
from torch import Tensor, nn


class Conv1D(nn.Module):
    """A linear layer that stores its weight as (in, out), like the Conv1D of transformers."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool = True, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(n_out, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from a normal distribution with deviation 0.02. The bias becomes 0."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.t(), self.bias)

    def extra_repr(self) -> str:
        n_in, n_out = self.weight.shape
        return f"{n_in}, {n_out}, bias={self.bias is not None}"


def linear_layer(layout: str, n_in: int, n_out: int, **options) -> nn.Module:
    """Make a linear layer whose weight is (in, out) for the layout "gpt2", else (out, in)."""
    return Conv1D(n_in, n_out, **options) if layout == "gpt2" else nn.Linear(n_in, n_out, **options)
