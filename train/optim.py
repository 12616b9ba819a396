"""The optimizers of a run: AdamW, or Muon for the matrices of blocks and AdamW for all else.

    AdamW      PyTorch's, fused; decoupled weight decay of matrices and embeddings, not of gains and biases
    Muon       PyTorch's: W <- W - lr (decay W + 0.2 sqrt(max(rows, columns)) orthogonalized(momentum)). The factor gives its
               updates the size of AdamW's, so that one learning rate, schedule and decay serve both. The matrix of queries,
               keys and values is orthogonalized as one; in bfloat16, whatever the run's precision
    float16    losses are scaled up before the backward, gradients down after it; a step whose gradients overflowed is left out
               and the scale halved, all on the device (the host waits there for Muon and zero1 only)

Source     Loshchilov & Hutter 2019, arXiv:1711.05101; Jordan 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025,
           arXiv:2502.16982
"""

import collections
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import InputError
from .precision import choose_dtype, linear_parameters

if TYPE_CHECKING:
    from .config import TrainConfig
    from .distributed.world import World


@dataclass(frozen=True, kw_only=True)
class OptimizerRow:
    """What differs between the optimizers that the option `optimizer` names."""

    needs: str
    """Class of torch.optim that must exist."""
    engines: tuple[str | None, ...]
    """Distributed engines that support it; None is a single process."""
    block_matrix_state_bytes: int
    """Bytes of state per element of the matrices in blocks; all other parameters have AdamW's 8."""


OPTIMIZERS = {
    "adamw": OptimizerRow(
        needs="AdamW", engines=(None, "ddp", "zero1", "fsdp"), block_matrix_state_bytes=8
    ),
    # Muon orthogonalizes complete matrices, which no rank has under FSDP.
    "muon": OptimizerRow(needs="Muon", engines=(None, "ddp", "zero1"), block_matrix_state_bytes=4),
}


def check_optimizer(config: "TrainConfig", world: "World | None" = None) -> None:
    """Raise InputError if this PyTorch or the engine does not support the optimizer."""
    row = OPTIMIZERS[config.optimizer]
    if not hasattr(torch.optim, row.needs):
        raise InputError(
            f"optimizer: expected a PyTorch with torch.optim.{row.needs}, got {torch.__version__}; update PyTorch, or "
            "use adamw"
        )
    engine = None if world is None else world.engine
    if engine not in row.engines:
        raise InputError(
            f"optimizer: expected adamw with the engine {engine}, got {config.optimizer}, which needs complete "
            "matrices; use ddp or zero1"
        )


class Optimizer:
    """What turns gradients into a step: every parameter of a model in exactly one group of one of PyTorch's optimizers.

    Args:
        model: on its device, sharded if it is to be; gradients of its parameters are what `update` reads.
        world: whose ranks divide the parameters' states with zero1.
    Attributes:
        parts: PyTorch's optimizers.
        scaler: of float16's losses; does nothing in other precisions.
    Raises: ValueError if a parameter would be missed or changed twice.
    """

    def __init__(self, model: nn.Module, config: "TrainConfig", world: "World | None" = None):
        check_optimizer(config, world)
        device = next(model.parameters()).device
        self._grad_clip = config.grad_clip or float("inf")
        self._parameters = [
            parameter for parameter in model.parameters() if parameter.requires_grad
        ]
        in_blocks = (
            {id(parameter) for parameter in linear_parameters(model)}
            if config.optimizer == "muon"
            else set()
        )
        of_muon = [
            parameter
            for parameter in self._parameters
            if parameter.ndim == 2 and id(parameter) in in_blocks
        ]
        others = [
            parameter
            for parameter in self._parameters
            if parameter.ndim != 2 or id(parameter) not in in_blocks
        ]
        groups = [
            {"params": alike, "weight_decay": config.weight_decay if is_matrix else 0.0}
            for is_matrix in (True, False)
            for alike in _on_one_mesh(
                [parameter for parameter in others if (parameter.ndim >= 2) == is_matrix]
            )
        ]
        adamw, muon = torch.optim.AdamW, getattr(torch.optim, "Muon", None)
        if world is not None and world.engine == "zero1":
            from torch.distributed.optim import (
                ZeroRedundancyOptimizer,  # here, not above: it takes a second to import
            )

            adamw, muon = (
                functools.partial(ZeroRedundancyOptimizer, optimizer_class=kind)
                for kind in (adamw, muon)
            )
        self.parts = [adamw(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)]
        if of_muon:
            options = {
                "lr": config.lr,
                "weight_decay": config.weight_decay,
                "adjust_lr_fn": "match_rms_adamw",
            }
            self.parts.append(muon(of_muon, **options))
        held = [
            id(parameter)
            for part in self.parts
            for group in part.param_groups
            for parameter in group["params"]
        ]
        if sorted(held) != sorted(map(id, self._parameters)):
            raise ValueError(
                f"Optimizer: expected each of {len(self._parameters)} parameters once, got {len(held)} in groups"
            )
        is_scaled = choose_dtype(config.execution.precision, device) == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=is_scaled)

    def update(self, lr: float) -> Tensor:
        """Clip the gradients to config.grad_clip (0: do not), take a step and drop them.

        Returns: their global norm before clipping, (); not finite where float16 overflowed and the step was left out.
        """
        for part in self.parts:
            self.scaler.unscale_(part)
            for group in part.param_groups:
                group["lr"] = lr
        meshes = list(_on_one_mesh(self._parameters))
        norms = [
            torch.nn.utils.get_total_norm([parameter.grad for parameter in alike])
            for alike in meshes
        ]
        norms = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
        grad_norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        for alike in meshes:
            # As a factor of at most 1 formed on the device, so that nothing waits for the norm.
            torch.nn.utils.clip_grads_with_norm_(alike, self._grad_clip, grad_norm)
        if len(self.parts) > 1 and self.scaler.is_enabled() and not grad_norm.isfinite():
            # The scaler leaves out the parts that hold an overflow; without gradients the others change nothing either.
            for part in self.parts:
                part.zero_grad(set_to_none=True)
        for part in self.parts:
            self.scaler.step(part)
            part.zero_grad(set_to_none=True)
        self.scaler.update()
        return grad_norm

    def states(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """What this rank keeps of each parameter from step to step: AdamW's two moments and count, Muon's momentum."""
        return {
            parameter: state for part in self._local() for parameter, state in part.state.items()
        }

    def load_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Go on from what `states` gave for a parameter; with zero1 where it is this rank's."""
        for part in self._local():
            if any(parameter is held for group in part.param_groups for held in group["params"]):
                part.state[parameter] = state

    def _local(self) -> list[torch.optim.Optimizer]:
        """PyTorch's optimizers of the parameters whose state this rank keeps: with zero1 each part has one of these inside."""
        return [getattr(part, "optim", part) for part in self.parts]


def _on_one_mesh(parameters: list[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """Parameters apart by the ranks they are divided among: PyTorch's functions of many tensors take one kind at a time."""
    alike = collections.defaultdict(list)
    for parameter in parameters:
        alike[getattr(parameter, "device_mesh", None)].append(parameter)
    return alike.values()
