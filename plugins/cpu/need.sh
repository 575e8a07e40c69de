#!/usr/bin/env bash
# need.sh PROGRAM:PACKAGE...: the programs have to be there. With INGOT_APT_INSTALL=yes root installs
# the Debian packages of those that are missing.
set -euo pipefail
missing=()
for each in "$@"; do command -v "${each%%:*}" >/dev/null || missing+=("${each#*:}"); done
if [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" != 0 ] || [ "${INGOT_APT_INSTALL:-}" != yes ]; then
        echo "error: missing ${missing[*]}; run: sudo apt-get install ${missing[*]}" >&2
        echo "(as root, INGOT_APT_INSTALL=yes does it on the way)" >&2
        exit 1
    fi
    apt-get update -qq
    apt-get install -y -qq "${missing[@]}"
fi
