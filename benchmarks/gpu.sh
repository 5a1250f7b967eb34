#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has one, with the Python and torch that are there and no network.
#
#   benchmarks/gpu.sh [build] [tests] [compiled] [sanitizer] [step] [kernels] [calibration] [table]    no name: all
#
# Each part has its own time limit (step, calibration and table: each of their models) and its own log; one that fails
# does not stop the others, and the summary at the end says which did. Where talos_fast is not installed with its
# libraries, build comes first by itself. Paths are from the root of the repository.
#
#   PYTHON   the Python with torch (default: python3). build installs talos_fast into it, editable. A system's Python that
#            refuses (PEP 668) can lend its packages to one that does not:
#            python3 -m venv --system-site-packages build/gpu && PYTHON=build/gpu/bin/python benchmarks/gpu.sh
#   OUT      where everything is written (default: gpu-output); at the end also as one file, OUT.tar.gz. A lent machine
#            that gives back a few files from a folder OUT of its own: R=$OUT; OUT=gpu-output benchmarks/gpu.sh build table;
#            cp gpu-output.tar.gz gpu-output/summary.txt "$R"
#   WHEELS   a folder of wheels that this Python lacks, such as setuptools where it is older than 77, or expecttest, or
#            open_clip_torch with timm, ftfy, wcwidth and regex: installed into build/site, not into the Python. Without
#            open_clip no row of a ViT can be measured, and that part fails; without expecttest the optimizer is not
#            tested under the configurations of torch's own suite.
#   LIMIT    seconds a part, or a model (default: 590)
#   BUDGET   seconds for all of it (default: no limit): a part ends with it, and what would begin after it is not run. Where
#            a machine is lent by the minute, what matters most comes first, in calls such as
#            BUDGET=540 LIMIT=200 OPTIONS="--variants paper,eager" benchmarks/gpu.sh build table tests
#            and another OUT for the next; tables go on where their files lie in OUT.
#   MODELS   of step, calibration and table (default: ViT-B-32 ViT-L-14 T5-Large; in calibration also ViT-B-32-timm, whose
#            attention other libraries support)
#   OPTIONS  more options for the benchmarks, such as "--batch 64"
#   TALOS_REVISION  what results are said to be of, in a copy without .git
set -uo pipefail
cd "$(dirname "$0")/.." || exit
if ! python=$(realpath -s -- "$(type -P "${PYTHON:-python3}")" 2> /dev/null); then  # -s: a venv's python is a link
  echo "benchmarks/gpu.sh: there is no ${PYTHON:-python3}" >&2
  exit 2
fi
out=${OUT:-gpu-output}
limit=${LIMIT:-590}
budget=${BUDGET:-86400}
mkdir -p "$out" || exit
out=$(cd "$out" && pwd)
read -r -a tabled <<< "${MODELS:-ViT-B-32 ViT-L-14 T5-Large}"
read -r -a calibrated <<< "${MODELS:-ViT-B-32 ViT-B-32-timm ViT-L-14 T5-Large}"
read -r -a options <<< "${OPTIONS:-}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
site=$PWD/build/site
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
summary=()
failed=0

# run NAME COMMAND...: under the limit, into $out/NAME.txt, and into the summary. At the limit it is interrupted as by
# Ctrl-C, so that pytest still says what had failed by then; a shell's background jobs would not hear that by default.
run() {
  local name=$1 start=$SECONDS status seconds=$((budget - SECONDS))
  shift
  if ((seconds <= 0)); then
    fail "$name: NOT RUN, the $budget s for all of it are over"
    return
  fi
  ((seconds < limit)) || seconds=$limit
  echo "== $name: $*" | tee "$out/$name.txt"
  timeout --signal=INT --kill-after=20 "$seconds" env --default-signal=INT "$@" 2>&1 | tee -a "$out/$name.txt"
  status=${PIPESTATUS[0]}
  case $status in
    0) summary+=("$name: passed, $((SECONDS - start)) s") ;;
    124 | 137) fail "$name: STOPPED after $seconds s; see $name.txt" ;;
    *) fail "$name: FAILED with exit code $status; see $name.txt" ;;
  esac
  return "$status"
}

fail() {
  summary+=("$1")
  failed=1
  return 1
}

# From outside the checkout, so that what answers is what was installed.
built() {
  (cd / && "$python" -c 'from talos_fast import ops; assert ops.backend("cuda") != "torch"') > /dev/null 2>&1
}

machine() {
  date --utc
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
  nvcc --version | tail -n 2
  "$python" -c 'import platform, torch, triton
print("python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__)
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())'
  git rev-parse HEAD 2> /dev/null || echo "revision ${TALOS_REVISION:-unknown: no .git here; TALOS_REVISION would say}"
}

build() {
  # TALOS_CUDA=1: a CUDA library that does not build is an error here, not a fallback.
  TALOS_CUDA=1 run build "$python" -m pip install --no-index --no-build-isolation --no-deps -e . || return
  built || fail "build: FAILED, talos_fast has no CUDA operators; see build.txt"
}

gpu_tests=("$python" -m pytest tests -m gpu -q -p no:cacheprovider --continue-on-collection-errors)

tests() { run tests "${gpu_tests[@]}" -k "not a_compiled_step" --junitxml="$out/tests.xml"; }

# Those that wait for torch.compile most of the time, under a limit of their own.
compiled() { run compiled "${gpu_tests[@]}" -k a_compiled_step --junitxml="$out/compiled.xml"; }

# Without torch's caching allocator every tensor is an allocation of its own, so that stepping over its end is seen.
# Our kernels only, in their own tests and none that compile: torch's are launched by the thousand, and would be slowed
# down with them. Nor the two largest shapes, which add nothing but time.
sanitizer() {
  local tool limit=$((limit / 3)) of_kernels=(tests/test_{ops,threshold,compact_operator,masked_adam}.py)
  local ours=(accumulate_mma add_parts accumulate_fma radix_histogram compact_gradient advance update)
  if ! command -v compute-sanitizer > /dev/null; then
    fail "sanitizer: FAILED, compute-sanitizer is not on PATH"
    return
  fi
  for tool in memcheck racecheck synccheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "sanitizer-$tool" \
      compute-sanitizer --tool "$tool" --error-exitcode 9 --report-api-errors no --target-processes all \
      "${ours[@]/#/--kernel-name=kns=}" \
      "$python" -m pytest "${of_kernels[@]}" -m gpu -q -x --continue-on-collection-errors -p no:cacheprovider -k "not compile and not opcheck and not 3072 and not 1024"
  done
}

# What a failed row has logged, of torch.compile thousands of lines, is not shown.
benchmark=("$python" -m pytest -q -s -p no:cacheprovider --show-capture=no --benchmark --preset gpu --results "$out")
benchmark+=("${options[@]}")

step() { each step "${tabled[@]}"; }

kernels() { run kernels "${benchmark[@]}" benchmarks/sensitivity_kernels.py -k cuda; }

calibration() { each calibration "${calibrated[@]}"; }

table() { each table "${tabled[@]}"; }

# each BENCHMARK MODEL...: one run a model.
each() {
  local name=$1 model
  shift
  for model in "$@"; do
    run "$name-$model" "${benchmark[@]}" "benchmarks/$name.py" --models "$model"
  done
}

known=(build tests compiled sanitizer step kernels calibration table)
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=("${known[@]}")
for part in "${parts[@]}"; do
  if [[ " ${known[*]} " != *" $part "* ]]; then
    echo "benchmarks/gpu.sh: no part $part; parts are ${known[*]}" >&2
    exit 2
  fi
done

# Without a device every test would be skipped, and that would read as passed.
if ! "$python" -c 'import torch; assert torch.cuda.is_available()'; then
  echo "benchmarks/gpu.sh: $python has no torch that sees a CUDA device; set PYTHON to one that has" >&2
  exit 2
fi
archive() {
  printf '%s\n' "${summary[@]}" > "$out/summary.txt"
  tar -czf "$out.tar.gz" -C "$(dirname "$out")" "$(basename "$out")" && echo "all of it: $out.tar.gz"
}
trap archive EXIT  # also where somebody stops it before its end
machine 2>&1 | tee "$out/machine.txt"
if [ -n "${WHEELS:-}" ]; then  # whatever the parts are: another call may have built without them
  run wheels "$python" -m pip install --no-index --no-deps --upgrade --target "$site" "$WHEELS"/*.whl
fi
if [ "${parts[0]}" != build ] && ! built; then parts=(build "${parts[@]}"); fi
for part in "${parts[@]}"; do
  "$part"
  # Without the operators every other part would measure and test something else.
  [ "$part" != build ] || built || break
done
printf '%s\n' "${summary[@]}"
exit "$failed"
