"""One step of generation: a forward of one token per sequence, and the choice of the next token.

All tensors that a step reads and writes are allocated once: tokens, random numbers, lengths, keys,
values. On CUDA the step is captured in a CUDA graph at its first call and replayed afterwards. This
removes the time that Python takes to launch kernels. On other devices the same code runs directly.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache import KVCache, Prefill
from .sampling import Sampling, choose

if TYPE_CHECKING:
    from ..gpt import GPT

_WARM_UP_STEPS = 2


class Decoder:
    """Generate tokens for a batch of sequences. Each step adds one token to each sequence.

    Args:
        model: a GPT. Its weights must not change while the decoder is in use.
        batch_size: number of sequences.
        sampling: how tokens are chosen. Its seed, stops and number of tokens are not used here.
        capacity: maximum number of tokens per sequence. Default: context_tokens of the model.
        use_graph: whether to capture a CUDA graph. None: on CUDA without autocast.
    Attributes:
        tokens: (B, 1) int64, the last token of each sequence, which the next step reads.
        draws: (B,) int64, random numbers of the next step.
        cache: keys and values of all tokens before the last one.
    """

    def __init__(
        self,
        model: "GPT",
        batch_size: int,
        sampling: Sampling,
        *,
        capacity: int | None = None,
        use_graph: bool | None = None,
    ):
        device = model.wte.weight.device
        if use_graph is None:
            use_graph = device.type == "cuda" and not torch.is_autocast_enabled("cuda")
        self.model = model
        self.sampling = sampling
        self.cache = KVCache(model.config, batch_size, capacity=capacity, device=device)
        self.tokens = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self.draws = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._seen: Tensor | None = None
        if sampling.has_penalty:
            shape = (batch_size, model.config.vocab_size)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=device)
        self._use_graph = use_graph
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def prefill(self, rows: Sequence[int], sequences: Sequence[Sequence[int]]) -> None:
        """Begin the sequences `rows` again, with these tokens.

        The forward fills the cache with all tokens but the last. The next step reads the last one.

        Args:
            rows: indices of sequences of the batch.
            sequences: the tokens of each, at least 1 and at most the capacity.
        """
        device = self.tokens.device
        lengths = [len(tokens) - 1 for tokens in sequences]
        index = torch.tensor(rows, device=device)
        if max(lengths) or self.model.config.prefix_tokens:
            # At least one column, so that the forward writes the prefix.
            padded = torch.zeros(len(rows), max(1, *lengths), dtype=torch.int64)
            for row, tokens in zip(padded, sequences, strict=True):
                row[: len(tokens) - 1] = torch.tensor(tokens[:-1])
            self.model(padded.to(device), cache=Prefill(self.cache, index))
        self.cache.set_lengths(rows, lengths)
        self.tokens[index, 0] = torch.tensor([tokens[-1] for tokens in sequences], device=device)

    def see(self, rows: Sequence[int], sequences: Sequence[Sequence[int]]) -> None:
        """Tell the repetition penalty which tokens the sequences `rows` have."""
        if self._seen is not None:
            for row, tokens in zip(rows, sequences, strict=True):
                self._seen[row] = False
                self._seen[row, torch.tensor(tokens, device=self._seen.device)] = True

    @torch.no_grad()
    def step(self, draws: Tensor) -> list[int]:
        """Add a token to each sequence.

        Args: draws: (B,) int64, a row of `draw_numbers`.
        Returns: the new tokens. The token of a finished sequence has no meaning.
        """
        self.draws.copy_(draws)
        if not self._use_graph:
            self._run()
        else:
            if self._graph is None:
                self._graph = self._capture()
            self._graph.replay()
            self.cache.advance_host(1)
        return self.tokens[:, 0].tolist()

    def _run(self) -> None:
        logits = self.model(self.tokens, cache=self.cache)[:, -1]
        chosen = choose(logits, self.draws, self.sampling, self._seen)[:, None]
        self.tokens.copy_(chosen)
        if self._seen is not None:
            self._seen.scatter_(1, chosen, True)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Capture `_run`. Afterwards all buffers hold what they held before."""
        cache = self.cache
        buffers = [self.tokens, cache.lengths, cache.is_active]
        buffers += [] if self._seen is None else [self._seen]
        saved = [buffer.clone() for buffer in buffers]
        host_lengths = list(cache.host_lengths)
        cache.is_active.zero_()  # each run writes to the slots that the first replay writes to

        stream = torch.cuda.Stream(self.tokens.device)
        stream.wait_stream(torch.cuda.current_stream(self.tokens.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_STEPS):
                self._run()
                cache.host_lengths[:] = host_lengths
        torch.cuda.current_stream(self.tokens.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that loads data, may use the device during the capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._run()

        for buffer, values in zip(buffers, saved, strict=True):
            buffer.copy_(values)
        cache.host_lengths[:] = host_lengths
        return graph
