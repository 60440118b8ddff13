#!/usr/bin/env bash
# What to run on a machine with a GPU, in a few minutes: the tests that need one, the benchmarks against the reference
# form, then as much of the paper's trainings as MINUTES allow. Small files that are worth keeping go to OUT.
#   OUT=results MINUTES=6 DATA=hf:../shared/data/cifar100 bash scripts/gpu.sh [tests] [benchmarks] [forms] [paper]
# "benchmarks" stands for training, recording and deploying; "forms" runs the trainings of a SETTING, WORKERS at once.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu} MINUTES=${MINUTES:-6} DATA=${DATA:-cifar100} DEVICE=${DEVICE:-cuda} DEPTH=${DEPTH:-164}
PYTHON=${PYTHON:-python3} SAMPLES=${SAMPLES:-9984}
SETTING=${SETTING:-cifar100-resnet20-bf16} SEEDS=${SEEDS:-1 2 3 4 5} WORKERS=${WORKERS:-5}
FORMS=${FORMS:-plain attention asr both plain-0.5 plain-0.25 asr-1}
export PYTHONPATH=$PWD
mkdir -p "$OUT"

tests() {
    timeout -s INT "${TESTS_SECONDS:-300}" "$PYTHON" -m pytest -q --tb=short -W default -p no:cacheprovider \
        -n "${TESTS_AT_ONCE:-4}" -m cuda tests/test_cuda.py tests/test_asr.py 2>&1 | tee "$OUT/tests.txt"
}

benchmarks() { training; recording; deploying; }

benchmark() {  # NAME FILE [OPTION ...]
    "$PYTHON" -W ignore -W default::UserWarning scripts/benchmark.py "$1" --depth "$DEPTH" --device "$DEVICE" \
        --json "$OUT/$2.json" "${@:3}" 2>&1 | tee "$OUT/$2.txt"
}

training() {
    benchmark train train --forms SE --compile --dataset "$DATA" --samples "$SAMPLES" --epochs 2 --rounds "${ROUNDS:-1}" \
        --workers "${LOADERS:-12}"
}

recording() { benchmark collect collect --samples "$SAMPLES" --batch 1000 --rounds "${ROUNDS:-2}"; }

deploying() { benchmark deploy deploy --batch 1000 --rounds 5; }

forms() {  # the trainings of a setting, shared among several processes
    local pids=()
    for _ in $(seq "$WORKERS"); do
        # shellcheck disable=SC2086
        OMP_NUM_THREADS=1 "$PYTHON" -W ignore -W default::UserWarning scripts/study.py forms --setting "$SETTING" \
            --dataset "$DATA" --amp bf16 --seeds $SEEDS --forms $FORMS --minutes "$MINUTES" ${FORMS_OPTIONS:-} \
            --out "$OUT/study" >> "$OUT/forms.txt" 2>&1 &
        pids+=($!)
    done
    wait "${pids[@]}"
    tail -n 3 "$OUT/forms.txt"
}

paper() {
    # shellcheck disable=SC2086
    "$PYTHON" -W ignore -W default::UserWarning scripts/study.py paper --dataset "$DATA" --depth "$DEPTH" \
        --minutes "$MINUTES" ${PAPER_OPTIONS:-} --out "$OUT/study" 2>&1 | tee "$OUT/paper.txt"
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | tee "$OUT/card.txt"
for part in "${@:-tests benchmarks paper}"; do
    for each in $part; do
        start=$SECONDS
        "$each"
        echo "$each: $((SECONDS - start)) s"
    done
done
