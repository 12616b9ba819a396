"""Stopping a run: signals, and the option `max_minutes`.

    signals     SIGINT (Ctrl-C), SIGTERM, SIGHUP, SIGUSR1. A signal that the process ignores when it
                starts, as under nohup, stays ignored. SIGALRM: `max_minutes` are over
    imports     the process ends at once
    before the first step    StopRequested is raised where the program is. Nothing is saved
    steps       the signal is noted. All ranks stop after the same step and write a checkpoint. In
                a single process it interrupts a forward, a backward, an evaluation or a sample
    repeated    signals change nothing. SIGQUIT and SIGKILL end the process without a checkpoint
    messages    a single process prints a line when the signal arrives. Several ranks print one line
                from rank 0, when they agree which step is the last

A handler never prints through Python's streams, which do not allow a second writer.

This module is imported before everything else, so it imports nothing that takes long.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NoReturn, TypeVar

from ...errors import InputError, InterruptedRun, StopRequested
from ..terminal.console import is_local_rank0, print_from_handler

if TYPE_CHECKING:
    from ..distributed.world import World

Result = TypeVar("Result")

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # Windows has the first two
_NUMBERS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
TIME_LIMIT = getattr(signal, "SIGALRM", None)  # Windows has none
_LONGEST_LIMIT = 1e9  # seconds
_STOPPING = "stopping; a checkpoint will be written"


class _State:
    """The signal that this process has received, and what its handler does."""

    received: int | None = None
    is_raised = True
    """Whether the handler raises StopRequested."""
    is_alone = True
    """Whether the run has one process."""


# --- before a run


def end_at_once_on_signals() -> None:
    """Print one line and end the process when a signal arrives.

    For imports: their tracebacks say nothing, and an exception inside an import can be lost.
    """
    for number in _caught():
        signal.signal(number, _end_at_once)


def restore_default_signals() -> None:
    """Undo end_at_once_on_signals."""
    for number in _NUMBERS:
        if signal.getsignal(number) is _end_at_once:
            is_interrupt = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if is_interrupt else signal.SIG_DFL)


def _end_at_once(number: int, _frame) -> None:
    if is_local_rank0():
        print_from_handler(f"tritium: stopped by {signal.Signals(number).name}")
    os._exit(128 + number)


def _caught() -> list[int]:
    """Return the signals that this process does not ignore. Only the main thread has handlers."""
    if threading.current_thread() is not threading.main_thread():
        return []
    left_alone = (signal.SIG_IGN, None)  # None: a handler that is not Python's
    return [number for number in _NUMBERS if signal.getsignal(number) not in left_alone]


# --- during a run


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raise InterruptedRun if a signal arrives inside the context.

    During steps, the class Signals handles signals.

    Raises: InterruptedRun with the number of the signal.
    """
    _State.received = None
    _State.is_raised = True
    _State.is_alone = True
    numbers = _caught()
    if numbers and TIME_LIMIT is not None:
        numbers.append(TIME_LIMIT)
    before = {number: signal.signal(number, _note) for number in numbers}
    try:
        yield
    except StopRequested as stop:
        raise InterruptedRun(stop.number) from None
    finally:
        if TIME_LIMIT in before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            # More signals do not end a process that is about to print how to continue.
            if _State.received is None or handler is not _end_at_once:
                signal.signal(number, handler)


def set_time_limit(seconds: float) -> None:
    """Send SIGALRM to this process after `seconds`.

    Raises: InputError outside of the main thread, where Python handles no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        raise InputError(
            "max_minutes: expected a run in the main thread, got another thread; leave it out"
        )
    if TIME_LIMIT is not None and signal.getsignal(TIME_LIMIT) is _note:
        # 0 would mean no limit, and the system has a largest time.
        signal.setitimer(signal.ITIMER_REAL, min(max(seconds, 1e-3), _LONGEST_LIMIT))


def _note(number: int, _frame) -> None:
    if _State.received is not None:
        return
    _State.received = number
    if _State.is_raised:
        raise StopRequested(number)
    if _State.is_alone:
        print_from_handler(_STOPPING)


class Signals:
    """Signals of all ranks. Inside the context a signal does not interrupt this process."""

    def __init__(self, world: "World"):
        self._world = world
        self._error: BaseException | None = None
        self._is_received_on_any = False

    def request_stop(self, error: BaseException) -> None:
        """Stop all ranks as a signal does. Any rank can call it. `raise_stop` raises the error.

        The first error counts.
        """
        self._error = self._error or error

    @property
    def received(self) -> bool:
        """Whether any rank received a signal or an error. All ranks must read it together."""
        if not self._is_received_on_any:
            is_stopping = _State.received is not None or self._error is not None
            self._is_received_on_any = self._world.any_rank(is_stopping)
            if self._is_received_on_any and self._world.size > 1 and self._world.is_rank0:
                print_from_handler(_STOPPING)
        return self._is_received_on_any

    def raise_stop(self) -> NoReturn:
        """Raise the error of `request_stop` on all ranks, or InterruptedRun without one."""
        self.raise_error()
        raise InterruptedRun(self._number())

    def raise_error(self) -> None:
        """Raise the error of `request_stop` on all ranks, if there is one."""
        self._world.run_on_all_ranks(self._raise_error)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _number(self) -> int:
        """Return the signal that the lowest rank with a signal received."""
        numbers = [_State.received]
        if self._world.size > 1:
            import torch.distributed as dist

            numbers *= self._world.size
            dist.all_gather_object(numbers, _State.received)
        return next(number for number in numbers if number is not None)

    def __enter__(self) -> "Signals":
        _State.is_raised = False
        _State.is_alone = self._world.size == 1
        return self

    def __exit__(self, *_) -> None:
        _State.is_raised = True

    def interruptible(self, work: Callable[[], Result], *, is_local: bool = False) -> Result | None:
        """Run `work`, which changes nothing that is saved. Return None if a signal cut it short.

        Args:
            work: called in this process.
            is_local: whether `work` does not communicate. If it does, signals do not interrupt one
                of several ranks, because the others would wait for it.
        """
        if self._world.size > 1 and not is_local:
            return work()
        try:
            _State.is_raised = True
            if _State.received is not None:
                return None
            result = work()
            _State.is_raised = False
            return result
        except StopRequested:  # at most once: the handler raises for the first signal only
            if _State.is_alone:
                print_from_handler(_STOPPING)
            return None
        finally:
            _State.is_raised = False
