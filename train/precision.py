"""The precision of a run, and the working copy that computes in it.

    masters        float32 weights: the optimizer changes them, checkpoints hold them
    working copy   the model that computes. The weights of its linear layers are copies in the run's
                   dtype, cast once per step. Its other parameters are the masters themselves.
                   Activations have the run's dtype
    float32        weights of norms, both embeddings and their sum, statistics, losses, sums in
                   matmuls, gradients of masters

A backward leaves a 16-bit gradient on each cast weight. A hook adds it to the float32 gradient of
the master.

Cost       bytes per weight of a linear layer, with 16-bit copies:
             working copy      per step: 6 to cast (read 4, write 2)
                               per micro-batch: 10 to add the gradient (read 2 and 4, write 4)
             torch.autocast    per micro-batch: 24 (6 to cast, 6 to widen a gradient, 12 to add it)
           For the 85 million weights in the blocks of GPT-2 this saves 1.2 GB per micro-batch.
           torch.autocast would also keep the residual stream in float32: 32 D bytes more per token
           and block. The head shares its float32 weight with the embedding. linear_cross_entropy
           casts it in each micro-batch, and its gradient is not rounded to 16 bits.

fully_shard needs no working copy: it casts the weights when it gathers them.
float16 overflows where bfloat16 does not, so its losses are scaled: see optimizer/bad_steps.py.
"""

import copy
import functools
from collections.abc import Iterator

import torch
from torch import nn

from ..errors import InputError


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matmuls for a name in PRECISIONS (choices.py).

    auto: bfloat16 on CUDA, float16 on a GPU without bfloat16, float32 on other devices.

    Raises: InputError for bfloat16 on a GPU that does not support it.
    """
    # PyTorch can emulate bfloat16. That is slow, and Triton cannot.
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bfloat16" and not has_bfloat16:
        raise InputError(
            "precision: expected float16 or float32 on this GPU, which has no bfloat16; "
            "leave the option out"
        )
    if precision != "auto":
        return getattr(torch, precision)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if has_bfloat16 else torch.float16


def working_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of `model` whose linear layers have weights cast to `dtype`.

    All other parameters are shared. Gradients of cast weights are added to those of `model`.
    float32: the model itself.
    """
    if dtype == torch.float32:
        return model
    copies = {id(parameter): parameter for parameter in model.parameters()}
    for master in linear_parameters(model):
        narrow = nn.Parameter(master.detach().to(dtype), requires_grad=master.requires_grad)
        if master.requires_grad:
            narrow.register_post_accumulate_grad_hook(functools.partial(_add_gradient, master))
        copies[id(master)] = narrow
    working = copy.deepcopy(model, copies)
    working.compute_dtype = dtype
    return working


def refresh(working: nn.Module, model: nn.Module, *, trained_only: bool = False) -> None:
    """Cast the weights of `model` into its working copy again, after they changed.

    Args: trained_only: leave out frozen weights, which a step does not change.
    """
    if working is model:
        return
    pairs = [
        (narrow, master)
        for narrow, master in zip(working.parameters(), model.parameters(), strict=True)
        if narrow is not master and (master.requires_grad or not trained_only)
    ]
    if not pairs:
        return
    narrow, masters = zip(*pairs, strict=True)
    with torch.no_grad():
        torch._foreach_copy_(narrow, masters)


def linear_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield weights and biases of linear layers: modules with a 2D weight, except embeddings."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        is_matrix = weight is not None and weight.ndim == 2
        if is_matrix and not isinstance(module, nn.Embedding):
            yield from module.parameters(recurse=False)


def _add_gradient(master: nn.Parameter, narrow: nn.Parameter) -> None:
    if master.grad is None:
        master.grad = narrow.grad.to(master.dtype)
    else:
        master.grad += narrow.grad
    narrow.grad = None
