"""Texts as tokens with their labels, the batches of a classifier, and its predictions."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...model import GPTClassifier
from ..data.loader import copy_cu_seqlens, copy_to_device, pad_starts, seed_input
from ..data.tokenizers.tokenizer import Tokenizer
from .classify_records import LabelledText
from .records import errors_name


@dataclass(frozen=True)
class LabelledBatch:
    """Rows of texts on the CPU. `len(batch)` is the number of texts; a slice is a batch.

    Attributes:
        texts: the ids of each text, one or more.
        label: (rows,) int64, the index of each text's label.
        loss_weight: (rows,) float32, the weight of each text in the mean loss.
        num_targets: (rows,) int64: 1, or 0 in a batch that only fills a place.
        context_tokens: largest length of a text, and of a row that the model gets.
    """

    texts: Sequence[np.ndarray]
    label: np.ndarray
    loss_weight: np.ndarray
    num_targets: np.ndarray
    context_tokens: int

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: slice | np.ndarray) -> "LabelledBatch":
        places = np.arange(len(self))[rows].tolist()
        return replace(
            self,
            texts=[self.texts[place] for place in places],
            label=self.label[rows],
            loss_weight=self.loss_weight[rows],
            num_targets=self.num_targets[rows],
        )

    @property
    def tokens(self) -> int:
        """Number of tokens, without padding."""
        return sum(map(len, self.texts))

    def without_targets(self) -> "LabelledBatch":
        """Return the texts with a weight of 0."""
        return replace(self, num_targets=np.zeros_like(self.num_targets))

    def model_inputs(
        self, device: torch.device, dropout_seed: int | None = None
    ) -> dict[str, Tensor]:
        """Return the arguments of GPTClassifier.forward on `device`, without waiting for it."""
        inputs = {
            **text_inputs(self.texts, self.context_tokens, device),
            "label": copy_to_device(torch.from_numpy(self.label), device),
            "loss_weight": copy_to_device(torch.from_numpy(self.loss_weight), device),
        }
        return inputs | seed_input(dropout_seed, device)


def text_inputs(
    texts: Sequence[np.ndarray], context_tokens: int, device: torch.device
) -> dict[str, Tensor]:
    """Pack texts end to end into rows of equal length, the fewest that the context allows.

    A text can continue in the next row. The padding after the last text is a document.

    Returns: the arguments `tokens`, `last` and `cu_seqlens` of GPTClassifier.forward on `device`.
    """
    packed = np.concatenate(texts)
    rows = -(-len(packed) // context_tokens)
    padding = -len(packed) % rows
    tokens = torch.from_numpy(np.pad(packed, (0, padding))).view(rows, -1)
    # The last entry is where the padding starts.
    starts = torch.from_numpy(np.cumsum([0, *map(len, texts)]))
    tokens = copy_to_device(tokens, device)
    # The length differs between batches: torch.compile compiles once for any length.
    torch._dynamo.maybe_mark_dynamic(tokens, 1)
    return {
        "tokens": tokens,
        "last": copy_to_device(starts[1:] - 1, device),
        "cu_seqlens": copy_cu_seqlens(pad_starts(starts, tokens.numel()), device),
    }


def encode_text(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Return the ids of a text; the end-of-text id for an empty one."""
    ids = [*tokenizer.start_tokens, *tokenizer.encode(text).tolist()]
    return np.array(ids or [tokenizer.end_of_text], np.int64)


def encode_labelled(
    texts: Sequence[LabelledText],
    labels: Sequence[str],
    tokenizer: Tokenizer,
    *,
    most_tokens: int,
    weights: Sequence[float] | None = None,
) -> tuple[LabelledBatch, int]:
    """Encode texts, and cut each to its first `most_tokens` tokens.

    Args: weights: of each label. None: 1.
    Returns: all texts as one batch, and the number of texts that were cut.
    Raises: InputError, which names the line, if the tokenizer does not have a character.
    """
    encoded = []
    for each in texts:
        with errors_name(each.place):
            encoded.append(encode_text(tokenizer, each.text))
    number = {label: index for index, label in enumerate(labels)}
    label = np.array([number[each.label] for each in texts], np.int64)
    per_label = np.array(weights or [1.0] * len(labels), np.float32)
    num_cut = sum(len(ids) > most_tokens for ids in encoded)
    cut = [ids[:most_tokens] for ids in encoded]
    rows = LabelledBatch(
        texts=cut,
        label=label,
        loss_weight=per_label[label],
        num_targets=np.ones(len(texts), np.int64),
        context_tokens=most_tokens,
    )
    return rows, num_cut


@torch.no_grad()
def classify_texts(
    model: GPTClassifier, tokenizer: Tokenizer, texts: Iterable[str], batch_size: int = 8
) -> Iterator[list[float]]:
    """Yield the probabilities of the labels for each text, in the order of model.labels.

    A text that is longer than the context of the model is cut after it.
    """
    device = model.score.weight.device
    context = model.config.context_tokens
    texts = iter(texts)
    while batch := list(itertools.islice(texts, batch_size)):
        encoded = [encode_text(tokenizer, text)[:context] for text in batch]
        logits = model(**text_inputs(encoded, context, device))
        yield from logits.softmax(1).tolist()
