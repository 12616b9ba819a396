"""How fast one process reads training batches: tokens a second from mapped shards, and what a jump to a far step costs.

    python -m tritium.bench.loader [--tokens 10000000]

The shards are random tokens written for the purpose, in the page cache when they are read: this is the loader, not the disk.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from ..train.loader import Loader
from ..train.shards import TokenStream, write_shard

SHAPES = ((12, 64), (8, 256), (64, 1024))  # (batch, context): shakespeare-char, laptop, one micro-batch of gpt2


def measure(stream: TokenStream, batch_size: int, context_tokens: int, *, seconds: float = 0.5) -> dict[str, float]:
    """Tokens a second over batches in a row, and milliseconds of a batch at step 10**9: medians of five."""
    loader = Loader(stream, context_tokens=context_tokens, batch_size=batch_size, seed=0)
    rates, jumps, step = [], [], 0
    for attempt in range(5):
        began, first = time.perf_counter(), step
        while time.perf_counter() - began < seconds / 5 or step == first:
            loader.batch(step)
            step += 1
        rates.append((step - first) * batch_size * context_tokens / (time.perf_counter() - began))
        began = time.perf_counter()
        loader.batch(10**9 + 10**6 * attempt)
        jumps.append((time.perf_counter() - began) * 1e3)
    return {"tokens_per_second": statistics.median(rates), "jump_milliseconds": statistics.median(jumps)}


def main() -> None:
    """Parse the command line, write shards, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m tritium.bench.loader", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=10_000_000, help="size of the data (default 10,000,000)")
    tokens = np.random.default_rng(0).integers(0, 4096, parser.parse_args().tokens, dtype=np.uint16)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.bin" for number in range(2)]
        for file, half in zip(files, np.array_split(tokens, 2), strict=True):
            write_shard(file, half, 4096, "0" * 64)
        stream = TokenStream.open(files)
        for batch_size, context_tokens in SHAPES:
            result = measure(stream, batch_size, context_tokens)
            print(
                f"batch {batch_size:3} x {context_tokens:4}: {result['tokens_per_second'] / 1e6:6.1f} M tokens/s, "
                f"step 10**9 after {result['jump_milliseconds']:.2f} ms"
            )


if __name__ == "__main__":
    main()
