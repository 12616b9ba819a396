"""Average gradients over ranks in buckets, during the backward of the last micro-batch.

    bucket    about 25 MB of float32 gradients, in reverse parameter order: about the order in which
              a backward completes them
    views     a parameter's gradient is a view of its bucket, so an all-reduce needs no copies
    start     the all-reduce of a bucket starts once all its gradients are complete. Buckets start
              in order, because ranks must call collectives in the same order
    finish    wait for all buckets, then divide by the number of ranks

Sums are in float32 whatever the precision of the run, and the order of additions is fixed.

Cost      per step and element: 4 bytes to zero, 8 bytes to divide, and the all-reduce
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn

BUCKET_BYTES = 25_000_000


class GradientBuckets:
    """Averages the gradients of parameters over all ranks.

    Args:
        parameters: float32, in the same order on all ranks.
        ranks: number of ranks.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: int):
        self._ranks = ranks
        self._buckets = [_Bucket(group) for group in _groups(reversed(parameters))]
        self._bucket_of = {
            id(parameter): bucket for bucket in self._buckets for parameter in bucket.parameters
        }
        self._num_started = len(self._buckets)

    def begin_step(self) -> None:
        """Set all gradients to zero. Each backward of the step adds to them in place."""
        for bucket in self._buckets:
            bucket.zero()

    def begin_last_backward(self) -> None:
        """From now until `finish`, start the all-reduce of each bucket once it is complete."""
        self._num_started = 0
        for bucket in self._buckets:
            bucket.num_missing = len(bucket.parameters)

    def gradient_added(self, parameter: nn.Parameter) -> None:
        """Note that the backward has added to a parameter's gradient. Autograd's hooks call it."""
        self._bucket_of[id(parameter)].num_missing -= 1
        while (
            self._num_started < len(self._buckets)
            and self._buckets[self._num_started].num_missing == 0
        ):
            self._start_next()

    def finish(self) -> None:
        """Wait until all gradients are averages over the ranks."""
        # Start the buckets with parameters that the backward did not reach.
        while self._num_started < len(self._buckets):
            self._start_next()
        for bucket in self._buckets:
            bucket.work.wait()
            bucket.work = None
            bucket.gradients /= self._ranks

    def _start_next(self) -> None:
        bucket = self._buckets[self._num_started]
        bucket.work = dist.all_reduce(bucket.gradients, async_op=True)
        self._num_started += 1


class _Bucket:
    """Some parameters, and one tensor that holds their gradients end to end."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters
        sizes = [parameter.numel() for parameter in parameters]
        self.gradients = torch.zeros(sum(sizes), device=parameters[0].device)
        self._views = [
            flat.view_as(parameter)
            for flat, parameter in zip(self.gradients.split(sizes), parameters, strict=True)
        ]
        self.num_missing = 0
        self.work: dist.Work | None = None

    def zero(self) -> None:
        self.gradients.zero_()
        # Set the views in each step, because the optimizer sets gradients to None.
        for parameter, view in zip(self.parameters, self._views, strict=True):
            parameter.grad = view


def _groups(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Cut parameters into groups of at most BUCKET_BYTES. A larger one is a group by itself."""
    groups: list[list[nn.Parameter]] = []
    size = BUCKET_BYTES
    for parameter in parameters:
        if size + parameter.nbytes > BUCKET_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(parameter)
        size += parameter.nbytes
    return groups
