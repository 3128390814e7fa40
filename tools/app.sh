#!/usr/bin/env bash
# Opens the Space's page on this machine, with the packages that the Space gets: bash tools/app.sh MODEL_FOLDER
#   --browser    after MODEL_FOLDER: the page of the static Space, which runs the model in the browser
# They are in .venv-app, apart from .venv: Gradio does not allow the Pillow that training is tested with.
#   --install    only make .venv-app
# GRADIO_SERVER_PORT chooses the port; without it 7860 or the next that is free. Repeating it installs nothing.
set -euo pipefail
if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
stamp=$root/.venv-app/rn50-app-done

page=app/app.py
if [[ $# == 2 && $2 == --browser ]]; then
    page=app/browser/build.py
elif (($# != 1)); then
    echo "error: usage: bash tools/app.sh MODEL_FOLDER [--browser] (tools/export_model.py makes one)" >&2
    exit 2
fi
# app.py reads ~ and $NAME
if [[ $1 != --install && $1 != *['~$']* && ! -f $1/config.json ]]; then
    echo "error: no exported model in $1; tools/export_model.py makes one" >&2
    exit 1
fi

wanted="$root $(sha256sum <"$root/app/requirements.txt" | cut -c1-64)"
if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
    exec 9<>"$root/app/requirements.txt" # for writing: else NFS does not lock it
    if command -v flock >/dev/null; then flock 9; fi
fi
if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
    if [[ ! -x $root/.venv/bin/python ]]; then
        echo "error: no .venv here; run: bash tools/setup.sh" >&2
        exit 1
    fi
    rm -rf "$root/.venv-app"
    "$root/.venv/bin/python" -m venv "$root/.venv-app"
    "$root/.venv-app/bin/python" -m pip install --quiet --disable-pip-version-check -r "$root/app/requirements.txt"
    printf '%s\n' "$wanted" >"$stamp"
fi
exec 9>&-
if [[ $1 != --install ]]; then
    MODEL_DIR=$1 exec "$root/.venv-app/bin/python" "$root/$page"
fi
