#!/bin/sh
# What `edgepack probe --root` reads of a device, as a tar, for a device that has no edgepack:
#   sh capture.sh [FILE]     on the device; FILE is edgepack-capture.tar when left out
#   mkdir device; tar -xf edgepack-capture.tar -C device; edgepack probe --root device -o device.yaml
# It only reads. Left out are serial numbers, GPU UUIDs and MAC addresses: of /proc/cpuinfo the Serial line, of the
# NVIDIA driver's files all but the name, of nvidia-smi all but name, memory and compute capability.
# EDGEPACK_ROOT (/) is where it reads.
set -eu
umask 077
LC_ALL=C
export LC_ALL

out=${1:-edgepack-capture.tar}
root=${EDGEPACK_ROOT:-/}
root=${root%/}
here=$(mktemp -d)
trap 'rm -rf -- "$here"' EXIT
trap 'exit 1' HUP INT TERM

# The lines of a file that a pattern keeps, under the same name; a file that is not there or not readable is left out.
keep() {
    pattern=$2
    to=$here/$(printf '%s' "$1" | tr ':' '_')
    [ -f "$root/$1" ] || return 0
    mkdir -p -- "$(dirname -- "$to")"
    grep -a -v -i -e '^serial' -e 'uuid' -- "$root/$1" 2>/dev/null | grep -a -e "$pattern" >"$to" || rm -f -- "$to"
}

for file in \
    etc/nv_tegra_release \
    etc/nvpmodel.conf \
    etc/os-release \
    proc/cpuinfo \
    proc/device-tree/compatible \
    proc/device-tree/model \
    proc/meminfo \
    proc/sys/kernel/osrelease \
    sys/class/dmi/id/product_name \
    sys/fs/cgroup/cpu.max \
    sys/fs/cgroup/memory.max \
    sys/fs/cgroup/memory.stat \
    var/lib/nvpmodel/status; do
    keep "$file" ''
done
keep proc/self/status '^Cpus_allowed_list:'
for file in "$root"/sys/devices/system/cpu/cpu0/cache/index*/size; do
    keep "${file#"$root"/}" ''
done
for file in "$root"/proc/driver/nvidia/gpus/*/information; do
    keep "${file#"$root"/}" '^Model:'
done

# A driver that hangs must not hang this: it has ten seconds, where timeout is there to count them.
ask() {
    if command -v timeout >/dev/null; then timeout 10 "$@"; else "$@"; fi
}
if [ -z "$root" ] && command -v nvidia-smi >/dev/null; then
    ask nvidia-smi --query-gpu=name,memory.total,memory.used,compute_cap --format=csv \
        >"$here/nvidia-smi.csv" 2>/dev/null || rm -f -- "$here/nvidia-smi.csv"
fi

[ -s "$here/proc/cpuinfo" ] || [ -s "$here/proc/meminfo" ] || {
    printf 'capture.sh: %s/proc has neither cpuinfo nor meminfo\n' "$root" >&2
    exit 1
}
tar --owner=0 --group=0 --numeric-owner -cf "$out" -C "$here" . 2>/dev/null || tar -cf "$out" -C "$here" .
printf '%s\n' "$out"
