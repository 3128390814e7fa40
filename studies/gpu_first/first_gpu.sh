#!/usr/bin/env bash
# The first minutes on a GPU, in parts, each under its own time limit so that one failure does not cost the rest.
#   OUT=DIR bash studies/gpu_first/first_gpu.sh device tests step untuned compiled     # needs no data
#   OUT=DIR SAMPLES=DIR bash studies/gpu_first/first_gpu.sh loader                     # a folder of ImageNet's JPEGs
#   OUT=DIR BETONS=DIR bash studies/gpu_first/first_gpu.sh together flagship           # Imagenette as 160-px betons
# OUT gets log.txt (all output), the JSON of the studies, profile.txt and runs.jsonl (the rows of all trainings).
# QUICK=1 rehearses on a processor with tiny settings.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
export PYTHONUNBUFFERED=1 PYTHONPATH=.
python=.venv/bin/python
work=${WORK:-/tmp/first_gpu}
mkdir -p "$work" "$OUT"
log=$OUT/log.txt
quick=${QUICK:-}
begun=$SECONDS

tiny=(${quick:+--model.arch=resnet18 --resolution.start=32 --resolution.end=32 --validation.resolutions=32
    --validation.headline_resolution=32 --training.epochs=2 --resolution.start_ramp=0 --resolution.end_ramp=0
    --lr.warmup_epochs=1})

limit() { # NAME SECONDS COMMAND...: its output goes to the log; one line says how it ended
    local name=$1 most=$2 started=$SECONDS status
    shift 2
    timeout -k 5 "$most" "$@" >"$work/$name.txt" 2>&1
    status=$?
    {
        echo "=== $name: $*"
        cat "$work/$name.txt"
        echo "=== $name: status $status"
    } >>"$log"
    echo "$name: status $status, $((SECONDS - started)) s, $((SECONDS - begun)) s in all; $(tail -1 "$work/$name.txt" | cut -c1-160)"
}

training() { # NAME SECONDS SETTINGS...: a run on Imagenette, the last of each setting counts; its rows to runs.jsonl
    local name=$1 most=$2 setting
    local -A last=()
    shift 2
    for setting in "$@" "${tiny[@]}"; do last[${setting%%=*}]=$setting; done
    limit "$name" "$most" "$python" train_imagenet.py "${last[@]}" --data.dir="$BETONS" --logging.folder="$work/runs" \
        --logging.run_name="$name"
    rows "$name"
}

rows() {
    "$python" - "$work/runs/$1/log.jsonl" "$1" >>"$OUT/runs.jsonl" 2>>"$log" <<'PY'
import json
import sys

keep = ("epoch", "step", "resolution", "train_loss", "top1", "images_per_second", "data_wait_fraction", "train_seconds")
keep += ("val_seconds", "cpu_seconds", "elapsed_seconds", "skipped_steps")
with open(sys.argv[1], encoding="utf-8") as lines:
    for line in lines:
        row = json.loads(line)
        print(json.dumps({"run": sys.argv[2]} | {key: row[key] for key in keep if key in row}))
PY
}

device() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader | tee -a "$log"
    grep -m1 'model name' /proc/cpuinfo | tee -a "$log"
}

alone() { # what a time limit has left running would slow down what is measured next
    pkill -9 -f "$python"
    pkill -9 -f compile_worker
    sleep 1
}

tests() {
    OMP_NUM_THREADS=2 limit tests 150 "$python" -m pytest -v -n 4 --dist=load -p no:cacheprovider tests/test_gpu.py tests/test_learner.py
}

small=(${quick:+--device cpu --arch resnet18 --batch 2 --repeats 1 --seconds 0.01 --warm-up 1})

study() { # NAME SECONDS ARGUMENTS...
    local name=$1 most=$2
    shift 2
    limit "$name" "$most" "$python" studies/gpu_step/gpu_step.py --json "$OUT/$name.json" "$@" "${small[@]}"
}

compiling() { study compiling 110 --only fp16_compiled --resolutions 176 --repeats 1 --seconds 0.01; }
step() {
    study step 75 --resolutions 176 --seconds 0.2 --repeats 5 --profile "$OUT/profile.txt" \
        --only fp16,ffcv,fp16_dense_blur,fp16_no_blur_maxpool,fp16_no_blur,torchvision,fp16_contiguous,bf16
}
compiled() { study compiled 60 --resolutions 176 --seconds 0.2 --only fp16,ffcv,fp16_compiled; }
untuned() { study untuned 40 --resolutions 176,128 --seconds 0.2 --cudnn 0 --only fp16,bf16,ffcv; }

loader() {
    local threads
    for threads in 1 4 16; do
        limit "loader_$threads" 30 "$python" studies/loader/benchmark_loader.py --images "$SAMPLES" --resolution 176 \
            --threads "$threads" --repeats 3 --copies 16 --only rn50
    done
}

# ResNet-50 with the flagship's loss, average and blurs, at one resolution: cuDNN takes 13 s for each
imagenette=(--config-file=rn50_configs/rn50_78.yaml --data.rung=160 --training.epochs=8 --training.batch_size=128
    --training.micro_batch=128 --lr.warmup_epochs=2 --lr.lr_per_256=0.4 --resolution.start=128 --resolution.end=128
    --resolution.start_ramp=0 --resolution.end_ramp=0 --validation.crop_ratio=1 --validation.resolutions=144
    --validation.headline_resolution=144 --validation.every=20)

types() { # side by side: which is right, not which is fast
    local kind
    for kind in fp32 fp16 bf16; do
        training "$kind" 110 "${imagenette[@]}" --training.precision="$kind" --data.workers=3 &
    done
}

resume() { # killed in the middle of an epoch, then the same command
    local command=("${imagenette[@]}" --training.precision=fp16 --training.epochs=4 --lr.warmup_epochs=1
        --logging.checkpoint_steps=25 --data.workers=3)
    training resume 60 "${command[@]}" &
    local waited=0
    while [[ ! -e $work/runs/resume/previous.pt && $waited -lt 600 ]]; do
        sleep 0.1
        waited=$((waited + 1))
    done
    pkill -9 -f run_name=resume
    sleep 1
    training resume 60 "${command[@]}"
}

flagship() { # its own path: 88 to 176 px, BCE, average, both blurs; a batch of 256, because there are few images
    training flagship 150 --config-file=rn50_configs/rn50_78.yaml --data.rung=160 --training.epochs=40 \
        --training.batch_size=256 --training.precision=fp16 --lr.warmup_epochs=4 --lr.lr_per_256=0.4 \
        --training.weight_decay=1e-4 \
        --resolution.start_ramp=16 --resolution.end_ramp=32 --resolution.multiple=44 --validation.every=13 \
        --validation.crop_ratio=1 --validation.resolutions=176,224 --validation.headline_resolution=224 "$@"
}

together() { # what is to be right and not fast, at the same time
    tests &
    compiling &
    types
    resume &
    wait
    alone
}

for part in "$@"; do
    "$part"
done
