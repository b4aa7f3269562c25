#!/bin/sh
# Selects a power mode by its name in /etc/nvpmodel.conf: sh power.sh [NAME], 25W by default.
set -eu

mode=${1:-25W}
conf=${EDGEPACK_NVPMODEL_CONF:-/etc/nvpmodel.conf}

die() {
    printf 'power.sh: %s\n' "$1" >&2
    exit 1
}

# Lines look like: < POWER_MODEL ID=1 NAME=25W >
modes() {
    sed -n 's/^[[:space:]]*<[[:space:]]*POWER_MODEL[[:space:]][[:space:]]*ID=\([0-9][0-9]*\)[[:space:]][[:space:]]*NAME=\([^[:space:]>]*\)[[:space:]]*>.*$/\1 \2/p' "$conf"
}

[ -r "$conf" ] || die "$conf is missing: this is not a Jetson, or nvpmodel is not installed"
# AGX Orin's file writes MODE_30W where others write 30W.
found=$(modes | awk -v mode="$mode" '$2 == mode || $2 == "MODE_" mode { print; exit }')
id=${found%% *}
name=${found#* }
[ -n "$id" ] || die "$conf has no mode $mode; it has: $(modes | cut -d' ' -f2 | tr '\n' ' ')"
if nvpmodel -q | grep -qxF "NV Power Mode: $name"; then exit; fi
# Some changes ask for a reboot; without a terminal the answer is no, and the mode stays as it was.
nvpmodel -m "$id" </dev/null
nvpmodel -q | grep -qxF "NV Power Mode: $name" || die "mode $mode needs a reboot: run nvpmodel -m $id and confirm"
