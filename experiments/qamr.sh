#!/usr/bin/env bash
# FiRST and plain LoRA on qamr with SmolLM2, seed by seed, then scored on unseen test items.
# Usage: FIRSTLM_DATA=... experiments/qamr.sh [runs folder] [seeds...]. Interrupted runs resume.
set -euo pipefail
cd "$(dirname "$0")/.."
runs="${1:-runs}"
shift || true
data="${FIRSTLM_DATA:?set it to the folder that holds qa/qamr}/qa/qamr"
declare -A policies=([first]="base run_all router" [lora]="run_all" [routers]="router")
declare -A rates=([first]="0.10 0.15 0.25 0.40" [lora]="0.25" [routers]="0.15 0.25")
for seed in "${@:-0}"; do
  for kind in first lora routers; do
    firstlm train --config "experiments/qamr_$kind.yaml" --seed "$seed" \
      --data "$data/train.jsonl.gz" --validation "$data/validation.jsonl.gz" \
      --output "$runs/qamr-$kind-$seed"
    # shellcheck disable=SC2086
    firstlm eval "$runs/qamr-$kind-$seed" --data "$data/test.jsonl.gz" --limit 500 \
      --dtype bfloat16 --max-new-tokens 24 --policies ${policies[$kind]} \
      --skip-rates ${rates[$kind]} --output "results/qamr-$kind-$seed.json"
  done
done
python experiments/table.py --write
