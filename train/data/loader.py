"""Batches of a token stream: training batches from the step number, evaluation batches in order.

    windows     W = ceil((n - 1) / T)      inputs of window i: tokens [iT, iT + T)
                                           targets of window i: tokens [iT + 1, iT + T + 1)
    position    p = step * batch_size + rank * (batch_size / world_size) + j    for row j of a rank
    row         window permutation_e(p mod W) of epoch e = p // W

n tokens, T context tokens. In each epoch every token except the first is a target exactly once, and
no two ranks read the same window. A batch depends on the step only, so a resumed run continues with
the next batch, and step 10**9 takes as long as step 0. The last window is padded, and its padded
targets are -100 (ignored). Inputs and targets are views of one window of T + 1 tokens. A window has
the dtype of the shards and is converted to int64 on the device.

The permutation of an epoch is a balanced Feistel network (Luby & Rackoff 1988) on the smallest
4**h >= W. It is applied again until the result is below W (cycle walking, Black & Rogaway 2002), on
average less than 4 times. No table of W entries is needed.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from .documents.text_batch import mix
from .shards import TokenStream

IGNORE_INDEX = -100
_ROUNDS = 8
# The loader reads the batches of several steps at once. With small batches, such as (12, 64), numpy
# needs more time per call than per token.
_BLOCK_TOKENS = 1 << 16


def permute(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Apply the permutation of [0, size) that belongs to (seed, epoch).

    Args:
        index: (n,) int64 in [0, size).
        size: 1 to 2**62.
        seed, epoch: any Python integers.
    Returns: (n,) int64 in [0, size). Distinct indices give distinct results.
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    keys = np.frombuffer(digest, dtype="<u8")
    result = _feistel(index.astype(np.uint64), half_bits, mask, keys)
    while (outside := np.flatnonzero(result >= np.uint64(size))).size:
        result[outside] = _feistel(result[outside], half_bits, mask, keys)
    return result.astype(np.int64)


def _feistel(x: np.ndarray, half_bits: np.uint64, mask: np.uint64, keys: np.ndarray) -> np.ndarray:
    """A bijection of [0, 4**half_bits). The round function is `mix`."""
    left = x >> half_bits
    right = x & mask
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & mask)
    return (left << half_bits) | right


def permuted_positions(first: int, offsets: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Return permutation_e(p mod size) of epoch e = p // size, for positions p = first + offsets.

    Args:
        first: any Python integer from 0. It can exceed 2**63.
        offsets: int64, any shape.
        size: number of windows or rows per epoch.
        seed: decides the order of each epoch.
    Returns: int64 in [0, size), shape of `offsets`.
    """
    first_epoch, offset = divmod(first, size)
    epochs, indices = np.divmod(offset + offsets, size)
    result = np.empty_like(indices)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        result[here] = permute(indices[here], size, seed, first_epoch + epoch)
    return result


@dataclass(frozen=True)
class Batch:
    """Rows of tokens on the CPU. `len(batch)` is the number of rows B, and a slice is a batch.

    Attributes:
        windows: (B, T + 1), dtype of the shards, read-only. Columns [0, T) are the inputs, columns
            [1, T + 1) are the targets. Padding is 0.
        num_targets: (B,) int64, the number of targets in each row, without padding.
        orders: (B, T) int32, or None. Each group of sorted_rows rows holds the stable sort of the
            inputs of these rows, laid end to end.
        sorted_rows: rows per group.
        separator: token that begins a document. Documents do not attend to each other. None: each
            row is one document.
    """

    windows: Tensor
    num_targets: np.ndarray
    orders: Tensor | None = None
    sorted_rows: int = 1
    separator: int | None = None

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, rows: slice) -> "Batch":
        # A slice that begins inside a group has no order.
        is_aligned = (rows.start or 0) % self.sorted_rows == 0
        orders = self.orders[rows] if self.orders is not None and is_aligned else None
        return replace(
            self, windows=self.windows[rows], num_targets=self.num_targets[rows], orders=orders
        )

    @property
    def token_order(self) -> Tensor | None:
        """The stable sort of all inputs, (B T,) int32 on the CPU; None unless B is sorted_rows."""
        if self.orders is None or len(self) != self.sorted_rows:
            return None
        return self.orders.flatten()

    @property
    def inputs(self) -> Tensor:
        """(B, T), dtype of the shards, on the CPU."""
        return self.windows[:, :-1]

    def on(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Copy inputs and targets to a device, without waiting for the device.

        Returns: (inputs, targets), both (B, T) int64. Padding is 0 in inputs and -100 in targets.
        """
        windows = copy_to_device(self.windows, torch.device(device))
        inputs = windows[:, :-1].to(torch.int64, copy=True)
        targets = windows[:, 1:].to(torch.int64, copy=True)
        for row in np.flatnonzero(self.num_targets < targets.shape[1]).tolist():
            targets[row, self.num_targets[row] :] = IGNORE_INDEX
        return inputs, targets

    def model_inputs(
        self, device: torch.device, dropout_seed: int | None = None
    ) -> dict[str, Tensor]:
        """Return the arguments of GPT.forward on `device`, without waiting for the device."""
        tokens, targets = self.on(device)
        inputs = {"tokens": tokens, "targets": targets}
        if self.token_order is not None:
            inputs["token_order"] = copy_to_device(self.token_order, device)
        if self.separator is not None:
            cu_seqlens = document_starts(self.inputs, self.separator)
            inputs["cu_seqlens"] = copy_cu_seqlens(cu_seqlens, device)
        return inputs | seed_input(dropout_seed, device)


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to `device`, without waiting for the device.

    A copy to CUDA from memory that is not pinned waits for all work queued on the device.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def copy_cu_seqlens(cu_seqlens: Tensor, device: torch.device) -> Tensor:
    """Copy the starts of documents to `device`. torch.compile compiles once for any number."""
    copied = copy_to_device(cu_seqlens, device)
    torch._dynamo.mark_dynamic(copied, 0)
    return copied


def seed_input(dropout_seed: int | None, device: torch.device) -> dict[str, Tensor]:
    """Return the argument `dropout_seed` of GPT.forward; {} for None."""
    if dropout_seed is None:
        return {}
    return {"dropout_seed": torch.full((), dropout_seed, dtype=torch.int64, device=device)}


class Loader:
    """The training batches of one rank. The top of this file defines them.

    Attributes:
        windows: W, the number of windows per epoch, over all ranks.
        batch_size: rows per step, over all ranks.
    """

    def __init__(
        self, stream: TokenStream, *, context_tokens: int, batch_size: int, seed: int,
        rank: int = 0, world_size: int = 1, pinned: bool = False, sorted_rows: int | None = None,
        separator: int | None = None,
    ):  # fmt: skip
        """Check the sizes. Reads no tokens.

        Args:
            stream: the tokens.
            context_tokens: T.
            batch_size: rows per step, over all ranks.
            seed: decides the order of each epoch.
            rank, world_size: which rows of a step are this rank's.
            pinned: whether batches are in pinned memory, from which CUDA copies without waiting.
            sorted_rows: sort the inputs of each group of so many rows, see Batch; a divisor of the
                rows per step and rank. None: do not sort.
            separator: see Batch.
        Raises: InputError if a size is below 1, batch_size is not divisible by world_size, or the
            data is shorter than T + 1.
        """
        if batch_size < 1 or context_tokens < 1:
            raise InputError(
                "data: batch_size and context_tokens must be at least 1, got "
                f"{batch_size} and {context_tokens}"
            )
        if batch_size % world_size:
            raise InputError(
                f"batch_size: expected a multiple of the {world_size} ranks, got {batch_size}; "
                f"take {max(1, batch_size // world_size) * world_size}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"Loader: rank must be in [0, {world_size}), got {rank}")
        if len(stream) < context_tokens + 1:
            raise InputError(
                f"data: context_tokens {context_tokens} needs {context_tokens + 1} training tokens "
                f"or more, got {len(stream)}; give more text or a shorter context"
            )
        self.stream = stream
        self.context_tokens = context_tokens
        self.batch_size = batch_size
        self.seed = seed
        self.windows = -(-(len(stream) - 1) // context_tokens)
        self._pinned = pinned
        self._sorted_rows = sorted_rows
        self._separator = separator
        self._rows = batch_size // world_size
        self._first_row = rank * self._rows
        # A block covers at most 16 epochs, because each epoch needs its own permutation.
        steps = min(_BLOCK_TOKENS // (self._rows * context_tokens), 16 * self.windows // batch_size)
        self._block_steps = max(1, steps)
        self._block: tuple[int, Batch] | None = None

    def batch(self, step: int) -> Batch:
        """Return this rank's batch of `step`: batch_size // world_size rows.

        Steps are 0, 1, 2, ... without end. They may be read in any order.
        """
        number, place = divmod(step, self._block_steps)
        if self._block is None or self._block[0] != number:
            indices = self.window_indices(number * self._block_steps, self._block_steps).reshape(-1)
            block = _read(
                self.stream, indices, self.context_tokens, self._pinned, self._sorted_rows
            )
            self._block = number, replace(block, separator=self._separator)
        return self._block[1][place * self._rows : (place + 1) * self._rows]

    def num_targets(self, step: int) -> int:
        """Return the number of targets in the batch of `step` over all ranks, without padding.

        Each rank computes it without communication.
        """
        full = self.context_tokens
        last = len(self.stream) - 1 - (self.windows - 1) * full  # targets in the last window
        if last == full:
            return self.batch_size * full
        is_last_window = self._windows_of(0, self.batch_size, step, 1) == self.windows - 1
        return self.batch_size * full - int(is_last_window.sum()) * (full - last)

    def window_indices(self, first_step: int, steps: int) -> np.ndarray:
        """Return the windows that this rank reads in `steps` consecutive steps.

        Returns: (steps, batch_size // world_size) int64 in [0, windows).
        """
        return self._windows_of(self._first_row, self._rows, first_step, steps)

    def _windows_of(self, first_row: int, rows: int, first_step: int, steps: int) -> np.ndarray:
        offsets = np.arange(steps)[:, None] * self.batch_size + np.arange(rows)
        first = first_step * self.batch_size + first_row
        return permuted_positions(first, offsets, self.windows, self.seed)


def evaluation_batches(
    stream: TokenStream, *, context_tokens: int, batch_size: int, max_tokens: int | None = None,
    rank: int = 0, world_size: int = 1, separator: int | None = None,
) -> Iterator[Batch]:  # fmt: skip
    """Yield the windows in order. Over all ranks, every token except the first is a target once.

    Args:
        stream: the tokens.
        context_tokens: T. The stream may be shorter.
        batch_size: rows per rank.
        max_tokens: maximum number of targets. The windows are then spread evenly over the stream
            and are always the same. At least one window is read. None: all windows.
        rank, world_size: which windows are this rank's.
        separator: see Batch.
    Yields: batches of batch_size rows; the last batch may have fewer. Every rank gets the same
        number of batches: a rank without a window gets a batch without targets.
    Raises: InputError if the stream holds fewer than two tokens.
    """
    if len(stream) < 2:
        raise InputError(
            f"data: evaluation needs at least 2 tokens, got {len(stream)}; give more text or a "
            "larger `held_out`"
        )
    windows = -(-(len(stream) - 1) // context_tokens)
    count = windows if max_tokens is None else min(windows, max(1, max_tokens // context_tokens))
    chosen = np.arange(count) * windows // count
    for start in range(0, count, batch_size * world_size):
        own = chosen[start + rank * batch_size :][:batch_size]
        batch = _read(stream, own if len(own) else chosen[:1], context_tokens)
        batch = replace(batch, separator=separator)
        if not len(own):
            batch = replace(batch, num_targets=np.zeros_like(batch.num_targets))
        yield batch


def _read(
    stream: TokenStream,
    indices: np.ndarray,
    context_tokens: int,
    pinned: bool = False,
    sorted_rows: int | None = None,
) -> Batch:
    """Read some windows of the stream, and sort their inputs."""
    starts = indices * context_tokens
    num_targets = np.minimum(len(stream) - 1 - starts, context_tokens)
    shape = (len(indices), context_tokens + 1)
    windows = torch.empty(shape, dtype=getattr(torch, stream.dtype.name), pin_memory=pinned)
    # numpy copies in the calling thread only and releases the interpreter lock meanwhile. torch
    # would start threads of its own in the prefetch thread.
    rows = zip(windows.numpy(), starts.tolist(), num_targets.tolist(), strict=True)
    for row, start, count in rows:
        row[: count + 1] = stream.read(start, start + count + 1)
        row[count + 1 :] = 0
    orders = None if sorted_rows is None else token_orders(windows, sorted_rows, pinned)
    return Batch(windows, num_targets, orders, sorted_rows or 1)


def token_orders(windows: Tensor, sorted_rows: int, pinned: bool = False) -> Tensor:
    """Sort the inputs of each group of `sorted_rows` windows: `orders` of a Batch."""
    inputs = windows.numpy()[:, :-1]
    orders = torch.empty(inputs.shape, dtype=torch.int32, pin_memory=pinned)
    for first in range(0, len(inputs), sorted_rows):
        group = slice(first, first + sorted_rows)
        order = np.argsort(inputs[group], axis=None, kind="stable")
        orders.numpy()[group] = order.reshape(-1, inputs.shape[1])
    return orders


def document_starts(tokens: Tensor, separator: int) -> Tensor:
    """Find where documents start in the rows of a batch, laid end to end.

    A document starts at the start of each row and at each `separator`: a separator is the first
    token of the document that follows it. Generation also starts a document with a separator.

    Args:
        tokens: (B, T), any integer dtype, on the CPU.
        separator: the end-of-text id.
    Returns: as `cu_seqlens_of`.
    """
    is_start = tokens == separator
    is_start[:, 0] = True
    return cu_seqlens_of(is_start)


def cu_seqlens_of(is_start: Tensor) -> Tensor:
    """Return the starts of the documents in rows that are laid end to end.

    Args: is_start: (B, T) bool, on the CPU. Whether a document starts here; true in column 0.
    Returns: as `pad_starts`.
    """
    return pad_starts(is_start.flatten().nonzero()[:, 0], is_start.numel())


def pad_starts(starts: Tensor, num_tokens: int) -> Tensor:
    """Return `cu_seqlens` for documents, with empty documents added at the end.

    The number of documents becomes a power of two, so that few different lengths occur. It becomes
    two or more, because torch.compile would compile again for a length of one.

    Args:
        starts: (n,) integers on the CPU, where documents start; the first is 0.
        num_tokens: number of tokens of all documents.
    Returns: (documents + 1,) int32: the starts, then num_tokens once or more.
    """
    documents = max(2, 1 << (len(starts) - 1).bit_length())
    cu_seqlens = torch.full((1 + documents,), num_tokens, dtype=torch.int32)
    cu_seqlens[: len(starts)] = starts
    return cu_seqlens
