"""Continue token sequences, and stream the text.

A batch is a list of sequences of different lengths. Each sequence gets the tokens that it would get
alone. When its context is full, a sequence keeps the later half of its tokens as context: they are
read again, from position 0, and generation continues.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import unknown_name
from .decoder import Decoder
from .sampling import Sampling, draw_numbers
from .text import TextStream

if TYPE_CHECKING:
    from ..config import GPTConfig
    from ..gpt import GPT

DecodeBytes = Callable[[Iterable[int]], bytes]


class _Sequence:
    """A sequence during generation: its tokens, and their text if `decode_bytes` is given."""

    def __init__(
        self, tokens: list[int], sampling: Sampling, decode_bytes: DecodeBytes | None = None
    ):
        self.tokens = tokens
        self.is_done = False
        self.new_text = ""
        self._stop_tokens = frozenset(sampling.stop_tokens)
        self._text = None if decode_bytes is None else TextStream(decode_bytes, sampling.stop)

    def add(self, token: int) -> None:
        self.tokens.append(token)
        if token in self._stop_tokens:
            self.is_done = True
        elif self._text is not None:
            self.new_text += self._text.push(token)
            self.is_done = self._text.is_stopped

    def take_text(self) -> str:
        """Return the text since the last call."""
        text = self.new_text
        self.new_text = ""
        return text

    def finish_text(self) -> str:
        """Return the rest of the text."""
        return self.take_text() + self._text.finish()


def generate(
    model: "GPT",
    prompts: Tensor | Sequence[Tensor] | Sequence[Sequence[int]],
    max_new_tokens: int | None = None,
    *,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    tokenizer: Any = None,
    decoder: Decoder | None = None,
    **options,
) -> Tensor | list[Tensor] | list[list[int]]:
    """Continue each sequence.

    When the context of a sequence is full, its later half becomes the context, and generation
    continues.

    Args:
        model: a GPT.
        prompts: (B, T) int64, or a list of 1-D tensors or of lists of ids. Each prompt has at least
            one token and at most context_tokens.
        max_new_tokens: maximum number of tokens to add to each sequence.
        sampling: the options. Default: made from max_new_tokens and `options`.
        seeds: a seed per sequence. Default: sampling.seed + i for sequence i.
        tokenizer: has `decode_bytes(ids) -> bytes`. Needed for stop texts.
        decoder: reused between calls, so that a CUDA graph is captured once. Its batch size and
            sampling must be those of this call. Default: a new one.
        options: fields of Sampling, such as temperature, top_k, top_p, min_p, repetition_penalty,
            seed, stop_tokens and stop.
    Returns: the prompts and the new tokens, in the type of the prompts. In a (B, T + new) tensor,
        sequences that stopped early repeat their last token.
    Raises: ValueError for an empty prompt, a prompt that is longer than the context, or an option
        out of range.
    """
    if sampling is None:
        sampling = _sampling(max_new_tokens, options)
    elif max_new_tokens is not None or options:
        raise ValueError("generate: expected `sampling` or its options, got both")
    if isinstance(prompts, Tensor) and prompts.ndim != 2:
        raise ValueError(
            f"generate: expected prompts (B, T) or a list of prompts, got {tuple(prompts.shape)}"
        )
    if sampling.stop and tokenizer is None:
        raise ValueError("generate: expected a tokenizer with the option stop, got none")
    decode_bytes = tokenizer.decode_bytes if sampling.stop else None
    lists = [p.tolist() if isinstance(p, Tensor) else list(p) for p in prompts]
    sequences = [_Sequence(tokens, sampling, decode_bytes) for tokens in lists]
    for _ in _steps(model, sequences, sampling, seeds, decoder):
        pass
    return _like(prompts, [sequence.tokens for sequence in sequences])


def stream_text(
    model: "GPT",
    tokenizer: Any,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    decoder: Decoder | None = None,
) -> Iterator[str]:
    """Yield the text that continues a prompt, as soon as it is certain.

    The joined pieces are the text of all new tokens, without a stop token, up to a stop text.

    Args:
        model: a GPT.
        tokenizer: has `decode_bytes(ids) -> bytes`.
        prompt: ids, at least 1 and at most context_tokens.
        sampling: the options.
        decoder: as for `generate`, for a batch of 1.
    Raises: ValueError as `generate`, before the first piece.
    """
    sequence = _Sequence(list(prompt), sampling, tokenizer.decode_bytes)
    for _ in _steps(model, [sequence], sampling, None, decoder):
        if text := sequence.take_text():
            yield text
    if text := sequence.finish_text():
        yield text


def _steps(
    model: "GPT",
    sequences: list[_Sequence],
    sampling: Sampling,
    seeds: Sequence[int] | None,
    decoder: Decoder | None,
) -> Iterator[None]:
    """Add tokens until all sequences are done. Yield after each token per sequence."""
    context = model.config.context_tokens
    _check_prompts([sequence.tokens for sequence in sequences], model.config)
    seeds = _seeds(sampling, seeds, len(sequences))
    if not sequences or not sampling.max_new_tokens:
        return
    decoder = _decoder(model, sequences, sampling, decoder)
    draws = draw_numbers(seeds, sampling.max_new_tokens).to(decoder.tokens.device)

    rows = list(range(len(sequences)))
    decoder.prefill(rows, [sequence.tokens for sequence in sequences])
    decoder.see(rows, [sequence.tokens for sequence in sequences])
    for numbers in draws:
        # Sequences with a full context continue with its later half.
        full = [row for row in rows if decoder.cache.host_lengths[row] == context]
        if full:
            kept = max(1, context // 2)
            decoder.prefill(full, [sequences[row].tokens[-kept:] for row in full])
        # The next token of each sequence.
        chosen = decoder.step(numbers)
        for row in rows:
            sequences[row].add(chosen[row])
        yield
        # Finished sequences stay in the batch, because the buffers have its size.
        done = [row for row in rows if sequences[row].is_done]
        if done:
            decoder.cache.finish(done)
            rows = [row for row in rows if not sequences[row].is_done]
            if not rows:
                return


def _sampling(max_new_tokens: int | None, options: dict[str, Any]) -> Sampling:
    names = [field.name for field in fields(Sampling)]
    for name in options:
        if name not in names:
            raise ValueError(f"generate: {unknown_name('option', name, names)}")
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    return Sampling(**options)


def _seeds(sampling: Sampling, seeds: Sequence[int] | None, count: int) -> list[int]:
    if seeds is not None:
        if len(seeds) != count:
            raise ValueError(f"generate: expected a seed per sequence ({count}), got {len(seeds)}")
        for seed in seeds:
            if not 0 <= seed < 2**63:
                raise ValueError(f"generate: expected seeds from 0 to 2**63 - 1, got {seed}")
        return list(seeds)
    first = sampling.seed
    if first is None:
        first = int(torch.randint(2**62, ()))
    return [first + i for i in range(count)]


def _decoder(
    model: "GPT", sequences: list[_Sequence], sampling: Sampling, decoder: Decoder | None
) -> Decoder:
    """Return the given decoder, or a new one whose cache is as long as these sequences need."""
    if decoder is None:
        longest = max((len(sequence.tokens) for sequence in sequences), default=0)
        capacity = min(model.config.context_tokens, longest + sampling.max_new_tokens)
        return Decoder(model, len(sequences), sampling, capacity=capacity)
    if len(decoder.tokens) != len(sequences) or decoder.sampling.filters != sampling.filters:
        raise ValueError(
            f"generate: expected a decoder for {len(sequences)} sequences with {sampling.filters}, "
            f"got one for {len(decoder.tokens)} with {decoder.sampling.filters}"
        )
    return decoder


def _check_prompts(prompts: Sequence[Sequence[int]], config: "GPTConfig") -> None:
    for tokens in prompts:
        if not 1 <= len(tokens) <= config.context_tokens:
            hint = "shorten it" if tokens else "give a prompt"
            raise ValueError(
                f"generate: expected a prompt of 1 to {config.context_tokens} tokens, the context "
                f"of the model, got {len(tokens)}; {hint}"
            )
        if not 0 <= min(tokens) <= max(tokens) < config.vocab_size:
            raise ValueError(
                f"generate: expected token ids from 0 to {config.vocab_size - 1}, "
                f"got {min(tokens)} to {max(tokens)}"
            )


def _like(prompts: Any, sequences: list[list[int]]) -> Tensor | list[Tensor] | list[list[int]]:
    """Return sequences in the type of the prompts."""
    if not isinstance(prompts, Tensor):
        return [
            prompt.new_tensor(tokens) if isinstance(prompt, Tensor) else tokens
            for prompt, tokens in zip(prompts, sequences, strict=True)
        ]
    longest = max(map(len, sequences), default=prompts.shape[-1])
    filled = [tokens + tokens[-1:] * (longest - len(tokens)) for tokens in sequences]
    return prompts.new_tensor(filled).view(len(filled), longest)
