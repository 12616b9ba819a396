"""Batches of a token stream: training batches as a pure function of the step, evaluation batches in order.

    windows     W = ceil((n - 1) / T)      inputs of window i: [iT, iT + T)      targets: [iT + 1, iT + T + 1)
    position    p = step · batch_size + rank · (batch_size / world_size) + j      for row j of this rank
    row         window permutation_e(p mod W) of epoch e = p // W

So every token but the first is a target exactly once an epoch, nothing is drawn twice within one, ranks never meet, and step
10**9 costs what step 0 costs: a resumed run needs the step and nothing else. The last window is filled up with ignored targets
(-100). Inputs and targets are one window of T + 1 tokens, in the type of the shards: it is widened where it is computed with.
The permutation of an epoch is a balanced Feistel network (Luby & Rackoff 1988) on the smallest 4**h >= W, walked along
its cycle until it lands below W (Black & Rogaway 2002, under 4 walks on average), so no table of W entries exists anywhere.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from .shards import TokenStream

IGNORED = -100
_ROUNDS = 8
# Batches are gathered for several steps at once: at (12, 64) numpy's cost per call, not per token, is what counts.
_BLOCK_TOKENS = 1 << 16


def permute(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """The images of `index` under the permutation of [0, size) that belongs to (seed, epoch).

    Args:    index: (n,) int64 in [0, size).   size: 1 to 2**62.   seed, epoch: any Python integers.
    Returns: (n,) int64 in [0, size); distinct for distinct entries of index.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.frombuffer(
        hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest(), dtype="<u8"
    )
    images = _feistel(index.astype(np.uint64), half, mask, keys)
    while (outside := np.flatnonzero(images >= np.uint64(size))).size:
        images[outside] = _feistel(images[outside], half, mask, keys)
    return images.astype(np.int64)


def _feistel(x: np.ndarray, half: np.uint64, mask: np.uint64, keys: np.ndarray) -> np.ndarray:
    """A bijection of [0, 4**half), whatever the round function is; this one is the mixer of splitmix64."""
    left, right = x >> half, x & mask
    for key in keys:
        z = right ^ key
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((z ^ (z >> np.uint64(31))) & mask)
    return (left << half) | right


@dataclass(frozen=True)
class Batch:
    """Rows of tokens on the CPU; `len(batch)` of them, and `batch[2:4]` is a batch of two.

    windows: (B, T + 1), of the type of the shards, read-only: inputs and, one further, targets; padding is 0.
    num_targets: (B,) int64: how many targets of a row there are before its padding.
    """

    windows: Tensor
    num_targets: np.ndarray

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, rows: slice) -> "Batch":
        return Batch(self.windows[rows], self.num_targets[rows])

    @property
    def inputs(self) -> Tensor:
        """(B, T), of the type of the windows, on the CPU."""
        return self.windows[:, :-1]

    def on(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (B, T) int64 on the device, without waiting for it; padding is 0 in inputs, -100 in targets."""
        windows = moved(self.windows, torch.device(device))
        tokens, targets = (
            half.to(torch.int64, copy=True) for half in (windows[:, :-1], windows[:, 1:])
        )
        for row in np.flatnonzero(self.num_targets < targets.shape[1]).tolist():
            targets[row, self.num_targets[row] :] = IGNORED
        return tokens, targets


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for it: a copy from memory that is not pinned comes after all that is queued there."""
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else tensor.to(device)
    )


class Loader:
    """Training batches of one rank; see the top of this file.

    Attributes: windows: W, the rows of an epoch over all ranks.   batch_size: rows of a step over all ranks.
    """

    def __init__(
        self, stream: TokenStream, *, context_tokens: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1,
        pinned: bool = False,
    ):  # fmt: skip
        """Check the sizes; reads nothing.

        Args:    context_tokens: T.   batch_size: rows of a step, all ranks together.   seed: chooses the order of every epoch.
                 pinned: whether batches are in memory that CUDA copies from without waiting.
        Raises:  InputError if the ranks cannot share batch_size equally, a size is below 1 or the data is shorter than T + 1.
        """
        if batch_size < 1 or context_tokens < 1:
            raise InputError(
                f"data: batch_size and context_tokens must be at least 1, got {batch_size} and {context_tokens}"
            )
        if batch_size % world_size:
            raise InputError(
                f"data: batch_size must be a multiple of the {world_size} ranks, got {batch_size}; "
                f"take {max(1, batch_size // world_size) * world_size}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"Loader: rank must be in [0, {world_size}), got {rank}")
        if len(stream) < context_tokens + 1:
            raise InputError(
                f"data: context_tokens {context_tokens} needs {context_tokens + 1} training tokens or more, got {len(stream)}; "
                "give more text or a shorter context"
            )
        self.stream, self.context_tokens, self.batch_size, self.seed = (
            stream,
            context_tokens,
            batch_size,
            seed,
        )
        self.windows, self._pinned = -(-(len(stream) - 1) // context_tokens), pinned
        self._rows = batch_size // world_size
        self._first_row = rank * self._rows
        # ... but not for many short epochs, of which each has its own permutation to set up.
        self._block_steps = max(
            1, min(_BLOCK_TOKENS // (self._rows * context_tokens), 16 * self.windows // batch_size)
        )
        self._block: tuple[int, Batch] | None = None

    def batch(self, step: int) -> Batch:
        """The batch_size // world_size rows of `step` (0, 1, 2 … without end), the same whenever they are asked for."""
        number, place = divmod(step, self._block_steps)
        if self._block is None or self._block[0] != number:
            indices = self.window_indices(number * self._block_steps, self._block_steps).reshape(-1)
            self._block = number, _read(self.stream, indices, self.context_tokens, self._pinned)
        return self._block[1][place * self._rows : (place + 1) * self._rows]

    def num_targets(self, step: int) -> int:
        """How many targets of the batch of `step` count, over all ranks: without asking them."""
        full, last = (
            self.context_tokens,
            len(self.stream) - 1 - (self.windows - 1) * self.context_tokens,
        )
        if last == full:
            return self.batch_size * full
        short = self._windows_of(0, self.batch_size, step, 1) == self.windows - 1
        return self.batch_size * full - int(short.sum()) * (full - last)

    def window_indices(self, first_step: int, steps: int) -> np.ndarray:
        """Which windows this rank reads in some steps in a row: (steps, batch_size // world_size) int64 in [0, windows)."""
        return self._windows_of(self._first_row, self._rows, first_step, steps)

    def _windows_of(self, first_row: int, rows: int, first_step: int, steps: int) -> np.ndarray:
        # Python integers up to here: first_step * batch_size may pass 2**63.
        epoch, offset = divmod(first_step * self.batch_size + first_row, self.windows)
        positions = offset + np.arange(steps)[:, None] * self.batch_size + np.arange(rows)
        epochs, indices = np.divmod(positions, self.windows)
        result = np.empty_like(indices)
        for later in np.unique(epochs).tolist():
            here = epochs == later
            result[here] = permute(indices[here], self.windows, self.seed, epoch + later)
        return result


def evaluation_batches(
    stream: TokenStream, *, context_tokens: int, batch_size: int, max_tokens: int | None = None, rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:  # fmt: skip
    """Yield the windows in order: every token but the first is a target once, on one of the ranks.

    Args:    context_tokens: T; the stream may be shorter.   batch_size: rows of a rank.   max_tokens: most targets, in windows
             spread evenly over the stream, always the same ones; at least one window is read. None: all.
    Yields:  batches of batch_size rows, the last one of as many as there are. As many batches on every rank: one for which no
             window is left gets one without targets.
    Raises:  InputError if the stream holds fewer than two tokens.
    """
    if len(stream) < 2:
        raise InputError(
            f"data: evaluation needs at least 2 tokens, got {len(stream)}; hold out more text"
        )
    windows = -(-(len(stream) - 1) // context_tokens)
    count = windows if max_tokens is None else min(windows, max(1, max_tokens // context_tokens))
    chosen = np.arange(count) * windows // count
    for start in range(0, count, batch_size * world_size):
        mine = chosen[start + rank * batch_size :][:batch_size]
        batch = _read(stream, mine if len(mine) else chosen[:1], context_tokens)
        yield batch if len(mine) else Batch(batch.windows, np.zeros_like(batch.num_targets))


def _read(
    stream: TokenStream, indices: np.ndarray, context_tokens: int, pinned: bool = False
) -> Batch:
    """Some windows of the stream."""
    starts = indices * context_tokens
    num_targets = np.minimum(len(stream) - 1 - starts, context_tokens)
    shape, dtype = (len(indices), context_tokens + 1), getattr(torch, stream.dtype.name)
    windows = torch.empty(shape, dtype=dtype, pin_memory=pinned)
    # By numpy, which starts no threads of its own in the one that reads ahead, and leaves Python to others while it copies.
    for row, start, count in zip(
        windows.numpy(), starts.tolist(), num_targets.tolist(), strict=True
    ):
        row[: count + 1] = stream.read(start, start + count + 1)
        row[count + 1 :] = 0
    return Batch(windows, num_targets)


def document_starts(tokens: Tensor, separator: int) -> Tensor:
    """Where documents begin in rows of tokens laid end to end: with each row, and with each `separator` in it.

    A separator is read as the first token of the document after it, as when a model is asked to begin one.

    Args:
        tokens: (B, T), any integers, on the CPU.
    Returns: (documents + 1,) int32, 0 first and B T last. Empty documents at the end make its length one more than a power of
        two, so that few lengths occur.
    """
    begins = tokens == separator
    begins[:, 0] = True
    starts = begins.flatten().nonzero()[:, 0].to(torch.int32)
    cu_seqlens = starts.new_full((1 + (1 << (len(starts) - 1).bit_length()),), tokens.numel())
    cu_seqlens[: len(starts)] = starts
    return cu_seqlens
