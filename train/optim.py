"""The optimizers of a run, which OPTIMIZERS in choices.py names.

    adamw      PyTorch's AdamW, fused; decoupled weight decay of matrices and embeddings only
    muon       Muon (optimizer/muon.py) for the matrices of blocks:
                 W <- W - lr (decay W + 0.2 sqrt(max(rows, columns)) orthogonalized(momentum))
               and AdamW for all other parameters. The scale gives Muon's updates the size of
               AdamW's, so both use the same learning rate, schedule and decay. The matrix of
               queries, keys and values is orthogonalized as one matrix
    bad steps  are skipped without waiting for the device: see optimizer/bad_steps.py, also for
               float16

To add an optimizer, write a function like `adamw_parts`, add a row to OPTIMIZERS, and describe it
in the help of `optimizer` in config.py. `tritium plan` reads its `block_matrix_state_bytes`.

Source     Loshchilov & Hutter 2019, arXiv:1711.05101; Jordan 2024,
           kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv:2502.16982
"""

import collections
import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .choices import OPTIMIZERS
from .machine.cuda_graph import Recorded
from .optimizer.bad_steps import LossScale, StepJudge
from .optimizer.muon import Muon
from .precision import linear_parameters

if TYPE_CHECKING:
    from .config import TrainConfig
    from .distributed.engines import SingleProcess

Groups = list[dict[str, Any]]
"""Parameter groups as PyTorch's optimizers take them."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of PyTorch's optimizers, the parameters that it updates, and its options."""

    optimizer: type[torch.optim.Optimizer]
    groups: Groups
    options: dict[str, Any]


def adamw_parts(model: nn.Module, config: "TrainConfig") -> list[Part]:
    """Return AdamW of all trained parameters."""
    return [_adamw_part(_trained(model), config)]


def muon_parts(model: nn.Module, config: "TrainConfig") -> list[Part]:
    """Return Muon of the matrices in linear layers, and AdamW of all other parameters."""
    in_linear_layers = {id(parameter) for parameter in linear_parameters(model)}
    matrices = []
    others = []
    for parameter in _trained(model):
        is_matrix = parameter.ndim == 2 and id(parameter) in in_linear_layers
        (matrices if is_matrix else others).append(parameter)
    parts = []
    if others:  # with LoRA all trained parameters are matrices
        parts.append(_adamw_part(others, config))
    if matrices:
        options = {"lr": config.lr, "weight_decay": config.weight_decay}
        parts.append(Part(optimizer=Muon, groups=[{"params": matrices}], options=options))
    return parts


def _adamw_part(parameters: list[nn.Parameter], config: "TrainConfig") -> Part:
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [
        {"params": same_mesh, "weight_decay": decay}
        for kept, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        for same_mesh in _by_mesh(kept)
    ]
    options = {"lr": config.lr, "betas": (config.beta1, config.beta2), "fused": True}
    return Part(optimizer=torch.optim.AdamW, groups=groups, options=options)


class Optimizer:
    """Updates parameters from their gradients. Each trained parameter is in one group of one part.

    Args:
        engine: holds the model whose parameters `update` changes.
        config: names the optimizer and its options.
    Attributes:
        parts: PyTorch's optimizers.
        scaler: scales the losses of float16; does nothing in other precisions.
        judge: decides which steps are bad.
        skipped: () float32 on the device, about the last update: 0 if it changed the parameters, 1
            if the step was bad, 2 if float16 overflowed.
    Raises: ValueError if a parameter is in no group or in several.
    """

    def __init__(self, engine: "SingleProcess", config: "TrainConfig"):
        self._grad_clip = config.grad_clip or float("inf")
        self._parameters = _trained(engine.model)
        self.parts = [
            engine.make_optimizer(part.optimizer, part.groups, **part.options)
            for part in OPTIMIZERS[config.optimizer].parts(engine.model, config)
        ]
        grouped = [id(each) for part in self.parts for each in _parameters_of(part)]
        if sorted(grouped) != sorted(map(id, self._parameters)):
            raise ValueError(
                f"Optimizer: expected each of {len(self._parameters)} parameters once, "
                f"got {len(grouped)} in groups"
            )
        execution = engine.execution
        self.scaler = LossScale(execution.device, enabled=execution.dtype == torch.float16)
        self.judge = StepJudge(config.skip_threshold, execution.device)
        self.skipped = torch.zeros((), device=execution.device)

        self._recorded: Recorded | None = None
        if execution.cuda_graph and engine.can_record_update:
            self._recorded = Recorded(self._change_weights, execution.device)
            for part in self.parts:
                for group in part.param_groups:
                    # PyTorch requires it of an AdamW in a graph.
                    group["capturable"] = True
        # Memory addresses of the gradients in the last update.
        self._addresses: list[int] = []

    def update(self, lr: float, loss: Tensor | None = None) -> Tensor:
        """Clip the gradients to config.grad_clip (0: no clipping), update, and drop the gradients.

        A bad step changes neither parameters nor optimizer state: see `skipped`.

        Args:
            lr: learning rate.
            loss: () float32 on the device, the loss over all ranks. Default: only the gradient norm
                is judged.
        Returns: the global norm of the gradients before clipping, () on the device.
        """
        # A CUDA graph reads the learning rate from a float32 tensor. Without a graph it is rounded
        # to float32 too, so both give equal results.
        lr = ctypes.c_float(lr).value
        arguments = {"lr": lr} if loss is None else {"lr": lr, "loss": loss}
        change = self._change_weights if self._recorded is None else self._recorded_change
        grad_norm, self.skipped = change(**arguments)
        self.judge.count_step()
        self._drop_gradients()
        return grad_norm

    def _recorded_change(self, **arguments: float | Tensor) -> tuple[Tensor, Tensor]:
        """Call the graph of _change_weights, if the gradients are where they were before."""
        addresses = [parameter.grad.data_ptr() for parameter in self._parameters]
        if addresses != self._addresses:
            self._recorded.forget()
            self._addresses = addresses
        return self._recorded(**arguments)

    def _change_weights(
        self, lr: float | Tensor, loss: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Update weights and state. Returns: the gradient norm, and the new value of `skipped`."""
        self.scaler.unscale([parameter.grad for parameter in self._parameters])
        grad_norm = self._clip()

        # Judge the step.
        loss = grad_norm if loss is None else loss
        is_bad = self.judge.is_bad(loss, grad_norm)
        found_inf = is_bad.float()
        skipped = found_inf
        if self.scaler.is_enabled():
            overflowed = self.scaler.overflowed(loss, grad_norm)
            skipped = found_inf + overflowed
            self.scaler.update(is_bad, overflowed)

        # Update.
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
        for part in self._local_parts():
            part.found_inf = found_inf
        for part in self.parts:
            part.step()
        return grad_norm, skipped

    def states(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """Return the state that this rank keeps of each parameter, such as AdamW's moments."""
        states = {}
        for part in self._local_parts():
            states |= part.state
        return states

    def load_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Restore a state that `states` returned. Ranks that do not keep this state ignore it."""
        for part in self._local_parts():
            if any(parameter is each for each in _parameters_of(part)):
                part.state[parameter] = state
        if self._recorded is not None:
            self._recorded.forget()

    def _clip(self) -> Tensor:
        """Clip the gradients without waiting for the device. Returns: their global norm before."""
        groups = _by_mesh(self._parameters)
        norms = []
        for group in groups:
            norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in group])
            norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        grad_norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        for group in groups:
            torch.nn.utils.clip_grads_with_norm_(group, self._grad_clip, grad_norm)
        return grad_norm

    def _drop_gradients(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def _local_parts(self) -> list[torch.optim.Optimizer]:
        """Return the optimizers that hold this rank's state: ZeRO-1 has one inside each part."""
        return [getattr(part, "optim", part) for part in self.parts]


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _parameters_of(part: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in part.param_groups for parameter in group["params"]]


def _by_mesh(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group parameters by device mesh, because PyTorch's functions accept one mesh per call."""
    groups = collections.defaultdict(list)
    for parameter in parameters:
        groups[getattr(parameter, "device_mesh", None)].append(parameter)
    return list(groups.values())
