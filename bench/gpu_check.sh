#!/usr/bin/env bash
# Builds, tests and measures the ops on a machine with an NVIDIA GPU, nvcc, Python, torch and Triton; no network.
# Under nine minutes, or half an hour. Ends with a table (check, figure, target, met or not); status 1 if a result was
# wrong.
#
#   [WHEELS=dir] [PYTHON=python3] bench/gpu_check.sh [--cpu | --steps] [OUTPUT]
#
# WHEELS: wheels of what is missing there (pytest-benchmark, and peers such as liger-kernel, trl).
# --cpu: a dry run with tiny shapes, where there is no GPU.
# --steps: updates and whole training steps against TRL in place of the ops, in half an hour; needs the trainer's
# packages, trl and accelerate.
# OUTPUT: where everything is written, build/gpu_check.
set -u
cd "$(dirname "$0")/.." || exit 2
MODE=ops
case "${1:-}" in
  --cpu | --steps)
    MODE=${1#--}
    shift
    ;;
esac
OUTPUT=${1:-build/gpu_check}
PYTHON=${PYTHON:-python3}
LIMIT=525 # seconds for everything
[ "$MODE" = steps ] && LIMIT=1800
SITE=$OUTPUT/site
mkdir -p "$OUTPUT"
rm -f "$OUTPUT"/steps.tsv "$OUTPUT"/results.json
export PYTHONPATH="$SITE:$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

# step NAME KIND SECONDS COMMAND...: runs it, with a log and a line in steps.tsv. KIND: correctness, or other.
step() {
  local name=$1 kind=$2 seconds=$3 start=$SECONDS left=$((LIMIT - SECONDS)) status
  shift 3
  echo "== $name"
  if [ "$left" -lt 5 ]; then
    status=124
    echo "no time is left" >"$OUTPUT/$name.log"
  else
    timeout --kill-after=10 $((seconds < left ? seconds : left)) "$@" >"$OUTPUT/$name.log" 2>&1
    status=$?
  fi
  tail -n 4 "$OUTPUT/$name.log"
  printf '%s\t%s\t%s\t%s\n' "$name" "$kind" "$status" $((SECONDS - start)) >>"$OUTPUT/steps.tsv"
}

tests() {
  step "$1" correctness "$2" "$PYTHON" -m pytest -q -p no:cacheprovider "${@:3}"
}

environment() {
  "$PYTHON" - <<'END'
import json
from bench import hardware
print(json.dumps(hardware.describe(), indent=1))
END
  nvidia-smi
  nvcc --version
  "$PYTHON" -m pip list
}
export -f environment
export PYTHON

if [ -n "${WHEELS:-}" ]; then
  step wheels other 40 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$SITE" \
    "$WHEELS"/*.whl
fi
step environment other 25 bash -c environment
BENCHMARKS="bench/bench_linear_loss.py bench/bench_token_logprobs.py bench/bench_linear_logprobs.py
  bench/bench_grpo_loss.py bench/bench_advantages.py" # the most important first
if [ "$MODE" = cpu ]; then
  if ! compgen -G 'kernels/thinktwice_kernels/_csrc*.so' >/dev/null; then
    step build correctness 500 "$PYTHON" setup.py build_ext --inplace
  fi
  tests tests-kernels 100 tests/kernels/test_options.py
  step pair correctness 120 "$PYTHON" -m bench.pair toy "$OUTPUT/pair"
  BENCHMARKS="bench/bench_linear_loss.py bench/bench_advantages.py"
  SIZE=toy
elif [ "$MODE" = steps ]; then
  step build correctness 120 "$PYTHON" setup.py build_ext --inplace
  tests tests-gpu-trainer 60 -m gpu tests/test_gpu.py tests/rollout
  step pair correctness 60 "$PYTHON" -m bench.pair "Qwen3-0.6B shape" "$OUTPUT/pair"
  BENCHMARKS="bench/bench_update.py bench/bench_step.py"
  SIZE=gpu
else
  # Together with what is above they leave 150 seconds for the benchmarks, whatever they take.
  step build correctness 120 "$PYTHON" setup.py build_ext --inplace
  tests tests-gpu-ops 90 -m gpu tests/kernels
  if "$PYTHON" -c 'import datasets, jsonargparse, math_verify, pebble' 2>/dev/null; then
    BENCHMARKS="$BENCHMARKS bench/bench_rollout.py" # needs the trainer's packages too
    tests tests-gpu-trainer 60 -m gpu tests/test_gpu.py tests/csrc tests/rollout
    step pair correctness 45 "$PYTHON" -m bench.pair "Qwen3-0.6B shape" "$OUTPUT/pair"
    if command -v compute-sanitizer >/dev/null; then
      step compute-sanitizer correctness 30 compute-sanitizer --error-exitcode 9 \
        "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/csrc/test_cuda_ops.py -k "write_kv or copy_blocks"
    fi
  fi
  SIZE=gpu
fi
LEFT=$((LIMIT - SECONDS))
# shellcheck disable=SC2086 # a list of files
step benchmarks other "$LEFT" "$PYTHON" -m pytest -q -p no:cacheprovider $BENCHMARKS \
  -o 'python_files=bench_*.py' -o timeout=0 --benchmark-only --benchmark-quiet \
  --benchmark-json "$OUTPUT/pytest_benchmark.json" --bench-size "$SIZE" --bench-output "$OUTPUT" \
  --bench-seconds $((LEFT - 60))
"$PYTHON" -m bench.gpu_table "$OUTPUT"
