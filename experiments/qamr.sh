#!/usr/bin/env bash
# FiRST, plain LoRA and routers alone on qamr with SmolLM2, seed by seed, scored on unseen test items.
# Usage: FIRSTLM_DATA=... [KINDS="first lora routers"] [RESULTS=folder] experiments/qamr.sh [runs folder] [seeds...]
# Runs that were interrupted resume, and scores that are there are not made again.
set -euo pipefail
cd "$(dirname "$0")/.."
runs="${1:-runs}"
results="${RESULTS:-results}"
shift || true
data="${FIRSTLM_DATA:?set it to the folder that holds qa/qamr}/qa/qamr"
declare -A policies=([first]="run_all router" [lora]="run_all" [routers]="router")
declare -A rates=([first]="0.10 0.15 0.25 0.40" [lora]="0.25" [routers]="0.15 0.25")
for seed in "${@:-0}"; do
  for kind in ${KINDS:-first lora routers}; do
    name="qamr-$kind-$seed"
    if [ ! -e "$runs/$name" ]; then
      firstlm train --config "experiments/qamr_$kind.yaml" --seed "$seed" \
        --data "$data/train.jsonl.gz" --validation "$data/validation.jsonl.gz" \
        --output "$runs/$name"
    fi
    scored="${policies[$kind]}"
    # The base model knows no seed: scored once.
    if [ "$kind$seed" = first0 ]; then scored="base $scored"; fi
    # shellcheck disable=SC2086
    firstlm eval "$runs/$name" --data "$data/test.jsonl.gz" --limit 500 \
      --dtype float32 --max-new-tokens 24 --policies $scored \
      --skip-rates ${rates[$kind]} --output "$results/$name.json" --record
  done
done
python experiments/table.py --write
