"""Model configurations by name: the four published GPT-2s, and GPT-2 124M with Llama's layers."""

from ..errors import unknown_name
from .config import GPTConfig


class _Presets(dict):
    def __missing__(self, name):
        raise KeyError(unknown_name("preset", name, self))


PRESETS: dict[str, GPTConfig] = _Presets(
    {
        "gpt2": GPTConfig(n_layer=12, n_head=12, d_model=768),
        "gpt2-medium": GPTConfig(n_layer=24, n_head=16, d_model=1024),
        "gpt2-large": GPTConfig(n_layer=36, n_head=20, d_model=1280),
        "gpt2-xl": GPTConfig(n_layer=48, n_head=25, d_model=1600),
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
