"""Examples of tokens and targets, packed into rows of equal length.

An example longer than a row loses its end. An example without a target in a row is left out. Rows
are filled by best fit, longest example first. Each example of a row is a document of its own:
documents do not attend to each other, and positions start at 0 in each. The tail of a row is
padding.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data.loader import IGNORE_INDEX, copy_cu_seqlens, copy_to_device, cu_seqlens_of, seed_input


@dataclass(frozen=True)
class Example:
    """Tokens of a conversation. `is_answer`: (tokens,) bool, the tokens that are targets."""

    tokens: np.ndarray
    is_answer: np.ndarray

    def __len__(self) -> int:
        """Number of inputs: the last token is a target only."""
        return len(self.tokens) - 1


@dataclass
class Counts:
    """How many records did not fit into a row."""

    shortened: int = 0
    left_out: int = 0

    def cut(self, examples: Iterable[Example], T: int) -> list[Example]:
        """Return the examples with at most T inputs that have a target."""
        kept = []
        for example in examples:
            short = Example(example.tokens[: T + 1], example.is_answer[: T + 1])
            if not short.is_answer[1:].any():
                self.left_out += 1
                continue
            self.shortened += len(example) > T
            kept.append(short)
        return kept


@dataclass(frozen=True)
class Rows:
    """Rows of packed examples on the CPU. `len(rows)` is their number, and a slice is a batch.

    Attributes:
        tokens, targets: (B, T) int32. Padding is 0 in tokens; targets are -100 except in answers.
        is_start: (B, T) bool, whether a document starts here. None: each row is one document.
        num_targets: (B,) int64.
    """

    tokens: Tensor
    targets: Tensor
    is_start: Tensor | None
    num_targets: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | np.ndarray) -> "Rows":
        is_start = None if self.is_start is None else self.is_start[rows]
        return Rows(self.tokens[rows], self.targets[rows], is_start, self.num_targets[rows])

    def model_inputs(
        self, device: torch.device, dropout_seed: int | None = None
    ) -> dict[str, Tensor]:
        """Return the arguments of GPT.forward on `device`, without waiting for the device."""
        inputs = {
            "tokens": copy_to_device(self.tokens, device).long(),
            "targets": copy_to_device(self.targets, device).long(),
        }
        if self.is_start is not None:
            inputs["cu_seqlens"] = copy_cu_seqlens(cu_seqlens_of(self.is_start), device)
        return inputs | seed_input(dropout_seed, device)

    def without_targets(self) -> "Rows":
        """Return the rows with all targets -100."""
        targets = torch.full_like(self.targets, IGNORE_INDEX)
        return Rows(self.tokens, targets, self.is_start, np.zeros_like(self.num_targets))


def make_rows(examples: list[Example], T: int | None) -> Rows:
    """Pack examples into rows of T tokens. None: one example per row, as long as the longest."""
    lengths = [len(each) for each in examples]
    if T is None:
        groups = [[place] for place in range(len(examples))]
        width = max(lengths, default=1)
    else:
        groups = pack(lengths, T)
        width = T
    tokens = torch.zeros(len(groups), width, dtype=torch.int32)
    targets = torch.full_like(tokens, IGNORE_INDEX)
    is_start = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, group in enumerate(groups):
        start = 0
        for place in group:
            example = examples[place]
            end = start + len(example)
            ids = torch.from_numpy(example.tokens)
            is_answer = torch.from_numpy(example.is_answer[1:])
            tokens[row, start:end] = ids[:-1]
            targets[row, start:end][is_answer] = ids[1:][is_answer]
            is_start[row, start] = True
            start = end
        if start < width:  # the padding is a document
            is_start[row, start] = True
    num_targets = (targets != IGNORE_INDEX).sum(1).numpy()
    return Rows(tokens, targets, None if T is None else is_start, num_targets)


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Group items so that the lengths of a group add up to at most `capacity`, by best fit.

    The longest item comes first. An item goes to the group with the least room that is enough.

    Returns: the items of each group, in ascending order.
    """
    groups: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms = 0  # bit r: whether a group with room r exists
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        fitting = rooms >> lengths[item] << lengths[item]
        if fitting:
            room = (fitting & -fitting).bit_length() - 1
            group = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room = capacity
            group = len(groups)
            groups.append([])
        groups[group].append(item)
        room -= lengths[item]
        by_room.setdefault(room, []).append(group)
        rooms |= 1 << room
    return [sorted(group) for group in groups]
