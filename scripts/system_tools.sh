#!/bin/sh
# Installs the Debian packages whose programs the integration tests run, and those that are named to it; does nothing when
# all are there.
set -eu
missing=""
need() { command -v "$1" >/dev/null 2>&1 || missing="$missing $2"; }
need skopeo skopeo
need ssh-keygen openssh-client
need /usr/sbin/sshd openssh-server
need systemd-analyze systemd
need shellcheck shellcheck
need qemu-aarch64-static qemu-user-static
need debootstrap debootstrap
need swupdate swupdate
need docker-registry docker-registry
need openssl openssl
need qemu-system-x86_64 qemu-system-x86
need mkfs.ext4 e2fsprogs
need mkfs.xfs xfsprogs
need strace strace
need aarch64-linux-gnu-g++ g++-aarch64-linux-gnu
need g++ g++
need chromium chromium
for each in "$@"; do need "$each" "$each"; done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "the tests need these Debian packages:$missing" >&2
    exit 1
fi
apt-get update -qq
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
