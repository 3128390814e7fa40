#!/usr/bin/env bash
# The whole job in small, offline: images -> .beton files -> training -> evaluation -> curves.
#   bash tools/demo.sh                    ten classes of generated textures
#   DATA=imagenette bash tools/demo.sh    Imagenette, from IMAGENETTE_DIR (train/ and val/ in it) or downloaded
# Arguments go to train_imagenet.py. Everything is written to demo/; images and .beton files are kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

data=${DATA:-textures}
need=0
settings=()
case $data in
textures)
    need=95
    ;;
imagenette)
    # 9,469 photographs instead of 2,000 textures: fewer epochs, and no particular accuracy is promised.
    settings=(--training.epochs=4 --lr.warmup_epochs=1 --resolution.start_ramp=2 --resolution.end_ramp=3 --validation.every=1)
    ;;
*)
    echo "error: DATA=$data is neither textures nor imagenette" >&2
    exit 2
    ;;
esac

bash tools/setup.sh
python=.venv/bin/python
betons=demo/betons-$data
runs=demo/runs
run=$data
mkdir -p demo

echo "== 1/4 images"
if [[ $data == textures ]]; then
    tree=demo/textures
    "$python" -m rn50.textures "$tree" --train-per-class 200 --val-per-class 50
elif [[ -n ${IMAGENETTE_DIR:-} ]]; then
    tree=$IMAGENETTE_DIR
    if [[ ! -d $tree/train || ! -d $tree/val ]]; then
        echo "error: IMAGENETTE_DIR=$tree has no train/ and val/ in it" >&2
        exit 1
    fi
    echo "$tree"
else
    tree=data/imagenette2-320
    if [[ ! -d $tree ]]; then
        # Unpacked elsewhere and renamed, so that half an archive is never taken for the whole.
        rm -rf data/imagenette.partial
        mkdir -p data/imagenette.partial
        "$python" -c 'import sys
from torchvision.datasets import Imagenette
Imagenette(sys.argv[1], split="train", size="320px", download=True)' data/imagenette.partial || {
            echo "error: Imagenette could not be downloaded; unpack it yourself and set IMAGENETTE_DIR" >&2
            exit 1
        }
        mv data/imagenette.partial/imagenette2-320 "$tree"
        rm -rf data/imagenette.partial
    fi
    echo "$tree"
fi

echo "== 2/4 .beton files, at two sizes"
"$python" write_dataset.py --source.dir="$tree" --out.dir="$betons" --out.resolutions=112,160

echo "== 3/4 training and evaluation"
# The folder of an earlier demo would be resumed, that is, found finished.
rm -rf "${runs:?}/$run"
"$python" train_imagenet.py --config-file rn50_configs/demo.yaml --data.dir="$betons" \
    --logging.folder="$runs" --logging.run_name="$run" "${settings[@]}" "$@"

echo "== 4/4 curves"
"$python" tools/plot_log.py "$runs/$run" --out "demo/$run.png"

"$python" - "$runs/$run/log.jsonl" "$need" "$data" "demo/$run.png" <<'PY'
import json
import sys

log, need, data, curves = sys.argv[1:]
with open(log, encoding="utf-8") as lines:
    row = json.loads(list(lines)[-1])
print(f"\ntop-1 {row['top1']:.2f} % on the validation images of {data}, after {row['epoch'] + 1} epochs")
print(f"curves: {curves}")
if row["top1"] < float(need):
    sys.exit(f"error: top-1 is below {need} %; something is wrong with this installation or with the code")
PY

cat <<TEXT

What to do next
  look at the run        .venv/bin/tensorboard --logdir $runs
  evaluate it again      .venv/bin/python train_imagenet.py --config-file $runs/$run/config.yaml --training.eval_only=true
  try photographs        DATA=imagenette bash tools/demo.sh
  train on ImageNet      README.md
TEXT
