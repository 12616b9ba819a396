"""The machine that a run uses: device, GPUs, threads, memory, and the options about them."""
