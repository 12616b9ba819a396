"""Text generation with a cache of keys and values."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the tokens so far. With them, a forward takes only the new tokens.

    Args:
        config: the GPTConfig of the model.
    Attributes:
        length: number of tokens in the cache.
    """

    def __init__(self, config):
        self._config = config
        self.keys = None
        self.values = None
        self._lengths = None
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Append k, v (B, T, G, K) of one layer.

        The model adds T to `length` after its last layer.

        Returns: all S = length + T keys and values of the layer, (B, S, G, K), and B times S,
            (B,) int32.
        """
        if self.keys is None:
            # Take the dtype from k: under autocast it differs from the dtype of the weights.
            c = self._config
            shape = (c.n_layer, k.shape[0], c.context_tokens, c.kv_heads, c.head_size)
            self.keys = k.new_empty(shape)
            self.values = v.new_empty(shape)
        stop = self.length + k.shape[1]
        self.keys[layer, :, self.length : stop] = k
        self.values[layer, :, self.length : stop] = v
        if layer == 0:
            self._lengths = torch.full((len(k),), stop, dtype=torch.int32, device=k.device)
        return self.keys[layer, :, :stop], self.values[layer, :, :stop], self._lengths


@torch.no_grad()
def generate(
    model,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_token: int | None = None,
) -> Tensor:
    """Continue each sequence by sampling.

    When the context is full, generation keeps its later half and continues.

    Args:
        model: a GPT.
        tokens: (B, T) int64, T >= 1.
        max_new_tokens: largest number of tokens to add.
        temperature: divides the logits. 0: always choose the most likely token.
        top_k: keep only the k most likely tokens.
        top_p: keep the fewest most likely tokens whose total probability reaches this, in (0, 1].
        seed: seed of the sampling. None: use PyTorch's default generator.
        stop_token: stop when every sequence has produced it.
    Returns: (B, T + new tokens) int64, the prompt included.
    Raises: ValueError for an empty prompt or an option out of range.
    """
    _check(tokens, max_new_tokens, temperature, top_k, top_p)
    context = model.config.context_tokens
    generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
    stopped = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    out = tokens
    cache = None
    start = 0  # the first token that is not in the cache
    for length in range(tokens.shape[1], tokens.shape[1] + max_new_tokens):
        if cache is None or cache.length == context:
            cache = KVCache(model.config)
            kept = context if length <= context else max(1, context // 2)
            start = max(0, length - kept)
        logits = model(out[:, start:length], cache=cache)[:, -1].float()
        start = length
        chosen = _choose(logits, temperature, top_k, top_p, generator)
        out = torch.cat([out, chosen[:, None]], dim=1)
        if stop_token is not None:
            stopped |= chosen == stop_token
            if stopped.all():
                break
    return out


def _choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator
) -> Tensor:
    """Sample one token (B,) from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1)
    # The largest logit becomes 0, so that dividing by a small temperature does not overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        ordered, index = logits.sort(descending=True)
        probability = ordered.softmax(-1)
        # Drop a token if the more likely ones reach top_p. The most likely token always stays.
        is_dropped = probability.cumsum(-1) - probability >= top_p
        mask = torch.zeros_like(is_dropped).scatter(-1, index, is_dropped)
        logits = logits.masked_fill(mask, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _check(
    tokens: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(
            f"generate: tokens must be (B, T) with T at least 1, got {tuple(tokens.shape)}; "
            "give a prompt"
        )
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must be 0 or more, got {max_new_tokens}")
    if not 0 <= temperature < torch.inf:
        raise ValueError(f"generate: temperature must be 0 or more and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}")
