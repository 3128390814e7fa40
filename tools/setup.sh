#!/usr/bin/env bash
# Sets up .venv in the repository root: system libraries (apt), Python packages at the versions of
# requirements.lock, and ffcv, which is compiled here because it has no wheels.
# Repeating it installs nothing. PYTHON=/path/to/python chooses the interpreter (3.11 or 3.12).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
stamp=.venv/rn50-setup-done
unfinished=.venv/rn50-setup-unfinished

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

no_python="no Python 3.11 or 3.12 here, and none by apt; get one with uv (https://docs.astral.sh/uv), then repeat this: \
uv python install 3.12 && PYTHON=\$(uv python find --system 3.12) bash tools/setup.sh"

usable() { # prints the version of a Python that runs and is a final 3.11 or 3.12, or fails
    "$1" -c 'import sys; v = sys.version_info
v[:2] in ((3, 11), (3, 12)) and v[3] == "final" or sys.exit(1); print("%d.%d.%d" % v[:3])' 2>/dev/null
}

find_python() { # 3.11 first: it is what most runs were made with
    local name path
    if [[ -n ${PYTHON:-} ]]; then
        usable "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is not a working Python 3.11 or 3.12"
        command -v "$PYTHON"
        return
    fi
    for name in python3.11 python3.12 python3; do
        while read -r path; do
            # A version manager's shim may be on PATH without working.
            if usable "$path" >/dev/null; then
                echo "$path"
                return
            fi
        done < <(type -aP "$name")
    done
}

fingerprint() { # of everything that decides what .venv should hold; $1: the Python's version
    printf '%s %s %s\n' "$root" "$1" "$(cat pyproject.toml requirements.lock setup.py rn50/data/csrc/* | sha256sum | cut -c1-64)"
}

up_to_date() {
    local version
    [[ -f $stamp ]] && compgen -G "rn50/data/_decode.*.so" >/dev/null && version=$(usable .venv/bin/python) || return 1
    if [[ -n ${PYTHON:-} ]]; then
        version=$(usable "$PYTHON") || fail "PYTHON=$PYTHON is not a working Python 3.11 or 3.12"
    fi
    [[ $(<"$stamp") == "$(fingerprint "$version")" ]]
}

# Sets `missing` to what compiling ffcv and loading OpenCV needs and is not here, as apt package names. Ends the set-up
# where apt has no Python for it either.
find_missing() {
    if [[ -z $python && -z $(apt_python) ]]; then fail "$no_python"; fi
    mapfile -t missing < <(missing_packages)
}

missing_packages() {
    local name version
    command -v g++ >/dev/null || echo build-essential
    command -v pkg-config >/dev/null || echo pkg-config
    pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
    if ! pkg-config --exists libturbojpeg 2>/dev/null; then
        if apt-cache show libturbojpeg0-dev >/dev/null 2>&1; then echo libturbojpeg0-dev; else echo libturbojpeg-dev; fi
    fi
    if [[ -z $python ]]; then
        name=$(apt_python)
        printf '%s\n' "$name" "$name-dev" "$name-venv"
        return
    fi
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "python$version-venv"
    "$python" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null ||
        echo "python$version-dev"
}

# Prints the package of a Python that apt could install and is usable; python3 while apt has no lists to look it up in.
apt_python() {
    local version
    if ! apt-cache show python3-venv >/dev/null 2>&1; then
        echo python3
        return
    fi
    for version in 3.11 3.12; do
        # Ubuntu 22.04 has 3.11.0~rc1 alone, in which torch.jit crashes.
        if [[ $(apt-cache show --no-all-versions "python$version" 2>/dev/null) =~ Version:\ [0-9.]+[^0-9.~] ]]; then
            echo "python$version"
            return
        fi
    done
}

install_packages() {
    local command=(apt-get install -y --no-install-recommends) elevate=()
    command -v apt-get >/dev/null ||
        fail "missing: ${missing[*]}; install what your system calls these, or use environment.yml (conda)"
    if ((EUID != 0)); then
        elevate=(sudo)
        sudo -n true 2>/dev/null ||
            fail "system packages are missing; run: sudo apt-get update && sudo ${command[*]} ${missing[*]}"
    fi
    "${elevate[@]}" apt-get update
    # Package names are looked up again now that apt knows its lists.
    find_missing
    "${elevate[@]}" env DEBIAN_FRONTEND=noninteractive "${command[@]}" "${missing[@]}" ||
        fail "apt-get could not install: ${missing[*]}"
}

# Whether an ffcv-like program compiles and links; pkg-config alone does not know about lost files.
compiles() {
    local flags
    read -rd '' -a flags < <(pkg-config --cflags --libs opencv4 libturbojpeg) || true
    printf '#include <opencv2/imgproc.hpp>\n#include <turbojpeg.h>\nint main() { return tjInitDecompress() == nullptr; }\n' |
        g++ -x c++ - -o /dev/null "${flags[@]}"
}

if up_to_date; then
    exit 0
fi
# Two set-ups at once would write into one .venv.
# NFS locks only what is open for writing.
if [[ -w pyproject.toml ]]; then exec 9<>pyproject.toml; else exec 9<pyproject.toml; fi
if command -v flock >/dev/null; then flock 9; fi
if up_to_date; then
    exit 0
fi

if [[ -e .venv && ! -f $stamp && ! -f $unfinished ]]; then
    fail ".venv exists and was not made by tools/setup.sh; remove or rename it"
fi

python=$(find_python)
find_missing
if ((${#missing[@]})); then
    install_packages
    python=$(find_python)
    find_missing
fi
[[ -n $python ]] || fail "$no_python"
((${#missing[@]} == 0)) || fail "still missing after installing: ${missing[*]}"
compiles || fail "a test program with OpenCV and libjpeg-turbo does not compile (see above); reinstall libopencv-dev and libturbojpeg0-dev"
version=$(usable "$python")

if [[ ! -f $stamp || -f $unfinished || $(usable .venv/bin/python) != "$version" || $(<"$stamp") != "$root "* ]]; then
    # An interrupted pip can leave half a package that it later takes for whole.
    rm -rf .venv
    mkdir .venv
    touch "$unfinished"
    echo "making .venv with Python $version ($python)"
    "$python" -m venv .venv
fi
touch "$unfinished"
rm -f "$stamp"

install() {
    .venv/bin/python -m pip install --disable-pip-version-check -c requirements.lock "$@"
}
# ffcv's build takes setuptools from the environment, since distutils is gone from Python 3.12.
install setuptools numpy
install --use-pep517 --no-build-isolation ffcv -e '.[test]'
if ! .venv/bin/python -c 'import ffcv' 2>/dev/null; then
    # pip keeps the ffcv it built once; that one breaks when the system's OpenCV changes.
    echo "building ffcv again"
    install --use-pep517 --no-build-isolation --no-cache-dir --no-deps --force-reinstall ffcv
fi
.venv/bin/python -c 'import cv2, ffcv, numba, torch, torchvision; from rn50.data import native; native.library()' || fail "the installed packages do not load (see above)"

fingerprint "$version" >"$stamp.new"
mv "$stamp.new" "$stamp"
rm -f "$unfinished"
echo "set-up done: Python $version, $(.venv/bin/python -c 'import torch; print("torch", torch.__version__)')"
