#!/usr/bin/env bash
# One script for a machine with a CUDA GPU and no network: tests, compute-sanitizer, benchmarks.
#
#   bash benchmarks/gpu.sh test [pytest options]       the whole suite; the GPU tests are part of it. $WORKERS processes
#                                                      if pytest-xdist is there, but the timer's tests run alone
#   bash benchmarks/gpu.sh sanitize [pytest options]   memcheck and racecheck over GPU tests: of each test function the
#                                                      first case and one of $SANITIZE_EVERY, in $WORKERS processes
#   bash benchmarks/gpu.sh bench [benchmarks options]  python -m benchmarks
#   bash benchmarks/gpu.sh all                         the three, one after the other
#
# Logs and figures go to $OUT (default benchmarks/out), a short table to the end of the output. Packages that the
# machine lacks (pytest, hypothesis, ...) may lie as wheels in .whl/; they are installed into a folder of /tmp. With
# KEEP_CACHE=1 the compiled kernels are left as $OUT/cache.tar.*; a later run finds these files in .gpu/.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=${OUT:-benchmarks/out}
PYTHON=${PYTHON:-python3}
SANITIZE_EVERY=${SANITIZE_EVERY:-50}
SANITIZE_SKIP=${SANITIZE_SKIP:-distribution|100_times|large|2_31|2_to_the|31_elements|compilation|engine|benchmarks|sync|graph|where_there_is_room|other_device|repeats}
SANITIZE_SECONDS=${SANITIZE_SECONDS:-240}  # for each tool
TEST_SECONDS=${TEST_SECONDS:-150}          # for each test, where pytest-timeout is installed
WORKERS=${WORKERS:-12}        # test processes that share the GPU
KEEP_CACHE=${KEEP_CACHE:-0}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # WORKERS processes share the cores

if compgen -G '.whl/*.whl' >/dev/null; then
  site=/tmp/site
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl || exit
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi

if compgen -G '.gpu/cache.tar.*' >/dev/null || [ "$KEEP_CACHE" = 1 ]; then
  export TRITON_CACHE_DIR=/tmp/flashtile-cache
  mkdir -p "$TRITON_CACHE_DIR"
fi
if compgen -G '.gpu/cache.tar.*' >/dev/null; then  # tar needs a program for each compression, Python has gzip and xz
  cat .gpu/cache.tar.* >/tmp/flashtile-cache.tar
  tar -C "$TRITON_CACHE_DIR" -xf /tmp/flashtile-cache.tar ||
    "$PYTHON" -m tarfile -e /tmp/flashtile-cache.tar "$TRITON_CACHE_DIR" || exit
fi

# The cache without the stages before PTX, which no launch reads, in parts of less than 16 MB
pack_cache() {
  rm -f "$OUT"/cache.tar.*
  local squeeze suffix=xz
  if command -v zstd >/dev/null; then
    squeeze=(zstd -19 -T0 -q) suffix=zst
  elif command -v xz >/dev/null; then
    squeeze=(xz -1 -T0)
  else
    squeeze=("$PYTHON" -c 'import lzma, sys
with lzma.open(sys.stdout.buffer, "w", preset=1) as out:
    while block := sys.stdin.buffer.read(1 << 20): out.write(block)')
  fi
  tar -C "$TRITON_CACHE_DIR" --exclude='*.source' --exclude='*.ttir' --exclude='*.ttgir' --exclude='*.llir' -c . |
    "${squeeze[@]}" | split -b 15M -d - "$OUT/cache.tar.$suffix."
}

summary=()
failed=0
# run NAME command...: all output into $OUT/NAME.log and to the terminal; the exit code and last line into the summary
run() {
  local name=$1 log=$OUT/$1.log begin=$SECONDS code=0
  shift
  echo "== $name: $*"
  "$@" 2>&1 | tee "$log" || code=$?
  [ "$code" = 0 ] || [ "$code" = 5 ] || failed=1  # 5: pytest's options chose none of these tests
  summary+=("$(printf '%-12s exit %-3s %4s s  %s' "$name" "$code" $((SECONDS - begin)) "$(grep -v '^ *$' "$log" | tail -n 1 | cut -c1-100)")")
}

tests() {
  local timing=tests/gpu/test_benchmarks.py workers=() options=(-p no:cacheprovider -rf "$@")
  # a test that hangs is named, and ends with its process, not with the run
  "$PYTHON" -c 'import pytest_timeout' 2>/dev/null && options+=(--timeout "$TEST_SECONDS" --timeout-method thread)
  "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(--numprocesses "$WORKERS" --dist worksteal)
  run test "$PYTHON" -m pytest tests --ignore=tests/interpreter --ignore="$timing" "${workers[@]}" "${options[@]}"
  run timing "$PYTHON" -m pytest "$timing" "${options[@]}"
  # the interpreter's variable must be set before Triton is imported: a process of its own, which needs no GPU
  if "$PYTHON" -c 'import numpy, sys; sys.exit(tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4))'; then
    CUDA_VISIBLE_DEVICES='' run interpreter "$PYTHON" -m pytest tests/interpreter "${workers[@]}" "${options[@]}"
  else
    summary+=("interpreter  not run: it needs numpy < 2.4, as in requirements/constraints.txt")
  fi
}

sanitize() {
  local tool shard ids=$OUT/sanitize.ids
  "$PYTHON" -m pytest tests/gpu --collect-only -q -o addopts= -p no:cacheprovider "$@" | grep '::' |
    grep -vE "$SANITIZE_SKIP" | awk -F'[' -v every="$SANITIZE_EVERY" '++seen[$1] % every == 1 % every' >"$ids"
  for ((shard = 0; shard < WORKERS; shard++)); do
    awk -v n="$WORKERS" -v i="$shard" 'NR % n == i' "$ids" >"$ids.$shard"
  done
  for tool in memcheck racecheck; do
    run "$tool" sanitize_shards "$tool" "$ids"
  done
  rm -f "$ids".*
}

# sanitize_shards TOOL IDS: the tests named in the files IDS.0, IDS.1, ..., a process each; what each said, and a total.
#
# In every warp-specialised kernel that waits for an mbarrier, also in one that does nothing else (handover in
# tests/gpu/dispatch.py), racecheck reports the dispatch itself: the byte by which a warp learns its role, read in the
# kernel's first instructions and written by warp group 0 before it starts the others and after they end, with barrier 1
# between. Only that is allowed: reads beyond the first 512 bytes fail.
sanitize_shards() {
  local tool=$1 ids=$2 shard pids=() failures=0 races
  for ((shard = 0; shard < WORKERS; shard++)); do
    [ -s "$ids.$shard" ] || continue
    # without PyTorch's caching allocator each tensor is an allocation of its own: reads past its end are seen
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$SANITIZE_SECONDS" compute-sanitizer --tool "$tool" \
      --error-exitcode "$([ "$tool" = racecheck ] && echo 0 || echo 99)" \
      "$PYTHON" -m pytest -q --tb=short -p no:cacheprovider -o addopts= "@$ids.$shard" >"$ids.$shard.log" 2>&1 &
    pids+=($!)
  done
  for shard in "${!pids[@]}"; do
    wait "${pids[$shard]}" || { echo "process $shard: exit $?"; failures=$((failures + 1)); }
  done
  cat "$ids".*.log
  races=$(cat "$ids".*.log | grep 'Race reported' | grep -cvE 'Read access at [a-z_]+\+0x1?[0-9a-f]{1,2} ')
  echo "$tool: $(wc -l <"$ids") tests, $failures of ${#pids[@]} processes failed, $races races outside of the dispatch of warps"
  [ "$failures$races" = 00 ]
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
  *) sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
[ "$KEEP_CACHE" = 0 ] || pack_cache

{ nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || echo "no GPU"; printf '%s\n' "${summary[@]}"; } | tee "$OUT/summary.txt"
exit $failed
