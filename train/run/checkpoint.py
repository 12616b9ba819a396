"""Checkpoints: what a run needs to go on as if it had never stopped, in a folder that is written whole or not at all.

    RUN/checkpoints/step-N/model.safetensors       weights, by parameter name
    RUN/checkpoints/step-N/optimizer.safetensors   AdamW's two moments and step counts, as NAME.exp_avg ..., Muon's momentum
    RUN/checkpoints/step-N/state.json              step, PyTorch's generator, float16's loss scale, SHA-256 of the two files
                                                   above and of itself

The loader needs no state of its own: its batches are a function of the step. A folder is filled under a hidden name, flushed
to the disk and renamed: a checkpoint that has its name is complete.
"""

import collections
import hashlib
import shutil
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from ...errors import InputError
from ...model import GPT
from ..distributed.engines import (
    gather_optimizer_states,
    gather_weights,
    scatter_optimizer_states,
    scatter_weights,
)
from ..distributed.world import SINGLE_PROCESS, World
from ..files import flush_folder, seal, unseal, write_whole
from ..optim import Optimizer

_FILES = ("model.safetensors", "optimizer.safetensors")
_INSTEAD = "delete this checkpoint to go on from the one before"


def save_checkpoint(
    run: Path,
    step: int,
    model: GPT,
    optimizer: Optimizer,
    *,
    keep: int,
    world: World = SINGLE_PROCESS,
) -> Path:
    """Write RUN/checkpoints/step-N and delete all but the `keep` newest. The first rank writes, with the help of all.

    Args:
        run: the run's folder.
        step: optimizer steps done so far.
        model, optimizer: the float32 weights, and what changes them.
        world: ranks that hold them; default: a process alone.
    Returns: the folder written.
    Raises: OSError as the disk gives it; nothing is left behind then, and older checkpoints stay.
    """
    weights = gather_weights(model, world)
    states = gather_optimizer_states(model, optimizer, world)
    return world.on_rank0(lambda: _write(run, step, weights, states, optimizer, keep))


def _write(
    run: Path, step: int, weights: dict, states: dict, optimizer: Optimizer, keep: int
) -> Path:
    folder = run / "checkpoints" / f"step-{step}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    for left in folder.parent.glob(
        ".step-*.tmp"
    ):  # by a process that was killed while it wrote or deleted
        shutil.rmtree(left)
    try:
        temporary.mkdir(parents=True)
        model_bytes = safetensors.torch.save(weights)
        write_whole(temporary / _FILES[0], [model_bytes])
        named = {
            f"{name}.{key}": value for name, state in states.items() for key, value in state.items()
        }
        optimizer_bytes = safetensors.torch.save(named)
        write_whole(temporary / _FILES[1], [optimizer_bytes])
        state = {
            "format_version": 1,
            "step": step,
            "torch_rng": torch.get_rng_state().numpy().tobytes().hex(),
            "loss_scale": optimizer.scaler.state_dict(),
            "files": {
                name: hashlib.sha256(content).hexdigest()
                for name, content in zip(_FILES, (model_bytes, optimizer_bytes), strict=True)
            },
        }
        write_whole(temporary / "state.json", [seal(state)])
        if folder.exists():
            _delete(folder)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush_folder(folder.parent)
    for old in _folders(run)[:-keep]:
        _delete(old)
    return folder


def _delete(folder: Path) -> None:
    """Under another name first: what has a checkpoint's name is complete, even while it is being deleted."""
    shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.old.tmp")))


def load_checkpoint(
    folder: Path, model: GPT, optimizer: Optimizer | None = None, *, world: World = SINGLE_PROCESS
) -> int:
    """Load weights, and with an optimizer also its state and PyTorch's generator, in place. The first rank reads for all.

    Returns: steps done.
    Raises: InputError if a file is missing, cut, damaged or of another model.
    """
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    content = world.run_on_all_ranks(
        lambda: (
            _read(folder, shapes, has_states=optimizer is not None)
            if world.is_rank0
            else (None,) * 3
        )
    )
    state = world.on_rank0(lambda: content[0])
    scatter_weights(content[1], model, world)
    if optimizer is not None:
        scatter_optimizer_states(content[2], model, optimizer, world)
        if state["loss_scale"]:  # else the run computed in another precision, on another device
            optimizer.scaler.load_state_dict(state["loss_scale"])
        torch.set_rng_state(
            torch.frombuffer(bytearray.fromhex(state["torch_rng"]), dtype=torch.uint8)
        )
    return state["step"]


def _read(
    folder: Path, shapes: dict[str, tuple[int, ...]], *, has_states: bool
) -> tuple[dict, dict, dict]:
    """state.json, weights by name, and states by parameter's name where asked for."""
    try:
        state = unseal((folder / "state.json").read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}/state.json: damaged: {error}; {_INSTEAD}") from None
    step, sums = state["step"], state["files"]
    if folder.name != f"step-{step}":
        raise InputError(
            f"{folder}: expected the checkpoint of that step, got that of step {step}; {_INSTEAD}"
        )
    weights = _read_tensors(folder / _FILES[0], sums[_FILES[0]])
    if (found := {name: tuple(value.shape) for name, value in weights.items()}) != shapes:
        name = next(
            name for name in sorted({*found, *shapes}) if found.get(name) != shapes.get(name)
        )
        raise InputError(
            f"{folder}: expected {name} of shape {shapes.get(name)}, got {found.get(name)}; it belongs to another model"
        )
    states = collections.defaultdict(dict)
    for name, value in (
        _read_tensors(folder / _FILES[1], sums[_FILES[1]]) if has_states else {}
    ).items():
        parameter, key = name.rsplit(".", 1)
        states[parameter][key] = value
    return state, weights, states


def newest_checkpoint(run: Path) -> Path:
    """The checkpoint with the most steps. Raises: InputError if there is none."""
    folders = _folders(run)
    if not folders:
        raise InputError(
            f"{run}: expected a checkpoint in it, found none: the run stopped before its first; start it anew"
        )
    return folders[-1]


def _folders(run: Path) -> list[Path]:
    """Complete checkpoints, fewest steps first."""
    folders = [
        path
        for path in (run / "checkpoints").glob("step-*")
        if path.name.removeprefix("step-").isdigit()
    ]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))


def _read_tensors(file: Path, sha256: str) -> dict[str, torch.Tensor]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); {_INSTEAD}") from None
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise InputError(
            f"{file}: damaged: expected SHA-256 {sha256[:12]}, got {found[:12]} of {len(content)} bytes; {_INSTEAD}"
        )
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise InputError(f"{file}: expected safetensors, got {error}; {_INSTEAD}") from None
