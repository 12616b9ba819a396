"""What the ranks of a world divide of a model and its optimizer, by PyTorch's engines; see World.engine.

    ddp      DistributedDataParallel    weights and state on every rank, gradients averaged in buckets during the backward
    zero1    the same, each parameter's state on one rank only: ZeroRedundancyOptimizer
    fsdp     fully_shard, ZeRO-3        the linear maps of a block are gathered for it in the run's precision, all else once a
             pass in float32: the same precision as train/precision.py has. Gradients are summed in float32. With fewer
             shards than data ranks they are replicated (HSDP); with tensor ranks train/tensor_parallel.py divides layers

Checkpoints are whole whatever the engine, so that any other resumes them: `whole` gathers, `divide` hands out.
"""

import contextlib

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...model import GPT
from ..config import TrainConfig
from ..optim import Optimizer, check_optimizer
from ..precision import check_attention, choose_dtype
from ..run.trackers import check_trackers
from .world import World

# PyTorch's packages beyond the first are imported where they are needed: that takes them a second or more.


def choose_fitting(config: TrainConfig, world: World) -> torch.device:
    """The device of this rank. Raises: InputError on all ranks unless configuration, machine and world fit together."""

    def choose() -> torch.device:
        device = world.device(config.execution.device)
        dtype = choose_dtype(config.execution.precision, device)
        check_attention(config, device)
        check_optimizer(config, world)
        check_trackers(config)
        world.micro_batch(config)
        if world.tensor_ranks > 1:
            from .tensor_parallel import check_tensor_parallel

            check_tensor_parallel(config.gpt(vocab_size=1), dtype, world.tensor_ranks)
        return device

    device = world.run_on_all_ranks(choose)
    world.check_same_on_all_ranks("--device", device.type)
    return device


def shard(model: GPT, config: TrainConfig, world: World, *, compiled: bool) -> None:
    """Divide a model in place, where the engine is fsdp: before an optimizer is made for its parameters.

    Args:
        model: on its device, the same on every rank.
        config: precision.
        compiled: whether torch.compile makes a graph of each attention and perceptron.
    """
    if world.engine != "fsdp":
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from .tensor_parallel import shard_layers

    device = model.wte.weight.device
    mesh, dtype = world.mesh(device.type), choose_dtype(config.execution.precision, device)
    data = mesh["shards"] if mesh["replicas"].size() == 1 else mesh["replicas", "shards"]
    if world.tensor_ranks > 1:
        shard_layers(model, mesh["tensor"])
    narrow = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    wide = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    # The model casts the stream to what it finds the first weight in, which is not gathered yet.
    model.h[0].register_forward_pre_hook(
        lambda _, inputs: (inputs[0], inputs[1].to(dtype), *inputs[2:])
    )
    for block in model.h:
        parts = [block.attn, block.mlp]
        if compiled:
            for part in parts:
                # Not of the modules: what fully_shard hooks to them stays outside.
                part.forward = torch.compile(part.forward, fullgraph=True)
        fully_shard(parts, mesh=data, mp_policy=narrow, reshard_after_forward=True)
    fully_shard(model, mesh=data, mp_policy=wide, reshard_after_forward=False)


def replicate(network: nn.Module, world: World) -> nn.Module:
    """What averages gradients over ranks when it is run backward, where the engine keeps whole weights."""
    if world.engine in (None, "fsdp"):
        return network
    return DistributedDataParallel(network, gradient_as_bucket_view=True)


def micro_step(
    network: nn.Module, world: World, *, is_last: bool
) -> contextlib.AbstractContextManager:
    """Context of a micro-batch: gradients travel between ranks with a step's last one only."""
    if world.engine == "fsdp":
        network.set_requires_gradient_sync(is_last)
    elif world.engine is not None and not is_last:
        return network.no_sync()
    return contextlib.nullcontext()


def gather_weights(model: GPT, world: World) -> dict[str, Tensor]:
    """All weights by name, as a model in one process has them; with fsdp on the CPU of the first rank, empty on others."""
    if world.engine != "fsdp":
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return {
        name: _rows(name, value, model, world, together=False) for name, value in weights.items()
    }


def gather_optimizer_states(
    model: GPT, optimizer: Optimizer, world: World
) -> dict[str, dict[str, Tensor]]:
    """What the optimizer keeps of each parameter, by name; where gather_weights has weights. After it, with fsdp."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    if world.engine == "zero1":
        states = {}
        for part in optimizer.parts:
            part.consolidate_state_dict(to=0)
            if world.is_rank0:
                held = [parameter for group in part.param_groups for parameter in group["params"]]
                states |= {
                    names[held[index]]: state for index, state in part.state_dict()["state"].items()
                }
        return states
    # Before the first step there is none, and the function below would take one to make it.
    if world.engine != "fsdp" or not optimizer.states():
        return {names[parameter]: state for parameter, state in optimizer.states().items()}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    states = get_optimizer_state_dict(model, optimizer.parts, options=options).get("state", {})
    return {
        name: {
            key: _rows(name, value, model, world, together=False) for key, value in state.items()
        }
        for name, state in states.items()
    }


def scatter_weights(weights: dict[str, Tensor] | None, model: GPT, world: World) -> None:
    """Load what gather_weights gave; None on all ranks but the first."""
    if world.engine is None:
        model.load_state_dict(weights)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    weights = {
        name: _rows(name, value, model, world, together=True)
        for name, value in (weights or {}).items()
    }
    set_model_state_dict(
        model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    )


def scatter_optimizer_states(
    states: dict[str, dict[str, Tensor]] | None, model: GPT, optimizer: Optimizer, world: World
) -> None:
    """Load what gather_optimizer_states gave; None on all ranks but the first."""
    kinds = world.on_rank0(
        lambda: {
            name: {key: (value.shape, value.dtype) for key, value in state.items()}
            for name, state in states.items()
        }
    )
    if not kinds:
        return
    if world.engine in (None, "zero1"):
        for name, parameter in model.named_parameters():
            state = {}
            for key, (shape, dtype) in kinds.get(name, {}).items():
                # A copy: safetensors' tensors are views of the file's bytes, and 0-dimensional ones may be unaligned.
                state[key] = torch.empty(shape, dtype=dtype, device=parameter.device)
                if world.is_rank0:
                    state[key].copy_(states[name][key])
                if world.size > 1:
                    dist.broadcast(state[key], src=0)
            optimizer.load_state(parameter, state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    names = {parameter: name for name, parameter in model.named_parameters()}
    content = {}
    if world.is_rank0:
        groups = [group for part in optimizer.parts for group in part.param_groups]
        content = {
            "state": {
                name: {
                    key: _rows(name, value, model, world, together=True)
                    for key, value in state.items()
                }
                for name, state in states.items()
            },
            "param_groups": [
                {"params": [names[parameter] for parameter in group["params"]]} for group in groups
            ],
        }
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(model, optimizer.parts, content, options=options)


def _rows(name: str, value: Tensor, model: GPT, world: World, *, together: bool) -> Tensor:
    """The rows of c_attn in the order in which tensor ranks have theirs together, or back in a checkpoint's."""
    if world.tensor_ranks == 1 or ".c_attn." not in name or value.ndim == 0:
        return value
    from .tensor_parallel import row_order

    rows = row_order(model.config, world.tensor_ranks)
    return value[rows if together else rows.argsort()]
