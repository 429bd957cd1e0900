#!/usr/bin/env bash
# All that a bare machine with a GPU is asked to do: Python with torch, nvcc on PATH, no network.
#
#   bench/gpu_all.sh build             install this package in place, for the devices at hand
#   bench/gpu_all.sh test              the tests that need a GPU, and small products under compute-sanitizer
#   bench/gpu_all.sh bench             pytest bench/kernels/bench_gemm.py on the GPU
#   bench/gpu_all.sh rivals [OPTION].. python -m bench.kernels.rivals_gpu with these options
#   bench/gpu_all.sh                   all of them in turn
#
# Each step takes at most 9 minutes. One that was cut short goes on where it stopped when it is called again: tests that
# passed are not run again, contenders and rows that were measured are not measured again, until the sources change.
# The exit code is that of what failed first; 124 means that time was up.
#
#   OUT                 where JSON and logs go; bench/results (and no logs) if it is not set
#   PYTHON              the interpreter; python3 if it is not set
#   LLMPQ_RIVALS        a folder of wheels and source archives to install beside the project (humming-kernels, gemlite,
#                       bitsandbytes), and of vLLM's library, _C_stable_libtorch.abi3.so, plain or as .xz
#   LLMPQ_VLLM_LIBRARY  that library, if it lies elsewhere
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly LIMIT=540 # seconds of a step
readonly STATE=build/gpu_all
readonly RESULTS=${OUT:-bench/results}
readonly PYTHON=${PYTHON:-python3}
readonly SITE=$PWD/$STATE/site
mkdir -p "$STATE" "$RESULTS"

within_limit() { # COMMAND...: as far as this step's time allows
  local left=$((LIMIT - SECONDS))
  if ((left <= 0)); then return 124; fi
  timeout --kill-after=20 "$left" "$@"
}

sources() { # a name for the state of what is tested
  find csrc llmpq tests bench setup.py CMakeLists.txt -type f \( -name '*.py' -o -name '*.cu*' -o -name '*.cpp' -o -name '*.h' \
    -o -name '*.json' -o -name CMakeLists.txt \) -not -path 'bench/results/*' -print0 |
    sort -z | xargs -0 sha256sum | sha256sum | cut -c1-12
}

once() { # NAME COMMAND...: unless it succeeded before, with the sources as they are
  local mark
  mark=$STATE/$1-$(sources).passed
  shift
  if [[ -e $mark ]]; then return 0; fi
  within_limit "$@"
  touch "$mark"
}

step_build() {
  CUDAARCHS=$("$PYTHON" -c '
import torch
found = {"%d%d" % torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
print(";".join(sorted(found)) or exit("error: torch sees no CUDA device"))')
  export CUDAARCHS
  echo "building for compute capability $CUDAARCHS"
  within_limit "$PYTHON" -m pip install --no-index --no-build-isolation --no-deps --editable .
  # The extension is optional to pip, not here.
  "$PYTHON" -c 'from llmpq.kernels import available_backends; exit(available_backends()["cuda"])'
}

step_test() {
  local file parallel=()
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then parallel=(-n 8); fi
  for file in gemm gpu triton kv_attention rows compile; do
    echo "tests/kernels/test_$file.py"
    once "test_$file" "$PYTHON" -m pytest "${parallel[@]}" "tests/kernels/test_$file.py"
  done
  once small "$PYTHON" -m bench.kernels.gpu_small
  if command -v compute-sanitizer >/dev/null; then
    local tool
    for tool in memcheck racecheck; do
      echo "compute-sanitizer: $tool"
      # Without torch's cache of memory every tensor ends where its allocation does.
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 once "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
        "$PYTHON" -m bench.kernels.gpu_small
    done
  else
    echo "compute-sanitizer is not on PATH: not run"
  fi
}

step_bench() {
  local contender parts=()
  for contender in torch-bfloat16 torch-float16 {cuda,triton}-w{3,4,8}; do
    parts+=("$STATE/bench-$contender.json")
    echo "bench/kernels/bench_gemm.py: $contender"
    once "bench-$contender" "$PYTHON" -m pytest bench/kernels/bench_gemm.py --device cuda --benchmark-only -k "$contender" \
      --benchmark-columns=median,iqr,rounds "--benchmark-json=$STATE/bench-$contender.json"
  done
  "$PYTHON" - "$RESULTS/bench_gemm_gpu.json" "${parts[@]}" <<'END'
import json, sys
whole, *others = [json.load(open(part)) for part in sys.argv[2:]]
for other in others:
    whole["benchmarks"] += other["benchmarks"]
json.dump(whole, open(sys.argv[1], "w"))
END
}

step_rivals() {
  local file=$STATE/rivals_gpu.json code=0
  if [[ ! -e $file && -e bench/results/rivals_gpu.json ]]; then cp bench/results/rivals_gpu.json "$file"; fi
  # It ends by itself a minute early: what is killed is taken for the fault of who was at work.
  within_limit "$PYTHON" -m bench.kernels.rivals_gpu --json-out "$file" "--budget-seconds=$((LIMIT - SECONDS - 60))" "$@" || code=$?
  if [[ -e $file ]]; then cp "$file" "$RESULTS/rivals_gpu.json"; fi
  return "$code"
}

install_rivals() {
  local archives library
  mapfile -t archives < <(find "$LLMPQ_RIVALS" -maxdepth 1 \( -name '*.whl' -o -name '*.tar.gz' \) | sort)
  if ((${#archives[@]})) && [[ ! -d $SITE ]]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-build-isolation --target "$SITE" "${archives[@]}"
  fi
  library=$(find "$LLMPQ_RIVALS" -maxdepth 1 -name '_C_stable_libtorch.abi3.so*' | sort | head -n 1)
  if [[ $library == *.xz ]]; then
    local unpacked=$PWD/$STATE/_C_stable_libtorch.abi3.so
    if [[ ! -e $unpacked ]]; then
      "$PYTHON" -c 'import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[2], "wb"))' \
        "$library" "$unpacked"
    fi
    library=$unpacked
  fi
  if [[ -n $library ]]; then export LLMPQ_VLLM_LIBRARY=${LLMPQ_VLLM_LIBRARY:-$library}; fi
}

run_step() { # NAME OPTION...
  local name=$1
  shift
  SECONDS=0
  echo "== $name"
  if [[ -n ${OUT:-} ]]; then
    "step_$name" "$@" 2>&1 | tee "$OUT/gpu_all_$name.log"
  else
    "step_$name" "$@"
  fi
}

if [[ -n ${LLMPQ_RIVALS:-} ]]; then install_rivals; fi
if [[ -d $SITE ]]; then export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH}; fi
export PYTHONUNBUFFERED=1
case ${1:-all} in
  build | test | bench | rivals) run_step "$@" ;;
  all) for step in build test bench rivals; do run_step "$step"; done ;;
  *)
    echo "error: $1 is no step; there are build, test, bench and rivals" >&2
    exit 2
    ;;
esac
