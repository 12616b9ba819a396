"""What a kernel benchmark is made of: an operator, its shapes, and who contends.

One source for `tritium bench kernels`, for pytest-benchmark and for the table of machine code.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to compute an operator. `call` takes the operator's inputs by name; `needs` is the module that must be there."""

    name: str
    call: Callable[..., Outputs]
    needs: str | None = None
    # Only where the inputs' device is a GPU: torch.compile takes a minute a shape on a CPU, and says nothing there.
    cuda_only: bool = False

    def absence(self, device: torch.device) -> str | None:
        """Why it cannot take part here, or None."""
        if self.cuda_only and device.type != "cuda":
            return "needs a GPU"
        if self.needs and importlib.util.find_spec(self.needs.split(".")[0]) is None:
            return f"{self.needs} is not installed"
        return None


@dataclass(frozen=True, kw_only=True)
class Operator:
    """An operator under test.

    `inputs(shape, dtype, device)` makes its arguments by name: floating-point ones get gradients. `eager` is the definition in
    plain PyTorch: the truth in float64, and what ours is compared with in the working dtype. `cost(shape, itemsize)` gives
    fwd_bytes, bwd_bytes, fwd_flops and bwd_flops. `launches(shape, dtype)` runs every launcher on meta tensors, forward and
    backward; None while there is no kernel. `check_shape` shrinks a shape to one whose float64 truth is cheap.
    """

    name: str
    sizes: tuple[str, ...]
    inputs: Callable[[Sequence[int], torch.dtype, torch.device], dict[str, Any]]
    ours: Callable[..., Outputs]
    eager: Callable[..., Outputs]
    cost: Callable[[Sequence[int], int], dict[str, int]]
    check_shape: Callable[[Sequence[int]], tuple[int, ...]]
    shapes: tuple[tuple[int, ...], ...]
    small_shapes: tuple[tuple[int, ...], ...]
    bound: str
    peers: tuple[Contestant, ...] = ()
    # A definition that loops over its input makes a graph that takes minutes to compile.
    compiles: bool = True
    launches: Callable[[Sequence[int], torch.dtype], None] | None = None
    launch_shapes: tuple[tuple[int, ...], ...] = ()

    def contestants(self) -> list[Contestant]:
        """Ours first, then eager PyTorch, compiled PyTorch, the peers, and ours again: what the two differ by is noise."""
        # A compiled backward is timed again and again on one graph, so it may not take its buffers for its own.
        torch._functorch.config.donated_buffer = False
        # A function of its own for each: torch.compile counts how often one function was compiled anew.
        call = torch.compile(lambda **inputs: self.eager(**inputs), dynamic=False)
        compiled = (
            (Contestant(name="torch.compile", call=call, cuda_only=True),) if self.compiles else ()
        )
        return [
            Contestant(name="tritium", call=self.ours),
            Contestant(name="eager", call=self.eager),
            *compiled,
            *self.peers,
            Contestant(name="tritium again", call=self.ours),
        ]

    def label(self, shape: Sequence[int]) -> str:
        """A shape as "M=32768 N=768"."""
        return " ".join(f"{name}={size}" for name, size in zip(self.sizes, shape, strict=True))


def forced(operator: str, products: str, **options: Any) -> Contestant:
    """One of our operators with products of one kind, whatever plan() says; `options` are its forward's other arguments."""
    forward = getattr(torch.ops.tritium, f"{operator}_fwd")
    return Contestant(
        name=f"tritium, {products}",
        call=lambda **inputs: forward(**inputs, **options, matmul=products)[0],
        cuda_only=True,
    )


def randn(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    """Normal numbers that need gradients: zeros would let a GPU clock higher than any real run."""
    return (
        (torch.randn(shape, device=device, dtype=torch.float32) * scale).to(dtype).requires_grad_()
    )
