"""Record the kernels of a function as a CUDA graph, and launch them again at each call.

    static arguments   each call copies its arguments into tensors whose addresses never change
    warm-up            the first calls run the function as usual: it compiles kernels and allocates
                       what stays, such as the state of an optimizer
    recording          the next call records the kernels that the function launches. Its memory is
                       taken from a pool of the graph
    replay             from then on, a call copies the arguments and launches all kernels at once

A step of GPT-2 124M launches about 700 kernels per micro-batch. Without a graph the host needs
several milliseconds for them, more than the GPU does in small models.

A function can be recorded if it launches the same kernels on the same addresses each time: shapes
do not vary, the host reads nothing from the device, and all that changes is a tensor.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Calls before the recording. Triton's kernels are compiled in the first one.
WARM_UP_CALLS = 2


class Recorded:
    """A function that becomes a CUDA graph after a few calls.

    Args:
        function: takes tensors as keyword arguments and returns a tensor, or a tuple of tensors.
        device: its CUDA device.
        after: another function that is recorded first, because this one uses tensors that it
            leaves. The two are never called at the same time and share the memory of temporaries.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        device: torch.device,
        after: "Recorded | None" = None,
    ):
        self._function = function
        self._device = device
        self._after = after
        self._static: dict[str, Tensor] = {}
        self.forget()

    @property
    def is_recorded(self) -> bool:
        return self._replay is not None

    def forget(self) -> None:
        """Record the function again, because tensors that it uses were replaced."""
        self._num_calls = 0
        self._replay: Callable[[], None] | None = None
        self._result: Any = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, **arguments: Tensor | float) -> Any:
        """Call the function. Its results are overwritten by the next call.

        Args:
            arguments: tensors on the device, or numbers, which become float32 tensors. Names and
                shapes are the same in each call.
        """
        self._copy(arguments)
        if self._replay is None:
            self._num_calls += 1
            is_early = self._after is not None and not self._after.is_recorded
            if self._num_calls <= WARM_UP_CALLS or is_early:
                return self._warm_up()
            self._replay = self._record()
        self._replay()
        return self._result

    def _copy(self, arguments: dict[str, Tensor | float]) -> None:
        for name, value in arguments.items():
            if name not in self._static:
                like = value if isinstance(value, Tensor) else torch.tensor(0.0)
                self._static[name] = torch.empty_like(like, device=self._device)
            if isinstance(value, Tensor):
                self._static[name].copy_(value)
            else:
                self._static[name].fill_(value)

    def _warm_up(self) -> Any:
        """Call the function on the stream of the recording: autograd remembers streams."""
        if self._stream is None and self._after is not None:
            # A pool reuses memory only on the stream that freed it.
            self._stream = self._after._stream
        elif self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = self._function(**self._static)
        current.wait_stream(self._stream)
        return result

    def _record(self) -> Callable[[], None]:
        self._graph = torch.cuda.CUDAGraph()
        options = {
            "stream": self._stream,
            # Other threads allocate pinned memory meanwhile: for the next batch, or a checkpoint.
            "capture_error_mode": "thread_local",
            "pool": None if self._after is None else self._after.pool,
        }
        with torch.cuda.graph(self._graph, **options):
            self._result = self._function(**self._static)
        return self._graph.replay

    @property
    def pool(self) -> Any:
        """The memory of the graph; None before it is recorded."""
        return None if self._graph is None else self._graph.pool()
