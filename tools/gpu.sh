#!/usr/bin/env bash
# Everything that needs a GPU, in one call: bash tools/gpu.sh [FOLDER=outputs/gpu]
# Tests, the kernels' speeds (checked before they are timed), prompt to mp4 with Wan 1.3B (random weights), and a memory check where
# compute-sanitizer is installed. Each writes to the folder; the exit status is that of the first that failed.
# TURBOKERNELS_AUTOTUNE=1 tunes on the way. WORKERS: test processes, as pytest-xdist counts them (default 4).
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-outputs/gpu}
mkdir -p "$out"
status=0

step() { # name, command ...: its output in the folder, its last line here
    local name=$1 code=0
    shift
    "$@" >"$out/$name.log" 2>&1 || code=$?
    echo "$name: $([ $code = 0 ] && echo ok || echo "exit status $code"): $(tail -n 1 "$out/$name.log")"
    [ $status = 0 ] && status=$code
    return 0
}

# One after the other: a test that still runs would slow what is timed.
step tests python -m pytest tests/gpu -q -n "${WORKERS:-4}"
step kernels python tools/bench.py --shapes s1 s2 --output "$out/kernels.json"
step video python infer.py mode=benchmark weights=random model=wan2.1_t2v_1.3b resolution=480p json="$out/video.json"
if command -v compute-sanitizer >/dev/null; then
    step memory compute-sanitizer --tool memcheck --error-exitcode 9 python -m turbokernels.check --small
else
    echo "memory: compute-sanitizer is not installed"
fi
exit $status
