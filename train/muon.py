"""Muon, which can skip a step on the device.

    momentum   B <- B + (1 - momentum) (gradient - B)
    update     O = orthogonalized(gradient + momentum (B - gradient))
    weights    W <- W - lr decay W - lr 0.2 sqrt(max(rows, columns)) O

torch.optim.Muon computes the same, up to rounding, and cannot skip a step without waiting for the
device. Both changes are written here as steps of torch._fused_sgd_, which changes nothing if
found_inf is 1.
"""

import torch
from torch import Tensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz


class Muon(torch.optim.Muon):
    """torch.optim.Muon with AdamW's attribute `found_inf`.

    Attributes:
        found_inf: () float32 on the device of the parameters. 1: `step` changes neither weights nor
            momentum. None: no step is skipped.
    """

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update the weights from their gradients. `closure` is not supported."""
        for group in self.param_groups:
            parameters, gradients, buffers = [], [], []
            self._init_group(group, parameters, gradients, buffers)
            momentum = group["momentum"]

            # B -= (1 - momentum) (B - gradient): the gradient is subtracted, and B decays by 1.
            if buffers:
                self._descend(buffers, gradients, lr=1 - momentum, decay=1.0, maximize=True)

            for parameter, gradient, buffer in zip(parameters, gradients, buffers, strict=True):
                update = gradient.lerp(buffer, momentum) if group["nesterov"] else buffer
                options = (group["ns_coefficients"], group["ns_steps"], group["eps"])
                update = _zeropower_via_newtonschulz(update, *options)
                # It can be a transposed view. _fused_sgd_ needs the layout of the parameter.
                update = update.to(parameter.dtype).contiguous()
                # The update is scaled, not the learning rate, which can be a tensor.
                update *= _adjust_lr(1.0, group["adjust_lr_fn"], parameter.shape)
                decay = group["weight_decay"]
                self._descend([parameter], [update], lr=group["lr"], decay=decay)

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
            values,
            gradients,
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
