#!/usr/bin/env bash
# Measure everything on a fresh GPU machine, the most valuable first:
# machine, tests, kernels, training speed, a short training run.
#
#   bench/device.sh OUT_DIR [--rehearse]
#
# No network is needed. Missing packages are installed from wheels in .whl/, if there are any; with
# pytest-xdist among them the tests run in parallel. Each part has a deadline in seconds from the start,
# the last one below 9 minutes. Time that a part does not use is left for the parts after it. A part
# that is stopped leaves its results so far in OUT_DIR. An operator whose tests fail is not timed.
# --rehearse runs the same parts at tiny sizes on a CPU.
set -uo pipefail
cd "$(dirname "$0")/.."

[ $# -ge 1 ] || {
    echo "usage: bench/device.sh OUT_DIR [--rehearse]" >&2
    exit 2
}
out=$1
{ mkdir -p "$out" && touch "$out/.writable" && rm "$out/.writable"; } 2>/dev/null || {
    echo "bench/device.sh: cannot write to $out; name another folder" >&2
    exit 2
}
out=$(cd "$out" && pwd)
case "${2:-}" in
"") rehearse= ;;
--rehearse) rehearse=1 ;;
*)
    echo "bench/device.sh: unknown option $2; the only one is --rehearse" >&2
    exit 2
    ;;
esac

python=${PYTHON:-python3}
status=0

# part NAME DEADLINE COMMAND...: run a command until the deadline, keep its output in
# OUT_DIR/NAME.log, print how it ended.
part() {
    local name=$1 limit=$(($2 - SECONDS)) began=$SECONDS rc
    shift 2
    if [ $limit -lt 1 ]; then
        echo "$name: skipped, no time was left"
        status=1
        return 1
    fi
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
    rc=$?
    case $rc in
    0) echo "$name: done in $((SECONDS - began)) s" ;;
    124 | 137) echo "$name: stopped after $limit s; its results so far are in $out" ;;
    *) echo "$name: failed with status $rc: $(tail -n 1 "$out/$name.log")" ;;
    esac
    [ $rc -eq 0 ] || status=1
    return $rc
}

machine() {
    nvidia-smi || echo "no GPU"
    "$python" -m tritium info
}

# Install what is missing.
if ! "$python" -c "import tritium, tyro, rustbpe" 2>/dev/null; then
    compgen -G ".whl/*.whl" >/dev/null &&
        part wheels 30 "$python" -m pip install -q --no-index --no-deps .whl/*.whl
    part install 60 "$python" -m pip install -q --no-deps --no-build-isolation -e .
fi
export -f machine
export python
part machine 75 bash -c machine && cat "$out/machine.log"

# A line per test run: name of the part, test files below tests/kernels/, operators they cover.
if [ -n "$rehearse" ]; then
    suites=("layer_norm norm/test_layer_norm.py layer_norm,add_layer_norm")
    pytest_options=(-k "plan or cost")
    kernels_options=(--device cpu --rounds 2 --shape 8x64)
    train_options=(shakespeare-char --device cpu --steps 2)
    run_options=(shakespeare-char --data train --tokenizer bytes --device cpu --steps 2
        --eval-tokens 64 --n-layer 1 --sample-tokens 2)
else
    suites=(
        "layer_norm norm/test_layer_norm.py layer_norm,add_layer_norm"
        "attention attention/test_causal.py causal_attention"
        "gelu_mlp mlp/test_gemm.py,mlp/test_gelu_mlp.py gelu_mlp"
        "cross_entropy loss/test_cross_entropy.py cross_entropy"
        "linear_cross_entropy loss/test_linear_cross_entropy.py linear_cross_entropy"
        "attention_varlen attention/test_varlen.py causal_attention_varlen"
        "attention_decode attention/test_decode.py attention_decode"
        "rms_norm norm/test_rms_norm.py rms_norm,add_rms_norm"
        "rotary test_rotary.py rotary"
        "swiglu_mlp mlp/test_swiglu_mlp.py swiglu_mlp"
    )
    pytest_options=(-m "not codegen")
    # Most of a test's time is compilation on one core.
    "$python" -c "import xdist" 2>/dev/null && pytest_options+=(-n 8)
    kernels_options=()
    # Only tritium's own attention: each further attention is one more model to compile.
    train_options=(gpt2 --attention)
    # A nanoGPT checkout, if one was copied here.
    [ -d .nanogpt ] && train_options+=(--nanogpt .nanogpt)
    run_options=(gpt2 --data stdlib --tokenizer bpe:4096 --steps 40 --batch-size 32
        --eval-interval 40 --eval-tokens 65536 --compile off)
fi

# Test first: only operators whose tests pass are timed.
passed=()
deadline=75
for suite in "${suites[@]}"; do
    read -r name files operators <<<"$suite"
    deadline=$((deadline + 32))
    IFS=, read -ra paths <<<"$files"
    if part "tests-$name" $deadline "$python" -m pytest -p no:cacheprovider \
        "${pytest_options[@]}" "${paths[@]/#/tests/kernels/}"; then
        IFS=, read -ra names <<<"$operators"
        passed+=("${names[@]}")
    fi
done
[ ${#passed[@]} -gt 0 ] && part kernels 400 "$python" -m tritium bench kernels "${passed[@]}" \
    "${kernels_options[@]}" --out "$out"
part train 485 "$python" -m tritium bench train "${train_options[@]}" --out "$out/train.json"
part run 528 "$python" -m tritium train "${run_options[@]}" --out "$out/run"
cp "$out/run/metrics.jsonl" "$out/metrics.jsonl" 2>/dev/null

# One archive for the plots and logs.
(cd "$out" && tar czf plots-and-logs.tar.gz ./*.png ./*.log run/loss.png run/samples.txt 2>/dev/null)
"$python" -m tritium bench report "$out"
echo "device.sh: $SECONDS s in total"
exit $status
