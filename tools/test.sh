#!/usr/bin/env bash
# Set-up, linters, tests. Arguments go to pytest: bash tools/test.sh -k losses
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh
.venv/bin/python -m ruff check .
if command -v shellcheck >/dev/null; then
    shellcheck tools/*.sh .ci/run
fi
exec .venv/bin/python -m pytest -q "$@"
