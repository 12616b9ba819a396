"""Batches that are there before a step asks for them: a thread reads the next ones while this one is computed.

What it calls is a pure function of the step, so whatever it has read ahead when training stops is forgotten, not lost.
"""

import itertools
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from .loader import Batch

# One is on its way to the device, one is ready, one is being read.
_AHEAD = 2


class Prefetch:
    """`next(prefetch)`: read(first), read(first + 1) … without end; as a context, which ends its thread.

    An error of `read` is raised where its step is asked for.
    """

    def __init__(self, read: Callable[[int], Batch], first: int):
        self._read, self._steps, self._ready = read, itertools.count(first), deque()

    def __enter__(self) -> "Prefetch":
        self._thread = ThreadPoolExecutor(1, "prefetch")
        for _ in range(_AHEAD):
            self._submit()
        return self

    def __exit__(self, *_) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __next__(self) -> Batch:
        batch = self._ready.popleft().result()
        self._submit()
        return batch

    def _submit(self) -> None:
        self._ready.append(self._thread.submit(self._read, next(self._steps)))
