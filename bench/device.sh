#!/usr/bin/env bash
# Measure on a GPU machine, with commands of at most 9 minutes each. `short` does the most important
# parts in 7 minutes.
#
#   export TRITIUM_COMMIT=$(git rev-parse --short HEAD)      where the checkout has .git
#   bench/device.sh short|correct|train|models|kernels|tune|later OUT_DIR [--rehearse]
#
# Each command writes OUT_DIR/COMMAND.json and OUT_DIR/COMMAND.tar.gz while it runs, so a command
# that is killed leaves its results. bench/_device_parts.py has the parts and their deadlines.
# --rehearse runs tiny sizes on the CPU. The results decide this:
#
# correct   Limits of the machine, the kernels' tests, 20 steps of gpt2, two equal steps compared.
#           If a test fails, the loss does not fall or the hashes differ, fix that before anything is
#           timed. Limits that differ from LIMITS in bench/training/efficiency.py: correct LIMITS.
# train     GPT-2 next to plain PyTorch and nanoGPT (a checkout in .nanogpt) with steps of 32
#           sequences, a profile next to the prediction, and steps of 512 sequences without nanoGPT.
#           README states the tokens per second. A row of the profile that is marked "!" is what to
#           work on next, the longest row first; its measured efficiency replaces the estimate in
#           bench/training/efficiency.py.
# models    Kernel tests; shakespeare-char-gpu next to nanoGPT, and a whole run, with the text in
#           .nanogpt/data/shakespeare_char/input.txt; variants of LayerNorm's launch sizes, see tune;
#           the larger models. README states the tokens per second. Profile a model whose MFU is
#           lower than that of gpt2.
# kernels   Operators at a few shapes next to other libraries, without torch.compile. An operator
#           that is slower than another implementation, or further below the ceiling than
#           bench/training/efficiency.py assumes, is tuned or rewritten.
# tune      Launch sizes. A variant that beats "as shipped" by more than the spread of the samples
#           becomes the row in kernels/, with device and date. gelu_mlp: if "cublas" is faster,
#           `fuses` in kernels/mlp/gemm.py becomes False for this architecture.
#           causal_attention: if "BACKWARD one pass" takes at least 15 % less time and its 1,000
#           runs in tests/kernels/attention/test_one_pass.py are bitwise equal, BACKWARD in
#           kernels/attention/launch.py becomes "auto".
# later     All kernel tests, compute-sanitizer's race detector, and torch.compile's kernels. A race
#           or a failed test is a bug. A kernel that torch.compile beats is tuned or removed.
#
# No network is needed. Missing packages are installed from wheels in .whl/, if there are any:
# rustbpe, liger-kernel, and tyro with docstring-parser and typeguard. Caches of Triton and Inductor
# stay in .cache/device/, which git ignores, for the next command.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

usage() {
    echo "usage: bench/device.sh short|correct|train|models|kernels|tune|later OUT_DIR [--rehearse]" >&2
    exit 2
}
fail() {
    echo "bench/device.sh: $1" >&2
    exit 2
}

case "${1:-}" in short | correct | train | models | kernels | tune | later) ;; *) usage ;; esac
[ $# -ge 2 ] && [ $# -le 3 ] || usage
case "$2" in -*) usage ;; esac
case "${3:-}" in "" | --rehearse) ;; *) fail "unknown option $3; the only one is --rehearse" ;; esac
{ mkdir -p "$2" && touch "$2/.writable" && rm "$2/.writable"; } 2>/dev/null ||
    fail "cannot write to $2; name another folder"
git rev-parse HEAD >/dev/null 2>&1 || [ -n "${TRITIUM_COMMIT:-}" ] ||
    fail "this copy has no .git; set TRITIUM_COMMIT to its commit"

python=${PYTHON:-python3}
export TRITON_CACHE_DIR=$PWD/.cache/device/triton
export TORCHINDUCTOR_CACHE_DIR=$PWD/.cache/device/inductor

# Install what is missing.
if ! "$python" -c "import tritium, tyro, rustbpe" 2>/dev/null; then
    compgen -G ".whl/*.whl" >/dev/null &&
        "$python" -m pip install -q --no-index --no-deps .whl/*.whl
    "$python" -m pip install -q --no-deps --no-build-isolation -e . ||
        fail "pip cannot install this checkout"
fi
exec "$python" -m tritium.bench.device "$1" "$2" --spent $SECONDS ${3:+"$3"}
