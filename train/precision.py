"""In what precision a run computes: one place that decides, and the copy of the weights that it computes with.

    weights      float32, in the model that optimizers change and checkpoints hold: the masters
    blocks       in the run's dtype: the linear maps of a working copy have it, cast from the masters once a step, and so have
                 all activations, the residual stream among them
    float32      gains and biases of norms, embeddings until their sum enters the blocks, statistics, losses, what products sum,
                 the sum of gradients over micro-batches

torch.autocast would keep the stream in float32, 32 D bytes a token and block more to move, and cast each weight anew in each
micro-batch, 6 bytes a number to read and write, widen its gradient, 6, and add that to the sum, 12: neither compiled code nor
tritium's operators use autocast's own cache. Here a micro-batch adds the narrow gradient to the float32 sum, 10, and the 6 are
paid once a step: for the 85 million weights of GPT-2's blocks 1.2 GB less a micro-batch. The head shares its weight with the
embedding, whose gradient is better summed in float32: it is cast in each micro-batch.

Several ranks have no working copy, as their engines know the masters only. fully_shard casts what it gathers, once a pass;
with DistributedDataParallel each pass casts all, at autocast's price. Losses and gradients are the same.

float16 overflows where bfloat16 does not, so its losses are scaled: see train/optim.py.
"""

import copy
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import InputError
from ..model.attention import choose_attention

if TYPE_CHECKING:
    from .config import TrainConfig

# What the option `precision` may be: the dtype of matmuls. "auto" depends on the device.
PRECISIONS = ("auto", "float32", "bfloat16", "float16")


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of products: as named, or for auto bfloat16 on CUDA, float16 on a GPU without it, float32 elsewhere.

    Raises: InputError for bfloat16 on a GPU that has none.
    """
    # Without emulation, which is slow and which Triton does not have.
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        precision = (
            "float32" if device.type != "cuda" else "bfloat16" if has_bfloat16 else "float16"
        )
    if precision == "bfloat16" and not has_bfloat16:
        raise InputError(
            "precision: expected float16 or float32 on this GPU, which has no bfloat16; leave the option out"
        )
    return getattr(torch, precision)


def check_attention(config: "TrainConfig", device: torch.device) -> None:
    """Raise InputError if --attention is not installed, or cannot compute on this device in the run's precision."""
    dtype = choose_dtype(config.execution.precision, device)
    try:
        row = choose_attention(config.execution.attention)
    except ValueError as error:
        raise InputError(str(error)) from None
    if row.needs == "flash_attn" and not (device.type == "cuda" and dtype.itemsize == 2):
        raise InputError(
            f"attention: expected a GPU and 16 bits for flash-attn, got {device.type} and {dtype}; take tritium or sdpa"
        )


def working_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A model that computes with the weights of `model`, those of its linear maps in `dtype`; float32: the model itself.

    All other parameters are shared. What a backward finds for a narrow parameter is added, in float32, to the gradient of the
    one it was made of.
    """
    if dtype == torch.float32:
        return model
    copies = {id(parameter): parameter for parameter in model.parameters()}
    for parameter in linear_parameters(model):
        narrow = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
        if parameter.requires_grad:
            narrow.register_post_accumulate_grad_hook(functools.partial(_add_gradient, parameter))
        copies[id(parameter)] = narrow
    return copy.deepcopy(model, copies)


def refresh(working: nn.Module, model: nn.Module) -> None:
    """Cast the weights of `model` into its working copy again, after a change."""
    if working is model:
        return
    pairs = zip(working.parameters(), model.parameters(), strict=True)
    narrow, wide = zip(*((mine, other) for mine, other in pairs if mine is not other), strict=True)
    with torch.no_grad():
        torch._foreach_copy_(narrow, wide)


def narrowed(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A model on the parameters of `model` that computes as its working copy would: each pass casts weights where it uses them.

    Not all at its start: autograd would cast their gradients back after everything else, and engines could only then send them.
    """
    lazy = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for module in [module for module in lazy.modules() if _is_linear(module)]:
        for name, _ in list(module.named_parameters(recurse=False)):
            parametrize.register_parametrization(module, name, _Cast(dtype), unsafe=True)
    return lazy


class _Cast(nn.Module):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self._dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self._dtype)


def linear_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Weights and biases of all linear maps: of modules with a matrix, but embeddings."""
    for module in filter(_is_linear, model.modules()):
        yield from module.parameters(recurse=False)


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def _add_gradient(wide: nn.Parameter, narrow: nn.Parameter) -> None:
    if wide.grad is None:
        wide.grad = narrow.grad.to(wide.dtype)
    else:
        wide.grad += narrow.grad
    narrow.grad = None
