#!/usr/bin/env bash
# Everything worth knowing of a fresh GPU machine, most valuable first: facts, tests, kernels, training, a short real run.
#
#   bench/device.sh OUT_DIR [--rehearse]
#
# Needs no network: what is missing may lie as wheels in .whl/, pytest-xdist among them, with which tests end sooner. Each part
# has to end by a second counted from the start, the last under 9 minutes: what one does not use the next ones have. A part that
# is stopped leaves what it has in OUT_DIR. An operator whose tests fail is not timed. --rehearse runs the same parts at tiny
# sizes on the CPU.
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
    echo "bench/device.sh: no option $2; only --rehearse" >&2
    exit 2
    ;;
esac

python=${PYTHON:-python3}
status=0

# part NAME END COMMAND...: run it until second END of this script, keep its output in OUT_DIR/NAME.log, say how it ended.
part() {
    local name=$1 limit=$(($2 - SECONDS)) began=$SECONDS rc
    shift 2
    if [ $limit -lt 1 ]; then
        echo "$name: left out, no time was left"
        status=1
        return 1
    fi
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
    rc=$?
    case $rc in
    0) echo "$name: done in $((SECONDS - began)) s" ;;
    124 | 137) echo "$name: stopped after $limit s; what it wrote is in $out" ;;
    *) echo "$name: failed with status $rc: $(tail -n 1 "$out/$name.log")" ;;
    esac
    [ $rc -eq 0 ] || status=1
    return $rc
}

machine() {
    nvidia-smi || echo "no GPU"
    "$python" -m tritium info
}

if ! "$python" -c "import tritium, tyro, rustbpe" 2>/dev/null; then
    compgen -G ".whl/*.whl" >/dev/null && part wheels 30 "$python" -m pip install -q --no-index --no-deps .whl/*.whl
    part install 60 "$python" -m pip install -q --no-deps --no-build-isolation -e .
fi
export -f machine
export python
part machine 75 bash -c machine && cat "$out/machine.log"

if [ -n "$rehearse" ]; then
    tests=(-k "plan_covers or cost_is") files=(layer_norm:"layer_norm add_layer_norm")
    kernels=(--device cpu --rounds 2 --shape 8x64)
    training=(shakespeare-char --device cpu --steps 2 --out "$out/train.json")
    run=(shakespeare-char --data train --tokenizer bytes --device cpu --steps 2 --eval-tokens 64 --n-layer 1 --sample-tokens 2)
else
    # Ours alone beside the baseline: each other attention is one more model to compile.
    tests=(-m "not codegen") kernels=() training=(gpt2 --attention --out "$out/train.json")
    files=(layer_norm:"layer_norm add_layer_norm" attention:causal_attention _gemm,mlp:gelu_mlp cross_entropy:cross_entropy
        linear_cross_entropy:linear_cross_entropy attention_varlen:causal_attention_varlen attention_decode:attention_decode
        rms_norm:"rms_norm add_rms_norm" rotary:rotary swiglu_mlp:swiglu_mlp)
    run=(gpt2 --data stdlib --tokenizer bpe:4096 --steps 40 --batch-size 32 --eval-interval 40 --eval-tokens 65536
        --compile off)
    # Most of a test's time is compilation, on one core.
    "$python" -c "import xdist" 2>/dev/null && tests+=(-n 8)
    # A checkout that travelled along.
    [ -d .nanogpt ] && training+=(--nanogpt .nanogpt)
fi

# Wrong comes before slow: only what is green is timed.
green=() end=75
for pair in "${files[@]}"; do
    end=$((end + 32))
    IFS=, read -ra names <<<"${pair%%:*}"
    names=("${names[@]/#/tests/kernels/test_}")
    if part "tests-${pair%%:*}" $end "$python" -m pytest -p no:cacheprovider "${tests[@]}" "${names[@]/%/.py}"; then
        # shellcheck disable=SC2206 # several operators share a test file
        green+=(${pair#*:})
    fi
done
[ ${#green[@]} -gt 0 ] && part kernels 400 "$python" -m tritium bench kernels "${green[@]}" "${kernels[@]}" --out "$out"
part train 485 "$python" -m tritium bench train "${training[@]}"
part run 528 "$python" -m tritium train "${run[@]}" --out "$out/run"
cp "$out/run/metrics.jsonl" "$out/metrics.jsonl" 2>/dev/null

# Few files travel well: the plots and the logs in one.
(cd "$out" && tar czf plots-and-logs.tar.gz ./*.png ./*.log run/loss.png run/samples.txt 2>/dev/null)
"$python" -m tritium bench report "$out"
echo "device.sh: $SECONDS s in all"
exit $status
