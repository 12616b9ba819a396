"""Tensor parallelism: ranks that compute each layer together.

    per rank         some heads of each attention, and some hidden columns of each MLP
    rows divided     c_attn: queries, keys and values of the rank's heads, with their biases;
                     c_fc, c_gate: the rank's hidden columns
    columns divided  c_proj: the columns that read the rank's heads or hidden columns
    communication    per attention and MLP: the forward sums outputs, the backward sums gradients of
                     inputs, and of the gains of QK-norm
    on every rank    norms, embeddings, head and the bias of c_proj. Tensor rank 0 adds the bias.
                     The gradients of these parameters are equal on all ranks

Weights are DTensors over the tensor ranks. Operators run on a rank's part of them.

Source     Shoeybi et al. 2019, arXiv:1909.08053
"""

import copy
import functools

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.func import functional_call

from ...errors import InputError
from ...model import GPT, GPTConfig
from ...model.layers import Branch

# Dimension of each linear layer's weight that is divided over ranks: 0 (outputs) or 1 (inputs).
_DIVIDED_DIM = {"c_attn": 0, "c_fc": 0, "c_gate": 0, "c_proj": 1}


def check_tensor_parallel(config: GPTConfig, dtype: torch.dtype, ranks: int) -> None:
    """Raise InputError if heads or columns are not divisible by `ranks`, or for float16."""
    sizes = {
        "heads": config.n_head,
        "key and value heads": config.kv_heads,
        "columns": config.d_feedforward,
    }
    for name, size in sizes.items():
        if size % ranks:
            raise InputError(
                f"tensor_parallel: expected a divisor of the {size} {name} of a block, got {ranks}"
            )
    if dtype == torch.float16:
        # LossScale.unscale changes all gradients in one call, which PyTorch allows for one mesh.
        raise InputError(
            "tensor_parallel: expected `precision` bfloat16 or float32 with it, got float16"
        )


def shard_layers(model: GPT, mesh: DeviceMesh) -> None:
    """Keep this rank's part of every block, in place.

    Args:
        model: the same on every rank.
        mesh: the tensor ranks, one dimension.
    """
    rows = row_order(model.config, mesh.size()).to(model.wte.weight.device)
    for block in model.h:
        for layer in (block.attn, block.mlp):
            local = copy.deepcopy(layer).to("meta")
            if layer is block.attn:
                local.n_head = layer.n_head // mesh.size()
                local.kv_heads = layer.kv_heads // mesh.size()
                local.tensor_rank = mesh.get_local_rank()
            for name, linear in layer.named_children():
                if name in _DIVIDED_DIM:
                    _shard_linear(linear, name, rows, mesh)
            layer.forward = functools.partial(_forward, layer, local, mesh)


def row_order(config: GPTConfig, ranks: int) -> Tensor:
    """Return the rows of c_attn, reordered so that the rows of each rank are together.

    c_attn has all queries, then all keys, then all values.

    Returns: ((H + 2 G) K,) int64.
    """
    num_heads = config.n_head + 2 * config.kv_heads
    heads = torch.arange(num_heads * config.head_size).view(num_heads, config.head_size)
    q, k, v = heads.split((config.n_head, config.kv_heads, config.kv_heads))
    parts = zip(q.chunk(ranks), k.chunk(ranks), v.chunk(ranks), strict=True)
    return torch.cat([rows for part in parts for rows in part]).flatten()


def _shard_linear(linear: nn.Module, name: str, rows: Tensor, mesh: DeviceMesh) -> None:
    for key, parameter in list(linear.named_parameters()):
        if name == "c_proj" and key == "bias":
            continue
        complete = parameter.detach()
        if name == "c_attn":
            complete = complete[rows]
        # src_data_rank=None: each rank has the complete tensor, so ranks send nothing.
        part = distribute_tensor(complete, mesh, [Shard(_DIVIDED_DIM[name])], src_data_rank=None)
        setattr(linear, key, nn.Parameter(part))


def _forward(layer: nn.Module, local: nn.Module, mesh: DeviceMesh, x: Tensor, *rest) -> Branch:
    """Run `local`, a module of this rank's sizes, with this rank's part of `layer`'s parameters.

    x and the result are the same on all ranks.
    """
    parameters = {}
    for name, value in layer.named_parameters():
        if isinstance(value, DTensor):
            parameters[name] = value.to_local()
        elif not name.endswith("bias"):
            parameters[name] = _sum_gradient(value, mesh)
        elif mesh.get_local_rank() == 0:
            parameters[name] = value
        else:
            # The value is 0, because tensor rank 0 adds the bias. The gradient is as on that rank.
            parameters[name] = value - value.detach()
    y, added_bias = functional_call(local, parameters, (_sum_gradient(x, mesh), *rest))
    y = DTensor.from_local(y, mesh, [Partial()], run_check=False)
    return Branch(y.redistribute(placements=[Replicate()]).to_local(), added_bias)


def _sum_gradient(value: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return `value`, which is the same on all ranks. Its gradient is the sum over ranks."""
    everywhere = DTensor.from_local(value, mesh, [Replicate()], run_check=False)
    return everywhere.to_local(grad_placements=[Partial()])
