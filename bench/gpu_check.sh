#!/usr/bin/env bash
# One stage of the check of a machine with an NVIDIA GPU, nvcc, Python, torch and Triton; no network; under four minutes.
# It needs no other stage and ends with a table (check, figure, goal, met or not); status 1 if a result was wrong.
#
#   [WHEELS=dir] [PYTHON=python3] [LIMIT=205] bench/gpu_check.sh correct|ops|decode|step [--cpu] [OUTPUT]
#
# correct: tests on the GPU, a pair of training steps of 0.6 billion parameters.
# ops: the loss head and log-probabilities against their peers and torch's own products.
# decode: rollouts with CUDA graphs and group attention on and off, and their kernels.
# step: one update under the profiler, then whole steps of configs/race/qwen3-1.7b-gsm8k.yaml.
# WHEELS: wheels of what is missing there (the trainer's packages, and peers such as liger-kernel, trl).
# --cpu: a dry run with tiny shapes, where there is no GPU.
# LIMIT: seconds for everything but the table.
# OUTPUT: where STAGE.txt and STAGE.json go, bench/results/<gpu>-<date>; of a dry run build/gpu_check/results.
set -u
cd "$(dirname "$0")/.." || exit 2
usage() {
  echo "gpu_check.sh: $1: bench/gpu_check.sh correct|ops|decode|step [--cpu] [OUTPUT]" >&2
  exit 2
}
STAGE=${1:-}
case "$STAGE" in
  correct | ops | decode | step) shift ;;
  *) usage "give a stage, not '$STAGE'" ;;
esac
CPU=
if [ "${1:-}" = --cpu ]; then
  CPU=--cpu
  shift
fi
[ $# -le 1 ] || usage "one OUTPUT, not '$*'"
case "${1:-}" in -*) usage "unknown option $1" ;; esac
WORK=build/gpu_check/$STAGE
OUTPUT=${1:-${CPU:+build/gpu_check/results}}
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-205} # seconds for the parts together; the table takes a few more
SITE=$PWD/build/gpu_check/site
rm -rf "$WORK"
mkdir -p "$WORK"
export PYTHON PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export PYTHONPATH="$SITE:$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}"

# The lines of a log as they come, shortened, but for those of tests that start or pass.
show() {
  local line
  while IFS= read -r line; do
    case "$line" in
      *FAILED* | *ERROR*) ;;
      *PASSED* | tests/*::* | '') continue ;;
    esac
    printf '   %s\n' "${line:0:180}"
  done
}

# part NAME SECONDS COMMAND...: runs it, with a log and a line in parts.tsv. It is interrupted first, so that it can say
# how far it has come.
part() {
  local name=$1 seconds=$2 start=$SECONDS left=$((LIMIT - SECONDS)) log=$WORK/$1.log status shower
  shift 2
  echo "== $name, after $SECONDS s"
  : >"$log"
  tail -f -s 0.2 -n +1 "$log" > >(show) 2>/dev/null &
  shower=$!
  if [ "$left" -lt 5 ]; then
    echo "no time is left" >"$log"
    status=124
  else
    timeout --signal=INT --kill-after=5 $((seconds < left ? seconds : left)) "$@" >"$log" 2>&1
    status=$?
  fi
  sleep 0.4
  kill "$shower"
  wait "$shower" 2>/dev/null
  printf '%s\t%s\t%s\n' "$name" "$status" $((SECONDS - start)) >>"$WORK/parts.tsv"
  return "$status"
}

# What the extensions are built from: a file's time says little where a tree was copied.
sources() {
  find csrc kernels/csrc -type f -print0 | sort -z | xargs -0 cat setup.py kernels/*.py | sha256sum
  "$PYTHON" -c 'import importlib.metadata; print(importlib.metadata.version("torch"))'
}

build() {
  local built=build/gpu_check/built
  if compgen -G 'thinktwice_fast/_csrc*.so' >/dev/null && compgen -G 'kernels/thinktwice_kernels/_csrc*.so' >/dev/null; then
    if [ -n "$CPU" ] || [ "$(cat $built 2>/dev/null)" = "$(sources)" ]; then return; fi
  fi
  rm -f thinktwice_fast/_csrc*.so kernels/thinktwice_kernels/_csrc*.so
  part build 120 "$PYTHON" -m bench.extensions && sources >$built
}

tests() {
  local name=$1 seconds=$2
  shift 2
  part "$name" "$seconds" "$PYTHON" -m pytest -v -p no:cacheprovider --tb=short "$@"
}

if [ -n "${WHEELS:-}" ] && [ "$(ls "$WHEELS")" != "$(cat "$SITE.list" 2>/dev/null)" ]; then
  rm -rf "$SITE"
  part wheels 40 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$SITE" "$WHEELS"/*.whl &&
    ls "$WHEELS" >"$SITE.list"
fi
"$PYTHON" -m bench.core.hardware >"$WORK/machine.json" || exit 2
if [ -z "$CPU" ] && grep -q '"gpu": null' "$WORK/machine.json"; then
  usage "torch sees no GPU here; a dry run is --cpu"
fi
build
case "$STAGE$CPU" in
  correct)
    # shellcheck disable=SC2046,SC2086 # a list of files, and an option with its value
    "$PYTHON" -c 'import xdist' 2>/dev/null && MANY="-n $(($(nproc) < 14 ? $(nproc) : 14)) --maxschedchunk=1"
    # In order, for the longest come first (tests/conftest.py); most of the others' time is Triton's compiler.
    tests tests 125 ${MANY:-} --timeout=100 -m gpu $(grep -l --include='test_*.py' -r 'mark\.gpu' tests)
    part pair 45 "$PYTHON" -m bench.pair "Qwen3-0.6B shape" "$WORK"
    ;;
  correct--cpu)
    tests tests 60 tests/kernels/test_options.py
    part pair 60 "$PYTHON" -m bench.pair toy "$WORK"
    ;;
  ops*) part ops "$LIMIT" "$PYTHON" -m bench.stages.ops "$WORK" $((LIMIT - SECONDS - 30)) $CPU ;;
  decode*) part decode "$LIMIT" "$PYTHON" -m bench.stages.decode "$WORK" $CPU ;;
  step*)
    part update 90 "$PYTHON" -m bench.stages.update "$WORK" $CPU
    part steps "$LIMIT" "$PYTHON" -m bench.stages.race "$WORK" $((LIMIT - SECONDS - 25)) $CPU
    ;;
esac
"$PYTHON" -m bench.stages.closing "$STAGE" "$WORK" ${OUTPUT:+"$OUTPUT"}
