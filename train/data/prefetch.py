"""Read batches ahead: a thread reads the next batches while the current step is computed.

`read` is a pure function of the step, so a batch that was read but not used is not lost: a resumed
run reads it again.
"""

import itertools
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from .loader import Batch

# A run looks for errors of the next two batches. Meanwhile the thread reads two more.
_AHEAD = 4


class Prefetch:
    """Iterate over read(first), read(first + 1), ... without end. Use it in a `with` statement.

    `next(prefetch)` returns the next batch, or raises the error that `read` raised for it. Leaving
    the `with` statement ends the thread.
    """

    def __init__(self, read: Callable[[int], Batch], first: int):
        self._read = read
        self._steps = itertools.count(first)
        self._pending = deque()

    def __enter__(self) -> "Prefetch":
        self._thread = ThreadPoolExecutor(1, "prefetch")
        for _ in range(_AHEAD):
            self._submit()
        return self

    def __exit__(self, *_) -> None:
        self._thread.shutdown(cancel_futures=True)

    def error(self, count: int) -> BaseException | None:
        """Wait for the next `count` batches. Returns: the first error of `read`; None without."""
        errors = (batch.exception() for batch in itertools.islice(self._pending, count))
        return next((error for error in errors if error is not None), None)

    def __next__(self) -> Batch:
        batch = self._pending.popleft().result()
        self._submit()
        return batch

    def _submit(self) -> None:
        self._pending.append(self._thread.submit(self._read, next(self._steps)))
