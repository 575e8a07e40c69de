#!/usr/bin/env bash
# Headers and sources from Debian's trixie, whose releases are newer than the machine's may be:
#
#   fetch_debian.sh OUT binary PACKAGE...   unpacks packages of this machine's architecture into OUT
#   fetch_debian.sh OUT source PACKAGE...   unpacks the sources as their authors released them
#
# Nothing is installed, and only what Debian's own keyring signs is taken. The mirror is the machine's.
set -euo pipefail
out=$1 kind=$2
shift 2
mirror=$(apt-get indextargets --format '$(ORIGIN) $(REPO_URI)' |
    awk '$1 == "Debian" && $2 !~ /security/ { print $2; exit }')
if [ -z "$mirror" ]; then
    echo "error: no Debian mirror among this machine's apt sources; run: apt-get update" >&2
    exit 1
fi
apt=$(mktemp -d)
trap 'rm -rf "$apt"' EXIT
# Lists of our own: none of these packages may be installed here by accident.
mkdir -p "$apt/lists/partial" "$apt/archives/partial" "$apt/found" "$apt/root"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
for type in deb deb-src; do echo "$type [signed-by=$keyring] $mirror trixie main"; done >"$apt/sources.list"
options=(-qq -o "Dir::Etc::sourcelist=$apt/sources.list" -o Dir::Etc::sourceparts=-
    -o "Dir::State::lists=$apt/lists" -o "Dir::Cache::archives=$apt/archives"
    -o "Dir::Cache::pkgcache=" -o "Dir::Cache::srcpkgcache=" -o APT::Sandbox::User=root)
apt-get "${options[@]}" update
cd "$apt/found"
if [ "$kind" = source ]; then
    apt-get "${options[@]}" source --download-only "$@"
    for archive in *.orig.tar.*; do tar -xf "$archive" -C "$apt/root"; done
else
    apt-get "${options[@]}" download "$@"
    for package in *.deb; do dpkg -x "$package" "$apt/root"; done
fi
mkdir -p "$out"
cp -r "$apt/root/." "$out"
