#!/usr/bin/env bash
# Tests and measures the plug-in on one GPU, in at most eight minutes, or trains there for at most nine:
#   benchmarks/gpu.sh [--train] [--device cuda|cpu] [--quick] [--out FOLDER]
# 1. `pytest -m gpu`: the Triton kernels against the torch backend, CUDA graphs, batches on the side stream;
# 2. the block: torch, compiled torch, Triton, and a copy of the same bytes;
# 3. a training step of VideoSAUR and SlotContrast with and without SSync;
# 4. the loader, batches to the device included.
# With `--train`, instead: the quickstart host on 24 x 24 patches with a wide decoder, 10,000 steps of 64 clips, with and
# without SSync, two seeds (`quality.py quickstart_gpu`).
# Each part writes a CSV that names the device in every row, and prints its table. A part that fails or runs out of its
# time is named at the end, and the exit status is 1; the others still run. `--device cpu --quick` shows that it works,
# and writes to runs/quick: its numbers are of tiny shapes.
set -uo pipefail
cd "$(dirname "$0")/.."

device=cuda quick="" train="" out=""
while [ $# -gt 0 ]; do
  case "$1" in
    --device) device=${2:?--device needs cuda or cpu}; shift 2 ;;
    --quick) quick=1; shift ;;
    --train) train=1; shift ;;
    --out) out=${2:?--out needs a folder}; shift 2 ;;
    *) echo "Expected --train, --device cuda|cpu, --quick or --out FOLDER, but got $1." >&2; exit 2 ;;
  esac
done
case "$device" in cuda|cpu) ;; *) echo "Expected --device cuda or cpu, but got $device." >&2; exit 2 ;; esac
if [ "$device" = cuda ] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "Expected a CUDA device, but PyTorch sees none. Use --device cpu --quick to see that the script works." >&2
  exit 2
fi
out=${out:-$([ -n "$quick" ] && echo runs/quick || echo benchmarks/results)}
mkdir -p "$out" || exit 2

failed=()
part() { # part NAME SECONDS COMMAND...
  local name=$1 seconds=$2
  shift 2
  printf '\n== %s\n' "$name"
  timeout --kill-after=10 "$seconds" "$@" || failed+=("$name (status $?)")
}

if [ -n "$quick" ]; then
  block=(--quick) step=(--quick --rounds 2)
  loader=(--videos 8 --frames 8 --resolution 32 --per-shard 4 --image-size 32 --batch-size 2 --workers 0
    --shuffle-buffer 4 --warmup 1 --seconds 0.2 --repeats 1 --work 64)
else
  block=(--tables main) step=(--batch-size 32 --rounds 40)
  loader=(--workers 0 4 --seconds 3 --repeats 1)
fi

finish() {
  printf '\n'
  if [ ${#failed[@]} -gt 0 ]; then
    printf 'Not finished: %s\n' "${failed[@]}"
    exit 1
  fi
  echo "All parts finished; results are in $out."
  exit
}

if [ -n "$train" ]; then
  settings=(-- "--trainer.accelerator=$device")
  if [ -n "$quick" ]; then
    settings=(--out "$out/quickstart_gpu" --seeds 1 "${settings[@]}" --trainer.max_steps=4
      --trainer.val_check_interval=2 --data.init_args.num_train=4 --data.init_args.num_validation=2
      --data.init_args.batch_size=2 --data.init_args.num_workers=0)
  fi
  part "training with and without" 530 python benchmarks/quality.py quickstart_gpu --results "$out" "${settings[@]}"
  finish
fi

if [ "$device" = cuda ]; then
  part "tests on the GPU" 150 python -m pytest -q -m gpu -p no:cacheprovider tests
fi
part "the block" 90 python benchmarks/cost.py --device "$device" "${block[@]}" --out "$out"
part "a training step" 120 python benchmarks/step.py --device "$device" --hosts videosaur slotcontrast "${step[@]}" --out "$out"
part "the loader" 110 python benchmarks/loader.py --device "$device" "${loader[@]}" --out "$out"

finish
