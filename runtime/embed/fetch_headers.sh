#!/usr/bin/env bash
# What the C++ library is built with, into the folder given (default .tools/cpp): headers of ONNX
# Runtime, nlohmann-json and doctest from Debian's packages, and a link to the libonnxruntime.so of
# the Python package, so that C++ and Python run the same one.
#
# The packages are unpacked, not installed, and only those that Debian's own keyring signs. cmake,
# libssl-dev and g++ are needed, and the programs named after the folder (valgrind); where they are
# missing, INGOT_APT_INSTALL=yes has root install them.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
out=${1:-$root/.tools/cpp}
shift || true
python=${PYTHON:-$root/.venv/bin/python}

needed=(cmake:cmake g++:g++)
[ -e /usr/include/openssl/evp.h ] || needed+=(/usr/include/openssl/evp.h:libssl-dev)
for tool in "$@"; do needed+=("$tool:$tool"); done
"$root/plugins/cpu/need.sh" "${needed[@]}"

if [ ! -e "$out/.fetched" ]; then
    mkdir -p "$out"
    unpacked=$(mktemp -d)
    trap 'rm -rf "$unpacked"' EXIT
    "$root/plugins/cpu/fetch_debian.sh" "$unpacked" binary libonnxruntime-dev nlohmann-json3-dev doctest-dev
    mkdir -p "$out/include"
    cp -r "$unpacked"/usr/include/. "$out/include"
    # Debian's C++ header of ONNX Runtime lies a folder deeper than in Microsoft's own archive.
    if [ -d "$out/include/onnxruntime" ]; then cp -r "$out"/include/onnxruntime/. "$out/include"; fi
    touch "$out/.fetched"
fi

capi=$("$python" -c 'import importlib.util as u, pathlib as p
print(p.Path(u.find_spec("onnxruntime").origin).parent / "capi")')
library=$(find "$capi" -name 'libonnxruntime.so.*' | head -n 1)
if [ -z "$library" ]; then
    echo "error: no libonnxruntime.so in $capi; reinstall the Python package onnxruntime" >&2
    exit 1
fi
mkdir -p "$out/lib"
# The name of the file and that which a program asks for when it starts (SONAME).
ln -sf "$library" "$out/lib/libonnxruntime.so"
ln -sf "$library" "$out/lib/libonnxruntime.so.1"
