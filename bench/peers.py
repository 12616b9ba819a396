"""What it takes to compile another project's Triton kernels beside ours, for GPUs that need not be there.

Nothing is downloaded. A project's own launchers run on meta tensors while torch and Triton answer as on a machine with the
architecture's GPU, so that tiles and warps are what they would choose there. Kernels under triton.autotune are compiled in each
of the configurations they keep, and the best of those that fit and spill nothing is shown, by the estimated share of the tensor
peak if nothing overlapped: here a GPU cannot choose.
"""

import ast
import contextlib
import contextvars
import hashlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.errors import TritonError

from ..train.config import InputError
from .disassembly import disassemblies
from .launches import TARGETS, Launch, compile_launch, record_launches
from .machine_code import MULTIPROCESSORS, RATES
from .record import write_record


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A project: `version` goes into the record, `launches(shape)` runs its launchers at a shape, on meta tensors."""

    name: str
    version: dict[str, str]
    launches: Callable[[Any], None]
    archs: tuple[str, ...] = tuple(RATES)


# --- machines that are not there


@contextlib.contextmanager
def pretend_gpu(arch: str) -> Iterator[None]:
    """Let torch and Triton answer as on a machine with one GPU of this architecture, without being able to launch on it."""
    capability = divmod(TARGETS[arch].arch, 10)
    limit = MULTIPROCESSORS[arch].shared_bytes - MULTIPROCESSORS[arch].shared_reserved

    def try_once(kernel_call, quantiles=(0.5,), **_):
        """In place of the autotuner's stopwatch: every configuration is launched, so that it is noted, and none is faster."""
        kernel_call()
        return [0.0] * len(quantiles)

    driver = types.SimpleNamespace(
        get_current_target=lambda: TARGETS[arch],
        get_active_torch_device=lambda: torch.device("meta"),
        get_current_device=lambda: 0,
        get_benchmarker=lambda: try_once,
        utils=types.SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": limit}),
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver))
        for name, answer in {"get_device_capability": capability, "get_device_name": arch, "device_count": 1}.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer: answer))
        yield


@contextlib.contextmanager
def imported(
    name: str, folder: Path, packages: Sequence[str] = (), stand_ins: Sequence[str] = (), last: str | None = None
) -> Iterator[types.ModuleType]:
    """A module of a folder's, imported anew and forgotten afterwards: it may decide by the GPU that it finds at import.

    `packages` are known by their folders alone, so that their __init__ does not import all the rest of the project; modules
    named in `stand_ins` that are not installed become ones whose functions return their first argument. What the module does
    behind the function `last`, such as measuring itself, is left out.
    """
    roots = {name.split(".")[0], *stand_ins}
    kept = {key: value for key, value in sys.modules.items() if key.split(".")[0] in roots}
    for key in kept:
        del sys.modules[key]
    try:
        for package in packages:
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(folder / package.replace(".", "/"))]
            sys.modules[package].__version__ = "unknown"
        for missing in (stand_in for stand_in in stand_ins if importlib.util.find_spec(stand_in) is None):
            sys.modules[missing] = types.ModuleType(missing)
            sys.modules[missing].__getattr__ = _first_argument
        path = folder / f"{name.replace('.', '/')}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            exec(_code(path, last), vars(module))
        except (Exception, SystemExit) as error:
            raise InputError(f"{path}: expected a module that can be imported, got {type(error).__name__}: {error}") from None
        yield module
    finally:
        for key in [key for key in sys.modules if key.split(".")[0] in roots]:
            del sys.modules[key]
        sys.modules.update(kept)


def _first_argument(name: str) -> Callable:
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda first, *_, **__: first


def _code(path: Path, last: str | None) -> types.CodeType:
    tree = ast.parse(path.read_bytes(), path)
    ends = [index for index, node in enumerate(tree.body, 1) if last and getattr(node, "name", None) == last]
    del tree.body[ends[-1] if ends else len(tree.body) :]
    return compile(tree, path, "exec")


def function(module: types.ModuleType, name: str) -> Callable:
    """A function of a module's. Raises: InputError if it has none of this name."""
    if not hasattr(module, name):
        raise InputError(f"{module.__file__}: expected a function `{name}`, found none")
    return getattr(module, name)


def tutorial_version(path: Path, name: str) -> dict[str, str]:
    """What the record says of one of Triton's tutorials. Raises: InputError if there is no such file."""
    if not path.is_file():
        raise InputError(f"--tutorial: expected the file {name}, found none at {path}")
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


# --- launches


def kernels_of(peer: Peer, shape: Any, arch: str) -> dict[str, list[Launch]]:
    """A peer's launches at one shape, planned for one architecture, by the names of their kernels."""

    def note() -> list[Launch]:
        with pretend_gpu(arch), record_launches(arch) as launches:
            try:
                peer.launches(shape)
            except (AttributeError, AssertionError, NotImplementedError, TypeError, RuntimeError) as error:
                raise InputError(f"{peer.name}: expected launchers that run on meta tensors, got: {error}") from None
        return launches

    kernels: dict[str, list[Launch]] = {}
    # In a context of its own: projects leave allocators behind.
    for launch in contextvars.copy_context().run(note):
        kernels.setdefault(launch.kernel.__name__, []).append(launch)
    return kernels


def best(candidates: Sequence[Launch], arch: str, describe: Callable[[Launch, Any, str], dict[str, Any]]) -> dict[str, Any]:
    """The best of a kernel's configurations, with how many there were; without resources where none compiled.

    `describe` makes a row, as codegen.describe does, of a launch, what it was compiled to and its disassembly.
    """
    unique = {repr(sorted(_config(launch).items())): launch for launch in candidates}
    compiled, errors = [], []
    for launch in unique.values():
        try:
            compiled.append((launch, compile_launch(launch, arch)))
        # As autotuners do; a failed pass of the compiler is a RuntimeError.
        except (TritonError, RuntimeError) as error:
            errors.append(" ".join(str(error).split())[-200:])
    texts = disassemblies([found for _, found in compiled])
    rows = [
        {"config": _config(launch), **describe(launch, found, text)}
        for (launch, found), text in zip(compiled, texts, strict=True)
    ]
    counts = {"configs": len(unique), "failed": len(errors)}
    if not rows:
        return counts | {"error": errors[-1]}
    return counts | max(rows, key=_rank)


def _rank(row: dict[str, Any]) -> tuple:
    estimate = row.get("hottest_loop", {}).get("estimate", {"serial": 0.0, "overlapped": 0.0})
    warps = row["blocks_per_sm"] * row["num_warps"]
    return row["blocks_per_sm"] > 0, -row["spilled_bytes"], estimate["serial"], estimate["overlapped"], warps


def _config(launch: Launch) -> dict[str, Any]:
    """Tiles and options of a launch: numbers that the kernel or the compiler takes as constants."""
    names = {parameter.name: parameter.is_constexpr for parameter in launch.kernel.params}
    return {
        name: value
        for name, value in launch.arguments.items()
        if names.get(name, True) and isinstance(value, int) and not isinstance(value, bool)
    }


# --- their records


def write_rows(out: Path | None, kind: str, peers: Sequence[Peer], figures: dict[str, Any]) -> None:
    """Write the figures with the peers' versions, if a file was asked for."""
    if out:
        write_record(out, kind, {"peers": {peer.name: peer.version for peer in peers}, **figures})
