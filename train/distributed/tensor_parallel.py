"""Layers computed by several ranks together: each has some heads of every attention and some columns of every perceptron.

    rows of a rank       c_attn: queries, keys and values of its heads, with their biases    c_fc, c_gate: its hidden columns
    columns of a rank    c_proj: those that read its heads or hidden columns; what ranks compute is added up
    communication        input of a sub-layer: gradients are summed backward     output: summed forward
    on every rank        norms, embeddings, head, biases of c_proj (added by one rank); gradients come out equal

Weights are DTensors over the tensor ranks; operators run on what a rank has of them.

Source     Shoeybi et al. 2019, arXiv:1909.08053
"""

import copy
import functools
import warnings

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.func import functional_call

from ...errors import InputError
from ...model import GPT, GPTConfig

# The dimension of each linear map's weight that is divided: 0, its outputs, or 1, its inputs.
_DIVIDED = {"c_attn": 0, "c_fc": 0, "c_gate": 0, "c_proj": 1}


def check_tensor_parallel(config: GPTConfig, dtype: torch.dtype, ranks: int) -> None:
    """Raise InputError if heads or hidden columns do not divide by the ranks, or the precision is float16."""
    for what, size in (
        ("heads", config.n_head),
        ("key and value heads", config.kv_heads),
        ("columns", config.d_feedforward),
    ):
        if size % ranks:
            raise InputError(
                f"--tensor-parallel: expected a divisor of the {size} {what} of a block, got {ranks}"
            )
    if dtype == torch.float16:
        # PyTorch's scaler looks for overflows in gradients on one mesh only.
        raise InputError(
            "--tensor-parallel: expected `precision` bfloat16 or float32 with it, got float16"
        )


def shard_layers(model: GPT, mesh: DeviceMesh) -> None:
    """Leave in a model, in place, this rank's part of every block.

    Args:
        model: the same on every rank.
        mesh: of the ranks, one dimension.
    """
    # It warns of outputs that something may write to; nothing does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    rows = row_order(model.config, mesh.size()).to(model.wte.weight.device)
    for block in model.h:
        for part in (block.attn, block.mlp):
            own = copy.deepcopy(part).to("meta")
            if part is block.attn:
                own.n_head, own.kv_heads = part.n_head // mesh.size(), part.kv_heads // mesh.size()
            for name, linear in part.named_children():
                for key, parameter in list(linear.named_parameters()):
                    if name == "c_proj" and key == "bias":
                        continue
                    whole = parameter.detach()[rows] if name == "c_attn" else parameter.detach()
                    # No rank sends anything: each has the whole.
                    mine = distribute_tensor(
                        whole, mesh, [Shard(_DIVIDED[name])], src_data_rank=None
                    )
                    setattr(linear, key, nn.Parameter(mine))
            part.forward = functools.partial(_forward, part, own, mesh)


def row_order(config: GPTConfig, ranks: int) -> Tensor:
    """Rows of c_attn, which are queries before keys before values, with each rank's together: ((H + 2G) K,) int64."""
    heads = torch.arange((config.n_head + 2 * config.kv_heads) * config.head_size).view(
        -1, config.head_size
    )
    parts = [
        part.chunk(ranks) for part in heads.split((config.n_head, config.kv_heads, config.kv_heads))
    ]
    return torch.cat([part[rank] for rank in range(ranks) for part in parts]).flatten()


def _forward(part: nn.Module, own: nn.Module, mesh: DeviceMesh, x: Tensor, *rest) -> Tensor:
    """Run `own`, a module of this rank's sizes, with its share of the parameters of `part`; x and the result: on all ranks."""
    is_rank0 = mesh.get_local_rank() == 0
    # The other ranks' biases are zero, but with a gradient: that of an output which all of them have.
    mine = {
        name: value.to_local()
        if isinstance(value, DTensor)
        else value
        if is_rank0
        else value - value.detach()
        for name, value in part.named_parameters()
    }
    x = DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(
        grad_placements=[Partial()]
    )
    y = functional_call(own, mine, (x, *rest))
    return (
        DTensor.from_local(y, mesh, [Partial()], run_check=False)
        .redistribute(placements=[Replicate()])
        .to_local()
    )
