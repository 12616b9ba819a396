"""The tables of choices of a run, as model/choices.py has those of a model.

    OPTIMIZERS   implemented in optim.py
    ENGINES      how ranks share a model and its optimizer; distributed/engines.py
    PRECISIONS   dtypes of matmuls; precision.py
    AXES         what `tritium plot` draws against

SCHEDULES is in schedule.py, TASKS in tasks.py. None of them imports PyTorch, because the import
takes seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InputError
from ..model.choices import Choice

if TYPE_CHECKING:
    from torch import nn

    from .config import TrainConfig
    from .distributed.engines import SingleProcess
    from .optim import Part


@dataclass(frozen=True, kw_only=True)
class OptimizerRow(Choice):
    """An optimizer that the option `optimizer` names.

    implementation: a function of the model and its TrainConfig that returns the parts. Each trained
        parameter is in exactly one of them.
    """

    supports_tensor_parallel: bool = True
    """Whether tensor ranks may divide its parameters."""
    block_matrix_state_bytes: int
    """Bytes of state per element of the matrices in blocks. Other parameters have AdamW's 8."""

    @property
    def parts(self) -> Callable[["nn.Module", "TrainConfig"], list["Part"]]:
        """The function: parts(model, config)."""
        return self.load()


OPTIMIZERS = {
    "adamw": OptimizerRow(implementation="optim:adamw_parts", block_matrix_state_bytes=8),
    "muon": OptimizerRow(
        implementation="optim:muon_parts",
        block_matrix_state_bytes=4,
        supports_tensor_parallel=False,
    ),
}


def check_optimizer(name: str, tensor_ranks: int = 1) -> None:
    """Raise InputError if tensor ranks cannot divide the optimizer's parameters."""
    if tensor_ranks > 1 and not OPTIMIZERS[name].supports_tensor_parallel:
        supported = [key for key, row in OPTIMIZERS.items() if row.supports_tensor_parallel]
        raise InputError(
            f"optimizer: expected {' or '.join(supported)} with {tensor_ranks} tensor ranks, got "
            f"{name}; set `tensor_parallel` to 1"
        )


@dataclass(frozen=True, kw_only=True)
class EngineRow(Choice):
    """A way to share a model. The option `parallel` names the rows for several ranks."""

    is_parallel: bool = True
    """Whether it is for several ranks."""

    @property
    def engine(self) -> type["SingleProcess"]:
        """The class of the engine."""
        return self.load()


ENGINES = {
    "single": EngineRow(implementation="distributed.engines:SingleProcess", is_parallel=False),
    "ddp": EngineRow(implementation="distributed.engines:DDP"),
    "zero1": EngineRow(implementation="distributed.engines:ZeRO1"),
    "fsdp": EngineRow(implementation="distributed.engines:FSDP"),
}

# Values of the option `precision`: the dtype of matmuls. "auto" depends on the device.
PRECISIONS = ("auto", "float32", "bfloat16", "float16")

# Horizontal axis -> its label.
AXES = {
    "steps": "step",
    "tokens": "tokens",
    "seconds": "seconds of steps",
    "flops": "FLOPs",
}
