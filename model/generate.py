"""Sampling from a GPT with a cache of keys and values."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the tokens a model has read, so that each new token costs one step.

    Args:
        config: shape of the model.
    """

    def __init__(self, config):
        self._config = config
        self.keys = self.values = self._lengths = None
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Append k, v (B, T, G, K) of one layer; return all (B, S, G, K) of it, and S of each sequence (B,) int32.

        The model advances `length` itself.
        """
        if self.keys is None:
            # Now it is known in which dtype the model computes, under autocast not that of its weights.
            c = self._config
            shape = (c.n_layer, k.shape[0], c.context_tokens, c.kv_heads, c.head_size)
            self.keys, self.values = k.new_empty(shape), v.new_empty(shape)
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

    When the context is full, its later half is read again and generation goes on from there.

    Args:
        model: a GPT.
        tokens: (B, T) int64, T >= 1.
        max_new_tokens: how many to add.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: keep only the k likeliest tokens.
        top_p: keep the likeliest tokens that together reach this probability, in (0, 1].
        seed: of the sampling; None draws from PyTorch's generator.
        stop_token: end once every sequence has produced it.
    Returns: (B, T + new) int64, the prompt included.
    Raises: ValueError for an empty prompt or an option out of its range.
    """
    _check(tokens, max_new_tokens, temperature, top_k, top_p)
    context, out = model.config.context_tokens, tokens
    generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
    stopped = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    cache, read = None, 0
    for length in range(tokens.shape[1], tokens.shape[1] + max_new_tokens):
        if cache is None or cache.length == context:
            cache = KVCache(model.config)
            read = max(0, length - (context if length <= context else max(1, context // 2)))
        logits = model(out[:, read:length], cache=cache)[:, -1].float()
        read = length
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
    """One token (B,) from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1)
    # Of the likeliest nothing is left to divide, so that no temperature overflows.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        ordered, index = logits.sort(descending=True)
        probability = ordered.softmax(-1)
        # A token stays if those before it have not reached top_p: the likeliest always does.
        dropped = probability.cumsum(-1) - probability >= top_p
        logits = logits.masked_fill(
            torch.zeros_like(dropped).scatter(-1, index, dropped), -torch.inf
        )
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _check(
    tokens: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(
            f"generate: tokens must be (B, T) with T at least 1, got {tuple(tokens.shape)}; give a prompt"
        )
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must be 0 or more, got {max_new_tokens}")
    if not 0 <= temperature < torch.inf:
        raise ValueError(f"generate: temperature must be 0 or more and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must lie in (0, 1], got {top_p}")
