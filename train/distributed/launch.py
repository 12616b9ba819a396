"""Connect the ranks: make a World from torchrun's variables and the options of the launch."""

import contextlib
import datetime
import math
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...errors import InputError
from ..choices import ENGINES
from ..machine.options import Launch
from .heartbeat import Heartbeat, is_hosted_by_torchrun
from .world import SINGLE_PROCESS, World

_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# Clusters set these two for other programs too, so they do not show that torchrun is used.
_STORE = ("MASTER_ADDR", "MASTER_PORT")
# Timeout of collectives. One rank may build a dataset while the others wait. The heartbeat ends a
# run with a lost rank sooner.
_TIMEOUT = datetime.timedelta(hours=24)
_TIMEOUT_WITHOUT_HEARTBEAT = datetime.timedelta(minutes=30)


@contextlib.contextmanager
def join(launch: Launch) -> Iterator[World]:
    """Connect to the other ranks while the context lasts.

    Yields: the world that torchrun's variables describe; without them a single process.
    Raises: InputError for variables or options that do not fit together.
    """
    ranks = _read_ranks()
    if ranks is None:
        if launch != Launch():
            names = [name for name, value in vars(launch).items() if value != getattr(Launch, name)]
            raise InputError(
                f"{', '.join(f'`{name}`' for name in names)}: expected torchrun to start the "
                "program, found none of its variables; start it with torchrun"
            )
        yield SINGLE_PROCESS
        return
    if not 0 <= launch.rank_timeout < math.inf:
        raise InputError(f"rank_timeout: expected 0 or more seconds, got {launch.rank_timeout}")
    world = World(**ranks, **_resolve(launch, ranks["size"]), is_distributed=True)
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
    dist.init_process_group(
        backend,
        store=_store("training", is_host=world.is_rank0 and not is_hosted_by_torchrun()),
        rank=world.rank,
        world_size=world.size,
        timeout=_TIMEOUT if launch.rank_timeout else _TIMEOUT_WITHOUT_HEARTBEAT,
    )
    if world.size > 1 and launch.rank_timeout:
        world.heartbeat = _start_heartbeat(world, launch.rank_timeout)
    try:
        yield world
    except Exception as error:
        _ignore_torchrun()
        traceback.clear_frames(error.__traceback__)
        _end_other_ranks(error, world)
        raise
    _ignore_torchrun()
    world.leave()


def _ignore_torchrun() -> None:
    """Ignore SIGTERM, which torchrun sends as soon as one rank has ended.

    This process ends too, with its own status and after its own message.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _start_heartbeat(world: World, timeout: float) -> Heartbeat:
    """Start the heartbeat, with a connection of its own to the store."""
    heartbeat = Heartbeat(
        _store("heartbeat", seconds=max(timeout, 1)), world.rank, world.size, timeout
    )
    dist.all_reduce(torch.zeros(1))  # from now on all ranks have a beat
    return heartbeat


def _store(name: str, *, is_host: bool = False, seconds: float = 1800) -> dist.Store:
    """Connect to the store through which ranks find each other.

    Args:
        name: keys of one name do not collide with those of another.
        is_host: whether this process hosts the store.
        seconds: timeout.
    """
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=is_host,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=seconds),
    )
    # torchrun keeps the store for its next attempt, and with it the addresses of dead ranks.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    return dist.PrefixStore(f"tritium/{attempt}/{name}", store)


def _end_other_ranks(error: Exception, world: World) -> None:
    """Let all ranks end after an error. Return on the ranks that print it."""
    is_input = isinstance(error, InputError)
    heartbeat = world.heartbeat
    if is_input and (heartbeat is None or heartbeat.all_ranks_raise()):
        world.leave()
    elif heartbeat is not None:
        heartbeat.fail(error, is_input=is_input)
        heartbeat.leave()


def is_restarted() -> bool:
    """Return whether torchrun has started all ranks again, after one failed (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def stop_status(status: int) -> int:
    """Return the exit status of a requested stop: 0 if torchrun would start the ranks again."""
    return 0 if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0 else status


def remember_folder(run: Path) -> None:
    """Note the folder of the run for the ranks that torchrun may start after a failure."""
    note = _note()
    if note is not None:
        with contextlib.suppress(OSError):
            note.write_text(str(run.absolute()))


def remembered_folder() -> Path | None:
    """Return the folder that remember_folder noted before a restart; None if there is none."""
    note = _note()
    if note is None or not is_restarted():
        return None
    try:
        return Path(note.read_text())
    except OSError:
        return None


def _note() -> Path | None:
    """Return a file in the folder of torchrun's logs, which all of its attempts share."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # .../attempt_0/1/error.json
    return Path(file).parents[2] / "tritium-run" if file else None


def _read_ranks() -> dict[str, int] | None:
    """Return rank, size, local_rank and local_size from the environment; None without torchrun."""
    found = [name for name in _RANKS if name in os.environ]
    if not found:
        return None
    missing = [name for name in (*_RANKS, *_STORE) if name not in os.environ]
    if missing:
        raise InputError(
            f"torchrun: expected {', '.join((*_RANKS, *_STORE))} together, {missing[0]} is not "
            f"set; start with torchrun, or unset {found[0]}"
        )
    try:
        rank, size, local_rank, local_size = (int(os.environ[name]) for name in _RANKS)
        port = int(os.environ["MASTER_PORT"])
        if not (0 <= rank < size and 0 <= local_rank < local_size <= size and 0 < port < 1 << 16):
            raise ValueError
    except ValueError:
        values = ", ".join(f"{name}={os.environ[name]}" for name in (*_RANKS, "MASTER_PORT"))
        raise InputError(
            f"torchrun: expected ranks from 0 below their number and a port, got {values}; "
            "start with torchrun"
        ) from None
    return {"rank": rank, "size": size, "local_rank": local_rank, "local_size": local_size}


def _resolve(launch: Launch, size: int) -> dict[str, Any]:
    """Return engine, shard_ranks and tensor_ranks for `size` ranks.

    Raises: InputError if the options do not fit together or do not fit the number of ranks.
    """
    tensor_ranks = launch.tensor_parallel
    is_sharded = launch.shard_ranks is not None or tensor_ranks != 1
    engine = launch.parallel
    if engine == "auto":
        engine = "fsdp" if is_sharded else "ddp"
    if is_sharded and not ENGINES[engine].engine.shards_weights:
        name = "shard_ranks" if launch.shard_ranks is not None else "tensor_parallel"
        raise InputError(
            f"{name}: expected `parallel` fsdp with it, got {engine}; leave one of them out"
        )
    if tensor_ranks < 1 or size % tensor_ranks:
        raise InputError(
            f"tensor_parallel: expected a divisor of the {size} ranks, got {tensor_ranks}"
        )
    data_ranks = size // tensor_ranks
    shard_ranks = data_ranks if launch.shard_ranks is None else launch.shard_ranks
    if shard_ranks < 1 or data_ranks % shard_ranks:
        raise InputError(
            f"shard_ranks: expected a divisor of the {data_ranks} ranks that divide the batch, "
            f"got {shard_ranks}"
        )
    if launch.sharded_checkpoints == "on" and (engine != "fsdp" or tensor_ranks > 1):
        raise InputError(
            "sharded_checkpoints: expected `parallel` fsdp without `tensor_parallel` with it, "
            f"got {engine} and {tensor_ranks}"
        )
    return {
        "engine": engine,
        "shard_ranks": shard_ranks,
        "tensor_ranks": tensor_ranks,
        "sharded_checkpoints": launch.sharded_checkpoints,
    }
