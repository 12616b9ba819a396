"""Muon: momentum, orthogonalized, for the matrices of blocks.

    momentum   B <- B + (1 - momentum) (gradient - B)
    update     U = gradient + momentum (B - gradient)
    weights    W <- W - lr decay W - lr 0.2 sqrt(max(rows, columns)) O     O: U, orthogonalized

    orthogonalize   X = U / |U|; five times: A = X X^T; X <- a X + (b A + c A A) X
                    It moves all singular values to between 0.7 and 1.2 and keeps the singular
                    vectors: Newton-Schulz iteration of degree 5

Matrices of equal shape are orthogonalized together: a step of GPT-2 has under 160 operators, and
torch.optim.Muon has more than eight times as many (tests/train/optimizer/test_muon.py counts both).
Matmuls are bfloat16 on CUDA and float32 on a CPU, where bfloat16 is often emulated.

FSDP       Each rank gathers the updates of a batch, orthogonalizes all of them, and keeps its rows.
           The ranks repeat each other's work: ZeRO-1 divides it
found_inf  Weights and momentum change in steps of torch._fused_sgd_, which changes nothing if
           found_inf is 1. torch.optim.Muon, which computes the same up to rounding, cannot skip a
           step without waiting for the device
Source     Jordan 2024, kellerjordan.github.io/posts/muon; the scale: Liu et al. 2025,
           arXiv:2502.16982
"""

import collections
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5
# A matrix of zeros stays zero.
_LEAST_NORM = 1e-7
# Matrices are orthogonalized together up to this number of elements: it bounds the temporaries.
_MAX_BATCH_ELEMENTS = 2**26


class Muon(torch.optim.Optimizer):
    """Updates matrices by their orthogonalized momentum.

    Args:
        params: 2D parameters, or groups of them.
        lr: learning rate, a number or a tensor.
        weight_decay: decoupled weight decay.
        momentum: of the gradients.
    Attributes:
        found_inf: () float32 on the device of the parameters. 1: `step` changes neither weights nor
            momentum. None: no step is skipped.
    Raises: ValueError for a parameter that is no matrix.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ):
        options = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, options)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(
                        "Muon: expected matrices, got a parameter of shape "
                        f"{tuple(parameter.shape)}; give it to AdamW"
                    )

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update the weights from their gradients. `closure` is not supported."""
        for group in self.param_groups:
            parameters = [each for each in group["params"] if each.grad is not None]
            if not parameters:
                continue
            momentum = group["momentum"]
            gradients = [each.grad for each in parameters]
            buffers = [self._buffer(each) for each in parameters]

            # B -= (1 - momentum) (B - gradient): the gradient is subtracted, and B decays by 1.
            self._descend(buffers, gradients, lr=1 - momentum, decay=1.0, maximize=True)

            # U = gradient + momentum (B - gradient)
            updates = torch._foreach_lerp(_local(gradients), _local(buffers), momentum)
            scaled = [torch.empty(0)] * len(updates)
            for batch in _batches(parameters):
                together = [_complete(updates[index], parameters[index]) for index in batch]
                orthogonal = orthogonalize(torch.stack(together))
                # The update is scaled, not the learning rate, which can be a tensor.
                scale = 0.2 * math.sqrt(max(parameters[batch[0]].shape))
                orthogonal = orthogonal.float().mul_(scale)
                for index, matrix in zip(batch, orthogonal, strict=True):
                    scaled[index] = _own_part(matrix, parameters[index])
            self._descend(parameters, scaled, lr=group["lr"], decay=group["weight_decay"])

    def _buffer(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]

    def _descend(
        self,
        values: list[Tensor],
        gradients: list[Tensor],
        *,
        lr: float | Tensor,
        decay: float,
        maximize: bool = False,
    ) -> None:
        """Do values -= lr (decay values + gradients), or (decay values - gradients) if `maximize`.

        Nothing changes if found_inf is 1.
        """
        torch._fused_sgd_(
            _local(values),
            _local(gradients),
            [],
            weight_decay=decay,
            momentum=0.0,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=maximize,
            is_first_step=False,
            found_inf=self.found_inf,
        )


def orthogonalize(matrices: Tensor) -> Tensor:
    """Move the singular values of each matrix to between 0.7 and 1.2.

    Args:
        matrices: (n, rows, columns).
    Returns: the same shape, contiguous, in compute_dtype.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x.to(compute_dtype(x.device))
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=_LEAST_NORM)
    a, b, c = _COEFFICIENTS
    for _ in range(_STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if is_tall else x).contiguous()


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of the matmuls."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _batches(parameters: list[nn.Parameter]) -> Iterator[list[int]]:
    """Yield indices of parameters of equal shape, at most _MAX_BATCH_ELEMENTS together."""
    by_shape = collections.defaultdict(list)
    for index, parameter in enumerate(parameters):
        by_shape[parameter.shape].append(index)
    for shape, indices in by_shape.items():
        size = max(1, _MAX_BATCH_ELEMENTS // shape.numel())
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


# --- parameters that FSDP divides


def _local(tensors: list[Tensor]) -> list[Tensor]:
    return [each.to_local() if hasattr(each, "to_local") else each for each in tensors]


def _complete(update: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return the complete matrix of which `update` is this rank's part."""
    if not hasattr(parameter, "device_mesh"):
        return update
    from torch.distributed.tensor import DTensor

    layout = (parameter.device_mesh, parameter.placements)
    sizes = {"shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(update, *layout, **sizes).full_tensor()


def _own_part(matrix: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return this rank's part of a complete matrix."""
    if not hasattr(parameter, "device_mesh"):
        return matrix
    from torch.distributed.tensor import distribute_tensor

    layout = (parameter.device_mesh, parameter.placements)
    # All ranks have the complete matrix: nothing is sent.
    return distribute_tensor(matrix, *layout, src_data_rank=None).to_local()
