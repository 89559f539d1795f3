#!/bin/bash
# Everything that a GPU has to show about tadperf, in one call of ten minutes on an H100 or H200.
#
#   bash bench/tools/gpu_plan.sh [SECONDS] [STAGE...]      default: 585 seconds, all stages in this order
#
# The most valuable facts come first. Every stage has its own time limit and keeps what it had when it is stopped.
#   install   wheels from $FILES/whl into $SITE, without a network; builds tadperf there if no wheel fits
#   facts     versions, copy bandwidth, matrix products and convolutions in TF32 and bfloat16
#   first     does a CUDA run work: six tiny whole jobs and the checks of all operators, side by side; no timings
#   matching  one iteration at CIFAR-10, IPC 10, T = 30: published unroll, formulas, compiled, bfloat16; memory; kernels
#   experts   images per second of training, of one step alone, the longest kernels
#   jobs      CIFAR-10 with CIFAR-10N's worse labels, IPC 10, trust off, on and oracle, with $EXPERTS experts and
#             $ITERATIONS iterations. The three run at once, so their seconds are no timings.
#   speed     milliseconds, GB/s and share of the copy bandwidth of every operator, against eager PyTorch
#   sanitize  compute-sanitizer memcheck over one small call of each operator
#   huge      more than 2^31 elements; takes up to 40 GiB of GPU memory
# The state lies in $STATE: the same command again, on the same machine, does only what is missing and continues jobs.
# After every stage the results and a Markdown page are copied to $OUT. The page can go into bench/results/.
#
# Variables:
#   PY      the Python to use; default python3
#   FILES   folder with whl/ (wheels for that Python) and data/cifar10/; default .gpu in the repository.
#           Without whl/, the tadperf that $PY imports is used. Without the data, the stage jobs is left out.
#   DEVICE  cuda, or cpu to rehearse all stages on small inputs
# Example of preparing $FILES on a machine with a network:
#   mkdir -p .gpu/whl .gpu/data; cp -r cifar10 .gpu/data/   # parquet files of CIFAR-10, and CIFAR-10_human.pt
#   python3.12 -m pip wheel --no-deps -w .gpu/whl .         # with the Python version of the GPU machine
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 -d .gpu/whl pydantic pydantic-core \
#     annotated-types typing-inspection typing-extensions diffusers importlib-metadata lazy-importer
set -u -o pipefail
LIMIT=${1:-585}
shift || true
STAGES=${*:-install facts first matching experts jobs speed sanitize huge}
DEVICE=${DEVICE:-cuda}
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
FILES=${FILES:-$ROOT/.gpu}
STATE=${STATE:-${TMPDIR:-/tmp}/tadperf-gpu}
OUT=${OUT:-$STATE/out}
PY=$(command -v "${PY:-python3}") # absolute: the script changes its folder
SITE=${SITE:-$STATE/site}
EXPERTS=${EXPERTS:-8} ITERATIONS=${ITERATIONS:-600}
START=$SECONDS
mkdir -p "$STATE" "$OUT" "$SITE"
export PYTHONUNBUFFERED=1
export XDG_CACHE_HOME=$STATE/cache TRITON_CACHE_DIR=$STATE/cache/triton # all stages share compiled code
[ -d "$FILES/whl" ] && export PYTHONPATH=$SITE
PLAN="tadperf.bench.tools.gpu_plan"

log() { echo "[$((SECONDS - START)) s] $*" | tee -a "$STATE/log.txt"; }

seconds_left() { echo $((LIMIT - (SECONDS - START) - 5)); }

# limited SECONDS COMMAND...: stops the command after this time, or when the time of the call is over. A run gets
# SIGTERM first, so that its folder can be continued. (A background job of bash ignores SIGINT.)
limited() {
  local limit=$1 left
  shift
  left=$(seconds_left)
  [ "$limit" -gt "$left" ] && limit=$left
  [ "$limit" -lt 8 ] && { log "no time left: $*"; return 124; }
  timeout --signal=TERM --kill-after=8 "$limit" "$@"
}

measure() { # measure SECONDS STAGE [OPERATOR]
  limited "$1" "$PY" -m $PLAN "$2" "$STATE" "$DEVICE" "${@:3}" 2>&1 | cut -c1-500 | tail -40
}

copy_results() {
  "$PY" -m tadperf.bench.tools.gpu_page "$STATE" >"$STATE/page.md" 2>>"$STATE/log.txt" || log "the page failed"
  for file in page.md log.txt facts.json checks.jsonl first.txt matching.json experts.json jobs.json speed.jsonl huge.jsonl sanitize.txt; do
    [ -e "$STATE/$file" ] && tail -c 15000000 "$STATE/$file" >"$OUT/$file"
  done
  return 0
}
trap copy_results EXIT

SMALL="net.width=16 net.depth=2 experts.count=2 experts.epochs=3 match.iterations=6 match.check_every=3 match.steps=4
 match.max_start=1 match.expert_epochs=1 evaluate.epochs=5 evaluate.repeats=1 evaluate.full_epochs=1
 evaluate.full_repeats=1 trust.rounds=1 trust.proxies=2 trust.epochs=2"

tiny_job() { # tiny_job NAME FIELD=VALUE...: a whole small job on digits; prints PASS or FAIL and the warnings
  local name=$1 settings=() setting code
  shift
  for setting in $SMALL "$@"; do settings+=(--set "$setting"); done
  rm -rf "$STATE/tiny-$name"
  if limited 95 "$PY" -m tadperf distill digits --preset digits --noise asymmetric:0.4 --device "$DEVICE" --debug --quiet --json \
    --out "$STATE/tiny-$name" "${settings[@]}" >"$STATE/tiny-$name.out" 2>"$STATE/tiny-$name.err"; then
    echo "PASS tiny job $name $(cut -c1-300 "$STATE/tiny-$name.out")"
  else
    code=$?
    [ $code -eq 124 ] && echo "FAIL tiny job $name: not done in time" && return
    echo "FAIL tiny job $name: exit code $code: $(grep -v Warning "$STATE/tiny-$name.err" | tail -12)"
  fi
  grep -E "Warning|failed" "$STATE/tiny-$name.err" | sort | uniq -c | head -5 # a graph or a compiler that fell back
}

stage_install() {
  if [ -d "$FILES/whl" ]; then
    "$PY" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" "$FILES"/whl/*.whl 2>&1 | tail -3
    if ! "$PY" -c "import tadperf.kernels as k; assert k.native.available(), k.native.reason()"; then
      log "building tadperf here"
      "$PY" -m pip install -q --no-index --no-deps --no-build-isolation --no-cache-dir --upgrade --target "$SITE" "$ROOT" 2>&1 | tail -5
    fi
  fi
  "$PY" -c "import tadperf" || { log "tadperf cannot be imported: no other stage can run"; exit 1; }
  [ "$DEVICE" = cuda ] && nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit \
    --format=csv | tee -a "$STATE/log.txt"
  "$PY" -m tadperf info --json | cut -c1-1500 | tee -a "$STATE/log.txt"
}

stage_facts() { measure 40 facts; }

stage_first() {
  local name
  local -x OMP_NUM_THREADS=1 # 14 processes with 16 threads each took over four times as long on 16 cores
  : >"$STATE/first.txt"
  for name in $("$PY" -c "from tadperf.bench.operators import catalogue; print(*catalogue.NAMES)"); do
    (measure 95 check "$name" >"$STATE/check-$name.txt"; echo "checks of $name: exit code $?: $(tail -2 "$STATE/check-$name.txt")" >>"$STATE/first.txt") &
  done
  (tiny_job formulas match.compile=off >>"$STATE/first.txt") &
  (tiny_job auto match.compile=auto >>"$STATE/first.txt") &
  (tiny_job compiled match.compile=on >>"$STATE/first.txt") &
  (tiny_job tgdd match.method=tgdd match.compile=auto match.factor=2 match.batch=30 >>"$STATE/first.txt") &
  (tiny_job infmatch match.method=infmatch match.compile=auto match.batch=30 >>"$STATE/first.txt") &
  (tiny_job datm match.method=datm match.compile=off match.batch=7 match.trajectories=2 experts.rho=0.01 \
    experts.alpha=0.3 >>"$STATE/first.txt") &
  if "$PY" -c "import diffusers" 2>/dev/null; then
    (tiny_job diffusion synthesis=generative diffusion.width=8 diffusion.iterations=20 diffusion.batch=32 detector.epochs=6 \
      refine.rounds=2 refine.candidates=2 refine.top_k=2 refine.steps=4 refine.batch=32 refine.backend=eager >>"$STATE/first.txt") &
  fi
  wait
  cat "$STATE"/checks-*.jsonl >"$STATE/checks.jsonl" 2>/dev/null
  tail -60 "$STATE/first.txt"
}

stage_matching() { measure 150 matching; }
stage_experts() { measure 45 experts; }

stage_jobs() { # three runs side by side; a run that exists is continued
  local limit mode options small=() setting
  limit=$(seconds_left)
  [ "$limit" -gt 300 ] && limit=300
  if [ "$DEVICE" = cpu ]; then
    for setting in $SMALL; do small+=(--set "$setting"); done
    set -- digits --preset digits --noise asymmetric:0.4 "${small[@]}"
  elif [ -d "$FILES/data/cifar10" ]; then
    set -- "$FILES/data/cifar10" --preset cifar10-ipc10 --labels "$FILES/data/cifar10/CIFAR-10_human.pt:worse_label" \
      --set experts.count="$EXPERTS" --set match.iterations="$ITERATIONS" --set match.check_every=200 --set trust.rounds=1 \
      --set trust.proxies=2 --set evaluate.repeats=3 --set evaluate.full_repeats=1 --set evaluate.full_epochs=15
  else
    log "no data in $FILES/data/cifar10"
    return 0
  fi
  for mode in on off oracle; do
    [ -e "$STATE/job-$mode/DONE" ] && continue
    options=("$@" --trust "$mode" --device "$DEVICE")
    [ -d "$STATE/job-$mode" ] && options=(--resume)
    (OMP_NUM_THREADS=5 limited "$limit" "$PY" -m tadperf distill "${options[@]}" --debug --quiet --json \
      --out "$STATE/job-$mode" >"$STATE/job-$mode.out" 2>"$STATE/job-$mode.log") &
    [ "$mode" = on ] && [ "$DEVICE" = cuda ] && sleep 4 # the first run decodes the images and fills the caches
  done
  wait
  "$PY" -m $PLAN jobs "$STATE" "$DEVICE"
}

stage_speed() { measure 110 speed; }

stage_sanitize() {
  if [ "$DEVICE" != cuda ] || ! command -v compute-sanitizer >/dev/null; then
    echo "SKIP compute-sanitizer: it needs CUDA and must be on PATH" | tee "$STATE/sanitize.txt"
    return 0
  fi
  limited 100 compute-sanitizer --tool memcheck --error-exitcode 9 "$PY" -m tadperf.bench.tools.gpu_check --only small \
    >"$STATE/sanitize.txt" 2>&1
  log "memcheck: exit code $?: $(tail -2 "$STATE/sanitize.txt")"
}

stage_huge() { measure 60 huge; }

is_done() { # jobs is done when all runs are; another stage when its command succeeded
  case $1 in
    jobs) [ "$(ls "$STATE"/job-*/DONE 2>/dev/null | wc -l)" -eq 3 ] || { [ "$DEVICE" = cuda ] && [ ! -d "$FILES/data/cifar10" ]; } ;;
    *) [ "$2" -eq 0 ] ;;
  esac
}

cd "$STATE" || exit 1 # in the repository, `python -m tadperf` would find the sources instead of the installed package
for stage in $STAGES; do
  if [ -e "$STATE/done-$stage" ]; then
    log "$stage: done before"
    continue
  fi
  if [ "$(seconds_left)" -lt 8 ]; then
    log "$stage: no time left"
    continue
  fi
  log "$stage begins"
  "stage_$stage"
  code=$?
  log "$stage: exit code $code"
  is_done "$stage" $code && touch "$STATE/done-$stage"
  copy_results
done
log "end"
