# The training environment for any machine with an NVIDIA driver: docker build -t rn50 . and then
#   docker run --gpus all --ipc=host --stop-timeout=30 -v /data/betons:/betons -v "$PWD/runs:/rn50/runs" rn50 \
#       python train_imagenet.py --config-file rn50_configs/rn50_16_epochs.yaml --data.dir=/betons
# Versions are those of requirements.lock, as everywhere; a test compares this file, pyproject.toml and environment.yml.
# torch brings its own CUDA libraries, so that the base needs the driver's interface alone.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04
ENV DEBIAN_FRONTEND=noninteractive PYTHONUNBUFFERED=1
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        build-essential git libopencv-dev libturbojpeg0-dev pkg-config python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /rn50
COPY . .
RUN PYTHON=python3.12 bash tools/setup.sh && rm -rf ~/.cache
ENV PATH=/rn50/.venv/bin:$PATH
# inside a container the instance's metadata is one network hop further away: launch with a hop limit of 2
CMD ["python", "train_imagenet.py", "--help"]
