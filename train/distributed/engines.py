"""How ranks share a model and its optimizer: one class per row of ENGINES in train/choices.py.

    single   SingleProcess   one process has everything
    ddp      DDP             each rank has all weights and optimizer state; gradients are averaged
    zero1    ZeRO1           the same, but each parameter's optimizer state is on one rank
    fsdp     FSDP            ranks divide weights, gradients and state (fully_shard, ZeRO-3). With
                             fewer shards than data ranks the shards are replicated (HSDP); with
                             tensor ranks tensor_parallel.py also divides the layers

All engines compute in the same precision (train/precision.py) and average gradients in float32.
Checkpoints do not depend on the engine: gather_* returns complete tensors, scatter_* takes them, so
any engine resumes a run of any other.
"""

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...model import GPT, GPTConfig
from ..precision import refresh, working_copy
from .buckets import GradientBuckets

# PyTorch's packages for FSDP and ZeRO are imported where they are used: each takes a second.
if TYPE_CHECKING:
    from ..execution import Execution
    from ..optim import Optimizer

Weights = dict[str, Tensor]
"""Complete weights by parameter name."""
States = dict[str, dict[str, Tensor]]
"""Complete optimizer state by parameter name and key."""


class SingleProcess:
    """A model in one process. The other engines override what differs.

    Args:
        model: float32, on its device, the same on every rank. FSDP divides it in place.
        execution: how the run executes.
    Attributes:
        model: the masters, which the optimizer changes.
        working: the model that computes, the masters themselves or a copy in the run's dtype.
            Evaluations and samples call it uncompiled, because their sizes vary.
        network: `working`, compiled if the run is. Training calls it.
    """

    shards_weights = False
    """Whether the launch may choose shards and tensor ranks."""
    shards_memory = False
    """Whether a rank needs less memory than a single process."""
    gathers_copies = False
    """Whether the gather_* methods return new tensors, not those that the next step changes."""

    can_shard_checkpoints = False
    """Whether each rank can write and read its part of a checkpoint."""

    can_use_cuda_graph = True
    """Whether micro-batches can be recorded as a CUDA graph."""
    can_record_update = True
    """Whether a CUDA graph can hold the optimizer's update: ranks do not communicate in it."""

    def __init__(self, model: GPT, execution: "Execution"):
        self.model = model
        self.execution = execution
        self.world = execution.world
        self.working = self._prepare()
        self.network = self._compile() if execution.is_compiled else self.working

    @staticmethod
    def check(config: GPTConfig, execution: "Execution") -> None:
        """Raise InputError if the engine does not support the model or its precision."""

    def _prepare(self) -> nn.Module:
        """Distribute the model. Returns: the model that computes."""
        return working_copy(self.model, self.execution.dtype)

    def _compile(self) -> nn.Module:
        return torch.compile(self.working, fullgraph=True)

    # --- a training step

    def begin_step(self) -> None:
        """Prepare for the first micro-batch of a step."""

    @property
    def can_record(self) -> bool:
        """Whether a CUDA graph can hold the next micro-batch: ranks do not communicate in it."""
        return True

    def begin_micro_step(self, *, is_last: bool) -> None:
        """Prepare for a backward. Only the last one of a step communicates gradients."""
        self.world.mark()

    def finish_gradients(self) -> None:
        """Wait until the gradients of the masters are averages over ranks."""

    def refresh_working(self, *, trained_only: bool = False) -> None:
        """Copy the masters into `working` again, after they changed; see `refresh`."""
        refresh(self.working, self.model, trained_only=trained_only)

    def make_optimizer(
        self, optimizer: type[torch.optim.Optimizer], groups: list[dict], **options: Any
    ) -> torch.optim.Optimizer:
        """Return one of PyTorch's optimizers for groups of masters."""
        return optimizer(groups, **options)

    # --- complete tensors; all ranks must call these

    def complete_model(self) -> GPT | None:
        """Return a model that rank 0 can call alone, until the next update; None on other ranks."""
        return self.working if self.world.is_rank0 else None

    def gather_weights(self) -> Weights:
        """Return the complete weights. FSDP: on the CPU of rank 0; {} on other ranks."""
        return self.model.state_dict()

    def scatter_weights(self, weights: Weights | None) -> None:
        """Load complete weights. Rank 0 passes them, other ranks may pass None."""
        self.model.load_state_dict(weights)
        self.refresh_working()

    def gather_optimizer_states(self, optimizer: "Optimizer") -> States:
        """Return the complete optimizer state. ZeRO1, FSDP: on rank 0; {} on other ranks."""
        names = self._names()
        return {names[parameter]: state for parameter, state in optimizer.states().items()}

    def scatter_optimizer_states(self, states: States | None, optimizer: "Optimizer") -> None:
        """Load a complete optimizer state. Rank 0 passes it, other ranks may pass None."""
        layout = self._layout(states)
        for name, parameter in self.model.named_parameters():
            state = {}
            for key, (shape, dtype) in layout.get(name, {}).items():
                # A copy, because tensors read from a file are views of its bytes, maybe unaligned.
                state[key] = torch.empty(shape, dtype=dtype, device=parameter.device)
                if self.world.is_rank0:
                    state[key].copy_(states[name][key])
                self.world.broadcast(state[key])
            if state:
                optimizer.load_state(parameter, state)

    def _layout(self, states: States | None) -> dict[str, dict[str, tuple]]:
        """Return shape and dtype of each tensor of rank 0's states, on all ranks."""
        return self.world.on_rank0(
            lambda: {
                name: {key: (value.shape, value.dtype) for key, value in state.items()}
                for name, state in states.items()
            }
        )

    def _names(self) -> dict[nn.Parameter, str]:
        return {parameter: name for name, parameter in self.model.named_parameters()}


class DDP(SingleProcess):
    """All weights on each rank. The last backward of a step averages gradients, in buckets."""

    def _prepare(self) -> nn.Module:
        # Nodes with different versions of a library may have drawn different weights.
        self._broadcast_weights()
        working = super()._prepare()
        trained = [each for each in self.model.parameters() if each.requires_grad]
        self._buckets = GradientBuckets(trained, self.world.size)
        self._is_last = False
        # On the working copy the hook that adds to the master's gradient runs before this one.
        for parameter, master in zip(working.parameters(), self.model.parameters(), strict=True):
            if master.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda _, master=master: self._gradient_added(master)
                )
        return working

    def begin_step(self) -> None:
        self._buckets.begin_step()

    @property
    def can_record(self) -> bool:
        return not self._is_last

    def begin_micro_step(self, *, is_last: bool) -> None:
        super().begin_micro_step(is_last=is_last)
        self._is_last = is_last
        if is_last:
            self._buckets.begin_last_backward()

    def finish_gradients(self) -> None:
        self._buckets.finish()

    def scatter_weights(self, weights: Weights | None) -> None:
        if self.world.is_rank0:
            self.model.load_state_dict(weights)
        self._broadcast_weights()
        self.refresh_working()

    def _broadcast_weights(self) -> None:
        for parameter in self.model.parameters():
            self.world.broadcast(parameter.detach())

    def _gradient_added(self, master: nn.Parameter) -> None:
        if self._is_last:
            self._buckets.gradient_added(master)


class ZeRO1(DDP):
    """DDP, with the optimizer state of each parameter on one rank: ZeroRedundancyOptimizer."""

    shards_memory = True
    can_record_update = False

    def make_optimizer(
        self, optimizer: type[torch.optim.Optimizer], groups: list[dict], **options: Any
    ) -> torch.optim.Optimizer:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(groups, optimizer_class=optimizer, **options)

    def gather_optimizer_states(self, optimizer: "Optimizer") -> States:
        names = self._names()
        states = {}
        for part in optimizer.parts:
            with self.world.patient():
                part.consolidate_state_dict(to=0)
            if self.world.is_rank0:
                parameters = [each for group in part.param_groups for each in group["params"]]
                for index, state in part.state_dict()["state"].items():
                    states[names[parameters[index]]] = state
        return states


class FSDP(SingleProcess):
    """Weights, gradients and optimizer state divided among ranks: fully_shard.

    Attention and the MLP of a block are gathered in the run's dtype when the block runs. All other
    parameters are gathered once per pass, in float32.
    """

    shards_weights = True
    shards_memory = True
    gathers_copies = True
    can_use_cuda_graph = False

    @property
    def can_shard_checkpoints(self) -> bool:
        """Not with tensor ranks, which store the rows of attention in another order."""
        return self.world.tensor_ranks == 1

    @staticmethod
    def check(config: GPTConfig, execution: "Execution") -> None:
        if execution.world.tensor_ranks > 1:
            from .tensor_parallel import check_tensor_parallel

            check_tensor_parallel(config, execution.dtype, execution.world.tensor_ranks)

    def _prepare(self) -> nn.Module:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        # fully_shard warns of outputs that are views, in case something writes to them. No code
        # here does.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        model = self.model
        self._empty = _empty_copy(model)
        mesh = self.world.mesh(self.execution.device.type)
        has_replicas = self.world.data_ranks > self.world.shard_ranks
        data = mesh["replicas", "shards"] if has_replicas else mesh["shards"]
        if self.world.tensor_ranks > 1:
            from .tensor_parallel import shard_layers

            shard_layers(model, mesh["tensor"])

        model.compute_dtype = self.execution.dtype
        # Activations have the run's dtype already. The tables of RoPE stay float32.
        narrow = MixedPrecisionPolicy(
            param_dtype=self.execution.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        wide = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for block in model.h:
            layers = [block.attn, block.mlp]
            if self.execution.is_compiled:
                # Compile forwards, not modules, to keep fully_shard's hooks outside of the graphs.
                for layer in layers:
                    layer.forward = torch.compile(layer.forward, fullgraph=True)
            fully_shard(layers, mesh=data, mp_policy=narrow, reshard_after_forward=True)
        fully_shard(model, mesh=data, mp_policy=wide, reshard_after_forward=False)
        return model

    def _compile(self) -> nn.Module:
        """Return the model itself: its layers are compiled already."""
        return self.working

    def begin_micro_step(self, *, is_last: bool) -> None:
        super().begin_micro_step(is_last=is_last)
        self.model.set_requires_gradient_sync(is_last)

    def complete_model(self) -> GPT | None:
        weights = self.gather_weights()
        if not self.world.is_rank0:
            return None
        model = _empty_copy(self._empty)
        model.load_state_dict(weights, assign=True)
        return working_copy(model.to(self.execution.device), self.execution.dtype)

    def gather_weights(self) -> Weights:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        with self.world.patient():
            weights = get_model_state_dict(self.model, options=options)
        return {name: self._to_checkpoint(name, value) for name, value in weights.items()}

    def scatter_weights(self, weights: Weights | None) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        weights = {
            name: self._from_checkpoint(name, value) for name, value in (weights or {}).items()
        }
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, weights, options=options)

    def gather_optimizer_states(self, optimizer: "Optimizer") -> States:
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_optimizer_state_dict,
        )

        # Before the first step there is no state, and get_optimizer_state_dict would take a step.
        if not optimizer.states():
            return {}
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        with self.world.patient():
            content = get_optimizer_state_dict(self.model, optimizer.parts, options=options)
        return {
            name: {key: self._to_checkpoint(name, value) for key, value in state.items()}
            for name, state in content.get("state", {}).items()
        }

    def scatter_optimizer_states(self, states: States | None, optimizer: "Optimizer") -> None:
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_optimizer_state_dict,
        )

        if not self._layout(states):
            return
        content = {}
        if self.world.is_rank0:
            names = self._names()
            groups = [group for part in optimizer.parts for group in part.param_groups]
            content = {
                "state": {
                    name: {key: self._from_checkpoint(name, value) for key, value in state.items()}
                    for name, state in states.items()
                },
                "param_groups": [
                    {"params": [names[parameter] for parameter in group["params"]]}
                    for group in groups
                ],
            }
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_optimizer_state_dict(self.model, optimizer.parts, content, options=options)

    def _from_checkpoint(self, name: str, value: Tensor) -> Tensor:
        """Reorder the rows of c_attn so that the rows of each tensor rank are together."""
        rows = self._row_order(name, value)
        return value if rows is None else value[rows]

    def _to_checkpoint(self, name: str, value: Tensor) -> Tensor:
        """Undo _from_checkpoint."""
        rows = self._row_order(name, value)
        return value if rows is None else value[rows.argsort()]

    def _row_order(self, name: str, value: Tensor) -> Tensor | None:
        if self.world.tensor_ranks == 1 or ".c_attn." not in name or value.ndim == 0:
            return None
        from .tensor_parallel import row_order

        return row_order(self.model.config, self.world.tensor_ranks)


def _empty_copy(model: GPT) -> GPT:
    """Return a copy of a model with its parameters on the meta device, without values."""
    empty = {
        id(each): nn.Parameter(each.detach().to("meta"), requires_grad=each.requires_grad)
        for each in model.parameters()
    }
    return copy.deepcopy(model, empty)
