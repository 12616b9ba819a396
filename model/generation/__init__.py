"""Text generation: a cache of keys and values, sampling, and the loop over new tokens."""

from .cache import KVCache, Prefill
from .decoder import Decoder
from .generate import generate, stream_text
from .sampling import Sampling

__all__ = ["Decoder", "KVCache", "Prefill", "Sampling", "generate", "stream_text"]
