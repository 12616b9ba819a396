"""Pairs of answers: records, their tokens, and rows of pairs.

    records     {"prompt": ..., "chosen": ..., "rejected": ...}, all text
                {"instruction": ..., "input": ..., "chosen": ..., "rejected": ...}; `input` may be
                empty or missing, and other fields are not read
    text        prompt and answer are a question and its answer in the template of the run

An answer that does not fit into a row loses its end. A pair is left out if its prompt leaves no
room for an answer, or if both answers are equal: the loss of such a pair has no gradient.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from ..data.loader import IGNORE_INDEX, copy_to_device, seed_input
from ..data.tokenizers.tokenizer import Tokenizer
from ..eval.jsonl import text_of
from .conversations import encode, read_messages
from .records import Record, errors_name
from .rows import Example

# Batches that are not compiled are as wide as their longest answer, rounded up to this.
_WIDTH_MULTIPLE = 8

Pair = tuple[Example, Example]
"""A chosen and a rejected answer, each after its prompt."""


def read_pair(record: Record, tokenizer: Tokenizer, template: str) -> Pair:
    """Return the tokens of a record. Raises: InputError, which names the line and the field."""
    place, content = record
    answers = [text_of(content, name, place) for name in ("chosen", "rejected")]
    if "prompt" in content:
        question = {"instruction": text_of(content, "prompt", place)}
    else:
        question = {"instruction": text_of(content, "instruction", place)}
        question["input"] = content.get("input", "")
    examples = []
    for answer in answers:
        one = (place, question | {"output": answer})
        messages = read_messages(one, template)
        with errors_name(place):  # the tokenizer may not have a character
            (example,) = encode(tokenizer, messages, template)
        examples.append(example)
    return tuple(examples)


@dataclass
class Counts:
    """How many pairs were changed or left out."""

    shortened: int = 0
    equal: int = 0
    left_out: int = 0

    def cut(self, pairs: Iterable[Pair], T: int) -> tuple[list[Pair], list[int]]:
        """Return the pairs that fit into rows of T tokens, and their places."""
        kept = []
        places = []
        for place, pair in enumerate(pairs):
            short = tuple(Example(each.tokens[: T + 1], each.is_answer[: T + 1]) for each in pair)
            if not all(each.is_answer[1:].any() for each in short):
                self.left_out += 1
            elif np.array_equal(short[0].tokens, short[1].tokens):
                self.equal += 1
            else:
                self.shortened += any(len(each) > T for each in pair)
                kept.append(short)
                places.append(place)
        return kept, places


@dataclass(frozen=True)
class PairRows:
    """Pairs on the CPU. `len(rows)` is their number, and a slice is a batch.

    Attributes:
        tokens, targets: (R, 2, T) int32, chosen and rejected. Padding is 0 in tokens; targets are
            -100 except in answers.
        lengths: (R,) int64, tokens of the longer answer with its prompt.
        reference: (R, 2) float32, log p_ref of both answers. NaN until they are computed.
        num_targets: (R,) int64, 1 for each pair.
        has_one_width: whether all batches have the width T.
    """

    tokens: Tensor
    targets: Tensor
    lengths: np.ndarray
    reference: Tensor
    num_targets: np.ndarray
    has_one_width: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | np.ndarray) -> "PairRows":
        return PairRows(
            self.tokens[rows],
            self.targets[rows],
            self.lengths[rows],
            self.reference[rows],
            self.num_targets[rows],
            self.has_one_width,
        )

    @property
    def width(self) -> int:
        """Tokens per answer with its prompt, in a batch of these rows."""
        T = self.tokens.shape[2]
        if self.has_one_width:
            return T
        longest = int(self.lengths.max(initial=1))
        return min(T, -(-longest // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE)

    def model_inputs(
        self, device: torch.device, dropout_seed: int | None = None
    ) -> dict[str, Tensor]:
        """Return the arguments of PreferenceModel.forward, without waiting for the device."""
        inputs = {
            name: copy_to_device(_chosen_first(value[:, :, : self.width]), device).long()
            for name, value in (("tokens", self.tokens), ("targets", self.targets))
        }
        reference = self.reference[:, 0] - self.reference[:, 1]
        inputs["reference"] = copy_to_device(reference, device)
        return inputs | seed_input(dropout_seed, device)

    def without_targets(self) -> "PairRows":
        """Return the rows with a weight of 0."""
        return replace(self, num_targets=np.zeros_like(self.num_targets))

    def sha256(self) -> str:
        """Return a hash of all tokens and targets."""
        digest = hashlib.sha256(str(tuple(self.tokens.shape)).encode())
        for value in (self.tokens, self.targets):
            digest.update(value.numpy().tobytes())
        return digest.hexdigest()


def _chosen_first(value: Tensor) -> Tensor:
    """(R, 2, T) -> (2 R, T): all chosen answers, then all rejected ones."""
    return value.transpose(0, 1).flatten(0, 1).contiguous()


def make_rows(pairs: list[Pair], width: int) -> PairRows:
    """Return rows of `width` tokens."""
    tokens = torch.zeros(len(pairs), 2, width, dtype=torch.int32)
    targets = torch.full_like(tokens, IGNORE_INDEX)
    for row, pair in enumerate(pairs):
        for place, example in enumerate(pair):
            ids = torch.from_numpy(example.tokens)
            is_answer = torch.from_numpy(example.is_answer[1:])
            tokens[row, place, : len(example)] = ids[:-1]
            targets[row, place, : len(example)][is_answer] = ids[1:][is_answer]
    return PairRows(
        tokens,
        targets,
        np.array([max(map(len, pair)) for pair in pairs], dtype=np.int64),
        torch.full((len(pairs), 2), torch.nan),
        np.ones(len(pairs), dtype=np.int64),
    )


def widest(groups: Iterable[list[Pair]]) -> int:
    """Return the width of rows that hold all pairs."""
    lengths = [len(example) for pairs in groups for pair in pairs for example in pair]
    return -(-max(lengths, default=1) // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE


def check_not_empty(rows: dict[str, list[Pair]], source: object, T: int) -> None:
    """Raise InputError for a split without pairs."""
    for name, pairs in rows.items():
        if not pairs:
            raise InputError(
                f"{source}: expected pairs with two different answers that begin within {T} tokens "
                f"in the {name} split, got none; give more records or a longer context"
            )
