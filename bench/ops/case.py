"""The parts of a kernel benchmark: an operator, its shapes and its implementations.

`tritium bench kernels`, `tritium bench codegen` and the pytest-benchmark cases all read them.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

Outputs = Tensor | tuple[Tensor, ...]
# Sizes -> normal numbers of the benchmark's dtype and device: the function `randn` of this file.
Randn = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to compute an operator.

    Attributes:
        name: name in tables.
        call: takes the inputs of the operator by name.
        needs: module that must be installed; default: none.
        cuda_only: whether it runs on a GPU only; default: no.
    """

    name: str
    call: Callable[..., Outputs]
    needs: str | None = None
    cuda_only: bool = False

    def why_missing(self, device: torch.device) -> str | None:
        """Return why it cannot run on `device`, or None if it can."""
        if self.cuda_only and device.type != "cuda":
            return "needs a GPU"
        if self.needs and importlib.util.find_spec(self.needs.split(".")[0]) is None:
            return f"{self.needs} is not installed"
        return None


@dataclass(frozen=True, kw_only=True)
class Operator:
    """An operator, how to call it, and what to compare it with.

    Attributes:
        name: name of the operator in tritium.kernels. OPERATOR:VARIANT if optional arguments select
            another kernel.
        sizes: names of the numbers in a shape. The functions below take them as arguments.
        inputs: (randn, *sizes) -> arguments by name.
        ours: the operator, called with these arguments.
        eager: the definition in plain PyTorch. In float64 it gives the expected results.
        cost: (*sizes, itemsize) -> fwd_bytes, bwd_bytes, fwd_flops and bwd_flops. Operators for
            inference have no bwd_ entries.
        check_shape: (*sizes) -> a smaller shape, whose float64 results are cheap.
        shapes: shapes to time on a GPU.
        small_shapes: shapes to time on a CPU.
        tiny_shape: a shape for Triton's interpreter, which takes a second per 10,000 elements.
        launch_shapes: shapes to compile ahead of time. Together they reach every kernel and tile.
        launch_variants: more shapes to compile ahead of time. Each has a context manager in which
            launchers choose kernels that are not the default.
        bound: "bytes" or "flops", the ceiling that limits the operator.
        others: implementations to compare with, besides eager and compiled PyTorch.
        compiles: whether torch.compile takes part. Compiling an `eager` with a loop takes minutes.
    """

    name: str
    sizes: tuple[str, ...]
    inputs: Callable[..., dict[str, Tensor]]
    ours: Callable[..., Outputs]
    eager: Callable[..., Outputs]
    cost: Callable[..., dict[str, int]]
    check_shape: Callable[..., tuple[int, ...]]
    shapes: tuple[tuple[int, ...], ...]
    small_shapes: tuple[tuple[int, ...], ...]
    tiny_shape: tuple[int, ...]
    launch_shapes: tuple[tuple[int, ...], ...]
    bound: str
    launch_variants: tuple[tuple[tuple[int, ...], Callable[[], AbstractContextManager]], ...] = ()
    others: tuple[Implementation, ...] = ()
    compiles: bool = True

    def make_inputs(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        """Return arguments by name. Floating-point ones get gradients, except for inference."""
        with device:
            return self.inputs(functools.partial(randn, dtype=dtype), *shape)

    def implementations(self) -> list[Implementation]:
        """Return ours, eager and compiled PyTorch, the others, and ours again to show the noise."""
        # The backward of one graph is timed repeatedly, so it must not reuse the saved buffers.
        torch._functorch.config.donated_buffer = False
        # A new function each time: torch.compile limits recompilations per function.
        compiled = torch.compile(lambda **inputs: self.eager(**inputs), dynamic=False)
        baselines = [Implementation(name="eager", call=self.eager)]
        if self.compiles:
            # On a CPU it would compile for a minute per shape.
            baselines.append(Implementation(name="torch.compile", call=compiled, cuda_only=True))
        return [
            Implementation(name="tritium", call=self.ours),
            *baselines,
            *self.others,
            Implementation(name="tritium again", call=self.ours),
        ]

    def label(self, shape: Sequence[int]) -> str:
        """Return a shape as "M=32768 N=768"."""
        return " ".join(f"{name}={size}" for name, size in zip(self.sizes, shape, strict=True))


def outputs_and_leaves(
    call: Callable[..., Outputs], inputs: dict[str, Any]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Call an implementation. Return its outputs, and the inputs that get gradients by name."""
    outputs = call(**inputs)
    leaves = {
        name: value
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.requires_grad
    }
    return outputs if isinstance(outputs, tuple) else (outputs,), leaves


def forced(operator: str, matmul: str, **options: Any) -> Implementation:
    """Return our operator with one kind of matmul, whatever plan() would choose.

    Args:
        options: the other arguments of the operator's forward.
    """
    forward = getattr(torch.ops.tritium, f"{operator}_fwd")
    return Implementation(
        name=f"tritium, {matmul}",
        call=lambda **inputs: forward(**inputs, **options, matmul=matmul)[0],
        cuda_only=True,
    )


def randn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Return normal numbers that require gradients. A GPU would clock higher on zeros."""
    return (torch.randn(shape, dtype=torch.float32) * scale).to(dtype).requires_grad_()
