"""Checkpoints that all ranks write and read, because one rank cannot hold the complete model.

    RUN/checkpoints/step-N/shard-*.safetensors   one file per rank: its parts of the weights, as
                                                 model.NAME, and of the optimizer state, as
                                                 optimizer.NAME.exp_avg, ...
    RUN/checkpoints/step-N/state.json            as in checkpoint.py: it names the files above

torch.distributed.checkpoint writes safetensors files with the place of each part in the complete
tensor, so any number of ranks can read them, and one process too. Its own format would need pickle,
which executes code from the file.

Ranks write into a hidden folder. Rank 0 then writes state.json with the checksums of all files, and
renames the folder, as for every checkpoint.
"""

import re
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import InputError
from ..distributed.engines import SingleProcess, States, Weights
from ..optim import Optimizer
from ..storage.files import flush_folder, hash_file
from ._shapes import Shapes, check_state_shapes, check_weight_shapes

MIN_PARAMETERS = 2_000_000_000
"""Parameters from which `sharded_checkpoints auto` writes shards: 24 GB with AdamW's state."""


def writes_shards(engine: SingleProcess) -> bool:
    """Return whether the checkpoints of a run are written by all ranks."""
    choice = engine.world.sharded_checkpoints
    is_large = sum(each.numel() for each in engine.model.parameters()) >= MIN_PARAMETERS
    return engine.can_shard_checkpoints and (choice == "on" or (choice == "auto" and is_large))


def is_shard(name: str) -> bool:
    """Return whether a file of a checkpoint has this name because a rank wrote its part there."""
    return re.fullmatch(r"shard-\d{5}-model-00001-of-00001\.safetensors", name) is not None


def write_shards(folder: Path, engine: SingleProcess, optimizer: Optimizer) -> dict[Path, str]:
    """Write the files of all ranks into a new folder. All ranks must call it.

    Returns: the SHA-256 of each file.
    Raises: OSError on all ranks if one of them cannot write. The folder is then deleted.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    world = engine.world
    world.on_rank0(lambda: _make_folder(folder))
    tensors = _weights(engine)
    names = {parameter: name for name, parameter in engine.model.named_parameters()}
    for parameter, state in optimizer.states().items():
        for key, value in state.items():
            tensors[f"optimizer.{names[parameter]}.{key}"] = value
    try:
        with world.patient():
            dcp.save(
                tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True)
            )
    except CheckpointException as error:
        world.on_rank0(lambda: shutil.rmtree(folder, ignore_errors=True))
        cause, _ = next(iter(error.failures.values()))
        raise OSError(getattr(cause, "errno", None), str(cause), str(folder)) from error

    # Each rank reads some files again for their checksums.
    files = world.on_rank0(lambda: sorted(folder.iterdir()))
    hashes = world.run_on_all_ranks(
        lambda: {file: hash_file(file) for file in files[world.rank :: world.size]}
    )
    gathered = [hashes] * world.size
    if world.size > 1:
        dist.all_gather_object(gathered, hashes)
    return dict(sorted((file, sha256) for part in gathered for file, sha256 in part.items()))


def _make_folder(folder: Path) -> None:
    if not folder.parent.exists():
        folder.parent.mkdir()
        flush_folder(folder.parent.parent)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _weights(engine: SingleProcess) -> dict[str, Tensor]:
    return {f"model.{name}": value.detach() for name, value in engine.model.named_parameters()}


def load_shards(folder: Path, engine: SingleProcess, optimizer: Optimizer) -> None:
    """Load weights and optimizer state, in place. All ranks must call it, each reads its parts."""
    tensors = _weights(engine)
    parameters = dict(engine.model.named_parameters())
    states = {}
    for name, shape in shard_shapes(folder).items():
        if name.startswith("optimizer."):
            parameter, _, key = name.removeprefix("optimizer.").rpartition(".")
            like = parameters[parameter].detach()
            value = torch.zeros_like(like) if shape else torch.zeros((), device=like.device)
            tensors[name] = value
            states.setdefault(parameter, {})[key] = value
    with engine.world.patient():
        _load(folder, tensors)
    for name, state in states.items():
        optimizer.load_state(parameters[name], state)


def read_complete(folder: Path, *, with_optimizer: bool) -> tuple[Weights, States]:
    """Read the complete tensors in one process, without the other ranks."""
    shapes = shard_shapes(folder)
    tensors = {
        name: torch.empty(shape)
        for name, shape in shapes.items()
        if with_optimizer or name.startswith("model.")
    }
    _load(folder, tensors, in_one_process=True)
    weights: Weights = {}
    states: States = {}
    for name, value in tensors.items():
        if name.startswith("model."):
            weights[name.removeprefix("model.")] = value
        else:
            parameter, _, key = name.removeprefix("optimizer.").rpartition(".")
            states.setdefault(parameter, {})[key] = value
    return weights, states


def check_shards(folder: Path, files: dict[str, str], shapes: Shapes) -> None:
    """Check the checksums of all files, and the names and shapes of their tensors.

    Raises: InputError if a file is missing, cut, damaged or belongs to another model.
    """
    found_files = {file.name for file in folder.glob("*.safetensors")}
    if found_files != set(files):
        raise InputError(
            f"{folder}: expected the files {', '.join(sorted(files))}, got "
            f"{', '.join(sorted(found_files)) or 'none'}"
        )
    for name, sha256 in files.items():
        found = hash_file(folder / name)
        if found != sha256:
            raise InputError(
                f"{folder / name}: damaged: expected SHA-256 {sha256[:12]}, got {found[:12]}"
            )
    weights: Shapes = {}
    states: Shapes = {}
    for name, shape in shard_shapes(folder).items():
        if name.startswith("model."):
            weights[name.removeprefix("model.")] = shape
        else:
            states[name.removeprefix("optimizer.")] = shape
    check_weight_shapes(folder, weights, shapes)
    check_state_shapes(folder, states, shapes)


def shard_shapes(folder: Path) -> Shapes:
    """Return the shapes of all complete tensors by name."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    return {name: tuple(each.size) for name, each in metadata.state_dict_metadata.items()}


def _load(folder: Path, tensors: dict[str, Tensor], *, in_one_process: bool = False) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(folder))
    in_one_process = in_one_process or not dist.is_initialized()
    with warnings.catch_warnings():
        # PyTorch warns that one process loads.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=in_one_process)
