"""Losses of chosen tokens: of windows over a text, and of continuations of contexts.

Only the rows of the head's input that predict a target reach the head. The losses come from
linear_cross_entropy, so no (B, T, V) tensor exists.

Continuations that share a context share its keys and values: the context is computed once, and the
continuations follow in one batch.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...model import GPT
from ...model.generation import KVCache, Prefill

# Rows of logits that are computed at once to find the most likely token.
_LOGIT_ROWS = 256
Tokens = Sequence[int]


class Score(NamedTuple):
    """How likely a continuation is after its context."""

    log_likelihood: float
    """Sum over the tokens, natural logarithm."""
    num_tokens: int
    is_greedy: bool
    """Whether each token is the most likely one."""


class _Row(NamedTuple):
    """Inputs of one sequence, and the targets of its last inputs."""

    inputs: Tokens
    targets: Tokens


@torch.no_grad()
def target_losses(model: GPT, rows: Sequence[tuple[Tokens, Tokens]]) -> list[Tensor]:
    """Return the losses of the targets of each row, float64 on the CPU, in nats.

    Args:
        model: in evaluation mode.
        rows: (inputs, targets) of each row. The targets follow the last inputs, one each.
    """
    rows = [_Row(*row) for row in rows]
    y, head = model.hidden(_padded([row.inputs for row in rows], model))
    return _losses(model, y, head, rows)


def score(
    model: GPT,
    pairs: Sequence[tuple[Tokens, Tokens]],
    *,
    batch_size: int,
    report: Callable[[int], None] = lambda _: None,
) -> list[Score]:
    """Score continuations.

    A context that is too long loses its first tokens.

    Args:
        model: in evaluation mode.
        pairs: context and continuation, each 1 token or more. A continuation has at most as many
            tokens as the context of the model.
        batch_size: maximum number of sequences per forward.
        report: called with the number of pairs that are done since the last call.
    Returns: a score per pair.
    """
    room = model.config.context_tokens + 1
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        kept = tuple(context)[-max(1, room - len(continuation)) :]
        groups.setdefault(kept, []).append(index)
    single = [group for group in groups.items() if len(group[1]) == 1]
    shared = [group for group in groups.items() if len(group[1]) > 1]

    scores: dict[int, Score] = {}
    for batch in _batches(single, pairs, batch_size, model.config.context_tokens):
        indices = [index for _, (index,) in batch]
        rows = [_row(context, pairs[index][1]) for context, (index,) in batch]
        y, head = _hidden(model, [row.inputs for row in rows])
        scores |= zip(indices, _scores(model, y, head, rows), strict=True)
        report(len(indices))
    for batch in _batches(shared, pairs, batch_size, model.config.context_tokens):
        for indices, found in _score_shared(model, batch, pairs, batch_size):
            scores |= zip(indices, found, strict=True)
            report(len(indices))
    return [scores[index] for index in range(len(pairs))]


def _row(context: Tokens, continuation: Tokens) -> _Row:
    return _Row([*context, *continuation[:-1]], continuation)


Group = tuple[tuple[int, ...], list[int]]
"""A context, and the indices of its continuations."""


def _batches(
    groups: list[Group], pairs: Sequence[tuple[Tokens, Tokens]], batch_size: int, longest: int
) -> Iterator[list[Group]]:
    """Yield groups in batches, the longest first, so that rows of a batch have similar lengths.

    In a batch, the longest context and the longest continuation fit into `longest` tokens together.
    """

    def lengths(group: Group) -> tuple[int, int]:
        context, indices = group
        return len(context), max(len(pairs[index][1]) for index in indices)

    batch: list[Group] = []
    context = continuation = 0
    for group in sorted(groups, key=lambda group: sum(lengths(group)), reverse=True):
        more = lengths(group)
        context = max(context, more[0])
        continuation = max(continuation, more[1])
        if batch and (len(batch) == batch_size or context + continuation - 1 > longest):
            yield batch
            batch = []
            context, continuation = more
        batch.append(group)
    if batch:
        yield batch


@torch.no_grad()
def _score_shared(
    model: GPT, batch: list[Group], pairs: Sequence[tuple[Tokens, Tokens]], batch_size: int
) -> Iterator[tuple[list[int], list[Score]]]:
    """Compute the contexts of a batch once. Yield scores of their continuations."""
    # All tokens of a context but the last fill the cache.
    device = model.wte.weight.device
    contexts = [context for context, _ in batch]
    lengths = [len(context) - 1 for context in contexts]
    cache = KVCache(model.config, len(batch), capacity=max(1, *lengths), device=device)
    if max(lengths) or model.config.prefix_tokens:
        filled = Prefill(cache, torch.arange(len(batch), device=device))
        # With a prefix the forward needs a token. Its key is dropped by set_lengths.
        inputs = [context[:-1] or context for context in contexts]
        model(_padded(inputs, model), cache=filled)
    cache.set_lengths(range(len(batch)), lengths)

    # The last token of the context and the continuation follow.
    work = [(place, index) for place, (_, indices) in enumerate(batch) for index in indices]
    for start in range(0, len(work), batch_size):
        part = work[start : start + batch_size]
        rows = [_row(contexts[place][-1:], pairs[index][1]) for place, index in part]
        longest = max(len(row.inputs) for row in rows)
        copies = cache.select([place for place, _ in part], more=longest)
        y, head = _hidden(model, [row.inputs for row in rows], copies)
        yield [index for _, index in part], _scores(model, y, head, rows)


@torch.no_grad()
def _hidden(
    model: GPT, inputs: Sequence[Tokens], cache: KVCache | None = None
) -> tuple[Tensor, Tensor]:
    return model.hidden(_padded(inputs, model), cache=cache)


def _padded(sequences: Sequence[Tokens], model: GPT) -> Tensor:
    """Return sequences as (B, T) int64 on the device of the model, padded on the right with 0.

    Causal attention of other tokens never looks at the padding.
    """
    padded = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.int64)
    for row, tokens in zip(padded, sequences, strict=True):
        row[: len(tokens)] = torch.as_tensor(tokens)
    return padded.to(model.wte.weight.device)


def _select(y: Tensor, rows: Sequence[_Row]) -> tuple[Tensor, Tensor]:
    """Return the rows of y (B T, D) that predict targets, and the targets, on y's device."""
    T = len(y) // len(rows)
    places = [
        torch.arange(i * T + len(row.inputs) - len(row.targets), i * T + len(row.inputs))
        for i, row in enumerate(rows)
    ]
    targets = [torch.as_tensor(row.targets, dtype=torch.int64) for row in rows]
    return y[torch.cat(places).to(y.device)], torch.cat(targets).to(y.device)


def _losses(model: GPT, y: Tensor, head: Tensor, rows: Sequence[_Row]) -> list[Tensor]:
    selected, targets = _select(y, rows)
    losses = model.losses(selected, head, targets)
    return list(losses.double().cpu().split([len(row.targets) for row in rows]))


@torch.no_grad()
def _scores(model: GPT, y: Tensor, head: Tensor, rows: Sequence[_Row]) -> list[Score]:
    losses = _losses(model, y, head, rows)
    selected, targets = _select(y, rows)
    likely = torch.cat(
        [model.logits(part, head).argmax(-1) for part in selected.split(_LOGIT_ROWS)]
    )
    hits = (likely == targets).cpu().split([len(row.targets) for row in rows])
    return [
        Score(-loss.sum().item(), len(loss), bool(hit.all()))
        for loss, hit in zip(losses, hits, strict=True)
    ]
