#!/usr/bin/env bash
# The main job on the embedded model and corpus: capture, train a fleet, report. Run by `make demo`.
set -euo pipefail
bin=$1 corpus=$2

echo "== capture: the embedded model over the embedded corpus"
store=$("$bin/actstore" capture --model data/tiny-gpt2 --hook blocks.2.hook_resid_pre --corpus "$corpus" --rows 262144)
echo "store $store"

echo "== fit: three SAEs from one pass over the store"
mapfile -t runs < <("$bin/trainer" fit --store "$store" --n-latents 1024 --k 8,16,32 --epochs 2 --batch-size 1024)
test "${#runs[@]}" -eq 3

echo "== report"
report=$("$bin/trainer" report "${runs[@]}" --rows 65536 --model data/tiny-gpt2 --out runs/demo.html)
"$bin/trainer" features "${runs[1]}" --search import
"$bin/actstore" ls
"$bin/trainer" ls
echo "report: $PWD/$report"
