"""Keys and values of earlier tokens. With them, a forward computes only the new tokens.

The tensors are allocated once, for `capacity` tokens per sequence, and written in place. Lengths
differ between sequences. They are on the device, so that a CUDA graph can advance them, and on the
host, so that no code waits for the device to learn them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..config import GPTConfig


class KVCache:
    """Keys and values of a batch of sequences of different lengths.

    The weights of the model must not change while a cache is in use.

    Args:
        config: the GPTConfig of the model.
        batch_size: number of sequences.
        capacity: maximum number of tokens per sequence. Default: config.context_tokens.
        device: of the model.
    Attributes:
        keys, values: (L, B, prefix + capacity, G, K), in the dtype of the first keys. None until
            the first forward.
        lengths: (B,) int32, number of tokens of each sequence.
        host_lengths: the same numbers on the host.
        is_active: (B,) int32, 1 for sequences that a forward makes longer, 0 for finished ones.
    """

    is_prefill = False

    def __init__(
        self,
        config: "GPTConfig",
        batch_size: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
    ):
        self.capacity = config.context_tokens if capacity is None else capacity
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.host_lengths = [0] * batch_size
        self.is_active = torch.ones_like(self.lengths)
        self._config = config
        # The first slots of each sequence hold the keys and values of the prefix.
        self._prefix = config.prefix_tokens
        slots = self._prefix + self.capacity
        self._shape = (config.n_layer, batch_size, slots, config.kv_heads, config.head_size)
        self._finished: set[int] = set()
        # Slot s of sequence b is row b * slots + s of a layer's keys.
        self._first_slots = torch.arange(batch_size, device=device)[:, None] * slots
        self._slots: Tensor | None = None
        self._new_lengths: Tensor | None = None
        self._head: Tensor | None = None

    @property
    def longest(self) -> int:
        """Number of tokens of the longest sequence."""
        return max(self.host_lengths, default=0)

    def positions(self, T: int) -> Tensor:
        """Return the positions of T new tokens per sequence, (B, T) int64."""
        if self.longest + T > self.capacity:
            raise ValueError(
                f"KVCache: expected at most {self.capacity} tokens, got {self.longest + T}; "
                "make a cache with a larger capacity"
            )
        first = self.lengths[:, None] + self._prefix
        return first + torch.arange(T, device=self.lengths.device)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Write k, v (B, T, G, K) of one layer after the tokens of each sequence.

        Returns: all keys and all values of the layer, (B, prefix + capacity, G, K), and (B,) int32,
            how many of them each sequence has.
        """
        self.allocate(k)
        if layer == 0:
            T = k.shape[1]
            self._slots = (self._first_slots + self.positions(T)).flatten()
            self._new_lengths = self.lengths + (self._prefix + T)
        keys, values = self.keys[layer], self.values[layer]
        keys.flatten(0, 1).index_copy_(0, self._slots, k.flatten(0, 1))
        values.flatten(0, 1).index_copy_(0, self._slots, v.flatten(0, 1))
        return keys, values, self._new_lengths

    def allocate(self, k: Tensor) -> None:
        """Allocate the tensors, once. Under autocast the dtype of k is not that of the weights."""
        if self.keys is None:
            self.keys = k.new_empty(self._shape)
            self.values = k.new_empty(self._shape)

    def cast_once(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weight of the head in another dtype. The copy is made once.

        A step of one token reads each weight once. Casting the head in each step would move more
        bytes than all blocks in 16 bits.
        """
        if weight.dtype == dtype:
            return weight
        if self._head is None:
            self._head = weight.to(dtype)
        return self._head

    def advance(self, T: int) -> None:
        """Count T more tokens. The model calls it after its last layer."""
        self.lengths.add_(self.is_active, alpha=T)
        self.advance_host(T)

    def advance_host(self, T: int) -> None:
        """Count T more tokens on the host, after a CUDA graph has counted them on the device."""
        for row in range(len(self.host_lengths)):
            if row not in self._finished:
                self.host_lengths[row] += T

    def set_lengths(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Set the lengths of the sequences `rows`, and make them active."""
        self._finished.difference_update(rows)
        self._write(rows, lengths, 1)

    def finish(self, rows: Sequence[int]) -> None:
        """Empty the sequences `rows`. Later forwards write to their first slot only."""
        self._finished.update(rows)
        self._write(rows, [0] * len(rows), 0)

    def select(self, rows: Sequence[int], *, more: int) -> "KVCache":
        """Return a cache of copies of the sequences `rows`, each with room for `more` tokens.

        A sequence can be copied several times, for several continuations.
        """
        device = self.lengths.device
        lengths = [self.host_lengths[row] for row in rows]
        kept = max(lengths, default=0)
        copy = KVCache(self._config, len(rows), capacity=kept + more, device=device)
        copy.set_lengths(range(len(rows)), lengths)
        if self.keys is not None:
            copy.allocate(self.keys)
            index = torch.tensor(rows, device=device)
            used = self._prefix + kept
            copy.keys[:, :, :used] = self.keys[:, index, :used]
            copy.values[:, :, :used] = self.values[:, index, :used]
        return copy

    def _write(self, rows: Sequence[int], lengths: Sequence[int], is_active: int) -> None:
        for row, length in zip(rows, lengths, strict=True):
            self.host_lengths[row] = length
        index = torch.tensor(rows, device=self.lengths.device)
        self.lengths[index] = torch.tensor(lengths, dtype=torch.int32, device=index.device)
        self.is_active[index] = is_active


class Prefill:
    """Overwrite sequences of a cache from position 0.

    A model that gets a Prefill as its cache computes keys and values, and no logits. Shorter
    prompts are padded on the right. Causal attention never looks at padding, because it comes
    later. After the forward, `KVCache.set_lengths` drops its keys.

    Args:
        cache: the cache to fill.
        rows: (R,) int64, the sequences of the cache, one per sequence of the forward.
    """

    is_prefill = True
    longest = 0

    def __init__(self, cache: KVCache, rows: Tensor):
        self._cache = cache
        self._rows = rows

    def positions(self, T: int) -> Tensor:
        """Return the positions of the T tokens, (T,) int64."""
        return torch.arange(T, device=self._rows.device)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, None]:
        """Write k, v (R, T, G, K) of one layer. Return them, for causal attention.

        With a prefix, T counts its tokens too.
        """
        self._cache.allocate(k)
        T = k.shape[1]
        self._cache.keys[layer, self._rows, :T] = k
        self._cache.values[layer, self._rows, :T] = v
        return k, v, None

    def advance(self, T: int) -> None:
        """Do nothing: lengths differ, so the caller sets them."""
