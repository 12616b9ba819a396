"""Check an implementation against float64 before it is timed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .case import Implementation, Operator, outputs_and_leaves

# How much larger the error may be than that of eager PyTorch in the same dtype.
ERROR_RATIO = 2.0


def find_error(
    operator: Operator,
    implementation: Implementation,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    """Compare outputs and gradients with eager PyTorch in float64.

    Errors may be ERROR_RATIO times those of eager PyTorch in `dtype`, or as large as rounding
    explains.

    Returns: what is wrong, in one line; None if nothing is.
    """
    truth = truth_of(operator, operator.check_shape(*shape), dtype, device)
    try:
        got, _ = results(implementation.call, truth.inputs, truth.output_grads)
    except Exception as error:  # other libraries may raise anything
        return f"{type(error).__name__}: {error}".split("\n")[0]

    rounding = _rounding(truth.inputs, dtype)
    for name, value in truth.expected.items():
        if got[name].shape != value.shape:
            return f"{name} is {tuple(got[name].shape)}, expected {tuple(value.shape)}"
        # The maximum finds one wrong element. The mean square finds small errors in all elements.
        # Rounding to nearest is off by at most eps / 2, and by eps / sqrt(12) in the mean square.
        for measure, norm, fraction in (("at most", _max, 1.0), ("in the mean square", _rms, 0.3)):
            error = norm(got[name].double() - value)
            eager_error = norm(truth.eager[name].double() - value)
            bound = max(ERROR_RATIO * eager_error, fraction * rounding * norm(value))
            if not error <= bound:  # not >: NaN must not pass
                return f"{name} is off by {error:.2g} {measure}, eager PyTorch by {eager_error:.2g}"
    return None


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Inputs of an operator, and its outputs and gradients by name.

    Attributes:
        inputs: arguments by name, in the tested dtype.
        output_grads: gradients of the outputs, in float64.
        expected: the definition in float64.
        eager: the definition in the tested dtype.
    """

    inputs: dict[str, Any]
    output_grads: list[Tensor]
    expected: dict[str, Tensor]
    eager: dict[str, Tensor]


def truth_of(
    operator: Operator, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Truth:
    """Draw inputs of a shape and compute the definition in float64 and in `dtype`."""
    torch.manual_seed(0)
    inputs = operator.make_inputs(shape, dtype, device)
    in_float64 = {name: _to_float64(value) for name, value in inputs.items()}
    expected, output_grads = results(operator.eager, in_float64, None)
    eager, _ = results(operator.eager, inputs, output_grads)
    return Truth(inputs=inputs, output_grads=output_grads, expected=expected, eager=eager)


def results(
    call: Callable, inputs: dict[str, Any], output_grads: list[Tensor] | None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return outputs and gradients by name, and the output gradients, which are drawn if None."""
    outputs, leaves = outputs_and_leaves(call, inputs)
    if output_grads is None:
        output_grads = [torch.randn_like(output) for output in outputs]
    found = {f"output {number}": output.detach() for number, output in enumerate(outputs)}
    if leaves:
        cast = [grad.to(y.dtype) for grad, y in zip(output_grads, outputs, strict=True)]
        grads = torch.autograd.grad(outputs, list(leaves.values()), cast)
        found |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return found, output_grads


def _to_float64(value: Any) -> Any:
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def _rounding(inputs: dict[str, Any], dtype: torch.dtype) -> float:
    """Return the relative error of two roundings to `dtype` and one float32 sum."""
    longest = max(size for x in inputs.values() if isinstance(x, Tensor) for size in x.shape)
    return torch.finfo(dtype).eps + (8 + longest**0.5) * torch.finfo(torch.float32).eps


def _max(x: Tensor) -> float:
    return x.abs().max().item()


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
