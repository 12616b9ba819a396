"""How the next token is chosen from logits.

    penalty       logits of tokens that the sequence has: divided by the penalty if positive,
                  otherwise multiplied
    greedy        the largest logit, if the temperature is 0
    temperature   logits / temperature
    top-k         keep the k most likely tokens
    top-p         keep the fewest most likely tokens whose total probability reaches p
    min-p         keep tokens with at least min_p times the probability of the most likely one
    draw          weights w = round(2^32 softmax(logits)); the first token for which the sum of w up
                  to and including it is greater than u sum(w)

The numbers u in [0, 1) come from Philox4x64, whose key is the sequence's seed. Number i chooses new
token i of the sequence, so a sequence draws the same numbers in any batch. Weights are integers,
and sums of integers do not depend on the order of additions. The sum runs over token ids in order,
not over sorted probabilities. Rounding may change the order of nearly equal probabilities, but not
the order of ids.

Source     Keskar et al. 2019, arXiv:1909.05858 (penalty); Fan et al. 2018, arXiv:1805.04833
           (top-k); Holtzman et al. 2020, arXiv:1904.09751 (top-p); Nguyen et al. 2024,
           arXiv:2407.01082 (min-p). Order and details are those of transformers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_DRAW_BITS = 30
_WEIGHT = 1 << 32  # a draw times the sum of all weights is below 2^63


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of generation.

    Raises: ValueError if an option is out of range.
    """

    max_new_tokens: int = 200
    """Maximum number of tokens to add to each sequence."""
    temperature: float = 1.0
    """Divides the logits. 0: always choose the most likely token."""
    top_k: int | None = None
    """Sample from the k most likely tokens. None: from all."""
    top_p: float | None = None
    """Sample from the most likely tokens that have this probability in total. None: from all."""
    min_p: float | None = None
    """Sample from tokens with at least this fraction of the largest probability. None: from all."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that the sequence already has become less likely. 1: no penalty."""
    vocab_size: int | None = None
    """Choose only ids below this, if the tokenizer has fewer ids than the model. None: all ids."""
    seed: int | None = None
    """Sequence i of a batch has the seed `seed` + i. None: PyTorch's default generator chooses."""
    stop_tokens: tuple[int, ...] = ()
    """A sequence ends after one of these ids."""
    stop: tuple[str, ...] = ()
    """A sequence ends when its new text contains one of these texts."""

    def __post_init__(self):
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 0, "0 or more"),
            "temperature": (0 <= self.temperature < math.inf, "0 or more and finite"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1]"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "positive and finite"),
            "vocab_size": (self.vocab_size is None or self.vocab_size >= 1, "at least 1"),
            "seed": (self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2**63 - 1"),
            "stop_tokens": (all(token >= 0 for token in self.stop_tokens), "ids of 0 or more"),
            "stop": ("" not in self.stop, "texts that are not empty"),
        }
        for name, (is_valid, expected) in checks.items():
            if not is_valid:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}")

    @property
    def is_greedy(self) -> bool:
        """Whether each token is the most likely one."""
        return self.temperature == 0

    @property
    def filters(self) -> dict[str, float | None]:
        """The options on which the choice from given logits depends."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "vocab_size")
        return {name: getattr(self, name) for name in names}

    @property
    def has_penalty(self) -> bool:
        """Whether the choice depends on the tokens that a sequence already has."""
        return self.repetition_penalty != 1


def draw_numbers(seeds: Sequence[int], steps: int) -> Tensor:
    """Return the numbers that choose tokens: (steps, B) int64 in [0, 2^30)."""
    columns = [np.random.Philox(key=seed).random_raw(steps) >> (64 - _DRAW_BITS) for seed in seeds]
    return torch.from_numpy(np.stack(columns, axis=1).astype(np.int64))


def choose(logits: Tensor, draws: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Choose a token for each sequence.

    Args:
        logits: (B, V), any float dtype.
        draws: (B,) int64, a row of `draw_numbers`.
        sampling: the options.
        seen: (B, V) bool, the tokens that each sequence has. Needed for a repetition penalty.
    Returns: (B,) int64.
    """
    logits = logits[:, : sampling.vocab_size].float()
    if sampling.has_penalty:
        penalty = sampling.repetition_penalty
        penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen[:, : sampling.vocab_size], penalized, logits)
    if sampling.is_greedy:
        return logits.argmax(-1)
    # The largest logit becomes 0, so that dividing by a small temperature does not overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    logits = _keep_likely(logits, sampling)

    sums = _weights(logits).cumsum(-1)
    point = (draws[:, None] * sums[:, -1:]) >> _DRAW_BITS
    return torch.searchsorted(sums, point, right=True)[:, 0]


def _weights(logits: Tensor) -> Tensor:
    """Return probabilities as integers that add up to about 2^32, (B, V) int64."""
    return (logits.softmax(-1) * _WEIGHT).round().long()


def _keep_likely(logits: Tensor, sampling: Sampling) -> Tensor:
    """Set the logits of tokens that top-k, top-p or min-p exclude to minus infinity.

    The largest logit is 0. Tokens as likely as the last one that is kept are kept too.
    """
    limits = []
    V = logits.shape[-1]
    top_k = V if sampling.top_k is None else min(sampling.top_k, V)
    top_p = 1 if sampling.top_p is None else sampling.top_p
    if top_p < 1:
        # Drop a token if the more likely ones reach top_p. The most likely token always stays.
        ordered = logits.topk(top_k).values if top_k < V else logits.sort(descending=True).values
        weights = _weights(ordered)
        before = weights.cumsum(-1) - weights
        kept = (before < max(1, round(top_p * _WEIGHT))).sum(-1, keepdim=True)
        limits.append(ordered.gather(-1, kept - 1))
    elif top_k < V:
        limits.append(logits.topk(top_k, sorted=False).values.amin(-1, keepdim=True))
    if sampling.min_p:
        limits.append(math.log(sampling.min_p))
    for limit in limits:
        logits = logits.masked_fill(logits < limit, -torch.inf)
    return logits
