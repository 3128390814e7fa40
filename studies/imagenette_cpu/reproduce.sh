#!/usr/bin/env bash
# Makes studies/imagenette_cpu/ again: ResNet-50 from scratch on Imagenette through FFCV, and the same
# processor time with a plain torchvision DataLoader at one fixed resolution. Stop it at will: it resumes by epoch.
#   IMAGENETTE_DIR=/path/to/imagenette bash studies/imagenette_cpu/reproduce.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${IMAGENETTE_DIR:?set it to a folder with train/ and val/ (DATA=imagenette bash tools/demo.sh downloads one)}"
bash tools/setup.sh
python=.venv/bin/python

# Processor time is counted, and threads that wait in a spin loop would be counted too.
export OMP_WAIT_POLICY=passive
$python write_dataset.py --source.dir="$IMAGENETTE_DIR" --out.dir=data/imagenette --out.resolutions=128,224
$python train_imagenet.py --config-file rn50_configs/imagenette_cpu.yaml
minutes=$($python - <<'PY'
from rn50.files import read_rows
print(sum(row["cpu_seconds"] for row in read_rows("runs/imagenette_cpu/log.jsonl")) / 60)
PY
)
$python studies/imagenette_cpu/baseline_torchvision.py --data "$IMAGENETTE_DIR" --resolution 80 --eval-resolution 96 \
  --lr-per-256 0.2 --cpu-minutes "$minutes" --out runs/imagenette_baseline
$python tools/compare_runs.py runs/imagenette_cpu --out runs/imagenette_cpu/curves.png
