#!/usr/bin/env bash
# What a machine with a GPU is asked for, in a few minutes: the tests that need one, the benchmarks beside the reference
# form, then as much of the paper's trainings as MINUTES allow. Small files that are worth keeping go to OUT.
#   OUT=results MINUTES=6 DATA=hf:../shared/data/cifar100 bash scripts/gpu.sh [tests] [benchmarks] [forms] [paper]
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu} MINUTES=${MINUTES:-6} DATA=${DATA:-cifar100} DEVICE=${DEVICE:-cuda} DEPTH=${DEPTH:-164}
PYTHON=${PYTHON:-python3} SEEDS=${SEEDS:-1 2 3 4 5} WORKERS=${WORKERS:-5}
export PYTHONPATH=$PWD
mkdir -p "$OUT"

tests() {
    timeout -s INT "${TESTS_SECONDS:-300}" "$PYTHON" -m pytest -q --tb=short -W default -p no:cacheprovider -m cuda tests/test_cuda.py tests/test_asr.py 2>&1 | tee "$OUT/tests.txt"
}

benchmarks() {
    local run=("$PYTHON" -W ignore scripts/benchmark.py) size=(--depth "$DEPTH" --device "$DEVICE")
    "${run[@]}" train "${size[@]}" --dataset "$DATA" --samples "${SAMPLES:-9984}" --epochs 2 --rounds "${ROUNDS:-1}" \
        --forms SE ${COMPILE---compile} --workers "${LOADERS:-12}" --json "$OUT/train.json" 2>&1 | tee "$OUT/train.txt"
    "${run[@]}" collect "${size[@]}" --samples "${SAMPLES:-9984}" --batch 1000 --rounds "${ROUNDS:-2}" \
        --json "$OUT/collect.json" 2>&1 | tee "$OUT/collect.txt"
    "${run[@]}" deploy "${size[@]}" --batch 1000 --rounds 5 --json "$OUT/deploy.json" 2>&1 | tee "$OUT/deploy.txt"
}

forms() {  # the trainings of ResNet-20 and their controls, several processes sharing the work
    local all=(plain attention asr both plain-0.5 plain-0.25 asr-1) pids=()
    for _ in $(seq "$WORKERS"); do
        # shellcheck disable=SC2086
        OMP_NUM_THREADS=2 "$PYTHON" -W ignore scripts/study.py forms --setting cifar100-resnet20-bf16 --dataset "$DATA" \
            --amp bf16 --seeds $SEEDS --forms "${all[@]}" ${FORMS_OPTIONS:-} --out "$OUT/study" >> "$OUT/forms.txt" 2>&1 &
        pids+=($!)
    done
    wait "${pids[@]}"
    tail -n 3 "$OUT/forms.txt"
}

paper() {
    # shellcheck disable=SC2086
    "$PYTHON" -W ignore scripts/study.py paper --dataset "$DATA" --depth "$DEPTH" --minutes "$MINUTES" ${PAPER_OPTIONS:-} \
        --out "$OUT/study" 2>&1 | tee "$OUT/paper.txt"
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | tee "$OUT/card.txt"
for part in "${@:-tests benchmarks paper}"; do
    for each in $part; do
        start=$SECONDS
        "$each"
        echo "$each: $((SECONDS - start)) s"
    done
done
