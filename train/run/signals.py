"""Stopping a run: SIGINT or SIGTERM on one rank stops all ranks after the same step."""

import signal
import sys

from ..distributed.world import World, is_local_rank0


class Signals:
    """Notes the first SIGINT or SIGTERM while the context lasts.

    A second SIGINT interrupts at once. Under torchrun it does not, because the terminal sends
    SIGINT to the ranks and torchrun sends it to them again.
    """

    def __init__(self, world: World):
        self._world = world
        self._noted_here = False
        self._noted_on_any = False

    @property
    def received(self) -> bool:
        """Whether any rank has received a signal. All ranks must read it at the same places."""
        self._noted_on_any = self._noted_on_any or self._world.any_rank(self._noted_here)
        return self._noted_on_any

    def __enter__(self) -> "Signals":
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        if self._noted_here and number == signal.SIGINT and self._world.size == 1:
            raise KeyboardInterrupt
        self._noted_here = True
        if is_local_rank0():
            print("stopping; a checkpoint will be written", file=sys.stderr)
