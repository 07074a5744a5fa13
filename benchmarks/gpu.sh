#!/usr/bin/env bash
# One script for a machine with a CUDA GPU and no network: tests, compute-sanitizer, benchmarks.
#
#   bash benchmarks/gpu.sh test [pytest options]       the whole suite; the GPU tests are part of it
#   bash benchmarks/gpu.sh sanitize [pytest options]   memcheck and racecheck over GPU tests (default: -k "$SANITIZE")
#   bash benchmarks/gpu.sh bench [benchmarks options]  python -m benchmarks
#   bash benchmarks/gpu.sh all                         the three, one after the other
#
# Logs and figures go to $OUT (default benchmarks/out), a short table to the end of the output. Packages that the machine
# lacks (pytest, hypothesis, ...) may lie as wheels in .whl/; they are installed into a folder of /tmp.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=${OUT:-benchmarks/out}
PYTHON=${PYTHON:-python3}
SANITIZE=${SANITIZE:-}        # pytest -k expression; empty: every test of tests/gpu
SANITIZE_SECONDS=${SANITIZE_SECONDS:-240}  # for each tool
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1

if compgen -G '.whl/*.whl' >/dev/null; then
  site=/tmp/site
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl || exit
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi

summary=()
failed=0
# run NAME command...: all output into $OUT/NAME.log and to the terminal; the exit code and last line into the summary
run() {
  local name=$1 log=$OUT/$1.log begin=$SECONDS code=0
  shift
  echo "== $name: $*"
  "$@" 2>&1 | tee "$log" || code=$?
  [ "$code" = 0 ] || failed=1
  summary+=("$(printf '%-12s exit %-3s %4s s  %s' "$name" "$code" $((SECONDS - begin)) "$(grep -v '^ *$' "$log" | tail -n 1 | cut -c1-100)")")
}

tests() {
  run test "$PYTHON" -m pytest tests --ignore=tests/interpreter -p no:cacheprovider "$@"
  # the interpreter's variable must be set before Triton is imported: a process of its own, which needs no GPU
  if "$PYTHON" -c 'import numpy, sys; sys.exit(tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4))'; then
    CUDA_VISIBLE_DEVICES='' run interpreter "$PYTHON" -m pytest tests/interpreter -p no:cacheprovider "$@"
  else
    summary+=("interpreter  not run: it needs numpy < 2.4, as in requirements/constraints.txt")
  fi
}

sanitize() {
  # without PyTorch's caching allocator each tensor is an allocation of its own: reads past its end are seen
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  local tool selection=()
  [ -z "$SANITIZE" ] || selection=(-k "$SANITIZE")
  for tool in memcheck racecheck; do
    run "$tool" timeout "$SANITIZE_SECONDS" compute-sanitizer --tool "$tool" --error-exitcode 99 --target-processes all \
      "$PYTHON" -m pytest tests/gpu -p no:cacheprovider -x "${selection[@]}" "$@"
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

bench() {
  run bench "$PYTHON" -m benchmarks --out "$OUT/bench.jsonl" "$@"
}

command=${1:-}
shift || true
case $command in
  test) tests "$@" ;;
  sanitize) sanitize "$@" ;;
  bench) bench "$@" ;;
  all) tests; sanitize; bench ;;
  *) sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;;
esac

{ nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || echo "no GPU"; printf '%s\n' "${summary[@]}"; } | tee "$OUT/summary.txt"
exit $failed
