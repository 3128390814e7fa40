#!/usr/bin/env bash
# Set-up, linters, tests. Arguments go to pytest: bash tools/test.sh -k losses
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh
bash tools/app.sh --install || echo "app/requirements.txt could not be installed; the app's tests will be skipped" >&2
# The tests of the page are in a real browser; where it cannot be installed they are skipped, and say so.
if ! command -v chromedriver >/dev/null && command -v apt-get >/dev/null; then
    elevate=()
    if ((EUID != 0)); then elevate=(sudo -n); fi
    if ! { "${elevate[@]}" apt-get update &&
        "${elevate[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
            chromium chromium-driver; } >.venv/chromium.log 2>&1; then
        echo "chromium could not be installed (see .venv/chromium.log); the browser tests will be skipped" >&2
    fi
fi
.venv/bin/python -m ruff check .
if command -v shellcheck >/dev/null; then
    shellcheck tools/*.sh rn50/cloud/*.sh studies/*/*.sh .ci/run
fi
# More tests at a time than there are cores, for they wait for processes much of their time; memory is for four.
workers=$(($(nproc) + 1))
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -q -n "$((workers < 4 ? workers : 4))" --dist=loadfile --no-loadscope-reorder "$@"
