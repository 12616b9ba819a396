"""Write the checkpoints of a run in the background.

    save(N)    wait for the checkpoint before, copy weights and optimizer state to a buffer, return
    thread     write the buffer to RUN/checkpoints/step-N, while the steps continue
    wait()     wait for the thread, raise its error

The run waits only for the copy. On CUDA it does not wait for the copy either: the buffer is pinned,
and the copies are queued on the device before the next update.

Memory     one buffer on rank 0, as large as weights and optimizer state: 12 bytes per parameter
           with AdamW. The first save in the background allocates it, and it is kept. FSDP needs no
           buffer, because it gathers new tensors. A save that is not in the background needs none
           either: each tensor is written from where it is.
Lost steps A run that is killed while a checkpoint is written resumes from the checkpoint before. It
           loses one interval between checkpoints and the steps that ran during the write: less than
           two intervals, because the next checkpoint waits for the write. A save that is not in the
           background loses at most one interval
"""

import itertools
import math
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ...errors import plural
from ...model.cost import ADAMW_STATE_BYTES
from ...model.safetensors_file import flat_bytes, safetensors_header, safetensors_pieces
from ..choices import OPTIMIZERS
from ..config import ReportOptions, TrainConfig
from ..distributed.engines import SingleProcess
from ..optim import Optimizer
from ..precision import linear_parameters
from ..storage.files import check_free_space
from .checkpoint import (
    Content,
    checkpoints,
    delete_old,
    delete_unfinished,
    gather_content,
    load_newest,
    write_checkpoint,
)
from .sharded_checkpoint import write_shards, writes_shards

_SPACE_HINT = "free space, or choose a smaller `keep_checkpoints`"


class CheckpointSaver:
    """Writes the checkpoints of one run. All ranks must call its methods at the same places.

    As a context manager it waits for the last checkpoint at the end.

    Args:
        run: the run's folder.
        engine: holds the weights.
        optimizer: the optimizer of the engine's model.
        report: says which checkpoints are kept, and whether they are written in the background.
    Attributes:
        last_step: step of the checkpoint that was begun or loaded last; None before the first.
        stall_seconds: time that the run has waited in `save` and `wait`.
    """

    def __init__(
        self, run: Path, engine: SingleProcess, optimizer: Optimizer, report: ReportOptions
    ):
        self._run = run
        self._engine = engine
        self._optimizer = optimizer
        self._report = report
        self._buffer = HostBuffer(pinned=engine.execution.device.type == "cuda")
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.last_step: int | None = None
        self.stall_seconds = 0.0
        # Also delete shard folders of killed processes: no process writes them now.
        engine.world.on_rank0(lambda: delete_unfinished(run, ".step-*"))

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(self, _type, error: BaseException | None, _traceback) -> None:
        if error is None:
            self.wait()
        # KeyboardInterrupt ends the program at once. The next save deletes the partial files.
        elif not isinstance(error, KeyboardInterrupt):
            try:
                self._join()
            except Exception as failed:
                print(f"tritium: {failed}", file=sys.stderr)

    @property
    def buffer_bytes(self) -> int:
        """Size of the buffer that copies of checkpoints use."""
        return self._buffer.nbytes

    def save(self, step: int, *, background: bool | None = None) -> None:
        """Begin the checkpoint after `step` steps.

        Args:
            step: number of optimizer steps done.
            background: whether to return before it is written. None: as the run's options say.
        Raises: CheckpointError if this or the previous checkpoint could not be written; InputError
            if the disk has too little space. Older checkpoints stay.
        """
        if background is None:
            background = self._report.background_checkpoints
        self.wait()
        began = time.perf_counter()
        if writes_shards(self._engine):
            self._save_shards(step)
        else:
            content = gather_content(step, self._engine, self._optimizer)
            self._engine.world.on_rank0(lambda: self._begin(content, background))
        self.last_step = step
        self.stall_seconds += time.perf_counter() - began

    def _save_shards(self, step: int) -> None:
        """Write a checkpoint from all ranks, not in the background."""
        folder = self._run / "checkpoints" / f".step-{step}.shards"
        shards = write_shards(folder, self._engine, self._optimizer)
        content = Content.of(step, self._optimizer, {})
        self._engine.world.on_rank0(lambda: self._write(content, {}, shards))
        self._engine.world.on_rank0(folder.rmdir)

    def load(self, at_most: float = math.inf) -> int:
        """Wait for the last checkpoint, then load the newest: see `load_newest`."""
        self.wait()
        self.last_step = load_newest(self._run, self._engine, self._optimizer, at_most)
        report = self._report
        # A process that was killed after it wrote this checkpoint may have left older ones.
        self._engine.world.on_rank0(
            lambda: delete_old(
                self._run,
                self.last_step,
                keep=report.keep_checkpoints,
                keep_every=report.keep_every,
            )
        )
        return self.last_step

    def wait(self) -> None:
        """Wait until the last checkpoint is written. Raises: CheckpointError if it was not."""
        began = time.perf_counter()
        self._engine.world.on_rank0(self._join)
        self.stall_seconds += time.perf_counter() - began

    def _join(self) -> None:
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error = self._error
        self._error = None
        if error is not None:
            raise error

    def _begin(self, content: Content, background: bool) -> None:
        """Write a checkpoint, or copy its tensors and start the thread that writes it."""
        size = sum(value.nbytes for file in content.tensors.values() for value in file.values())
        purpose = f"the checkpoint after step {content.step}"
        check_free_space(self._run, size, purpose, _SPACE_HINT)
        if not background:
            pieces = {name: safetensors_pieces(file) for name, file in content.tensors.items()}
            self._write(content, pieces)
            return

        # The thread gets only tensors that no later step changes.
        copied = None
        if self._engine.gathers_copies and self._engine.execution.device.type != "cpu":
            pieces = {name: safetensors_pieces(file) for name, file in content.tensors.items()}
        else:
            pieces, copied = self._snapshot(content, size)
        self._thread = threading.Thread(
            target=self._write_in_thread, args=(content, pieces, copied), daemon=True
        )
        self._thread.start()

    def _snapshot(
        self, content: Content, size: int
    ) -> tuple[dict[str, Iterable], torch.cuda.Event | None]:
        """Copy the tensors. Returns: the bytes of each file; an event after the last copy."""
        self._buffer.resize(size)
        pieces = {}
        for name, tensors in content.tensors.items():
            body = self._buffer.append(tensors.values())
            pieces[name] = itertools.chain([safetensors_header(tensors)], body)
        copied = None
        if self._buffer.pinned:
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self._engine.execution.device))
        return pieces, copied

    def _write_in_thread(
        self, content: Content, pieces: dict[str, Iterable], copied: torch.cuda.Event | None
    ) -> None:
        try:
            if copied is not None:
                copied.synchronize()
            self._write(content, pieces)
        except BaseException as error:
            self._error = error

    def _write(
        self, content: Content, pieces: dict[str, Iterable], shards: dict[Path, str] | None = None
    ) -> None:
        report = self._report
        write_checkpoint(
            self._run,
            content,
            pieces,
            keep=report.keep_checkpoints,
            keep_every=report.keep_every,
            shards=shards,
        )


class HostBuffer:
    """Memory on the host that is used again for the copies of each checkpoint.

    It is made of blocks, because PyTorch rounds the size of pinned memory up to a power of two.

    Args:
        pinned: whether CUDA can copy to it without waiting.
        block_bytes: size of a block, a power of two. The last block is smaller.
    """

    def __init__(self, *, pinned: bool, block_bytes: int = 1 << 26):
        self.pinned = pinned
        self._block_bytes = block_bytes
        self._blocks: list[Tensor] = []
        self._used = 0

    @property
    def nbytes(self) -> int:
        """Size of the memory."""
        return sum(block.nbytes for block in self._blocks)

    def resize(self, size: int) -> None:
        """Make room for `size` bytes, and forget the copies."""
        self._used = 0
        if self.nbytes == size:
            return
        self._blocks = []
        for start in range(0, size, self._block_bytes):
            length = min(self._block_bytes, size - start)
            self._blocks.append(torch.empty(length, dtype=torch.uint8, pin_memory=self.pinned))

    def append(self, tensors: Iterable[Tensor]) -> Iterator[memoryview]:
        """Copy tensors. Returns: their bytes in pieces. On CUDA the copies are only queued."""
        begin = self._used
        for value in tensors:
            flat = flat_bytes(value)
            while len(flat):
                block, offset = self._place(self._used)
                length = min(len(block) - offset, len(flat))
                block[offset : offset + length].copy_(flat[:length], non_blocking=self.pinned)
                flat = flat[length:]
                self._used += length
        return self._pieces(begin, self._used)

    def _pieces(self, begin: int, end: int) -> Iterator[memoryview]:
        while begin < end:
            block, offset = self._place(begin)
            length = min(len(block) - offset, end - begin)
            yield block[offset : offset + length].numpy().data
            begin += length

    def _place(self, byte: int) -> tuple[Tensor, int]:
        """Return the block that holds a byte, and where in the block."""
        return self._blocks[byte // self._block_bytes], byte % self._block_bytes


def check_space_for_run(run: Path, config: TrainConfig, engine: SingleProcess) -> None:
    """Raise InputError if the disk is too small for all checkpoints that exist at one time.

    They are the newest ones, one that is being written, and those that `keep_every` keeps.
    Checkpoints that the run has already written need no more space.
    """
    report = config.report
    saves = 1 + -(-config.steps // report.checkpoint_interval)
    count = min(saves, report.keep_checkpoints + 1)
    if report.keep_every:
        count = min(saves, count + config.steps // report.keep_every)
    one = checkpoint_bytes(config, engine)
    written = sum(
        file.stat().st_size for folder in checkpoints(run).values() for file in folder.iterdir()
    )
    purpose = f"{plural(count, 'checkpoint')} of {one / 1e9:.3g} GB"
    check_free_space(run, count * one - written, purpose, _SPACE_HINT)


def checkpoint_bytes(config: TrainConfig, engine: SingleProcess) -> int:
    """Return the size of a checkpoint's tensors after the first step."""
    row = OPTIMIZERS[config.optimizer]
    in_blocks = {id(each) for each in linear_parameters(engine.model) if each.ndim == 2}
    total = 0
    for parameter in engine.model.parameters():
        state = row.block_matrix_state_bytes if id(parameter) in in_blocks else ADAMW_STATE_BYTES
        state = state if parameter.requires_grad else 0
        total += parameter.numel() * (4 + state)
    return total
