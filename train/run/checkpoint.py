"""Checkpoints: all that a run needs to continue as if it had not stopped.

    RUN/checkpoints/step-N/model.safetensors       weights, by parameter name
    RUN/checkpoints/step-N/optimizer.safetensors   optimizer state, as NAME.exp_avg, NAME.step, ...
    RUN/checkpoints/step-N/state.json              step, PyTorch's generator, loss scale of float16,
                                                   losses and norms that judge the next steps,
                                                   SHA-256 of the other files and of itself

The loader has no state: its batches are a function of the step. A folder is filled under a hidden
name, flushed to the disk and renamed, so a folder with the name of a checkpoint is complete.
"""

import collections
import hashlib
import shutil
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ...errors import InputError
from ...model import GPT
from ..distributed.engines import SingleProcess, States, Weights
from ..files import flush_folder, seal, unseal, write_whole
from ..optim import Optimizer

_MODEL_FILE = "model.safetensors"
_OPTIMIZER_FILE = "optimizer.safetensors"
_HINT = "delete this checkpoint to resume from the one before"


def save_checkpoint(
    run: Path, step: int, engine: SingleProcess, optimizer: Optimizer, *, keep: int
) -> Path:
    """Write RUN/checkpoints/step-N and delete all but the `keep` newest. All ranks must call it.

    Args:
        run: the run's folder.
        step: number of optimizer steps done.
        engine: holds the weights.
        optimizer: the optimizer of the engine's model.
    Returns: the folder, which rank 0 wrote.
    Raises: OSError if a write fails. No partial checkpoint is left, and older checkpoints stay.
    """
    weights = engine.gather_weights()
    states = engine.gather_optimizer_states(optimizer)
    scalars = {
        "loss_scale": optimizer.scaler.state_dict(),
        "step_judge": optimizer.judge.state_dict(),
    }
    return engine.world.on_rank0(lambda: _write(run, step, weights, states, scalars, keep))


def load_checkpoint(folder: Path, engine: SingleProcess, optimizer: Optimizer) -> int:
    """Load weights, optimizer state and PyTorch's generator, in place. All ranks must call it.

    Returns: number of optimizer steps done.
    Raises: InputError if a file is missing, cut, damaged or belongs to another model.
    """
    world = engine.world
    content = world.run_on_all_ranks(
        lambda: _read(folder, _shapes(engine.model)) if world.is_rank0 else (None, None, None)
    )
    state, weights, optimizer_states = content
    state = world.on_rank0(lambda: state)
    engine.scatter_weights(weights)
    engine.scatter_optimizer_states(optimizer_states, optimizer)
    # Empty if the checkpoint was not written in float16.
    if state["loss_scale"]:
        optimizer.scaler.load_state_dict(state["loss_scale"])
    # Older versions did not write it.
    if "step_judge" in state:
        optimizer.judge.load_state_dict(state["step_judge"])
    generator = bytearray.fromhex(state["torch_rng"])
    torch.set_rng_state(torch.frombuffer(generator, dtype=torch.uint8))
    return state["step"]


def load_weights(folder: Path, model: GPT) -> int:
    """Load the weights alone into a model in one process. Returns and raises as load_checkpoint."""
    state = _read_state(folder)
    model.load_state_dict(_read_weights(folder, state, _shapes(model)))
    return state["step"]


def newest_checkpoint(run: Path) -> Path:
    """Return the checkpoint with the most steps. Raises: InputError if there is none."""
    folders = _folders(run)
    if not folders:
        raise InputError(
            f"{run}: expected a checkpoint in it, found none: the run stopped before its first; "
            "start it again"
        )
    return folders[-1]


def last_checkpoint(run: Path, step: int) -> Path:
    """Return the newest checkpoint of at most `step` steps; without one, the oldest."""
    folders = _folders(run)
    before = [each for each in folders if int(each.name.removeprefix("step-")) <= step]
    return before[-1] if before else folders[0]


# --- writing


def _write(
    run: Path, step: int, weights: Weights, states: States, scalars: dict, keep: int
) -> Path:
    folder = run / "checkpoints" / f"step-{step}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    # Delete the files of a process that was killed while it wrote or deleted.
    for unfinished in folder.parent.glob(".step-*.tmp"):
        shutil.rmtree(unfinished)
    try:
        temporary.mkdir(parents=True)
        tensors = {
            f"{name}.{key}": value for name, state in states.items() for key, value in state.items()
        }
        state = {
            "format_version": 1,
            "step": step,
            "torch_rng": torch.get_rng_state().numpy().tobytes().hex(),
            **scalars,
            "files": {
                _MODEL_FILE: _write_tensors(temporary / _MODEL_FILE, weights),
                _OPTIMIZER_FILE: _write_tensors(temporary / _OPTIMIZER_FILE, tensors),
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


def _write_tensors(file: Path, tensors: dict[str, Tensor]) -> str:
    """Write a file. Returns: its SHA-256."""
    content = safetensors.torch.save(tensors)
    write_whole(file, [content])
    return hashlib.sha256(content).hexdigest()


def _delete(folder: Path) -> None:
    """Delete a checkpoint. Rename it first, so that no half-deleted folder has its name."""
    shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.old.tmp")))


# --- reading


def _read(folder: Path, shapes: dict[str, tuple[int, ...]]) -> tuple[dict, Weights, States]:
    """Return the content of the three files."""
    state = _read_state(folder)
    weights = _read_weights(folder, state, shapes)
    states: States = collections.defaultdict(dict)
    tensors = _read_tensors(folder / _OPTIMIZER_FILE, state["files"][_OPTIMIZER_FILE])
    for name, value in tensors.items():
        parameter, key = name.rsplit(".", 1)
        states[parameter][key] = value
    return state, weights, states


def _read_state(folder: Path) -> dict:
    try:
        state = unseal((folder / "state.json").read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}/state.json: damaged: {error}; {_HINT}") from None
    if folder.name != f"step-{state['step']}":
        raise InputError(
            f"{folder}: expected the checkpoint of the step in its name, got step {state['step']}; "
            f"{_HINT}"
        )
    return state


def _read_weights(folder: Path, state: dict, shapes: dict[str, tuple[int, ...]]) -> Weights:
    weights = _read_tensors(folder / _MODEL_FILE, state["files"][_MODEL_FILE])
    found = {name: tuple(value.shape) for name, value in weights.items()}
    for name in sorted({*found, *shapes}):
        if found.get(name) != shapes.get(name):
            raise InputError(
                f"{folder}: expected {name} of shape {shapes.get(name)}, got {found.get(name)}; "
                "it belongs to another model"
            )
    return weights


def _read_tensors(file: Path, sha256: str) -> dict[str, Tensor]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); {_HINT}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise InputError(
            f"{file}: damaged: expected SHA-256 {sha256[:12]}, got {found[:12]} of "
            f"{len(content)} bytes; {_HINT}"
        )
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise InputError(f"{file}: expected safetensors, got {error}; {_HINT}") from None


def _shapes(model: GPT) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _folders(run: Path) -> list[Path]:
    """Return the complete checkpoints, fewest steps first."""
    steps = {}
    for path in (run / "checkpoints").glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdigit():
            steps[int(number)] = path
    return [steps[step] for step in sorted(steps)]
