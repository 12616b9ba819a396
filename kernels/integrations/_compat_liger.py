"""Losses and norms under the signatures of Liger Kernel's modules; see compat.py."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from ..core.op import public
from ..loss.cross_entropy import cross_entropy
from ..loss.linear_cross_entropy import linear_cross_entropy
from ..loss.options import LossOptions
from ..norm.layer_norm import layer_norm
from ..norm.rms_norm import rms_norm
from ._compat_attention import check_default


@dataclass
class CrossEntropyOutput:
    """Results of a loss that was asked for more than the loss. Others are None."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


def _options(
    ignore_index: int,
    lse_square_scale: float,
    label_smoothing: float,
    reduction: str,
    softcap: float | None,
) -> LossOptions:
    """Return options of Liger's losses as those of our operators."""
    return LossOptions(
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=lse_square_scale,
        softcap=softcap or 0.0,
        reduction=reduction,
    )


class _Loss(nn.Module):
    """The common part of both losses. Subclasses call `_set`."""

    def _set(
        self,
        options: LossOptions,
        return_z_loss: bool,
        return_token_accuracy: bool,
        return_predicted_tokens: bool,
    ) -> None:
        """Check the options and store them."""
        name = type(self).__name__
        check_default(name, return_predicted_tokens=(return_predicted_tokens, False))
        options.check(name, z_loss_label="lse_square_scale")
        if return_token_accuracy and options.reduction == "none":
            raise ValueError(
                f"{name}: return_token_accuracy needs reduction 'mean' or 'sum', got 'none'"
            )
        self.options = options
        self.return_z_loss = return_z_loss
        self.return_token_accuracy = return_token_accuracy

    def _compute(self, function, target: Tensor, *args) -> Tensor | CrossEntropyOutput:
        """Call an operator. Convert its results."""
        found = function(
            *args,
            **asdict(self.options),
            return_lse=self.return_z_loss,
            return_correct=self.return_token_accuracy,
        )
        if not (self.return_z_loss or self.return_token_accuracy):
            return found
        loss, *rest = found
        output = CrossEntropyOutput(loss=loss)
        count = (target != self.options.ignore_index).sum().clamp(min=1)
        if self.return_z_loss:
            rows = self.options.z_loss * rest[0].square()  # rest[0] is lse
            sums = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / count}
            output.z_loss = sums[self.options.reduction]
        if self.return_token_accuracy:
            output.token_accuracy = rest[-1] / count  # rest[-1] is correct
        return output


class LigerCrossEntropyLoss(_Loss):
    """Replace liger_kernel.transformers.LigerCrossEntropyLoss.

    The loss is float32, and 0 if all rows are ignored. The logits are not modified.

    Args:
        weight: must be None.
        lse_square_scale: weight of the z-loss.
        return_z_loss, return_token_accuracy: return a CrossEntropyOutput. The accuracy counts a row
            as right if no logit is above its target's; reduction must then be "mean" or "sum".
        return_predicted_tokens: must be False.
        ignore_index, label_smoothing, reduction, softcap: as for cross_entropy.
    Raises: ValueError for an option that is not supported.
    """

    @public
    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ):
        super().__init__()
        check_default("LigerCrossEntropyLoss", weight=(weight, None))
        options = _options(ignore_index, lse_square_scale, label_smoothing, reduction, softcap)
        self._set(options, return_z_loss, return_token_accuracy, return_predicted_tokens)

    def forward(self, _input: Tensor, target: Tensor) -> Tensor | CrossEntropyOutput:
        """Return the loss of logits (..., V) and targets (...)."""
        return self._compute(cross_entropy, target, _input, target)


class LigerFusedLinearCrossEntropyLoss(_Loss):
    """Replace liger_kernel.transformers.LigerFusedLinearCrossEntropyLoss.

    Args:
        ce_weight: must be None.
        accum_dtype: None or float32. Gradients are always accumulated in float32.
        use_token_scaling: must be False.
        other arguments: as for LigerCrossEntropyLoss.
    Raises: ValueError for an option that is not supported.
    """

    @public
    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ):
        super().__init__()
        name = "LigerFusedLinearCrossEntropyLoss"
        check_default(name, ce_weight=(ce_weight, None))
        check_default(name, use_token_scaling=(use_token_scaling, False))
        if accum_dtype not in (None, torch.float32):
            raise ValueError(f"{name}: accum_dtype must be None or float32, got {accum_dtype}")
        options = _options(ignore_index, lse_square_scale, label_smoothing, reduction, softcap)
        self._set(options, return_z_loss, return_token_accuracy, return_predicted_tokens)

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        """Return the loss of the logits _input @ lin_weight.T + bias and targets (...)."""
        return self._compute(linear_cross_entropy, target, _input, lin_weight, target, bias)


def _check_norm(name: str, hidden_size: int, eps: float) -> None:
    """Raise a ValueError for a bad size or eps."""
    if hidden_size < 1:
        raise ValueError(f"{name}: hidden_size must be at least 1, got {hidden_size}")
    if not eps >= 0:
        raise ValueError(f"{name}: eps must be at least 0, got {eps}")


def _initial(name: str, init_fn: str, size: int) -> nn.Parameter:
    if init_fn not in ("ones", "zeros"):
        raise ValueError(f"{name}: init_fn must be 'ones' or 'zeros', got {init_fn!r}")
    return nn.Parameter(torch.ones(size) if init_fn == "ones" else torch.zeros(size))


class LigerLayerNorm(nn.Module):
    """Replace liger_kernel.transformers.LigerLayerNorm.

    Args:
        hidden_size: N.
        eps: added to the variance.
        bias: initial value of the bias: random if True, else 0. There is a bias in both cases.
        init_fn: initial value of the weight, "ones" or "zeros".
        impl, mode, backend: must be None.
    Raises: ValueError for an option that is not supported.
    """

    @public
    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        bias: bool = False,
        init_fn: str = "ones",
        impl: str | None = None,
        mode: str | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        name = "LigerLayerNorm"
        check_default(name, impl=(impl, None), mode=(mode, None), backend=(backend, None))
        _check_norm(name, hidden_size, eps)
        self.hidden_size = hidden_size
        self.eps = self.variance_epsilon = eps
        self.weight = _initial(name, init_fn, hidden_size)
        self.bias = nn.Parameter(torch.randn(hidden_size) if bias else torch.zeros(hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalize the last axis of hidden_states (..., N)."""
        return layer_norm(hidden_states, self.weight, self.bias, eps=self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}"


class LigerRMSNorm(nn.Module):
    """Replace liger_kernel.transformers.LigerRMSNorm.

    Args:
        hidden_size: N.
        eps: added to the mean square.
        offset: added to the weight in the forward.
        casting_mode: "llama" or "gemma". Both round once, as Liger's "gemma".
        init_fn: initial value of the weight, "ones" or "zeros".
        in_place: has no effect. The incoming gradient is never overwritten.
        row_mode: must be None.
        elementwise_affine: whether there is a weight.
    Raises: ValueError for an option that is not supported.
    """

    @public
    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        offset: float = 0.0,
        casting_mode: str = "llama",
        init_fn: str = "ones",
        in_place: bool = True,
        row_mode: bool | None = None,
        elementwise_affine: bool = True,
    ):
        super().__init__()
        name = "LigerRMSNorm"
        check_default(name, row_mode=(row_mode, None))
        _check_norm(name, hidden_size, eps)
        if casting_mode not in ("llama", "gemma"):
            raise ValueError(
                f"{name}: casting_mode must be 'llama' or 'gemma', got {casting_mode!r}"
            )
        self.elementwise_affine = elementwise_affine
        self.variance_epsilon = eps
        self.offset = offset
        weight = _initial(name, init_fn, hidden_size)
        self.register_parameter("weight", weight if elementwise_affine else None)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalize the last axis of hidden_states (..., N)."""
        weight = self.weight
        if weight is not None and self.offset:
            # In at least float32: in 16 bits the sum would be rounded.
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.offset
        return rms_norm(hidden_states, weight, eps=self.variance_epsilon)

    def extra_repr(self) -> str:
        shape = None if self.weight is None else tuple(self.weight.shape)
        return f"weight_shape={shape}, eps={self.variance_epsilon}, offset={self.offset}"
