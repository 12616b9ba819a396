"""Checkpoints: all that a run needs to continue as if it had not stopped.

    RUN/checkpoints/step-N/model.safetensors       weights, by parameter name
    RUN/checkpoints/step-N/optimizer.safetensors   optimizer state, as NAME.exp_avg, NAME.step, ...
    RUN/checkpoints/step-N/state.json              step, PyTorch's generator, loss scale of float16,
                                                   losses and norms that judge the next steps,
                                                   SHA-256 of the other files and of itself

The loader has no state: its batches are a function of the step. A folder is filled under a hidden
name, flushed to the disk and renamed, so a folder with the name of a checkpoint is complete. Files
are written and read tensor by tensor, and their checksums are computed on the way.

saver.py decides when and in which thread a checkpoint is written.
"""

import collections
import hashlib
import math
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ...errors import InputError, describe_os_error
from ...model import GPT
from ..distributed.engines import SingleProcess, States, Weights
from ..optim import Optimizer
from ..optimizer.bad_steps import is_judge_state
from ..storage.files import flush_folder, hash_file, seal, unseal, write_flushed
from ._shapes import Shapes, check_state_shapes, check_weight_shapes
from .sharded_checkpoint import check_shards, is_shard, load_shards, read_complete

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
_FORMAT_VERSION = 1
# Keys of the state of PyTorch's GradScaler.
_LOSS_SCALE_KEYS = {"scale", "growth_factor", "backoff_factor", "growth_interval"}
_LOSS_SCALE_KEYS |= {"_growth_tracker"}


class CheckpointError(InputError):
    """A checkpoint was not written, for example because the disk is full."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """The content of a checkpoint. Later steps may change the tensors."""

    step: int
    """Number of optimizer steps done."""
    torch_rng: bytes
    """State of PyTorch's generator on the CPU."""
    scalars: dict[str, Any]
    """Other entries of state.json."""
    tensors: dict[str, dict[str, Tensor]]
    """The tensors of each file by name. Empty if they are in shards."""

    @classmethod
    def of(
        cls, step: int, optimizer: Optimizer, tensors: dict[str, dict[str, Tensor]]
    ) -> "Content":
        """Return the content after `step` steps, with the state of the optimizer's parts."""
        return cls(
            step=step,
            torch_rng=torch.get_rng_state().numpy().tobytes(),
            scalars={
                "loss_scale": optimizer.scaler.state_dict(),
                "step_judge": optimizer.judge.state_dict(),
            },
            tensors=tensors,
        )


def gather_content(step: int, engine: SingleProcess, optimizer: Optimizer) -> Content:
    """Return the content of the checkpoint after `step` steps. All ranks must call it."""
    weights = engine.gather_weights()
    states = engine.gather_optimizer_states(optimizer)
    optimizer_tensors = {
        f"{name}.{key}": value for name, state in states.items() for key, value in state.items()
    }
    # Sorted, so that equal content has equal bytes. A resumed run has another order.
    tensors = {
        MODEL_FILE: dict(sorted(weights.items())),
        OPTIMIZER_FILE: dict(sorted(optimizer_tensors.items())),
    }
    return Content.of(step, optimizer, tensors)


def load_newest(
    run: Path, engine: SingleProcess, optimizer: Optimizer, at_most: float = math.inf
) -> int:
    """Load the newest checkpoint that is not damaged. All ranks must call it.

    Sets weights, optimizer state and PyTorch's generator, in place. Prints one line for each
    damaged checkpoint. The line names the damage.

    Args:
        at_most: number of steps that the checkpoint has at most.
    Returns: number of optimizer steps done.
    Raises: InputError if there is no checkpoint, or none without damage.
    """
    world = engine.world
    content = world.run_on_all_ranks(
        lambda: _read_newest(run, engine, at_most) if world.is_rank0 else (None, None, None)
    )
    state, weights, optimizer_states = content
    state = world.on_rank0(lambda: state)
    if is_shard(next(iter(state["files"]))) and engine.can_shard_checkpoints:
        load_shards(run / "checkpoints" / f"step-{state['step']}", engine, optimizer)
    else:
        engine.scatter_weights(weights)
        engine.scatter_optimizer_states(optimizer_states, optimizer)
    # Empty if the checkpoint was not written in float16.
    if state["loss_scale"]:
        optimizer.scaler.load_state_dict(state["loss_scale"])
    if state.get("step_judge"):
        optimizer.judge.load_state_dict(state["step_judge"])
    generator = bytearray.fromhex(state["torch_rng"])
    torch.set_rng_state(torch.frombuffer(generator, dtype=torch.uint8))
    return state["step"]


def load_weights(folder: Path, model: GPT) -> int:
    """Load the weights alone into a model in one process.

    Returns: number of optimizer steps done.
    Raises: InputError if a file is missing, cut, damaged or belongs to another model.
    """
    try:
        state = _read_state(folder)
        if is_shard(next(iter(state["files"]))):
            check_shards(folder, state["files"], _shapes_of(model.state_dict()))
            weights, _ = read_complete(folder, with_optimizer=False)
        else:
            weights = _read_weights(folder, state, _shapes_of(model.state_dict()))
    except InputError as error:
        raise InputError(f"{error}; delete this checkpoint to use the one before") from None
    model.load_state_dict(weights)
    return state["step"]


def newest_checkpoint(run: Path) -> Path:
    """Return the checkpoint with the most steps. Raises: InputError if there is none."""
    folders = checkpoints(run)
    if not folders:
        raise InputError(
            f"{run}: expected a checkpoint in it, found none; start the run again with the same "
            "command"
        )
    return folders[max(folders)]


def checkpoints(run: Path) -> dict[int, Path]:
    """Return the complete checkpoints of a run by their steps, fewest first."""
    folders = {}
    for path in (run / "checkpoints").glob("step-*"):
        number = path.name.removeprefix("step-")
        if re.fullmatch("0|[1-9][0-9]*", number):
            folders[int(number)] = path
    return dict(sorted(folders.items()))


# --- writing


def write_checkpoint(
    run: Path,
    content: Content,
    pieces: dict[str, Iterable[bytes | memoryview]],
    *,
    keep: int,
    keep_every: int = 0,
    shards: dict[Path, str] | None = None,
) -> None:
    """Write RUN/checkpoints/step-N, then delete checkpoints that are no longer kept.

    Args:
        run: the run's folder. It must exist.
        content: its tensors are not read here.
        pieces: the bytes of each file of tensors, by name.
        keep: number of newest checkpoints to keep.
        keep_every: also keep checkpoints whose step is a multiple of this number. 0: none.
        shards: files that all ranks have written already, with their SHA-256. They are moved.
    Raises: CheckpointError if a write fails. It names the file. No partial checkpoint is left, and
        older checkpoints stay.
    """
    folder = run / "checkpoints" / f"step-{content.step}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    delete_unfinished(run)
    try:
        if not folder.parent.exists():
            folder.parent.mkdir()
            flush_folder(run)
        temporary.mkdir()
        for file in shards or {}:
            file.rename(temporary / file.name)
        _fill(temporary, content, pieces, shards or {})
        if folder.exists():
            _delete(folder)
        temporary.rename(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint after step {content.step} was not written: "
            + describe_os_error(error).replace(str(temporary), str(folder))
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush_folder(folder.parent)
    delete_old(run, content.step, keep=keep, keep_every=keep_every)


def delete_old(run: Path, step: int, *, keep: int, keep_every: int = 0) -> None:
    """Delete checkpoints before `step` steps that are no longer kept; see write_checkpoint."""
    # A damaged checkpoint of a later step does not count.
    older = {found: folder for found, folder in checkpoints(run).items() if found <= step}
    for found in list(older)[:-keep]:
        if found == 0 or not keep_every or found % keep_every:
            _delete(older[found])


def delete_newer(run: Path, step: int) -> None:
    """Delete the checkpoints after more than `step` steps."""
    for found, folder in checkpoints(run).items():
        if found > step:
            _delete(folder)


def delete_unfinished(run: Path, pattern: str = ".step-*.tmp") -> None:
    """Delete the files of a process that was killed while it wrote or deleted a checkpoint."""
    for unfinished in (run / "checkpoints").glob(pattern):
        shutil.rmtree(unfinished)


def _fill(
    folder: Path,
    content: Content,
    pieces: dict[str, Iterable[bytes | memoryview]],
    shards: dict[Path, str],
) -> None:
    """Write the files of a checkpoint into its folder, next to the shards, and flush it."""
    files = {file.name: sha256 for file, sha256 in shards.items()}
    state = {
        "format_version": _FORMAT_VERSION,
        "step": content.step,
        "torch_rng": content.torch_rng.hex(),
        **content.scalars,
        "files": files | {name: _write_hashed(folder / name, pieces[name]) for name in pieces},
    }
    write_flushed(folder / "state.json", [seal(state)])
    flush_folder(folder)


def _write_hashed(file: Path, pieces: Iterable[bytes | memoryview]) -> str:
    """Write a file. Returns: its SHA-256."""
    sha256 = hashlib.sha256()

    def hashed() -> Iterator[bytes | memoryview]:
        for piece in pieces:
            sha256.update(piece)
            yield piece

    write_flushed(file, hashed())
    return sha256.hexdigest()


def _delete(folder: Path) -> None:
    """Delete a checkpoint. Rename it first, so that no half-deleted folder has its name."""
    shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.old.tmp")))


# --- reading


def _read_newest(run: Path, engine: SingleProcess, at_most: float) -> tuple[dict, Weights, States]:
    """Return the content of the newest checkpoint without damage."""
    newest_checkpoint(run)
    folders = [path for step, path in checkpoints(run).items() if step <= at_most][::-1]
    if not folders:
        raise InputError(f"{run}: expected a checkpoint of at most {at_most} steps, found none")
    errors = []
    for folder in folders:
        try:
            content = _read(
                folder, _shapes_of(engine.model.state_dict()), engine.can_shard_checkpoints
            )
        except InputError as error:
            errors.append(error)
            continue
        for error in errors:
            print(f"tritium: {error}; resuming from {folder.name} instead", file=sys.stderr)
        return content
    also = f"; older checkpoints that are damaged too: {len(errors) - 1}" if len(errors) > 1 else ""
    raise InputError(f"{errors[0]}{also}; the run cannot be resumed, start a new one")


def _read(
    folder: Path, shapes: Shapes, reads_shards: bool
) -> tuple[dict, Weights | None, States | None]:
    """Return the content of the files. Tensors of shards are None if the engine reads shards."""
    state = _read_state(folder)
    if is_shard(next(iter(state["files"]))):
        check_shards(folder, state["files"], shapes)
        if reads_shards:
            return state, None, None
        return state, *read_complete(folder, with_optimizer=True)
    weights = _read_weights(folder, state, shapes)
    file = folder / OPTIMIZER_FILE
    tensors = _read_tensors(file, state["files"][OPTIMIZER_FILE])
    check_state_shapes(file, _shapes_of(tensors), shapes)
    states: States = collections.defaultdict(dict)
    for name, value in tensors.items():
        parameter, _, key = name.rpartition(".")
        states[parameter][key] = value
    return state, weights, states


def _read_state(folder: Path) -> dict:
    """Return the checked content of state.json."""
    file = folder / "state.json"
    try:
        state = unseal(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: damaged: {error}") from None
    _check_state(file, state)
    if folder.name != f"step-{state['step']}":
        raise InputError(
            f"{folder}: expected the checkpoint of the step in its name, got step {state['step']}"
        )
    return state


def _check_state(file: Path, state: dict) -> None:
    """Raise InputError, which names the key, unless state.json has all keys with their types."""

    def check(is_right: bool, key: str, expected: str, value: object) -> None:
        if not is_right:
            text = repr(value)
            got = text if len(text) <= 40 else f"{text[:40]}..."
            raise InputError(f"{file}: {key}: expected {expected}, got {got}")

    version, step, rng, scale, files = (
        state.get(key) for key in ("format_version", "step", "torch_rng", "loss_scale", "files")
    )
    check(version == _FORMAT_VERSION, "format_version", str(_FORMAT_VERSION), version)
    check(type(step) is int and step >= 0, "step", "a number of steps", step)
    size = torch.get_rng_state().numel()
    is_hex = isinstance(rng, str) and re.fullmatch("(?:[0-9a-f]{2})*", rng) is not None
    check(is_hex and len(rng) == 2 * size, "torch_rng", f"{size} bytes in hexadecimal", rng)
    is_scale = isinstance(scale, dict) and (not scale or scale.keys() == _LOSS_SCALE_KEYS)
    is_scale = is_scale and all(type(value) in (int, float) for value in scale.values())
    check(is_scale, "loss_scale", "the state of a GradScaler or {}", scale)
    judge = state.get("step_judge", {})  # older versions did not write it
    check(judge == {} or is_judge_state(judge), "step_judge", "the state of a StepJudge", judge)
    check(isinstance(files, dict), "files", "a SHA-256 for each file", files)
    is_sharded = all(map(is_shard, files)) and files
    for name in files if is_sharded else (MODEL_FILE, OPTIMIZER_FILE):
        sha256 = files.get(name)
        check(isinstance(sha256, str), f"files: {name}", "a SHA-256", sha256)


def _read_weights(folder: Path, state: dict, shapes: Shapes) -> Weights:
    weights = _read_tensors(folder / MODEL_FILE, state["files"][MODEL_FILE])
    check_weight_shapes(folder, _shapes_of(weights), shapes)
    return weights


def _read_tensors(file: Path, sha256: str) -> dict[str, Tensor]:
    """Check a file and map it into memory. A tensor is read when it is copied."""
    try:
        found = hash_file(file)
        size = file.stat().st_size
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    if found != sha256:
        raise InputError(
            f"{file}: damaged: expected SHA-256 {sha256[:12]}, got {found[:12]} of {size} bytes"
        )
    try:
        tensors = safetensors.torch.load_file(file)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: expected safetensors, got {error}") from None
    for name, value in tensors.items():
        if value.dtype != torch.float32:
            raise InputError(f"{file}: {name}: expected float32, got {value.dtype}")
    return tensors


def _shapes_of(tensors: dict[str, Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in tensors.items()}
