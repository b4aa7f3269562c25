#!/bin/sh
# Installs packages into an image and leaves no lists behind: sh apt-install.sh PACKAGE...
# On Debian the archive is as it was at $SNAPSHOT (20261120T000000Z), so that the same packages come tomorrow; an empty
# SNAPSHOT takes the image's own sources. Ubuntu's archive has one version of each package, the newest.
set -eu
# shellcheck source=/dev/null
. /etc/os-release
sources=/etc/apt/sources.list.d
if [ "$ID" = debian ] && [ -n "${SNAPSHOT:-}" ]; then
    sources=/tmp/snapshot
    mkdir $sources
    # Signed as ever, but past the date after which apt takes a list for stale.
    cat >$sources/snapshot.sources <<SOURCES
Types: deb
URIs: http://snapshot.debian.org/archive/debian/$SNAPSHOT
Suites: $VERSION_CODENAME
Components: main
Check-Valid-Until: no
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://snapshot.debian.org/archive/debian-security/$SNAPSHOT
Suites: $VERSION_CODENAME-security
Components: main
Check-Valid-Until: no
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
SOURCES
    : >/tmp/snapshot.list
    list=/tmp/snapshot.list
fi
apt() { apt-get -o Dir::Etc::sourcelist="${list:-/etc/apt/sources.list}" -o Dir::Etc::sourceparts=$sources "$@"; }
apt -o APT::Update::Error-Mode=any -o Acquire::Retries=3 update
DEBIAN_FRONTEND=noninteractive apt install --yes --no-install-recommends "$@"
rm -rf /tmp/snapshot /tmp/snapshot.list /var/lib/apt/lists/* /var/cache/apt/archives/*.deb /var/cache/apt/*.bin
