"""Models by name, a row each: the published GPT-2s, and one of their size as later models are built."""

import difflib

from .config import GPTConfig


class _Presets(dict):
    def __missing__(self, name):
        near = difflib.get_close_matches(str(name), self, n=3, cutoff=0.3) or list(self)
        raise KeyError(f"no preset {name!r}; near: {', '.join(near)}")


PRESETS: dict[str, GPTConfig] = _Presets(
    {
        "gpt2": GPTConfig(n_layer=12, n_head=12, d_model=768),
        "gpt2-medium": GPTConfig(n_layer=24, n_head=16, d_model=1024),
        "gpt2-large": GPTConfig(n_layer=36, n_head=20, d_model=1280),
        "gpt2-xl": GPTConfig(n_layer=48, n_head=25, d_model=1600),
        # The smallest GPT-2 with what Llama changed.
        "llama-124m": GPTConfig(
            n_layer=12,
            n_head=12,
            d_model=768,
            bias=False,
            position="rotary",
            norm="rms",
            mlp="swiglu",
        ),
    }
)
